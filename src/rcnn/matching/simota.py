"""SimOTA (Ge et al., 2021, YOLOX): each ground-truth box takes the predictions that would cost least, as many as its
best overlaps add up to.

Letters: G ground-truth boxes, T priors of a picture over all levels, V of them near a box, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rcnn.boxes.geometry import centres, iou, lies_inside
from rcnn.matching.atss import nothing_positive
from rcnn.matching.iou import Matches
from rcnn.records import Target

# What is added to the cost of a prior that lies not both in a box and near its centre (MMDetection's INF): it is taken
# only where nothing better is left.
FAR_COST = 1e5
_LEAST_IOU = 1e-7


@dataclass(frozen=True, kw_only=True)
class SimOTAMatcher:
    """MMDetection's `SimOTAAssigner`, then ignore regions: a prior in one that is not positive takes no part.

    Only priors in a box or within `centre_radius` strides of a box's centre are asked. `num_candidates` is the number
    of best overlaps whose sum says how many a box takes. The cost is `class_weight` times the cross-entropy of the
    scores plus `iou_weight` times the negative logarithm of the IoU.
    """

    centre_radius: float = 2.5
    num_candidates: int = 10
    iou_weight: float = 3.0
    class_weight: float = 1.0

    @torch.no_grad()
    def __call__(
        self,
        *,
        boxes_xyxy: Float[Tensor, "t 4"],
        scores: Float[Tensor, "t k"],
        points_xy: Float[Tensor, "t 2"],
        strides_px: Float[Tensor, " t"],
        target: Target,
    ) -> Matches:
        """Matches of the priors of all levels: what each predicts (boxes, probabilities), where it is, its stride."""
        matches = self._match(boxes_xyxy, scores, points_xy, strides_px, target)
        if len(target.ignore_xyxy) == 0:
            return matches
        ignored = lies_inside(points_xy, target.ignore_xyxy).any(dim=1)
        return Matches(gt_index=matches.gt_index, positive=matches.positive, negative=matches.negative & ~ignored)

    def _match(self, boxes: Tensor, scores: Tensor, points: Tensor, strides: Tensor, target: Target) -> Matches:
        inside = lies_inside(points, target.boxes_xyxy)
        central = self._is_central(points, strides, target.boxes_xyxy)
        near = (inside | central).any(dim=1).nonzero().flatten()
        if len(near) == 0:
            return nothing_positive(points)
        overlaps = iou(boxes[near], target.boxes_xyxy).nan_to_num(nan=0.0)
        cost = (
            self.class_weight * class_cost(scores[near], target.labels)
            - self.iou_weight * (overlaps + _LEAST_IOU).log()
            + FAR_COST * ~(inside & central)[near]
        )
        taken = take_cheapest(cost, overlaps, num_candidates=self.num_candidates)
        everything = nothing_positive(points)
        positive = everything.positive.index_put((near,), taken.any(dim=1))
        gt_index = everything.gt_index.index_put((near,), taken.long().argmax(dim=1))
        return Matches(gt_index=gt_index, positive=positive, negative=~positive)

    def _is_central(self, points: Tensor, strides: Tensor, boxes_xyxy: Tensor) -> Bool[Tensor, "t gt"]:
        distance = (points[:, None] - centres(boxes_xyxy)[None]).abs().amax(dim=-1)
        return distance < self.centre_radius * strides[:, None]


def class_cost(scores: Float[Tensor, "v k"], labels: Int[Tensor, " gt"]) -> Float[Tensor, "v gt"]:
    """Binary cross-entropy of all K scores if the box were of each ground truth's class, logarithms from -100 up."""
    right, wrong = scores.log().clamp(min=-100), (-scores).log1p().clamp(min=-100)
    return wrong[:, labels] - right[:, labels] - wrong.sum(dim=1, keepdim=True)


def take_cheapest(
    cost: Float[Tensor, "v gt"], overlaps: Float[Tensor, "v gt"], *, num_candidates: int
) -> Bool[Tensor, "v gt"]:
    """Which box takes which prediction, each prediction by one box at most.

    A box takes as many as the sum of its `num_candidates` largest overlaps, rounded down, and at least one: the
    cheapest. One that several take goes to the box for which it is cheapest of all.
    """
    most = min(num_candidates, len(cost))
    wanted = overlaps.topk(most, dim=0).values.sum(dim=0).long().clamp(min=1)
    cheapest = cost.topk(most, dim=0, largest=False).indices
    rank = torch.arange(most, device=cost.device)[:, None]
    taken = torch.zeros_like(cost, dtype=torch.bool).scatter_(0, cheapest, rank < wanted)
    contested = taken.sum(dim=1, keepdim=True) > 1
    best = torch.zeros_like(taken).scatter_(1, cost.argmin(dim=1, keepdim=True), True)
    return torch.where(contested, best, taken)
