"""From a recipe and a table to the batches of training and evaluation."""

from __future__ import annotations

import os
from pathlib import Path

from rcnn.data.loading import BatchLoader, build_eval_loader, build_train_loader
from rcnn.data.proposals import ProposalFile, TableProposals, open_proposals
from rcnn.data.table import AnnotationTable
from rcnn.errors import DataError, Problem, RecipeError
from rcnn.recipes.datasets import has_evaluation
from rcnn.recipes.recipe import DataSpec, GivenProposalsSpec, ImageSpec, Recipe, TwoStageSpec
from rcnn.records import Size
from rcnn.transforms.geometry import EvalTransform, HorizontalFlip, Resize, TrainTransform
from rcnn.transforms.jitter import LargeScaleJitter

# Pictures of a file of proposals that are read before a training begins: a second or two.
_VERIFIED = 20_000


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
                remedy=f"train.batch_size={-(-recipe.train.batch_size // parts) * parts}",
            )
        )
    return recipe.train.batch_size // parts


def build_resize(image: ImageSpec, short_sides: tuple[int, ...] | None = None) -> Resize:
    if image.canvas is not None and short_sides is not None:
        raise RecipeError(
            Problem(
                where="data.short_sides",
                given=f"{short_sides} and detector.image.canvas={image.canvas}",
                allowed="one of the two: on a canvas a picture has one size",
                remedy="data.short_sides=null or detector.image.canvas=null",
            )
        )
    return Resize(
        short_sides=short_sides or (image.short_side,),
        max_long_side=image.max_long_side,
        rounding=image.rounding,
        kernel=image.kernel,
        canvas=None if image.canvas is None else Size(*image.canvas),
    )


def build_train_resize(image: ImageSpec, data: DataSpec) -> Resize | LargeScaleJitter:
    """Raises `RecipeError` where sides and jitter are both given."""
    if data.jitter is None:
        sides = data.short_sides
        if sides is not None and data.short_side_draw == "between":
            sides = tuple(range(min(sides), max(sides) + 1))
        return build_resize(image, sides)
    if data.short_sides is not None:
        raise RecipeError(
            Problem(
                where="data.short_sides",
                given=f"{data.short_sides} beside data.jitter",
                allowed="one of the two",
                remedy="data.short_sides=null or data.jitter=null",
            )
        )
    return LargeScaleJitter(
        short_side=data.jitter.short_side,
        max_long_side=data.jitter.max_long_side,
        factors=data.jitter.factors,
        crop_px=data.jitter.crop_px,
        rounding=image.rounding,
        kernel=image.kernel,
    )


def build_loader_for_training(
    table: AnnotationTable, recipe: Recipe, *, rank: int = 0, num_processes: int = 1, pin_memory: bool = False
) -> BatchLoader:
    data = recipe.data
    image = recipe.detector.image.model_copy(update={"divisor": data.train_divisor or recipe.detector.image.divisor})
    transform = TrainTransform(flip=HorizontalFlip(probability=data.flip), resize=build_train_resize(image, data))
    return build_train_loader(
        table,
        transform,
        batch_size=per_process(recipe, num_processes),
        divisor=image.canvas or image.divisor,
        aspect_ratio_factor=data.aspect_ratio_groups,
        seed=recipe.train.seed,
        rank=rank,
        world_size=num_processes,
        num_workers=data.workers,
        pin_memory=pin_memory,
        proposals=_given_proposals(data.train_proposals, table),
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
        divisor=image.canvas or image.divisor,
        rank=rank,
        world_size=num_processes,
        num_workers=recipe.data.workers,
        proposals=_given_proposals(recipe.data.eval_proposals, table),
    )


def refuse_misplaced_proposals(recipe: Recipe) -> None:
    """Raises `RecipeError` where files of proposals are missing, or have no taker. The one for evaluation is asked for
    where there is something to evaluate on."""
    detector = recipe.detector
    wanted = isinstance(detector, TwoStageSpec) and isinstance(detector.proposals, GivenProposalsSpec)
    allowed, remedy = "null: this detector makes its own proposals", "detector.proposals.type=given for a Fast R-CNN"
    if wanted:
        allowed = "a file of proposals for these pictures"
        remedy = "rcnn proposals dump CHECKPOINT --data DIR writes one"
    given = {"train_proposals": recipe.data.train_proposals, "eval_proposals": recipe.data.eval_proposals}
    judged = recipe.evaluate.every_epochs > 0
    problems = [
        Problem(where=f"data.{field}", given=path or "null", allowed=allowed, remedy=remedy)
        for field, path in given.items()
        if wanted != (path is not None)
        and (path or field == "train_proposals" or (judged and has_evaluation(recipe.data)))
    ]
    if problems:
        raise RecipeError(problems)


def refuse_unfit_proposals(recipe: Recipe, *, train: AnnotationTable, evaluation: AnnotationTable | None) -> None:
    """Raises `DataError` with what is wrong with the files of proposals: other pictures, boxes that cannot be."""
    problems: list[Problem] = []
    for path, table in ((recipe.data.train_proposals, train), (recipe.data.eval_proposals, evaluation)):
        try:
            proposals = None if table is None else _given_proposals(path, table)
            if proposals is not None:
                proposals.file.verify(most_pictures=_VERIFIED)
                problems += _missing_scores(recipe, proposals.file)
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)


def _missing_scores(recipe: Recipe, file: ProposalFile) -> list[Problem]:
    fusion = recipe.detector.roi.fusion if isinstance(recipe.detector, TwoStageSpec) else "none"
    if fusion == "none" or file.has_scores:
        return []
    allowed = "none, product, sqrt; the last two need a score for each proposal"
    remedy = "detector.roi.fusion=none, or proposals with scores: rcnn proposals dump CHECKPOINT --data DIR"
    given = f"{fusion}, and proposals without scores in {file.path}"
    return [Problem(where="detector.roi.fusion", given=given, allowed=allowed, remedy=remedy)]


def _given_proposals(path: str | None, table: AnnotationTable) -> TableProposals | None:
    """Raises `DataError` where the file is not of these pictures."""
    return None if path is None else open_proposals(Path(os.path.expanduser(path)), table)
