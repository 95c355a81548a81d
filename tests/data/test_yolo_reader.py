from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rcnn.data.folder import read_dataset, splits
from rcnn.errors import DataError, ImageError
from rcnn.plain_records import ClassTable


def problems_of(root: Path, **options: Any) -> list[str]:
    with pytest.raises(DataError) as raised:
        read_dataset(root, **options)
    return [str(problem) for problem in raised.value.problems]


def test_reading_by_hand(folders: Any) -> None:
    # 100 x 80: centre (.5, .5), size (.2, .5) is x 40..60, y 20..60; the outline's box is x 10..30, y 8..40
    labels = {"a": "1 0.5 0.5 0.2 0.5\n\n0 0.1 0.1 0.3 0.1 0.2 0.5\n", "b": "", "c": None}
    table = read_dataset(folders.yolo(labels))
    assert table.format == "YOLO"
    assert table.split == "train"
    assert table.classes.names == ("cat", "dog")
    assert table.image_ids.tolist() == [1, 2, 3]
    assert table.sizes.tolist() == [[80, 100]] * 3
    np.testing.assert_allclose(table.boxes_xyxy, [[40, 20, 60, 60], [10, 8, 30, 40]])
    assert table.labels.tolist() == [1, 0]
    assert table.starts.tolist() == [0, 2, 2, 2]  # a picture with an empty label file or none has no objects
    np.testing.assert_allclose(table.areas, [800, 640])


@pytest.mark.parametrize("names", ["{0: cat, 1: dog}", "{1: dog, 0: cat}", "[cat, dog]"])
def test_names_as_list_or_mapping(folders: Any, names: str) -> None:
    assert read_dataset(folders.yolo({"a": "1 .5 .5 .1 .1"}, names=names)).classes.names == ("cat", "dog")


def test_eleven_classes_in_a_mapping_keep_their_order(folders: Any) -> None:
    names = "{" + ", ".join(f"{number}: c{number}" for number in range(11)) + "}"
    table = read_dataset(folders.yolo({"a": "10 .5 .5 .1 .1"}, names=names))
    assert table.classes.names == tuple(f"c{number}" for number in range(11))


def test_mistakes_are_reported_together(folders: Any) -> None:
    labels = {
        "a": "2 .5 .5 .1 .1\n0 .5 .5 .1\n0 .5 .5 .1 .1 .9\nx .5 .5 .1 .1\n0.5 .5 .5 .1 .1\n-1 .5 .5 .1 .1\n",
        "b": "0 .5 .5 .1 one\n",
    }
    found = problems_of(folders.yolo(labels))
    expected = [
        "a.txt:1: the class is 2; allowed: 0 to 1",
        "a.txt:2: 4 columns; allowed: 5",
        "a.txt:3: 6 columns; allowed: 5",
        "a.txt:4: could not convert string to float: 'x'",
        "a.txt:5: the class is 0.5; allowed: 0 to 1",
        "a.txt:6: the class is -1; allowed: 0 to 1",
        "b.txt:1: could not convert string to float: 'one'",
    ]
    assert len(found) == len(expected)
    assert all(part in message for part, message in zip(expected, found, strict=True))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("0 .5 .5 0 .1", "zero width or height"),
        ("0 .5 .5 -.1 .1", "is reversed"),
        ("0 2 .5 .1 .1", "lies outside"),
        ("0 nan .5 .1 .1", "no finite number"),
        ("0 1e308 .5 1e308 .1", "no finite number"),
    ],
)
def test_bad_boxes_are_left_out_and_said(folders: Any, line: str, reason: str) -> None:
    table = read_dataset(folders.yolo({"a": f"0 .5 .5 .1 .1\n{line}\n"}))
    assert len(table.labels) == 1
    assert table.findings.left_out[0].where.endswith("a.txt:2")
    assert reason in table.findings.left_out[0].given


def test_pixels_where_fractions_belong_are_found(folders: Any) -> None:
    table = read_dataset(folders.yolo({"a": "0 50 40 20 10\n"}))
    assert len(table.findings.left_out) == 1


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("[cat, cat]", '"cat" belongs to the classes 0, 1'),
        ("{0: cat, 2: dog}", "allowed: 0 to 1"),
        ("{no: cat, yes: dog}", "the class numbers are False, True"),
        ("{'0': cat}", "the class numbers are '0'"),
        ("[no, cat]", "class 0 is False; allowed: a text; put the name in quotes"),
        ("[cat, ~]", "class 1 is None"),
        ("[cat, [dog]]", "class 1 is ['dog']"),
        ("5", "a list of names"),
    ],
)
def test_wrong_names(folders: Any, names: str, message: str) -> None:
    assert message in problems_of(folders.yolo({"a": "0 .5 .5 .1 .1"}, names=names))[0]


def test_a_wrong_count_of_classes(folders: Any) -> None:
    root = folders.yolo({"a": "0 .5 .5 .1 .1"})
    folders.text("data.yaml", "train: images/train\nnames: [cat, dog]\nnc: 3\n")
    assert "nc is 3, but there are 2 names" in problems_of(root)[0]


def test_malformed_yaml_names_its_line(folders: Any) -> None:
    folders.text("data.yaml", "train: a\nnames: [cat\n")
    with pytest.raises(DataError, match=r"data\.yaml:3: malformed YAML"):
        read_dataset(folders.root)


@pytest.mark.parametrize(
    "names", ["[2001-99-99]", "[" * 1000 + "]" * 1000, "[" + "9" * 5000 + "]"], ids=["day", "deep", "digits"]
)
def test_yaml_that_python_does_not_read(folders: Any, names: str) -> None:
    folders.text("data.yaml", f"train: images\nnames: {names}\n")
    with pytest.raises(DataError, match=r"data\.yaml: malformed YAML"):
        read_dataset(folders.root)


@pytest.mark.parametrize(
    ("place", "content", "said"),
    [
        ("images/train/a.jpg", None, "cannot be read as a list of pictures"),
        ("list.txt", b"images/train/\xe9.jpg\n", "cannot be read as a list of pictures"),
        ("list.txt", b"images/train/\0.jpg\n", "embedded null"),
        ("list.txt", b"images/train/" + b"a" * 5000 + b".jpg\n", "File name too long"),
        ("a" * 5000, None, "is not there"),
    ],
    ids=["picture", "Latin-1", "null", "long name", "long place"],
)
def test_places_that_are_none(folders: Any, place: str, content: bytes | None, said: str) -> None:
    root = folders.yolo({"a": "0 .5 .5 .1 .1"})
    folders.text("data.yaml", f"train: {place}\nnames: [cat]\n")
    if content is not None:
        (root / place).write_bytes(content)
    assert said in problems_of(root)[0]


def test_no_label_anywhere_is_an_error(folders: Any) -> None:
    assert "no picture has a label file" in problems_of(folders.yolo({"a": None, "b": None}))[0]


def test_a_split_that_is_not_there(folders: Any) -> None:
    root = folders.yolo({"a": ""})
    folders.text("data.yaml", "path: elsewhere\ntrain: images/trian\nnames: [cat]\n")
    assert '"images/trian" is not there (looked in' in problems_of(root)[0]


def test_layouts(folders: Any) -> None:
    """Labels beside the pictures, list files, several folders, Roboflow's ../, a path that does not exist here."""
    for name in ("one", "two"):
        folders.picture(f"{name}/images/p.jpg")
        folders.text(f"{name}/labels/p.txt", "0 .5 .5 .1 .1")
    folders.picture("flat/q.jpg")
    folders.text("flat/q.txt", "0 .5 .5 .1 .1")
    folders.text("list.txt", "./one/images/p.jpg\nflat/q.jpg\n\n")
    folders.text(
        "data.yaml",
        "path: /nowhere\ntrain: [one/images, two/images, flat]\nval: list.txt\ntest: ../two/images\nnames: [cat]\n",
    )
    assert splits(folders.root) == ("train", "val", "test")
    assert len(read_dataset(folders.root, split="train").labels) == 3
    assert len(read_dataset(folders.root, split="val").labels) == 2
    assert len(read_dataset(folders.root / "data.yaml", split="test").labels) == 1


def test_missing_and_unreadable_pictures(folders: Any) -> None:
    root = folders.yolo({"a": "0 .5 .5 .1 .1"})
    folders.text("list.txt", "images/train/a.jpg\nimages/train/z.jpg\n")
    folders.text("data.yaml", "train: list.txt\nnames: [cat]\n")
    assert "z.jpg: the picture is missing" in problems_of(root)[0]
    folders.text("images/train/z.jpg", "no picture")
    with pytest.raises(ImageError, match=r"z\.jpg"):
        read_dataset(root)


def test_a_turned_picture_has_the_size_of_what_is_seen(folders: Any) -> None:
    root = folders.yolo({"a": "0 .5 .5 .5 .5"})
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (100, 80)).save(root / "images/train/a.jpg", exif=exif)
    table = read_dataset(root)
    assert table.sizes.tolist() == [[100, 80]]
    assert table.boxes_xyxy.tolist() == [[20, 25, 60, 75]]


def test_classes_of_a_checkpoint_are_matched_by_name(folders: Any) -> None:
    root = folders.yolo({"a": "1 .5 .5 .1 .1"})
    assert read_dataset(root, classes=ClassTable(names=("dog",))).labels.tolist() == [0]
    assert 'data.yaml: the class "dog"' in problems_of(root, classes=ClassTable(names=("cat",)))[0]
