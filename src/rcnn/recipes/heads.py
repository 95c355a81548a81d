"""Specs of the dense heads: each is a one-stage detector's head and a first stage, with its published choices."""

from __future__ import annotations

from typing import Literal

from rcnn.config.spec import Spec
from rcnn.recipes.parts import (
    AnchorSpec,
    BalancedSamplerSpec,
    BoxLossSpec,
    DeltaCoderSpec,
    MatcherSpec,
    NotNegativeFloat,
    Positive,
    SamplerSpec,
    SmoothL1Spec,
)


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
    border_px: NotNegativeFloat | None = None
    """Anchors that reach further over the edge are not trained; null: all are."""


DenseHeadSpec = RPNSpec
