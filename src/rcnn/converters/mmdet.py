"""State dicts of MMDetection 2 and 3: how each of their keys becomes ours, and back.

One-stage detectors, and its RPN detector, keep their head as `bbox_head`; two-stage detectors keep the first stage as
`rpn_head` and the second as `roi_head`. Background is the last class in both systems, so no tensor changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from rcnn.converters.key_map import Dropped, KeyMap, Rule
from rcnn.converters.mmdet_structure import (
    HeadKind,
    has_given_proposals,
    head_kind,
    head_prefix,
    num_stages,
    unknown_head,
)
from rcnn.errors import CheckpointError
from rcnn.recipes.recipe import OneStageSpec, Recipe, ResNetSpec

# "frozen" batch norms count no batches; "trained" ones (also with fixed statistics, MMDetection's `norm_eval`) do.
# The keys are the same: a file does not say which its training had (`norm_cfg.requires_grad`).
Norms = Literal["frozen", "trained"]

# The last convolutions of each kind, in MMDetection and here.
_OUTPUTS: dict[HeadKind, dict[str, str]] = {
    "rpn": {"rpn_cls": "classes", "rpn_reg": "deltas"},
    "retinanet": {"retina_cls": "classes", "retina_reg": "deltas"},
    "fcos": {"conv_cls": "classes", "conv_reg": "distances", "conv_centerness": "centerness"},
    "atss": {"atss_cls": "classes", "atss_reg": "deltas", "atss_centerness": "centerness"},
    "gfl": {"gfl_cls": "classes", "gfl_reg": "sides"},
}

_COUNTS = Dropped(pattern=r"backbone\..*num_batches_tracked", reason="a frozen batch norm counts no batches")
_MASKS = Dropped(pattern=r"roi_head\.mask(_iou)?_head\..*", reason="masks: boxes are found here")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """All that the names depend on."""

    head: HeadKind | None
    """None: its proposals are given (Fast R-CNN)."""
    head_prefix: str
    head_place: str
    """Where ours is: `head` or `proposals.head`."""
    num_laterals: int
    one_rpn_conv: bool
    """An RPN's only convolution has no number."""
    cascade_stages: int
    """0: one second stage, or none."""
    box_convs: bool
    frozen: bool
    head_norms: tuple[str, ...] = ("gn", "bn")
    """MMCV's names for a norm behind a head's convolution. Backward, the first is taken."""

    @property
    def key_map(self) -> KeyMap:
        rules = (
            Rule(theirs="backbone.{}", ours="backbone.{}"),
            *_neck_rules(self.num_laterals),
            *(_head_rules(self, self.head) if self.head else ()),
            *_roi_rules(self.cascade_stages, self.box_convs),
        )
        return KeyMap(rules=rules, dropped=(_MASKS, _COUNTS) if self.frozen else (_MASKS,))


def recognise(state: Mapping[str, Tensor], *, norms: Norms, head_place: str | None = None) -> Layout:
    """Which detector the (modern) keys are of, and their table.

    `head_place` is where the dense head goes: by default `proposals.head` for a two-stage detector's and `head` for a
    one-stage one's; a one-stage checkpoint that becomes a first stage names the former.
    Raises `CheckpointError` where the head is none that is known here.
    """
    kind, prefix = head_kind(state), head_prefix(state)
    if kind is None and not has_given_proposals(state):
        raise CheckpointError(unknown_head(state))
    return Layout(
        head=kind,
        head_prefix=prefix,
        head_place=head_place or ("proposals.head" if prefix == "rpn_head" else "head"),
        num_laterals=len({key.split(".")[2] for key in state if key.startswith("neck.lateral_convs.")}),
        one_rpn_conv=f"{prefix}.rpn_conv.weight" in state,
        cascade_stages=num_stages(state),
        box_convs=any(key.startswith("roi_head.") and ".shared_convs." in key for key in state),
        frozen=norms == "frozen",
    )


def key_map_of(state: Mapping[str, Tensor], recipe: Recipe) -> KeyMap:
    """The table of the (modern) keys for a detector of that recipe."""
    detector = recipe.detector
    frozen = isinstance(detector.backbone, ResNetSpec) and detector.backbone.norm == "frozen"
    place = "head" if isinstance(detector, OneStageSpec) else "proposals.head"
    return recognise(state, norms="frozen" if frozen else "trained", head_place=place).key_map


def _neck_rules(num_laterals: int) -> Iterable[Rule]:
    """A pyramid's convolutions; those of its extra levels stand after the others in the same list."""
    for number, name in ((num_laterals, "p6"), (num_laterals + 1, "p7")):
        yield Rule(theirs=f"neck.fpn_convs.{number}.conv.{{}}", ours=f"neck.{name}.{{}}")
    for theirs, ours in (("lateral_convs", "lateral"), ("fpn_convs", "output")):
        yield from _conv_module(f"neck.{theirs}", f"neck.{ours}", ("bn",))


def _conv_module(theirs: str, ours: str, norms: tuple[str, ...]) -> Iterable[Rule]:
    """A list of MMCV's ConvModules: a convolution and, where there is one, its norm."""
    yield Rule(theirs=f"{theirs}.{{}}.conv.{{}}", ours=f"{ours}.{{}}.0.{{}}")
    for norm in norms:
        yield Rule(theirs=f"{theirs}.{{}}.{norm}.{{}}", ours=f"{ours}.{{}}.1.{{}}")


def _head_rules(layout: Layout, kind: HeadKind) -> Iterable[Rule]:
    prefix, tower = layout.head_prefix, f"{layout.head_place}.tower"
    if kind == "rpn" and layout.one_rpn_conv:
        yield Rule(theirs=f"{prefix}.rpn_conv.{{}}", ours=f"{tower}.convs.0.{{}}")
    elif kind == "rpn":
        yield Rule(theirs=f"{prefix}.rpn_conv.{{}}.conv.{{}}", ours=f"{tower}.convs.{{}}.{{}}")
    else:
        yield from _conv_module(f"{prefix}.cls_convs", f"{tower}.class_tower.layers", layout.head_norms)
        yield from _conv_module(f"{prefix}.reg_convs", f"{tower}.box_tower.layers", layout.head_norms)
        yield Rule(theirs=f"{prefix}.scales.{{}}.scale", ours=f"{tower}.scales.{{}}.scale")
        yield Rule(theirs=f"{prefix}.integral.project", ours=f"{layout.head_place}.bin_distances")
    for theirs, ours in _OUTPUTS[kind].items():
        yield Rule(theirs=f"{prefix}.{theirs}.{{}}", ours=f"{tower}.{ours}.{{}}")


def _roi_rules(stages: int, box_convs: bool) -> Iterable[Rule]:
    heads = [("roi_head.bbox_head", "roi")]
    if stages:
        heads = [(f"roi_head.bbox_head.{number}", f"roi.stages.{number}") for number in range(stages)]
    for theirs, ours in heads:
        yield from _conv_module(f"{theirs}.shared_convs", f"{ours}.box_head.convs", ("bn", "gn"))
        layers = ("fc",) if box_convs else ("fc6", "fc7")
        for number, layer in enumerate(layers):
            yield Rule(theirs=f"{theirs}.shared_fcs.{number}.{{}}", ours=f"{ours}.box_head.{layer}.{{}}")
        yield Rule(theirs=f"{theirs}.fc_cls.{{}}", ours=f"{ours}.predictor.classes.{{}}")
        yield Rule(theirs=f"{theirs}.fc_reg.{{}}", ours=f"{ours}.predictor.deltas.{{}}")
