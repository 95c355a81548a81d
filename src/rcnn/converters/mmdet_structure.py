"""What the keys and shapes of an MMDetection state dict say of its detector: layers, widths, classes.

Letters: A anchors per cell, K classes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from rcnn.backbones.resnet import BLOCKS, Depth
from rcnn.errors import CheckpointError, Problem

HeadKind = Literal["rpn", "retinanet", "fcos", "atss", "gfl"]
HeadNorm = Literal["group", "batch", "none"]
Extra = Literal["pool", "convs_on_p5", "convs_on_c5", "none"]

# A key, without the head's prefix, that only this kind has.
SIGNS: dict[str, HeadKind] = {
    "rpn_cls.weight": "rpn",
    "retina_cls.weight": "retinanet",
    "conv_centerness.weight": "fcos",
    "atss_cls.weight": "atss",
    "gfl_cls.weight": "gfl",
}

# Keys of parts that are not built here, and what they are called.
_REFUSED = {
    r".*conv2?_offset.*": "deformable convolutions (DCN)",
    r"backbone\.stem\..*|backbone\..*\.downsample\.2\..*": "a ResNet with another stem or shortcut (V1c, V1d, ResNeSt)",
    r"backbone\.(.*\.)?gn\d?\..*": "group norms in the backbone",
    r"backbone\..*(attention|context)_block.*": "attention or context blocks in the backbone",
    r"backbone\..*\.convs\.\d.*": "a Res2Net",
    r"backbone\.(stages|patch_embed|layers|stage\d|transition\d|blocks|features)\..*": "a backbone other than ResNet",
    r"neck\.(downsample_convs|pafpn_convs)\..*": "a path aggregation pyramid (PAFPN)",
    r"neck\.\d+\..*": "several necks after one another",
    r"neck\..*_convs\.\d+\.gn\..*": "group norms in the pyramid",
    r"roi_head\.shared_head\..*": "a second stage of the backbone's last layer (C4)",
    r"roi_head\.(grid|semantic|keypoint|point)_head\..*": "grids, segments or key points",
    r"roi_head\.bbox_head\.(\d+\.)?(cls|reg)_(fcs|convs)\..*": "layers for classes and boxes apart in the second stage",
    r"roi_head\.bbox_head\.(\d+\.)?(fc_branch|conv_branch|res_block)\..*": "a double head",
    r"roi_head\.bbox_head\.(\d+\.)?shared_convs\.\d+\.gn\..*": "group norms in the second stage",
    r"(teacher|student)\..*": "a teacher and a student",
    r"ema_.*": "averaged weights beside those of the training (ema_)",
}


@dataclass(frozen=True, kw_only=True)
class PyramidStructure:
    """From which of the backbone's maps on, and what extends it."""

    first_map: int
    channels: int
    extra: Extra
    norm: Literal["none", "batch"]
    num_levels: int


@dataclass(frozen=True, kw_only=True)
class HeadStructure:
    """A dense head of `num_classes`, `num_anchors` in each cell (1 where it has points)."""

    kind: HeadKind
    num_convs: int
    channels: int
    norm: HeadNorm
    conv_bias: bool
    num_anchors: int
    num_classes: int
    softmax: bool = False
    max_distance: int = 0
    """GFL's largest distance, in strides."""


@dataclass(frozen=True, kw_only=True)
class RegionStructure:
    """The second stage: `stages` of a cascade, 0 for one alone."""

    stages: int
    num_classes: int
    agnostic: bool
    pooled_size: int
    features: int
    num_convs: int
    conv_channels: int
    norm: Literal["none", "batch"]


@dataclass(frozen=True, kw_only=True)
class Structure:
    """A detector. Without `head` its proposals are given (Fast R-CNN); without `regions` it has one stage."""

    depth: Depth
    pyramid: PyramidStructure
    head: HeadStructure | None
    regions: RegionStructure | None

    @property
    def is_first_stage(self) -> bool:
        """The RPN detector. A one-stage head of one class may be one too: its keys cannot tell."""
        return self.regions is None and self.head is not None and self.head.kind == "rpn"


def head_prefix(state: Mapping[str, Tensor]) -> str:
    """Two-stage detectors keep their first stage as `rpn_head`, one-stage ones their head as `bbox_head`."""
    return "rpn_head" if any(key.startswith("rpn_head.") for key in state) else "bbox_head"


def head_kind(state: Mapping[str, Tensor]) -> HeadKind | None:
    """Which dense head the (modern) keys are of; None where there is none, or none that is known here."""
    prefix = head_prefix(state)
    return next((kind for sign, kind in SIGNS.items() if f"{prefix}.{sign}" in state), None)


def has_given_proposals(state: Mapping[str, Tensor]) -> bool:
    """Fast R-CNN: a second stage and no first one."""
    return any(key.startswith("roi_head.") for key in state) and not any(
        key.startswith(("rpn_head.", "bbox_head.")) for key in state
    )


def num_stages(state: Mapping[str, Tensor]) -> int:
    """Stages of a cascade; 0 for one second stage, or none."""
    return len({key.split(".")[2] for key in state if re.match(r"roi_head\.bbox_head\.\d+\.", key)})


def read_structure(state: Mapping[str, Tensor]) -> Structure:
    """What the (modern) keys and shapes say. Raises `CheckpointError` with each part that cannot be built here."""
    problems = list(_refused(state))
    if problems:
        raise CheckpointError(problems)
    shapes = _Shapes(state)
    kind, has_regions = head_kind(state), any(key.startswith("roi_head.") for key in state)
    if kind is None and not has_given_proposals(state):
        raise CheckpointError(unknown_head(state))
    depth = _depth(shapes)
    head = None if kind is None else _head(shapes, kind, f"{head_prefix(state)}.")
    return Structure(
        depth=depth,
        pyramid=_pyramid(shapes, depth, head),
        head=head,
        regions=_regions(shapes, num_stages(state)) if has_regions else None,
    )


def unknown_head(state: Mapping[str, Tensor]) -> Problem:
    """What to say of keys that `head_kind` does not know."""
    prefix = head_prefix(state)
    return Problem(
        where="the keys",
        given=f"{len(state)} of them, with none that marks a head; first {sorted(state)[:3]}",
        allowed=f"a state dict of MMDetection with one of {', '.join(f'{prefix}.{sign}' for sign in SIGNS)}",
    )


def _refused(state: Mapping[str, Tensor]) -> Iterator[Problem]:
    """One problem for each kind of part."""
    for pattern, name in _REFUSED.items():
        found = [key for key in state if re.fullmatch(pattern, key)]
        if found:
            more = f" (and {len(found) - 1} more keys)" if len(found) > 1 else ""
            yield Problem(where=found[0], given=f"{name}{more}", allowed="a ResNet with FPN, boxes alone")


class _Shapes:
    """Shapes by key; what is missing or has other dimensions is a `CheckpointError`."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = state

    def of(self, key: str, dimensions: int) -> tuple[int, ...]:
        if key not in self.state:
            raise CheckpointError(Problem(where=key, given="missing", allowed=f"a tensor of {dimensions} dimensions"))
        shape = tuple(self.state[key].shape)
        if len(shape) != dimensions or 0 in shape:
            raise CheckpointError(Problem(where=key, given=f"shape {shape}", allowed=f"{dimensions} dimensions"))
        return shape

    def count(self, prefix: str) -> int:
        """How many numbers follow `prefix`."""
        numbers = (re.match(rf"{re.escape(prefix)}(\d+)\.", key) for key in self.state)
        return len({match[1] for match in numbers if match})

    def norm(self, convolution: str) -> HeadNorm:
        """That of one of MMCV's ConvModules."""
        if f"{convolution}.gn.weight" in self.state:
            return "group"
        return "batch" if f"{convolution}.bn.weight" in self.state else "none"


def _depth(shapes: _Shapes) -> Depth:
    counts = tuple(shapes.count(f"backbone.layer{layer}.") for layer in range(1, 5))
    is_bottleneck = "backbone.layer1.0.conv3.weight" in shapes.state
    depths: dict[tuple[int, ...], Depth] = {blocks: d for d, blocks in BLOCKS.items() if (d >= 50) == is_bottleneck}
    depth = depths.get(counts)
    middle = shapes.of("backbone.layer1.0.conv2.weight", 4)
    if depth is None or middle[0] != middle[1] or middle[0] != 64:
        given = f"layers of {counts} {'bottlenecks' if is_bottleneck else 'blocks'}"
        if middle[0] != 64 or middle[1] != 64:
            given += f" with a 3x3 convolution of shape {middle}: a ResNeXt or a RegNet"
        allowed = f"a ResNet of depth {', '.join(map(str, BLOCKS))}"
        raise CheckpointError(Problem(where="backbone", given=given, allowed=allowed))
    return depth


def _pyramid(shapes: _Shapes, depth: Depth, head: HeadStructure | None) -> PyramidStructure:
    widths = [width * (4 if depth >= 50 else 1) for width in (64, 128, 256, 512)]
    laterals, outputs = shapes.count("neck.lateral_convs."), shapes.count("neck.fpn_convs.")
    channels, first_width, *_ = shapes.of("neck.lateral_convs.0.conv.weight", 4)
    first_map = widths.index(first_width) if first_width in widths else -1
    if first_map < 0 or laterals != 4 - first_map or outputs - laterals not in (0, 2):
        given = f"{laterals} lateral convolutions from {first_width} channels on and {outputs} output convolutions"
        allowed = (
            f"one for each of the backbone's maps up to the last ({widths} channels), and two extra levels or none"
        )
        raise CheckpointError(Problem(where="neck", given=given, allowed=allowed))
    extra, num_levels = _extra(shapes, laterals, outputs, channels, first_map, head)
    norm = shapes.norm("neck.lateral_convs.0")
    return PyramidStructure(
        first_map=first_map,
        channels=channels,
        extra=extra,
        norm="batch" if norm == "batch" else "none",
        num_levels=num_levels,
    )


def _extra(
    shapes: _Shapes, laterals: int, outputs: int, channels: int, first_map: int, head: HeadStructure | None
) -> tuple[Extra, int]:
    """What extends the pyramid, and its levels in all."""
    if outputs > laterals:
        source = shapes.of(f"neck.fpn_convs.{laterals}.conv.weight", 4)[1]
        last = shapes.of(f"neck.lateral_convs.{laterals - 1}.conv.weight", 4)[1]
        return ("convs_on_c5" if source == last and source != channels else "convs_on_p5"), outputs
    scales = shapes.count(f"{head_prefix(shapes.state)}.scales.") if head is not None else 0
    if first_map > 0 and scales != laterals:
        raise CheckpointError(
            Problem(
                where="neck",
                given="a pyramid from C3 up without convolutions for its extra levels",
                allowed="add_extra_convs, or a pyramid from C2 up",
            )
        )
    return ("none", laterals) if scales == laterals else ("pool", laterals + 1)


# The class convolution, the box convolution, and how many rows the latter has for one anchor or point.
_OUTPUTS: dict[HeadKind, tuple[str, str]] = {
    "rpn": ("rpn_cls", "rpn_reg"),
    "retinanet": ("retina_cls", "retina_reg"),
    "fcos": ("conv_cls", "conv_reg"),
    "atss": ("atss_cls", "atss_reg"),
    "gfl": ("gfl_cls", "gfl_reg"),
}


def _head(shapes: _Shapes, kind: HeadKind, prefix: str) -> HeadStructure:
    classes, boxes = (f"{prefix}{name}.weight" for name in _OUTPUTS[kind])
    class_rows, channels, *_ = shapes.of(classes, 4)
    box_rows = shapes.of(boxes, 4)[0]
    per_anchor = box_rows if kind == "gfl" else 4
    num_anchors = box_rows // per_anchor
    if box_rows % 4 or class_rows % max(num_anchors, 1) or not num_anchors:
        given = f"{class_rows} rows of classes and {box_rows} of boxes"
        raise CheckpointError(Problem(where=classes, given=given, allowed="as many for each anchor of a cell"))
    num_classes = class_rows // num_anchors
    if kind == "rpn":
        num_convs = shapes.count(f"{prefix}rpn_conv.") or 1
        norm, conv_bias = "none", True
        if num_classes > 2:
            given = f"{num_classes} outputs for each anchor"
            raise CheckpointError(Problem(where=classes, given=given, allowed="1 (sigmoid) or 2 (softmax)"))
    else:
        num_convs = shapes.count(f"{prefix}cls_convs.")
        norm = shapes.norm(f"{prefix}cls_convs.0")
        conv_bias = f"{prefix}cls_convs.0.conv.bias" in shapes.state
    return HeadStructure(
        kind=kind,
        num_convs=num_convs,
        channels=channels,
        norm=norm,
        conv_bias=conv_bias,
        num_anchors=num_anchors,
        num_classes=1 if kind == "rpn" else num_classes,
        softmax=kind == "rpn" and num_classes == 2,
        max_distance=box_rows // 4 - 1 if kind == "gfl" else 0,
    )


def _regions(shapes: _Shapes, stages: int) -> RegionStructure:
    """Of a cascade the first stage's: its other ones differ in their numbers alone, or do not fit."""
    prefix = "roi_head.bbox_head.0." if stages else "roi_head.bbox_head."
    class_rows, features = shapes.of(f"{prefix}fc_cls.weight", 2)
    box_rows = shapes.of(f"{prefix}fc_reg.weight", 2)[0]
    num_convs, num_layers = shapes.count(f"{prefix}shared_convs."), shapes.count(f"{prefix}shared_fcs.")
    if num_layers != (1 if num_convs else 2):
        given = f"{num_convs} convolutions and {num_layers} fully connected layers"
        allowed = "two fully connected layers (Shared2FC), or convolutions and one (Shared4Conv1FC)"
        raise CheckpointError(Problem(where=f"{prefix}shared_fcs", given=given, allowed=allowed))
    if box_rows not in (4, 4 * (class_rows - 1)) or class_rows < 2:
        given = f"{class_rows} rows of classes and {box_rows} of boxes"
        allowed = "one more class for background, and boxes for each class or one for all"
        raise CheckpointError(Problem(where=f"{prefix}fc_cls.weight", given=given, allowed=allowed))
    conv_channels = shapes.of(f"{prefix}shared_convs.0.conv.weight", 4)[0] if num_convs else 0
    in_channels = conv_channels or shapes.of("neck.lateral_convs.0.conv.weight", 4)[0]
    columns = shapes.of(f"{prefix}shared_fcs.0.weight", 2)[1]
    pooled_size = round((columns / in_channels) ** 0.5)
    norm = shapes.norm(f"{prefix}shared_convs.0")
    return RegionStructure(
        stages=stages,
        num_classes=class_rows - 1,
        # One class: the boxes of each class, or one for all, are the same.
        agnostic=box_rows == 4 and (class_rows > 2 or stages > 0),
        pooled_size=max(pooled_size, 1),
        features=features,
        num_convs=num_convs,
        conv_channels=conv_channels,
        norm="batch" if norm == "batch" else "none",
    )
