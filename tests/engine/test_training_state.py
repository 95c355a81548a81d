"""Weights and training state of one step: a pair that survives a full disk and a kill at any point of its saving."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rcnn import atomic_file
from rcnn.engine import training_state
from rcnn.engine.checkpoint import CheckpointMeta
from rcnn.engine.random_state import capture_random_state, random_state_kept, restore_random_state, seed_everything
from rcnn.engine.training_state import TrainingState, read_pair, read_training_state, save_pair, state_path
from rcnn.errors import CheckpointError, RunError
from rcnn.records import ClassTable

META = CheckpointMeta(recipe="", classes=ClassTable(names=("a",)))


class Killed(BaseException):
    """Stands for the end of the process."""


def state(step: int) -> TrainingState:
    return TrainingState(
        step=step, epoch=1, steps_in_epoch=2, steps_per_epoch=5,
        optimizer={"state": {0: {"momentum_buffer": torch.full((3,), float(step))}}, "param_groups": [{"lr": 0.1}]},
        scaler=None, random_states=(capture_random_state(),),
    )  # fmt: skip


def save(path: Path, step: int) -> None:
    save_pair(path, {"w": torch.full((2,), float(step))}, replace(META, step=step), state(step))


def step_of(path: Path) -> int:
    """The step of a pair, after a check that all of it belongs to that step."""
    checkpoint, found = read_pair(path)
    assert checkpoint.meta.step == found.step
    assert checkpoint.state_dict["w"].tolist() == [found.step] * 2
    assert found.optimizer["state"][0]["momentum_buffer"].tolist() == [found.step] * 3
    return found.step


@pytest.fixture
def last(tmp_path: Path) -> Path:
    path = tmp_path / "last.safetensors"
    save(path, 1)
    return path


def test_a_pair_comes_back(last: Path) -> None:
    assert step_of(last) == 1
    found = read_training_state(state_path(last))
    assert (found.epoch, found.steps_in_epoch, found.steps_per_epoch, found.num_processes) == (1, 2, 5, 1)


def nth_call(
    number: int, action: Callable[..., object], failure: BaseException, *, after: bool
) -> Callable[..., object]:
    """`action` that fails at its `number`-th call: before it is done, or after."""
    calls = iter(range(1, 100))

    def wrapped(*args: object, **options: object) -> object:
        if next(calls) != number:
            return action(*args, **options)
        if after:
            action(*args, **options)
        raise failure

    return wrapped


@pytest.mark.parametrize(
    ("function", "number", "after", "expected"),
    [
        ("stage", 1, False, 1),
        ("stage", 1, True, 1),
        ("stage", 2, True, 1),
        ("put_in_place", 1, True, 2),
        ("put_in_place", 2, True, 2),
    ],
)
def test_a_kill_at_any_point_leaves_a_whole_pair(
    last: Path, monkeypatch: pytest.MonkeyPatch, function: str, number: int, after: bool, expected: int
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(
            training_state, function, nth_call(number, getattr(training_state, function), Killed(), after=after)
        )
        with pytest.raises(Killed):
            save(last, 2)
    assert step_of(last) == expected
    save(last, 3)
    assert step_of(last) == 3


def test_a_staged_state_that_was_cut_is_left_alone(last: Path) -> None:
    atomic_file.staged_path(state_path(last)).write_bytes(b"PK\x03\x04 half")
    assert step_of(last) == 1


@pytest.mark.parametrize("number", [1, 2])
def test_a_full_disk_leaves_the_previous_pair(last: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch, pytest.raises(RunError) as caught:
        patch.setattr(atomic_file.os, "fsync", nth_call(number, os.fsync, full, after=False))
        save(last, 2)
    room = (last.stat().st_size + state_path(last).stat().st_size) / 1000
    assert f"the disk is full: {room:.1f} kB are needed" in str(caught.value)
    assert f"the previous file is intact: {last}" in str(caught.value)
    assert sorted(os.listdir(last.parent)) == ["last.safetensors", "last.state.pt"]
    assert step_of(last) == 1


def test_a_torn_pair_is_refused(last: Path) -> None:
    other = last.with_name("other.safetensors")
    save(other, 2)
    state_path(other).replace(state_path(last))
    with pytest.raises(CheckpointError, match="it belongs to step 2, the weights beside it to step 1"):
        read_pair(last)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x04\x95", b"text"])
def test_other_content_is_refused(last: Path, content: bytes) -> None:
    state_path(last).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"the weights are usable on their own"):
        read_pair(last)


def test_a_missing_state(last: Path) -> None:
    state_path(last).unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        read_pair(last)


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.marker),)


def test_a_hostile_state_is_never_run(last: Path) -> None:
    marker = last.with_name("ran")
    torch.save({"step": Hostile(marker)}, state_path(last))
    with pytest.raises(CheckpointError, match="not a training state"):
        read_pair(last)
    assert not marker.exists()


def draw() -> list[float]:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(()).item()]  # noqa: NPY002


def test_random_numbers_go_on(tmp_path: Path) -> None:
    seed_everything(3)
    draw()
    path = tmp_path / "state.pt"
    path.write_bytes(state(1).to_bytes())
    expected = [draw(), draw()]
    restore_random_state(read_training_state(path).random_states[0])
    assert [draw(), draw()] == expected


def test_random_state_kept() -> None:
    seed_everything(3)
    expected = draw()
    seed_everything(3)
    with random_state_kept():
        draw()
    assert draw() == expected


def test_processes_draw_different_numbers() -> None:
    drawn = []
    for seed, rank in ((0, 0), (0, 1), (1, 0), (0, 0)):
        seed_everything(seed, rank)
        drawn.append(tuple(draw()))
    assert len(set(drawn)) == 3
    assert drawn[0] == drawn[3]
