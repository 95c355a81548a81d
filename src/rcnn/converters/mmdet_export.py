"""A detector of ours as a checkpoint of MMDetection 3: names, layout, and what its modules cannot compute."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import cast, get_args

import torch
from torch import Tensor

import rcnn
from rcnn.converters.mmdet import Layout
from rcnn.converters.mmdet_structure import HeadKind
from rcnn.errors import CheckpointError, Problem
from rcnn.recipes.heads import (
    DenseHeadSpec,
    FCOSSpec,
    RetinaNetSpec,
    RPNSpec,
)
from rcnn.recipes.parts import DeltaCoderSpec
from rcnn.recipes.recipe import (
    FPNSpec,
    OneStageSpec,
    ProposalsSpec,
    Recipe,
    ResNetSpec,
    TwoStageSpec,
)
from rcnn.recipes.regions import CascadeSpec, ConvFCSpec, TwoFCSpec
from rcnn.records import ClassTable

_HEADS = get_args(HeadKind)


def export(state: Mapping[str, Tensor], recipe: Recipe, classes: ClassTable | None = None) -> dict[str, object]:
    """`{"meta", "state_dict"}` of plain values and tensors; `meta` has the class names where versions 2 and 3 look.

    Raises `CheckpointError` with every setting that changes detections and that MMDetection has no config for. The
    numbers that its config states (thresholds, pictures, samplers) are not in a checkpoint of its.
    """
    problems = [
        Problem(where=where, given=given, allowed=allowed, remedy="MMDetection computes no such detector")
        for where, given, allowed in _differences(recipe)
    ]
    if problems:
        raise CheckpointError(problems)
    layout = _layout(recipe)
    theirs = layout.key_map.to_theirs(state)
    if layout.frozen:
        # Its own frozen norms do count batches, all none.
        for name in [name for name in theirs if name.endswith(".running_var")]:
            theirs[f"{name.removesuffix('running_var')}num_batches_tracked"] = torch.tensor(0)
    meta: dict[str, object] = {"mmdet_version": "3.3.0", "experiment_name": f"rcnn {rcnn.__version__}"}
    if classes is not None:
        meta |= {"dataset_meta": {"classes": classes.names}, "CLASSES": classes.names}
    return {"meta": meta, "state_dict": theirs}


def _layout(recipe: Recipe) -> Layout:
    detector = recipe.detector
    backbone, neck, head = detector.backbone, detector.neck, _head(recipe)
    assert isinstance(backbone, ResNetSpec)
    assert isinstance(neck, FPNSpec)
    regions = detector.roi if isinstance(detector, TwoStageSpec) else None
    norm = "none" if head is None or isinstance(head, RPNSpec) else head.norm
    return Layout(
        head=None if head is None else cast("HeadKind", head.type),
        # Its RPN detector keeps its head as a one-stage detector does.
        head_prefix="rpn_head" if isinstance(detector, TwoStageSpec) else "bbox_head",
        head_place="head" if isinstance(detector, OneStageSpec) else "proposals.head",
        num_laterals=4 - neck.first_map,
        one_rpn_conv=isinstance(head, RPNSpec) and head.num_convs == 1,
        cascade_stages=len(regions.stages) if isinstance(regions, CascadeSpec) else 0,
        box_convs=regions is not None and isinstance(regions.box_head, ConvFCSpec),
        frozen=backbone.norm == "frozen",
        head_norms=("gn",) if norm == "group" else ("bn",),
    )


def _head(recipe: Recipe) -> DenseHeadSpec | None:
    detector = recipe.detector
    if isinstance(detector, OneStageSpec):
        return detector.head
    return detector.proposals.head if isinstance(detector.proposals, ProposalsSpec) else None


Difference = tuple[str, str, str]
"""Where, what was given, what is allowed."""


def _differences(recipe: Recipe) -> Iterator[Difference]:
    detector, head = recipe.detector, _head(recipe)
    if not isinstance(detector.backbone, ResNetSpec):
        yield "detector.backbone.type", detector.backbone.type, "resnet"
    if not isinstance(detector.neck, FPNSpec):
        yield "detector.neck.type", detector.neck.type, "fpn"
    if detector.image.rounding != "round_half_up":
        yield "detector.image.rounding", detector.image.rounding, "round_half_up"
    if not detector.image.kernel.startswith("bilinear_uint8"):
        yield "detector.image.kernel", detector.image.kernel, "bilinear_uint8 or bilinear_uint8_antialias"
    if head is not None:
        place = "detector.head" if isinstance(detector, OneStageSpec) else "detector.proposals.head"
        yield from _head_differences(head, place)
    if not isinstance(detector, OneStageSpec) and isinstance(detector.proposals, ProposalsSpec):
        yield from _proposal_differences(detector.proposals)
    if isinstance(detector, TwoStageSpec):
        yield from _region_differences(detector)


def _head_differences(head: DenseHeadSpec, place: str) -> Iterator[Difference]:
    if head.type not in _HEADS:
        yield f"{place}.type", head.type, ", ".join(_HEADS)
    if isinstance(head, (RPNSpec, RetinaNetSpec)):
        anchors = head.anchors
        if anchors is not None and anchors.rounded:
            yield f"{place}.anchors.rounded", "true", "false"
        if anchors is not None and anchors.stride_rule != "nominal":
            yield f"{place}.anchors.stride_rule", anchors.stride_rule, "nominal"
        yield from _coder_differences(head.coder, f"{place}.coder")
    if isinstance(head, RetinaNetSpec) and not head.clips_candidates:
        yield f"{place}.clips_candidates", "false", "true"
    if isinstance(head, FCOSSpec):
        if not head.scaled:
            yield f"{place}.scaled", "false", "true"
        if head.score_fusion != "rescore":
            yield f"{place}.score_fusion", head.score_fusion, "rescore"
        if (head.points.offset, head.points.stride_rule) != (0.5, "nominal"):
            yield f"{place}.points", f"{head.points.offset} {head.points.stride_rule}", "0.5 nominal"


def _coder_differences(coder: DeltaCoderSpec, place: str) -> Iterator[Difference]:
    if coder.max_log_ratio is None or not coder.symmetric_clamp:
        given = "no limit" if coder.max_log_ratio is None else "a limit of growing alone"
        yield place, given, "deltas of size limited on both sides (symmetric_clamp)"


def _proposal_differences(proposals: ProposalsSpec) -> Iterator[Difference]:
    is_rpn = isinstance(proposals.head, RPNSpec)
    scope = "level" if is_rpn else "joint"
    if proposals.scope != scope:
        yield "detector.proposals.scope", proposals.scope, f"{scope}, for this head"
    if proposals.side_frame != "network":
        yield "detector.proposals.side_frame", proposals.side_frame, "network"
    if proposals.side_test != "after_pre_nms":
        yield "detector.proposals.side_test", proposals.side_test, "after_pre_nms"
    if is_rpn and proposals.score_threshold > 0:
        yield "detector.proposals.score_threshold", str(proposals.score_threshold), "0, for an RPN"


def _region_differences(detector: TwoStageSpec) -> Iterator[Difference]:
    regions = detector.roi
    if not isinstance(regions.box_head, (TwoFCSpec, ConvFCSpec)):
        yield "detector.roi.box_head.type", regions.box_head.type, "two_fc or conv_fc"
    if regions.fusion != "none":
        yield "detector.roi.fusion", regions.fusion, "none"
    if regions.classification.type != "softmax":
        yield "detector.roi.classification.type", regions.classification.type, "softmax"
    if isinstance(regions, CascadeSpec):
        if regions.average != "logits":
            yield "detector.roi.average", regions.average, "logits"
        for number, stage in enumerate(regions.stages):
            yield from _coder_differences(stage.coder, f"detector.roi.stages[{number}].coder")
    else:
        yield from _coder_differences(regions.coder, "detector.roi.coder")
