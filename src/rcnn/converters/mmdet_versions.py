"""State dicts of MMDetection 1 and of 2 before 2.5 in the names and layouts of version 3.

What changed is in MMDetection's notes on compatibility: version 2 put the second stage under `roi_head.` and background
last instead of first, which a box needs no row for; 2.5 did the latter for an RPN with softmax too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from rcnn.errors import CheckpointError, Problem

# FCOS's last convolutions before MMDetection 2.0 (and in files that carry no version).
_OLD_OUTPUTS = {"fcos_cls": "conv_cls", "fcos_reg": "conv_reg", "fcos_centerness": "conv_centerness"}
# The heads that version 2 moved under `roi_head.`.
_SECOND_STAGE = r"(bbox_head|mask_head|semantic_head|grid_head|mask_iou_head|bbox_roi_extractor|shared_head)\..*"

Version = tuple[int, int]


def version_of(text: object) -> Version | None:
    """`2.11.0+unknown` as (2, 11); None for what is no version."""
    match = re.match(r"v?(\d{1,4})\.(\d{1,4})", text) if isinstance(text, str) else None
    return (int(match[1]), int(match[2])) if match else None


def modern_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict under the names of MMDetection 3. Raises `CheckpointError` for a tensor under two names."""
    # A second stage stood beside the first under the name that a one-stage detector's head has.
    plain = {key.removeprefix("module."): value for key, value in state.items()}
    moved = is_of_version_1(plain)
    renamed: dict[str, Tensor] = {}
    problems = []
    for key, value in plain.items():
        name = re.sub(r"\b(fcos_\w+)\b", lambda old: _OLD_OUTPUTS.get(old[1], old[1]), key)
        # RetinaNet's plain convolutions before 0.6.
        name = re.sub(r"^(bbox_head\.(?:cls|reg)_convs\.\d+)\.(weight|bias)$", r"\1.conv.\2", name)
        if moved and re.fullmatch(_SECOND_STAGE, name):
            name = f"roi_head.{name}"
        if name in renamed:
            problems.append(Problem(where=key, given=f"{name} is there under its old and its new name"))
        renamed[name] = value
    if len(plain) < len(state):
        problems.append(Problem(where="the keys", given="the same names with and without the prefix module."))
    if problems:
        raise CheckpointError(problems)
    return renamed


def is_of_version_1(state: Mapping[str, Tensor]) -> bool:
    """Whether a second stage is there (fully connected classes) that is not under `roi_head.`."""
    return any(re.fullmatch(r"bbox_head\.(\d+\.)?fc_cls\.weight", key) for key in state)


def modern_tensors(state: Mapping[str, Tensor], version: Version | None) -> dict[str, Tensor]:
    """The state dict as MMDetection 3 has it; `version` is the one that wrote it, where the file says so."""
    of_version_1 = is_of_version_1({key.removeprefix("module."): value for key, value in state.items()})
    renamed = modern_names(state)
    changes = dict(_background_last(renamed)) if of_version_1 else {}
    if version is not None and version < (2, 5):
        changes |= dict(_rpn_background_last(renamed))
    return renamed | changes


def _background_last(state: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
    """The second stage's classes with background behind them; of the boxes of each class, background's left out."""
    for key, value in state.items():
        match = re.fullmatch(r"(roi_head\.bbox_head\.(?:\d+\.)?)(fc_cls|fc_reg)\.(?:weight|bias)", key)
        if match is None or not value.ndim:
            continue
        classes = state.get(f"{match[1]}fc_cls.weight")
        if match[2] == "fc_cls":
            yield key, torch.cat((value[1:], value[:1]))
        elif classes is not None and len(value) == 4 * len(classes):  # else one box for all classes
            yield key, value[4:]


def _rpn_background_last(state: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
    """Of an RPN with two outputs for each anchor: background, then the object, become the object, then background."""
    for prefix in ("rpn_head", "bbox_head"):
        deltas = state.get(f"{prefix}.rpn_reg.weight")
        for kind in ("weight", "bias"):
            value = state.get(f"{prefix}.rpn_cls.{kind}")
            if deltas is not None and value is not None and value.ndim and 2 * len(value) == len(deltas):
                yield f"{prefix}.rpn_cls.{kind}", value.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
