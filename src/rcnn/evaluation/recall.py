"""Recall of proposals: how many true boxes the first stage gives, by the number of proposals and the IoU asked for.

Letters: B proposal counts, T IoU thresholds, K classes, G true boxes of one picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

from rcnn.data.table import AnnotationTable
from rcnn.errors import DataError
from rcnn.evaluation.coco import check_detections
from rcnn.evaluation.overlaps import PictureOverlaps
from rcnn.evaluation.table import DetectionTable

PROPOSAL_COUNTS = (10, 50, 100, 300, 1000)
# Least and largest area of each size, both included, as COCO and detectron2 have them.
AREAS: Mapping[str, tuple[float, float]] = {
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, 1e10),
}


class Pairing(Enum):
    """How proposals and true boxes are paired.

    `OVERLAP`: the pair of highest IoU first (MMDetection's `proposal_fast`, detectron2): what could be found.
    `SCORE`: the best proposal chooses first, at each IoU anew (COCO's AR without classes, MMDetection's `proposal`).
    """

    OVERLAP = "overlap"
    SCORE = "score"


class Unproposed(Enum):
    """What the true boxes of a picture without any proposal are: `MISSED`, or `LEFT_OUT` of the count as detectron2
    does, which makes a detector that proposes nothing there look better."""

    MISSED = "missed"
    LEFT_OUT = "left_out"


@dataclass(frozen=True, kw_only=True)
class ClassRecall:
    """One class, its boxes paired among those of all classes. NaN where the truth has no box of it."""

    name: str
    boxes: int
    recall: np.ndarray  # [B, T]

    @property
    def average(self) -> np.ndarray:
        """AR@B: [B]."""
        return self.recall.mean(axis=1)


@dataclass(frozen=True, kw_only=True)
class RecallResult:
    """`average` is the mean over the IoU thresholds (AR@B). NaN where the truth has no such box."""

    counts: tuple[int, ...]
    iou_thresholds: np.ndarray  # [T]
    recall: np.ndarray  # [B, T]
    average: np.ndarray  # [B]
    average_by_size: dict[str, np.ndarray]  # each [B]; a size's boxes are paired as if there were no other
    boxes_by_size: dict[str, int]
    per_class: tuple[ClassRecall, ...]
    boxes: int
    pictures: int
    proposals: int
    pairing: Pairing

    def at(self, iou: float) -> np.ndarray:
        """Recall at one of the thresholds: [B]."""
        return self.recall[:, int(np.abs(self.iou_thresholds - iou).argmin())]


class RecallCounter:
    """Recall of a data set from one picture after the other: only counts are kept.

    `counts`: with the so many best proposals of each picture.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        *,
        counts: Sequence[int] = PROPOSAL_COUNTS,
        pairing: Pairing = Pairing.OVERLAP,
        unproposed: Unproposed = Unproposed.MISSED,
        areas: Mapping[str, tuple[float, float]] = AREAS,
    ) -> None:
        self._names, self._counts = tuple(class_names), tuple(counts)
        self._pairing, self._unproposed, self._areas = pairing, unproposed, dict(areas)
        self._thresholds = np.linspace(0.5, 0.95, 10)
        shape = (len(self._counts), len(self._thresholds))
        self._class_hits = np.zeros((len(self._names), *shape), np.int64)
        self._class_boxes = np.zeros(len(self._names), np.int64)
        self._size_hits = {size: np.zeros(shape, np.int64) for size in self._areas}
        self._size_boxes = dict.fromkeys(self._areas, 0)
        self._pictures = self._proposals = 0

    def add(self, picture: PictureOverlaps) -> None:
        self._pictures += 1
        self._proposals += len(picture.proposals_xyxy)
        if self._unproposed is Unproposed.LEFT_OUT and not len(picture.proposals_xyxy):
            return
        np.add.at(self._class_hits, picture.labels, np.moveaxis(self._hits(picture, None), -1, 0))
        np.add.at(self._class_boxes, picture.labels, 1)
        for size, (least, largest) in self._areas.items():
            chosen = (picture.areas >= least) & (picture.areas <= largest)
            if chosen.any():
                self._size_hits[size] += self._hits(picture, chosen)[..., chosen].sum(axis=-1)
                self._size_boxes[size] += int(chosen.sum())

    def _hits(self, picture: PictureOverlaps, boxes: np.ndarray | None) -> np.ndarray:
        """bool [B, T, G]: whether a box is found; for other boxes than `boxes` it means nothing."""
        if self._pairing is Pairing.OVERLAP:
            pairs = [picture.pair_by_overlap(num_proposals=count, boxes=boxes).ious for count in self._counts]
            return np.stack(pairs)[:, None, :] >= self._thresholds[:, None]
        ranks = np.stack([picture.ranks_by_score(threshold, boxes=boxes) for threshold in self._thresholds])
        available = np.minimum(self._counts, len(picture.proposals_xyxy))
        return ranks < available[:, None, None]

    def result(self) -> RecallResult:
        boxes = int(self._class_boxes.sum())
        recall = _share(self._class_hits.sum(axis=0), boxes)
        return RecallResult(
            counts=self._counts,
            iou_thresholds=self._thresholds,
            recall=recall,
            average=recall.mean(axis=1),
            average_by_size={
                size: _share(hits, self._size_boxes[size]).mean(axis=1) for size, hits in self._size_hits.items()
            },
            boxes_by_size=dict(self._size_boxes),
            per_class=tuple(
                ClassRecall(name=name, boxes=int(count), recall=_share(hits, int(count)))
                for name, count, hits in zip(self._names, self._class_boxes, self._class_hits, strict=True)
            ),
            boxes=boxes,
            pictures=self._pictures,
            proposals=self._proposals,
            pairing=self._pairing,
        )


def proposal_recall(
    truth: AnnotationTable,
    proposals: DetectionTable,
    *,
    counts: Sequence[int] = PROPOSAL_COUNTS,
    pairing: Pairing = Pairing.OVERLAP,
    unproposed: Unproposed = Unproposed.MISSED,
    areas: Mapping[str, tuple[float, float]] = AREAS,
) -> RecallResult:
    """Recall whatever the class, at IoU 0.50 to 0.95, with the `counts` best proposals of each picture.

    Ignored boxes are left out. Raises `DataError` for proposals that do not fit.
    """
    problems = check_detections(truth, proposals)
    if problems:
        raise DataError(problems)
    counter = RecallCounter(truth.classes.names, counts=counts, pairing=pairing, unproposed=unproposed, areas=areas)
    order = np.lexsort((-proposals.scores, proposals.image_ids))  # stable: equal scores as in the table
    sorted_ids = proposals.image_ids[order]
    for index, image_id in enumerate(truth.image_ids.tolist()):
        first, last = np.searchsorted(sorted_ids, [image_id, image_id + 1])
        counter.add(PictureOverlaps.of(truth, index, proposals.boxes_xyxy[order[first:last]]))
    return counter.result()


def _share(hits: np.ndarray, boxes: int) -> np.ndarray:
    return hits / boxes if boxes else np.full(hits.shape, np.nan)
