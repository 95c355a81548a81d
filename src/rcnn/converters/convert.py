"""A file of another system to a checkpoint of ours, and back: what `rcnn convert` does."""

from __future__ import annotations

import io
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors.torch
import torch

from rcnn.atomic_file import refuse_unwritable, write_atomically
from rcnn.config.text import to_yaml
from rcnn.converters.detectron2_system import Detectron2System
from rcnn.converters.interface import (
    AbstractSystem,
    ForeignBackbone,
    ForeignFile,
    ForeignModel,
    UnnamedClasses,
    Wanted,
)
from rcnn.converters.key_map import Converted
from rcnn.converters.mindspore import MindSporeSystem
from rcnn.converters.mmdet_system import MMDetectionSystem
from rcnn.converters.simple_faster_rcnn import SimpleFasterRCNNSystem
from rcnn.converters.torchvision_system import TorchvisionSystem
from rcnn.engine.checkpoint import CheckpointMeta, load_into, read_weights, save_weights
from rcnn.errors import CheckpointError, Problem, nearest
from rcnn.recipes.checkpoints import recipe_inside
from rcnn.recipes.models import build_detector
from rcnn.recipes.resolve import resolve_recipe
from rcnn.records import ClassTable
from rcnn.weight_files.reading import read_foreign


def all_systems() -> tuple[AbstractSystem, ...]:
    """Every system that can be read."""
    return (TorchvisionSystem(), SimpleFasterRCNNSystem(), MMDetectionSystem(), Detectron2System(), MindSporeSystem())


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """What became of a file: for people."""

    source: Path
    out: Path
    system: str
    why: str
    recipe_name: str
    classes: ClassTable
    converted: Converted
    assumptions: tuple[str, ...]
    notes: tuple[str, ...] = ()
    """What was done to the names of the file before anything else."""
    settings: tuple[str, ...] | None = None
    """What a recipe with these weights has, where they are a backbone's alone; None: they are a detector's."""

    def lines(self, keys: bool) -> list[str]:
        lines = [f"{self.source}: {self.system}, because {self.why}", *self.notes, *self._subject()]
        lines += [
            *(f"assumed: {text}" for text in self.assumptions),
            f"{len(self.converted.names)} tensors converted, {len(self.converted.dropped)} left out for a reason",
        ]
        if keys:
            lines += [f"  {theirs} -> {ours}" for theirs, ours in self.converted.names.items()]
            lines += [f"  left out: {key} ({reason})" for key, reason in self.converted.dropped.items()]
        else:
            lines += [f"  left out: {text}" for text in _by_reason(self.converted.dropped)]
        lines += [f"  added: {text}" for text in _by_reason(self.converted.added)]
        return [*lines, f"written: {self.out}"]

    def _subject(self) -> list[str]:
        if self.settings is None:
            return [f"the structure of {self.recipe_name}, {len(self.classes)} classes"]
        return [
            f"{self.recipe_name}, no detector: they are used in a recipe, with",
            *(f"  {setting}" for setting in (f"detector.backbone.weights={self.out}", *self.settings)),
        ]


def _by_reason(reasons: dict[str, str]) -> Iterator[str]:
    """One line per reason: a ResNet-50 has 53 keys that are left out for the same one."""
    keys: dict[str, list[str]] = defaultdict(list)
    for key, reason in reasons.items():
        keys[reason].append(key)
    for reason, of_reason in keys.items():
        more = f" and {len(of_reason) - 1} more" if len(of_reason) > 1 else ""
        yield f"{of_reason[0]}{more} ({reason})"


def convert_file(
    source: Path,
    out: Path,
    *,
    system: str = "auto",
    recipe: str | None = None,
    classes: str | None = None,
    overrides: Sequence[str] = (),
    allow_unmapped: bool = False,
) -> ConversionReport:
    """Read another system's file without running anything in it, convert it, check that it builds, and write ours.

    `recipe`: a named recipe or a file, where the keys cannot tell. `classes`: names separated by commas, or a file with
    one a line. Raises `CheckpointError` with every problem.
    """
    refuse_unwritable([out])
    file = read_foreign(source)
    chosen, why = choose_system(file, system)
    try:
        backbone = chosen.recognise_backbone(file)
    except CheckpointError as error:
        raise _of_file(source, error) from error
    if backbone is not None:
        return _write_backbone(file, out, backbone, system=chosen.name, why=why)
    named = None if recipe is None else resolve_recipe(recipe, allow_unmapped=allow_unmapped).spec
    wanted = Wanted(recipe_name=recipe, recipe=named, class_names=_read_names(classes))
    detector = convert_detector(file, chosen, wanted, overrides)
    save_weights(out, detector.converted.state, detector.meta)
    return ConversionReport(
        source=source,
        out=out,
        system=chosen.name,
        why=why,
        recipe_name=detector.model.recipe_name,
        classes=detector.model.classes,
        converted=detector.converted,
        assumptions=detector.model.assumptions,
        notes=file.notes,
    )


@dataclass(frozen=True, kw_only=True)
class ConvertedDetector:
    """What a file was taken for, its tensors as ours, and what our checkpoint of it says."""

    model: ForeignModel
    converted: Converted
    meta: CheckpointMeta


def convert_detector(
    file: ForeignFile, system: AbstractSystem, wanted: Wanted, overrides: Sequence[str] = ()
) -> ConvertedDetector:
    """A detector of a system as ours, checked that it builds. Raises `CheckpointError` with every problem."""
    try:
        model = system.recognise(file, wanted)
    except UnnamedClasses as error:
        raise UnnamedClasses(_of_file(file.path, error).problems, count=error.count) from error
    except CheckpointError as error:
        raise _of_file(file.path, error) from error
    built = resolve_recipe(model.recipe, overrides).spec
    converted = model.key_map(built).to_ours(model.tensors)
    detector = build_detector(built.detector, num_classes=len(model.classes), pretrained=False)
    try:
        load_into(detector, converted.state)
    except CheckpointError as error:
        given = f"its tensors do not fit the recipe {model.recipe_name}"
        remedy = "without --recipe or --config the structure is read from the file"
        problem = Problem(where=str(file.path), given=given, remedy=remedy)
        raise CheckpointError((problem, *error.problems)) from error
    meta = CheckpointMeta(recipe=to_yaml(built), classes=model.classes)
    return ConvertedDetector(model=model, converted=converted, meta=meta)


def _of_file(source: Path, error: CheckpointError) -> CheckpointError:
    return CheckpointError(replace(each, where=f"{source}: {each.where}") for each in error.problems)


def _write_backbone(
    file: ForeignFile, out: Path, backbone: ForeignBackbone, *, system: str, why: str
) -> ConversionReport:
    """A file that `detector.backbone.weights` takes: tensors under torchvision's names, and nothing else."""
    state = {name: tensor.contiguous() for name, tensor in backbone.converted.state.items()}
    write_atomically(out, safetensors.torch.save(state))
    return ConversionReport(
        source=file.path,
        out=out,
        system=system,
        why=why,
        recipe_name=backbone.title,
        classes=ClassTable(names=()),
        converted=backbone.converted,
        assumptions=(),
        notes=file.notes,
        settings=backbone.settings,
    )


def export_file(source: Path, out: Path, *, system: str) -> list[str]:
    """Write a checkpoint of ours as a file that another system loads (`.pth`), and say what was done.

    Raises `CheckpointError` where that system cannot compute what the recipe inside says, with each setting.
    """
    refuse_unwritable([out])
    systems = {each.name: each for each in all_systems()}
    if system not in systems:
        problem = Problem(where="--to", given=system, allowed=", ".join(systems), remedy=nearest(system, list(systems)))
        raise CheckpointError(problem)
    checkpoint = read_weights(source)
    recipe = recipe_inside(source, checkpoint.meta)
    try:
        exported = systems[system].export(checkpoint.state_dict, recipe, checkpoint.meta.classes)
    except CheckpointError as error:
        given = f"a detector that {system} cannot hold"
        raise CheckpointError((Problem(where=str(source), given=given), *error.problems)) from error
    buffer = io.BytesIO()
    torch.save(exported, buffer)
    write_atomically(out, buffer.getvalue())
    return [f"{source}: {len(checkpoint.state_dict)} tensors under {system}'s names", f"written: {out}"]


def choose_system(file: ForeignFile, name: str) -> tuple[AbstractSystem, str]:
    """The system of that name, or the one whose signs the file has, and why. Raises `CheckpointError`."""
    systems = {system.name: system for system in all_systems()}
    if name in systems:
        return systems[name], "--from says so"
    if name != "auto":
        allowed = f"auto, {', '.join(systems)}"
        raise CheckpointError(
            Problem(where="--from", given=name, allowed=allowed, remedy=nearest(name, [*systems, "auto"]))
        )
    found = [(system, why) for system in systems.values() if (why := system.signs(file))]
    if len(found) != 1:
        given = "keys of no system that is known here" if not found else "keys of several systems"
        reasons = "".join(f"; {system.name}: {why}" for system, why in found)
        raise CheckpointError(
            Problem(
                where=str(file.path),
                given=f"{given}{reasons} ({len(file.tensors)} tensors, first {sorted(file.tensors)[:3]})",
                allowed=", ".join(systems),
                remedy="say which it is: --from SYSTEM",
            )
        )
    return found[0]


def _read_names(classes: str | None) -> tuple[str, ...] | None:
    """Names from a text `A,B,C` or a file with one a line. Raises `CheckpointError` for one that is there twice."""
    if classes is None:
        return None
    is_file = os.path.isfile(classes)  # not Path.is_file, which raises where many names are too long for a path
    try:
        text = Path(classes).read_text(encoding="utf-8").splitlines() if is_file else classes.split(",")
    except (OSError, UnicodeDecodeError) as error:
        problem = Problem(where=classes, given=f"cannot be read ({error})", allowed="a text file with one name a line")
        raise CheckpointError(problem) from error
    names = tuple(name.strip() for name in text if name.strip())
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        given = f"{', '.join(twice)} more than once"
        raise CheckpointError(Problem(where="--classes", given=given, allowed="a name of its own for each class"))
    return names
