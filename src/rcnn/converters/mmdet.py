"""State dicts of MMDetection 2 and 3: which detector the keys are of, and how each of its keys becomes ours.

One-stage detectors, and its RPN detector, keep their head as `bbox_head`; two-stage detectors keep the first stage as
`rpn_head` and the second as `roi_head`. Background is the last class in both systems, so no tensor changes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from rcnn.converters.key_map import Dropped, KeyMap, Rule
from rcnn.errors import CheckpointError, Problem

HeadKind = Literal["rpn", "retinanet", "fcos", "atss", "gfl"]
# "frozen" batch norms count no batches; "trained" ones (also with fixed statistics, MMDetection's `norm_eval`) do.
# The keys are the same: a file does not say which its training had (`norm_cfg.requires_grad`).
Norms = Literal["frozen", "trained"]

# A key, without the head's prefix, that only this kind has.
_SIGNS: dict[str, HeadKind] = {
    "rpn_cls.weight": "rpn",
    "retina_cls.weight": "retinanet",
    "conv_centerness.weight": "fcos",
    "atss_cls.weight": "atss",
    "gfl_cls.weight": "gfl",
}

# The last convolutions of each kind, in MMDetection and here.
_OUTPUTS: dict[HeadKind, dict[str, str]] = {
    "rpn": {"rpn_cls": "classes", "rpn_reg": "deltas"},
    "retinanet": {"retina_cls": "classes", "retina_reg": "deltas"},
    "fcos": {"conv_cls": "classes", "conv_reg": "distances", "conv_centerness": "centerness"},
    "atss": {"atss_cls": "classes", "atss_reg": "deltas", "atss_centerness": "centerness"},
    "gfl": {"gfl_cls": "classes", "gfl_reg": "sides"},
}

# FCOS's last convolutions before MMDetection 2.0 (and in files that carry no version).
_OLD_NAMES = {"fcos_cls": "conv_cls", "fcos_reg": "conv_reg", "fcos_centerness": "conv_centerness"}


def modern_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict under the names of MMDetection 2 and 3."""
    return {re.sub(r"\b(fcos_\w+)\b", lambda old: _OLD_NAMES.get(old[1], old[1]), key): v for key, v in state.items()}


@dataclass(frozen=True, kw_only=True)
class MMDetectionModel:
    """What a file holds, as far as its keys tell."""

    head: HeadKind
    two_stage: bool
    cascade_stages: int
    """0: one second stage, or none."""
    key_map: KeyMap

    @property
    def head_prefix(self) -> str:
        return "rpn_head" if self.two_stage else "bbox_head"


def recognise(state: Mapping[str, Tensor], *, norms: Norms, head_place: str | None = None) -> MMDetectionModel:
    """Which detector the (modern) keys are of, and their table.

    `head_place` is where the dense head goes: by default `proposals.head` for a two-stage detector's and `head` for a
    one-stage one's; a one-stage checkpoint that becomes a first stage names the former.
    Raises `CheckpointError` where the head is none that is known here.
    """
    two_stage = any(key.startswith("rpn_head.") for key in state)
    prefix = "rpn_head" if two_stage else "bbox_head"
    kind: HeadKind | None = next((kind for sign, kind in _SIGNS.items() if f"{prefix}.{sign}" in state), None)
    if kind is None:
        raise CheckpointError(
            Problem(
                where="the keys",
                given=f"{len(state)} of them, with none that marks a head; first {sorted(state)[:3]}",
                allowed=f"a state dict of MMDetection with one of {', '.join(f'{prefix}.{sign}' for sign in _SIGNS)}",
            )
        )
    place = head_place or ("proposals.head" if two_stage else "head")
    stages = len({key.split(".")[2] for key in state if re.match(r"roi_head\.bbox_head\.\d+\.", key)})
    rules = [
        Rule(theirs="backbone.{}", ours="backbone.{}"),
        *_neck_rules(state),
        *_head_rules(kind, state, prefix, place),
        *_roi_rules(stages, state),
    ]
    return MMDetectionModel(
        head=kind,
        two_stage=two_stage,
        cascade_stages=stages,
        key_map=KeyMap(rules=tuple(rules), dropped=tuple(_dropped(norms))),
    )


def _dropped(norms: Norms) -> Iterable[Dropped]:
    if norms == "frozen":
        yield Dropped(pattern=r"backbone\..*num_batches_tracked", reason="a frozen batch norm counts no batches")


def _neck_rules(state: Mapping[str, Tensor]) -> Iterable[Rule]:
    """A pyramid's convolutions; those of its extra levels stand after the others in the same list."""
    laterals = len({key.split(".")[2] for key in state if key.startswith("neck.lateral_convs.")})
    for number, name in ((laterals, "p6"), (laterals + 1, "p7")):
        yield Rule(theirs=f"neck.fpn_convs.{number}.conv.{{}}", ours=f"neck.{name}.{{}}")
    for theirs, ours in (("lateral_convs", "lateral"), ("fpn_convs", "output")):
        yield from _conv_module(f"neck.{theirs}", f"neck.{ours}")


def _conv_module(theirs: str, ours: str) -> Iterable[Rule]:
    """A list of MMCV's ConvModules: a convolution and, where there is one, its norm."""
    yield Rule(theirs=f"{theirs}.{{}}.conv.{{}}", ours=f"{ours}.{{}}.0.{{}}")
    for norm in ("gn", "bn"):
        yield Rule(theirs=f"{theirs}.{{}}.{norm}.{{}}", ours=f"{ours}.{{}}.1.{{}}")


def _head_rules(kind: HeadKind, state: Mapping[str, Tensor], prefix: str, place: str) -> Iterable[Rule]:
    tower = f"{place}.tower"
    if kind == "rpn" and f"{prefix}.rpn_conv.weight" in state:
        yield Rule(theirs=f"{prefix}.rpn_conv.{{}}", ours=f"{tower}.convs.0.{{}}")
    elif kind == "rpn":
        yield Rule(theirs=f"{prefix}.rpn_conv.{{}}.conv.{{}}", ours=f"{tower}.convs.{{}}.{{}}")
    else:
        yield from _conv_module(f"{prefix}.cls_convs", f"{tower}.class_tower.layers")
        yield from _conv_module(f"{prefix}.reg_convs", f"{tower}.box_tower.layers")
        yield Rule(theirs=f"{prefix}.scales.{{}}.scale", ours=f"{tower}.scales.{{}}.scale")
        yield Rule(theirs=f"{prefix}.integral.project", ours=f"{place}.bin_distances")
    for theirs, ours in _OUTPUTS[kind].items():
        yield Rule(theirs=f"{prefix}.{theirs}.{{}}", ours=f"{tower}.{ours}.{{}}")


def _roi_rules(stages: int, state: Mapping[str, Tensor]) -> Iterable[Rule]:
    heads = [("roi_head.bbox_head", "roi")]
    if stages:
        heads = [(f"roi_head.bbox_head.{number}", f"roi.stages.{number}") for number in range(stages)]
    for theirs, ours in heads:
        with_convs = any(key.startswith(f"{theirs}.shared_convs.") for key in state)
        yield from _conv_module(f"{theirs}.shared_convs", f"{ours}.box_head.convs")
        layers = ("fc",) if with_convs else ("fc6", "fc7")
        for number, layer in enumerate(layers):
            yield Rule(theirs=f"{theirs}.shared_fcs.{number}.{{}}", ours=f"{ours}.box_head.{layer}.{{}}")
        yield Rule(theirs=f"{theirs}.fc_cls.{{}}", ours=f"{ours}.predictor.classes.{{}}")
        yield Rule(theirs=f"{theirs}.fc_reg.{{}}", ours=f"{ours}.predictor.deltas.{{}}")
