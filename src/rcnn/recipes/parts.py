"""Small specs that several nodes of a recipe share: anchors, matchers, samplers, coders, losses, and their numbers."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, MinLen

from rcnn.config.spec import Spec

Positive = Annotated[int, Ge(1)]
NotNegative = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Gt(0)]
NotNegativeFloat = Annotated[float, Ge(0)]
Share = Annotated[float, Ge(0), Le(1)]
Stages = Annotated[int, Ge(0), Le(5)]
Triple = tuple[float, float, float]
Quadruple = tuple[float, float, float, float]


class AnchorSpec(Spec):
    sizes_px: Annotated[tuple[tuple[float, ...], ...], MinLen(1)] = ((32.0,), (64.0,), (128.0,), (256.0,), (512.0,))
    """Sizes for each level; a single entry serves every level."""
    heights_over_widths: Annotated[tuple[float, ...], MinLen(1)] = (0.5, 1.0, 2.0)
    rounded: bool = False
    """Corners moved to whole pixels, as torchvision has them."""
    centre_offset: float = 0.0
    """Where in its cell an anchor is centred, in strides."""
    stride_rule: Literal["nominal", "image_over_grid"] = "nominal"


class MatcherSpec(Spec):
    positive_iou: Share = 0.7
    negative_iou: Share = 0.3
    low_quality_iou: Share | None = None
    """Each box claims its best references from this IoU up; null: it does not."""
    claim_owner: Literal["best", "claimer"] = "best"
    """Whose a claimed reference is that overlaps another box more: that one's, or the claimer's (MMDetection)."""
    ignore_share: Share = 0.5
    """Negatives that lie in an ignore region by this share are left out."""
    sides: Literal["continuous", "pixels"] = "continuous"
    """Whether a box ends at its coordinates, or a pixel beyond them (MindSpore)."""


class BalancedSamplerSpec(Spec):
    type: Literal["balanced"] = "balanced"
    total: Positive = 256
    positive_fraction: Share = 0.5
    negatives: Literal["fill", "share"] = "fill"
    """How many: what positives leave free, or never more than their own share (MindSpore)."""


class EverySamplerSpec(Spec):
    type: Literal["every"] = "every"


SamplerSpec = BalancedSamplerSpec | EverySamplerSpec


class DeltaCoderSpec(Spec):
    weights: Quadruple = (1.0, 1.0, 1.0, 1.0)
    max_log_ratio: PositiveFloat | None = 4.135166556742356
    symmetric_clamp: bool = False


class SmoothL1Spec(Spec):
    type: Literal["smooth_l1"] = "smooth_l1"
    beta: PositiveFloat = 1 / 9
    """Where the parabola ends; 1 / sigma^2 of the paper's code."""


class L1Spec(Spec):
    type: Literal["l1"] = "l1"


BoxLossSpec = SmoothL1Spec | L1Spec
