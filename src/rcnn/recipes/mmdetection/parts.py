"""The small parts that several of MMDetection's heads share: anchors, coders, assigners, samplers, losses, NMS."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from rcnn.recipes.heads import HeadNorm
from rcnn.recipes.mmdetection.ledger import Part
from rcnn.recipes.parts import (
    AnchorSpec,
    BalancedSamplerSpec,
    BoxLossSpec,
    DeltaCoderSpec,
    EverySamplerSpec,
    L1Spec,
    MatcherSpec,
    SamplerSpec,
    SmoothL1Spec,
)
from rcnn.recipes.regions import DecodedBoxLossSpec, HardExampleSamplerSpec, SoftNMSSpec

DERIVED = "follows from the other parts here"
FIXED = "has no effect on what is computed"
# MMDetection keeps boxes whose sides are more than 0 px, ours those of at least so many.
POSITIVE_SIDE_PX = 1e-9
_UNIT = (1.0, 1.0, 1.0, 1.0)
_RATIO_CLIP = 16 / 1000
_MOST_PER_OCTAVE = 100

BoxLoss = BoxLossSpec | DecodedBoxLossSpec


def anchors(part: Part, strides_px: Sequence[int]) -> AnchorSpec:
    """AnchorGenerator: base sizes are strides times scales."""
    if part.kind("AnchorGenerator") != "AnchorGenerator":
        part.refuse("type", "here it is always AnchorGenerator")
    strides(part, strides_px)
    part.only("scale_major", True)
    part.only("center_offset", 0, 0.0)
    part.only("centers", None)
    part.only("base_sizes", None, list(strides_px))
    ratios = part.numbers("ratios", (0.5, 1.0, 2.0))
    base = part.number("octave_base_scale", 0)
    per_octave = part.count("scales_per_octave", 1)
    if per_octave > _MOST_PER_OCTAVE:
        raise part.fail("scales_per_octave", [f"at most {_MOST_PER_OCTAVE}"])
    scales = part.numbers("scales", (8.0,))
    if base:
        scales = tuple(base * 2 ** (i / per_octave) for i in range(per_octave))
    part.close()
    sizes = tuple(tuple(float(stride * scale) for scale in scales) for stride in strides_px)
    return AnchorSpec(sizes_px=sizes, heights_over_widths=tuple(map(float, ratios)))


def square_anchor_scale(part: Part, strides_px: Sequence[int]) -> float:
    """The side in strides, for heads with one square anchor per cell."""
    if any(part.peek(key, given) != given for key, given in (("scales_per_octave", 1), ("ratios", [1.0]))):
        part.refuse("ratios", "one square anchor per cell: ratios=[1.0], scales_per_octave=1")
    scale = part.peek("octave_base_scale", 8)
    found = anchors(part, strides_px)
    return found.sizes_px[0][0] / strides_px[0] if found.sizes_px else float(scale)


def strides(part: Part, strides_px: Sequence[int], key: str = "strides") -> None:
    """They must be those of the maps: here they are never given."""
    if tuple(part.numbers(key, strides_px)) != tuple(strides_px):
        part.refuse(key, f"the neck's maps have strides {tuple(strides_px)}, one for each level")


def coder(part: Part, stds: Sequence[float] = _UNIT) -> DeltaCoderSpec:
    if part.kind("DeltaXYWHBBoxCoder") != "DeltaXYWHBBoxCoder":
        part.refuse("type", "here it is always DeltaXYWHBBoxCoder")
    if any(part.numbers("target_means", (0.0,) * 4)):
        part.refuse("target_means", "deltas have mean 0 here")
    part.only("clip_border", True)
    part.only("add_ctr_clamp", False)
    part.ignore(FIXED, "ctr_clamp", "use_box_type")
    given = part.numbers("target_stds", stds)
    if len(given) != 4 or min(given) <= 0:
        part.refuse("target_stds", "four numbers above 0 are wanted")
        given = tuple(stds)
    clip = part.number("wh_ratio_clip", _RATIO_CLIP)
    part.close()
    x, y, width, height = (1 / std for std in given)
    plain = DeltaCoderSpec(weights=(x, y, width, height), symmetric_clamp=True)
    if clip == _RATIO_CLIP or not 0 < clip < 1:
        return plain
    return plain.model_copy(update={"max_log_ratio": abs(math.log(clip))})


def iou_matcher(part: Part) -> MatcherSpec:
    """MaxIoUAssigner."""
    if part.kind("MaxIoUAssigner") != "MaxIoUAssigner":
        part.refuse("type", "here it is always MaxIoUAssigner")
    part.only("gt_max_assign_all", True)
    part.only("ignore_wrt_candidates", True)
    part.ignore("the matching is never moved to another device", "gpu_assign_thr")
    _overlaps(part)
    lowest = part.number("min_pos_iou", 0.0)
    claims = part.truth("match_low_quality", True)
    share = ignore_share(part)
    spec = MatcherSpec(
        positive_iou=float(part.number("pos_iou_thr", 0.5)),
        negative_iou=float(part.number("neg_iou_thr", 0.5)),
        low_quality_iou=float(lowest) if claims else None,
        claim_owner="claimer" if claims else "best",
    )
    part.close()
    return spec if share is None else spec.model_copy(update={"ignore_share": share})


def ignore_share(part: Part) -> float | None:
    """What of a reference must lie in an ignore region; None where the config leaves these regions unused."""
    threshold = part.number("ignore_iof_thr", -1)
    if threshold > 1:
        part.refuse("ignore_iof_thr", "a share of a box, at most 1")
    elif threshold > 0:
        return float(threshold)
    part.ignore("what lies in regions marked as ignored is not trained as background here", "ignore_iof_thr")
    return None


def _overlaps(part: Part) -> None:
    calculator = part.part("iou_calculator")
    calculator.only("type", "BboxOverlaps2D")
    calculator.close()


def sampler(part: Part, *, total: int, share: float, joins_truth: bool) -> SamplerSpec | HardExampleSamplerSpec:
    kind = part.kind("RandomSampler")
    if kind == "PseudoSampler":
        part.ignore("a PseudoSampler takes all", "num", "pos_fraction", "neg_pos_ub", "add_gt_as_proposals")
        part.close()
        return EverySamplerSpec()
    if kind not in {"RandomSampler", "OHEMSampler"}:
        part.refuse("type", "here it is RandomSampler, PseudoSampler or OHEMSampler")
    part.only("neg_pos_ub", -1, why="negatives are not bounded by the positives here")
    part.only("add_gt_as_proposals", joins_truth)
    count, positive = part.whole("num", total), float(part.number("pos_fraction", share))
    part.close()
    make = HardExampleSamplerSpec if kind == "OHEMSampler" else BalancedSamplerSpec
    return make(total=count, positive_fraction=positive)


# --------------------------------------------------------------------------------------------------------------- losses


def focal_loss(part: Part) -> None:
    """It must be the one that the heads here have."""
    part.only("type", "FocalLoss")
    part.only("use_sigmoid", True)
    part.only("gamma", 2.0)
    part.only("alpha", 0.25)
    part.only("loss_weight", 1.0)
    part.close()


def cross_entropy(part: Part, *, sigmoid: bool) -> None:
    part.only("type", "CrossEntropyLoss")
    part.only("use_sigmoid", sigmoid)
    part.only("use_mask", False)
    part.only("loss_weight", 1.0)
    part.only("class_weight", None)
    part.close()


def delta_loss(part: Part) -> BoxLossSpec:
    """A loss of deltas, of weight one."""
    kind = part.kind("L1Loss")
    beta = part.number("beta", 1.0)
    if part.number("loss_weight", 1.0) != 1.0:
        part.refuse("loss_weight", "losses of deltas have weight 1 here")
    if kind not in {"L1Loss", "SmoothL1Loss"}:
        part.refuse("type", "of deltas, here it is L1Loss or SmoothL1Loss")
    part.close()
    return SmoothL1Spec(beta=float(beta)) if kind == "SmoothL1Loss" else L1Spec()


OverlapLoss = Literal["iou", "linear_iou", "giou"]


def overlap_loss(part: Part, default: str) -> tuple[OverlapLoss, float]:
    """A loss of decoded boxes and its weight."""
    kind, weight = part.kind(default), float(part.number("loss_weight", 1.0))
    mode = part.text("mode", "linear" if part.truth("linear", False) else "log")
    part.ignore(FIXED, "eps")
    found: dict[tuple[str, str], OverlapLoss] = {("IoULoss", "log"): "iou", ("IoULoss", "linear"): "linear_iou"}
    name = "giou" if kind == "GIoULoss" else found.get((kind, mode))
    if name is None:
        part.refuse("type" if kind != "IoULoss" else "mode", "of boxes, here it is IoULoss (log, linear) or GIoULoss")
    part.close()
    return name or "giou", weight


# ------------------------------------------------------------------------------------------------------- norms and NMS


def head_norm(part: Part, default: HeadNorm) -> HeadNorm:
    """Of a head's convolutions, from `norm_cfg`."""
    if "norm_cfg" not in part:
        return default
    if part.peek("norm_cfg") is None:
        part.take("norm_cfg")
        return "none"
    norm = part.part("norm_cfg")
    kinds: dict[str, HeadNorm] = {"GN": "group", "BN": "batch", "SyncBN": "sync"}
    kind = norm.kind()
    if kind not in kinds:
        norm.refuse("type", "a head's norm here is GN, BN or SyncBN")
    norm.only("num_groups", 32)
    norm.only("requires_grad", True)
    norm.close()
    return kinds.get(kind, default)


def nms(part: Part, default: float) -> tuple[float, SoftNMSSpec | None]:
    """The overlap, and how scores are lowered where boxes are not dropped for it. Old names: nms_thr, iou_thr."""
    old = part.number("nms_thr", default)
    inner = part.part("nms")
    kind = inner.kind("nms")
    overlap = inner.number("iou_threshold", inner.number("iou_thr", old))
    inner.ignore("a matter of speed", "split_thr")
    inner.only("class_agnostic", False)
    soft = None
    if kind == "soft_nms":
        method = inner.text("method", "linear")
        if method not in {"linear", "gaussian"}:
            inner.refuse("method", "linear or gaussian")
        soft = SoftNMSSpec(
            decay="gaussian" if method == "gaussian" else "linear",
            sigma=float(inner.number("sigma", 0.5)),
            min_score=float(inner.number("min_score", 1e-3)),
        )
    elif kind != "nms":
        inner.refuse("type", "nms or soft_nms")
    inner.close()
    return float(overlap), soft


def min_side_px(part: Part, default: float) -> float:
    side = part.number("min_bbox_size", default)
    return POSITIVE_SIDE_PX if side == 0 else float(max(side, 0.0))
