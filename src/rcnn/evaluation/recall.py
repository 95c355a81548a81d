"""Recall of proposals: how many true boxes the first stage gives, by the number of proposals and the IoU asked for.

Letters: G true boxes, P proposals of one picture, B proposal counts, T IoU thresholds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rcnn.data.table import AnnotationTable
from rcnn.errors import DataError
from rcnn.evaluation.coco import check_detections
from rcnn.evaluation.table import DetectionTable
from rcnn.evaluation.voc import pairwise_iou

PROPOSAL_COUNTS = (10, 50, 100, 300, 1000)
_SMALL_BELOW, _LARGE_FROM = 32.0**2, 96.0**2


@dataclass(frozen=True, kw_only=True)
class RecallResult:
    """`average` is the mean over the IoU thresholds (AR@B). NaN where the truth has no such box."""

    counts: tuple[int, ...]
    iou_thresholds: np.ndarray  # [T]
    recall: np.ndarray  # [B, T]
    average: np.ndarray  # [B]
    average_by_size: dict[str, np.ndarray]  # small, medium, large: each [B]
    boxes: int


def proposal_recall(
    truth: AnnotationTable, proposals: DetectionTable, *, counts: Sequence[int] = PROPOSAL_COUNTS
) -> RecallResult:
    """Recall whatever the class, at IoU 0.50 to 0.95, with the `counts` best proposals of each picture.

    Boxes and proposals are paired one to one, the pair of highest IoU first; ignored boxes are left out. The numbers
    are those of MMDetection's `proposal_fast` (`eval_recalls`). Raises `DataError` for proposals that do not fit.
    """
    problems = check_detections(truth, proposals)
    if problems:
        raise DataError(problems)
    ious = np.concatenate([np.zeros((len(counts), 0)), *_paired_ious(truth, proposals, counts)], axis=1)
    thresholds = np.linspace(0.5, 0.95, 10)
    areas = truth.areas[~truth.ignored]
    sizes = {
        "small": areas < _SMALL_BELOW,
        "medium": (areas >= _SMALL_BELOW) & (areas < _LARGE_FROM),
        "large": areas >= _LARGE_FROM,
    }
    recall = _recall(ious, thresholds)
    return RecallResult(
        counts=tuple(counts),
        iou_thresholds=thresholds,
        recall=recall,
        average=recall.mean(axis=1),
        average_by_size={size: _recall(ious[:, rows], thresholds).mean(axis=1) for size, rows in sizes.items()},
        boxes=len(areas),
    )


def _recall(ious: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """[B, T] from the IoUs that true boxes reached, [B, G]."""
    if not ious.shape[1]:
        return np.full((len(ious), len(thresholds)), np.nan)
    return (ious[:, :, None] >= thresholds).mean(axis=1)


def _paired_ious(truth: AnnotationTable, proposals: DetectionTable, counts: Sequence[int]) -> list[np.ndarray]:
    """For each picture [B, G]: the IoU of each of its boxes with its own proposal, in the order of the truth."""
    order = np.lexsort((-proposals.scores, proposals.image_ids))  # stable: equal scores as in the table
    sorted_ids = proposals.image_ids[order]
    pictures = []
    for index, image_id in enumerate(truth.image_ids.tolist()):
        rows = truth.rows(index)
        boxes = truth.boxes_xyxy[rows][~truth.ignored[rows]]
        first, last = np.searchsorted(sorted_ids, [image_id, image_id + 1])
        best = order[first:last][: max(counts, default=0)]
        ious = pairwise_iou(boxes, proposals.boxes_xyxy[best])
        pictures.append(np.stack([_pair(ious[:, :count]) for count in counts]))
    return pictures


def _pair(ious: np.ndarray) -> np.ndarray:
    """[G]: pairs by the highest IoU first, each box and each proposal once; 0 for boxes that are left alone."""
    reached = np.zeros(len(ious))
    left = ious.copy()
    for _ in range(min(left.shape)):
        box, proposal = np.unravel_index(left.argmax(), left.shape)
        reached[box] = left[box, proposal]
        left[box, :] = -1
        left[:, proposal] = -1
    return reached
