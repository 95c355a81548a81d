"""An evaluation's numbers by the recipe's choice, its pictures, its page."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rcnn.data.findings import Findings
from rcnn.data.table import AnnotationTable, PackedStrings
from rcnn.evaluation.table import DetectionTable
from rcnn.plain_records import ClassTable
from rcnn.recipes.judging import Evaluation, judge, pictures_of, report
from rcnn.recipes.recipe import EvaluateSpec


@pytest.fixture
def truth(tmp_path: Path) -> AnnotationTable:
    """Three pictures, two of them of one name; a box in the first and one in the second, none in the third."""
    files = ("a/1.png", "b/1.png", "b/2.png")
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        Image.new("RGB", (50, 40), (9, 99, 199)).save(tmp_path / file)
    return AnnotationTable(
        classes=ClassTable(names=("cat", "dog")), root=tmp_path, format="COCO", split="val",
        image_ids=np.array([1, 2, 3]), file_names=PackedStrings.pack(files), sizes=np.tile(np.int32([40, 50]), (3, 1)),
        starts=np.array([0, 1, 2, 2]), boxes_xyxy=np.array([[0.0, 0, 20, 20], [10, 10, 30, 40]]),
        labels=np.array([0, 0]), ignored=np.zeros(2, bool), areas=np.array([400.0, 600]), findings=Findings(),
    )  # fmt: skip


def found(*rows: tuple[int, float, list[float]]) -> DetectionTable:
    return DetectionTable(
        image_ids=np.array([row[0] for row in rows], np.int64),
        boxes_xyxy=np.array([row[2] for row in rows], np.float64).reshape(-1, 4),
        scores=np.array([row[1] for row in rows], np.float64),
        labels=np.zeros(len(rows), np.int64),
    )


@pytest.fixture
def half(truth: AnnotationTable) -> Evaluation:
    """The first box found exactly, the second not at all."""
    return judge(truth, found((1, 0.9, [0, 0, 20, 20]), (3, 0.3, [0, 0, 9, 9])))


def test_the_recipe_chooses_the_rule_of_voc(half: Evaluation) -> None:
    # Precision is 1 up to recall 0.5, then nothing: 6 of 11 points, half of the area.
    eleven = half.metrics(EvaluateSpec(metric="voc", voc_interpolation="11_points"))
    area = half.metrics(EvaluateSpec(metric="voc", voc_interpolation="area"))
    assert eleven["mAP"] == pytest.approx(6 / 11)
    assert area["mAP"] == pytest.approx(0.5)
    # COCO's 101 points: recall 0.00 to 0.50 are 51 of them.
    assert eleven["AP"] == pytest.approx(51 / 101)
    assert len(eleven) == 13


def test_nothing_found(truth: AnnotationTable) -> None:
    assert judge(truth, found()).metrics(EvaluateSpec())["AP"] == 0


def test_pictures_of_one_name_are_kept_apart(truth: AnnotationTable, half: Evaluation) -> None:
    pictures = pictures_of(truth, half.found, count=3)
    assert list(pictures) == ["a_1.png", "b_1.png", "2"]
    assert list(pictures_of(truth, half.found, count=2)) == ["1", "2"]  # the first and the last
    assert pictures_of(truth, half.found, count=0) == {}
    assert np.asarray(pictures["a_1.png"]).shape != (40, 50, 3)  # found beside the truth


def test_a_page(half: Evaluation, tmp_path: Path) -> None:
    page = tmp_path / "new" / "report.html"
    report(
        page,
        half,
        title="cells",
        facts={"data": "three pictures"},
        pictures=pictures_of(half.truth, half.found, count=1),
    )
    text = page.read_text()
    assert "cells" in text and "three pictures" in text
    assert ";base64," in text
    assert "0.505" in text  # 51 / 101
