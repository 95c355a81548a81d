"""The folder of a run: made at once, never overwritten, readable after a kill."""

from __future__ import annotations

from pathlib import Path

import pytest

from rcnn.engine.run_folder import RunFolder
from rcnn.errors import RunError


def test_create_makes_the_places(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "runs" / "one", recipe="base: x\n")
    assert run.recipe.read_text() == "base: x\n"
    assert run.checkpoints.is_dir()
    assert run.predictions.is_dir()
    assert run.events.is_dir()
    assert (run.last.name, run.best.name, run.report.name) == ("last.safetensors", "best.safetensors", "report.html")


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "one", recipe="first").last.write_bytes(b"weights")
    with pytest.raises(
        RunError, match=r"holds a run already; go on with it: rcnn train --resume .*one; or choose another"
    ):
        RunFolder.create(tmp_path / "one", recipe="second")
    assert (tmp_path / "one" / "recipe.yaml").read_text() == "first"


def test_a_run_without_a_checkpoint_begins_anew(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, recipe="first")
    run.log({"step": 1})
    assert list(RunFolder.create(tmp_path, recipe="second").rows()) == []
    assert run.recipe.read_text() == "second"


def test_a_folder_with_other_things_may_be_used(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    RunFolder.create(tmp_path, recipe="")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_unwritable_place(tmp_path: Path) -> None:
    """A file stands where the folder should be: refused for every user, root included."""
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot be written: Not a directory; choose a folder"):
        RunFolder.create(tmp_path / "file" / "run", recipe="")


def test_open_needs_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not the folder of a run"):
        RunFolder.open(tmp_path / "absent")
    run = RunFolder.create(tmp_path / "run", recipe="")
    with pytest.raises(RunError, match="has no checkpoint to go on from"):
        RunFolder.open(run.path)
    run.last.write_bytes(b"")
    assert RunFolder.open(run.path) == run


def test_rows_come_back_and_a_cut_line_is_left_out(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, recipe="")
    assert list(run.rows()) == []
    run.log({"step": 1, "loss": 0.5})
    run.log({"step": 2, "loss": float("nan")})
    with run.metrics.open("a") as file:
        file.write('{"step": 3, "lo')
    assert list(run.rows()) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": None}]


def test_a_broken_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, recipe="")
    run.metrics.write_text('{"step": 1}\nbroken\n{"step": 2}\n')
    with pytest.raises(RunError, match=r"metrics.jsonl, line 2: broken"):
        list(run.rows())


def test_rewind_drops_what_came_after_and_what_was_cut(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, recipe="")
    run.rewind(0)
    for step in (1, 2, 3):
        run.log({"step": step})
    with run.metrics.open("a") as file:
        file.write('{"st')
    run.rewind(2)
    run.log({"step": 3, "again": True})
    assert run.metrics.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "again": true}\n'
