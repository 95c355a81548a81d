from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from rcnn.data.folder import read_dataset, splits
from rcnn.errors import DataError


def test_splits_are_found_under_their_usual_names(folders: Any) -> None:
    for split in ("train2017", "val2017"):
        folders.coco(split=split)
    assert splits(folders.root) == ("train2017", "val2017")
    assert read_dataset(folders.root, split="train").split == "train2017"
    assert read_dataset(folders.root, split="valid").split == "val2017"
    with pytest.raises(DataError, match=r'there is no split "test"; allowed: train2017, val2017'):
        read_dataset(folders.root, split="test")
    with pytest.raises(DataError, match=r"several splits, and none was chosen; allowed: train2017, val2017"):
        read_dataset(folders.root)


def test_a_folder_that_is_none_of_them(folders: Any) -> None:
    folders.text("notes.txt", "")
    folders.picture("pictures/a.jpg")
    with pytest.raises(DataError) as raised:
        read_dataset(folders.root)
    message = str(raised.value)
    assert "found: notes.txt, pictures/" in message
    for name in ("COCO: annotations/instances_", "VOC: Annotations/", "YOLO: data.yaml"):
        assert name in message


def test_a_folder_that_is_not_there(folders: Any) -> None:
    (folders.root / "cells").mkdir()
    with pytest.raises(DataError, match=r'no such folder; did you mean "cells"\?'):
        read_dataset(folders.root / "cell")


def test_several_formats_at_once_need_a_choice(folders: Any) -> None:
    folders.coco()
    folders.yolo({"a": "0 .5 .5 .1 .1"})
    with pytest.raises(DataError, match="several formats: COCO and YOLO"):
        read_dataset(folders.root)
    assert read_dataset(folders.root, format="yolo").format == "YOLO"
    assert read_dataset(folders.root / "annotations/instances_train.json").format == "COCO"


def test_select(folders: Any) -> None:
    content = folders.coco_content()
    content["images"].append({"id": 9, "file_name": "c.jpg", "width": 100, "height": 80})
    content["annotations"].append({"id": 3, "image_id": 9, "category_id": 5, "bbox": [1, 2, 3, 4]})
    table = read_dataset(folders.coco(content)).select([2, 1, 0])
    assert table.image_ids.tolist() == [9, 3, 7]
    assert table.starts.tolist() == [0, 1, 1, 3]
    assert table.labels.tolist() == [0, 1, 0]
    assert table.boxes_xyxy[0].tolist() == [1, 2, 4, 6]
    assert table.path(0).name == "c.jpg"
    assert len(table.select([]).labels) == 0
    assert len(table.select(np.array([1])).labels) == 0


def test_a_hundred_thousand_annotations_read_alike_in_any_order(folders: Any) -> None:
    """Against a plain loop, at a size where every vectorised step has something to get wrong."""
    generator = np.random.default_rng(0)
    count, num_images = 100_000, 2_000
    images = [{"id": int(i) * 3, "file_name": f"{i}.jpg", "width": 100, "height": 80} for i in range(num_images)]
    corners = generator.integers(0, 40, (count, 2)).tolist()
    sides = generator.integers(1, 41, (count, 2)).tolist()
    owners = (generator.integers(0, num_images, count) * 3).tolist()
    categories = generator.choice([1, 5, 90], count).tolist()
    annotations = [
        {"id": n, "image_id": owners[n], "category_id": categories[n], "bbox": [*corners[n], *sides[n]]}
        for n in range(count)
    ]
    listed = [{"id": 90, "name": "c"}, {"id": 1, "name": "a"}, {"id": 5, "name": "b"}]
    text = json.dumps({"images": images, "annotations": annotations, "categories": listed})
    table = read_dataset(folders.text("big.json", text), check_files=False)
    expected: dict[int, list] = {image["id"]: [] for image in images}
    for n in range(count):
        (x, y), (w, h) = corners[n], sides[n]
        expected[owners[n]].append(([x, y, x + w, y + h], {1: 0, 5: 1, 90: 2}[categories[n]]))
    for index, image_id in enumerate(table.image_ids.tolist()):
        rows = table.rows(index)
        pairs = list(zip(table.boxes_xyxy[rows].tolist(), table.labels[rows].tolist(), strict=True))
        assert pairs == expected[image_id]
