"""From a checkpoint to the detector that it holds: the recipe and the classes are inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

import rcnn
from rcnn.config.text import from_yaml
from rcnn.detectors.pyramid import AbstractPyramidDetector
from rcnn.engine.checkpoint import Checkpoint, CheckpointMeta, load_into, read_weights
from rcnn.errors import CheckpointError, Problem, RcnnError
from rcnn.recipes.models import build_detector
from rcnn.recipes.recipe import DetectorSpec, Recipe
from rcnn.recipes.resolve import resolve_recipe
from rcnn.recipes.starts import StartFile, unlike_start
from rcnn.records import ClassTable


@dataclass(frozen=True, kw_only=True)
class LoadedDetector:
    """What a checkpoint holds, built."""

    detector: AbstractPyramidDetector
    recipe: Recipe
    classes: ClassTable


def read_detector(path: Path, overrides: Sequence[str] = ()) -> LoadedDetector:
    """The detector of a checkpoint of ours, on the CPU; `overrides` (`path=value`) change the recipe inside.

    Raises `CheckpointError`, `RecipeError` for an override.
    """
    checkpoint = read_weights(path)
    recipe = resolve_recipe(recipe_inside(path, checkpoint.meta), overrides).spec
    try:
        detector = _build_around(checkpoint, recipe.detector)
    except RcnnError as error:
        given = "its tensors are not those that its own recipe and classes ask for"
        raise _unusable(path, given, checkpoint.meta, error) from error
    return LoadedDetector(detector=detector, recipe=recipe, classes=checkpoint.meta.classes)


def _build_around(checkpoint: Checkpoint, spec: DetectorSpec) -> AbstractPyramidDetector:
    """The detector around the checkpoint's own tensors: nothing is drawn at random, no weight is there twice."""
    build = partial(build_detector, spec, num_classes=len(checkpoint.meta.classes), pretrained=False)
    with torch.device("meta"):
        detector = build()
    load_into(detector, checkpoint.state_dict)
    # Constants of some timm models are in no checkpoint: those must be computed.
    if any(tensor.is_meta for tensor in chain(detector.parameters(), detector.buffers())):
        detector = build()
        load_into(detector, checkpoint.state_dict)
    return detector


def recipe_inside(path: Path, meta: CheckpointMeta) -> Recipe:
    """The recipe that a checkpoint was trained with. Raises `CheckpointError` where this version cannot read it."""
    try:
        return from_yaml(meta.recipe, Recipe, "the recipe inside")
    except RcnnError as error:
        raise _unusable(path, "the recipe inside cannot be read", meta, error) from error


def _unusable(path: Path, given: str, meta: CheckpointMeta, error: RcnnError) -> CheckpointError:
    remedy = "take another copy of the file"
    if meta.version != rcnn.__version__:
        remedy = f"it was written by rcnn {meta.version}, this is {rcnn.__version__}: use that version"
    return CheckpointError((Problem(where=str(path), given=given, remedy=remedy), *error.problems))


def start_from(detector: AbstractPyramidDetector, recipe: Recipe, given: StartFile, classes: ClassTable) -> list[str]:
    """Weights of a checkpoint of the same structure; what depends on the classes too where they are the same.

    Gives lines for people about what was taken. Raises `CheckpointError`.
    """
    path, checkpoint = given.path, given.checkpoint
    state: Mapping[str, Tensor] = checkpoint.state_dict
    same = checkpoint.meta.classes.names == classes.names
    if not same:
        own = detector.state_dict()
        state = {**state, **{name: own[name] for name in tensors_of_classes(recipe.detector)}}
    try:
        load_into(detector, state)
    except CheckpointError as error:
        remedy = "choose the recipe that it was trained with"
        problem = Problem(where=str(path), given="a detector of another structure", remedy=remedy)
        raise CheckpointError((problem, *error.problems)) from error
    taken = ", its class scores included: the classes are the same"
    taken = taken if same else "; what depends on the classes starts anew: they differ"
    recognised = [] if given.recognised is None else [given.recognised]
    return [*recognised, f"started from {path}{taken}", *unlike_start(recipe_inside(path, checkpoint.meta), recipe)]


def tensors_of_classes(spec: DetectorSpec) -> tuple[str, ...]:
    """The names of the tensors whose shapes depend on the number of classes."""
    with torch.device("meta"):
        fewer, more = (build_detector(spec, num_classes=count, pretrained=False).state_dict() for count in (2, 3))
    return tuple(name for name, tensor in fewer.items() if tensor.shape != more[name].shape)
