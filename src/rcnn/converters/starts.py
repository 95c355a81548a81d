"""A file of any system as what a training starts from: `rcnn convert` without a file between."""

from __future__ import annotations

from pathlib import Path

from rcnn.converters.convert import ConvertedDetector, choose_system, convert_detector
from rcnn.converters.interface import AbstractSystem, ForeignFile, UnnamedClasses, Wanted
from rcnn.engine.checkpoint import Checkpoint
from rcnn.errors import CheckpointError, Problem
from rcnn.recipes.starts import StartFile, read_own_start
from rcnn.weight_files.reading import read_foreign
from rcnn.weight_files.safetensors_header import read_header


def read_any_start(path: Path) -> StartFile:
    """A checkpoint of ours, or of another system as `rcnn convert` reads it, recognised by its keys.

    Classes without names are numbered: what depends on them is not taken where they differ. Raises `CheckpointError`.
    """
    if not path.is_file() or _is_ours(path):
        return read_own_start(path)
    file = read_foreign(path)
    system, why = choose_system(file, "auto")
    if system.recognise_backbone(file) is not None:
        given, allowed = f"the weights of a backbone alone ({system.name}, because {why})", "a detector's"
        remedy = "rcnn convert FILE -o OUT.safetensors, and detector.backbone.weights=OUT.safetensors"
        raise CheckpointError(Problem(where=str(path), given=given, allowed=allowed, remedy=remedy))
    detector, assumed = _converted(file, system)
    meta, count = detector.meta, len(detector.converted.names)
    said = [
        f"{path}: {system.name}, because {why}; the structure of {detector.model.recipe_name}, "
        f"{len(meta.classes)} classes, {count} tensors converted",
        *file.notes,
        *(f"assumed: {text}" for text in assumed),
    ]
    checkpoint = Checkpoint(state_dict=detector.converted.state, meta=meta)
    return StartFile(path=path, checkpoint=checkpoint, recognised="; ".join(said))


def _converted(file: ForeignFile, system: AbstractSystem) -> tuple[ConvertedDetector, tuple[str, ...]]:
    """The detector, and what was assumed of it."""
    try:
        detector = convert_detector(file, system, Wanted())
    except UnnamedClasses as error:
        numbered = tuple(f"class {number}" for number in range(1, error.count + 1))
        detector = convert_detector(file, system, Wanted(class_names=numbered))
        return detector, (*detector.model.assumptions, "classes by their numbers, since the file has no names")
    return detector, detector.model.assumptions


def _is_ours(path: Path) -> bool:
    try:
        return read_header(path).get("__metadata__", {}).get("system") == "rcnn"
    except CheckpointError:  # not safetensors, or damaged: the reader of all files says what it is
        return False
