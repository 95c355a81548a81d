"""Which proposal belongs to which true box of a picture: the overlaps, and the two ways in use to pair them.

Letters: G true boxes that count, P proposals, best first.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from rcnn.data.table import AnnotationTable
from rcnn.evaluation.voc import pairwise_iou

# pycocotools' own: an overlap of exactly the threshold reaches it, whatever the last bit.
_COCO_CEILING = 1 - 1e-10


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """For each true box the overlap with its own proposal, and which one that is; 0 and -1 where it has none."""

    ious: np.ndarray  # float64 [G]
    proposals: np.ndarray  # int64 [G]


@dataclass(frozen=True)
class PictureOverlaps:
    """The true boxes of a picture, the ignored ones left out, its proposals, and how they overlap."""

    boxes_xyxy: np.ndarray  # float64 [G, 4]
    labels: np.ndarray  # int64 [G]
    areas: np.ndarray  # float64 [G], as the source states them
    proposals_xyxy: np.ndarray  # float64 [P, 4]

    @classmethod
    def of(cls, truth: AnnotationTable, index: int, proposals_xyxy: np.ndarray) -> PictureOverlaps:
        """`proposals_xyxy`: in original pixels, best first."""
        rows = truth.rows(index)
        counted = ~truth.ignored[rows]
        return cls(
            truth.boxes_xyxy[rows][counted],
            truth.labels[rows][counted],
            truth.areas[rows][counted],
            np.asarray(proposals_xyxy, np.float64),
        )

    @cached_property
    def ious(self) -> np.ndarray:
        """[G, P]."""
        return pairwise_iou(self.boxes_xyxy, self.proposals_xyxy)

    @cached_property
    def _best_first(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All pairs that overlap, the highest IoU first, ties in the order of box and proposal: box, proposal, IoU."""
        box, proposal = np.nonzero(self.ious > 0)
        iou = self.ious[box, proposal]
        order = np.argsort(-iou, kind="stable")
        return box[order], proposal[order], iou[order]

    def pair_by_overlap(self, *, num_proposals: int, boxes: np.ndarray | None = None) -> Pairs:
        """Pairs by the highest IoU first, each box and each of the best `num_proposals` once: the rule of MMDetection's
        `proposal_fast` and of detectron2. `boxes` (bool [G]): only these, as if there were no other."""
        box, proposal, iou = self._best_first
        chosen = proposal < num_proposals
        if boxes is not None:
            chosen &= boxes[box]
        pairs = Pairs(ious=np.zeros(len(self.boxes_xyxy)), proposals=np.full(len(self.boxes_xyxy), -1))
        left = min(len(pairs.ious) if boxes is None else int(boxes.sum()), len(self.proposals_xyxy), num_proposals)
        taken: set[int] = set()
        for b, p, overlap in zip(box[chosen].tolist(), proposal[chosen].tolist(), iou[chosen].tolist(), strict=True):
            if left == 0:
                break
            if pairs.proposals[b] < 0 and p not in taken:
                pairs.ious[b], pairs.proposals[b] = overlap, p
                taken.add(p)
                left -= 1
        return pairs

    def ranks_by_score(self, iou_threshold: float, *, boxes: np.ndarray | None = None) -> np.ndarray:
        """int64 [G]: the rank of the proposal that finds each box, P where none does. COCO's rule: the best proposal
        chooses first, of the boxes that it overlaps by the threshold and that are still there the one it overlaps most
        (of equal ones the last). `boxes`: only these count; others never come in their way."""
        threshold = min(iou_threshold, _COCO_CEILING)
        box, proposal = np.nonzero(self.ious >= threshold)
        if boxes is not None:
            box, proposal = box[boxes[box]], proposal[boxes[box]]
        iou = self.ious[box, proposal]
        ranks = np.full(len(self.boxes_xyxy), len(self.proposals_xyxy))
        taken: set[int] = set()
        # By proposal; for each the highest IoU first, of equal ones the last box.
        for row in np.lexsort((-box, -iou, proposal)).tolist():
            b, p = int(box[row]), int(proposal[row])
            if p not in taken and ranks[b] == len(self.proposals_xyxy):
                ranks[b] = p
                taken.add(p)
        return ranks
