"""The recipe of an MMDetection file: its structure from keys and shapes, all else as MMDetection has it.

What neither says (thresholds, samplers, the schedule) is that of MMDetection's own 1x config of that kind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from rcnn.config.edit import edit
from rcnn.converters.mmdet_structure import HeadKind, HeadStructure, RegionStructure, Structure
from rcnn.errors import CheckpointError, Problem
from rcnn.recipes import dense_catalogue
from rcnn.recipes.heads import (
    ATSSSpec,
    CentreMatcherSpec,
    DenseHeadSpec,
    FCOSSpec,
    GFLSpec,
    RetinaNetSpec,
    RPNSpec,
)
from rcnn.recipes.parts import AnchorSpec, SmoothL1Spec
from rcnn.recipes.recipe import FirstStageSpec, ImageSpec, OneStageSpec, Recipe, ResNetSpec, TwoStageSpec
from rcnn.recipes.regions import CascadeSpec, ConvFCSpec, LevelMapSpec, RoIAlignSpec, TwoFCSpec

Style = Literal["pytorch", "caffe"]
# Boxes of up to 112 px come from the finest map, whatever its stride.
LEVEL_MAP = LevelMapSpec(canonical_size_px=56.0, canonical_level=0, epsilon_place="inside", count="by_position")
# FCOS's own caffe config has the mean of Detectron's weights, all others the same in three decimals less.
_CAFFE_MEAN = (103.53, 116.28, 123.675)
_CAFFE_FCOS_MEAN = (102.9801, 115.9465, 122.7717)
_TITLES: dict[HeadKind, str] = {
    "rpn": "RPN",
    "retinanet": "RetinaNet",
    "fcos": "FCOS",
    "atss": "ATSS",
    "gfl": "GFL",
}
_ONE_STAGE: dict[HeadKind, Callable[[], Recipe]] = {
    "retinanet": dense_catalogue.retinanet_resnet50_fpn,
    "fcos": dense_catalogue.fcos_resnet50_caffe_fpn_gn,
    "atss": dense_catalogue.atss_resnet50_fpn,
    "gfl": dense_catalogue.gfl_resnet50_fpn,
}


@dataclass(frozen=True, kw_only=True)
class FCOSOptions:
    """What FCOS's keys do not show."""

    norm_on_bbox: bool = False
    centerness_on_reg: bool = False
    center_sampling: bool = False
    center_radius: float = 1.5


@dataclass(frozen=True, kw_only=True)
class Conventions:
    """What the keys do not show, of the version that wrote them and of the pictures."""

    style: Style = "pytorch"
    mean: tuple[float, float, float] | None = None
    """None: that of the style."""
    std: tuple[float, float, float] | None = None
    channel_order: Literal["rgb", "bgr"] | None = None
    trained_norms: bool | None = None
    """Whether the backbone's norms have weights that are trained; None: not in the caffe style."""
    version_1: bool = False
    relu_before_extra_convs: bool | None = None
    fcos: FCOSOptions = FCOSOptions()


def title_of(structure: Structure) -> str:
    """The detector in words: `Faster R-CNN with FCOS, ResNet-50`."""
    head, regions = structure.head, structure.regions
    if regions is None:
        assert head is not None
        name = _TITLES[head.kind]
    elif head is None:
        name = "Fast R-CNN"
    else:
        name = "Cascade R-CNN" if regions.stages else "Faster R-CNN"
        name += "" if head.kind == "rpn" else f" with {_TITLES[head.kind]} as first stage"
    return f"MMDetection's {name}, ResNet-{structure.depth}"


def recipe_of(structure: Structure, conventions: Conventions) -> Recipe:
    """The recipe that builds it. Raises `CheckpointError` for numbers of anchors that the keys do not explain."""
    base = _base(structure)
    changes: dict[str, object] = {
        "expected": "not measured",
        "source": f"{title_of(structure)}, by the keys of its checkpoint",
        "detector.image": _image(structure, conventions),
        "detector.backbone": _backbone(structure, conventions),
        **_neck(structure, conventions),
    }
    detector = base.detector
    if structure.head is not None:
        head = _head_spec(structure, structure.head, conventions, detector)
        changes["detector.head" if isinstance(detector, OneStageSpec) else "detector.proposals.head"] = head
        if conventions.version_1 and isinstance(detector, TwoStageSpec):
            changes["detector.proposals.train.post_nms"] = 2000
    if structure.regions is not None:
        changes |= _regions(structure.regions, conventions, detector)
    return edit(base, changes)


def _base(structure: Structure) -> Recipe:
    head, regions = structure.head, structure.regions
    if regions is None:
        assert head is not None
        return _ONE_STAGE[head.kind]() if head.kind != "rpn" else dense_catalogue.rpn_resnet50_fpn()
    if head is None:
        return dense_catalogue.fast_rcnn_resnet50_fpn()
    dense = dense_catalogue.faster_rcnn_resnet50_fpn_fcos_rpn()
    assert isinstance(dense.detector, TwoStageSpec)
    if regions.stages:
        cascade = dense_catalogue.cascade_rcnn_resnet50_fpn()
        if head.kind == "rpn":
            return cascade
        # Its slow start is for the sake of the head.
        return edit(cascade, {"detector.proposals": dense.detector.proposals, "train": dense.train})
    if head.kind != "rpn":
        return dense
    first = dense_catalogue.rpn_resnet50_fpn().detector
    assert isinstance(first, FirstStageSpec)
    # As a first stage it proposes from half of what it does alone.
    proposals = edit(first.proposals, {"test.pre_nms": 1000})
    return edit(dense_catalogue.fast_rcnn_resnet50_fpn(), {"detector.proposals": proposals})


# ------------------------------------------------------------------------------------------------- pictures and pyramid


def _image(structure: Structure, conventions: Conventions) -> ImageSpec:
    image = ImageSpec(rounding="round_half_up", kernel="bilinear_uint8")
    if conventions.style == "caffe":
        alone = structure.regions is None and structure.head is not None and structure.head.kind == "fcos"
        mean = _CAFFE_FCOS_MEAN if alone else _CAFFE_MEAN
        image = edit(image, {"channel_order": "bgr", "mean": mean, "std": (1.0, 1.0, 1.0)})
    given = {"mean": conventions.mean, "std": conventions.std, "channel_order": conventions.channel_order}
    return edit(image, {name: value for name, value in given.items() if value is not None})


def _backbone(structure: Structure, conventions: Conventions) -> ResNetSpec:
    caffe = conventions.style == "caffe"
    trained = conventions.trained_norms if conventions.trained_norms is not None else not caffe
    return ResNetSpec(
        depth=structure.depth,
        style=conventions.style,
        norm="fixed_statistics" if trained else "frozen",
        # No ImageNet weights of the caffe style can be fetched by name.
        weights=None if caffe else "imagenet",
    )


def _neck(structure: Structure, conventions: Conventions) -> dict[str, object]:
    pyramid = structure.pyramid
    relu = conventions.relu_before_extra_convs
    if relu is None:  # FCOS's configs set it, no others do
        relu = structure.head is not None and structure.head.kind == "fcos"
    return {
        "detector.neck.channels": pyramid.channels,
        "detector.neck.first_map": pyramid.first_map,
        "detector.neck.extra": pyramid.extra,
        "detector.neck.norm": pyramid.norm,
        "detector.neck.p7_activation": "relu" if relu or not pyramid.extra.startswith("convs") else "none",
    }


# ---------------------------------------------------------------------------------------------------------------- heads


def _head_spec(structure: Structure, head: HeadStructure, conventions: Conventions, detector: object) -> DenseHeadSpec:
    expected_anchors = {"rpn": 3, "retinanet": 9}.get(head.kind, 1)
    if head.num_anchors != expected_anchors:
        raise CheckpointError(
            Problem(
                where=f"the {_TITLES[head.kind]} head",
                given=f"{head.num_anchors} anchors in each cell",
                allowed=f"{expected_anchors}, which are MMDetection's own; the keys say nothing of sizes and ratios",
                remedy="give the config that it was trained with: --config CONFIG",
            )
        )
    strides = tuple(4 * 2 ** (structure.pyramid.first_map + level) for level in range(structure.pyramid.num_levels))
    if head.kind == "rpn":
        assert isinstance(detector, (TwoStageSpec, FirstStageSpec))
        return _rpn(head, conventions, detector, strides, width=structure.pyramid.channels)
    tower = {"num_convs": head.num_convs, "channels": head.channels, "norm": head.norm}
    match head.kind:
        case "fcos":
            options = conventions.fcos
            spec = FCOSSpec(
                conv_bias=None if head.conv_bias == (head.norm == "none") else head.conv_bias,
                centerness_branch="boxes" if options.centerness_on_reg else "classes",
                distances="relu" if options.norm_on_bbox else "exp",
                matcher=CentreMatcherSpec(radius_strides=options.center_radius if options.center_sampling else None),
            )
        case "atss":
            spec = ATSSSpec()
        case "gfl":
            spec = GFLSpec(max_distance=head.max_distance)
        case _:
            spec = RetinaNetSpec()
            if conventions.version_1:
                sizes = tuple(tuple(4.0 * stride * 2 ** (octave / 3) for octave in range(3)) for stride in strides)
                anchors = AnchorSpec(sizes_px=sizes, rounded=True, centre_offset=0.5)
                spec = RetinaNetSpec(anchors=anchors, box_loss=SmoothL1Spec(beta=0.11))
    return edit(spec, tower)


def _rpn(
    head: HeadStructure,
    conventions: Conventions,
    detector: TwoStageSpec | FirstStageSpec,
    strides: tuple[int, ...],
    *,
    width: int,
) -> RPNSpec:
    assert detector.proposals.type == "head"
    base = detector.proposals.head
    assert isinstance(base, RPNSpec)
    anchors = AnchorSpec(
        sizes_px=tuple((8.0 * stride,) for stride in strides),
        rounded=conventions.version_1,
        centre_offset=0.5 if conventions.version_1 else 0.0,
    )
    changes: dict[str, object] = {
        "num_convs": head.num_convs,
        "channels": None if head.channels == width else head.channels,
        "anchors": anchors,
        "objectness": "softmax" if head.softmax else "sigmoid",
        "border_ends": "excluded",
    }
    if conventions.version_1:
        changes["box_loss"] = SmoothL1Spec()
    return edit(base, changes)


# --------------------------------------------------------------------------------------------------------- second stage


def _regions(regions: RegionStructure, conventions: Conventions, detector: object) -> dict[str, object]:
    pooling = RoIAlignSpec(
        output_size=regions.pooled_size,
        sampling_ratio=2 if conventions.version_1 else 0,
        aligned=not conventions.version_1,
        level_map=LEVEL_MAP,
    )
    box_head = TwoFCSpec(features=regions.features)
    if regions.num_convs:
        box_head = ConvFCSpec(
            num_convs=regions.num_convs,
            channels=regions.conv_channels,
            features=regions.features,
            norm=regions.norm,
        )
    changes: dict[str, object] = {
        "detector.roi.pooling": pooling,
        "detector.roi.box_head": box_head,
        "detector.roi.regression": "agnostic" if regions.agnostic else "per_class",
    }
    if conventions.version_1:
        changes["detector.roi.box_loss"] = SmoothL1Spec(beta=1.0)
    assert isinstance(detector, TwoStageSpec)
    if isinstance(detector.roi, CascadeSpec):
        stages = detector.roi.stages
        if regions.stages > len(stages):
            raise CheckpointError(
                Problem(
                    where="roi_head.bbox_head",
                    given=f"a cascade of {regions.stages} stages",
                    allowed=f"up to {len(stages)}, whose IoUs and coders are MMDetection's own",
                    remedy="give the config that it was trained with: --config CONFIG",
                )
            )
        changes["detector.roi.stages"] = stages[: regions.stages]
    return changes
