"""What the keys and shapes of a detectron2 state dict say of its detector: parts, depth, layers, classes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from rcnn.backbones.resnet import BLOCKS, Depth
from rcnn.errors import CheckpointError, Problem

# "fpn": two stages on a pyramid; "c4": on C4, the last stage of the ResNet as box head; "dc5": on a dilated C5.
Architecture = Literal["fpn", "c4", "dc5", "retinanet"]

RPN = "proposal_generator.rpn_head"
SIGNS = (f"{RPN}.objectness_logits.weight", "head.cls_score.weight")

# Keys of parts that are not built here, and what they are called.
_REFUSED = {
    r"backbone\.(fpn_(lateral|output)\d|bottom_up\.res\d\.\d+\.conv\d)\.norm\.weight": "group norms",
    r"roi_heads\.box_head\.(\d\.)?conv\d+\.norm\.weight": "group norms in the box head",
    r"head\.(cls|bbox)_subnet\.(\d+\.)*norm\.weight|head\.(cls|bbox)_subnet\.\d+\.\d+\.weight": "norms in RetinaNet",
    r"(.*\.)?res\d\.\d+\.conv2_offset\.weight": "deformable convolutions",
    r"backbone\.bottom_up\.(stages|blocks|patch_embed|net)\..*": "a backbone other than ResNet",
    r"proposal_generator\.centernet_head\..*": "CenterNet2",
}


@dataclass(frozen=True, kw_only=True)
class Structure:
    """A detector of detectron2.

    `stages` of a cascade, 1 for one alone; `box_convs` of 3x3 before the box head's layer; `tower_convs` of RetinaNet;
    `trained_norms`: those of the backbone count batches.
    """

    architecture: Architecture
    depth: Depth
    num_classes: int
    num_anchors: int
    """In each cell."""
    levels: tuple[int, ...] = ()
    """Of the pyramid: 2 has stride 4."""
    pyramid_channels: int = 256
    pyramid_norm: bool = False
    extra: Literal["pool", "convs_on_p5", "convs_on_c5"] = "pool"
    rpn_convs: int = 1
    rpn_channels: int | None = None
    """Where it is not that of the map."""
    stages: int = 1
    box_convs: int = 0
    box_conv_channels: int = 256
    box_norm: bool = False
    features: int = 1024
    agnostic: bool = False
    tower_convs: int = 0
    trained_norms: bool = False

    @property
    def body(self) -> str:
        """Where the ResNet is."""
        return "backbone.bottom_up" if self.architecture in ("fpn", "retinanet") else "backbone"


def read_structure(state: Mapping[str, Tensor]) -> Structure:
    """Of keys of today. Raises `CheckpointError` where they are of no detector that is built here, with the reasons."""
    if not any(sign in state for sign in SIGNS):
        raise CheckpointError(
            Problem(
                where="the keys",
                given=f"none of {', '.join(SIGNS)} among {len(state)}, first {sorted(state)[:3]}",
                allowed="a state dict of detectron2's GeneralizedRCNN or RetinaNet on a ResNet",
            )
        )
    _refuse_other_parts(state)
    architecture = _architecture(state)
    levels = tuple(_numbers(state, r"backbone\.fpn_lateral(\d)\.weight"))
    body = "backbone.bottom_up" if levels else "backbone"
    common: dict[str, Any] = {
        "architecture": architecture,
        "depth": _depth(state, body, c4=architecture == "c4"),
        "levels": levels,
        "trained_norms": any(re.fullmatch(rf"{body}\..*num_batches_tracked", key) for key in state),
    }
    if levels:
        lateral = f"backbone.fpn_lateral{levels[0]}"
        common |= {
            "pyramid_channels": len(_needed(state, f"{lateral}.weight")),
            "pyramid_norm": f"{lateral}.norm.weight" in state,
        }
    if architecture == "retinanet":
        return Structure(**common, **_one_stage(state, common["pyramid_channels"]))
    return Structure(**common, **_first_stage(state), **_second_stage(state))


def _refuse_other_parts(state: Mapping[str, Tensor]) -> None:
    problems = []
    for pattern, name in _REFUSED.items():
        keys = [key for key in state if re.fullmatch(pattern, key)]
        if "norm" in name and name.startswith("group"):
            # A batch norm has statistics, a group norm has none.
            keys = [key for key in keys if key.replace("weight", "running_var") not in state]
        if keys:
            problems.append(Problem(where=keys[0], given=f"{name} ({len(keys)} keys)", allowed="a ResNet without"))
    if problems:
        raise CheckpointError(problems)


def _architecture(state: Mapping[str, Tensor]) -> Architecture:
    if "head.cls_score.weight" in state:
        if not any(key.startswith("backbone.fpn_lateral") for key in state):
            given = "RetinaNet without a pyramid (fpn_lateral)"
            raise CheckpointError(Problem(where="the keys", given=given, allowed="RetinaNet on a ResNet with FPN"))
        return "retinanet"
    if any(key.startswith("backbone.fpn_lateral") for key in state):
        return "fpn"
    return "c4" if any(key.startswith("roi_heads.res5.") for key in state) else "dc5"


def _needed(state: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in state or state[key].ndim == 0:
        raise CheckpointError(Problem(where=key, given="missing", allowed="a tensor that every such detector has"))
    return state[key]


def _numbers(state: Mapping[str, Tensor], pattern: str) -> list[int]:
    return sorted({int(match[1]) for key in state if (match := re.fullmatch(pattern, key))})


def _depth(state: Mapping[str, Tensor], body: str, *, c4: bool) -> Depth:
    places = [f"{body}.res{stage}" for stage in (2, 3, 4)] + ["roi_heads.res5" if c4 else f"{body}.res5"]
    counts = tuple(len(_numbers(state, rf"{re.escape(place)}\.(\d+)\.conv1\.weight")) for place in places)
    bottleneck = f"{body}.res2.0.conv3.weight" in state
    width = tuple(_needed(state, f"{body}.res2.0.conv2.weight").shape[:2])
    depths: dict[tuple[tuple[int, ...], bool], Depth] = {(BLOCKS[each], each >= 50): each for each in BLOCKS}
    depth = depths.get((counts, bottleneck))
    if depth is None or width != (64, 64):
        given = f"stages of {counts} blocks, the first {'x'.join(map(str, width))} channels wide"
        allowed = "ResNet-18, -34, -50 or -101, 64x64 channels wide (no ResNeXt, no deformable stages)"
        raise CheckpointError(Problem(where=body, given=given, allowed=allowed))
    return depth


def _first_stage(state: Mapping[str, Tensor]) -> dict[str, Any]:
    numbered = _numbers(state, rf"{re.escape(RPN)}\.conv\.conv(\d+)\.weight")
    first = _needed(state, f"{RPN}.conv.conv{numbered[0]}.weight" if numbered else f"{RPN}.conv.weight")
    out_channels, in_channels = first.shape[:2]
    return {
        "num_anchors": len(_needed(state, f"{RPN}.objectness_logits.weight")),
        "rpn_convs": max(len(numbered), 1),
        "rpn_channels": None if out_channels == in_channels else out_channels,
    }


def _second_stage(state: Mapping[str, Tensor]) -> dict[str, Any]:
    stages = _numbers(state, r"roi_heads\.box_predictor\.(\d+)\.cls_score\.weight")
    number = f".{stages[0]}" if stages else ""
    head, predictor = f"roi_heads.box_head{number}", f"roi_heads.box_predictor{number}"
    num_classes = len(_needed(state, f"{predictor}.cls_score.weight")) - 1
    convs = _numbers(state, rf"{re.escape(head)}\.conv(\d+)\.weight")
    found: dict[str, Any] = {
        "num_classes": num_classes,
        "stages": max(len(stages), 1),
        "agnostic": num_classes > 1 and len(_needed(state, f"{predictor}.bbox_pred.weight")) == 4,
        "box_convs": len(convs),
    }
    if convs:
        first = f"{head}.conv{convs[0]}"
        found |= {"box_conv_channels": len(state[f"{first}.weight"]), "box_norm": f"{first}.norm.weight" in state}
    if f"{head}.fc1.weight" in state:
        found["features"] = len(state[f"{head}.fc1.weight"])
    return found


def _one_stage(state: Mapping[str, Tensor], pyramid_channels: int) -> dict[str, Any]:
    num_anchors = len(_needed(state, "head.bbox_pred.weight")) // 4
    p6 = _needed(state, "backbone.top_block.p6.weight")
    return {
        "num_anchors": num_anchors,
        "num_classes": len(state["head.cls_score.weight"]) // max(num_anchors, 1),
        # Convolutions and activations take turns in one list.
        "tower_convs": len(_numbers(state, r"head\.cls_subnet\.(\d+)\.weight")),
        "extra": "convs_on_p5" if p6.shape[1] == pyramid_channels else "convs_on_c5",
    }
