"""Which ground-truth box a reference box (anchor, proposal) belongs to, by overlap.

Letters: G ground-truth boxes, A reference boxes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rcnn.boxes.geometry import iou, overlap_share
from rcnn.records import Target

# Whose a reference is that a box claims though it overlaps another more: that other's (torchvision, detectron2), or the
# claimer's, the last one's of several (MMDetection).
ClaimOwner = Literal["best", "claimer"]
# Whether a box ends at its coordinates, or a pixel beyond them (MindSpore's operator, and the first detection code).
Sides = Literal["continuous", "pixels"]


@dataclass(frozen=True, kw_only=True)
class Matches:
    """For each reference box whether it is positive or negative (neither: it takes no part) and its ground truth.

    `gt_index` means something only where `positive`.
    """

    gt_index: Int[Tensor, " a"]
    positive: Bool[Tensor, " a"]
    negative: Bool[Tensor, " a"]


def match_by_iou(
    overlaps: Float[Tensor, "gt a"],
    *,
    positive_iou: float,
    negative_iou: float,
    low_quality_iou: float | None,
    claim_owner: ClaimOwner = "best",
) -> Matches:
    """Positive from `positive_iou` up, negative below `negative_iou`, nothing between (Faster R-CNN, section 3.1.2).

    Each ground-truth box also claims the references that overlap it most, ties included, where that overlap is above 0
    and at least `low_quality_iou`; None: it does not. `claim_owner` says whose such a reference is.
    """
    num_gt, num_references = overlaps.shape
    if num_gt == 0:
        return Matches(
            gt_index=torch.zeros(num_references, dtype=torch.int64, device=overlaps.device),
            positive=torch.zeros(num_references, dtype=torch.bool, device=overlaps.device),
            negative=torch.ones(num_references, dtype=torch.bool, device=overlaps.device),
        )
    best_overlap, gt_index = overlaps.max(dim=0)
    positive = best_overlap >= positive_iou
    negative = best_overlap < negative_iou
    if low_quality_iou is not None and num_references:
        best_of_gt = overlaps.max(dim=1, keepdim=True).values
        claims = (overlaps == best_of_gt) & (best_of_gt > 0) & (best_of_gt >= low_quality_iou)
        claimed = claims.any(dim=0)
        if claim_owner == "claimer":
            claimer, reference = claims.nonzero(as_tuple=True)
            gt_index = gt_index.masked_fill(claimed, 0).scatter_reduce(0, reference, claimer, "amax")
        positive = positive | claimed
        negative = negative & ~claimed
    return Matches(gt_index=gt_index, positive=positive, negative=negative)


@dataclass(frozen=True, kw_only=True)
class IoUMatcher:
    """`match_by_iou` on boxes; a negative that lies in an ignore region by `ignore_share` of its area is left out."""

    positive_iou: float
    negative_iou: float
    low_quality_iou: float | None = None
    claim_owner: ClaimOwner = "best"
    ignore_share: float = 0.5
    sides: Sides = "continuous"

    def __call__(self, boxes_xyxy: Float[Tensor, "a 4"], target: Target) -> Matches:
        truth, references = target.boxes_xyxy, boxes_xyxy
        if self.sides == "pixels":
            last = references.new_tensor((0.0, 0.0, 1.0, 1.0))
            truth, references = truth + last, references + last
        matches = match_by_iou(
            iou(truth, references),
            positive_iou=self.positive_iou,
            negative_iou=self.negative_iou,
            low_quality_iou=self.low_quality_iou,
            claim_owner=self.claim_owner,
        )
        if len(target.ignore_xyxy) == 0:
            return matches
        ignored = (overlap_share(boxes_xyxy, target.ignore_xyxy) >= self.ignore_share).any(dim=1)
        return Matches(gt_index=matches.gt_index, positive=matches.positive, negative=matches.negative & ~ignored)
