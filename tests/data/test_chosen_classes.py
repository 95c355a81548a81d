"""A part of the classes, in an order of one's own: the same for every format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rcnn.data.folder import read_dataset
from rcnn.errors import DataError
from rcnn.plain_records import ClassTable


@pytest.fixture(params=["coco", "voc", "yolo"])
def three_classes(request: pytest.FixtureRequest, folders: Any) -> Path:
    """Two pictures of 100 x 80: on the first a dog, a cat and a bird, on the second a bird without width."""
    if request.param == "coco":
        categories = [{"id": 20, "name": "dog"}, {"id": 5, "name": "cat"}, {"id": 9, "name": "bird"}]
        boxes = {1: (7, 20, [10, 20, 30, 40]), 2: (7, 5, [0, 0, 50, 40]), 3: (7, 9, [50, 40, 20, 20])}
        boxes[4] = (3, 9, [5, 5, 0, 9])
        annotations = [{"id": i, "image_id": p, "category_id": c, "bbox": b} for i, (p, c, b) in boxes.items()]
        return folders.coco(folders.coco_content(categories=categories, annotations=annotations))
    if request.param == "voc":
        objects = {"dog": (11, 21, 40, 60), "cat": (1, 1, 50, 40), "bird": (51, 41, 70, 60)}
        first = "".join(folders.voc_object(name, box) for name, box in objects.items())
        second = folders.voc_object("bird", (6, 6, 6, 14))
        documents = {"7": folders.voc_xml("7", first), "3": folders.voc_xml("3", second)}
        return folders.voc(documents, {"train": ["7", "3"]})
    first = "2 .25 .5 .3 .5\n0 .25 .25 .5 .5\n1 .6 .625 .2 .25\n"  # as above, by centres and sides
    return folders.yolo({"a": first, "b": "1 .5 .5 0 .1\n"}, names="[cat, bird, dog]")


def test_the_others_are_left_out_and_counted(three_classes: Path) -> None:
    """The boxes as they are written above; of those left out, none is judged: the bird without width is no finding."""
    table = read_dataset(three_classes, only=("dog", "cat"), bad_boxes="error")
    assert table.classes.names == ("dog", "cat")
    assert table.labels.tolist() == [0, 1]
    np.testing.assert_allclose(table.boxes_xyxy, [[10, 20, 40, 60], [0, 0, 50, 40]])
    assert table.starts.tolist() == [0, 2, 2]  # a picture without a chosen box stays, as one without objects
    assert table.findings.summary() == "2 boxes of other classes are not read (data.classes)"
    if table.format == "COCO":
        assert table.classes.category_ids == (20, 5)


def test_labels_in_a_table_that_is_given(three_classes: Path) -> None:
    classes = ClassTable(names=("horse", "cat", "bird"))
    table = read_dataset(three_classes, only=("cat",), classes=classes)
    assert (table.classes, table.labels.tolist()) == (classes, [1])


def test_a_name_that_is_not_there(three_classes: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_dataset(three_classes, only=("cat", "birds", "x"), classes=ClassTable(names=("cat", "bird", "x")))
    given = [str(problem).partition(": ")[2] for problem in caught.value.problems]
    allowed = {"COCO": "cat, bird, dog", "VOC": "bird, cat, dog", "YOLO": "cat, bird, dog"}
    listed = allowed[read_dataset(three_classes).format]
    assert given == [
        f'the class "birds" was chosen (data.classes), and the data have none of that name; allowed: {listed}; '
        'did you mean "bird"?',
        f'the class "x" was chosen (data.classes), and the data have none of that name; allowed: {listed}; '
        "data.classes=null reads all that there are",
        'the class "birds" was chosen (data.classes), and the checkpoint or training split has none of that name; '
        'allowed: cat, bird, x; did you mean "bird"?',
    ]
