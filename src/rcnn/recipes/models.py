"""From the typed tree to built parts: the only place that names every part."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from rcnn.backbones.interface import AbstractBackbone
from rcnn.backbones.mobilenet import MobileNetBackbone
from rcnn.backbones.norm import NormKind, norm_factory
from rcnn.backbones.pretrained import (
    efficientnet_lite0_file,
    efficientnet_lite0_names,
    imagenet_file,
    load_backbone,
    read_tensors,
)
from rcnn.backbones.resnet import ResNetBackbone
from rcnn.backbones.timm import TimmBackbone, imagenet_tensors
from rcnn.backbones.vgg import VGG16Backbone
from rcnn.boxes.coding import DeltaCoder
from rcnn.boxes.filtering import DetectionFilter
from rcnn.dense.interface import AbstractDenseHead
from rcnn.dense.rpn import RPNHead
from rcnn.detectors.two_stage import TwoStageDetector
from rcnn.errors import Problem, SetupError
from rcnn.matching.iou import IoUMatcher
from rcnn.matching.sampling import BalancedSampler, EverySampler
from rcnn.necks.fpn import FPN
from rcnn.necks.interface import AbstractNeck
from rcnn.necks.none import SingleMap
from rcnn.priors import AnchorGenerator
from rcnn.proposals import ProposalFilter, ProposalStage
from rcnn.recipes.heads import (
    RPNSpec,
)
from rcnn.recipes.parts import (
    AnchorSpec,
    BalancedSamplerSpec,
    BoxLossSpec,
    DeltaCoderSpec,
    L1Spec,
    MatcherSpec,
    SamplerSpec,
)
from rcnn.recipes.recipe import (
    BackboneSpec,
    BoxHeadSpec,
    ConvFCSpec,
    EfficientNetLite0Spec,
    FPNSpec,
    ImageSpec,
    MobileNetSpec,
    NeckSpec,
    PoolingSpec,
    ProposalCountSpec,
    ProposalsSpec,
    ResNetSpec,
    RoIAlignSpec,
    RoISpec,
    TimmSpec,
    TwoFCSpec,
    TwoStageSpec,
    VGG16Spec,
    VGGHeadSpec,
)
from rcnn.roi.box_head import BoxPredictor, ConvFCHead, TwoFCHead
from rcnn.roi.pooling import LevelMap, RoIPooling, align, quantised
from rcnn.roi.stage import RoIStage
from rcnn.transforms.batching import ImageNormalizer

VGG_FEATURES = 4096


def build_detector(spec: TwoStageSpec, *, num_classes: int, pretrained: bool = True) -> TwoStageDetector:
    """A detector of `num_classes` classes (background not counted).

    `pretrained=False` leaves the recipe's ImageNet weights out: for weights that come from a checkpoint.
    Raises `SetupError` where parts do not fit together, `CheckpointError` and `DownloadError` for the weights.
    """
    backbone = build_backbone(spec.backbone)
    neck = build_neck(spec.neck, backbone)
    roi = build_roi(spec.roi, neck, num_classes)
    detector = TwoStageDetector(
        normalizer=build_normalizer(spec.image),
        backbone=backbone,
        neck=neck,
        proposals=build_proposals(spec.proposals, neck),
        roi=roi,
    )
    if pretrained:
        classifier = load_imagenet(backbone, spec.backbone)
        if isinstance(spec.backbone, VGG16Spec) and isinstance(spec.roi.box_head, VGGHeadSpec):
            _start_vgg_head(roi.box_head, classifier)
    # Last, because the file of ImageNet weights is checked against the whole backbone.
    backbone.keep_maps(neck.num_maps_used)
    return detector


def build_normalizer(spec: ImageSpec) -> ImageNormalizer:
    return ImageNormalizer(mean=spec.mean, std=spec.std, channel_order=spec.channel_order)


# -------------------------------------------------------------------------------------------------- backbones and necks


def build_backbone(spec: BackboneSpec) -> AbstractBackbone:
    """The backbone, started from random numbers."""
    match spec:
        case ResNetSpec():
            make_norm = norm_factory(spec.norm, spec.norm_eps)
            return ResNetBackbone(
                depth=spec.depth, make_norm=make_norm, style=spec.style, frozen_stages=spec.frozen_stages
            )
        case VGG16Spec():
            return VGG16Backbone(frozen_convs=spec.frozen_convs)
        case MobileNetSpec():
            make_norm = norm_factory(spec.norm, spec.norm_eps)
            return MobileNetBackbone(
                version=spec.version, make_norm=make_norm, maps=spec.maps, frozen_stages=spec.frozen_stages
            )
        case EfficientNetLite0Spec():
            return TimmBackbone(name="tf_efficientnet_lite0", norm=spec.norm, frozen_stages=spec.frozen_stages)
        case TimmSpec():
            return TimmBackbone(name=spec.name, norm=spec.norm, frozen_stages=spec.frozen_stages)


def load_imagenet(backbone: AbstractBackbone, spec: BackboneSpec) -> dict[str, Tensor]:
    """Start the backbone from the weights that the recipe names; what belongs to a classifier comes back."""
    if spec.weights is None:
        return {}
    if isinstance(spec, TimmSpec) and spec.weights == "imagenet":
        tensors = imagenet_tensors(spec.name)
    else:
        tensors = read_tensors(_weights_file(spec))
    target: nn.Module = backbone
    if isinstance(backbone, TimmBackbone):
        target = backbone.body
        tensors = efficientnet_lite0_names(tensors) if isinstance(spec, EfficientNetLite0Spec) else tensors
    return load_backbone(target, tensors, where=str(spec.weights))


def _weights_file(spec: BackboneSpec) -> Path:
    assert spec.weights is not None
    if spec.weights != "imagenet":
        return Path(spec.weights).expanduser()
    match spec:
        case ResNetSpec():
            return imagenet_file(f"resnet{spec.depth}")
        case VGG16Spec():
            return imagenet_file("vgg16")
        case MobileNetSpec():
            return imagenet_file(f"mobilenet_{spec.version}")
        case _:
            return efficientnet_lite0_file()


# Our layer and its place in VGG16's classifier.
_VGG_LAYERS = {"fc6": "classifier.0", "fc7": "classifier.3"}


def _start_vgg_head(box_head: nn.Module, classifier: Mapping[str, Tensor]) -> None:
    """VGG16's fc6 and fc7, where the file has them: the paper starts its box head from them."""
    start = {
        f"{ours}.{kind}": classifier[f"{theirs}.{kind}"]
        for ours, theirs in _VGG_LAYERS.items()
        for kind in ("weight", "bias")
        if f"{theirs}.{kind}" in classifier
    }
    own = box_head.state_dict()
    problems = [
        Problem(
            where=f"detector.roi.box_head, {name}",
            given=f"shape {tuple(own[name].shape)}, in VGG16's file {tuple(value.shape)}",
            allowed="7x7 cells of 512 channels: detector.roi.pooling.output_size=7 and no neck",
            remedy="or a box head that starts from random numbers: detector.roi.box_head.type=two_fc",
        )
        for name, value in start.items()
        if value.shape != own[name].shape
    ]
    if problems:
        raise SetupError(problems)
    box_head.load_state_dict(start, strict=False)


def build_neck(spec: NeckSpec, backbone: AbstractBackbone) -> AbstractNeck:
    count = len(backbone.channels)
    wanted = spec.first_map if isinstance(spec, FPNSpec) else spec.index
    if not -count <= wanted < count:
        field = "first_map" if isinstance(spec, FPNSpec) else "index"
        raise SetupError(
            Problem(
                where=f"detector.neck.{field}",
                given=str(wanted),
                allowed=f"the backbone gives {count} maps, at strides {backbone.strides_px}",
            )
        )
    if isinstance(spec, FPNSpec):
        return FPN(
            in_channels=backbone.channels,
            in_strides_px=backbone.strides_px,
            channels=spec.channels,
            extra=spec.extra,
            first_map=spec.first_map,
            make_norm=_optional_norm(spec.norm),
        )
    return SingleMap(in_channels=backbone.channels, in_strides_px=backbone.strides_px, index=spec.index)


def _optional_norm(kind: NormKind | Literal["none"]) -> Callable[[int], nn.Module] | None:
    return None if kind == "none" else norm_factory(kind, 1e-5)


# --------------------------------------------------------------------------------------------------------------- stages


def build_proposals(spec: ProposalsSpec, neck: AbstractNeck) -> ProposalStage:
    def make_filter(count: ProposalCountSpec) -> ProposalFilter:
        return ProposalFilter(
            pre_nms=count.pre_nms,
            post_nms=count.post_nms,
            nms_iou=spec.nms_iou,
            scope=spec.scope,
            min_side_px=spec.min_side_px,
            side_frame=spec.side_frame,
            score_threshold=spec.score_threshold,
            side_test=spec.side_test,
        )

    return ProposalStage(
        head=build_head(spec.head, neck, num_classes=1),
        train_filter=make_filter(spec.train),
        test_filter=make_filter(spec.test),
    )


def build_head(spec: RPNSpec, neck: AbstractNeck, *, num_classes: int) -> AbstractDenseHead:
    return RPNHead(
        in_channels=neck.channels,
        anchors=build_anchors(spec.anchors, neck),
        num_classes=num_classes,
        channels=spec.channels,
        num_convs=spec.num_convs,
        coder=build_coder(spec.coder),
        matcher=build_matcher(spec.matcher),
        sampler=build_sampler(spec.sampler),
        box_loss=build_box_loss(spec.box_loss),
        border_px=spec.border_px,
    )


def build_anchors(spec: AnchorSpec, neck: AbstractNeck) -> AnchorGenerator:
    levels = len(neck.strides_px)
    sizes = spec.sizes_px * levels if len(spec.sizes_px) == 1 else spec.sizes_px
    if len(sizes) != levels or len({len(of_level) for of_level in sizes}) != 1:
        raise SetupError(
            Problem(
                where="detector.proposals.head.anchors.sizes_px",
                given=f"{len(sizes)} lists with {[len(of_level) for of_level in sizes]} sizes",
                allowed=f"one list for all levels, or {levels} of equal length: the neck gives {levels} maps, "
                f"at strides {neck.strides_px}",
            )
        )
    return AnchorGenerator(
        sizes_px=sizes,
        heights_over_widths=spec.heights_over_widths,
        rounded=spec.rounded,
        centre_offset=spec.centre_offset,
        stride_rule=spec.stride_rule,
    )


def build_roi(spec: RoISpec, neck: AbstractNeck, num_classes: int) -> RoIStage:
    box_head = build_box_head(spec.box_head, neck.channels, spec.pooling.output_size)
    return RoIStage(
        pooling=build_pooling(spec.pooling),
        box_head=box_head,
        predictor=BoxPredictor(in_features=box_head.out_features, num_classes=num_classes, regression=spec.regression),
        num_classes=num_classes,
        coder=build_coder(spec.coder),
        matcher=build_matcher(spec.matcher),
        sampler=build_sampler(spec.sampler),
        box_loss=build_box_loss(spec.box_loss),
        detection_filter=DetectionFilter(
            score_threshold=spec.score_threshold,
            nms_iou=spec.nms_iou,
            max_detections=spec.max_detections,
            min_side_px=spec.min_side_px,
        ),
    )


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
    )
    return RoIPooling(output_size=spec.output_size, pool=pool, level_map=level_map)


def build_box_head(spec: BoxHeadSpec, in_channels: int, pooled_size: int) -> TwoFCHead | ConvFCHead:
    match spec:
        case TwoFCSpec():
            return TwoFCHead(
                in_channels=in_channels, pooled_size=pooled_size, features=spec.features, dropout=spec.dropout
            )
        case ConvFCSpec():
            return ConvFCHead(
                in_channels=in_channels,
                pooled_size=pooled_size,
                make_norm=_optional_norm(spec.norm),
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


# ---------------------------------------------------------------------------------------------------------- small parts


def build_coder(spec: DeltaCoderSpec) -> DeltaCoder:
    return DeltaCoder(weights=spec.weights, max_log_ratio=spec.max_log_ratio, symmetric_clamp=spec.symmetric_clamp)


def build_matcher(spec: MatcherSpec) -> IoUMatcher:
    return IoUMatcher(
        positive_iou=spec.positive_iou,
        negative_iou=spec.negative_iou,
        low_quality_iou=spec.low_quality_iou,
        ignore_share=spec.ignore_share,
    )


def build_sampler(spec: SamplerSpec) -> BalancedSampler | EverySampler:
    if isinstance(spec, BalancedSamplerSpec):
        return BalancedSampler(total=spec.total, positive_fraction=spec.positive_fraction)
    return EverySampler()


def build_box_loss(spec: BoxLossSpec) -> Callable[[Tensor, Tensor], Tensor]:
    if isinstance(spec, L1Spec):
        return partial(F.l1_loss, reduction="sum")
    return partial(F.smooth_l1_loss, beta=spec.beta, reduction="sum")
