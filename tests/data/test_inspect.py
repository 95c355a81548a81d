from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rcnn.data.folder import read_dataset
from rcnn.data.inspect import inspect_dataset
from rcnn.data.statistics import count
from rcnn.errors import DataError


def test_real_data_have_two_warnings_and_no_error(shared: Path) -> None:
    result = inspect_dataset(shared / "data/bccd")
    assert result.errors == []
    assert [Path(problem.where.split(": ")[0]).stem for problem in result.warnings] == [
        "BloodImage_00343",
        "BloodImage_00338",
    ]
    assert result.num_pictures == 364
    assert [table.split for table in result.tables] == ["test", "train", "trainval", "val"]


def test_strict_makes_bad_boxes_errors(shared: Path) -> None:
    result = inspect_dataset(shared / "data/bccd", bad_boxes="error")
    assert len(result.errors) == 2


def test_everything_wrong_at_once(folders: Any) -> None:
    generator = np.random.default_rng(0)
    content = folders.coco_content()
    content["images"] += [
        {"id": number, "file_name": f"{number}.png", "width": 100, "height": 80} for number in (11, 12, 13)
    ]
    content["categories"].append({"id": 9, "name": "unicorn"})
    content["annotations"] += [
        {"id": 3, "image_id": 11, "category_id": 5, "bbox": [1, 2, 3, 4]},
        {"id": 4, "image_id": 11, "category_id": 5, "bbox": [1, 2, 3, 4]},
        {"id": 5, "image_id": 11, "category_id": 5, "bbox": [1, 2, 0, 4]},
    ]
    root = folders.coco(content)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (80, 100)).save(root / "train/a.jpg", exif=exif)  # turned to 100 x 80, as stated
    Image.new("RGB", (90, 80)).save(root / "train/12.png")  # another size than stated
    pixels = generator.integers(0, 256, (80, 100, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / "train/13.png")
    whole = (root / "train/13.png").read_bytes()
    (root / "train/13.png").write_bytes(whole[: len(whole) // 2])  # its head is there, half of it is not

    heads, decoded = inspect_dataset(root), inspect_dataset(root, decode=True)
    assert [Path(problem.where).name for problem in heads.errors] == ["12.png"]
    assert [Path(problem.where).name for problem in decoded.errors] == ["12.png", "13.png"]
    warnings = [str(problem) for problem in heads.warnings]
    assert any("annotation 5: the box" in text for text in warnings)
    assert any('2 equal boxes of "cat" (x1, y1, x2, y2 = 1, 2, 4, 6)' in text for text in warnings)
    assert any("a.jpg: an EXIF orientation turns the picture" in text for text in warnings)
    assert any('split "train": the class "unicorn" has no box' in text for text in warnings)
    assert len(warnings) == 4


def test_a_broken_split_does_not_hide_the_other(folders: Any) -> None:
    folders.coco(split="train")
    content = folders.coco_content()
    content["annotations"][0]["image_id"] = 99
    folders.coco(content, split="val")
    result = inspect_dataset(folders.root)
    assert [table.split for table in result.tables] == ["train"]
    assert ["instances_val.json: annotation 1" in problem.where for problem in result.errors] == [True]
    with pytest.raises(DataError, match='no split "test"'):
        inspect_dataset(folders.root, split="test")


def test_pictures_in_training_and_evaluation_are_found_by_content(folders: Any) -> None:
    for split in ("train", "val"):
        folders.coco(split=split)
    Image.new("RGB", (100, 80), (1, 2, 3)).save(folders.root / "val/b.jpg")  # a.jpg is the same in both
    (folders.root / "train/b.jpg").unlink()
    Image.new("RGB", (100, 80), (9, 9, 9)).save(folders.root / "train/b.jpg")
    shared_pictures = [
        problem for problem in inspect_dataset(folders.root, decode=True).warnings if "also trained on" in problem.given
    ]
    assert [problem.where for problem in shared_pictures] == [str(folders.root / "val/a.jpg")]


def test_progress_counts_every_picture(folders: Any) -> None:
    seen = []
    inspect_dataset(folders.coco(), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]


def test_statistics_by_hand(folders: Any) -> None:
    content = folders.coco_content()
    content["annotations"] += [
        {"id": 3, "image_id": 7, "category_id": 5, "bbox": [0, 0, 10, 40], "area": 1023.9},
        {"id": 4, "image_id": 7, "category_id": 5, "bbox": [0, 0, 40, 40], "area": 1024},
        {"id": 5, "image_id": 7, "category_id": 5, "bbox": [0, 0, 90, 80], "area": 9216},
    ]
    counted = count(read_dataset(folders.coco(content)))
    assert (counted.pictures, counted.empty_pictures, counted.boxes, counted.ignored) == (2, 1, 4, 1)
    # areas 600.5 and 1023.9 below 32^2 = 1024; 1024 itself is medium; 96^2 = 9216 is large
    assert (counted.small, counted.medium, counted.large) == (2, 1, 1)
    cat, dog = counted.classes
    assert (cat.name, cat.boxes, cat.ignored, cat.pictures) == ("cat", 3, 1, 1)
    assert (dog.name, dog.boxes, dog.ignored, dog.pictures) == ("dog", 1, 0, 1)
    assert counted.picture_widths == (100, 100, 100, 100, 100)
    assert counted.boxes_per_picture == (0, 1, 2, 3, 4)
    # height over width: 40/30, 40/10, 1, 80/90
    assert counted.box_height_over_width[-1] == 4
    assert counted.box_height_over_width[0] == pytest.approx(80 / 90)


def test_statistics_of_no_boxes(folders: Any) -> None:
    counted = count(read_dataset(folders.coco(folders.coco_content(annotations=[]))))
    assert counted.boxes == 0
    assert counted.empty_pictures == 2
    assert counted.box_sides == ()


def test_statistics_of_coco_mini(shared: Path) -> None:
    counted = count(read_dataset(shared / "data/coco_mini"))
    assert (counted.pictures, counted.boxes + counted.ignored, counted.ignored) == (188, 1692, 20)
    assert counted.small + counted.medium + counted.large == counted.boxes
