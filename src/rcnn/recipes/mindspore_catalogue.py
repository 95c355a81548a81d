"""MindSpore RCNN's recipe, with the conventions that its checkpoints were trained with."""

from __future__ import annotations

from rcnn.recipes.heads import RPNSpec
from rcnn.recipes.parts import BalancedSamplerSpec, DeltaCoderSpec, MatcherSpec, SmoothL1Spec
from rcnn.recipes.recipe import (
    DataSpec,
    FPNSpec,
    ImageSpec,
    MultiStepSpec,
    ProposalCountSpec,
    ProposalsSpec,
    Recipe,
    ResNetSpec,
    SGDSpec,
    TrainSpec,
    TwoStageSpec,
    WarmUpSpec,
)
from rcnn.recipes.regions import LevelMapSpec, RoIAlignSpec, RoISpec

MAX_LOG_RATIO = 4.0


def faster_rcnn_resnet50_fpn_mindspore() -> Recipe:
    """MindSpore RCNN's faster_rcnn_resnet50_fpn_1x: a canvas of 768x1280, bilinear FPN, a second NMS across levels."""
    return Recipe(
        expected="COCO val2017 box AP 37.0",
        source="MindSpore RCNN's README (faster_rcnn_resnet50_fpn_1x, 8 devices)",
        detector=TwoStageSpec(
            image=ImageSpec(canvas=(768, 1280), rounding="round", kernel="area_uint8", padding="black"),
            backbone=ResNetSpec(depth=50, norm="batch", stem_pool="far_end"),
            neck=FPNSpec(upsampling="bilinear"),
            proposals=ProposalsSpec(
                head=RPNSpec(
                    matcher=MatcherSpec(low_quality_iou=0.0, sides="pixels"),
                    coder=DeltaCoderSpec(max_log_ratio=MAX_LOG_RATIO),
                    sampler=BalancedSamplerSpec(negatives="share"),
                    box_loss=SmoothL1Spec(beta=1.0),
                    clip_to="inside_padding",
                ),
                train=ProposalCountSpec(pre_nms=2000, post_nms=1000),
                # Its test generator reads the numbers of training.
                test=ProposalCountSpec(pre_nms=2000, post_nms=1000),
                scope="level_then_joint",
                min_side_px=1.0,
                side_test="before_pre_nms",
            ),
            roi=RoISpec(
                pooling=RoIAlignSpec(
                    sampling_ratio=2,
                    aligned=False,
                    # Two that it adds: 1e-6 to the ratio, and 1e-4 within its logarithm.
                    level_map=LevelMapSpec(
                        canonical_size_px=56.0,
                        canonical_level=0,
                        epsilon=1.01e-4,
                        epsilon_place="inside",
                        count="by_position",
                    ),
                ),
                matcher=MatcherSpec(positive_iou=0.5, negative_iou=0.5, sides="pixels"),
                coder=DeltaCoderSpec(weights=(10.0, 10.0, 5.0, 5.0), max_log_ratio=MAX_LOG_RATIO),
                sampler=BalancedSamplerSpec(total=512, positive_fraction=0.25, negatives="share"),
                box_loss=SmoothL1Spec(beta=1.0),
                # Its limit of 100 is read, but not applied.
                max_detections=None,
                min_side_px=0.0,
                clip="after_nms",
            ),
        ),
        data=DataSpec(aspect_ratio_groups=0),
        train=TrainSpec(
            epochs=12,
            optimizer=SGDSpec(lr=0.02, weight_decay=5e-5, norm_weight_decay=0.0, bias_weight_decay=0.0),
            schedule=MultiStepSpec(milestones=(8 / 12, 11 / 12)),
            warm_up=WarmUpSpec(steps=500, factor=1.0),
        ),
    )
