"""From specs to dense heads and the small parts that stages share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, TypedDict

import torch.nn.functional as F
from torch import nn

from rcnn.backbones.norm import norm_factory
from rcnn.boxes.coding import DeltaCoder
from rcnn.boxes.loss import BoxLoss, DeltaLoss, per_box
from rcnn.dense.atss import ATSSHead
from rcnn.dense.centernet import CenterNetHead
from rcnn.dense.fcos import FCOSHead
from rcnn.dense.gfl import GFLHead
from rcnn.dense.interface import AbstractDenseHead
from rcnn.dense.normalizers import MovingNormalizer, by_batch, by_picture
from rcnn.dense.retinanet import DecodedGIoULoss, RetinaNetHead
from rcnn.dense.rpn import RPNHead
from rcnn.dense.tood import TOODHead
from rcnn.dense.towers import group_norm
from rcnn.dense.yolox import YOLOXHead, batch_norm
from rcnn.errors import Problem, SetupError
from rcnn.matching.atss import ATSSMatcher
from rcnn.matching.centre import CentreMatcher
from rcnn.matching.heatmap import HeatMapMatcher
from rcnn.matching.iou import IoUMatcher
from rcnn.matching.sampling import BalancedSampler, EverySampler
from rcnn.matching.simota import SimOTAMatcher
from rcnn.matching.task_aligned import TaskAlignedMatcher
from rcnn.necks.interface import AbstractNeck
from rcnn.priors import AnchorGenerator, PointGenerator
from rcnn.recipes.heads import (
    ATSSMatcherSpec,
    ATSSSpec,
    BeyondPicture,
    CenterNetSpec,
    DenseHeadSpec,
    FCOSSpec,
    GFLSpec,
    GIoUSpec,
    HeadNorm,
    RetinaNetSpec,
    RPNSpec,
    TOODSpec,
    YOLOXSpec,
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


def build_head(spec: DenseHeadSpec, neck: AbstractNeck, *, num_classes: int, divisor_px: int) -> AbstractDenseHead:
    """The head on the neck's maps; `divisor_px` is what batches are padded to. Raises `SetupError`."""
    match spec:
        case RPNSpec():
            return _build_rpn(spec, neck, num_classes, divisor_px)
        case RetinaNetSpec():
            return _build_retinanet(spec, neck, num_classes, divisor_px)
        case FCOSSpec():
            return _build_fcos(spec, neck, num_classes)
        case ATSSSpec():
            return ATSSHead(
                **_above(neck, spec, num_classes),
                anchor_scale=spec.anchor_scale,
                matcher=_build_atss_matcher(spec.matcher),
                coder=build_coder(spec.coder),
                box_weight=spec.box_weight,
                size_divisor_px=divisor_px,
            )
        case GFLSpec():
            return GFLHead(
                **_above(neck, spec, num_classes),
                max_distance=spec.max_distance,
                anchor_scale=spec.anchor_scale,
                matcher=_build_atss_matcher(spec.matcher),
                box_weight=spec.box_weight,
                distribution_weight=spec.distribution_weight,
                size_divisor_px=divisor_px,
            )
        case TOODSpec():
            return _build_tood(spec, neck, num_classes, divisor_px)
        case CenterNetSpec():
            return _build_centernet(spec, neck, num_classes)
        case YOLOXSpec():
            return _build_yolox(spec, neck, num_classes)


class _Above(TypedDict):
    """What heads of a tower on a pyramid have in common."""

    in_channels: int
    num_classes: int
    strides_px: tuple[int, ...]
    channels: int
    num_convs: int
    make_norm: Callable[[int], nn.Module] | None


def _above(
    neck: AbstractNeck, spec: RetinaNetSpec | FCOSSpec | ATSSSpec | GFLSpec | TOODSpec, num_classes: int
) -> _Above:
    return _Above(
        in_channels=neck.channels,
        num_classes=num_classes,
        strides_px=neck.strides_px,
        channels=spec.channels,
        num_convs=spec.num_convs,
        make_norm=_optional_norm(spec.norm),
    )


def _build_rpn(spec: RPNSpec, neck: AbstractNeck, num_classes: int, divisor_px: int) -> RPNHead:
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
        clip_to=spec.clip_to,
        border_px=spec.border_px,
        border_ends=spec.border_ends,
        size_divisor_px=_divisor(spec.beyond_picture, divisor_px),
        loss_count=spec.loss_count,
        objectness=spec.objectness,
    )


def _divisor(beyond_picture: BeyondPicture, divisor_px: int) -> int | None:
    """What the heads round a picture up to: cells beyond take no part. None: they are negatives."""
    return divisor_px if beyond_picture == "left_out" else None


def _build_retinanet(spec: RetinaNetSpec, neck: AbstractNeck, num_classes: int, divisor_px: int) -> RetinaNetHead:
    normalizers = {"batch": by_batch, "picture": by_picture}
    return RetinaNetHead(
        **_above(neck, spec, num_classes),
        anchors=None if spec.anchors is None else build_anchors(spec.anchors, neck),
        matcher=build_matcher(spec.matcher),
        coder=build_coder(spec.coder),
        box_loss=_build_loss_per_box(spec.box_loss),
        normalizer=normalizers[spec.normalizer] if spec.normalizer != "moving" else MovingNormalizer(),
        size_divisor_px=_divisor(spec.beyond_picture, divisor_px),
        clips_candidates=spec.clips_candidates,
    )


def _build_fcos(spec: FCOSSpec, neck: AbstractNeck, num_classes: int) -> FCOSHead:
    return FCOSHead(
        **_above(neck, spec, num_classes),
        conv_bias=spec.conv_bias,
        scaled=spec.scaled,
        centerness_branch=spec.centerness_branch,
        distances=spec.distances,
        points=PointGenerator(offset=spec.points.offset, stride_rule=spec.points.stride_rule),
        matcher=CentreMatcher(
            radius_strides=spec.matcher.radius_strides,
            range_strides=spec.matcher.range_strides,
            range_ends=spec.matcher.range_ends,
        ),
        box_loss=spec.box_loss,
        box_weights=spec.box_weights,
        score_fusion=spec.score_fusion,
    )


def _build_tood(spec: TOODSpec, neck: AbstractNeck, num_classes: int, divisor_px: int) -> TOODHead:
    return TOODHead(
        **_above(neck, spec, num_classes),
        anchor_scale=spec.anchor_scale,
        matcher=TaskAlignedMatcher(
            candidates=spec.matcher.candidates,
            score_power=spec.matcher.score_power,
            iou_power=spec.matcher.iou_power,
        ),
        initial_matcher=_build_atss_matcher(spec.initial_matcher),
        initial_batches=spec.initial_batches,
        box_weight=spec.box_weight,
        size_divisor_px=divisor_px,
    )


def _build_centernet(spec: CenterNetSpec, neck: AbstractNeck, num_classes: int) -> CenterNetHead:
    return CenterNetHead(
        in_channels=neck.channels,
        strides_px=neck.strides_px,
        num_classes=num_classes,
        channels=spec.channels,
        num_convs=spec.num_convs,
        make_norm=_optional_norm(spec.norm),
        heat_tower=spec.heat_tower,
        score=spec.score,
        matcher=HeatMapMatcher(
            low_strides=spec.matcher.low_strides,
            high_strides=spec.matcher.high_strides,
            min_overlap=spec.matcher.min_overlap,
            min_radius_px=spec.matcher.min_radius_px,
        ),
        alpha=spec.alpha,
        beta=spec.beta,
        gamma=spec.gamma,
        ignore_above=spec.ignore_above,
        peak_weight=spec.peak_weight,
        off_peak_weight=spec.off_peak_weight,
        box_weight=spec.box_weight,
        box_weights=spec.box_weights,
    )


def _build_yolox(spec: YOLOXSpec, neck: AbstractNeck, num_classes: int) -> YOLOXHead:
    # YOLOX's batch norm has an epsilon and a momentum of its own.
    make_norm = batch_norm if spec.norm == "batch" else _optional_norm(spec.norm)
    assert make_norm is not None
    return YOLOXHead(
        in_channels=neck.channels,
        strides_px=neck.strides_px,
        num_classes=num_classes,
        channels=spec.channels,
        num_convs=spec.num_convs,
        make_norm=make_norm,
        matcher=SimOTAMatcher(
            centre_radius=spec.matcher.centre_radius,
            num_candidates=spec.matcher.num_candidates,
            iou_weight=spec.matcher.iou_weight,
            class_weight=spec.matcher.class_weight,
        ),
        box_weight=spec.box_weight,
        l1_weight=spec.l1_weight,
    )


def _optional_norm(kind: HeadNorm) -> Callable[[int], nn.Module] | None:
    match kind:
        case "none":
            return None
        case "group":
            return group_norm
        case _:
            return norm_factory(kind, 1e-5)


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


# ---------------------------------------------------------------------------------------------------------- small parts


def build_coder(spec: DeltaCoderSpec) -> DeltaCoder:
    return DeltaCoder(weights=spec.weights, max_log_ratio=spec.max_log_ratio, symmetric_clamp=spec.symmetric_clamp)


def build_matcher(spec: MatcherSpec) -> IoUMatcher:
    return IoUMatcher(
        positive_iou=spec.positive_iou,
        negative_iou=spec.negative_iou,
        low_quality_iou=spec.low_quality_iou,
        claim_owner=spec.claim_owner,
        ignore_share=spec.ignore_share,
        sides=spec.sides,
    )


def build_sampler(spec: SamplerSpec) -> BalancedSampler | EverySampler:
    if isinstance(spec, BalancedSamplerSpec):
        return BalancedSampler(total=spec.total, positive_fraction=spec.positive_fraction, negatives=spec.negatives)
    return EverySampler()


def _build_loss_per_box(spec: BoxLossSpec | GIoUSpec) -> BoxLoss:
    if isinstance(spec, GIoUSpec):
        return DecodedGIoULoss(eps=spec.eps)
    return per_box(build_box_loss(spec, reduction="none"))


def build_box_loss(spec: BoxLossSpec, *, reduction: Literal["sum", "none"] = "sum") -> DeltaLoss:
    if isinstance(spec, L1Spec):
        return partial(F.l1_loss, reduction=reduction)
    return partial(F.smooth_l1_loss, beta=spec.beta, reduction=reduction)


def _build_atss_matcher(spec: ATSSMatcherSpec) -> ATSSMatcher:
    return ATSSMatcher(candidates_per_level=spec.candidates_per_level, ignore_share=spec.ignore_share)
