"""The whole loop: learning, what it writes, and resuming as if nothing had happened."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_training import META, FakeDetector, FakeLoader, run_training
from PIL import Image
from rich.console import Console

from rcnn.engine.accelerator import build_accelerator
from rcnn.engine.checkpoint import CheckpointMeta, read_weights
from rcnn.engine.optimizer import parameter_groups, sgd
from rcnn.engine.run_folder import RunFolder
from rcnn.engine.schedule import constant_schedule
from rcnn.engine.train import TrainSettings, num_steps_per_epoch, train
from rcnn.engine.training_state import read_pair
from rcnn.errors import CheckpointError, Interrupted, RunError
from rcnn.records import ClassTable

SCRIPT = Path(__file__).with_name("fake_training.py")
TIMES = {"images_per_second", "wait_share", "memory_mb"}


def rows(folder: Path, kind: str) -> list[dict[str, float]]:
    found = [row for row in RunFolder(folder).rows() if row["kind"] == kind]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in found]


def assert_same_run(one: Path, other: Path) -> None:
    """Bit by bit: weights, best weights, optimizer, random states, every logged number."""
    for name in ("last", "best"):
        checkpoints = [read_weights(folder / "checkpoints" / f"{name}.safetensors") for folder in (one, other)]
        assert checkpoints[0].meta == checkpoints[1].meta
        torch.testing.assert_close(checkpoints[0].state_dict, checkpoints[1].state_dict, rtol=0, atol=0)
    states = [read_pair(RunFolder(folder).last)[1] for folder in (one, other)]
    torch.testing.assert_close(states[0].optimizer["state"], states[1].optimizer["state"], rtol=0, atol=0)
    assert states[0].random_states[0]["torch"].equal(states[1].random_states[0]["torch"])
    for kind in ("train", "evaluation"):
        assert rows(one, kind) == rows(other, kind)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs of six steps, never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    run_training(folder)
    return folder


def test_it_learns(tmp_path: Path) -> None:
    run_training(tmp_path, dropout=0.0, epochs=20)
    losses = [row["loss"] for row in rows(tmp_path, "train")]
    assert np.mean(losses[-12:]) < 0.75 * np.mean(losses[:12])


def test_what_it_writes(whole: Path) -> None:
    train_rows, evaluations = rows(whole, "train"), rows(whole, "evaluation")
    assert [row["step"] for row in train_rows] == list(range(1, 19))
    assert [row["epoch"] for row in train_rows] == [1] * 6 + [2] * 6 + [3] * 6
    # warm-up 0.1 + 0.9 * step / 3, a tenth from step 12 on, times 0.05
    assert [train_rows[step]["lr"] for step in (0, 1, 3, 11, 12)] == pytest.approx([0.005, 0.02, 0.05, 0.05, 0.005])
    first = train_rows[0]
    assert first["loss"] == pytest.approx(first["loss/box"] + first["loss/score"])
    assert [(row["step"], row["epoch"]) for row in evaluations] == [(6, 1), (12, 2), (18, 3)]
    run = RunFolder(whole)
    assert run.recipe.read_text() == META.recipe
    assert list(run.events.glob("events.out.tfevents.*"))
    best = max(evaluations, key=lambda row: row["AP"])
    meta = read_weights(run.best).meta
    assert (meta.step, meta.epoch, meta.metrics) == (best["step"], best["epoch"], {"AP": best["AP"]})
    last = read_weights(run.last).meta
    assert (last.step, last.epoch, last.recipe, last.classes) == (18, 3, META.recipe, META.classes)


def test_the_same_seed_gives_the_same_run(whole: Path, tmp_path: Path) -> None:
    run_training(tmp_path / "again")
    assert_same_run(whole, tmp_path / "again")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("batch", [2, 6, 9])
def test_an_interrupted_run_goes_on_bit_by_bit(whole: Path, tmp_path: Path, number: int, batch: int) -> None:
    """The signal comes while batch 2, 6 (the last of its epoch ends after it) or 9 of 18 is being loaded."""
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    folder = tmp_path / "run"
    with pytest.raises(Interrupted) as caught:
        run_training(folder, signals={batch - 1: [number]})
    assert caught.value.exit_code == 128 + number
    assert f"after step {batch} of 18; the state is saved; go on with: rcnn train --resume {folder}" in str(
        caught.value
    )
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    run_training(folder, resume=True)
    assert_same_run(whole, folder)


def test_interrupted_again_and_again(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for start in range(6):
        with pytest.raises(Interrupted):
            run_training(folder, resume=start > 0, signals={2: [signal.SIGTERM]})
    run_training(folder, resume=True)
    assert_same_run(whole, folder)


def test_interrupted_in_the_evaluation(whole: Path, tmp_path: Path) -> None:
    """It stops at once; the evaluation that is missing comes first after the resume."""
    folder = tmp_path / "run"
    with pytest.raises(Interrupted, match="after step 6 of 18"):
        run_training(folder, signals_in_evaluation=[signal.SIGINT])
    assert rows(folder, "evaluation") == []
    run_training(folder, resume=True)
    assert_same_run(whole, folder)


def test_killed_after_more_was_logged_than_saved(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):  # a second Ctrl-C stops at once, without saving
        run_training(folder, save_every_steps=4, signals={8: [signal.SIGINT, signal.SIGINT]})
    assert [row["step"] for row in rows(folder, "train")][-1] >= 8
    run_training(folder, resume=True)
    assert_same_run(whole, folder)


def test_max_steps_then_more(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run_training(folder, max_steps=8)
    assert [row["step"] for row in rows(folder, "evaluation")] == [6, 8]
    run_training(folder, resume=True)
    torch.testing.assert_close(
        read_weights(RunFolder(folder).last).state_dict, read_weights(RunFolder(whole).last).state_dict, rtol=0, atol=0
    )


def test_a_finished_run_has_nothing_left(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run_training(folder, epochs=1)
    before = (folder / "metrics.jsonl").read_text()
    assert run_training(folder, epochs=1, resume=True) is None  # no evaluation was made
    assert (folder / "metrics.jsonl").read_text() == before


def test_accumulation_counts_steps(tmp_path: Path) -> None:
    assert num_steps_per_epoch(6, 4) == 2
    run_training(tmp_path, accumulate=4, epochs=1)
    # 12 pictures in batches of 2: a step of four batches, then one of the two that are left
    assert [row["step"] for row in rows(tmp_path, "train")] == [1, 2]


def test_a_resume_within_accumulated_steps(tmp_path: Path) -> None:
    run_training(tmp_path / "whole", accumulate=4, epochs=2)
    with pytest.raises(Interrupted, match="after step 1 of 4"):
        run_training(tmp_path / "cut", accumulate=4, epochs=2, signals={1: [signal.SIGTERM]})
    run_training(tmp_path / "cut", accumulate=4, epochs=2, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_resuming_another_order_of_batches_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run_training(tmp_path, signals={1: [signal.SIGTERM]})
    with pytest.raises(CheckpointError, match=r"steps per epoch: 12; allowed: 6 \(as when it was saved\)"):
        run_training(tmp_path, batch_size=1, resume=True)


def test_bfloat16_trains(tmp_path: Path) -> None:
    run_training(tmp_path, precision="bf16", epochs=1)
    assert read_weights(RunFolder(tmp_path).last).state_dict["box.weight"].dtype == torch.float32


def simple(folder: Path, *, detector: FakeDetector | None = None, **choices: object):
    """A training with parts of its own."""
    detector = detector or FakeDetector()
    settings = TrainSettings(epochs=2, log_every_steps=5, channels_last=True)
    values = {
        "train_loader": FakeLoader(), "meta": META, "settings": settings, "schedule": constant_schedule(),
        "run": RunFolder.create(folder, recipe=""), **choices,
    }  # fmt: skip
    optimizer = sgd(parameter_groups(detector, lr=0.1, weight_decay=0.0))
    return train(detector=detector, optimizer=optimizer, accelerator=build_accelerator(device="cpu"), **values)


def test_without_evaluation_there_is_no_best(tmp_path: Path) -> None:
    summary = simple(tmp_path)
    assert (summary.step, summary.epoch, summary.best_step, summary.metrics) == (12, 2, None, {})
    assert not RunFolder(tmp_path).best.exists()
    # means over five steps, and what is left at the end
    assert [row["step"] for row in rows(tmp_path, "train")] == [5, 10, 12]


def test_the_summary_tells_the_best(tmp_path: Path) -> None:
    values = iter([0.3, 0.2])
    summary = simple(tmp_path, evaluate=lambda: {"AP": next(values)})
    assert (summary.metrics, summary.best_step, summary.best_metrics) == ({"AP": 0.2}, 6, {"AP": 0.3})


def test_a_metric_that_is_not_a_number_is_never_better(tmp_path: Path) -> None:
    values = iter([0.3, float("nan")])
    assert simple(tmp_path, evaluate=lambda: {"AP": next(values)}).best_step == 6


def test_an_unknown_best_metric(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r'best_metric: AP; allowed: AP50, mAP; did you mean "mAP"'):
        simple(tmp_path, evaluate=lambda: {"AP50": 0.5, "mAP": 0.5})


def test_previews_become_files(tmp_path: Path) -> None:
    pixels = np.full((4, 6, 3), 200, np.uint8)
    simple(tmp_path, evaluate=lambda: {"AP": 0.5}, on_preview=lambda: {"image-7": pixels})
    with Image.open(tmp_path / "predictions" / "step-000006" / "image-7.png") as image:
        np.testing.assert_array_equal(np.asarray(image), pixels)


def test_pictures_that_cannot_be_written(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, recipe="")
    (run.predictions / "step-000006").write_text("a file where the folder should be")
    with pytest.raises(RunError, match=r"curves and pictures cannot be written: File exists; go on from the last"):
        simple(tmp_path, run=run, evaluate=lambda: {"AP": 0.5}, on_preview=lambda: {"a": np.zeros((1, 1, 3), np.uint8)})
    assert run.last.exists()


def test_a_loader_that_ends_early(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="the loader ended after 6 of 9 steps"):
        simple(tmp_path, train_loader=FakeLoader(length=9))


def test_no_batches(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="0 batches on the processes"):
        simple(tmp_path, train_loader=FakeLoader(0))


def test_resuming_with_other_classes_is_refused(tmp_path: Path) -> None:
    simple(tmp_path / "run")
    other = CheckpointMeta(recipe="", classes=ClassTable(names=("red",)))
    with pytest.raises(CheckpointError, match=r"classes: \('red',\); allowed: \('red', 'blue'\)"):
        simple(tmp_path / "other", meta=other, run=RunFolder.open(tmp_path / "run"), resume=True)


def test_a_full_disk_ends_the_training_and_keeps_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, real, calls = tmp_path / "run", os.fsync, []

    def fsync(handle: int) -> None:
        calls.append(handle)
        if len(calls) > 8:
            raise OSError(28, "No space left on device")
        real(handle)

    with monkeypatch.context() as patch, pytest.raises(RunError, match="the disk is full"):
        patch.setattr(os, "fsync", fsync)
        run_training(folder)
    assert read_pair(RunFolder(folder).last)[1].step in (6, 12)
    run_training(folder, resume=True)


def test_lines_for_a_person(tmp_path: Path) -> None:
    text = io.StringIO()
    run_training(tmp_path / "run", epochs=1, console=Console(file=text, width=300))
    lines = text.getvalue().splitlines()
    assert lines[0].startswith("epoch 1/1  step 1/6  loss ")
    assert "img/s" in lines[0]
    assert lines[0].endswith(" left")
    assert lines[-1].startswith("step 6: AP 0.")


def test_a_process_that_gets_sigterm_saves_and_leaves_with_143(tmp_path: Path) -> None:
    runs = json.dumps([[str(tmp_path / "run"), {"epochs": 1, "signal_on_rank": 0}]])
    command = [sys.executable, "-W", "error", str(SCRIPT), runs]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 143
    assert "stopped by SIGTERM after step 5 of 6" in done.stderr
    assert "Traceback" not in done.stderr
    assert read_pair(tmp_path / "run" / "checkpoints" / "last.safetensors")[1].step == 5
