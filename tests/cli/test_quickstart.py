"""`rcnn quickstart`, made small: every file it names is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from rcnn.cli import quickstart

pytestmark = pytest.mark.xdist_group("tiny")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(quickstart, "TRAIN_IMAGES", 8)
    monkeypatch.setattr(quickstart, "HELD_OUT_IMAGES", 3)
    monkeypatch.chdir(tmp_path)


def test_everything_it_promises(small: None, tiny, rcnn_command) -> None:
    code, out, err = rcnn_command("quickstart", *tiny.overrides)
    assert code == 0
    assert "1. drawing 8 pictures to train on and 3 held-out ones: quickstart/shapes" in out
    assert "3 pictures" in out and "AP50" in out and "triangle" in out
    assert "step 3/3" in err
    for file in ("found_beside_truth.png", "run/report.html", "run/checkpoints/best.safetensors"):
        assert Path("quickstart", file).is_file()
    assert "it found, beside the truth:  quickstart/found_beside_truth.png" in out
    next_command = next(line for line in out.splitlines() if "now with it: rcnn predict" in line).split()[5:]
    assert rcnn_command("predict", *next_command)[0] == 0
    assert len(list(Path("predictions/pictures").iterdir())) == 3


def test_another_one_gets_a_name_of_its_own(small: None, tiny, rcnn_command) -> None:
    Path("quickstart").mkdir()
    code, out, _ = rcnn_command("quickstart", *tiny.overrides, "--seed", 5)
    assert code == 0
    assert "quickstart-2/found_beside_truth.png" in out
    code, _, err = rcnn_command("quickstart", "--out", "quickstart")
    assert code == 1
    assert "quickstart: exists already; name a new folder: rcnn quickstart --out FOLDER" in err


def test_mistakes_come_before_anything_is_drawn(small: None, rcnn_command, tmp_path: Path) -> None:
    code, _, err = rcnn_command("quickstart", "train.epoch=3")
    assert code == 1
    assert 'did you mean "epochs"?' in err
    assert list(tmp_path.iterdir()) == []
