"""Two processes under torchrun against one, judged by what they wrote.

The launcher's exit code is not looked at where a run is meant to succeed: gloo in this torch sometimes aborts at the
interpreter's exit, after everything was done.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_training import run_training

from rcnn.engine.checkpoint import read_weights
from rcnn.engine.run_folder import RunFolder
from rcnn.engine.training_state import read_pair
from rcnn.errors import CheckpointError

SCRIPT = Path(__file__).with_name("fake_training.py")


# Per process: six pictures of an epoch one at a time, and seven pictures to evaluate, which do not divide.
RUNS: dict[str, dict[str, object]] = {
    "plain": {"batch_size": 1, "dropout": 0.0, "num_evaluated": 7},
    "whole": {"batch_size": 1, "epochs": 2},
    "cut": {"batch_size": 1, "epochs": 2, "signal_on_rank": 1},
    "spoilt": {"batch_size": 1, "nan_on_image": 105},
}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of RUNS, made one after the other by two processes, and what these said."""
    folder = tmp_path_factory.mktemp("two")
    return folder, launch({str(folder / name): choices for name, choices in RUNS.items()})


def launch(runs: dict[str, dict[str, object]]) -> str:
    command = [sys.executable, "-W", "error", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(SCRIPT), json.dumps(list(runs.items()))],
        capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return done.stderr


def losses(folder: Path) -> list[list[float]]:
    names = ("step", "loss", "loss/box", "loss/score", "gradient_norm", "lr")
    return [[row[name] for name in names] for row in RunFolder(folder).rows() if row["kind"] == "train"]


def test_two_processes_are_one_with_twice_the_batch(two: tuple[Path, str], tmp_path: Path) -> None:
    folder = two[0] / "plain"
    run_training(tmp_path / "one", batch_size=2, dropout=0.0, num_evaluated=7)
    assert RunFolder(folder).last.exists(), two[1]
    np.testing.assert_allclose(losses(folder), losses(tmp_path / "one"), rtol=1e-5)
    for name in ("last", "best"):
        ours, one = (read_weights(run / "checkpoints" / f"{name}.safetensors") for run in (folder, tmp_path / "one"))
        torch.testing.assert_close(ours.state_dict, one.state_dict)
        assert (ours.meta.step, ours.meta.epoch) == (one.meta.step, one.meta.epoch)
    assert len(list(RunFolder(folder).events.iterdir())) == 1  # one process writes


def test_each_picture_is_evaluated_once(two: tuple[Path, str], tmp_path: Path) -> None:
    run_training(tmp_path / "one", batch_size=2, dropout=0.0, num_evaluated=7)
    ours, one = (json.loads((run / "detections.json").read_text()) for run in (two[0] / "plain", tmp_path / "one"))
    assert ours["image_ids"] == one["image_ids"] == [100 + index // 2 for index in range(14)]
    assert ours["labels"] == one["labels"]
    np.testing.assert_allclose(ours["boxes_xyxy"], one["boxes_xyxy"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ours["scores"], one["scores"], rtol=1e-5)


def test_a_signal_to_one_process_stops_both_and_they_go_on_bit_by_bit(two: tuple[Path, str]) -> None:
    folder, said = two
    assert said.count("stopped by SIGTERM after step 5 of 12; the state is saved") == 2
    state = read_pair(RunFolder(folder / "cut").last)[1]
    assert (state.step, state.num_processes) == (5, 2)
    with pytest.raises(CheckpointError, match=r"number of processes: 1; allowed: 2 \(as when it was saved\)"):
        run_training(folder / "cut", resume=True, batch_size=2, epochs=2)
    said = launch({str(folder / "cut"): {**RUNS["whole"], "resume": True}})
    pairs = [read_pair(RunFolder(folder / name).last) for name in ("cut", "whole")]
    assert pairs[0][0].meta == pairs[1][0].meta, said
    torch.testing.assert_close(pairs[0][0].state_dict, pairs[1][0].state_dict, rtol=0, atol=0)
    assert losses(folder / "cut") == losses(folder / "whole")
    drawn = [state.random_states[rank]["torch"] for _, state in pairs for rank in (0, 1)]
    assert drawn[0].equal(drawn[2])
    assert drawn[1].equal(drawn[3])
    assert not drawn[0].equal(drawn[1])  # each process drops out other numbers


def test_a_loss_that_is_not_finite_on_one_process_stops_both(two: tuple[Path, str]) -> None:
    folder, said = two
    assert "loss term box: nan on pictures 105" in said
    assert said.count("the run cannot go on (1 problem)") == 2
    assert not RunFolder(folder / "spoilt").last.exists()
