"""A trained detector's first part as the start of another's first stage: backbone, neck and dense head.

Letters: K classes of the trained head, A priors per cell.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from rcnn.detectors.pyramid import AbstractPyramidDetector
from rcnn.errors import CheckpointError, Problem
from rcnn.recipes.checkpoints import recipe_inside
from rcnn.recipes.heads import DenseHeadSpec
from rcnn.recipes.recipe import DetectorSpec, FirstStageSpec, OneStageSpec, ProposalsSpec, Recipe, TwoStageSpec
from rcnn.recipes.starts import StartFile, unlike_start

_HEAD = "proposals.head."
_PARTS = ("backbone.", "neck.", _HEAD)
SETTING = "detector.proposals.init_from"


def first_stage_start(spec: DetectorSpec) -> str | None:
    """The file, or its address, that the recipe's first stage starts from, if it names one."""
    if isinstance(spec, (TwoStageSpec, FirstStageSpec)) and isinstance(spec.proposals, ProposalsSpec):
        return spec.proposals.init_from or None
    return None


@dataclass(kw_only=True)
class _Start:
    """What becomes of each tensor of the backbone, the neck and the head."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    collapsed: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def start_first_stage(detector: AbstractPyramidDetector, recipe: Recipe, given: StartFile) -> list[str]:
    """Takes backbone, neck and head from a checkpoint of a one-stage detector, or of one with a like first stage.

    A head of K classes becomes one of one class: the weights and biases of its class scores are averaged over the
    classes, so that the objectness is the mean of the K logits. Gives lines for people: what was taken, collapsed and
    left. Raises `CheckpointError` with every tensor that is missing, has another shape, or of which our head has no
    place: nothing is left random, and nothing reads features that it was not trained on.
    """
    path, checkpoint = given.path, given.checkpoint
    source_recipe = recipe_inside(path, checkpoint.meta)
    source = source_recipe.detector
    _refuse_other_heads(path, recipe.detector, source)
    num_classes = len(checkpoint.meta.classes) if isinstance(source, OneStageSpec) else 1
    state = {_HEAD + name[5:] if name.startswith("head.") else name: x for name, x in checkpoint.state_dict.items()}
    own = detector.state_dict()
    start = _Start()
    for name, tensor in own.items():
        if name.startswith(_PARTS):
            _take(start, name, tensor, state.get(name), num_classes)
    left = [name for name in state if name not in start.tensors]
    start.problems += [
        Problem(where=name, given="in the checkpoint's head alone")
        for name in left
        if name.startswith(_HEAD) and name not in own
    ]
    if start.problems:
        first = Problem(
            where=SETTING,
            given=f"{path}, whose backbone, neck and head are not those of this recipe",
            remedy="give detector.backbone, detector.neck and detector.proposals.head as the checkpoint has them",
        )
        raise CheckpointError((first, *start.problems))
    detector.load_state_dict({**own, **start.tensors})
    recognised = [] if given.recognised is None else [given.recognised]
    taken = _lines(path, start, source, num_classes, left)
    return [*recognised, *taken, *unlike_start(source_recipe, recipe)]


def _take(start: _Start, name: str, own: Tensor, given: Tensor | None, num_classes: int) -> None:
    if given is not None and given.shape == own.shape:
        start.tensors[name] = given
    elif given is not None and given.shape == (own.shape[0] * num_classes, *own.shape[1:]) and name.startswith(_HEAD):
        # Priors before classes: [A * K, ...].
        start.tensors[name] = given.unflatten(0, (own.shape[0], num_classes)).mean(dim=1)
        start.collapsed.append(name)
    else:
        shape = "no such tensor" if given is None else f"shape {tuple(given.shape)}"
        start.problems.append(Problem(where=name, given=shape, allowed=f"shape {tuple(own.shape)}"))


def _refuse_other_heads(path: Path, spec: DetectorSpec, source: DetectorSpec) -> None:
    wanted, given = _head_of(spec), _head_of(source)
    if given is None or wanted is None or given.type != wanted.type:
        raise CheckpointError(
            Problem(
                where=SETTING,
                given=f"{path}, a detector {f'with the head {given.type}' if given else 'without a dense head'}",
                allowed=f"a detector with the head {wanted.type if wanted else 'of this recipe'}",
                remedy="detector.proposals.head.type names the head of the first stage",
            )
        )


def _head_of(spec: DetectorSpec) -> DenseHeadSpec | None:
    if isinstance(spec, OneStageSpec):
        return spec.head
    return spec.proposals.head if isinstance(spec.proposals, ProposalsSpec) else None


def _lines(path: Path, start: _Start, source: DetectorSpec, num_classes: int, left: list[str]) -> Iterator[str]:
    counts = ", ".join(f"{part.rstrip('.')} {sum(name.startswith(part) for name in start.tensors)}" for part in _PARTS)
    yield f"first stage from {path} ({source.type}): tensors taken of {counts}"
    if start.collapsed:
        names = ", ".join(start.collapsed)
        yield f"{num_classes} classes collapsed to one objectness, the mean of their logits: {names}"
    if left:
        counted = Counter(".".join(name.split(".")[:2]) for name in left)
        yield "left in the checkpoint: " + ", ".join(f"{part} ({count} tensors)" for part, count in counted.items())
