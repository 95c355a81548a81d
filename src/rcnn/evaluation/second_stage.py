"""What a perfect second stage would reach on given proposals: the bound that the first stage sets.

Each true box gets the proposal that is paired with it by overlap (`PictureOverlaps.pair_by_overlap`), one to one, if
they overlap by the IoU from which a second stage is trained to see an object. All other proposals are recognised as
background or as duplicates. What is left is one detection for each box that was found:

`classified`: the true class, the proposal's own box, and their overlap as the score, so that AP is lost by nothing but
    missing boxes and inexact ones;
`refined`: the true class and the true box, so that AP is lost by missing boxes alone.

Both go through the COCO evaluation that detections go through (its limit of 100 detections in a picture included).
Letter: B proposal counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rcnn.data.table import AnnotationTable
from rcnn.evaluation.coco import CocoResult, coco_metrics
from rcnn.evaluation.overlaps import PictureOverlaps
from rcnn.evaluation.recall import PROPOSAL_COUNTS
from rcnn.evaluation.table import DetectionTable

FOREGROUND_IOU = 0.5


@dataclass(frozen=True, kw_only=True)
class PerfectSecondStage:
    """With the best `count` proposals of each picture."""

    count: int
    classified: CocoResult
    refined: CocoResult


class PerfectSecondStageCounter:
    """Collects the detections of a perfect second stage, one picture after the other: at most one for each true box."""

    def __init__(
        self, truth: AnnotationTable, *, counts: Sequence[int] = PROPOSAL_COUNTS, foreground_iou: float = FOREGROUND_IOU
    ) -> None:
        self._truth, self._counts, self._foreground_iou = truth, tuple(counts), foreground_iou
        # For each count: the picture's place in the table, class, overlap, the proposal's box, the true box.
        self._rows: list[list[np.ndarray]] = [[] for _ in self._counts]

    def add(self, index: int, picture: PictureOverlaps) -> None:
        """`index`: of the picture in the table."""
        for rows, count in zip(self._rows, self._counts, strict=True):
            pairs = picture.pair_by_overlap(num_proposals=count)
            found = np.flatnonzero(pairs.ious >= self._foreground_iou)
            columns = np.empty((len(found), 11))
            columns[:, 0] = index
            columns[:, 1] = picture.labels[found]
            columns[:, 2] = pairs.ious[found]
            columns[:, 3:7] = picture.proposals_xyxy[pairs.proposals[found]]
            columns[:, 7:] = picture.boxes_xyxy[found]
            rows.append(columns)

    def result(self) -> tuple[PerfectSecondStage, ...]:
        return tuple(self._judged(count, rows) for count, rows in zip(self._counts, self._rows, strict=True))

    def _judged(self, count: int, rows: list[np.ndarray]) -> PerfectSecondStage:
        columns = np.concatenate([np.empty((0, 11)), *rows])
        return PerfectSecondStage(
            count=count,
            classified=self._evaluated(columns, columns[:, 3:7], columns[:, 2]),
            refined=self._evaluated(columns, columns[:, 7:], np.ones(len(columns))),
        )

    def _evaluated(self, columns: np.ndarray, boxes_xyxy: np.ndarray, scores: np.ndarray) -> CocoResult:
        found = DetectionTable(
            image_ids=self._truth.image_ids[columns[:, 0].astype(np.int64)],
            boxes_xyxy=boxes_xyxy,
            scores=scores,
            labels=columns[:, 1].astype(np.int64),
        )
        return coco_metrics(self._truth, found)
