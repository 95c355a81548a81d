"""MMDetection's dense heads as ours: RPNHead, RetinaHead, FCOSHead, ATSSHead and GFLHead."""

from __future__ import annotations

from collections.abc import Callable

from rcnn.recipes.heads import (
    ATSSMatcherSpec,
    ATSSSpec,
    CentreMatcherSpec,
    DenseHeadSpec,
    FCOSSpec,
    GFLSpec,
    RetinaNetSpec,
    RPNSpec,
)
from rcnn.recipes.mmdetection.ledger import Part, is_number
from rcnn.recipes.mmdetection.parts import (
    DERIVED,
    anchors,
    coder,
    cross_entropy,
    delta_loss,
    focal_loss,
    head_norm,
    ignore_share,
    iou_matcher,
    overlap_loss,
    sampler,
    square_anchor_scale,
    strides,
)
from rcnn.recipes.mmdetection.trunk import Trunk
from rcnn.recipes.parts import BalancedSamplerSpec, EverySamplerSpec

_START = "how layers start that no file brings is fixed here"
_CLASSES = "the classes are those of the data"


def dense_head(head: Part, training: Part, trunk: Trunk, *, fixed_padding: bool) -> DenseHeadSpec:
    """`rpn_head` or `bbox_head` with its `train_cfg`. `fixed_padding`: what pads a picture counts as part of it."""
    makers: dict[str, Callable[[Part, Part, Trunk, bool], DenseHeadSpec]] = {
        "RPNHead": _rpn,
        "RetinaHead": _retinanet,
        "FCOSHead": _fcos,
        "ATSSHead": _atss,
        "GFLHead": _gfl,
    }
    kind = head.kind()
    if kind not in makers:
        raise head.fail("type", list(makers))
    head.ignore(DERIVED, "in_channels")
    head.ignore(_CLASSES, "num_classes")
    head.ignore(_START, "init_cfg")
    spec = makers[kind](head, training, trunk, fixed_padding)
    head.close()
    training.close()
    return spec


def _common_training(training: Part, *, border: bool = False) -> float | None:
    """What is the same for all heads; the border in pixels that anchors may not pass."""
    training.only("pos_weight", -1)
    training.only("debug", False)
    limit = training.number("allowed_border", -1)
    if limit >= 0 and not border:
        training.refuse("allowed_border", "of this head all anchors are trained")
    return float(limit) if limit >= 0 else None


def _rpn(head: Part, training: Part, trunk: Trunk, fixed_padding: bool) -> RPNSpec:
    width = head.whole("feat_channels", 256)
    channels = getattr(trunk.neck, "channels", None)
    classes = head.part("loss_cls")
    by_softmax = classes.peek("use_sigmoid") is False
    cross_entropy(classes, sigmoid=not by_softmax)
    head.only("reg_decoded_bbox", False)
    border = _common_training(training, border=True)
    chosen = sampler(training.part("sampler"), total=256, share=0.5, joins_truth=False)
    if not isinstance(chosen, BalancedSamplerSpec | EverySamplerSpec):
        training.refuse("sampler", "of anchors, here it is RandomSampler or PseudoSampler")
        chosen = BalancedSamplerSpec()
    return RPNSpec(
        num_convs=head.whole("num_convs", 1),
        # A single map has the backbone's width, which MMDetection's configs repeat for the head.
        channels=None if channels in (None, width) else width,
        anchors=anchors(head.part("anchor_generator"), trunk.strides_px),
        matcher=iou_matcher(training.part("assigner")),
        sampler=chosen,
        coder=coder(head.part("bbox_coder")),
        box_loss=delta_loss(head.part("loss_bbox")),
        objectness="softmax" if by_softmax else "sigmoid",
        border_px=border,
        border_ends="excluded",
        beyond_picture="negative" if fixed_padding else "left_out",
        loss_count="at_least_one_positive",
    )


def _retinanet(head: Part, training: Part, trunk: Trunk, fixed_padding: bool) -> RetinaNetSpec:
    head.only("reg_decoded_bbox", False)
    focal_loss(head.part("loss_cls"))
    _common_training(training)
    _takes_all(training)
    default = RetinaNetSpec()
    of_levels = anchors(head.part("anchor_generator"), trunk.strides_px)
    usual = tuple(tuple(stride * 4 * 2 ** (i / 3) for i in range(3)) for stride in trunk.strides_px)
    is_usual = of_levels.sizes_px == usual and of_levels.heights_over_widths == (0.5, 1.0, 2.0)
    return RetinaNetSpec(
        num_convs=head.whole("stacked_convs", 4),
        channels=head.whole("feat_channels", 256),
        norm=head_norm(head, "none"),
        anchors=None if is_usual else of_levels,
        matcher=iou_matcher(training.part("assigner")) if "assigner" in training else default.matcher,
        coder=coder(head.part("bbox_coder")),
        box_loss=delta_loss(head.part("loss_bbox")),
        beyond_picture="negative" if fixed_padding else "left_out",
    )


def _fcos(head: Part, training: Part, trunk: Trunk, fixed_padding: bool) -> FCOSSpec:
    training.ignore("FCOS matches by points", "assigner", "sampler", "allowed_border", "pos_weight", "debug")
    strides(head, trunk.strides_px)
    focal_loss(head.part("loss_cls"))
    cross_entropy(head.part("loss_centerness"), sigmoid=True)
    box_loss, weight = overlap_loss(head.part("loss_bbox"), "IoULoss")
    if weight != 1.0:
        head.refuse("loss_bbox", "the loss of boxes has weight 1 here")
    head.only("dcn_on_last_conv", False)
    head.only("conv_cfg", None)
    _no_distance_coder(head)
    bias = head.take("conv_bias", "auto")
    radius = head.number("center_sample_radius", 1.5)
    return FCOSSpec(
        num_convs=head.whole("stacked_convs", 4),
        channels=head.whole("feat_channels", 256),
        norm=head_norm(head, "group"),
        conv_bias=bias if isinstance(bias, bool) else None,
        centerness_branch="boxes" if head.truth("centerness_on_reg", False) else "classes",
        distances="relu" if head.truth("norm_on_bbox", False) else "exp",
        matcher=CentreMatcherSpec(
            radius_strides=float(radius) if head.truth("center_sampling", False) else None,
            range_strides=_range_strides(head, trunk),
        ),
        box_loss=box_loss,
    )


def _range_strides(head: Part, trunk: Trunk) -> float:
    """The ranges of the levels end at 8 strides, unless the config says otherwise."""
    given = head.take("regress_ranges")
    if given is None:
        return 8.0
    fits = isinstance(given, list) and len(given) == len(trunk.strides_px)
    if fits and all(isinstance(pair, list) and len(pair) == 2 and all(map(is_number, pair)) for pair in given):
        starts, ends = [pair[0] for pair in given], [pair[1] for pair in given]
        factors = {end / stride for end, stride in zip(ends[:-1], trunk.strides_px[:-1], strict=True)}
        if len(factors) == 1 and ends[-1] >= 1e8 and starts[1:] == ends[:-1] and starts[0] <= 0:
            return float(factors.pop())
    head.refuse("regress_ranges", "each level ends where the next begins, at the same number of its strides")
    return 8.0


def _atss(head: Part, training: Part, trunk: Trunk, fixed_padding: bool) -> ATSSSpec:
    focal_loss(head.part("loss_cls"))
    cross_entropy(head.part("loss_centerness"), sigmoid=True)
    head.only("reg_decoded_bbox", True, False)
    head.only("pred_kernel_size", 3)
    head.only("conv_cfg", None)
    return ATSSSpec(
        num_convs=head.whole("stacked_convs", 4),
        channels=head.whole("feat_channels", 256),
        norm=head_norm(head, "group"),
        anchor_scale=square_anchor_scale(head.part("anchor_generator"), trunk.strides_px),
        matcher=_atss_matcher(training, fixed_padding),
        coder=coder(head.part("bbox_coder")),
        box_weight=_giou_weight(head),
    )


def _gfl(head: Part, training: Part, trunk: Trunk, fixed_padding: bool) -> GFLSpec:
    quality = head.part("loss_cls")
    quality.only("type", "QualityFocalLoss")
    quality.only("use_sigmoid", True)
    quality.only("beta", 2.0)
    quality.only("loss_weight", 1.0)
    quality.close()
    distribution = head.part("loss_dfl")
    distribution.only("type", "DistributionFocalLoss")
    weight = float(distribution.number("loss_weight", 0.25))
    distribution.close()
    head.only("conv_cfg", None)
    _no_distance_coder(head)
    return GFLSpec(
        num_convs=head.whole("stacked_convs", 4),
        channels=head.whole("feat_channels", 256),
        norm=head_norm(head, "group"),
        max_distance=head.whole("reg_max", 16),
        anchor_scale=square_anchor_scale(head.part("anchor_generator"), trunk.strides_px),
        matcher=_atss_matcher(training, fixed_padding),
        box_weight=_giou_weight(head),
        distribution_weight=weight,
    )


def _giou_weight(head: Part) -> float:
    kind, weight = overlap_loss(head.part("loss_bbox"), "GIoULoss")
    if kind != "giou":
        head.refuse("loss_bbox", "the loss of boxes is GIoULoss here")
    return weight


def _atss_matcher(training: Part, fixed_padding: bool) -> ATSSMatcherSpec:
    _common_training(training)
    _takes_all(training)
    assigner = training.part("assigner")
    assigner.only("type", "ATSSAssigner")
    assigner.only("alpha", None)
    calculator = assigner.part("iou_calculator")
    calculator.only("type", "BboxOverlaps2D")
    calculator.close()
    share = ignore_share(assigner)
    count = assigner.whole("topk", 9)
    assigner.close()
    return ATSSMatcherSpec(candidates_per_level=count, ignore_share=share)


def _takes_all(training: Part) -> None:
    if "sampler" not in training:
        return
    if not isinstance(sampler(training.part("sampler"), total=256, share=0.5, joins_truth=False), EverySamplerSpec):
        training.refuse("sampler", "this head trains on all that is matched: PseudoSampler")


def _no_distance_coder(head: Part) -> None:
    inner = head.part("bbox_coder")
    inner.only("type", "DistancePointBBoxCoder")
    inner.only("clip_border", True)
    inner.close()
