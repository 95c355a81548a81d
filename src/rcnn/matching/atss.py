"""Adaptive training sample selection (Zhang et al., 2020): a threshold of its own for each ground-truth box.

Letters: G ground-truth boxes, A anchors of a picture over all levels, C candidates of one box over all levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rcnn.boxes.geometry import centres, iou, lies_inside, overlap_share
from rcnn.matching.iou import Matches
from rcnn.records import Target

# A centre belongs to a box that it lies in by more than this (MMDetection; the authors' code, too).
MIN_DISTANCE_PX = 0.01


@dataclass(frozen=True, kw_only=True)
class ATSSMatcher:
    """`match_by_atss`, then ignore regions: an anchor whose centre lies in one and that is not positive takes no part.

    `ignore_share` asks instead that this share of the anchor's area lies in the region (MMDetection's
    `ignore_iof_thr`). Anchors of eight strides never lie in a small region by half, so the centre decides by default.
    """

    candidates_per_level: int = 9
    ignore_share: float | None = None

    def __call__(self, anchors_by_level: Sequence[Float[Tensor, "_ 4"]], target: Target) -> Matches:
        """Matches of the anchors of all levels, level after level."""
        matches = match_by_atss(anchors_by_level, target.boxes_xyxy, candidates_per_level=self.candidates_per_level)
        if len(target.ignore_xyxy) == 0:
            return matches
        anchors = torch.cat(list(anchors_by_level))
        if self.ignore_share is None:
            ignored = lies_inside(centres(anchors), target.ignore_xyxy)
        else:
            ignored = overlap_share(anchors, target.ignore_xyxy) >= self.ignore_share
        negative = matches.negative & ~ignored.any(dim=1)
        return Matches(gt_index=matches.gt_index, positive=matches.positive, negative=negative)


def match_by_atss(
    anchors_by_level: Sequence[Float[Tensor, "_ 4"]], boxes_xyxy: Float[Tensor, "gt 4"], *, candidates_per_level: int
) -> Matches:
    """Candidates of a box are the anchors of each level whose centres are nearest to its own. Those are positive whose
    IoU is at least the mean plus the standard deviation of all its candidates' IoUs, and whose centre lies in the box.

    An anchor that several boxes claim goes to the one that it overlaps most. All others are negative. MMDetection's
    `ATSSAssigner` gives the same, except where a box has one candidate in all: its deviation counts as 0 here.
    """
    anchors = torch.cat(list(anchors_by_level))
    if len(boxes_xyxy) == 0 or len(anchors) == 0:
        return nothing_positive(anchors)
    candidates = _nearest(anchors_by_level, boxes_xyxy, candidates_per_level)
    overlaps = iou(anchors, boxes_xyxy).gather(0, candidates)
    deviation = overlaps.std(dim=0, correction=min(1, len(overlaps) - 1))
    positive = overlaps >= overlaps.mean(dim=0) + deviation
    inside = lies_inside(centres(anchors), boxes_xyxy, by_px=MIN_DISTANCE_PX).gather(0, candidates)
    return claim(len(anchors), candidates, overlaps, positive & inside)


def claim(
    num_references: int,
    candidates: Int[Tensor, "c gt"],
    overlaps: Float[Tensor, "c gt"],
    positive: Bool[Tensor, "c gt"],
) -> Matches:
    """Matches from each box's positive candidates; a reference that several boxes claim goes to the largest overlap."""
    num_gt = candidates.shape[1]
    claims = overlaps.new_full((num_references, num_gt), -torch.inf)
    claims.scatter_(0, candidates, torch.where(positive, overlaps, -torch.inf))
    best, gt_index = claims.max(dim=1)
    claimed = best > -torch.inf
    return Matches(gt_index=gt_index, positive=claimed, negative=~claimed)


def nothing_positive(references: Tensor) -> Matches:
    """The matches of a picture without boxes: all negative."""
    neither = torch.zeros(len(references), dtype=torch.bool, device=references.device)
    return Matches(gt_index=neither.long(), positive=neither, negative=~neither)


def _nearest(anchors_by_level: Sequence[Tensor], boxes_xyxy: Tensor, count: int) -> Int[Tensor, "c gt"]:
    """Indices over all levels of each level's `count` anchors nearest to each box, by their centres."""
    box_centres, chosen, start = centres(boxes_xyxy), [], 0
    for anchors in anchors_by_level:
        # The root is taken as in MMDetection: it makes ties, of which topk takes the same ones.
        shift = centres(anchors)[:, None] - box_centres[None]
        distances = shift.pow(2).sum(dim=-1).sqrt()
        nearest = distances.topk(min(count, len(anchors)), dim=0, largest=False).indices
        chosen.append(nearest + start)
        start += len(anchors)
    return torch.cat(chosen)
