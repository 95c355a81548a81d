"""MMDetection's RoI heads as ours: StandardRoIHead and CascadeRoIHead, with their box heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from rcnn.recipes.mmdetection.ledger import Part
from rcnn.recipes.mmdetection.parts import (
    DERIVED,
    FIXED,
    BoxLoss,
    coder,
    cross_entropy,
    delta_loss,
    iou_matcher,
    nms,
    overlap_loss,
    sampler,
    strides,
)
from rcnn.recipes.mmdetection.trunk import Trunk
from rcnn.recipes.parts import DeltaCoderSpec, MatcherSpec, SamplerSpec
from rcnn.recipes.regions import (
    BoxHeadSpec,
    CascadeSpec,
    CascadeStepSpec,
    ConvFCSpec,
    DecodedBoxLossSpec,
    HardExampleSamplerSpec,
    LevelMapSpec,
    PoolingSpec,
    Res5Spec,
    RoIAlignSpec,
    RoIPoolSpec,
    RoISpec,
    TwoFCSpec,
)

_STDS = (0.1, 0.1, 0.2, 0.2)
_CLASSES = "the classes are those of the data"
_START = "how layers start that no file brings is fixed here"


def regions(head: Part, training: list[Part], testing: Part, trunk: Trunk) -> RoISpec | CascadeSpec:
    """`roi_head` with `train_cfg.rcnn` (a cascade's has one dict per stage) and `test_cfg.rcnn`."""
    kind = head.kind("StandardRoIHead")
    if kind not in {"StandardRoIHead", "CascadeRoIHead"}:
        raise head.fail("type", ("StandardRoIHead", "CascadeRoIHead"))
    head.ignore(_START, "init_cfg")
    weights = head.numbers("stage_loss_weights", (1.0,))
    count = head.whole("num_stages", len(weights))
    res5 = _shared_head(head, trunk)
    pooling = _pooling(head, trunk, halved=res5)
    stages = [_box_head(part, res5) for part in head.parts("bbox_head")]
    filters = _filters(testing)
    head.close()
    steps = [_training(part) for part in training]
    if kind == "StandardRoIHead":
        return _single(head, pooling, stages, steps, filters)
    stages = stages * len(steps) if len(stages) == 1 else stages
    if not len(stages) == len(steps) == len(weights) == count:
        raise head.fail(
            "num_stages", [f"{len(stages)} box heads, {len(steps)} of train_cfg.rcnn, {len(weights)} weights"]
        )
    return _cascade(head, pooling, stages, steps, weights, filters)


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """One box head: its layers, what is the same for all stages of a cascade, and its coder."""

    box_head: BoxHeadSpec
    regression: Literal["per_class", "agnostic"]
    box_loss: BoxLoss
    coder: DeltaCoderSpec


@dataclass(frozen=True, kw_only=True)
class _Step:
    """The training of one stage."""

    matcher: MatcherSpec
    sampler: SamplerSpec | HardExampleSamplerSpec


def _single(
    head: Part, pooling: PoolingSpec, stages: list[_Stage], steps: list[_Step], filters: dict[str, Any]
) -> RoISpec:
    if len(stages) != 1 or len(steps) > 1:
        raise head.fail("bbox_head", [f"one dict, and one in train_cfg.rcnn ({len(stages)} and {len(steps)})"])
    (stage,) = stages
    taught = {"matcher": steps[0].matcher, "sampler": steps[0].sampler} if steps else {}
    return RoISpec(
        pooling=pooling,
        box_head=stage.box_head,
        regression=stage.regression,
        box_loss=stage.box_loss,
        coder=stage.coder,
        min_side_px=0.0,
        **taught,
        **filters,
    )


def _cascade(
    head: Part,
    pooling: PoolingSpec,
    stages: list[_Stage],
    steps: list[_Step],
    weights: tuple[float, ...],
    filters: dict[str, Any],
) -> CascadeSpec:
    first = stages[0]
    for name in ("box_head", "regression", "box_loss"):
        if any(getattr(stage, name) != getattr(first, name) for stage in stages):
            head.refuse("bbox_head", f"the stages of a cascade have one {name} here")
    common = steps[0].sampler
    return CascadeSpec(
        pooling=pooling,
        box_head=first.box_head,
        regression=first.regression,
        box_loss=first.box_loss,
        sampler=common,
        min_side_px=0.0,
        average="logits",
        stages=tuple(
            CascadeStepSpec(
                matcher=step.matcher,
                coder=stage.coder,
                loss_weight=float(weight),
                sampler=None if step.sampler == common else step.sampler,
            )
            for stage, step, weight in zip(stages, steps, weights, strict=True)
        ),
        **filters,
    )


def _pooling(head: Part, trunk: Trunk, *, halved: bool) -> PoolingSpec:
    extractor = head.part("bbox_roi_extractor")
    extractor.only("type", "SingleRoIExtractor")
    extractor.ignore(DERIVED, "out_channels")
    strides(extractor, trunk.pooled_strides_px, "featmap_strides")
    # Boxes of up to twice this size come from the finest map, whatever its stride.
    level_map = LevelMapSpec(
        canonical_size_px=float(extractor.number("finest_scale", 56)),
        canonical_level=0,
        epsilon_place="inside",
        count="by_position",
    )
    layer = extractor.part("roi_layer")
    kind = layer.kind()
    size = layer.wholes("output_size", (7,))
    if len(set(size)) != 1:
        layer.refuse("output_size", "regions are square here")
    side = size[0]
    layer.ignore(FIXED, "use_torchvision")
    pooling: PoolingSpec
    if kind == "RoIPool":
        pooling = RoIPoolSpec(output_size=side, level_map=level_map)
    elif kind == "RoIAlign":
        layer.only("pool_mode", "avg")
        pooling = RoIAlignSpec(
            output_size=side,
            sampling_ratio=layer.whole("sampling_ratio", 0),
            aligned=layer.truth("aligned", True),
            level_map=level_map,
        )
    else:
        raise layer.fail("type", ("RoIAlign", "RoIPool"))
    layer.close()
    extractor.close()
    return pooling


def _shared_head(head: Part, trunk: Trunk) -> bool:
    """Whether the regions go through the last stage of the ResNet (C4)."""
    if head.peek("shared_head") is None:
        head.take("shared_head")
        return False
    shared = head.part("shared_head")
    if shared.kind() != "ResLayer":
        raise shared.fail("type", ("ResLayer",))
    shared.only("depth", trunk.backbone.depth)
    shared.only("stage", 3)
    shared.only("stride", 2)
    shared.only("dilation", 1)
    shared.only("style", trunk.backbone.style)
    shared.only("norm_eval", trunk.backbone.norm in {"frozen", "fixed_statistics"})
    norm = shared.part("norm_cfg")
    norm.only("type", "BN", "SyncBN")
    norm.only("requires_grad", trunk.backbone.norm != "frozen")
    norm.close()
    shared.ignore("it starts from the file of the backbone", "init_cfg", "pretrained")
    shared.ignore("a matter of memory", "with_cp")
    shared.only("dcn", None)
    shared.close()
    return True


# ------------------------------------------------------------------------------------------------------------ box heads


def _box_head(part: Part, res5: bool) -> _Stage:
    part.ignore(DERIVED, "in_channels", "roi_feat_size")
    part.ignore(_CLASSES, "num_classes")
    part.ignore(_START, "init_cfg")
    kind = part.kind()
    box_head = _layers(part, kind, res5)
    cross_entropy(part.part("loss_cls"), sigmoid=False)
    part.ignore(FIXED, "with_cls", "with_reg")
    agnostic = part.truth("reg_class_agnostic", False)
    loss = part.part("loss_bbox")
    box_loss: BoxLoss
    if part.truth("reg_decoded_bbox", False):
        name, weight = overlap_loss(loss, "GIoULoss")
        box_loss = DecodedBoxLossSpec(type=name, weight=weight)
    else:
        box_loss = delta_loss(loss)
    stage = _Stage(
        box_head=box_head,
        regression="agnostic" if agnostic else "per_class",
        box_loss=box_loss,
        coder=coder(part.part("bbox_coder"), _STDS),
    )
    part.close()
    return stage


def _layers(part: Part, kind: str, res5: bool) -> BoxHeadSpec:
    if res5 and kind == "BBoxHead":
        part.only("with_avg_pool", True)
        return Res5Spec()
    allowed = ("Shared2FCBBoxHead", "Shared4Conv1FCBBoxHead", "ConvFCBBoxHead")
    if res5 or kind not in allowed:
        raise part.fail("type", ("BBoxHead",) if res5 else allowed)
    shared = {"Shared2FCBBoxHead": (0, 2), "Shared4Conv1FCBBoxHead": (4, 1)}.get(kind, (0, 0))
    convs, fcs = part.whole("num_shared_convs", shared[0]), part.whole("num_shared_fcs", shared[1])
    for key in ("num_cls_convs", "num_cls_fcs", "num_reg_convs", "num_reg_fcs"):
        part.only(key, 0, why="classes and boxes share all layers here")
    part.only("conv_cfg", None)
    features = part.whole("fc_out_channels", 1024)
    if (convs, fcs) == (0, 2):
        part.ignore("without convolutions", "conv_out_channels")
        part.only("norm_cfg", None)
        return TwoFCSpec(features=features)
    if fcs != 1 or convs == 0:
        part.refuse("num_shared_fcs", "two layers, or convolutions and one layer")
    return ConvFCSpec(
        num_convs=max(convs, 1), channels=part.whole("conv_out_channels", 256), features=features, norm=_conv_norm(part)
    )


def _conv_norm(part: Part) -> Literal["none", "batch", "sync"]:
    if part.peek("norm_cfg") is None:
        part.take("norm_cfg")
        return "none"
    norm = part.part("norm_cfg")
    kinds: dict[str, Literal["batch", "sync"]] = {"BN": "batch", "SyncBN": "sync"}
    kind = norm.kind()
    if kind not in kinds:
        norm.refuse("type", "a box head's norm here is BN or SyncBN")
    norm.only("requires_grad", True)
    norm.close()
    return kinds.get(kind, "batch")


# ------------------------------------------------------------------------------------------------- training and filters


def _training(part: Part) -> _Step:
    part.only("pos_weight", -1)
    part.only("debug", False)
    part.ignore("there are no masks here", "mask_size", "mask_thr_binary")
    step = _Step(
        matcher=iou_matcher(part.part("assigner")),
        sampler=sampler(part.part("sampler"), total=512, share=0.25, joins_truth=True),
    )
    part.close()
    return step


def _filters(testing: Part) -> dict[str, Any]:
    """What detections pass, as fields of a region's spec."""
    overlap, soft = nms(testing, 0.5)
    testing.ignore("there are no masks here", "mask_thr_binary")
    limit = testing.whole("max_per_img", 100)
    found = {
        "score_threshold": float(testing.number("score_thr", 0.05)),
        "nms_iou": overlap,
        "soft_nms": soft,
        "max_detections": limit if limit > 0 else None,
    }
    testing.close()
    return found
