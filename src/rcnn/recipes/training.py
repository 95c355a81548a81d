"""A training from a recipe: data, detector, optimizer, schedule and evaluation put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from rcnn.config.edit import edit
from rcnn.config.text import from_yaml, to_yaml
from rcnn.data.folder import describe
from rcnn.data.loading import BatchLoader
from rcnn.detectors.preparation import prepared_detector
from rcnn.detectors.two_stage import TwoStageDetector
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
from rcnn.errors import CheckpointError, Problem
from rcnn.recipes.datasets import (
    Splits,
    build_loader_for_evaluation,
    build_loader_for_training,
    read_splits,
)
from rcnn.recipes.judging import BEST_METRIC, Evaluation, judge, pictures_of, report
from rcnn.recipes.models import build_detector
from rcnn.recipes.recipe import AdamSpec, MultiStepSpec, OptimizerSpec, Recipe, SGDSpec, TrainSpec
from rcnn.recipes.resolve import resolve_recipe

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn
    from torch.optim import Optimizer

    from rcnn.engine.journal import Pictures


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
    data: str | None = None,
    init_from: Path | None = None,
    device: Device = "auto",
    progress: AbstractProgress | None = None,
) -> TrainResult:
    """Train a recipe on its data and leave everything in `run_folder` (which must not hold a run yet).

    `data` sets the recipe's `data.path`. `init_from` starts from a checkpoint of ours, not from ImageNet weights:
    tensors that depend on the classes are taken if the classes are the same, and left random otherwise, which is said.
    Errors: `RecipeError`, `DataError`, `SetupError`, `CheckpointError`, `DownloadError`, `RunError`; `Interrupted`
    after SIGINT or SIGTERM, with everything saved.
    """
    recipe = edit(recipe, {"data.path": data}) if data is not None else recipe
    shown = progress or SilentProgress()
    accelerator = build_accelerator(precision=recipe.train.precision, device=device)
    splits = read_splits(recipe.data, seed=recipe.train.seed)
    run = RunFolder(run_folder)
    on_first_process(accelerator, lambda: RunFolder.create(run_folder, recipe=to_yaml(recipe)))
    training = _Training(recipe=recipe, splits=splits, run=run, accelerator=accelerator, progress=shown)
    return training.run_from(init_from)


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
    recipe = resolve_recipe(from_yaml(read_meta(run.last).recipe, Recipe), overrides).spec
    accelerator = build_accelerator(precision=recipe.train.precision, device=device)
    splits = read_splits(recipe.data, seed=recipe.train.seed)
    training = _Training(
        recipe=recipe, splits=splits, run=run, accelerator=accelerator, progress=progress or SilentProgress()
    )
    return training.run_again()


@dataclass(frozen=True, kw_only=True)
class _Training:
    recipe: Recipe
    splits: Splits
    run: RunFolder
    accelerator: Accelerator
    progress: AbstractProgress

    def run_from(self, init_from: Path | None) -> TrainResult:
        seed_everything(self.recipe.train.seed)
        detector = build_detector(
            self.recipe.detector, num_classes=len(self.splits.train.classes), pretrained=init_from is None
        )
        if init_from is not None:
            self.progress.noted(start_from(detector, init_from, self.splits))
        return self._run(detector, resume=False)

    def run_again(self) -> TrainResult:
        detector = build_detector(self.recipe.detector, num_classes=len(self.splits.train.classes), pretrained=False)
        return self._run(detector, resume=True)

    def _run(self, detector: TwoStageDetector, *, resume: bool) -> TrainResult:
        train = self.recipe.train
        loader = build_loader_for_training(self.splits.train, self.recipe, **self._share)
        steps_per_epoch = num_steps_per_epoch(len(loader), train.accumulate)
        for line in (describe(self.splits.train), *self._evaluation_line(), *self.splits.notes):
            self.progress.noted(line)
        detector.to(self.accelerator.device)
        evaluation_loader = self._evaluation_loader()
        latest: list[Evaluation] = []

        def evaluate() -> Mapping[str, float]:
            latest[:] = [self._evaluate(detector, evaluation_loader)]
            return latest[0].metrics(self.recipe.evaluate)

        summary = run_training(
            detector=detector,
            train_loader=loader,
            optimizer=build_optimizer(detector, train.optimizer),
            schedule=build_schedule(train, steps_per_epoch),
            accelerator=self.accelerator,
            run=self.run,
            meta=CheckpointMeta(recipe=to_yaml(self.recipe), classes=self.splits.train.classes),
            settings=TrainSettings(
                epochs=train.epochs,
                max_steps=train.max_steps,
                accumulate=train.accumulate,
                clip_norm=train.clip_norm,
                evaluate_every_epochs=self.recipe.evaluate.every_epochs,
                best_metric=BEST_METRIC[self.recipe.evaluate.metric],
                seed=train.seed,
                channels_last=True,
            ),
            evaluate=evaluate if evaluation_loader is not None else None,
            on_preview=self._previewer(latest) if self.recipe.evaluate.pictures else None,
            progress=self.progress,
            resume=resume,
        )
        return TrainResult(
            run=self.run, summary=summary, evaluation=self._conclude(detector, evaluation_loader, summary, latest)
        )

    @property
    def _share(self) -> dict[str, int]:
        return {"rank": self.accelerator.process_index, "num_processes": self.accelerator.num_processes}

    def _evaluation_line(self) -> list[str]:
        return [] if self.splits.evaluation is None else [f"evaluated on {describe(self.splits.evaluation)}"]

    def _evaluation_loader(self) -> BatchLoader | None:
        if self.splits.evaluation is None:
            return None
        return build_loader_for_evaluation(self.splits.evaluation, self.recipe, **self._share)

    def _evaluate(self, detector: TwoStageDetector, loader: BatchLoader | None) -> Evaluation:
        assert loader is not None and self.splits.evaluation is not None
        # Prepared in float32, whatever the precision of the training: the numbers shall be those of `rcnn eval`.
        found = predict_all(
            prepared_detector(detector, torch.float32),
            loader,
            accelerator=self.accelerator,
            on_batch=PredictionCounter(self.progress, total_images=len(self.splits.evaluation)),
        )
        return judge(self.splits.evaluation, found)

    def _previewer(self, latest: list[Evaluation]) -> Callable[[], Pictures]:
        def preview() -> Pictures:
            evaluation = latest[0]
            pictures = pictures_of(evaluation.truth, evaluation.found, count=self.recipe.evaluate.pictures)
            return {name: np.asarray(picture) for name, picture in pictures.items()}

        return preview

    def _conclude(
        self, detector: TwoStageDetector, loader: BatchLoader | None, summary: TrainSummary, latest: list[Evaluation]
    ) -> Evaluation | None:
        """The best checkpoint's numbers, pictures and page; judged once more where it is not the last one."""
        if loader is None or not self.run.best.exists():
            return None
        if latest and summary.best_step == summary.step:
            evaluation = latest[0]
        else:
            load_into(detector, read_weights(self.run.best).state_dict)
            evaluation = self._evaluate(detector, loader)
        if self.accelerator.is_main_process:
            pictures = pictures_of(evaluation.truth, evaluation.found, count=self.recipe.evaluate.pictures)
            for name, picture in pictures.items():
                picture.save(self.run.predictions / f"{name}.png")
            report(
                self.run.report,
                evaluation,
                title=self.run.path.name,
                facts={
                    "data": describe(evaluation.truth),
                    "checkpoint": str(self.run.best),
                    "best at step": f"{summary.best_step} of {summary.step}",
                },
                history=list(self.run.rows()),
                pictures=pictures,
            )
        return evaluation


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
    if isinstance(spec.schedule, MultiStepSpec):
        return multi_step_schedule(
            milestones=[round(share * total) for share in spec.schedule.milestones],
            gamma=spec.schedule.gamma,
            warm_up_steps=warm_up_steps,
            warm_up_factor=warm_up_factor,
        )
    return cosine_schedule(
        total_steps=total,
        end_factor=spec.schedule.final_factor,
        warm_up_steps=warm_up_steps,
        warm_up_factor=warm_up_factor,
    )


def start_from(detector: TwoStageDetector, path: Path, splits: Splits) -> str:
    """Weights of a checkpoint of the same structure; its predictor too where the classes are the same."""
    checkpoint = read_weights(path)
    state = dict(checkpoint.state_dict)
    same = checkpoint.meta.classes.names == splits.train.classes.names
    if not same:
        own = detector.state_dict()
        state |= {name: own[name] for name in own if name.startswith("roi.predictor.")}
    try:
        load_into(detector, state)
    except CheckpointError as error:
        problem = Problem(where=str(path), given="a detector of another structure", remedy="choose its own recipe")
        raise CheckpointError((problem, *error.problems)) from error
    if same:
        return f"started from {path}, its predictor included: the classes are the same"
    return f"started from {path}; the predictor of the second stage starts anew: the classes differ"
