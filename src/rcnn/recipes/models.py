"""From the typed tree to built parts: the only place that names every part."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor, nn

from rcnn.backbones.interface import AbstractBackbone
from rcnn.backbones.mobilenet import MobileNetBackbone
from rcnn.backbones.norm import norm_factory
from rcnn.backbones.pretrained import (
    efficientnet_lite0_file,
    efficientnet_lite0_names,
    imagenet_file,
    load_backbone,
    read_tensors,
)
from rcnn.backbones.resnet import Cardinality, ResNetBackbone
from rcnn.backbones.timm import TimmBackbone, imagenet_tensors
from rcnn.backbones.vgg import VGG16Backbone
from rcnn.boxes.filtering import DetectionFilter
from rcnn.detectors.first_stage import ProposalDetector
from rcnn.detectors.one_stage import OneStageDetector
from rcnn.detectors.pyramid import AbstractPyramidDetector
from rcnn.detectors.two_stage import TwoStageDetector
from rcnn.download import is_url
from rcnn.errors import CheckpointError, Problem, SetupError
from rcnn.necks.fpn import FPN
from rcnn.necks.interface import AbstractNeck
from rcnn.necks.none import SingleMap
from rcnn.proposals import AbstractProposalStage, GivenProposals, ProposalFilter, ProposalStage
from rcnn.recipes.head_models import build_head
from rcnn.recipes.recipe import (
    BackboneSpec,
    DetectorSpec,
    EfficientNetLite0Spec,
    FirstStageSpec,
    FPNSpec,
    GivenProposalsSpec,
    ImageSpec,
    MobileNetSpec,
    NeckSpec,
    OneStageSpec,
    ProposalCountSpec,
    ProposalsSpec,
    ResNetSpec,
    TimmSpec,
    TwoStageSpec,
    VGG16Spec,
)
from rcnn.recipes.region_models import build_roi, build_soft_nms, optional_norm
from rcnn.recipes.regions import (
    VGGHeadSpec,
)
from rcnn.recipes.starts import file_of_start
from rcnn.roi.res5_head import Res5Head
from rcnn.roi.stage import RoIStage
from rcnn.transforms.batching import ImageNormalizer


def build_detector(spec: DetectorSpec, *, num_classes: int, pretrained: bool = True) -> AbstractPyramidDetector:
    """A detector of `num_classes` classes (background not counted).

    `pretrained=False` leaves the recipe's ImageNet weights out: for weights that come from a checkpoint.
    Raises `SetupError` where parts do not fit together, `CheckpointError` and `DownloadError` for the weights.
    """
    backbone = build_backbone(spec.backbone)
    neck = build_neck(spec.neck, backbone)
    detector = _build_on(spec, backbone, neck, num_classes)
    if pretrained:
        classifier = load_imagenet(backbone, spec.backbone)
        if isinstance(detector, TwoStageDetector) and isinstance(spec, TwoStageSpec):
            _start_second_stage(detector, spec, classifier)
    # Last, because the file of ImageNet weights is checked against the whole backbone.
    backbone.keep_maps(neck.num_maps_used)
    return detector


def _build_on(
    spec: DetectorSpec, backbone: AbstractBackbone, neck: AbstractNeck, num_classes: int
) -> AbstractPyramidDetector:
    normalizer = build_normalizer(spec.image)
    match spec:
        case TwoStageSpec():
            return TwoStageDetector(
                normalizer=normalizer,
                backbone=backbone,
                neck=neck,
                proposals=build_first_stage(spec.proposals, neck, divisor_px=spec.image.divisor),
                roi=build_roi(spec.roi, neck, num_classes, spec.backbone),
            )
        case OneStageSpec():
            return OneStageDetector(
                normalizer=normalizer,
                backbone=backbone,
                neck=neck,
                head=build_head(spec.head, neck, num_classes=num_classes, divisor_px=spec.image.divisor),
                # The head's own threshold is of the score that it ranks by; what it makes of that passes.
                detection_filter=DetectionFilter(
                    score_threshold=0.0,
                    nms_iou=spec.nms_iou,
                    soft_nms=build_soft_nms(spec.soft_nms),
                    max_detections=spec.max_detections,
                    min_side_px=spec.min_side_px,
                ),
                pre_nms=spec.pre_nms,
                score_threshold=spec.score_threshold,
            )
        case FirstStageSpec():
            proposals = build_proposals(spec.proposals, neck, divisor_px=spec.image.divisor)
            return ProposalDetector(normalizer=normalizer, backbone=backbone, neck=neck, proposals=proposals)


def build_normalizer(spec: ImageSpec) -> ImageNormalizer:
    return ImageNormalizer(mean=spec.mean, std=spec.std, channel_order=spec.channel_order, padding=spec.padding)


# -------------------------------------------------------------------------------------------------- backbones and necks


def build_backbone(spec: BackboneSpec) -> AbstractBackbone:
    """The backbone, started from random numbers."""
    match spec:
        case ResNetSpec():
            make_norm = norm_factory(spec.norm, spec.norm_eps)
            return ResNetBackbone(
                depth=spec.depth,
                make_norm=make_norm,
                style=spec.style,
                frozen_stages=spec.frozen_stages,
                cardinality=Cardinality(groups=spec.groups, group_width=spec.group_width),
                dilation=spec.dilation,
                stem_pool=spec.stem_pool,
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


_WEIGHTS = "detector.backbone.weights"


def load_imagenet(backbone: AbstractBackbone, spec: BackboneSpec) -> dict[str, Tensor]:
    """Start the backbone from the weights that the recipe names; what belongs to a classifier comes back."""
    if isinstance(spec, TimmSpec) and spec.weights == "imagenet":
        tensors = imagenet_tensors(spec.name)
    elif (file := backbone_file(spec)) is not None:
        tensors = read_tensors(file)
    else:
        return {}
    target: nn.Module = backbone
    if isinstance(backbone, TimmBackbone):
        target = backbone.body
        tensors = efficientnet_lite0_names(tensors) if isinstance(spec, EfficientNetLite0Spec) else tensors
    return load_backbone(target, tensors, where=str(spec.weights))


def _unsaid(text: str) -> None:
    """Nobody is told."""


def backbone_file(spec: BackboneSpec, *, say: Callable[[str], None] = _unsaid) -> Path | None:
    """The file that the backbone starts from, fetched where it is not at hand; None where it starts from random
    numbers, or timm has the weights. Raises `CheckpointError`, `DownloadError`, `SetupError`."""
    if spec.weights is None:
        return None
    if "://" in spec.weights and not is_url(spec.weights):
        raise CheckpointError(
            Problem(
                where=_WEIGHTS,
                given=spec.weights,
                allowed="imagenet, a file, its address (https://...), or null",
                remedy=f"fetch the file and name it: {_WEIGHTS}=FILE; null starts from random numbers",
            )
        )
    if spec.weights != "imagenet":
        return file_of_start(spec.weights, setting=_WEIGHTS, say=say)
    match spec:
        case ResNetSpec():
            grouped = f"resnext{spec.depth}_{spec.groups}x{spec.group_width}d"
            return imagenet_file(f"resnet{spec.depth}" if spec.groups == 1 else grouped)
        case VGG16Spec():
            return imagenet_file("vgg16")
        case MobileNetSpec():
            return imagenet_file(f"mobilenet_{spec.version}")
        case EfficientNetLite0Spec():
            return efficientnet_lite0_file()
        case TimmSpec():
            return None


# Our layer and its place in VGG16's classifier.
_VGG_LAYERS = {"fc6": "classifier.0", "fc7": "classifier.3"}


def _start_second_stage(detector: TwoStageDetector, spec: TwoStageSpec, classifier: Mapping[str, Tensor]) -> None:
    for stage in detector.roi.modules():
        if not isinstance(stage, RoIStage):
            continue
        if isinstance(stage.box_head, Res5Head) and spec.backbone.weights is not None:
            # The backbone has read its last stage too, which it is about to let go.
            stage.box_head.layer4.load_state_dict(detector.backbone.get_submodule("layer4").state_dict())
        elif isinstance(spec.backbone, VGG16Spec) and isinstance(spec.roi.box_head, VGGHeadSpec):
            _start_vgg_head(stage.box_head, classifier)


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
            p7_activation=spec.p7_activation,
            first_map=spec.first_map,
            make_norm=optional_norm(spec.norm),
            upsampling=spec.upsampling,
        )
    return SingleMap(in_channels=backbone.channels, in_strides_px=backbone.strides_px, index=spec.index)


# --------------------------------------------------------------------------------------------------------------- stages


def build_first_stage(
    spec: ProposalsSpec | GivenProposalsSpec, neck: AbstractNeck, *, divisor_px: int
) -> AbstractProposalStage:
    if isinstance(spec, GivenProposalsSpec):
        return GivenProposals(train_limit=spec.train_limit, test_limit=spec.test_limit)
    return build_proposals(spec, neck, divisor_px=divisor_px)


def build_proposals(spec: ProposalsSpec, neck: AbstractNeck, *, divisor_px: int) -> ProposalStage:
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
        head=build_head(spec.head, neck, num_classes=1, divisor_px=divisor_px),
        train_filter=make_filter(spec.train),
        test_filter=make_filter(spec.test),
    )
