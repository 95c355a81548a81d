"""The embedded data set: what is written, that the truth is tight, and that a seed gives the same bytes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rcnn.data.folder import read_dataset
from rcnn.data.shapes import SHAPE_NAMES, _cover, _tight_box, draw_picture, draw_shapes_dataset
from rcnn.errors import RunError


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    return draw_shapes_dataset(tmp_path_factory.mktemp("shapes"), train_images=12, val_images=4, seed=3).root


def digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_it_is_a_coco_data_set(drawn) -> None:
    for split, count in (("train", 12), ("val", 4)):
        content = json.loads((drawn / "annotations" / f"instances_{split}.json").read_text())
        assert [category["name"] for category in content["categories"]] == list(SHAPE_NAMES)
        assert len(content["images"]) == count
        sizes = {}
        for image in content["images"]:
            with Image.open(drawn / split / image["file_name"]) as picture:
                assert picture.size == (image["width"], image["height"])
                assert picture.mode == "RGB"
            sizes[image["id"]] = (image["width"], image["height"])
        assert len({row["id"] for row in content["annotations"]}) == len(content["annotations"]) > count
        for row in content["annotations"]:
            x, y, width, height = row["bbox"]
            assert 0 <= x < x + width <= sizes[row["image_id"]][0]
            assert 0 <= y < y + height <= sizes[row["image_id"]][1]
            assert 0 < row["area"] <= width * height


def test_our_own_reader_reads_it(drawn) -> None:
    table = read_dataset(drawn, split="val")
    content = json.loads((drawn / "annotations" / "instances_val.json").read_text())
    assert table.classes.names == SHAPE_NAMES
    assert len(table) == 4
    x, y, width, height = content["annotations"][0]["bbox"]
    np.testing.assert_array_equal(table.boxes_xyxy[0], [x, y, x + width, y + height])
    assert all(table.path(index).is_file() for index in range(len(table)))


def test_a_seed_gives_the_same_bytes_and_another_seed_others(drawn, tmp_path) -> None:
    again = draw_shapes_dataset(tmp_path / "again", train_images=12, val_images=4, seed=3)
    other = draw_shapes_dataset(tmp_path / "other", train_images=12, val_images=4, seed=4)
    assert digest(again.root) == digest(drawn)
    assert not set(digest(other.root).values()) & set(digest(drawn).values())


def test_more_pictures_leave_the_first_ones_as_they_are_and_splits_differ(drawn, tmp_path) -> None:
    longer = digest(draw_shapes_dataset(tmp_path, train_images=14, val_images=0, seed=3).root)
    first = digest(drawn)
    pictures = [name for name in first if name.startswith("train/")]
    assert len(pictures) == 12
    assert all(longer[name] == first[name] for name in pictures)
    assert first["val/000001.jpg"] != first["train/000001.jpg"]


def test_counts_are_told(tmp_path) -> None:
    summary = draw_shapes_dataset(tmp_path, train_images=3, val_images=1)
    content = json.loads((tmp_path / "annotations" / "instances_train.json").read_text())
    assert summary.images == {"train": 3, "val": 1}
    assert summary.boxes["train"] == len(content["annotations"])


def test_pictures_are_varied() -> None:
    pictures = [draw_picture(np.random.default_rng(seed)) for seed in range(60)]
    labels = np.concatenate([picture.labels for picture in pictures])
    sides = np.concatenate([picture.boxes_xyxy[:, 2] - picture.boxes_xyxy[:, 0] for picture in pictures])
    assert set(labels.tolist()) == set(range(len(SHAPE_NAMES)))
    assert sides.min() < 24
    assert sides.max() > 80
    assert len({picture.pixels.shape for picture in pictures}) > 20
    assert 1 <= sum(len(picture.labels) == 0 for picture in pictures) <= 12
    assert all(192 <= side <= 256 for picture in pictures for side in picture.pixels.shape[:2])


def test_boxes_are_tight_around_what_is_visible() -> None:
    """A square of radius 10, upright: corners at 1.12 * 10 = 11.2 from the centre, so that half a side is 7.92.
    Columns 42.08 .. 57.92 and rows 32.08 .. 47.92 are covered: pixels 42 to 57 and 32 to 47."""
    cover = _cover("square", 10.0, 0.0, (50.0, 40.0), 80, 100)
    assert cover.shape == (80, 100)
    np.testing.assert_allclose(cover[40, 50], 1)
    assert cover.sum() == pytest.approx((2 * 7.92) ** 2, rel=0.06)  # Pillow fills the pixels of the outline too
    box = np.array(_tight_box(cover >= 0.5))
    np.testing.assert_array_equal(box, [42, 32, 58, 48])


@pytest.mark.parametrize("name", SHAPE_NAMES)
def test_areas_of_the_shapes_are_alike(name) -> None:
    """At radius 1: circle pi * 0.9^2 = 2.54, square 2 * 1.12^2 = 2.51, triangle 3 sqrt(3) / 4 * 1.25^2 = 2.03,
    star 10 / 2 * 1.3 * 0.55 * sin(36) = 2.10, cross 2 * (2.2 * 0.72) - 0.72^2 = 2.65."""
    expected = {"circle": 2.54, "square": 2.51, "triangle": 2.03, "star": 2.10, "cross": 2.65}
    cover = _cover(name, 30.0, 0.7, (50.0, 50.0), 100, 100)
    assert cover.sum() / 900 == pytest.approx(expected[name], rel=0.02)


def test_no_shape_is_mostly_hidden() -> None:
    for seed in range(40):
        picture = draw_picture(np.random.default_rng(seed))
        boxes = picture.boxes_xyxy
        assert (picture.areas >= 60).all(), "what is left of a shape can be seen"
        assert (boxes[:, 2:] > boxes[:, :2]).all()


def test_unwritable_folder_is_said(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        draw_shapes_dataset(tmp_path / "file", train_images=1, val_images=1)
