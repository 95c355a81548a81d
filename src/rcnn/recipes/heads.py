"""Specs of the dense heads: each is a one-stage detector's head and a first stage, with its published choices."""

from __future__ import annotations

from typing import Literal

from rcnn.config.spec import Spec
from rcnn.recipes.parts import (
    AnchorSpec,
    BalancedSamplerSpec,
    BoxLossSpec,
    DeltaCoderSpec,
    L1Spec,
    MatcherSpec,
    NotNegative,
    NotNegativeFloat,
    Positive,
    PositiveFloat,
    SamplerSpec,
    Share,
    SmoothL1Spec,
)

# Cells of a picture's padding in its batch: no part of the training (MMDetection), or negatives (torchvision).
BeyondPicture = Literal["left_out", "negative"]
HeadNorm = Literal["group", "batch", "sync", "none"]


class RPNSpec(Spec):
    type: Literal["rpn"] = "rpn"
    num_convs: Positive = 1
    channels: Positive | None = None
    """Width of its convolutions; null: that of the pyramid."""
    anchors: AnchorSpec = AnchorSpec()
    matcher: MatcherSpec = MatcherSpec(low_quality_iou=0.0)
    sampler: SamplerSpec = BalancedSamplerSpec()
    coder: DeltaCoderSpec = DeltaCoderSpec()
    box_loss: BoxLossSpec = SmoothL1Spec()
    objectness: Literal["sigmoid", "softmax"] = "sigmoid"
    """softmax: an output for the object and one, the last, for background."""
    clip_to: Literal["picture", "inside_padding"] = "picture"
    """Where candidates end: at the picture's edge, or a pixel before that of the padded input (MindSpore)."""
    border_px: NotNegativeFloat | None = None
    """Anchors that reach further over the edge are not trained; null: all are."""
    border_ends: Literal["included", "excluded"] = "included"
    """Whether an anchor that ends exactly there is trained (MMDetection: not)."""
    beyond_picture: BeyondPicture = "negative"
    loss_count: Literal["sampled", "at_least_one_positive"] | Positive = "sampled"
    """By how many anchors of a picture the losses are divided: a number counts whatever was sampled (detectron2)."""


class GIoUSpec(Spec):
    """Of the boxes that deltas describe (torchvision's second RetinaNet)."""

    type: Literal["giou"] = "giou"
    eps: PositiveFloat = 1e-7
    """Added to the union and to the area of the enclosing box."""


class RetinaNetSpec(Spec):
    """Focal loss over anchors of three sizes and ratios per cell."""

    type: Literal["retinanet"] = "retinanet"
    num_convs: NotNegative = 4
    channels: Positive = 256
    norm: HeadNorm = "none"
    anchors: AnchorSpec | None = None
    """null: three sizes from 4 strides of the level up, three ratios."""
    matcher: MatcherSpec = MatcherSpec(positive_iou=0.5, negative_iou=0.4, low_quality_iou=0.0, claim_owner="claimer")
    coder: DeltaCoderSpec = DeltaCoderSpec(symmetric_clamp=True)
    box_loss: SmoothL1Spec | L1Spec | GIoUSpec = L1Spec()
    normalizer: Literal["batch", "picture", "moving"] = "batch"
    """What divides the losses: the batch's positives, each picture's (torchvision), a moving mean (detectron2)."""
    beyond_picture: BeyondPicture = "left_out"
    clips_candidates: bool = True
    """false: boxes are cut to the picture after NMS (detectron2), not before."""


class PointSpec(Spec):
    offset: NotNegativeFloat = 0.5
    """Where in its cell a point lies, in strides."""
    stride_rule: Literal["nominal", "image_over_grid"] = "nominal"


class CentreMatcherSpec(Spec):
    radius_strides: PositiveFloat | None = None
    """How far from a box's centre its points may lie; null: anywhere in the box."""
    range_strides: PositiveFloat = 8.0
    """A level ends at boxes whose farthest side is so many of its strides away."""
    range_ends: Literal["included", "excluded"] = "included"


class FCOSSpec(Spec):
    """Classes, distances to four sides and centerness for each cell; no anchors."""

    type: Literal["fcos"] = "fcos"
    num_convs: NotNegative = 4
    channels: Positive = 256
    norm: HeadNorm = "group"
    conv_bias: bool | None = None
    """null: where there is no norm."""
    scaled: bool = True
    """A learnt factor of the distances for each level."""
    centerness_branch: Literal["classes", "boxes"] = "classes"
    distances: Literal["exp", "relu"] = "exp"
    """exp: pixels; relu: strides of the level (norm-on-bbox)."""
    points: PointSpec = PointSpec()
    matcher: CentreMatcherSpec = CentreMatcherSpec()
    box_loss: Literal["iou", "linear_iou", "giou"] = "iou"
    box_weights: Literal["centerness", "equal"] = "centerness"
    score_fusion: Literal["rescore", "product", "sqrt"] = "rescore"
    """How centerness enters the score: after the best were chosen by class (MMDetection), or before."""


class ATSSMatcherSpec(Spec):
    candidates_per_level: Positive = 9
    ignore_share: Share | None = None
    """Anchors that lie in an ignore region by this share are left out; null: those whose centre lies in one."""


class ATSSSpec(Spec):
    """One square anchor per cell; positives by a threshold that each box sets itself."""

    type: Literal["atss"] = "atss"
    num_convs: NotNegative = 4
    channels: Positive = 256
    norm: HeadNorm = "group"
    anchor_scale: PositiveFloat = 8.0
    """Side of an anchor, in strides."""
    matcher: ATSSMatcherSpec = ATSSMatcherSpec()
    coder: DeltaCoderSpec = DeltaCoderSpec(weights=(10.0, 10.0, 5.0, 5.0), symmetric_clamp=True)
    box_weight: NotNegativeFloat = 2.0


class GFLSpec(Spec):
    """Quality and distribution focal losses: the class score is the expected IoU, each side a distribution."""

    type: Literal["gfl"] = "gfl"
    num_convs: NotNegative = 4
    channels: Positive = 256
    norm: HeadNorm = "group"
    max_distance: Positive = 16
    """The largest distance of a side, in strides."""
    anchor_scale: PositiveFloat = 8.0
    matcher: ATSSMatcherSpec = ATSSMatcherSpec()
    box_weight: NotNegativeFloat = 2.0
    distribution_weight: NotNegativeFloat = 0.25


class TaskAlignedMatcherSpec(Spec):
    candidates: Positive = 13
    score_power: PositiveFloat = 1.0
    iou_power: PositiveFloat = 6.0


class TOODSpec(Spec):
    """Task-aligned one-stage detection: classes and boxes from shared maps, aligned with each other."""

    type: Literal["tood"] = "tood"
    num_convs: Positive = 6
    channels: Positive = 256
    norm: HeadNorm = "group"
    anchor_scale: PositiveFloat = 8.0
    matcher: TaskAlignedMatcherSpec = TaskAlignedMatcherSpec()
    initial_matcher: ATSSMatcherSpec = ATSSMatcherSpec()
    initial_batches: NotNegative = 0
    """The first batches are matched as in ATSS (the paper: those of 4 epochs)."""
    box_weight: NotNegativeFloat = 2.0


class HeatMapMatcherSpec(Spec):
    low_strides: NotNegativeFloat = 4.0
    """A level learns boxes with half a diagonal from here to `high_strides`, in its strides."""
    high_strides: PositiveFloat = 10.0
    min_overlap: Share = 0.8
    min_radius_px: NotNegativeFloat = 4.0


class CenterNetSpec(Spec):
    """CenterNet2's head: a heat map and distances; class-agnostic in its published role as a first stage."""

    type: Literal["centernet"] = "centernet"
    num_convs: NotNegative = 4
    channels: Positive | None = None
    """Width of its convolutions; null: that of the pyramid."""
    norm: HeadNorm = "group"
    heat_tower: Literal["shared", "own"] | None = None
    """null: shared with the boxes for one class, its own for several."""
    score: Literal["heat", "root"] | None = None
    """null: the root of the heat for one class, the heat for several."""
    matcher: HeatMapMatcherSpec = HeatMapMatcherSpec()
    alpha: Share = 0.25
    beta: NotNegativeFloat = 4.0
    gamma: NotNegativeFloat = 2.0
    ignore_above: Share | None = 0.85
    """Cells that score more without a box are not trained; null: they are."""
    peak_weight: NotNegativeFloat = 0.5
    off_peak_weight: NotNegativeFloat = 0.5
    box_weight: NotNegativeFloat = 1.0
    box_weights: Literal["equal", "heat"] = "equal"


class SimOTAMatcherSpec(Spec):
    centre_radius: PositiveFloat = 2.5
    """In strides."""
    num_candidates: Positive = 10
    iou_weight: NotNegativeFloat = 3.0
    class_weight: NotNegativeFloat = 1.0


class YOLOXSpec(Spec):
    """YOLOX's decoupled head, its own on each level, matched by SimOTA."""

    type: Literal["yolox"] = "yolox"
    num_convs: NotNegative = 2
    channels: Positive | None = None
    """Width of its convolutions; null: that of the pyramid."""
    norm: Literal["group", "batch", "sync"] = "batch"
    matcher: SimOTAMatcherSpec = SimOTAMatcherSpec()
    box_weight: NotNegativeFloat = 5.0
    l1_weight: NotNegativeFloat = 0.0
    """Of the raw boxes' L1 loss, which YOLOX adds (1.0) in its last 15 epochs."""


DenseHeadSpec = RPNSpec | RetinaNetSpec | FCOSSpec | ATSSSpec | GFLSpec | TOODSpec | CenterNetSpec | YOLOXSpec
