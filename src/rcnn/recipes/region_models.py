"""From specs to the second stage: pooling, box heads, what follows them, and cascades."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import nn

from rcnn.backbones.norm import NormKind, norm_factory
from rcnn.boxes.filtering import DetectionFilter, SoftNMS
from rcnn.boxes.loss import BoxLoss
from rcnn.errors import Problem, SetupError
from rcnn.matching.sampling import BalancedSampler, EverySampler, HardExampleSampler
from rcnn.necks.interface import AbstractNeck
from rcnn.ops.losses import sigmoid_focal_loss
from rcnn.recipes.head_models import build_box_loss, build_coder, build_matcher, build_sampler
from rcnn.recipes.parts import BoxLossSpec, SamplerSpec
from rcnn.recipes.recipe import BackboneSpec, ResNetSpec
from rcnn.recipes.regions import (
    CascadeSpec,
    CascadeStepSpec,
    ConvFCSpec,
    DecodedBoxLossSpec,
    HardExampleSamplerSpec,
    PoolingSpec,
    RegionSpec,
    Res5Spec,
    RoIAlignSpec,
    RoISpec,
    SigmoidSpec,
    SoftmaxSpec,
    SoftNMSSpec,
    TwoFCSpec,
    VGGHeadSpec,
)
from rcnn.roi.box_head import BoxPredictor, ConvFCHead, TwoFCHead
from rcnn.roi.box_loss import DecodedBoxLoss
from rcnn.roi.cascade import CascadeStage
from rcnn.roi.classification import Classification, SigmoidClassification, SoftmaxClassification
from rcnn.roi.interface import AbstractRoIStage
from rcnn.roi.pooling import LevelMap, RoIPooling, align, quantised
from rcnn.roi.res5_head import Res5Head
from rcnn.roi.stage import RoIStage

VGG_FEATURES = 4096


def optional_norm(kind: NormKind | Literal["none"]) -> Callable[[int], nn.Module] | None:
    return None if kind == "none" else norm_factory(kind, 1e-5)


def build_roi(
    spec: RoISpec | CascadeSpec, neck: AbstractNeck, num_classes: int, backbone: BackboneSpec
) -> AbstractRoIStage:
    """The second stage on the maps of `neck`. `backbone`: whose last stage a box head may be."""
    if isinstance(spec, RoISpec):
        return _build_stage(spec, spec, neck, num_classes, backbone)
    return CascadeStage(
        stages=[_build_stage(spec, step, neck, num_classes, backbone) for step in spec.stages],
        loss_weights=[step.loss_weight for step in spec.stages],
        average=spec.average,
        gradient_share=spec.gradient_share,
    )


def _build_stage(
    spec: RegionSpec,
    step: RoISpec | CascadeStepSpec,
    neck: AbstractNeck,
    num_classes: int,
    backbone: BackboneSpec,
) -> RoIStage:
    if isinstance(spec.box_head, Res5Spec):
        box_head = build_res5_head(backbone, neck)
    else:
        box_head = build_box_head(spec.box_head, neck.channels, spec.pooling.output_size)
    classification = build_classification(spec.classification)
    return RoIStage(
        pooling=build_pooling(spec.pooling),
        box_head=box_head,
        predictor=BoxPredictor(
            in_features=box_head.out_features,
            num_classes=num_classes,
            regression=spec.regression,
            classification=classification,
        ),
        num_classes=num_classes,
        coder=build_coder(step.coder),
        matcher=build_matcher(step.matcher),
        sampler=build_region_sampler(step.sampler or spec.sampler),
        classification=classification,
        box_loss=build_region_box_loss(spec.box_loss),
        detection_filter=DetectionFilter(
            score_threshold=spec.score_threshold,
            nms_iou=spec.nms_iou,
            soft_nms=build_soft_nms(spec.soft_nms),
            max_detections=spec.max_detections,
            min_side_px=spec.min_side_px,
        ),
        fusion=spec.fusion,
        clip_order=spec.clip,
        join_truth=step.join_truth if isinstance(step, CascadeStepSpec) else True,
    )


def build_soft_nms(spec: SoftNMSSpec | None) -> SoftNMS | None:
    return None if spec is None else SoftNMS(decay=spec.decay, sigma=spec.sigma, min_score=spec.min_score)


def build_classification(spec: SoftmaxSpec | SigmoidSpec) -> Classification:
    if isinstance(spec, SoftmaxSpec):
        return SoftmaxClassification()
    if spec.loss == "focal":
        return SigmoidClassification(element_loss=sigmoid_focal_loss, initial_probability=spec.initial_probability)
    return SigmoidClassification(initial_probability=spec.initial_probability)


def build_region_sampler(
    spec: SamplerSpec | HardExampleSamplerSpec,
) -> BalancedSampler | EverySampler | HardExampleSampler:
    if isinstance(spec, HardExampleSamplerSpec):
        return HardExampleSampler(total=spec.total, positive_fraction=spec.positive_fraction)
    return build_sampler(spec)


def build_region_box_loss(spec: BoxLossSpec | DecodedBoxLossSpec) -> BoxLoss:
    if isinstance(spec, DecodedBoxLossSpec):
        return DecodedBoxLoss(kind=spec.type, weight=spec.weight)
    return build_box_loss(spec)


def build_pooling(spec: PoolingSpec) -> RoIPooling:
    pool = (
        align(sampling_ratio=spec.sampling_ratio, aligned=spec.aligned)
        if isinstance(spec, RoIAlignSpec)
        else quantised()
    )
    level_map = LevelMap(
        canonical_size_px=spec.level_map.canonical_size_px,
        canonical_level=spec.level_map.canonical_level,
        epsilon=spec.level_map.epsilon,
        epsilon_place=spec.level_map.epsilon_place,
        count=spec.level_map.count,
    )
    return RoIPooling(output_size=spec.output_size, pool=pool, level_map=level_map)


def build_res5_head(backbone: BackboneSpec, neck: AbstractNeck) -> Res5Head:
    """The stage that the backbone would have next. Raises `SetupError` where the regions are not of a ResNet's C4."""
    if not isinstance(backbone, ResNetSpec):
        given = f"res5 behind a backbone of type {backbone.type}"
        raise SetupError(Problem(where="detector.roi.box_head", given=given, allowed="detector.backbone.type=resnet"))
    head = Res5Head(
        depth=backbone.depth, style=backbone.style, make_norm=norm_factory(backbone.norm, backbone.norm_eps)
    )
    if neck.channels != head.in_channels or neck.num_maps_used != 3 or len(neck.strides_px) != 1:
        raise SetupError(
            Problem(
                where="detector.roi.box_head",
                given=f"res5 on {neck.channels} channels at strides {', '.join(map(str, neck.strides_px))}",
                allowed=f"the map C4 as it is, {head.in_channels} channels at stride 16",
                remedy="detector.neck.type=none detector.neck.index=2, or another box head",
            )
        )
    return head


def build_box_head(
    spec: TwoFCSpec | ConvFCSpec | VGGHeadSpec, in_channels: int, pooled_size: int
) -> TwoFCHead | ConvFCHead:
    match spec:
        case TwoFCSpec():
            return TwoFCHead(
                in_channels=in_channels, pooled_size=pooled_size, features=spec.features, dropout=spec.dropout
            )
        case ConvFCSpec():
            return ConvFCHead(
                in_channels=in_channels,
                pooled_size=pooled_size,
                make_norm=optional_norm(spec.norm),
                num_convs=spec.num_convs,
                channels=spec.channels,
                features=spec.features,
            )
        case _:
            return TwoFCHead(
                in_channels=in_channels,
                pooled_size=pooled_size,
                features=VGG_FEATURES,
                dropout=spec.dropout,
                # VGG's own start (torchvision): what the layers have where no ImageNet file brings them.
                init_std=0.01,
            )
