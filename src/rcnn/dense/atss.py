"""ATSS (Zhang et al., 2020) as a dense head: one square anchor per cell, matched by adaptive sample selection.

Letters: N images, K classes (1 as a first stage), T anchors of a picture over all levels, P positives of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rcnn.boxes.coding import DeltaCoder, centerness_of
from rcnn.boxes.geometry import centres
from rcnn.dense.assignment import Assignment, assign, cells_of_picture, scatter_matches
from rcnn.dense.class_loss import focal_class_loss
from rcnn.dense.interface import AbstractDenseHead, Candidates, DensePrediction
from rcnn.dense.selection import CandidateSelector, per_prior
from rcnn.dense.towers import MakeNorm, Scale, group_norm, prior_bias, start_small, two_towers
from rcnn.matching.atss import ATSSMatcher
from rcnn.matching.iou import Matches
from rcnn.ops.losses import iou_loss, mean_over_processes
from rcnn.priors import AnchorGenerator, priors_of
from rcnn.records import Levels, Losses, Target


class ATSSTower(nn.Module):
    """Two towers of convolutions on one map; classes from the first, deltas and centerness from the second."""

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        num_levels: int,
        channels: int,
        num_convs: int,
        make_norm: MakeNorm | None,
    ) -> None:
        super().__init__()
        self.class_tower, self.box_tower = two_towers(
            in_channels=in_channels, channels=channels, num_convs=num_convs, make_norm=make_norm
        )
        width = self.class_tower.out_channels
        self.classes = nn.Conv2d(width, num_classes, 3, padding=1)
        self.deltas = nn.Conv2d(width, 4, 3, padding=1)
        self.centerness = nn.Conv2d(width, 1, 3, padding=1)
        self.scales = nn.ModuleList(Scale() for _ in range(num_levels))
        start_small(self.classes, bias=prior_bias())
        start_small(self.deltas)
        start_small(self.centerness)

    def forward(self, x: Tensor, level: int) -> tuple[Tensor, Tensor, Tensor]:
        for_classes, for_boxes = self.class_tower(x), self.box_tower(x)
        deltas = self.scales[level](self.deltas(for_boxes))
        return self.classes(for_classes), deltas, self.centerness(for_boxes)


class ATSSHead(AbstractDenseHead):
    """Sigmoid classes with focal loss, deltas with GIoU loss, and centerness; as MMDetection's `ATSSHead`.

    The box loss is weighted with the centerness that is wanted and divided by its sum, the other two by the number of
    positives (a picture without any counts as one), averaged over the processes. Candidates are ranked by class score,
    which is then multiplied with the centerness. An anchor is `anchor_scale` strides wide, around its cell's top left
    corner. In a batch a picture's anchors beyond its size rounded up to `size_divisor_px` take no part.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        strides_px: Sequence[int],
        channels: int = 256,
        num_convs: int = 4,
        make_norm: MakeNorm | None = group_norm,
        anchor_scale: float = 8.0,
        matcher: ATSSMatcher | None = None,
        coder: DeltaCoder | None = None,
        box_weight: float = 2.0,
        size_divisor_px: int = 32,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.strides_px = tuple(strides_px)
        self.tower = ATSSTower(
            in_channels=in_channels,
            num_classes=num_classes,
            num_levels=len(strides_px),
            channels=channels,
            num_convs=num_convs,
            make_norm=make_norm,
        )
        self.anchors = square_anchors(strides_px, anchor_scale)
        self.matcher = matcher or ATSSMatcher()
        self.coder = coder or DeltaCoder(weights=(10.0, 10.0, 5.0, 5.0), symmetric_clamp=True)
        self.box_weight = box_weight
        self.size_divisor_px = size_divisor_px
        self.selector = CandidateSelector(num_classes=num_classes, fusion="rescore")

    def forward(self, levels: Levels) -> DensePrediction:
        outputs = [self.tower(x, level) for level, x in enumerate(levels.maps)]
        classes, deltas, centerness = zip(*outputs, strict=True)
        return DensePrediction(classes=classes, boxes=deltas, quality=centerness, levels=levels)

    def loss(self, prediction: DensePrediction, targets: Sequence[Target]) -> Losses:
        anchors = priors_of(self.anchors, prediction.levels, like=prediction.boxes[0])
        wanted = assign(match_batch(self.matcher, anchors, prediction.levels, targets, self.size_divisor_px), targets)
        references = torch.cat(anchors)[wanted.priors]
        dtype = references.dtype
        count = mean_over_processes(wanted.num_positive.clamp(min=1).sum().to(dtype))
        centerness = centerness_of(centres(references), wanted.boxes_xyxy.to(dtype))
        class_loss = focal_class_loss(prediction.classes, wanted, num_classes=self.num_classes, dtype=dtype).sum()
        return {
            "classification": class_loss / count,
            "box": self._box_loss(prediction, wanted, references, centerness),
            "centerness": self._centerness_loss(prediction, wanted, centerness) / count,
        }

    def _box_loss(
        self, prediction: DensePrediction, wanted: Assignment, references: Tensor, centerness: Tensor
    ) -> Tensor:
        deltas = per_prior(prediction.boxes, 4).flatten(0, 1)[wanted.positive].to(references.dtype)
        losses = iou_loss(self.coder.decode(deltas, references), wanted.boxes_xyxy.to(references.dtype), kind="giou")
        weight = mean_over_processes(centerness.sum()).clamp(min=1)
        return self.box_weight * (losses * centerness).sum() / weight

    def _centerness_loss(self, prediction: DensePrediction, wanted: Assignment, centerness: Tensor) -> Tensor:
        logits = per_prior(prediction.quality, 1).flatten()[wanted.positive].to(centerness.dtype)
        return F.binary_cross_entropy_with_logits(logits, centerness, reduction="sum")

    def decode(self, prediction: DensePrediction, *, per_level: int | None, score_threshold: float) -> list[Candidates]:
        return self.selector(
            prediction,
            priors_of(self.anchors, prediction.levels, like=prediction.boxes[0]),
            lambda deltas, anchors, _: self.coder.decode(deltas, anchors),
            per_level=per_level,
            score_threshold=score_threshold,
        )


def square_anchors(strides_px: Sequence[int], scale: float) -> AnchorGenerator:
    """One anchor per cell, `scale` strides wide and high."""
    return AnchorGenerator(sizes_px=tuple((stride * scale,) for stride in strides_px), heights_over_widths=(1.0,))


def match_batch(
    matcher: ATSSMatcher,
    anchors: Sequence[Tensor],
    levels: Levels,
    targets: Sequence[Target],
    size_divisor_px: int,
) -> list[Matches]:
    """Matches of each picture, of its own cells alone."""
    found = []
    for size, target in zip(levels.image_sizes, targets, strict=True):
        own = cells_of_picture(levels.shapes, size, divisor_px=size_divisor_px, device=anchors[0].device)
        matches = matcher([some[mine] for some, mine in zip(anchors, own, strict=True)], target)
        found.append(scatter_matches(matches, torch.cat(own)))
    return found
