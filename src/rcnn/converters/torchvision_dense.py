"""State dicts of torchvision's one-stage detectors, FCOS and RetinaNet on a ResNet with FPN: how each key becomes ours.

Their class 0 stands for background, though a sigmoid needs none: an output that is trained to be never right. It stays,
as a class that no data has, because the losses count it; label l is output l in both systems.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from rcnn.converters.key_map import Dropped, KeyMap, Rule
from rcnn.converters.torchvision import coco_91_classes
from rcnn.converters.torchvision import modern_names as modern_pyramid_names
from rcnn.errors import CheckpointError, Problem
from rcnn.records import ClassTable

Architecture = Literal["fcos", "retinanet"]

_COMMON = (
    Rule(theirs="backbone.fpn.inner_blocks.{}.{}.{}", ours="neck.lateral.{}.{}.{}"),
    Rule(theirs="backbone.fpn.layer_blocks.{}.{}.{}", ours="neck.output.{}.{}.{}"),
    Rule(theirs="backbone.fpn.extra_blocks.{}", ours="neck.{}"),
    Rule(theirs="backbone.body.{}", ours="backbone.{}"),
)
_DROPPED = (Dropped(pattern=r"backbone\.body\..*num_batches_tracked", reason="a frozen batch norm counts no batches"),)
_TOWERS = {"classification_head": "class_tower", "regression_head": "box_tower"}
_OUTPUTS: dict[Architecture, dict[str, str]] = {
    "fcos": {
        "classification_head.cls_logits": "classes",
        "regression_head.bbox_reg": "distances",
        "regression_head.bbox_ctrness": "centerness",
    },
    "retinanet": {"classification_head.cls_logits": "classes", "regression_head.bbox_reg": "deltas"},
}


@dataclass(frozen=True, kw_only=True)
class TorchvisionDenseModel:
    """What a file holds, as far as its keys tell."""

    architecture: Architecture
    key_map: KeyMap


def modern_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict under the names of release 0.13 and later: RetinaNet's convolutions stood in one list with their
    activations. Raises `CheckpointError` where a tensor is there under both names."""
    names = {key: _modern_name(key, state) for key in state}
    taken: dict[str, str] = {}
    problems = []
    for key, name in names.items():
        if name in taken:
            problems.append(Problem(where=key, given=f"{name} is there under its old and its new name"))
        taken[name] = key
    if problems:
        raise CheckpointError(problems)
    return modern_pyramid_names({name: state[key] for name, key in taken.items()})


def _modern_name(key: str, state: Mapping[str, Tensor]) -> str:
    old = re.fullmatch(r"(head\.(?:classification|regression)_head\.conv)\.(\d+)\.(weight|bias)", key)
    if old is None or _architecture(state) == "fcos":
        return key
    return f"{old[1]}.{int(old[2]) // 2}.0.{old[3]}"


def recognise(state: Mapping[str, Tensor], *, head_place: str = "head") -> TorchvisionDenseModel:
    """Which detector the (modern) keys are of, and their table. `head_place` is where its head goes.

    Raises `CheckpointError` where they are of neither.
    """
    architecture = _architecture(state)
    if architecture is None:
        raise CheckpointError(
            Problem(
                where="the keys",
                given=f"no head.classification_head.cls_logits.weight among {len(state)}, first {sorted(state)[:3]}",
                allowed="a state dict of torchvision.models.detection.FCOS or RetinaNet",
            )
        )
    rules = (*_COMMON, *_head_rules(architecture, state, f"{head_place}.tower"))
    return TorchvisionDenseModel(architecture=architecture, key_map=KeyMap(rules=rules, dropped=_DROPPED))


def _architecture(state: Mapping[str, Tensor]) -> Architecture | None:
    if "head.classification_head.cls_logits.weight" not in state:
        return None
    return "fcos" if "head.regression_head.bbox_ctrness.weight" in state else "retinanet"


def _head_rules(architecture: Architecture, state: Mapping[str, Tensor], tower: str) -> Iterable[Rule]:
    for theirs, ours in _TOWERS.items():
        if architecture == "retinanet":
            yield Rule(theirs=f"head.{theirs}.conv.{{}}.{{}}.{{}}", ours=f"{tower}.{ours}.layers.{{}}.{{}}.{{}}")
            continue
        # Convolution, norm and activation take turns in one list; an activation has no key.
        for number in sorted({int(key.split(".")[3]) for key in state if key.startswith(f"head.{theirs}.conv.")}):
            place = f"{tower}.{ours}.layers.{number // 3}.{number % 3}"
            yield Rule(theirs=f"head.{theirs}.conv.{number}.{{}}", ours=f"{place}.{{}}")
    for theirs, ours in _OUTPUTS[architecture].items():
        yield Rule(theirs=f"head.{theirs}.{{}}", ours=f"{tower}.{ours}.{{}}")


def coco_classes() -> ClassTable:
    """Outputs 0 to 90 of torchvision's COCO weights; an id that COCO does not use is called `unused 12`."""
    coco = coco_91_classes()
    return ClassTable(names=("unused 0", *coco.names), category_ids=(0, *coco.category_ids))
