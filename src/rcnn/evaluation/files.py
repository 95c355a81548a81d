"""Detections as files: COCO's results json and CSV, written whole or not at all, read with every mistake named."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rcnn.atomic_file import write_atomically
from rcnn.errors import DataError, Problem, nearest
from rcnn.evaluation.table import DetectionTable
from rcnn.plain_records import ClassTable

CSV_COLUMNS = ("file", "class", "score", "x1", "y1", "x2", "y2")
# Of a pixel: finer than any detector, and a third of the file's size.
_BOX_DECIMALS = 4


def write_coco_results(
    path: Path, found: DetectionTable, classes: ClassTable, file_names: Mapping[int, str] | None = None
) -> None:
    """COCO's results: a list of image_id, category_id, bbox (x, y, width, height) and score. Raises `RunError`.

    With `file_names` (by image id) each result says its file too: where the ids were made up, nothing else tells.
    """
    boxes = found.boxes_xyxy
    sides = boxes[:, 2:] - boxes[:, :2]
    xywh = np.concatenate([boxes[:, :2], sides], axis=1).round(_BOX_DECIMALS).tolist()
    rows = [
        {
            "image_id": image_id,
            **({"file_name": file_names[image_id]} if file_names else {}),
            "category_id": classes.category_ids[label],
            "bbox": box,
            "score": score,
        }
        for image_id, label, box, score in zip(
            found.image_ids.tolist(), found.labels.tolist(), xywh, found.scores.tolist(), strict=True
        )
    ]
    write_atomically(path, json.dumps(rows))


def read_coco_results(path: Path, classes: ClassTable) -> DetectionTable:
    """The table of a results json. Raises `DataError` that names every row which cannot be used."""
    rows = _load_json(path)
    if not isinstance(rows, list):
        raise DataError(Problem(where=str(path), given=f"holds a {type(rows).__name__}", allowed="a list of results"))
    labels = {category_id: label for label, category_id in enumerate(classes.category_ids)}
    problems = [
        Problem(where=f"{path}: result {number}", given=problem)
        for number, row in enumerate(rows)
        if (problem := _row_problem(row, labels))
    ]
    if problems:
        raise DataError(problems)
    xywh = np.array([row["bbox"] for row in rows], np.float64).reshape(-1, 4)
    return DetectionTable(
        image_ids=np.array([row["image_id"] for row in rows], np.int64),
        boxes_xyxy=np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1),
        scores=np.array([row["score"] for row in rows], np.float64),
        labels=np.array([labels[row["category_id"]] for row in rows], np.int64),
    )


def write_csv(path: Path, found: DetectionTable, classes: ClassTable, file_names: Mapping[int, str]) -> None:
    """One line per detection under a header of `CSV_COLUMNS`, boxes in pixels. `file_names`: by image id."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    boxes = found.boxes_xyxy.round(_BOX_DECIMALS).tolist()
    for image_id, label, score, box in zip(
        found.image_ids.tolist(), found.labels.tolist(), found.scores.tolist(), boxes, strict=True
    ):
        writer.writerow([file_names[image_id], classes.names[label], score, *box])
    write_atomically(path, text.getvalue())


def read_csv(path: Path, classes: ClassTable, image_ids: Mapping[str, int]) -> DetectionTable:
    """The table of such a file. `image_ids`: by file name. Raises `DataError` that names every line of trouble."""
    try:
        lines = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8"), newline="")))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(Problem(where=str(path), given=f"cannot be read: {error}")) from error
    if not lines or tuple(lines[0]) != CSV_COLUMNS:
        given = f"the first line is {','.join(lines[0]) if lines else 'absent'}"
        raise DataError(Problem(where=str(path), given=given, allowed=",".join(CSV_COLUMNS)))
    problems = [
        Problem(where=f"{path}: line {number}", given=problem)
        for number, line in enumerate(lines[1:], start=2)
        if (problem := _line_problem(line, classes, image_ids))
    ]
    if problems:
        raise DataError(problems)
    rows = lines[1:]
    return DetectionTable(
        image_ids=np.array([image_ids[row[0]] for row in rows], np.int64),
        boxes_xyxy=np.array([row[3:] for row in rows], np.float64).reshape(-1, 4),
        scores=np.array([row[2] for row in rows], np.float64),
        labels=np.array([classes.names.index(row[1]) for row in rows], np.int64),
    )


def _load_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(Problem(where=str(path), given=f"cannot be read: {error.strerror or error}")) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(Problem(where=str(path), given=f"is no JSON: {error}")) from error


def _row_problem(row: Any, labels: Mapping[int, int]) -> str:
    if not isinstance(row, dict):
        return f"is {row!r:.60}, no object"
    missing = [key for key in ("image_id", "category_id", "bbox", "score") if key not in row]
    if missing:
        return f"has no {', '.join(missing)}"
    box = row["bbox"]
    if not isinstance(row["image_id"], int):
        return f"image_id is {row['image_id']!r:.60}, no whole number"
    if not (isinstance(box, list) and len(box) == 4 and all(_is_number(value) for value in box)):
        return f"bbox is {box!r:.60}, not four numbers"
    if not _is_number(row["score"]):
        return f"score is {row['score']!r:.60}, no number"
    if row["category_id"] not in labels:
        return f"category_id {row['category_id']!r:.60} is no category of the data"
    return ""


def _line_problem(line: list[str], classes: ClassTable, image_ids: Mapping[str, int]) -> str:
    if len(line) != len(CSV_COLUMNS):
        return f"has {len(line)} columns, not {len(CSV_COLUMNS)}"
    if line[0] not in image_ids:
        return f'the picture "{line[0]}" is not in the data'
    if line[1] not in classes.names:
        return f'the class "{line[1]}" is not in the data; {nearest(line[1], classes.names)}'.removesuffix("; ")
    wrong = [text for text in line[2:] if not _is_float(text)]
    return f"{', '.join(wrong)} is no number" if wrong else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and bool(np.isfinite(value))


def _is_float(text: str) -> bool:
    try:
        return bool(np.isfinite(float(text)))
    except ValueError:
        return False
