from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rcnn.data.folder import describe, read_dataset, splits
from rcnn.errors import DataError
from rcnn.plain_records import ClassTable

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


def problems_of(root: Path, **options: Any) -> list[str]:
    with pytest.raises(DataError) as raised:
        read_dataset(root, **options)
    return [str(problem) for problem in raised.value.problems]


def test_reading_by_hand(folders: Any) -> None:
    objects = folders.voc_object("dog", (11, 21, 40, 60)) + folders.voc_object("cat", ("1.0", 1, 100, 80), difficult=1)
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part></object>"
    objects = objects.replace("</object>", part, 1)  # VOC has parts inside persons: no objects of their own
    root = folders.voc(
        {"000012": folders.voc_xml("000012", objects), "000003": folders.voc_xml("000003")},
        {"train": ["000012", "000003"], "val": ["000003"]},
    )
    folders.text("ImageSets/Main/dog_train.txt", "000012  1\n000003 -1\n")
    assert splits(root) == ("train", "val")
    table = read_dataset(root, split="train")
    assert table.format == "VOC"
    assert table.image_ids.tolist() == [12, 3]
    assert table.classes.names == ("cat", "dog")
    # 1-based inclusive pixels 11..40 are 10 to 40 in continuous coordinates
    assert table.boxes_xyxy.tolist() == [[10, 20, 40, 60], [0, 0, 100, 80]]
    assert table.labels.tolist() == [1, 0]
    assert table.ignored.tolist() == [False, True]
    assert table.areas.tolist() == [30 * 40, 8000]
    assert table.starts.tolist() == [0, 2, 2]
    assert table.path(0).is_file()
    assert describe(table).startswith('VOC, split "train": 2 pictures, 2 boxes (1 of them ignored), 2 classes in ')
    # A class that the split lacks keeps its place.
    assert read_dataset(root, split="val").classes.names == ("cat", "dog")


def test_real_blood_cells(shared: Path) -> None:
    """The counts that the data's own page states, and its two boxes that are points."""
    root = shared / "data/bccd"
    tables = {split: read_dataset(root, split=split) for split in ("train", "val", "test")}
    assert {split: len(table) for split, table in tables.items()} == {"train": 205, "val": 87, "test": 72}
    assert sum(table.findings.num_boxes for table in tables.values()) == 4888
    left_out = [problem.where for table in tables.values() for problem in table.findings.left_out]
    assert [Path(where.split(": ")[0]).name for where in left_out] == ["BloodImage_00343.xml", "BloodImage_00338.xml"]
    assert sum(len(table.labels) for table in tables.values()) == 4886
    assert tables["train"].classes.names == ("Platelets", "RBC", "WBC")


def test_the_twenty_classes_have_their_standard_order(folders: Any) -> None:
    objects = "".join(folders.voc_object(name, (1, 1, 9, 9)) for name in reversed(VOC_CLASSES))
    assert read_dataset(folders.voc({"a": folders.voc_xml("a", objects)})).classes.names == VOC_CLASSES


def test_a_size_of_zero_or_none_comes_from_the_picture(folders: Any) -> None:
    documents = {
        stem: folders.voc_xml(stem, size=size)
        for stem, size in {"a": "<width>0</width><height>0</height>", "b": "", "c": "<width>x</width>"}.items()
    }
    assert read_dataset(folders.voc(documents)).sizes.tolist() == [[80, 100]] * 3


def test_unknown_class_names_file_and_class(folders: Any) -> None:
    root = folders.voc({"a": folders.voc_xml("a", folders.voc_object("dgo", (1, 1, 5, 5)))})
    found = problems_of(root, classes=ClassTable(names=("cat", "dog")))
    assert len(found) == 1
    assert 'a.xml: object 1: the class "dgo"' in found[0]
    assert 'allowed: cat, dog; did you mean "dog"?' in found[0]


def test_mistakes_are_reported_together(folders: Any) -> None:
    root = folders.voc(
        {
            "broken": "<annotation>\n<object></annotation>",
            "text": folders.voc_xml("text", folders.voc_object("dog", (1, "two", 3, ""))),
            "nameless": folders.voc_xml("nameless", folders.voc_object("", (1, 1, 3, 3))),
            "lost": folders.voc_xml("lost"),
        },
        {"train": ["broken", "text", "nameless", "lost", "absent", "lost", "two words"]},
    )
    (root / "JPEGImages/lost.jpg").unlink()
    found = "\n".join(problems_of(root))
    assert "broken.xml:2: malformed XML" in found
    assert 'text.xml: object 1: bndbox/ymin is "two"' in found
    assert 'text.xml: object 1: bndbox/ymax is ""' in found
    assert "nameless.xml: object 1: the object has no name" in found
    assert "the picture of lost.xml is missing" in found
    assert "absent.xml: the annotation file is missing (listed at" in found
    assert 'train.txt:6: "lost" is listed twice' in found
    assert "train.txt:7: 2 columns" in found
    assert len(found.splitlines()) == 8


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ((5, 5, 5, 9), "zero width or height"),
        ((9, 5, 5, 9), "is reversed"),
        ((101, 5, 120, 9), "lies outside the picture"),
        (("nan", 5, 9, 9), "no finite number"),
        ((5, 5, "inf", 9), "no finite number"),
    ],
)
def test_bad_boxes_are_left_out_and_said(folders: Any, box: tuple, reason: str) -> None:
    objects = folders.voc_object("dog", (1, 1, 5, 5)) + folders.voc_object("dog", box)
    table = read_dataset(folders.voc({"a": folders.voc_xml("a", objects)}))
    assert len(table.labels) == 1
    assert [problem.where.endswith("a.xml: object 2") for problem in table.findings.left_out] == [True]
    assert reason in table.findings.left_out[0].given


def test_a_zero_in_coordinates_that_begin_at_one_is_cut_and_said(folders: Any) -> None:
    table = read_dataset(folders.voc({"a": folders.voc_xml("a", folders.voc_object("dog", (0, 1, 5, 5)))}))
    assert table.boxes_xyxy.tolist() == [[0, 0, 5, 5]]
    assert len(table.findings.cut) == 1


def test_layouts(folders: Any) -> None:
    document = folders.voc_xml("a", folders.voc_object("dog", (1, 1, 5, 5)))
    for year in ("VOC2007", "VOC2012"):
        folders.text(f"kit/VOCdevkit/{year}/Annotations/a.xml", document)
        folders.text(f"kit/VOCdevkit/{year}/ImageSets/Main/train.txt", "a\n")
        folders.picture(f"kit/VOCdevkit/{year}/JPEGImages/a.jpg")
    for folder in ("robo/train", "robo/valid"):
        folders.text(f"{folder}/a.xml", document)
        folders.picture(f"{folder}/a.jpg")
    assert splits(folders.root / "kit") == ("VOC2007/train", "VOC2012/train")
    assert splits(folders.root / "kit/VOCdevkit/VOC2007") == ("train",)
    assert splits(folders.root / "robo") == ("train", "valid")
    assert splits(folders.root / "robo/train") == ("all",)
    assert len(read_dataset(folders.root / "kit", split="VOC2012/train").labels) == 1
    assert read_dataset(folders.root / "robo", split="val").path(0).is_file()


def test_a_list_that_is_no_text(folders: Any) -> None:
    root = folders.voc({"a": folders.voc_xml("a")}, {"train": ["a"]})
    (root / "ImageSets/Main/train.txt").write_bytes(b"\xe9\n")
    (message,) = problems_of(root)
    assert "train.txt: the file cannot be read ('utf-8' codec" in message


def test_a_size_that_no_picture_has_comes_from_the_picture(folders: Any) -> None:
    document = folders.voc_xml("a", size="<width>1e30</width><height>80</height>")
    assert read_dataset(folders.voc({"a": document})).sizes.tolist() == [[80, 100]]


def test_an_empty_split(folders: Any) -> None:
    root = folders.voc({"a": folders.voc_xml("a")}, {"train": []})
    assert "there is no picture in it" in problems_of(root)[0]


def test_two_pictures_of_one_name(folders: Any) -> None:
    document = folders.voc_xml("a", folders.voc_object("dog", (1, 1, 5, 5)))
    root = folders.voc({"a": document})
    folders.picture("JPEGImages/a.png")
    assert read_dataset(root).path(0).name == "a.jpg"  # the file says which
    folders.text("Annotations/a.xml", document.replace("a.jpg", "b.jpg"))
    assert "several pictures fit: a.jpg, a.png" in problems_of(root)[0]
