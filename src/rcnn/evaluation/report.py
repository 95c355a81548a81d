"""An evaluation as one page of HTML that needs nothing beside it: numbers, curves, errors, losses and pictures.

Letter: K classes.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image

from rcnn.atomic_file import write_atomically
from rcnn.evaluation.charts import Series, line_chart
from rcnn.evaluation.coco import CocoResult, ErrorResult
from rcnn.evaluation.voc import Interpolation, VocResult

# A row of metrics.jsonl: "kind" is train or evaluation; "step" and numbers.
Row = Mapping[str, Any]

_MEANINGS = {
    "AP": "average precision, mean over IoU 0.50 to 0.95",
    "AP50": "at IoU 0.50: found roughly",
    "AP75": "at IoU 0.75: found precisely",
    "AP_small": "objects under 32 × 32 pixels",
    "AP_medium": "objects of 32 × 32 to 96 × 96 pixels",
    "AP_large": "objects over 96 × 96 pixels",
    "AR_small": "recall of objects under 32 × 32 pixels",
    "AR_medium": "recall of objects of 32 × 32 to 96 × 96 pixels",
    "AR_large": "recall of objects over 96 × 96 pixels",
}
_ERROR_MEANINGS = {
    "Cls": ("wrong class", "the box is right, its class is not"),
    "Loc": ("wrong place", "the class is right, the box is too far off"),
    "Both": ("both", "class and box are off"),
    "Dupe": ("duplicate", "the object was found already"),
    "Bkg": ("background", "nothing of the kind is there"),
    "Miss": ("missed", "an object that nothing found"),
}
_MOST_CURVES, _LARGEST_MATRIX, _WIDEST_PICTURE_PX = 10, 20, 1400


@dataclass(frozen=True, kw_only=True)
class ReportPicture:
    """A picture for the page, such as what was found beside the truth."""

    caption: str
    picture: Image.Image


def write_report(
    path: Path,
    *,
    title: str,
    facts: Mapping[str, str],
    coco: CocoResult,
    voc: Sequence[VocResult] = (),
    errors: ErrorResult | None = None,
    history: Sequence[Row] = (),
    pictures: Sequence[ReportPicture] = (),
) -> None:
    """Writes the page. `facts` (data set, checkpoint, ...) stand under the title in their order; `history` are the rows
    of metrics.jsonl. What is not given has no section. Raises `RunError` where the file cannot be written."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = number_text
    environment.filters["image"] = _embedded
    template = resources.files("rcnn.evaluation").joinpath("report.html.jinja").read_text(encoding="utf-8")
    page = environment.from_string(template).render(
        title=title,
        facts=facts,
        headline=_headline(coco, voc),
        numbers=[(name, value, _meaning(name)) for name, value in coco.items()],
        class_columns=["boxes", "AP", "AP50", "AP75", f"AR@{coco.max_detections[-1]}", *map(_voc_name, voc)],
        class_rows=_class_rows(coco, voc),
        precision_charts=_precision_charts(coco),
        errors=errors,
        error_rows=_error_rows(errors) if errors else [],
        confusion=_confusion(errors, coco.class_names) if errors else [],
        class_names=coco.class_names,
        training_charts=_training_charts(history),
        pictures=pictures,
    )
    write_atomically(path, page)


def number_text(value: float) -> str:
    """Three decimals; a dash for what is not defined (NaN, or pycocotools' -1)."""
    return "–" if math.isnan(value) or value == -1 else f"{value:.3f}"


def _headline(coco: CocoResult, voc: Sequence[VocResult]) -> list[tuple[str, float]]:
    recall = f"AR@{coco.max_detections[-1]}"
    numbers = [(name, coco[name]) for name in ("AP", "AP50", "AP75", recall)]
    return numbers + [(_voc_name(result), result.mean_ap) for result in voc]


def _voc_name(result: VocResult) -> str:
    rule = "11-point" if result.interpolation is Interpolation.ELEVEN_POINTS else "area"
    return f"VOC {rule}" + ("" if result.iou == 0.5 else f" @{result.iou:g}")


def _meaning(name: str) -> str:
    if name.startswith("AR@"):
        return f"average recall with at most {name[3:]} detection{'s' if name[3:] != '1' else ''} per picture"
    return _MEANINGS[name]


def _class_rows(coco: CocoResult, voc: Sequence[VocResult]) -> list[tuple[str, int, list[float]]]:
    """Name, boxes, and the numbers in the order of the columns."""
    return [
        (one.name, one.boxes, [one.ap, one.ap50, one.ap75, one.ar, *(result.per_class[label].ap for result in voc)])
        for label, one in enumerate(coco.per_class)
    ]


def _precision_charts(coco: CocoResult) -> list[tuple[str, Markup]]:
    def chart(lines: Sequence[tuple[str, Any]]) -> Markup:
        series = [Series(name=name, x=coco.recall_levels.tolist(), y=curve.tolist()) for name, curve in lines]
        return Markup(line_chart(series, x_label="recall", y_label="precision", x_range=(0.0, 1.0), y_range=(0.0, 1.0)))

    by_iou = [(f"IoU {iou:.2f}", coco.curve(iou=iou)) for iou in (0.5, 0.6, 0.7, 0.75, 0.8, 0.9)]
    charts = [("All classes, by IoU", chart(by_iou))]
    present = [label for label, one in enumerate(coco.per_class) if one.boxes]
    shown = sorted(present, key=lambda label: -coco.per_class[label].boxes)[:_MOST_CURVES]
    if len(present) > 1:
        which = "by class" if len(shown) == len(present) else f"the {len(shown)} most frequent classes"
        lines = [(coco.class_names[label], coco.curve(label)) for label in sorted(shown)]
        charts.append((f"IoU 0.50, {which}", chart(lines)))
    return charts


def _error_rows(errors: ErrorResult) -> list[tuple[str, str, int, float, float]]:
    """Name, meaning, count, gain of AP, and the share of the largest gain (the length of its bar)."""
    largest = max((errors.ap_gains[kind] for kind in _ERROR_MEANINGS), default=0.0)
    return [
        (name, meaning, errors.counts[kind], gain := errors.ap_gains[kind], gain / largest if largest > 0 else 0.0)
        for kind, (name, meaning) in _ERROR_MEANINGS.items()
    ]


def _confusion(errors: ErrorResult, names: Sequence[str]) -> list[tuple[str, list[tuple[int, float]]]]:
    """Rows of the matrix: the true class, then count and share of the row in each column. Nothing for many classes."""
    if len(names) > _LARGEST_MATRIX:
        return []
    rows = []
    for name, counts in zip([*names, "nothing"], errors.confusion.tolist(), strict=True):
        total = max(sum(counts), 1)
        rows.append((name, [(count, count / total) for count in counts]))
    return rows


def _training_charts(history: Sequence[Row]) -> list[tuple[str, Markup]]:
    train = [row for row in history if row.get("kind") == "train"]
    evaluations = [row for row in history if row.get("kind") == "evaluation"]
    names = list(dict.fromkeys(name for row in train for name in row))
    losses = [name for name in names if name == "loss" or name.startswith("loss/")]
    groups = [
        ("Losses", "loss", train, losses),
        ("Average precision on the way", "AP", evaluations, ["AP", "AP50", "AP75"]),
        ("Learning rate", "learning rate", train, ["lr"]),
    ]
    charts = []
    for caption, label, rows, wanted in groups:
        series = [_history_line(rows, name) for name in wanted]
        series = [line for line in series if len(line.x) > 1]
        if series:
            x_range, y_range = (0.0, max(max(line.x) for line in series)), (0.0, _highest(series))
            chart = line_chart(series, x_label="step", y_label=label, x_range=x_range, y_range=y_range)
            charts.append((caption, Markup(chart)))
    return charts


def _history_line(rows: Sequence[Row], name: str) -> Series:
    found = [(float(row["step"]), float(row[name])) for row in rows if name in row]
    label = "all" if name == "loss" else name.removeprefix("loss/")
    return Series(name=label, x=[x for x, _ in found], y=[y for _, y in found])


def _highest(series: Sequence[Series]) -> float:
    values = [value for line in series for value in line.y if math.isfinite(value)]
    return max(values) * 1.05 if values and max(values) > 0 else 1.0


def _embedded(picture: Image.Image) -> str:
    """The picture as a data address: JPEG, brought to the width of a page."""
    if picture.width > _WIDEST_PICTURE_PX:
        height = max(1, round(picture.height * _WIDEST_PICTURE_PX / picture.width))
        picture = picture.resize((_WIDEST_PICTURE_PX, height), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
