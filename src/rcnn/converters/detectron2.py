"""State dicts of detectron2's Faster R-CNN and RetinaNet on a ResNet with FPN: how each key becomes ours.

Background is the last class in both systems. The anchors of a cell are ordered size by size there and ratio by ratio
here, so the rows of heads with several sizes change places. Its ResNets have the stride of a block in the first 1x1
convolution (style `caffe`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rcnn.converters.key_map import Added, Change, Dropped, KeyMap, Rule
from rcnn.errors import CheckpointError, Problem

Architecture = Literal["faster_rcnn", "retinanet"]

_SIGNS: dict[str, Architecture] = {
    "proposal_generator.rpn_head.objectness_logits.weight": "faster_rcnn",
    "head.cls_score.weight": "retinanet",
}

_DROPPED = (
    Dropped(pattern=r"pixel_(mean|std)", reason="constants of the preprocessing"),
    Dropped(pattern=r".*anchor_generator\.cell_anchors\.\d+", reason="constants (older files keep the anchors)"),
    Dropped(pattern=r".*num_batches_tracked", reason="a frozen batch norm counts no batches"),
)


@dataclass(frozen=True, kw_only=True)
class Detectron2Model:
    """What a file holds, as far as its keys tell."""

    architecture: Architecture
    key_map: KeyMap


def recognise(state: Mapping[str, Tensor], *, num_ratios: int = 3, head_place: str = "head") -> Detectron2Model:
    """Which detector the keys are of, and their table.

    `num_ratios` is the number of the anchors' aspect ratios, which the keys do not tell from that of their sizes;
    `head_place` is where a one-stage head goes.
    Raises `CheckpointError` where they are of another one, or of one without a pyramid.
    """
    architecture: Architecture | None = next((name for sign, name in _SIGNS.items() if sign in state), None)
    lowest = _levels(state, "fpn_lateral")
    if architecture is None or not lowest:
        given = "no pyramid (fpn_lateral)" if architecture else f"none of {', '.join(_SIGNS)}"
        raise CheckpointError(
            Problem(
                where="the keys",
                given=f"{given} among {len(state)}, first {sorted(state)[:3]}",
                allowed="a state dict of detectron2's GeneralizedRCNN or RetinaNet on a ResNet with FPN",
            )
        )
    if architecture == "faster_rcnn":
        head, added = _faster_rcnn_rules(state, num_ratios), ()
    else:
        head, added = _retinanet_rules(state, num_ratios, head_place), (_normalizer(head_place),)
    rules = (*_backbone_rules(), *_neck_rules(lowest), *head)
    return Detectron2Model(architecture=architecture, key_map=KeyMap(rules=rules, dropped=_DROPPED, added=added))


def _normalizer(head_place: str) -> Added:
    return Added(
        ours=f"{head_place}.normalizer.mean",
        value=torch.tensor(100.0),
        reason="the mean number of positives starts anew: detectron2 does not save it",
    )


def _by_ratio(num_ratios: int, rows: int, of_anchor: int) -> Change:
    """Rows size by size to rows ratio by ratio, `of_anchor` of them together."""
    num_sizes = rows // of_anchor // num_ratios

    def exchange(value: Tensor, first: int, second: int) -> Tensor:
        return value.reshape(first, second, -1).transpose(0, 1).reshape(value.shape)

    return Change(
        forward=lambda value: exchange(value, num_sizes, num_ratios),
        backward=lambda value: exchange(value, num_ratios, num_sizes),
    )


def _levels(state: Mapping[str, Tensor], name: str) -> list[int]:
    """The numbers of the pyramid's levels, which are those of the backbone's stages: 2 has stride 4."""
    return sorted(int(match[1]) for key in state if (match := re.fullmatch(rf"backbone\.{name}(\d)\.weight", key)))


def _backbone_rules() -> Iterable[Rule]:
    body = "backbone.bottom_up"
    yield Rule(theirs=f"{body}.stem.conv1.norm.{{}}", ours="backbone.bn1.{}")
    yield Rule(theirs=f"{body}.stem.conv1.{{}}", ours="backbone.conv1.{}")
    for stage in range(2, 6):
        theirs, ours = f"{body}.res{stage}.{{}}", f"backbone.layer{stage - 1}.{{}}"
        yield Rule(theirs=f"{theirs}.shortcut.norm.{{}}", ours=f"{ours}.downsample.1.{{}}")
        yield Rule(theirs=f"{theirs}.shortcut.{{}}", ours=f"{ours}.downsample.0.{{}}")
        for number in (1, 2, 3):
            yield Rule(theirs=f"{theirs}.conv{number}.norm.{{}}", ours=f"{ours}.bn{number}.{{}}")
            yield Rule(theirs=f"{theirs}.conv{number}.{{}}", ours=f"{ours}.conv{number}.{{}}")


def _neck_rules(levels: Sequence[int]) -> Iterable[Rule]:
    for index, level in enumerate(levels):
        for theirs, ours in (("fpn_lateral", "lateral"), ("fpn_output", "output")):
            yield Rule(theirs=f"backbone.{theirs}{level}.norm.{{}}", ours=f"neck.{ours}.{index}.1.{{}}")
            yield Rule(theirs=f"backbone.{theirs}{level}.{{}}", ours=f"neck.{ours}.{index}.0.{{}}")
    yield Rule(theirs="backbone.top_block.{}", ours="neck.{}")


def _faster_rcnn_rules(state: Mapping[str, Tensor], num_ratios: int) -> Iterable[Rule]:
    theirs, ours = "proposal_generator.rpn_head", "proposals.head.tower"
    if f"{theirs}.conv.weight" in state:
        yield Rule(theirs=f"{theirs}.conv.{{}}", ours=f"{ours}.convs.0.{{}}")
    else:
        # With CONV_DIMS of more than one entry the convolutions are numbered by name.
        yield Rule(theirs=f"{theirs}.conv.conv{{}}.{{}}", ours=f"{ours}.convs.{{}}.{{}}")
    num_anchors = len(state[f"{theirs}.objectness_logits.weight"])
    for output, name, of_anchor in (("objectness_logits", "classes", 1), ("anchor_deltas", "deltas", 4)):
        change = _by_ratio(num_ratios, num_anchors * of_anchor, of_anchor)
        yield Rule(theirs=f"{theirs}.{output}.{{}}", ours=f"{ours}.{name}.{{}}", change=change)
    yield Rule(theirs="roi_heads.box_head.fc1.{}", ours="roi.box_head.fc6.{}")
    yield Rule(theirs="roi_heads.box_head.fc2.{}", ours="roi.box_head.fc7.{}")
    yield Rule(theirs="roi_heads.box_predictor.cls_score.{}", ours="roi.predictor.classes.{}")
    yield Rule(theirs="roi_heads.box_predictor.bbox_pred.{}", ours="roi.predictor.deltas.{}")


def _retinanet_rules(state: Mapping[str, Tensor], num_ratios: int, place: str) -> Iterable[Rule]:
    for theirs, ours in (("cls_subnet", "class_tower"), ("bbox_subnet", "box_tower")):
        # Convolutions and activations take turns in one list.
        numbers = sorted({int(key.split(".")[2]) for key in state if key.startswith(f"head.{theirs}.")})
        for index, number in enumerate(numbers):
            yield Rule(theirs=f"head.{theirs}.{number}.{{}}", ours=f"{place}.tower.{ours}.layers.{index}.0.{{}}")
    num_anchors = len(state["head.bbox_pred.weight"]) // 4
    for output, name in (("cls_score", "classes"), ("bbox_pred", "deltas")):
        rows = len(state[f"head.{output}.weight"])
        change = _by_ratio(num_ratios, rows, rows // num_anchors)
        yield Rule(theirs=f"head.{output}.{{}}", ours=f"{place}.tower.{name}.{{}}", change=change)
