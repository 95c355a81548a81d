"""Generalized focal loss (Li et al., 2020) as a dense head: class scores that say how good the box is, and box sides
as distributions.

Letters: N images, K classes (1 as a first stage), B bins of a side, P positives of the batch, S selected candidates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rcnn.boxes.coding import DistanceCoder
from rcnn.boxes.geometry import centres, paired_iou
from rcnn.dense.assignment import Assignment, assign
from rcnn.dense.atss import match_batch, square_anchors
from rcnn.dense.interface import AbstractDenseHead, Candidates, DensePrediction
from rcnn.dense.selection import CandidateSelector, per_prior
from rcnn.dense.towers import MakeNorm, Scale, group_norm, prior_bias, start_small, two_towers
from rcnn.matching.atss import ATSSMatcher
from rcnn.ops.losses import distribution_focal_loss, iou_loss, mean_over_processes, quality_focal_loss
from rcnn.priors import priors_of
from rcnn.records import Levels, Losses, Target

# A wanted distance stays this far below the last bin, so that it has a bin on either side (MMDetection).
LAST_BIN_MARGIN = 0.1


class GFLTower(nn.Module):
    """Two towers of convolutions on one map: class logits from the first, the bins of four sides from the second."""

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        num_bins: int,
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
        self.sides = nn.Conv2d(width, 4 * num_bins, 3, padding=1)
        self.scales = nn.ModuleList(Scale() for _ in range(num_levels))
        start_small(self.classes, bias=prior_bias())
        start_small(self.sides)

    def forward(self, x: Tensor, level: int) -> tuple[Tensor, Tensor]:
        return self.classes(self.class_tower(x)), self.scales[level](self.sides(self.box_tower(x)))


class GFLHead(AbstractDenseHead):
    """Quality focal loss on classes, GIoU and distribution focal loss on sides; as MMDetection's `GFLHead`.

    `boxes[l]` of its prediction is [N, 4 * B, H_l, W_l]: for the left, top, right and bottom side logits over distances
    of 0 to `max_distance` strides from the cell's top left corner, B = `max_distance` + 1; the mean is the distance.
    What each bin stands for is the buffer `bin_distances`, because MMDetection's checkpoints hold it too.
    A positive's class is wanted to be the IoU of its box. The losses of its box are weighted with its best class score
    and divided by the sum of these weights, the classification loss by the number of positives (a picture without any
    counts as one), averaged over the processes. Matching is that of `ATSSHead`, as are `anchor_scale` and
    `size_divisor_px`.
    """

    bin_distances: Tensor

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        strides_px: Sequence[int],
        channels: int = 256,
        num_convs: int = 4,
        make_norm: MakeNorm | None = group_norm,
        max_distance: int = 16,
        anchor_scale: float = 8.0,
        matcher: ATSSMatcher | None = None,
        coder: DistanceCoder | None = None,
        box_weight: float = 2.0,
        distribution_weight: float = 0.25,
        size_divisor_px: int = 32,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.strides_px = tuple(strides_px)
        self.max_distance = max_distance
        self.num_bins = max_distance + 1
        self.tower = GFLTower(
            in_channels=in_channels,
            num_classes=num_classes,
            num_bins=self.num_bins,
            num_levels=len(strides_px),
            channels=channels,
            num_convs=num_convs,
            make_norm=make_norm,
        )
        self.anchors = square_anchors(strides_px, anchor_scale)
        self.matcher = matcher or ATSSMatcher()
        self.coder = coder or DistanceCoder()
        self.box_weight = box_weight
        self.distribution_weight = distribution_weight
        self.size_divisor_px = size_divisor_px
        self.selector = CandidateSelector(num_classes=num_classes, box_width=4 * self.num_bins)
        self.register_buffer("bin_distances", torch.arange(self.num_bins, dtype=torch.get_default_dtype()))

    def forward(self, levels: Levels) -> DensePrediction:
        outputs = [self.tower(x, level) for level, x in enumerate(levels.maps)]
        classes, sides = zip(*outputs, strict=True)
        return DensePrediction(classes=classes, boxes=sides, levels=levels)

    def loss(self, prediction: DensePrediction, targets: Sequence[Target]) -> Losses:
        anchors = priors_of(self.anchors, prediction.levels, like=prediction.boxes[0])
        wanted = assign(match_batch(self.matcher, anchors, prediction.levels, targets, self.size_divisor_px), targets)
        dtype = anchors[0].dtype
        logits = per_prior(prediction.classes, self.num_classes).flatten(0, 1).to(dtype)
        bins = per_prior(prediction.boxes, 4 * self.num_bins).flatten(0, 1)[wanted.positive].to(dtype)
        points, strides = self._references(anchors, prediction, wanted)
        truth = wanted.boxes_xyxy.to(dtype)
        boxes = self.coder.decode(self.distances(bins) * strides[:, None], points)
        weights = logits[wanted.positive].detach().sigmoid().amax(dim=1)
        total = mean_over_processes(weights.sum()).clamp(min=1)
        wanted_bins = (self.coder.encode(truth, points) / strides[:, None]).clamp(
            0, self.max_distance - LAST_BIN_MARGIN
        )
        sides = (
            distribution_focal_loss(bins.reshape(-1, self.num_bins), wanted_bins.flatten()).reshape(-1, 4).mean(dim=1)
        )
        return {
            "classification": self._class_loss(logits, wanted, paired_iou(boxes.detach(), truth, eps=1e-6)),
            "box": self.box_weight * (iou_loss(boxes, truth, kind="giou") * weights).sum() / total,
            "distribution": self.distribution_weight * (sides * weights).sum() / total,
        }

    def _references(
        self, anchors: Sequence[Tensor], prediction: DensePrediction, wanted: Assignment
    ) -> tuple[Float[Tensor, "p 2"], Float[Tensor, " p"]]:
        """The point and the stride of each positive."""
        shapes = prediction.levels.shapes
        strides = [some.new_full((len(some),), shape.stride_px) for some, shape in zip(anchors, shapes, strict=True)]
        return centres(torch.cat(list(anchors))[wanted.priors]), torch.cat(strides)[wanted.priors]

    def _class_loss(self, logits: Tensor, wanted: Assignment, overlaps: Float[Tensor, " p"]) -> Tensor:
        count = mean_over_processes(wanted.num_positive.clamp(min=1).sum().to(logits.dtype))
        losses = quality_focal_loss(logits, wanted.class_targets(overlaps, self.num_classes))
        return (losses * wanted.counted[:, None]).sum() / count

    def distances(self, bins: Float[Tensor, "s 4*b"]) -> Float[Tensor, "s 4"]:
        """The mean of each side's distribution, in strides."""
        shares = bins.reshape(-1, 4, self.num_bins).softmax(dim=-1)
        # Not a matrix product, which mixed precision would round to a whole stride.
        return (shares * self.bin_distances).sum(dim=-1)

    def decode(self, prediction: DensePrediction, *, per_level: int | None, score_threshold: float) -> list[Candidates]:
        def decode_boxes(bins: Tensor, anchors: Tensor, stride_px: Tensor) -> Tensor:
            return self.coder.decode(self.distances(bins) * stride_px, centres(anchors))

        return self.selector(
            prediction,
            priors_of(self.anchors, prediction.levels, like=prediction.boxes[0]),
            decode_boxes,
            per_level=per_level,
            score_threshold=score_threshold,
        )
