"""COCO's twelve numbers from two tables: the adapter of `hotcoco`, whose numbers are pycocotools' to the last bit.

Letters: T IoU thresholds, R recall levels, K classes (1 where all count as one), A area ranges
(all, small, medium, large), D detection limits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np

from rcnn.data.table import AnnotationTable
from rcnn.errors import DataError, Problem
from rcnn.evaluation.table import DetectionTable

# Outside of every area range: COCO's own way to leave a box out of the count without the rule of crowds.
_OUTSIDE_ALL_RANGES = 1e12


class Classes(Enum):
    """Whether a detection must name the class of the box (`EACH`), or boxes alone count (`TOGETHER`: proposals)."""

    EACH = "each"
    TOGETHER = "together"


class Ignored(Enum):
    """What the ignored boxes of a data set are.

    `CROWD`: regions that hold many objects. A detection inside is left out of the count, however many there are, and
    the overlap is measured by the detection's own area (COCO's `iscrowd`).
    `OBJECT`: single objects that need not be found (VOC's `difficult`). The overlap is the ordinary IoU and one
    detection is left out; a second one of the same object is a duplicate, and wrong. COCO treats a box outside of the
    measured area range just so. The rule of crowds would forgive any small detection that falls inside such a box.
    """

    CROWD = "crowd"
    OBJECT = "object"


@dataclass(frozen=True, kw_only=True)
class ClassResult:
    """The numbers of one class; NaN where the truth has no box of it that counts."""

    name: str
    boxes: int  # of the truth, without ignored ones
    ap: float
    ap50: float
    ap75: float
    ar: float


@dataclass(frozen=True, kw_only=True)
class CocoResult:
    """What pycocotools computes. In `stats`, `precision`, `recall` and `scores` -1 stands for "not defined", as there.

    The first number of `stats` asks for the limit of 100 detections, so that with other limits it is -1 (as there).
    """

    names: tuple[str, ...]  # of the twelve numbers
    stats: np.ndarray  # float64 [12]
    per_class: tuple[ClassResult, ...]  # empty where all classes count as one
    class_names: tuple[str, ...]
    max_detections: tuple[int, int, int]
    iou_thresholds: np.ndarray  # [T]
    recall_levels: np.ndarray  # [R]
    precision: np.ndarray  # [T, R, K, A, D]
    recall: np.ndarray  # [T, K, A, D]
    scores: np.ndarray  # [T, R, K, A, D]

    def __getitem__(self, name: str) -> float:
        return float(self.stats[self.names.index(name)])

    def items(self) -> Iterator[tuple[str, float]]:
        return zip(self.names, (float(value) for value in self.stats), strict=True)

    def curve(self, label: int | None = None, iou: float = 0.5) -> np.ndarray:
        """Precision at each recall level ([R]) of one class, or the mean of all classes; NaN where not defined."""
        rows = self.precision[int(np.abs(self.iou_thresholds - iou).argmin()), :, :, 0, -1]
        defined = np.where(rows > -1, rows, np.nan)
        if label is not None:
            return defined[:, label]
        kept = defined[:, ~np.isnan(defined).all(axis=0)]
        return kept.mean(axis=1) if kept.size else np.full(len(rows), np.nan)


@dataclass(frozen=True, kw_only=True)
class ErrorResult:
    """What is wrong, by the kinds of TIDE (Bolya et al., 2020): how often, and the AP that mending it would give.

    Kinds: Cls (wrong class), Loc (box too far off), Both, Dupe (found twice), Bkg (nothing there), Miss (not found).
    `confusion[i, j]`: boxes of class i found as class j; the last row and column are the background.
    """

    counts: dict[str, int]
    ap_gains: dict[str, float]
    iou: float
    min_score: float
    confusion: np.ndarray  # int64 [K + 1, K + 1]


def coco_metrics(
    truth: AnnotationTable,
    found: DetectionTable,
    *,
    max_detections: tuple[int, int, int] = (1, 10, 100),
    classes: Classes = Classes.EACH,
    ignored: Ignored | None = None,
) -> CocoResult:
    """The twelve numbers, per class too. `ignored` defaults to crowd for COCO data and to object for all other.

    Raises `DataError` for detections of pictures or classes that the truth does not have, and for numbers that are
    not finite.
    """
    evaluation = _evaluated(truth, found, max_detections, classes, ignored)
    evaluation.accumulate()
    arrays = {name: np.asarray(evaluation.eval[name]) for name in ("precision", "recall", "scores")}
    iou_thresholds = np.asarray(evaluation.params.iou_thrs)
    return CocoResult(
        names=_names(max_detections),
        stats=_stats(arrays["precision"], arrays["recall"], iou_thresholds, max_detections),
        per_class=_per_class(truth, arrays["precision"], arrays["recall"]) if classes is Classes.EACH else (),
        class_names=truth.classes.names,
        max_detections=max_detections,
        iou_thresholds=iou_thresholds,
        recall_levels=np.asarray(evaluation.params.rec_thrs),
        **arrays,
    )


def error_kinds(
    truth: AnnotationTable,
    found: DetectionTable,
    *,
    iou: float = 0.5,
    min_score: float = 0.3,
) -> ErrorResult:
    """Kinds of error at one IoU. The gains regard all detections, counts and confusion those of at least `min_score`:
    a detector returns many boxes of low score, which AP hardly feels and nobody would look at. Every ignored box is
    taken as a crowd region here, so that nothing inside it counts as an error."""
    everything = _evaluated(truth, found, (1, 10, 100), Classes.EACH, Ignored.CROWD)
    kept = found.scores >= min_score
    confident = DetectionTable(
        image_ids=found.image_ids[kept],
        boxes_xyxy=found.boxes_xyxy[kept],
        scores=found.scores[kept],
        labels=found.labels[kept],
    )
    evaluation = _evaluated(truth, confident, (1, 10, 100), Classes.EACH, Ignored.CROWD)
    gains = everything.tide_errors(pos_thr=iou)["delta_ap"]
    return ErrorResult(
        counts={kind: int(count) for kind, count in evaluation.tide_errors(pos_thr=iou)["counts"].items()},
        ap_gains={kind: float(gain) for kind, gain in gains.items()},
        iou=iou,
        min_score=min_score,
        confusion=np.asarray(evaluation.confusion_matrix(iou_thr=iou)["matrix"]).astype(np.int64),
    )


def _evaluated(
    truth: AnnotationTable,
    found: DetectionTable,
    max_detections: tuple[int, int, int],
    classes: Classes,
    ignored: Ignored | None,
) -> Any:
    """hotcoco's evaluation after matching. Pictures are numbered in the order of their ids, because pycocotools lets
    that order decide among equal scores; classes by their label."""
    from hotcoco import COCO, COCOeval

    problems = check_detections(truth, found)
    if problems:
        raise DataError(problems)
    if ignored is None:
        ignored = Ignored.CROWD if truth.format == "COCO" else Ignored.OBJECT
    order = np.argsort(truth.image_ids)
    numbers = np.empty(len(truth), np.int64)
    numbers[order] = np.arange(1, len(truth) + 1)
    crowd = truth.ignored if ignored is Ignored.CROWD else np.zeros_like(truth.ignored)
    boxes = COCO.from_arrays(
        [{"id": number} for number in range(1, len(truth) + 1)],
        [{"id": label + 1, "name": str(label)} for label in range(len(truth.classes))],
        np.repeat(numbers, np.diff(truth.starts)),
        truth.labels + 1,
        _xywh(truth.boxes_xyxy),
        area=truth.areas if ignored is Ignored.CROWD else np.where(truth.ignored, _OUTSIDE_ALL_RANGES, truth.areas),
        iscrowd=crowd,
    )
    evaluation = COCOeval(boxes, boxes.load_res(_result_rows(truth.image_ids[order], found)), "bbox")
    evaluation.params.max_dets = list(max_detections)
    evaluation.params.use_cats = classes is Classes.EACH
    evaluation.evaluate()
    return evaluation


def _result_rows(sorted_ids: np.ndarray, found: DetectionTable) -> np.ndarray:
    """[D, 7]: picture, x, y, width, height, score, class."""
    rows = np.empty((len(found), 7))
    rows[:, 0] = np.searchsorted(sorted_ids, found.image_ids) + 1
    rows[:, 1:5] = _xywh(found.boxes_xyxy)
    rows[:, 5] = found.scores
    rows[:, 6] = found.labels + 1
    return rows


def _xywh(boxes_xyxy: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes_xyxy[:, :2], boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]], axis=1)


def check_detections(truth: AnnotationTable, found: DetectionTable) -> list[Problem]:
    """What makes these detections unfit to be compared with this truth; each kind once, with how often it occurs."""
    strange = ~np.isin(found.image_ids, truth.image_ids)
    unnamed = (found.labels < 0) | (found.labels >= len(truth.classes))
    broken = ~(np.isfinite(found.boxes_xyxy).all(axis=1) & np.isfinite(found.scores))
    problems = []
    if strange.any():
        ids = np.unique(found.image_ids[strange])
        given = f"{strange.sum()} are of pictures that the {truth.split} split does not have, such as id {ids[0]}"
        problems.append(
            Problem(where="detections", given=given, remedy="evaluate against the split that was predicted")
        )
    if unnamed.any():
        labels = np.unique(found.labels[unnamed])
        given = f"{unnamed.sum()} have a label that is no class of the data, such as {labels[0]}"
        problems.append(Problem(where="detections", given=given, allowed=f"0 to {len(truth.classes) - 1}"))
    if broken.any():
        given = f"{broken.sum()} have a box or score that is not finite, the first in row {int(broken.argmax())}"
        problems.append(Problem(where="detections", given=given, allowed="finite numbers"))
    return problems


def _names(limits: tuple[int, int, int]) -> tuple[str, ...]:
    precisions = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
    return (*precisions, *(f"AR@{limit}" for limit in limits), "AR_small", "AR_medium", "AR_large")


def _stats(precision: np.ndarray, recall: np.ndarray, iou: np.ndarray, limits: tuple[int, int, int]) -> np.ndarray:
    """pycocotools' `summarize`, with its order of summation."""

    def mean(values: np.ndarray) -> float:
        values = values[values > -1]
        return float(np.mean(values)) if values.size else -1.0

    def mean_precision(area: int, threshold: float | None = None, limit: int = limits[2]) -> float:
        if limit not in limits:
            return -1.0
        rows = precision if threshold is None else precision[iou == threshold]
        return mean(rows[:, :, :, area, limits.index(limit)])

    precisions = [mean_precision(0, limit=100), mean_precision(0, 0.5), mean_precision(0, 0.75)]
    precisions += [mean_precision(area) for area in (1, 2, 3)]
    recalls = [mean(recall[:, :, 0, limit]) for limit in range(3)] + [mean(recall[:, :, area, 2]) for area in (1, 2, 3)]
    return np.array(precisions + recalls)


def _per_class(truth: AnnotationTable, precision: np.ndarray, recall: np.ndarray) -> tuple[ClassResult, ...]:
    def mean(values: np.ndarray) -> float:
        values = values[values > -1]
        return float(np.mean(values)) if values.size else float("nan")

    counts = np.bincount(truth.labels[~truth.ignored], minlength=len(truth.classes))
    return tuple(
        ClassResult(
            name=name,
            boxes=int(counts[label]),
            ap=mean(precision[:, :, label, 0, -1]),
            ap50=mean(precision[0, :, label, 0, -1]),
            ap75=mean(precision[5, :, label, 0, -1]),
            ar=mean(recall[:, label, 0, -1]),
        )
        for label, name in enumerate(truth.classes.names)
    )
