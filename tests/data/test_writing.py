from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rcnn.data.folder import read_dataset, splits
from rcnn.data.writing import convert_tables
from rcnn.errors import DataError

# 1/3 and the like: numbers that no rounding survives.
AWKWARD = [[10 + 1 / 3, 20 + 1 / 7, 30 + 1 / 9, 40 + 1 / 11], [0, 0, 100, 80], [0.1, 0.2, 1.3, 1.4]]


@pytest.fixture
def source(folders: Any) -> Path:
    content = folders.coco_content()
    content["annotations"] = [
        {"id": number, "image_id": 7, "category_id": 5 + 15 * (number % 2), "bbox": box}
        for number, box in enumerate(AWKWARD)
    ]
    return folders.coco(content)


@pytest.mark.parametrize("to", ["coco", "voc", "yolo"])
@pytest.mark.parametrize("pictures", ["copy", "link"])
def test_boxes_survive(source: Path, tmp_path: Path, to: Any, pictures: Any) -> None:
    table = read_dataset(source)
    done = convert_tables([table], tmp_path / "new", to=to, pictures=pictures)
    assert (done.num_pictures, done.num_boxes, done.lost) == (2, 3, ())
    again = read_dataset(tmp_path / "new")
    assert again.format == to.upper()
    assert again.classes.names == table.classes.names
    np.testing.assert_allclose(again.boxes_xyxy, table.boxes_xyxy, rtol=1e-13, atol=1e-12)
    assert again.labels.tolist() == table.labels.tolist()
    assert again.starts.tolist() == table.starts.tolist()
    assert again.sizes.tolist() == table.sizes.tolist()
    for index in range(2):
        assert again.path(index).read_bytes() == table.path(index).read_bytes()
        assert again.path(index).is_symlink() is (pictures == "link")


@pytest.mark.parametrize("to", ["coco", "voc"])
def test_ignored_regions_ids_and_integers_survive(folders: Any, to: Any) -> None:
    table = read_dataset(folders.coco())
    done = convert_tables([table], folders.root / "new", to=to)
    again = read_dataset(folders.root / "new")
    assert again.ignored.tolist() == [False, True]
    assert np.array_equal(again.boxes_xyxy, table.boxes_xyxy)
    if to == "coco":
        assert done.lost == ()
        assert again.areas.tolist() == table.areas.tolist()
        assert again.image_ids.tolist() == table.image_ids.tolist()
        assert again.classes == table.classes
    else:
        assert "the areas of the outlines were left out" in done.lost[0]
        assert "<xmin>11</xmin>" in (folders.root / "new/Annotations/a.xml").read_text()


def test_yolo_says_what_it_cannot_hold(folders: Any) -> None:
    done = convert_tables([read_dataset(folders.coco())], folders.root / "new", to="yolo")
    assert done.num_boxes == 1
    assert "ignored regions (crowd, difficult) left out, as YOLO has no place for them: 1" in done.lost


def test_voc_says_which_boxes_become_points(folders: Any) -> None:
    content = folders.coco_content()
    content["annotations"] = [{"id": 1, "image_id": 7, "category_id": 5, "bbox": [3, 3, 1, 9]}]
    done = convert_tables([read_dataset(folders.coco(content))], folders.root / "new", to="voc")
    assert done.lost == ("boxes at most one pixel wide or high, which VOC cannot tell from points: 1",)
    assert len(read_dataset(folders.root / "new").findings.left_out) == 1


def test_real_voc_to_coco_with_its_overlapping_splits(shared: Path, tmp_path: Path) -> None:
    tables = [read_dataset(shared / "data/bccd", split=split) for split in ("val", "test")]
    convert_tables(tables, tmp_path / "coco", to="coco", pictures="link")
    assert splits(tmp_path / "coco") == ("test", "val")
    overlapping = [read_dataset(shared / "data/bccd", split=split) for split in ("val", "trainval")]
    convert_tables(overlapping, tmp_path / "voc", to="voc", pictures="link")
    for table in (*tables, overlapping[1]):
        folder = tmp_path / ("voc" if table.split == "trainval" else "coco")
        again = read_dataset(folder, split=table.split)
        assert np.array_equal(again.boxes_xyxy, table.boxes_xyxy)
        assert np.array_equal(again.labels, table.labels)
        assert not again.findings


def test_nothing_is_overwritten(source: Path, tmp_path: Path) -> None:
    table = read_dataset(source)
    convert_tables([table], tmp_path / "new", to="coco")
    with pytest.raises(DataError, match="not empty; choose a new one"):
        convert_tables([table], tmp_path / "new", to="voc")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="not empty"):
        convert_tables([table], tmp_path / "file", to="voc")


def test_names_that_clash_are_all_named(folders: Any) -> None:
    content = folders.coco_content()
    content["images"][1]["file_name"] = "sub/a.png"
    table = read_dataset(folders.coco(content))
    with pytest.raises(DataError, match=r"sub/a\.png: its name clashes with that of .*a\.jpg"):
        convert_tables([table], folders.root / "new", to="voc")
    assert not (folders.root / "new").exists()
    convert_tables([table], folders.root / "new", to="coco")
    assert read_dataset(folders.root / "new").path(1).is_file()


def test_yolo_has_only_three_splits(folders: Any) -> None:
    table = read_dataset(folders.coco(split="everything"))
    with pytest.raises(DataError, match=r'split "everything": .*allowed: train, val or test'):
        convert_tables([table], folders.root / "new", to="yolo")


def test_splits_with_other_classes_are_refused(folders: Any) -> None:
    folders.coco(split="train")
    content = folders.coco_content()
    content["categories"][0]["name"] = "wolf"
    folders.coco(content, split="val")
    tables = [read_dataset(folders.root, split=split) for split in ("train", "val")]
    with pytest.raises(DataError, match="have different classes"):
        convert_tables(tables, folders.root / "new", to="coco")
