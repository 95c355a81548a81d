"""A training from a recipe: data, detector, optimizer, schedule and evaluation put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from rcnn.atomic_file import write_atomically
from rcnn.config.edit import edit
from rcnn.config.text import to_yaml
from rcnn.data.folder import describe
from rcnn.data.loading import BatchLoader
from rcnn.detectors.preparation import prepared_detector
from rcnn.detectors.pyramid import AbstractPyramidDetector
from rcnn.drawing import save_picture
from rcnn.engine import optimizer as optimizers
from rcnn.engine.accelerator import Device, build_accelerator
from rcnn.engine.checkpoint import CheckpointMeta, load_into, read_meta, read_weights
from rcnn.engine.evaluate import predict_all
from rcnn.engine.processes import on_first_process
from rcnn.engine.progress import AbstractProgress, PredictionCounter, SilentProgress
from rcnn.engine.random_state import seed_everything
from rcnn.engine.run_folder import RunFolder
from rcnn.engine.schedule import Schedule, cosine_schedule, multi_step_schedule
from rcnn.engine.train import TrainSettings, TrainSummary, num_steps_per_epoch
from rcnn.engine.train import train as run_training
from rcnn.errors import DataError, ImageError, Problem, RecipeError
from rcnn.recipes.checkpoints import recipe_inside, start_from
from rcnn.recipes.datasets import Splits, data_path, read_splits, without_classes
from rcnn.recipes.judging import BEST_METRIC, Evaluation, judge, pictures_of, report
from rcnn.recipes.loaders import (
    build_loader_for_evaluation,
    build_loader_for_training,
    per_process,
    refuse_misplaced_proposals,
    refuse_unfit_proposals,
)
from rcnn.recipes.models import backbone_file, build_detector
from rcnn.recipes.recipe import AdamSpec, FirstStageSpec, MultiStepSpec, OptimizerSpec, Recipe, SGDSpec, TrainSpec
from rcnn.recipes.resolve import resolve_recipe
from rcnn.recipes.starts import ReadStart, StartFile, file_of_start, read_own_start, read_start
from rcnn.recipes.warm_start import SETTING as FIRST_STAGE_SETTING
from rcnn.recipes.warm_start import first_stage_start, start_first_stage

if TYPE_CHECKING:
    from accelerate import Accelerator
    from PIL import Image
    from torch import nn
    from torch.optim import Optimizer

    from rcnn.engine.journal import Pictures

# What is done where the folder of a run exists already.
IfTaken = Literal["refuse", "number"]


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """Where a training ended. `evaluation` is that of the best checkpoint; None where nothing was evaluated."""

    run: RunFolder
    summary: TrainSummary
    evaluation: Evaluation | None


def train(
    recipe: Recipe,
    *,
    run_folder: Path,
    if_taken: IfTaken = "refuse",
    data: str | None = None,
    init_from: str | Path | None = None,
    device: Device = "auto",
    progress: AbstractProgress | None = None,
    read: ReadStart = read_own_start,
) -> TrainResult:
    """Train a recipe on its data and leave everything in `run_folder`.

    Where that holds a run already it is refused, or numbered (NAME-2, NAME-3, ...). `data` sets the recipe's
    `data.path`, `init_from` its `train.init_from`: a checkpoint to start from, of ours or of a system that `read`
    knows, or its address on the web. Tensors that depend on the classes are taken if the classes are the same, and left
    random otherwise, which is said.
    Errors: `RecipeError`, `DataError`, `ImageError`, `SetupError`, `CheckpointError`, `DownloadError`, `RunError`;
    `Interrupted` after SIGINT or SIGTERM, with everything saved.
    """
    recipe = edit(recipe, {"data.path": data}) if data is not None else recipe
    recipe = edit(recipe, {"train.init_from": str(init_from)}) if init_from is not None else recipe
    prepared = _prepare(recipe, device, progress)
    seed_everything(recipe.train.seed)
    detector = _started_detector(recipe, prepared, read)
    text = to_yaml(recipe)
    run = on_first_process(
        prepared.accelerator, lambda: RunFolder.create(_place_of_run(run_folder, if_taken), recipe=text)
    )
    return _Training(recipe=recipe, run=run, prepared=prepared, detector=detector).run_through(resume=False)


def _started_detector(recipe: Recipe, prepared: _Prepared, read: ReadStart) -> AbstractPyramidDetector:
    """The detector with the weights that the recipe starts from: a whole one's, its first stage's, or ImageNet's."""
    classes = prepared.splits.train.classes
    whole, part = recipe.train.init_from, first_stage_start(recipe.detector)
    from_imagenet = whole is None and part is None
    if from_imagenet:
        # Fetched by the first process, where it has to be, before all read it.
        find = partial(backbone_file, recipe.detector.backbone, say=prepared.progress.noted)
        on_first_process(prepared.accelerator, find)
    detector = build_detector(recipe.detector, num_classes=len(classes), pretrained=from_imagenet)
    lines: list[str] = []
    if whole is not None:
        lines = start_from(detector, recipe, _read_start(whole, "train.init_from", prepared, read), classes)
    elif part is not None:
        lines = start_first_stage(detector, recipe, _read_start(part, FIRST_STAGE_SETTING, prepared, read))
    for line in lines:
        prepared.progress.noted(line)
    return detector


def _read_start(name: str, setting: str, prepared: _Prepared, read: ReadStart) -> StartFile:
    """By every process for itself, once the first one has fetched what has to be fetched."""
    find = partial(file_of_start, name, setting=setting, say=prepared.progress.noted)
    path = on_first_process(prepared.accelerator, find)
    # Elsewhere than on the first one's machine it may have to be fetched once more.
    return read_start(name, path if path.exists() else find(), setting=setting, read=read)


def resume(
    run_folder: Path,
    *,
    overrides: Sequence[str] = (),
    device: Device = "auto",
    progress: AbstractProgress | None = None,
) -> TrainResult:
    """Go on with a run that was interrupted, from its last checkpoint and with its recipe.

    `overrides` (`path=value`) change the recipe from here on: more epochs, another learning rate.
    """
    run = RunFolder.open(run_folder)
    recipe = resolve_recipe(recipe_inside(run.last, read_meta(run.last)), overrides).spec
    _refuse_moved_data(run, data_path(recipe.data))
    prepared = _prepare(recipe, device, progress)
    num_classes = len(prepared.splits.train.classes)
    detector = build_detector(recipe.detector, num_classes=num_classes, pretrained=False)
    on_first_process(prepared.accelerator, lambda: write_atomically(run.recipe, to_yaml(recipe)))
    return _Training(recipe=recipe, run=run, prepared=prepared, detector=detector).run_through(resume=True)


def _place_of_run(wanted: Path, if_taken: IfTaken) -> Path:
    number, place = 1, wanted
    while if_taken == "number" and place.exists():
        number += 1
        place = wanted.with_name(f"{wanted.name}-{number}")
    return place


def _refuse_moved_data(run: RunFolder, path: str) -> None:
    if not Path(path).exists():
        remedy = f"say where they are: rcnn train --resume {run.path} data.path=FOLDER"
        raise DataError(Problem(where=path, given="the data of the run are not there any more", remedy=remedy))


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """What every training needs before its detector: processes, data, and whom to tell (the first process alone)."""

    accelerator: Accelerator
    splits: Splits
    progress: AbstractProgress

    @property
    def share(self) -> dict[str, int]:
        return {"rank": self.accelerator.process_index, "num_processes": self.accelerator.num_processes}


def _prepare(recipe: Recipe, device: Device, progress: AbstractProgress | None) -> _Prepared:
    accelerator = build_accelerator(precision=recipe.train.precision, device=device)
    per_process(recipe, accelerator.num_processes)  # a batch that cannot be shared out is told before the data are read
    _refuse_recall_of_detections(recipe)
    refuse_misplaced_proposals(recipe)
    splits = read_splits(recipe.data, seed=recipe.train.seed, judged=recipe.evaluate.every_epochs > 0)
    refuse_unfit_proposals(recipe, train=splits.train, evaluation=splits.evaluation)
    if isinstance(recipe.detector, FirstStageSpec):
        evaluation = None if splits.evaluation is None else without_classes(splits.evaluation)
        splits = replace(splits, train=without_classes(splits.train), evaluation=evaluation)
    shown = progress if progress is not None and accelerator.is_main_process else SilentProgress()
    shown.noted(describe(splits.train))
    if splits.evaluation is not None:
        shown.noted(f"evaluated on {describe(splits.evaluation)}")
    for note in splits.notes:
        shown.noted(note)
    return _Prepared(accelerator=accelerator, splits=splits, progress=shown)


def _refuse_recall_of_detections(recipe: Recipe) -> None:
    if recipe.evaluate.metric == "proposals" and not isinstance(recipe.detector, FirstStageSpec):
        raise RecipeError(
            Problem(
                where="evaluate.metric",
                given=f"proposals, of a detector of type {recipe.detector.type}",
                allowed="coco, voc; proposals for a first stage alone (detector.type=first_stage)",
                remedy="judge its proposals after the training: rcnn proposals eval CHECKPOINT --data DIR",
            )
        )


class _Training:
    """One training from its built parts; holds the evaluation that was made last."""

    def __init__(
        self, *, recipe: Recipe, run: RunFolder, prepared: _Prepared, detector: AbstractPyramidDetector
    ) -> None:
        self._recipe, self._run, self._detector = recipe, run, detector
        self._accelerator, self._splits, self._progress = prepared.accelerator, prepared.splits, prepared.progress
        self._share = prepared.share
        self._evaluation_loader = (
            build_loader_for_evaluation(self._splits.evaluation, recipe, **self._share)
            if self._splits.evaluation is not None
            else None
        )
        self._latest: Evaluation | None = None

    def run_through(self, *, resume: bool) -> TrainResult:
        self._detector.to(self._accelerator.device)
        loader = build_loader_for_training(
            self._splits.train, self._recipe, pin_memory=self._accelerator.device.type == "cuda", **self._share
        )
        try:
            summary = self._train(loader, resume=resume)
            evaluation = self._conclude(summary)
        except (ImageError, DataError) as error:
            raise type(error)((*error.problems, self._how_to_go_on())) from error
        return TrainResult(run=self._run, summary=summary, evaluation=evaluation)

    def _train(self, loader: BatchLoader, *, resume: bool) -> TrainSummary:
        train, judged = self._recipe.train, self._recipe.evaluate
        steps_per_epoch = num_steps_per_epoch(len(loader), train.accumulate)
        return run_training(
            detector=self._detector,
            train_loader=loader,
            optimizer=build_optimizer(self._detector, train.optimizer),
            schedule=build_schedule(train, steps_per_epoch),
            accelerator=self._accelerator,
            run=self._run,
            meta=CheckpointMeta(recipe=to_yaml(self._recipe), classes=self._splits.train.classes),
            settings=TrainSettings(
                epochs=train.epochs,
                max_steps=train.max_steps,
                accumulate=train.accumulate,
                clip_norm=train.clip_norm,
                evaluate_every_epochs=judged.every_epochs,
                best_metric=BEST_METRIC[judged.metric],
                seed=train.seed,
                channels_last=True,
            ),
            evaluate=self._metrics if self._evaluation_loader is not None else None,
            on_preview=self._preview if judged.pictures else None,
            name_picture=self._name_of_picture,
            progress=self._progress,
            resume=resume,
        )

    def _name_of_picture(self, image_id: int) -> str:
        table = self._splits.train
        return table.file_names[int(np.flatnonzero(table.image_ids == image_id)[0])]

    def _how_to_go_on(self) -> Problem:
        path = data_path(self._recipe.data)
        goes_on = f"; then rcnn train --resume {self._run.path}" if self._run.last.exists() else ""
        return Problem(
            where=path,
            given="a training needs every picture",
            remedy=f"rcnn data check {path} --decode names all that cannot be used{goes_on}",
        )

    def _metrics(self) -> Mapping[str, float]:
        self._latest = self._evaluate()
        return self._latest.metrics(self._recipe.evaluate)

    def _evaluate(self) -> Evaluation:
        assert self._evaluation_loader is not None and self._splits.evaluation is not None
        # Prepared in float32, whatever the precision of the training: the numbers shall be those of `rcnn eval`.
        found = predict_all(
            prepared_detector(self._detector, torch.float32),
            self._evaluation_loader,
            accelerator=self._accelerator,
            on_batch=PredictionCounter(self._progress, total_images=len(self._evaluation_loader)),
        )
        return judge(self._splits.evaluation, found)

    def _preview(self) -> Pictures:
        assert self._latest is not None
        return {name: np.asarray(picture) for name, picture in self._pictures(self._latest).items()}

    def _pictures(self, evaluation: Evaluation) -> dict[str, Image.Image]:
        return pictures_of(evaluation.truth, evaluation.found, count=self._recipe.evaluate.pictures)

    def _conclude(self, summary: TrainSummary) -> Evaluation | None:
        """The best checkpoint's numbers, pictures and page; judged once more where it is not the last one."""
        if self._evaluation_loader is None or summary.best_step is None:
            return None
        evaluation = self._latest
        if evaluation is None or summary.best_step != summary.step:
            load_into(self._detector, read_weights(self._run.best).state_dict)
            evaluation = self._evaluate()
            self._progress.finished()
        on_first_process(self._accelerator, lambda: self._show(evaluation, summary))
        return evaluation

    def _show(self, evaluation: Evaluation, summary: TrainSummary) -> None:
        pictures = self._pictures(evaluation)
        for name, picture in pictures.items():
            save_picture(self._run.predictions / f"{name}.png", picture)
        report(
            self._run.report,
            evaluation,
            title=self._run.path.name,
            facts={
                "data": describe(evaluation.truth),
                "checkpoint": str(self._run.best),
                "best at step": f"{summary.best_step} of {summary.step}",
            },
            history=list(self._run.rows()),
            pictures=pictures,
        )


def build_optimizer(module: nn.Module, spec: OptimizerSpec) -> Optimizer:
    groups = optimizers.parameter_groups(
        module,
        lr=spec.lr,
        weight_decay=spec.weight_decay,
        norm_weight_decay=spec.norm_weight_decay,
        bias_lr_factor=spec.bias_lr_factor,
        bias_weight_decay=spec.bias_weight_decay,
    )
    if isinstance(spec, SGDSpec):
        return optimizers.sgd(groups, momentum=spec.momentum, nesterov=spec.nesterov)
    if isinstance(spec, AdamSpec):
        return optimizers.adam(groups, betas=spec.betas)
    return optimizers.adamw(groups, betas=spec.betas)


def build_schedule(spec: TrainSpec, steps_per_epoch: int) -> Schedule:
    """The learning rate's factor by step. Shares of the training become steps here."""
    total = min(spec.epochs * steps_per_epoch, spec.max_steps or spec.epochs * steps_per_epoch)
    warm_up_steps = spec.warm_up.steps if spec.warm_up else 0
    warm_up_factor = spec.warm_up.factor if spec.warm_up else 1.0
    warm_up_shape = spec.warm_up.shape if spec.warm_up else "linear"
    if isinstance(spec.schedule, MultiStepSpec):
        return multi_step_schedule(
            milestones=[round(share * total) for share in spec.schedule.milestones],
            gamma=spec.schedule.gamma,
            warm_up_steps=warm_up_steps,
            warm_up_factor=warm_up_factor,
            warm_up_shape=warm_up_shape,
        )
    return cosine_schedule(
        total_steps=total,
        end_factor=spec.schedule.final_factor,
        warm_up_steps=warm_up_steps,
        warm_up_factor=warm_up_factor,
        warm_up_shape=warm_up_shape,
    )
