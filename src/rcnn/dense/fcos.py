"""FCOS (Tian et al., 2019) as a dense head: a point per cell, and from it the distances to the four sides of a box.

Letters: N images, L levels, K classes (1 as a first stage), T points of a picture, P positives of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from rcnn.boxes.coding import DistanceCoder, centerness_of
from rcnn.dense.assignment import Assignment, assign
from rcnn.dense.class_loss import focal_class_loss
from rcnn.dense.interface import AbstractDenseHead, Candidates, DensePrediction
from rcnn.dense.selection import CandidateSelector, ScoreFusion, per_prior
from rcnn.dense.towers import MakeNorm, Scale, group_norm, prior_bias, start_small, two_towers
from rcnn.matching.centre import CentreMatcher
from rcnn.matching.iou import Matches
from rcnn.ops.losses import IoULossKind, iou_loss, mean_over_processes
from rcnn.priors import PointGenerator, priors_of
from rcnn.records import Levels, LevelShape, Losses, Target

# The tower that centerness is read from.
CenternessBranch = Literal["classes", "boxes"]
# How raw numbers become distances: "exp", their exponential in pixels (FCOS); "relu", their positive part in strides of
# the level (MMDetection's `norm_on_bbox`, torchvision).
DistanceUnit = Literal["exp", "relu"]
# What a positive's box loss weighs, and what the sum is divided by: the centerness that is wanted, and its sum
# (MMDetection); or 1, and the number of positives (torchvision).
BoxWeights = Literal["centerness", "equal"]
# MMDetection's least sum of the centerness that is wanted.
_LEAST_CENTERNESS = 1e-6


class FCOSTower(nn.Module):
    """Two towers of convolutions on one map: classes from the first, distances from the second, centerness from one.

    With `scaled` the distances of each level are multiplied by a number of its own.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        num_levels: int,
        channels: int,
        num_convs: int,
        make_norm: MakeNorm | None,
        conv_bias: bool | None,
        centerness_branch: CenternessBranch,
        scaled: bool,
    ) -> None:
        super().__init__()
        self.class_tower, self.box_tower = two_towers(
            in_channels=in_channels, channels=channels, num_convs=num_convs, make_norm=make_norm, conv_bias=conv_bias
        )
        width = self.class_tower.out_channels
        self.centerness_branch: CenternessBranch = centerness_branch
        self.classes = nn.Conv2d(width, num_classes, 3, padding=1)
        self.distances = nn.Conv2d(width, 4, 3, padding=1)
        self.centerness = nn.Conv2d(width, 1, 3, padding=1)
        self.scales = nn.ModuleList(Scale() if scaled else nn.Identity() for _ in range(num_levels))
        start_small(self.classes, bias=prior_bias())
        start_small(self.distances)
        start_small(self.centerness)

    def forward(self, x: Tensor, level: int) -> tuple[Tensor, Tensor, Tensor]:
        for_classes, for_boxes = self.class_tower(x), self.box_tower(x)
        centerness = self.centerness(for_classes if self.centerness_branch == "classes" else for_boxes)
        return self.classes(for_classes), self.scales[level](self.distances(for_boxes)), centerness


class FCOSHead(AbstractDenseHead):
    """Sigmoid classes with focal loss, distances with an IoU loss, and centerness; one point per cell.

    The defaults are MMDetection's FCOS with group norm (36.6 AP on COCO with a caffe-style ResNet-50, 12 epochs). Its
    improved version has `matcher=CentreMatcher(radius_strides=1.5)`, `centerness_branch="boxes"`, `distances="relu"`
    and `box_loss="giou"`. torchvision's has these and `box_weights="equal"`, `score_fusion="sqrt"`, `scaled=False`,
    `conv_bias=True` and points of `offset=0` and `stride_rule="image_over_grid"`.

    Classification and centerness losses are divided by the number of positives, averaged over the processes. Class
    scores are multiplied by centerness only after the best were chosen by class score (`score_fusion`). The raw
    distances of a prediction are those before `to_pixels`.
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
        conv_bias: bool | None = None,
        scaled: bool = True,
        centerness_branch: CenternessBranch = "classes",
        distances: DistanceUnit = "exp",
        points: PointGenerator | None = None,
        matcher: CentreMatcher | None = None,
        coder: DistanceCoder | None = None,
        box_loss: IoULossKind = "iou",
        box_weights: BoxWeights = "centerness",
        score_fusion: ScoreFusion = "rescore",
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.strides_px = tuple(strides_px)
        self.tower = FCOSTower(
            in_channels=in_channels,
            num_classes=num_classes,
            num_levels=len(strides_px),
            channels=channels,
            num_convs=num_convs,
            make_norm=make_norm,
            conv_bias=conv_bias,
            centerness_branch=centerness_branch,
            scaled=scaled,
        )
        self.distances: DistanceUnit = distances
        self.points = points or PointGenerator()
        self.matcher = matcher or CentreMatcher()
        self.coder = coder or DistanceCoder()
        self.box_loss: IoULossKind = box_loss
        self.box_weights: BoxWeights = box_weights
        self.selector = CandidateSelector(num_classes=num_classes, fusion=score_fusion)

    def forward(self, levels: Levels) -> DensePrediction:
        outputs = [self.tower(x, level) for level, x in enumerate(levels.maps)]
        classes, distances, centerness = zip(*outputs, strict=True)
        return DensePrediction(classes=classes, boxes=distances, quality=centerness, levels=levels)

    def make_points(self, prediction: DensePrediction) -> list[Float[Tensor, "_ 2"]]:
        """Points per level, at least in float32."""
        return priors_of(self.points, prediction.levels, like=prediction.boxes[0])

    def to_pixels(self, raw: Float[Tensor, "*shape"], stride_px: int | Tensor) -> Float[Tensor, "*shape"]:
        """Distances in pixels from the raw numbers of a level."""
        return raw.exp() if self.distances == "exp" else F.relu(raw) * stride_px

    def match(self, points: Sequence[Tensor], shapes: Sequence[LevelShape], target: Target) -> Matches:
        """Matches of all points of a picture."""
        return self.matcher(points, [shape.stride_px for shape in shapes], target)

    def loss(self, prediction: DensePrediction, targets: Sequence[Target]) -> Losses:
        points, shapes = self.make_points(prediction), prediction.levels.shapes
        wanted = assign([self.match(points, shapes, target) for target in targets], targets)
        chosen = torch.cat(points)[wanted.priors]
        dtype = chosen.dtype
        count = mean_over_processes(wanted.num_positive.sum().to(dtype)).clamp(min=1)
        centerness = centerness_of(chosen, wanted.boxes_xyxy.to(dtype))
        logits = per_prior(prediction.quality, 1).flatten()[wanted.positive].to(dtype)
        class_loss = focal_class_loss(prediction.classes, wanted, num_classes=self.num_classes, dtype=dtype).sum()
        return {
            "classification": class_loss / count,
            "box": self._box_loss(prediction, wanted, points, centerness, count),
            # Also where nothing is positive: a sum over no points is zero, and keeps the parameters in the graph.
            "centerness": F.binary_cross_entropy_with_logits(logits, centerness, reduction="sum") / count,
        }

    def _box_loss(
        self,
        prediction: DensePrediction,
        wanted: Assignment,
        points: Sequence[Tensor],
        centerness: Float[Tensor, " p"],
        count: Tensor,
    ) -> Tensor:
        shapes, dtype = prediction.levels.shapes, centerness.dtype
        strides = [some.new_full((len(some), 1), shape.stride_px) for some, shape in zip(points, shapes, strict=True)]
        raw = per_prior(prediction.boxes, 4).flatten(0, 1)[wanted.positive].to(dtype)
        distances = self.to_pixels(raw, torch.cat(strides)[wanted.priors])
        boxes = self.coder.decode(distances, torch.cat(list(points))[wanted.priors])
        losses = iou_loss(boxes, wanted.boxes_xyxy.to(dtype), kind=self.box_loss)
        if self.box_weights == "equal":
            return losses.sum() / count
        return (losses * centerness).sum() / mean_over_processes(centerness.sum()).clamp(min=_LEAST_CENTERNESS)

    def decode(self, prediction: DensePrediction, *, per_level: int | None, score_threshold: float) -> list[Candidates]:
        def decode_boxes(raw: Tensor, points: Tensor, stride_px: Tensor) -> Tensor:
            return self.coder.decode(self.to_pixels(raw, stride_px), points)

        return self.selector(
            prediction,
            self.make_points(prediction),
            decode_boxes,
            per_level=per_level,
            score_threshold=score_threshold,
        )
