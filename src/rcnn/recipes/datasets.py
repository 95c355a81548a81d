"""Which pictures a recipe trains on and is judged by: its splits, or pictures that are held out."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from rcnn.data.folder import Layout, find_layout, read_dataset, resolve_split
from rcnn.data.table import AnnotationTable
from rcnn.errors import DataError, Problem, RecipeError
from rcnn.recipes.recipe import DataSpec, FirstStageSpec, Recipe
from rcnn.records import ClassTable


@dataclass(frozen=True, kw_only=True)
class Splits:
    """What is trained on and what is evaluated on; `notes` are lines for people about how they came to be."""

    train: AnnotationTable
    evaluation: AnnotationTable | None
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class EvaluationData:
    """What a checkpoint is judged by, and lines for people about it."""

    truth: AnnotationTable
    notes: tuple[str, ...]


# What a detector without classes finds.
OBJECT = ClassTable(names=("object",))


def without_classes(table: AnnotationTable) -> AnnotationTable:
    """The same boxes, all of one class: the truth of a first stage alone."""
    return replace(table, classes=OBJECT, labels=np.zeros_like(table.labels))


def read_splits(data: DataSpec, *, seed: int, judged: bool = True) -> Splits:
    """Both splits of the recipe's data. Class names come from the training split. Raises `DataError`.

    Where the training is not `judged`, there is no evaluation, and the same pictures are trained on.
    """
    path = data_path(data)
    layout = find_layout(path)
    train_name, evaluation_name = _training_split(layout, data), _evaluation_split(layout, data)
    train, evaluation = _read_both(data, path, train_name, evaluation_name if judged else None)
    notes = [table.findings.summary() for table in (train, evaluation) if table is not None and table.findings]
    if evaluation_name is None and data.holdout:
        train, evaluation = hold_out(train, data.holdout, seed)
        notes.append(
            f'no split "val" or "test": {len(evaluation):,} pictures of "{train_name}" are held out for evaluation '
            f"(data.holdout={data.holdout:g})"
        )
    elif evaluation_name is None:
        notes.append("no evaluation: there is no split for it, and data.holdout is 0")
    elif evaluation is not None and (shared := _pictures_in_both(train, evaluation)):
        notes.append(f"{shared:,} of the {len(evaluation):,} pictures evaluated on are trained on: mind the numbers")
    if not (~train.ignored).any():
        raise DataError(
            Problem(
                where=path,
                given=f'no picture of the training split "{train_name}" has a box',
                remedy=f"check that the annotations lie where they are looked for: rcnn data check {path}",
            )
        )
    train = _without_empty(train, notes) if data.skip_empty else train
    if not judged:
        notes.append("no evaluation: evaluate.every_epochs is 0; the last checkpoint is kept, and none is the best")
    return Splits(train=train, evaluation=evaluation if judged else None, notes=tuple(notes))


def has_evaluation(data: DataSpec) -> bool:
    """Whether a training finds pictures to judge by; annotations are not read. Raises `DataError`, `RecipeError`."""
    return data.holdout > 0 or _evaluation_split(find_layout(data_path(data)), data) is not None


def data_path(data: DataSpec) -> str:
    if data.path is None:
        raise RecipeError(
            Problem(
                where="data.path", given="no data set", remedy="give its folder: --data DIR, or data.path in a file"
            )
        )
    return data.path


def _read_both(
    data: DataSpec, path: str, train_name: str, evaluation_name: str | None
) -> tuple[AnnotationTable, AnnotationTable | None]:
    """Both splits, or one `DataError` with the mistakes of both."""
    train = evaluation = None
    problems: list[Problem] = []
    try:
        train = _read(data, path, train_name)
    except DataError as error:
        problems += error.problems
    if evaluation_name is not None:
        classes = train.classes if train is not None else None
        try:
            evaluation = _read(data, path, evaluation_name, classes=classes)
        except DataError as error:
            problems += [problem for problem in error.problems if problem not in problems]
    if problems or train is None:
        raise DataError(problems)
    return train, evaluation


def _read(data: DataSpec, path: str, split: str, *, classes: ClassTable | None = None) -> AnnotationTable:
    """One split with the classes that the recipe reads. Raises `DataError`, `RecipeError`."""
    repeated = sorted({name for name in data.classes or () if data.classes and data.classes.count(name) > 1})
    if repeated:
        given = f"{', '.join(repeated)} more than once"
        raise RecipeError(Problem(where="data.classes", given=given, allowed="a name of its own for each class"))
    return read_dataset(path, split=split, classes=classes, only=data.classes, bad_boxes=data.bad_boxes)


def _training_split(layout: Layout, data: DataSpec) -> str:
    names = tuple(layout.splits)
    if data.train_split is not None:
        return _named_split(layout, data.train_split, "data.train_split")
    name = _first_of(names, ("train",)) or (names[0] if len(names) == 1 else None)
    if name is None:
        raise DataError(
            Problem(
                where=str(layout.path),
                given='there is no split "train"',
                allowed=", ".join(names),
                remedy="choose one: data.train_split=NAME",
            )
        )
    return name


def _evaluation_split(layout: Layout, data: DataSpec) -> str | None:
    """The split to evaluate on; None where there is none."""
    if data.eval_split is not None:
        return _named_split(layout, data.eval_split, "data.eval_split")
    train = _training_split(layout, data)
    others = tuple(name for name in layout.splits if name != train)
    # VOC's trainval holds all of val.
    return _first_of(others, ("test", "val") if train.startswith("trainval") else ("val", "test"))


def _named_split(layout: Layout, name: str, setting: str) -> str:
    try:
        return resolve_split(layout, name)
    except DataError as error:
        remedies = [f"{problem.remedy}; set {setting}=NAME" for problem in error.problems]
        pairs = zip(error.problems, remedies, strict=True)
        raise DataError(replace(problem, remedy=remedy) for problem, remedy in pairs) from error


def _first_of(names: tuple[str, ...], wanted: tuple[str, ...]) -> str | None:
    """The first of `wanted` that a split is called by, under its usual variants (val, valid, val2017)."""
    for name in wanted:
        variants = (name, "valid", "validation") if name == "val" else (name,)
        for split in names:
            if split.rstrip("0123456789").rstrip("_-") in variants:
                return split
    return None


def _pictures_in_both(one: AnnotationTable, other: AnnotationTable) -> int:
    paths = [{table.path(index) for index in range(len(table))} for table in (one, other)]
    return len(paths[0] & paths[1])


def hold_out(table: AnnotationTable, share: float, seed: int) -> tuple[AnnotationTable, AnnotationTable]:
    """Pictures for training and pictures for evaluation, drawn by the seed. Raises `DataError` for a single picture."""
    if len(table) < 2:
        raise DataError(
            Problem(where=str(table.root), given="one picture", allowed="at least two, to train and to evaluate")
        )
    order = np.random.default_rng(seed).permutation(len(table))
    count = min(max(round(len(table) * share), 1), len(table) - 1)
    return table.select(np.sort(order[count:])), table.select(np.sort(order[:count]))


def _without_empty(table: AnnotationTable, notes: list[str]) -> AnnotationTable:
    usable = np.add.reduceat(np.append(~table.ignored, False), table.starts[:-1]) * (np.diff(table.starts) > 0) > 0
    if usable.all():
        return table
    notes.append(f"{int((~usable).sum()):,} pictures without boxes are not trained on (data.skip_empty)")
    return table.select(np.flatnonzero(usable))


def read_evaluation(path: str, *, split: str | None, classes: ClassTable | None, recipe: Recipe) -> EvaluationData:
    """The split that `rcnn eval` judges by: the one named, else the recipe's, else "val", "test" or the only one.

    `classes`: those that labels are of; None: the data's own. A first stage alone has none: all boxes are objects.
    Where the training held pictures of its only split out, these are taken: the others were trained on.
    """
    data = recipe.data
    layout = find_layout(path)
    chosen = split or _usual_split(layout, data)
    name = resolve_split(layout, chosen)
    agnostic = classes is not None and isinstance(recipe.detector, FirstStageSpec)
    truth = _read(data, path, name, classes=None if agnostic else classes)
    truth = without_classes(truth) if agnostic else truth
    notes = [truth.findings.summary()] if truth.findings else []
    same_data = data.path is not None and Path(data.path).resolve() == Path(path).resolve()
    if same_data and name == _training_split(layout, data):
        if split is None and data.holdout and _evaluation_split(layout, data) is None:
            _, truth = hold_out(truth, data.holdout, recipe.train.seed)
            notes.append(f"the {len(truth):,} pictures that the training held out; all of them: --split {name}")
        else:
            notes.append(f'"{name}" is the split that was trained on: mind the numbers')
    return EvaluationData(truth=truth, notes=tuple(notes))


def _usual_split(layout: Layout, data: DataSpec) -> str | None:
    if data.eval_split is not None:
        with contextlib.suppress(DataError):  # a recipe's own name need not be one of this data set
            return resolve_split(layout, data.eval_split)
    return _first_of(tuple(layout.splits), ("val", "test"))
