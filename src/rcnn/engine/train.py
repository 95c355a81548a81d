"""The training loop: step, log, save, evaluate, as explicit calls in this order."""

from __future__ import annotations

import itertools
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from accelerate import Accelerator
from torch.optim import Optimizer

from rcnn.detectors.interface import AbstractDetector
from rcnn.engine.checkpoint import CheckpointMeta, load_into, read_meta, save_weights
from rcnn.engine.interrupt import StopNow, StopRequest
from rcnn.engine.journal import Journal, Pictures
from rcnn.engine.memory import peak_memory_bytes
from rcnn.engine.optimizer import load_optimizer_state, scale_learning_rate
from rcnn.engine.processes import gather_objects, on_first_process
from rcnn.engine.progress import AbstractProgress, SilentProgress, StepReport
from rcnn.engine.random_state import (
    capture_random_state,
    random_state_kept,
    restore_random_state,
    seed_everything,
)
from rcnn.engine.run_folder import RunFolder
from rcnn.engine.schedule import Schedule
from rcnn.engine.step import Batch, Stepper, StepResult
from rcnn.engine.training_state import TrainingState, read_pair, save_pair
from rcnn.errors import CheckpointError, Interrupted, Problem, RunError, nearest


class AbstractTrainLoader(Protocol):
    """Batches of this process's share of the pictures; every process has the same number of them.

    What a batch holds depends on the epoch and its place in it alone, never on the global random generators.
    """

    def __len__(self) -> int: ...

    def set_epoch(self, epoch: int, *, skip_batches: int = 0) -> None: ...

    def __iter__(self) -> Iterator[Batch]: ...


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Choices of a training that are not parts. A step is an optimizer step: `accumulate` batches per process.

    `max_steps` ends the training early; `save_every_steps` and `save_every_minutes` add saves between those at the end
    of each epoch. `best_metric` (higher is better) chooses the best checkpoint. `channels_last` is the memory format.
    """

    epochs: int
    max_steps: int | None = None
    accumulate: int = 1
    clip_norm: float | None = None
    evaluate_every_epochs: int = 1
    best_metric: str = "AP"
    log_every_steps: int = 20
    save_every_steps: int | None = None
    save_every_minutes: float | None = None
    seed: int = 0
    channels_last: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainSummary:
    """Where a training ended. `metrics` are those of its last evaluation, `best_*` belong to the best checkpoint."""

    step: int
    epoch: int
    seconds: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    best_step: int | None = None
    best_metrics: Mapping[str, float] = field(default_factory=dict)


def num_steps_per_epoch(num_batches: int, accumulate: int = 1) -> int:
    """Optimizer steps of an epoch; the last one takes the batches that are left over."""
    return math.ceil(num_batches / accumulate)


def train(
    *,
    detector: AbstractDetector,
    train_loader: AbstractTrainLoader,
    optimizer: Optimizer,
    schedule: Schedule,
    accelerator: Accelerator,
    run: RunFolder,
    meta: CheckpointMeta,
    settings: TrainSettings,
    evaluate: Callable[[], Mapping[str, float]] | None = None,
    on_preview: Callable[[], Pictures] | None = None,
    name_picture: Callable[[int], str] = str,
    progress: AbstractProgress | None = None,
    resume: bool = False,
) -> TrainSummary:
    """Trains `detector` and leaves checkpoints, metrics and curves in `run`.

    `schedule` gives the learning rate's factor for a step. `evaluate` is called on every process and the metrics of the
    first count; `on_preview` is called on the first only; `name_picture` says what an image id is called in messages.
    Raises RunError for a loss that is not finite or a full disk, Interrupted after SIGINT or SIGTERM (the state is
    saved then), CheckpointError where `resume` cannot be done.
    """
    shown = progress if progress and accelerator.is_main_process else SilentProgress()
    with StopRequest() as stop:
        loop = _Loop(
            detector=detector, loader=train_loader, optimizer=optimizer, schedule=schedule, accelerator=accelerator,
            run=run, meta=meta, settings=settings, evaluate=evaluate, on_preview=on_preview, progress=shown, stop=stop,
            name_picture=name_picture,
        )  # fmt: skip
        try:
            return loop.run(resume=resume)
        finally:
            loop.close()


def _worth(metrics: Mapping[str, float], name: str) -> float:
    """A metric to compare by; one that is not a number (no ground truth) is worth less than any that is."""
    value = metrics.get(name, math.nan)
    return -math.inf if math.isnan(value) else value


@dataclass(kw_only=True)
class _Position:
    """`epoch` whole epochs and `steps_in_epoch` steps of the next are done, `step` steps in all."""

    step: int = 0
    epoch: int = 0
    steps_in_epoch: int = 0

    def advance(self, steps_per_epoch: int) -> None:
        self.step += 1
        self.steps_in_epoch += 1
        if self.steps_in_epoch == steps_per_epoch:
            self.epoch, self.steps_in_epoch = self.epoch + 1, 0


class _Loop:
    """The state of one call of `train`."""

    def __init__(
        self,
        *,
        detector: AbstractDetector,
        loader: AbstractTrainLoader,
        optimizer: Optimizer,
        schedule: Schedule,
        accelerator: Accelerator,
        run: RunFolder,
        meta: CheckpointMeta,
        settings: TrainSettings,
        evaluate: Callable[[], Mapping[str, float]] | None,
        on_preview: Callable[[], Pictures] | None,
        progress: AbstractProgress,
        stop: StopRequest,
        name_picture: Callable[[int], str],
    ) -> None:
        self._detector, self._loader, self._optimizer, self._schedule = detector, loader, optimizer, schedule
        self._accelerator, self._run, self._meta, self._settings = accelerator, run, meta, settings
        self._evaluate_detector, self._on_preview, self._progress, self._stop = evaluate, on_preview, progress, stop
        self._steps_per_epoch = num_steps_per_epoch(len(loader), settings.accumulate)
        self._total_steps = settings.epochs * self._steps_per_epoch
        if settings.max_steps is not None:
            self._total_steps = min(self._total_steps, settings.max_steps)
        self._name_picture = name_picture
        self._position = _Position()
        self._metrics: Mapping[str, float] = {}
        self._journal: Journal | None = None
        self._saved_at = time.monotonic()

    def run(self, *, resume: bool) -> TrainSummary:
        started = time.monotonic()
        self._refuse_uneven_shares()
        if self._settings.channels_last:
            self._detector.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self._stepper = Stepper(
            detector=self._detector, optimizer=self._optimizer, accelerator=self._accelerator,
            clip_norm=self._settings.clip_norm, name_picture=self._name_picture,
        )  # fmt: skip
        if resume:
            self._resume()
        else:
            seed_everything(self._settings.seed, self._accelerator.process_index)
        if self._accelerator.is_main_process:
            self._journal = Journal(self._run, step=self._position.step)
        if resume and self._evaluation_is_missing():
            self._evaluate()
        while self._position.step < self._total_steps:
            self._run_epoch()
        best = on_first_process(self._accelerator, self._best)
        return TrainSummary(
            step=self._position.step, epoch=self._position.epoch, seconds=time.monotonic() - started,
            metrics=self._metrics, best_step=best.step if best else None, best_metrics=best.metrics if best else {},
        )  # fmt: skip

    def close(self) -> None:
        self._progress.finished()
        if self._journal:
            self._journal.close()
        self._accelerator.free_memory()

    def _run_epoch(self) -> None:
        self._detector.train()
        for batches, wait_seconds in self._groups():
            self._step(batches, wait_seconds)
            if self._at_end_of_epoch() or self._position.step == self._total_steps:
                break

    def _step(self, batches: list[Batch], wait_seconds: float) -> None:
        started = time.monotonic()
        factor = self._schedule(self._position.step)
        scale_learning_rate(self._optimizer, factor)
        number = self._position.step + 1
        result = self._stepper.step(
            batches, number=number, stop_signal=self._stop.signal_number, save_due=self._save_is_due(number)
        )
        epoch = self._position.epoch
        self._position.advance(self._steps_per_epoch)
        self._report(result, epoch + 1, wait_seconds + time.monotonic() - started, wait_seconds)
        ends = self._at_end_of_epoch() or number == self._total_steps
        if ends or result.save_due or result.stop_signal:
            self._save()
        if result.stop_signal:
            raise self._interrupted(result.stop_signal)
        if ends and self._evaluation_is_due():
            self._evaluate()

    def _at_end_of_epoch(self) -> bool:
        return self._position.steps_in_epoch == 0 and self._position.step > 0

    # Data

    def _groups(self) -> Iterator[tuple[list[Batch], float]]:
        """The batches of each step that is left of the epoch, and the seconds that were waited for them."""
        used = self._position.steps_in_epoch * self._settings.accumulate
        self._loader.set_epoch(self._position.epoch, skip_batches=used)
        started = time.monotonic()
        # A loader draws a seed for its workers when it starts: a resumed epoch would start once more than the original.
        with random_state_kept():
            batches = iter(self._loader)
            group = list(itertools.islice(batches, self._settings.accumulate))
        while group:
            yield group, time.monotonic() - started
            started = time.monotonic()
            group = list(itertools.islice(batches, self._settings.accumulate))
        given = f"the loader ended after {self._position.steps_in_epoch} of {self._steps_per_epoch} steps"
        raise RunError(Problem(where="training data", given=given, allowed="as many batches as its length says"))

    def _refuse_uneven_shares(self) -> None:
        lengths = gather_objects(self._accelerator, len(self._loader))
        if len(set(lengths)) > 1 or not lengths[0]:
            given = f"{', '.join(map(str, lengths))} batches on the processes"
            raise RunError(Problem(where="training data", given=given, allowed="the same number on each, at least 1"))

    # Reporting

    def _report(self, result: StepResult, epoch: int, seconds: float, wait_seconds: float) -> None:
        report = StepReport(
            step=self._position.step, total_steps=self._total_steps, epoch=epoch, epochs=self._settings.epochs,
            losses=result.losses, lr=max(group["lr"] for group in self._optimizer.param_groups),
            gradient_norm=result.gradient_norm, images=result.images, seconds=seconds, wait_seconds=wait_seconds,
            memory_bytes=peak_memory_bytes(self._accelerator.device),
        )  # fmt: skip
        self._progress.stepped(report)
        if self._journal:
            due = report.step % self._settings.log_every_steps == 0 or report.step == self._total_steps
            self._journal.stepped(report, write=due or bool(result.stop_signal))

    # Saving

    def _save_is_due(self, step: int) -> bool:
        """Asked on every process before its step; one yes is enough, and only the first has a clock."""
        steps, minutes = self._settings.save_every_steps, self._settings.save_every_minutes
        if steps and step % steps == 0:
            return True
        waited = time.monotonic() - self._saved_at
        return minutes is not None and self._accelerator.is_main_process and waited > 60 * minutes

    def _meta_now(self, metrics: Mapping[str, float]) -> CheckpointMeta:
        return replace(self._meta, step=self._position.step, epoch=self._position.epoch, metrics=metrics)

    def _save(self) -> None:
        """Weights and training state to `last`, by the first process."""
        random_states = gather_objects(self._accelerator, capture_random_state())
        scaler = self._accelerator.scaler

        def write() -> None:
            state = TrainingState(
                step=self._position.step, epoch=self._position.epoch, steps_in_epoch=self._position.steps_in_epoch,
                steps_per_epoch=self._steps_per_epoch, optimizer=self._optimizer.state_dict(),
                scaler=scaler.state_dict() if scaler is not None else None, random_states=tuple(random_states),
            )  # fmt: skip
            save_pair(self._run.last, self._detector.state_dict(), self._meta_now({}), state)

        on_first_process(self._accelerator, write)
        self._saved_at = time.monotonic()

    def _interrupted(self, number: int) -> Interrupted:
        name = signal.Signals(number).name
        given = f"stopped by {name} after step {self._position.step} of {self._total_steps}; the state is saved"
        remedy = f"go on with: rcnn train --resume {self._run.path}"
        return Interrupted(Problem(where=str(self._run.path), given=given, remedy=remedy), signal_number=number)

    # Evaluation

    def _evaluation_is_due(self) -> bool:
        if self._evaluate_detector is None:
            return False
        every = self._settings.evaluate_every_epochs
        return self._position.step == self._total_steps or self._position.epoch % every == 0

    def _evaluation_is_missing(self) -> bool:
        """Whether the run was stopped between the save at the end of an epoch and the end of its evaluation."""
        ended = self._at_end_of_epoch() or self._position.step == self._total_steps
        if not (ended and self._evaluation_is_due()):
            return False
        step = self._position.step

        def done() -> bool:
            return any(row["kind"] == "evaluation" and row["step"] == step for row in self._run.rows())

        return not on_first_process(self._accelerator, done)

    def _evaluate(self) -> None:
        """Evaluates, keeps the best, logs. Training goes on with the random numbers it would have had without this."""
        assert self._evaluate_detector is not None
        with random_state_kept():
            try:
                with self._stop.immediate():
                    metrics = self._evaluate_detector()
            except StopNow:
                raise self._interrupted(self._stop.signal_number) from None
            self._metrics = on_first_process(self._accelerator, lambda: self._keep(metrics))
        self._progress.evaluated(self._position.step, self._metrics)

    def _keep(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """The best checkpoint before the row: a kill between them makes the next start evaluate again."""
        metrics = {name: float(value) for name, value in metrics.items()}
        name = self._settings.best_metric
        if name not in metrics:
            remedy = nearest(name, list(metrics))
            raise RunError(Problem(where="best_metric", given=name, allowed=", ".join(metrics), remedy=remedy))
        best = self._best()
        if best is None or _worth(metrics, name) > _worth(best.metrics, name):
            save_weights(self._run.best, self._detector.state_dict(), self._meta_now(metrics))
        if self._journal:
            if self._on_preview:
                self._journal.pictured(self._on_preview(), step=self._position.step)
            self._journal.evaluated(metrics, step=self._position.step, epoch=self._position.epoch)
        return metrics

    def _best(self) -> CheckpointMeta | None:
        return read_meta(self._run.best) if self._run.best.exists() else None

    # Resuming

    def _resume(self) -> None:
        """Takes up weights, optimizer, position and random states; hyper-parameters stay those of the recipe."""
        checkpoint, state = on_first_process(self._accelerator, lambda: read_pair(self._run.last))
        self._refuse_other_training(checkpoint.meta, state)
        load_into(self._detector, checkpoint.state_dict)
        load_optimizer_state(self._optimizer, state.optimizer)
        if self._accelerator.scaler is not None and state.scaler:
            self._accelerator.scaler.load_state_dict(state.scaler)
        self._position = _Position(step=state.step, epoch=state.epoch, steps_in_epoch=state.steps_in_epoch)
        if state.num_processes == self._accelerator.num_processes:
            restore_random_state(state.random_states[self._accelerator.process_index])
        else:
            seed_everything(self._settings.seed + state.step, self._accelerator.process_index)
        on_first_process(self._accelerator, lambda: self._run.rewind(state.step))
        self._progress.noted(f"going on after step {state.step} of {self._total_steps}")

    def _refuse_other_training(self, meta: CheckpointMeta, state: TrainingState) -> None:
        """Classes must agree; within an epoch, what defines the order of the batches must agree as well."""
        pairs: Iterable[tuple[str, object, object]] = [("classes", meta.classes.names, self._meta.classes.names)]
        if state.steps_in_epoch:
            pairs = [
                *pairs,
                ("number of processes", state.num_processes, self._accelerator.num_processes),
                ("steps per epoch", state.steps_per_epoch, self._steps_per_epoch),
            ]
        problems = [
            Problem(where=name, given=str(now), allowed=f"{before} (as when it was saved)", remedy="resume as it began")
            for name, before, now in pairs
            if before != now
        ]
        if problems:
            raise CheckpointError(problems)
