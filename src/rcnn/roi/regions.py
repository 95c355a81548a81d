"""The regions that a second stage is trained on: labelled, then drawn from.

Letters: R regions of one picture, G ground-truth boxes, K classes (K is background).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rcnn.matching.iou import IoUMatcher, Matches
from rcnn.matching.sampling import Sample
from rcnn.records import Target


@dataclass(frozen=True, kw_only=True)
class SampledRegions:
    """The regions of one picture that a loss is taken over, with their truth. `labels` are K for background."""

    boxes_xyxy: Float[Tensor, "r 4"]
    labels: Int[Tensor, " r"]
    gt_boxes_xyxy: Float[Tensor, "r 4"]  # meaningful for foreground alone
    is_truth: Bool[Tensor, " r"]  # a ground-truth box that joined the proposals


@dataclass(frozen=True, kw_only=True)
class LabelledRegions:
    """All regions of one picture and what they were matched with, before any is drawn."""

    regions: SampledRegions
    matches: Matches

    def drawn(self, sample: Sample) -> SampledRegions:
        """Those of the sample in the order of the proposals, best first: a known order makes runs comparable."""
        chosen = torch.cat((sample.positive, sample.negative)).sort().values
        return SampledRegions(
            boxes_xyxy=self.regions.boxes_xyxy[chosen],
            labels=self.regions.labels[chosen],
            gt_boxes_xyxy=self.regions.gt_boxes_xyxy[chosen],
            is_truth=self.regions.is_truth[chosen],
        )


@torch.no_grad()
def label_regions(
    proposals_xyxy: Float[Tensor, "_ 4"], target: Target, *, matcher: IoUMatcher, num_classes: int, join_truth: bool
) -> LabelledRegions:
    """The proposals, and with `join_truth` after them the ground truth (Fast R-CNN's practice), each with its label."""
    gt_boxes = target.boxes_xyxy.to(proposals_xyxy.dtype)
    boxes = torch.cat((proposals_xyxy, gt_boxes)) if join_truth else proposals_xyxy
    matches = matcher(boxes, Target(boxes_xyxy=gt_boxes, labels=target.labels, ignore_xyxy=target.ignore_xyxy))
    positive = matches.positive.nonzero().flatten()
    labels = torch.full((len(boxes),), num_classes, dtype=torch.int64, device=boxes.device)
    labels[positive] = target.labels[matches.gt_index[positive]]
    truth = boxes.clone()
    truth[positive] = gt_boxes[matches.gt_index[positive]]
    is_truth = torch.arange(len(boxes), device=boxes.device) >= len(proposals_xyxy)
    return LabelledRegions(
        regions=SampledRegions(boxes_xyxy=boxes, labels=labels, gt_boxes_xyxy=truth, is_truth=is_truth),
        matches=matches,
    )
