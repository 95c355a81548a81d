"""Task alignment (TOOD, Feng et al., 2021): a prediction is positive where class score and box are good together.

Letters: G ground-truth boxes, A predictions of a picture over all levels, K classes, C candidates of one box.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rcnn.boxes.geometry import iou, lies_inside
from rcnn.matching.atss import MIN_DISTANCE_PX, claim, nothing_positive
from rcnn.matching.iou import Matches
from rcnn.records import Target


@dataclass(frozen=True, kw_only=True)
class AlignedMatches:
    """Matches, and how good each positive is among those of its box: the target of its class score, 0 elsewhere."""

    matches: Matches
    quality: Float[Tensor, " a"]


@dataclass(frozen=True, kw_only=True)
class TaskAlignedMatcher:
    """The `candidates` best predictions of each box by score^`score_power` * IoU^`iou_power`, where their point lies in
    the box (section 3.2; MMDetection's `TaskAlignedAssigner` and the normalisation of its `TOODHead`).

    A prediction that several boxes claim goes to the one that it overlaps most. The quality of a box's positives is
    that product, scaled so that the best one gets the largest IoU among them. A prediction whose point lies in an
    ignore region and that is not positive takes no part.
    """

    candidates: int = 13
    score_power: float = 1.0
    iou_power: float = 6.0

    @torch.no_grad()
    def __call__(
        self,
        *,
        points_xy: Float[Tensor, "a 2"],
        boxes_xyxy: Float[Tensor, "a 4"],
        scores: Float[Tensor, "a k"],
        target: Target,
    ) -> AlignedMatches:
        if len(target.boxes_xyxy) == 0 or len(points_xy) == 0:
            matches, quality = nothing_positive(points_xy), torch.zeros_like(points_xy[:, 0])
        else:
            matches, quality = self._match(points_xy, boxes_xyxy, scores, target)
        ignored = lies_inside(points_xy, target.ignore_xyxy).any(dim=1)
        negative = matches.negative & ~ignored
        matches = Matches(gt_index=matches.gt_index, positive=matches.positive, negative=negative)
        return AlignedMatches(matches=matches, quality=quality)

    def _match(
        self, points_xy: Tensor, boxes_xyxy: Tensor, scores: Tensor, target: Target
    ) -> tuple[Matches, Float[Tensor, " a"]]:
        # Two boxes without area share nothing, of nothing: no overlap.
        overlaps = iou(boxes_xyxy, target.boxes_xyxy).nan_to_num(nan=0.0)
        alignment = scores[:, target.labels] ** self.score_power * overlaps**self.iou_power
        best, candidates = alignment.topk(min(self.candidates, len(alignment)), dim=0)
        inside = lies_inside(points_xy, target.boxes_xyxy, by_px=MIN_DISTANCE_PX).gather(0, candidates)
        matches = claim(len(points_xy), candidates, overlaps.gather(0, candidates), (best > 0) & inside)
        return matches, _quality(matches, alignment, overlaps)


def _quality(matches: Matches, alignment: Float[Tensor, "a gt"], overlaps: Float[Tensor, "a gt"]) -> Tensor:
    """t-hat of section 3.2.1: alignment over its largest, times the largest IoU, among the positives of each box."""
    mine = torch.zeros_like(alignment, dtype=torch.bool).scatter_(1, matches.gt_index[:, None], True)
    mine &= matches.positive[:, None]
    alignment, overlaps = torch.where(mine, alignment, 0.0), torch.where(mine, overlaps, 0.0)
    # The constant is MMDetection's; it only matters where the alignment is as small.
    scaled = alignment / (alignment.amax(dim=0) + 1e-7) * overlaps.amax(dim=0)
    return scaled.sum(dim=1)
