"""From the recipe's choices to the tables and loaders of training and evaluation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rcnn.data.folder import find_layout, read_dataset, resolve_split
from rcnn.data.loading import BatchLoader, build_eval_loader, build_train_loader
from rcnn.data.table import AnnotationTable
from rcnn.errors import DataError, Problem, RecipeError
from rcnn.recipes.recipe import DataSpec, ImageSpec, Recipe
from rcnn.records import ClassTable
from rcnn.transforms.geometry import EvalTransform, HorizontalFlip, Resize, TrainTransform


@dataclass(frozen=True, kw_only=True)
class Splits:
    """What is trained on and what is evaluated on; `notes` are lines for people about how they came to be."""

    train: AnnotationTable
    evaluation: AnnotationTable | None
    notes: tuple[str, ...]


def read_splits(data: DataSpec, *, seed: int) -> Splits:
    """Both splits of the recipe's data. Class names come from the training split. Raises `DataError`."""
    path = data_path(data)
    layout = find_layout(path)
    names = tuple(layout.splits)
    train_name = data.train_split or _first_of(names, ("train",)) or (names[0] if len(names) == 1 else None)
    if train_name is None:
        raise DataError(
            Problem(
                where=path,
                given='there is no split "train"',
                allowed=", ".join(names),
                remedy="choose one: data.train_split=NAME",
            )
        )
    train = read_dataset(path, split=train_name, bad_boxes=data.bad_boxes)
    evaluation_name = data.eval_split or _first_of(tuple(n for n in names if n != train.split), ("val", "test"))
    notes = []
    evaluation: AnnotationTable | None = None
    if evaluation_name is not None:
        evaluation = read_dataset(path, split=evaluation_name, classes=train.classes, bad_boxes=data.bad_boxes)
        if evaluation.split == train.split:
            notes.append(f'evaluated on the split that is trained on ("{train.split}"): the numbers say little')
    elif data.holdout:
        train, evaluation = hold_out(train, data.holdout, seed)
        notes.append(
            f'no split "val" or "test": {len(evaluation):,} pictures of "{train_name}" are held out for evaluation '
            f"(data.holdout={data.holdout:g})"
        )
    else:
        notes.append("no evaluation: there is no split for it, and data.holdout is 0")
    for table in (train, evaluation):
        if table is not None and table.findings:
            notes.append(f"{table.findings.summary()}; rcnn data check {path} lists them")
    train = _without_empty(train, notes) if data.skip_empty else train
    return Splits(train=train, evaluation=evaluation, notes=tuple(notes))


def data_path(data: DataSpec) -> str:
    if data.path is None:
        raise RecipeError(
            Problem(
                where="data.path", given="no data set", remedy="give its folder: --data DIR, or data.path in a file"
            )
        )
    return data.path


def _first_of(names: tuple[str, ...], wanted: tuple[str, ...]) -> str | None:
    """The first of `wanted` that a split is called by, under its usual variants (val, valid, val2017)."""
    for name in wanted:
        variants = (name, "valid", "validation") if name == "val" else (name,)
        for split in names:
            if split.rstrip("0123456789").rstrip("_-") in variants:
                return split
    return None


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


def per_process(recipe: Recipe, num_processes: int) -> int:
    """Pictures in one forward pass of one process. Raises `RecipeError` where the batch cannot be shared out."""
    parts = num_processes * recipe.train.accumulate
    if recipe.train.batch_size % parts:
        raise RecipeError(
            Problem(
                where="train.batch_size",
                given=f"{recipe.train.batch_size} pictures for {num_processes} processes and "
                f"{recipe.train.accumulate} forward passes each",
                allowed=f"a multiple of {parts}",
            )
        )
    return recipe.train.batch_size // parts


def build_resize(image: ImageSpec, short_sides: tuple[int, ...] | None = None) -> Resize:
    return Resize(
        short_sides=short_sides or (image.short_side,),
        max_long_side=image.max_long_side,
        rounding=image.rounding,
        kernel=image.kernel,
    )


def build_loader_for_training(table: AnnotationTable, recipe: Recipe, *, rank: int, num_processes: int) -> BatchLoader:
    image, data = recipe.detector.image, recipe.data
    transform = TrainTransform(flip=HorizontalFlip(probability=data.flip), resize=build_resize(image, data.short_sides))
    return build_train_loader(
        table,
        transform,
        batch_size=per_process(recipe, num_processes),
        divisor=image.divisor,
        aspect_ratio_factor=data.aspect_ratio_groups,
        seed=recipe.train.seed,
        rank=rank,
        world_size=num_processes,
        num_workers=data.workers,
    )


def build_loader_for_evaluation(
    table: AnnotationTable, recipe: Recipe, *, rank: int = 0, num_processes: int = 1
) -> BatchLoader:
    """One picture at a time: on a CPU batches buy nothing, and padding would cost."""
    image = recipe.detector.image
    return build_eval_loader(
        table,
        EvalTransform(resize=build_resize(image)),
        batch_size=1,
        divisor=image.divisor,
        rank=rank,
        world_size=num_processes,
        num_workers=recipe.data.workers,
    )


def read_evaluation(path: str, *, split: str | None, classes: ClassTable, data: DataSpec) -> AnnotationTable:
    """The split that `rcnn eval` judges by: the one named, else the recipe's, else "val", "test" or the only one."""
    layout = find_layout(path)
    names = tuple(layout.splits)
    chosen = split or (data.eval_split if data.eval_split in names else None) or _first_of(names, ("val", "test"))
    return read_dataset(path, split=resolve_split(layout, chosen), classes=classes, bad_boxes=data.bad_boxes)
