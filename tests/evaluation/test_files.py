"""Files of detections: what stands in them, that they come back, and what is said of broken ones."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rcnn.errors import DataError, RunError
from rcnn.evaluation.files import read_coco_results, read_csv, write_coco_results, write_csv
from rcnn.plain_records import ClassTable

CLASSES = ClassTable(names=("cat", "big, dog"), category_ids=(17, 90))
NAMES = {5: "a.jpg", 9: 'sub/b "1".jpg'}


@pytest.fixture
def found(make_found):
    return make_found([(9, (1, 2, 4.25, 10), 1, 0.75), (5, (0.5, 0, 3.123456, 7), 0, 0.1234567)])


def same(one, other) -> None:
    np.testing.assert_array_equal(one.image_ids, other.image_ids)
    np.testing.assert_array_equal(one.labels, other.labels)
    np.testing.assert_array_equal(one.scores, other.scores)
    np.testing.assert_allclose(one.boxes_xyxy, other.boxes_xyxy, atol=1e-4)


def test_coco_results_by_hand(tmp_path, found) -> None:
    path = tmp_path / "new" / "results.json"
    write_coco_results(path, found, CLASSES)
    assert json.loads(path.read_text()) == [
        {"image_id": 9, "category_id": 90, "bbox": [1, 2, 3.25, 8], "score": 0.75},
        {"image_id": 5, "category_id": 17, "bbox": [0.5, 0, 2.6235, 7], "score": 0.1234567},
    ]
    same(read_coco_results(path, CLASSES), found)


def test_csv_by_hand(tmp_path, found) -> None:
    path = tmp_path / "results.csv"
    write_csv(path, found, CLASSES, NAMES)
    assert path.read_text().splitlines() == [
        "file,class,score,x1,y1,x2,y2",
        '"sub/b ""1"".jpg","big, dog",0.75,1.0,2.0,4.25,10.0',
        "a.jpg,cat,0.1234567,0.5,0.0,3.1235,7.0",
    ]
    same(read_csv(path, CLASSES, {name: image_id for image_id, name in NAMES.items()}), found)


def test_no_detections_come_back_as_none(tmp_path, make_found) -> None:
    write_coco_results(tmp_path / "none.json", make_found([]), CLASSES)
    write_csv(tmp_path / "none.csv", make_found([]), CLASSES, {})
    assert (tmp_path / "none.json").read_text() == "[]"
    for table in (read_coco_results(tmp_path / "none.json", CLASSES), read_csv(tmp_path / "none.csv", CLASSES, {})):
        assert len(table) == 0
        assert table.boxes_xyxy.shape == (0, 4)


def test_every_broken_result_is_named(tmp_path) -> None:
    good = {"image_id": 1, "category_id": 17, "bbox": [0, 0, 1, 1], "score": 0.5}
    broken = [
        good,
        {**good, "category_id": 3},
        {**good, "bbox": [1, 2, 3]},
        {**good, "bbox": [1, 2, 3, float("nan")]},
        {**good, "score": "high"},
        {**good, "image_id": "1"},
        {"image_id": 1},
        7,
    ]
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(broken))
    with pytest.raises(DataError) as caught:
        read_coco_results(path, CLASSES)
    numbers = [int(problem.where.rsplit(" ", 1)[1]) for problem in caught.value.problems]
    assert numbers == [1, 2, 3, 4, 5, 6, 7]
    assert "category_id, bbox, score" in str(caught.value)


@pytest.mark.parametrize(("text", "said"), [("[1,", "no JSON"), ("{}", "a list of results")])
def test_files_that_are_no_results(tmp_path, text, said) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DataError, match=said):
        read_coco_results(tmp_path / "x.json", CLASSES)
    with pytest.raises(DataError, match="cannot be read"):
        read_coco_results(tmp_path / "absent.json", CLASSES)


def test_every_broken_line_is_named(tmp_path) -> None:
    path = tmp_path / "x.csv"
    lines = ["a.jpg,cat,0.5,0,0,1,1", "z.jpg,cat,0.5,0,0,1,1", "a.jpg,cats,0.5,0,0,1,1", "a.jpg,cat,x,0,0,1,1", "a.jpg"]
    path.write_text("\n".join(["file,class,score,x1,y1,x2,y2", *lines]))
    with pytest.raises(DataError) as caught:
        read_csv(path, CLASSES, {"a.jpg": 5})
    assert [int(problem.where.rsplit(" ", 1)[1]) for problem in caught.value.problems] == [3, 4, 5, 6]
    assert 'did you mean "cat"?' in str(caught.value)
    path.write_text("file;class\n")
    with pytest.raises(DataError, match="first line"):
        read_csv(path, CLASSES, {})


def test_unwritable_place_is_said(tmp_path, found) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"file.*cannot be written"):
        write_coco_results(tmp_path / "file" / "results.json", found, CLASSES)
