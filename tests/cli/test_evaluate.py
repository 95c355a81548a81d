"""`rcnn eval`: the training's numbers again, its files, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rcnn.engine.run_folder import RunFolder
from rcnn.evaluation.files import read_coco_results

pytestmark = pytest.mark.xdist_group("tiny")


def test_the_numbers_of_the_training(tiny, rcnn_command, tmp_path: Path) -> None:
    files = ["--json", tmp_path / "new/numbers.json", "--report", tmp_path / "page.html"]
    code, out, err = rcnn_command("eval", tiny.checkpoint, "--data", tiny.data, *files, "--errors")
    assert code == 0
    numbers = json.loads((tmp_path / "new/numbers.json").read_text())
    logged = list(RunFolder(tiny.run).rows())[-1]
    assert {name: numbers[name] for name in ("AP", "AP50", "AR@100")} == {
        name: logged[name] for name in ("AP", "AP50", "AR@100")
    }
    assert numbers["voc_area"] == logged["mAP"]
    assert set(numbers["classes"]) == {"circle", "square", "triangle", "star", "cross"}
    assert set(numbers["classes"]["star"]) == {"AP", "AP50", "AP75", "AR", "boxes", "voc_11_points", "voc_area"}
    assert f"{logged['AR@100']:.3f}" in out
    assert "mistakes at IoU 0.5" in out
    assert f"report: {tmp_path}/page.html" in out
    assert 'split "val": 5 pictures, 18 boxes' in err
    assert ";base64," in (tmp_path / "page.html").read_text()


def test_two_processes_give_the_numbers_of_one(tiny, rcnn_command, tmp_path: Path) -> None:
    """Five pictures: one process has three, the other two."""
    arguments = ["eval", tiny.checkpoint, "--data", tiny.data, "--device", "cpu"]
    files = [["--json", tmp_path / f"{n}.json", "--detections", tmp_path / f"{n}-found.json"] for n in (1, 2)]
    assert rcnn_command(*arguments, *files[0])[0] == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "rcnn"]
    done = subprocess.run(
        [*command, *map(str, arguments + files[1])], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("5 pictures") == 1
    for name in ("{}.json", "{}-found.json"):
        one, two = (json.loads((tmp_path / name.format(n)).read_text()) for n in (1, 2))
        assert one == two


def test_what_bfloat16_costs_is_told(tiny, rcnn_command) -> None:
    code, out, _ = rcnn_command("eval", tiny.checkpoint, "--data", tiny.data, "--precision", "bf16", "--device", "cpu")
    assert code == 0
    before = list(RunFolder(tiny.run).rows())[-1]["AP50"]
    line = out.splitlines()[-1]
    assert line.startswith("float32 -> bf16: AP 0.")
    assert f"AP50 {before:.4f} -> " in line


def test_other_settings_and_another_split(tiny, rcnn_command, tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    code, out, err = rcnn_command(
        "eval", tiny.checkpoint, "--data", tiny.data, "--split", "train", "detector.roi.max_detections=1",
        "--detections", found,
    )  # fmt: skip
    assert code == 0
    assert "12 pictures" in out
    assert '"train" is the split that was trained on: mind the numbers' in err
    assert len(json.loads(found.read_text())) == 12
    from rcnn.predict import load

    assert len(read_coco_results(found, load(tiny.checkpoint).classes)) == 12


@pytest.fixture
def refused(tiny, rcnn_command):
    def call(checkpoint: Path, data: Path, *options: object) -> str:
        code, out, err = rcnn_command("eval", checkpoint, "--data", data, *options)
        assert (code, out) == (1, "")
        return err

    return call


def test_places_that_cannot_be_written_are_told_before_the_work(tiny, refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    err = refused(tiny.checkpoint, tiny.data, "--json", tmp_path / "file/a.json", "--report", tmp_path)
    assert "(2 problems)" in err and "evaluating" not in err
    assert "file/a.json: cannot be written: File exists; choose another place" in err


def test_classes_that_the_checkpoint_does_not_know(tiny, refused, tmp_path: Path) -> None:
    shutil.copytree(tiny.data, tmp_path / "data")
    path = tmp_path / "data/annotations/instances_val.json"
    path.write_text(path.read_text().replace('"circle"', '"disc"').replace('"star"', '"stars"'))
    err = refused(tiny.checkpoint, tmp_path / "data")
    assert 'the class "disc" is not one that the checkpoint or training split knows' in err
    assert 'the class "stars"' in err and 'did you mean "star"?' in err
    assert "allowed: circle, square, triangle, star, cross" in err


def test_a_truncated_picture(tiny, refused, tmp_path: Path) -> None:
    shutil.copytree(tiny.data, tmp_path / "data")
    picture = tmp_path / "data/val/000003.jpg"
    picture.write_bytes(picture.read_bytes()[:900])
    err = refused(tiny.checkpoint, tmp_path / "data")
    assert "000003.jpg: the file is cut short or damaged" in err
    assert f"rcnn data check {tmp_path}/data --decode names all that cannot be used" in err


def test_a_missing_picture_an_empty_split_and_no_folder(tiny, refused, tmp_path: Path) -> None:
    shutil.copytree(tiny.data, tmp_path / "data")
    (tmp_path / "data/val/000003.jpg").unlink()
    assert "000003.jpg: the picture is missing" in refused(tiny.checkpoint, tmp_path / "data")
    path = tmp_path / "data/annotations/instances_val.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "images": [], "annotations": []}))
    assert "there is no picture in it" in refused(tiny.checkpoint, tmp_path / "data")
    assert 'did you mean "data"?' in refused(tiny.checkpoint, tmp_path / "dat")
    assert 'no split "vall"; allowed: train, val; did you mean "val"?' in refused(
        tiny.checkpoint, tiny.data, "--split", "vall"
    )


def test_what_is_no_checkpoint(tiny, refused, tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pth")
    assert "a.pth: a pickle (.pt, .pth, .pkl)" in refused(tmp_path / "a.pth", tiny.data)
    (tmp_path / "b.safetensors").write_bytes(tiny.checkpoint.read_bytes()[:100_000])
    assert "b.safetensors: truncated: 100000 bytes where its header states" in refused(
        tmp_path / "b.safetensors", tiny.data
    )
    (tmp_path / "c.safetensors").write_bytes(b"hello, I am a text" * 100)
    assert "c.safetensors: not a checkpoint" in refused(tmp_path / "c.safetensors", tiny.data)
    assert "No such file or directory; there is: " in refused(tmp_path / "d.safetensors", tiny.data)


def test_a_missing_option_is_wrong_usage(tiny, rcnn_command) -> None:
    code, _, err = rcnn_command("eval", tiny.checkpoint)
    assert code == 2
    assert "Missing option '--data'" in err
