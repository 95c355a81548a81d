"""Tables for the tests of evaluation: written out by hand, from COCO's json, at random."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from rcnn.data.table import AnnotationTable, PackedStrings
from rcnn.evaluation.table import DetectionTable
from rcnn.plain_records import ClassTable

TruthRow = tuple[int, Sequence[float], int, bool]  # image id, box, label, ignored
FoundRow = tuple[int, Sequence[float], int, float]  # image id, box, label, score
MakeTruth = Callable[..., AnnotationTable]
MakeFound = Callable[[Sequence[FoundRow]], DetectionTable]


def truth_table(
    rows: Sequence[TruthRow],
    *,
    image_ids: Sequence[int],
    names: Sequence[str] = ("cat", "dog"),
    format: str = "COCO",
    areas: Sequence[float] | None = None,
) -> AnnotationTable:
    order = sorted(range(len(rows)), key=lambda row: list(image_ids).index(rows[row][0]))
    rows = [rows[row] for row in order]
    boxes = np.array([row[1] for row in rows], np.float64).reshape(-1, 4)
    own_areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    counts = [sum(row[0] == image_id for row in rows) for image_id in image_ids]
    return AnnotationTable(
        classes=ClassTable(names=tuple(names)),
        root=Path(),
        format=format,
        split="test",
        image_ids=np.array(image_ids, np.int64),
        file_names=PackedStrings.pack([f"{image_id}.jpg" for image_id in image_ids]),
        sizes=np.tile(np.array([[480, 640]], np.int32), (len(image_ids), 1)),
        starts=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        boxes_xyxy=boxes,
        labels=np.array([row[2] for row in rows], np.int64),
        ignored=np.array([row[3] for row in rows], bool),
        areas=own_areas if areas is None else np.array(areas, np.float64)[order],
    )


def found_table(rows: Sequence[FoundRow]) -> DetectionTable:
    return DetectionTable(
        image_ids=np.array([row[0] for row in rows], np.int64),
        boxes_xyxy=np.array([row[1] for row in rows], np.float64).reshape(-1, 4),
        scores=np.array([row[3] for row in rows], np.float64),
        labels=np.array([row[2] for row in rows], np.int64),
    )


def coco_tables(
    folder: Path, *, first_images: int | None = None, found_name: str = "dt.json"
) -> tuple[AnnotationTable, DetectionTable]:
    """`gt.json` and the detections of a folder, read without rcnn's own reader."""
    truth, found = (json.loads((folder / name).read_text()) for name in ("gt.json", found_name))
    labels = {category["id"]: label for label, category in enumerate(truth["categories"])}
    image_ids = [image["id"] for image in truth["images"]][:first_images]
    kept = [row for row in truth["annotations"] if row["image_id"] in image_ids]
    truth_rows = [
        (row["image_id"], _xyxy(row["bbox"]), labels[row["category_id"]], bool(row["iscrowd"])) for row in kept
    ]
    found_rows = [
        (row["image_id"], _xyxy(row["bbox"]), labels[row["category_id"]], row["score"])
        for row in found
        if row["image_id"] in image_ids
    ]
    names = [category["name"] for category in truth["categories"]]
    areas = [row["area"] for row in kept]
    return truth_table(truth_rows, image_ids=image_ids, names=names, areas=areas), found_table(found_rows)


def _xyxy(box: Sequence[float]) -> tuple[float, float, float, float]:
    x, y, width, height = box
    return x, y, x + width, y + height


@pytest.fixture(scope="session")
def make_truth() -> MakeTruth:
    return truth_table


@pytest.fixture(scope="session")
def make_found() -> MakeFound:
    return found_table


@pytest.fixture(scope="session")
def read_coco() -> Callable[..., tuple[AnnotationTable, DetectionTable]]:
    return coco_tables
