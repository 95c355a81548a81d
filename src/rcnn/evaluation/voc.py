"""PASCAL VOC's average precision: precision and recall at one IoU, summed up by 11 points or by the area.

Reproduces the development kit's rules as chainercv and simple-faster-rcnn-pytorch compute them.
Letters: K classes, D detections of one class, G boxes of one class and picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np

from rcnn.data.table import AnnotationTable
from rcnn.errors import DataError
from rcnn.evaluation.coco import check_detections
from rcnn.evaluation.table import DetectionTable


class Interpolation(Enum):
    """How a curve becomes a number: the mean precision at recall 0, 0.1 .. 1 (VOC2007), or the area (VOC2010 on)."""

    ELEVEN_POINTS = "11_points"
    AREA = "area"


class Corners(Enum):
    """What the far corner x2, y2 of a box is.

    `CONTINUOUS`: the far edge, width x2 - x1, as everywhere in rcnn: a VOC box xmin..xmax is (xmin - 1, .., xmax, ..)
    there, so that the IoU is the development kit's own, whose width is xmax - xmin + 1.
    `INCLUSIVE_PIXELS`: the last pixel, width x2 - x1 + 1: tables that hold VOC's numbers unchanged or all moved by one.
    """

    CONTINUOUS = "continuous"
    INCLUSIVE_PIXELS = "inclusive_pixels"


class Difficult(Enum):
    """Whether the ignored boxes count: VOC's own rule leaves them and what finds them out."""

    LEFT_OUT = "left_out"
    COUNTED = "counted"


@dataclass(frozen=True, kw_only=True)
class VocClass:
    """One class. The curve has one entry per detection, best first; precision is NaN while only ignored boxes were
    found, recall and `ap` are NaN where the truth has no box that counts."""

    name: str
    boxes: int
    ap: float
    precision: np.ndarray  # [D]
    recall: np.ndarray  # [D]


@dataclass(frozen=True, kw_only=True)
class VocResult:
    """`mean_ap` is the mean of the classes that the truth has; NaN where it has none."""

    mean_ap: float
    per_class: tuple[VocClass, ...]
    iou: float
    interpolation: Interpolation


def voc_metrics(
    truth: AnnotationTable,
    found: DetectionTable,
    *,
    iou: float = 0.5,
    interpolation: Interpolation = Interpolation.ELEVEN_POINTS,
    corners: Corners = Corners.CONTINUOUS,
    difficult: Difficult = Difficult.LEFT_OUT,
) -> VocResult:
    """AP per class and their mean. Raises `DataError` for detections that do not fit the truth.

    A detection belongs to the box that it overlaps most. If that reaches `iou`, the first detection of a box is right,
    later ones are wrong, and all of a difficult box are left out. Equal scores stay in the order of the table.
    """
    problems = check_detections(truth, found)
    if problems:
        raise DataError(problems)
    ignored = truth.ignored if difficult is Difficult.LEFT_OUT else np.zeros_like(truth.ignored)
    extra = 1.0 if corners is Corners.INCLUSIVE_PIXELS else 0.0
    far = np.array([0.0, 0.0, extra, extra])
    owners = np.repeat(truth.image_ids, np.diff(truth.starts))
    results = []
    for label, name in enumerate(truth.classes.names):
        rows, mine = np.flatnonzero(truth.labels == label), np.flatnonzero(found.labels == label)
        mine = mine[np.argsort(-found.scores[mine], kind="stable")]
        matches = _matches(
            truth.boxes_xyxy[rows] + far,
            owners[rows],
            ignored[rows],
            found.boxes_xyxy[mine] + far,
            found.image_ids[mine],
            iou,
        )
        boxes = int((~ignored[rows]).sum())
        precision, recall = _curve(matches, boxes)
        ap = average_precision(precision, recall, interpolation) if boxes else float("nan")
        results.append(VocClass(name=name, boxes=boxes, ap=ap, precision=precision, recall=recall))
    known = [result.ap for result in results if result.boxes]
    return VocResult(
        mean_ap=float(np.mean(known)) if known else float("nan"),
        per_class=tuple(results),
        iou=iou,
        interpolation=interpolation,
    )


_RIGHT, _WRONG, _LEFT_OUT = 1, 0, -1


def _matches(
    true_boxes: np.ndarray,
    true_images: np.ndarray,
    ignored: np.ndarray,
    boxes: np.ndarray,
    images: np.ndarray,
    iou: float,
) -> np.ndarray:
    """For each detection of one class, best first: right, wrong or left out."""
    matches = np.full(len(boxes), _WRONG, np.int8)
    by_image = np.argsort(images, kind="stable")  # stable: best first within a picture
    ends = np.flatnonzero(np.diff(images[by_image])) + 1
    true_order = np.argsort(true_images, kind="stable")
    sorted_true_images = true_images[true_order]
    for group in np.split(by_image, ends) if len(by_image) else []:
        first, last = np.searchsorted(sorted_true_images, [images[group[0]], images[group[0]] + 1])
        rows = true_order[first:last]
        if len(rows):
            matches[group] = _matches_of_image(pairwise_iou(boxes[group], true_boxes[rows]), ignored[rows], iou)
    return matches


def _matches_of_image(ious: np.ndarray, ignored: np.ndarray, threshold: float) -> np.ndarray:
    matches = np.full(len(ious), _WRONG, np.int8)
    taken = np.zeros(len(ignored), bool)
    for row, box in enumerate(ious.argmax(axis=1)):
        if ious[row, box] < threshold:
            continue
        if ignored[box]:
            matches[row] = _LEFT_OUT
        elif not taken[box]:
            matches[row] = _RIGHT
        taken[box] = True
    return matches


def pairwise_iou(boxes_xyxy: np.ndarray, others_xyxy: np.ndarray) -> np.ndarray:
    """[D, G]; 0 where both boxes are empty."""
    corners = np.maximum(boxes_xyxy[:, None, :2], others_xyxy[:, :2])
    far_corners = np.minimum(boxes_xyxy[:, None, 2:], others_xyxy[:, 2:])
    shared = np.prod(np.clip(far_corners - corners, 0, None), axis=2)
    areas = np.prod(boxes_xyxy[:, 2:] - boxes_xyxy[:, :2], axis=1)
    other_areas = np.prod(others_xyxy[:, 2:] - others_xyxy[:, :2], axis=1)
    union = areas[:, None] + other_areas - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def _curve(matches: np.ndarray, boxes: int) -> tuple[np.ndarray, np.ndarray]:
    right, wrong = np.cumsum(matches == _RIGHT), np.cumsum(matches == _WRONG)
    counted = right + wrong
    precision = np.divide(right, counted, out=np.full(len(matches), np.nan), where=counted > 0)
    recall = right / boxes if boxes else np.full(len(matches), np.nan)
    return precision, recall


def average_precision(precision: np.ndarray, recall: np.ndarray, interpolation: Interpolation) -> float:
    """The number of one curve (entries best detection first; NaN precision counts as 0)."""
    precision = np.nan_to_num(precision)
    if interpolation is Interpolation.ELEVEN_POINTS:
        # Not arange(11) / 10: 3 * 0.1 is more than 0.3, and the peers ask for a recall of that much.
        levels = np.arange(0.0, 1.1, 0.1)
        return float(sum(precision[recall >= level].max(initial=0.0) / 11 for level in levels))
    recalls = np.concatenate([[0.0], recall, [1.0]])
    envelope = np.maximum.accumulate(np.concatenate([[0.0], precision, [0.0]])[::-1])[::-1]
    steps = np.flatnonzero(recalls[1:] != recalls[:-1])
    return float(np.sum((recalls[steps + 1] - recalls[steps]) * envelope[steps + 1]))
