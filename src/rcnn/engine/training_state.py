"""What a training needs besides the weights to go on exactly: optimizer, loss scaler, position, random states."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from rcnn.atomic_file import put_in_place, stage, staged_path
from rcnn.engine.checkpoint import Checkpoint, CheckpointMeta, StateDict, read_meta, read_weights, weights_to_bytes
from rcnn.engine.random_state import RandomState
from rcnn.errors import CheckpointError, Problem, RcnnError


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """A position between two steps, and all state that belongs to it.

    `epoch` whole epochs are done and `steps_in_epoch` steps of the next one. `random_states` has one entry per process.
    The learning rate is a function of `step` and therefore not in here.
    """

    step: int
    epoch: int
    steps_in_epoch: int
    steps_per_epoch: int
    optimizer: dict[str, Any]
    scaler: dict[str, Any] | None
    random_states: tuple[RandomState, ...]

    @property
    def num_processes(self) -> int:
        return len(self.random_states)

    def to_bytes(self) -> bytes:
        """Tensors and plain values only: read back with `weights_only=True`."""
        buffer = io.BytesIO()
        torch.save({**asdict(self), "random_states": list(self.random_states)}, buffer)
        return buffer.getvalue()


def read_training_state(path: Path) -> TrainingState:
    """Raises CheckpointError where the file is missing, damaged or not a training state; runs nothing in it."""
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
        return TrainingState(**{**values, "random_states": tuple(values["random_states"])})
    except OSError as error:
        raise _unusable(path, f"cannot be read: {error.strerror or error}") from error
    except Exception as error:  # torch's readers of damaged files raise whatever their parsers come across
        raise _unusable(path, f"damaged, or not a training state ({type(error).__name__})") from error


def state_path(weights: Path) -> Path:
    """The file of the training state that stands beside a file of weights."""
    return weights.with_name(f"{weights.stem}.state.pt")


def save_pair(weights: Path, state_dict: StateDict, meta: CheckpointMeta, state: TrainingState) -> None:
    """Saves weights and training state of one step.

    Both are on the disk before either replaces its predecessor, so a full disk leaves the previous pair. A kill between
    the two renames leaves the new weights in place and the new state staged: `read_pair` recognises that by the step.
    """
    states = state_path(weights)
    contents = {weights: weights_to_bytes(state_dict, meta), states: state.to_bytes()}
    total_bytes = sum(map(len, contents.values()))
    try:
        for path, content in contents.items():
            stage(path, content, total_bytes=total_bytes, keeps=weights)
    except RcnnError:
        staged_path(weights).unlink(missing_ok=True)
        raise
    put_in_place(weights)
    put_in_place(states)


def read_pair(weights: Path) -> tuple[Checkpoint, TrainingState]:
    """Reads what `save_pair` wrote and finishes a save that was cut between its renames.

    Raises CheckpointError where weights and state belong to different steps.
    """
    finish_cut_save(weights)
    checkpoint = read_weights(weights)
    state = read_training_state(state_path(weights))
    if state.step != checkpoint.meta.step:
        given = f"it belongs to step {state.step}, the weights beside it to step {checkpoint.meta.step}"
        raise _unusable(state_path(weights), given)
    return checkpoint, state


def finish_cut_save(weights: Path) -> None:
    """Puts a staged training state in place where the weights of its step already are; leaves everything else alone."""
    states = state_path(weights)
    staged = staged_path(states)
    if not staged.exists() or not weights.exists():
        return
    try:
        step = read_training_state(staged).step
    except CheckpointError:
        return  # the cut came earlier, while it was being written: the previous pair is whole
    if step == read_meta(weights).step:
        put_in_place(states)


def _unusable(path: Path, given: str) -> CheckpointError:
    remedy = "the weights are usable on their own, but this training cannot be resumed: start another one from them"
    return CheckpointError(Problem(where=str(path), given=given, remedy=remedy))
