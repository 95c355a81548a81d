"""Specs of the second stage: pooling, box head, classes, boxes, and one stage or a cascade of them."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from rcnn.config.spec import Spec
from rcnn.recipes.parts import (
    BalancedSamplerSpec,
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


class LevelMapSpec(Spec):
    canonical_size_px: PositiveFloat = 224.0
    canonical_level: NotNegative = 4
    epsilon: NotNegativeFloat = 1e-6
    epsilon_place: Literal["outside", "inside"] = "outside"
    count: Literal["by_stride", "by_position"] = "by_stride"
    """What canonical_level counts: powers of two of the stride, or the maps whatever their stride (MMDetection)."""


class RoIAlignSpec(Spec):
    type: Literal["roi_align"] = "roi_align"
    output_size: Positive = 7
    sampling_ratio: NotNegative = 2
    """Sampling points per bin and axis; 0: as many as the bin has pixels."""
    aligned: bool = False
    level_map: LevelMapSpec = LevelMapSpec()


class RoIPoolSpec(Spec):
    type: Literal["roi_pool"] = "roi_pool"
    output_size: Positive = 7
    level_map: LevelMapSpec = LevelMapSpec()


PoolingSpec = RoIAlignSpec | RoIPoolSpec


class TwoFCSpec(Spec):
    type: Literal["two_fc"] = "two_fc"
    features: Positive = 1024
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0


class ConvFCSpec(Spec):
    type: Literal["conv_fc"] = "conv_fc"
    num_convs: NotNegative = 4
    channels: Positive = 256
    features: Positive = 1024
    norm: Literal["none", "batch", "sync"] = "batch"


class VGGHeadSpec(Spec):
    """fc6 and fc7 of VGG16: 4096 features each, started from the ImageNet file where it has them."""

    type: Literal["vgg_fc"] = "vgg_fc"
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0


class Res5Spec(Spec):
    """The last stage of the ResNet on each region of C4, then the mean: started from the ImageNet file of the backbone.

    Its depth, style and norm are the backbone's.
    """

    type: Literal["res5"] = "res5"


BoxHeadSpec = TwoFCSpec | ConvFCSpec | VGGHeadSpec | Res5Spec


class SoftmaxSpec(Spec):
    """The classes and background in competition."""

    type: Literal["softmax"] = "softmax"


class SigmoidSpec(Spec):
    """Each class by itself; background is that none is there."""

    type: Literal["sigmoid"] = "sigmoid"
    loss: Literal["cross_entropy", "focal"] = "cross_entropy"
    initial_probability: Annotated[float, Gt(0), Lt(1)] = 0.01


class DecodedBoxLossSpec(Spec):
    """A loss on the boxes themselves instead of their deltas."""

    type: Literal["giou", "iou", "linear_iou"] = "giou"
    weight: PositiveFloat = 1.0
    """MMDetection's Faster R-CNN takes 10."""


class HardExampleSamplerSpec(Spec):
    """OHEM: the regions with the largest losses take the places of a balanced draw."""

    type: Literal["hard_example"] = "hard_example"
    total: Positive = 512
    positive_fraction: Share = 0.25


class SoftNMSSpec(Spec):
    """Scores of boxes that overlap a better one are lowered; no box is dropped for it."""

    decay: Literal["linear", "gaussian"] = "linear"
    sigma: PositiveFloat = 0.5
    min_score: Share = 1e-3


class RegionSpec(Spec):
    """What one stage and a cascade have in common."""

    pooling: PoolingSpec = RoIAlignSpec()
    box_head: BoxHeadSpec = TwoFCSpec()
    regression: Literal["per_class", "agnostic"] = "per_class"
    classification: SoftmaxSpec | SigmoidSpec = SoftmaxSpec()
    sampler: SamplerSpec | HardExampleSamplerSpec = BalancedSamplerSpec(total=512, positive_fraction=0.25)
    box_loss: SmoothL1Spec | L1Spec | DecodedBoxLossSpec = SmoothL1Spec()
    fusion: Literal["none", "product", "sqrt"] = "none"
    """How the proposal's score enters the final one."""
    score_threshold: Share = 0.05
    nms_iou: Share = 0.5
    soft_nms: SoftNMSSpec | None = None
    """null: NMS drops what overlaps a better one by more than nms_iou."""
    max_detections: Positive | None = 100
    """null: all that pass."""
    min_side_px: NotNegativeFloat = 1e-2
    clip: Literal["before_nms", "after_nms"] = "before_nms"
    """When boxes are cut to the picture (MindSpore: after)."""


class RoISpec(RegionSpec):
    type: Literal["single"] = "single"
    matcher: MatcherSpec = MatcherSpec(positive_iou=0.5, negative_iou=0.5)
    coder: DeltaCoderSpec = DeltaCoderSpec(weights=(10.0, 10.0, 5.0, 5.0))


class CascadeStepSpec(Spec):
    """One stage of a cascade."""

    matcher: MatcherSpec
    coder: DeltaCoderSpec
    loss_weight: NotNegativeFloat = 1.0
    sampler: SamplerSpec | HardExampleSamplerSpec | None = None
    """null: that of the cascade."""
    join_truth: bool = True
    """The ground truth joins the regions that are sampled from (MMDetection); detectron2: in the first stage alone."""


def _step(iou: float, scale: float, loss_weight: float) -> CascadeStepSpec:
    return CascadeStepSpec(
        matcher=MatcherSpec(positive_iou=iou, negative_iou=iou),
        coder=DeltaCoderSpec(weights=(10.0 * scale, 10.0 * scale, 5.0 * scale, 5.0 * scale)),
        loss_weight=loss_weight,
    )


class CascadeSpec(RegionSpec):
    """Cascade R-CNN: each stage starts from the boxes that the last one moved."""

    type: Literal["cascade"] = "cascade"
    regression: Literal["per_class", "agnostic"] = "agnostic"
    stages: tuple[CascadeStepSpec, ...] = (_step(0.5, 1.0, 1.0), _step(0.6, 2.0, 0.5), _step(0.7, 3.0, 0.25))
    average: Literal["probabilities", "logits"] = "probabilities"
    """What of the stages is averaged for the final score (MMDetection: logits)."""
    gradient_share: Annotated[float, Gt(0), Le(1)] = 1.0
    """What reaches the pyramid of each stage's gradient (detectron2: a third)."""
