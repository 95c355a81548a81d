"""`rcnn train`, as a person types it: alone, interrupted, on a full disk, and as two processes of torchrun."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pytest
import torch

import rcnn
from rcnn.backbones.timm import TimmBackbone
from rcnn.cli import processes
from rcnn.engine.checkpoint import read_weights
from rcnn.engine.training_state import read_pair

pytestmark = pytest.mark.xdist_group("tiny, trained on the command line")

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "rcnn"]


def start(arguments: list[object], folder: Path, command: list[str] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*(command or [sys.executable, "-m", "rcnn"]), *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def torchrun(*arguments: object, folder: Path) -> tuple[int, str, str]:
    process = start(list(arguments), folder, TORCHRUN)
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def test_one_command(tiny, rcnn_command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a name for the run: runs/quickstart, then -2; the table is on stdout, the progress on stderr."""
    monkeypatch.chdir(tmp_path)
    for name in ("quickstart", "quickstart-2"):
        code, out, err = rcnn_command("train", "quickstart", "--data", tiny.data, *tiny.overrides, "--device", "cpu")
        assert code == 0
        assert f"run: runs/{name}" in out
        assert f"rcnn predict runs/{name}/checkpoints/best.safetensors" in out
        assert "AP50" in out and "triangle" in out
        assert 'COCO, split "train": 12 pictures' in err and "step 3/3" in err
        assert (tmp_path / "runs" / name / "report.html").is_file()


def test_a_recipe_file(tiny, rcnn_command, tmp_path: Path) -> None:
    settings = "".join(f"  {text.replace('=', ': ')}\n" for text in tiny.overrides)
    (tmp_path / "mine.yaml").write_text(f"base: quickstart\nset:\n  data.path: {tiny.data}\n{settings}")
    code, _, _ = rcnn_command("train", tmp_path / "mine.yaml", "-o", tmp_path / "run", "train.max_steps=1")
    assert code == 0
    assert read_weights(tmp_path / "run/checkpoints/last.safetensors").meta.step == 1


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty steps without an interruption."""
    run = tmp_path_factory.mktemp("whole") / "run"
    recipe = rcnn.recipe("quickstart", *tiny.overrides, "train.max_steps=30")
    rcnn.train(recipe, run_folder=run, data=tiny.data, device="cpu")
    return run


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_goes_on_to_the_same_weights(
    tiny, whole: Path, rcnn_command, tmp_path: Path, number: int
) -> None:
    """The signal comes after the first step of 30, or in an evaluation; the resumed run ends bit for bit the same."""
    many = ["train", "quickstart", "--data", tiny.data, *tiny.overrides, "train.max_steps=30", "--device", "cpu"]
    process = start([*many, "--out", "cut"], tmp_path)
    assert process.stderr is not None
    while "step 1/30" not in (line := process.stderr.readline()):
        assert line, "ended before its first step"
    process.send_signal(number)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 128 + number
    assert f"stopped by {signal.Signals(number).name} after step" in err
    assert "the state is saved; go on with: rcnn train --resume cut" in err
    assert "Traceback" not in err
    cut = read_pair(tmp_path / "cut/checkpoints/last.safetensors")[1].step
    assert 0 < cut < 30
    assert rcnn_command("train", "--resume", tmp_path / "cut", "--device", "cpu")[0] == 0
    for name in ("last", "best"):
        one, other = (read_weights(run / f"checkpoints/{name}.safetensors") for run in (tmp_path / "cut", whole))
        torch.testing.assert_close(dict(one.state_dict), dict(other.state_dict), rtol=0, atol=0)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 7 MB, where this user may make one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=7m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a small disk; a full disk is simulated in tests/engine")
    try:
        yield folder
    finally:
        # Lazily: what could not be written of the curves keeps their file open until the process ends.
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_keeps_the_previous_checkpoint(tiny, rcnn_command, small_disk: Path) -> None:
    """Weights 1.7 MB, state 3.4 MB: the first save fits, a second one beside it does not."""
    run = small_disk / "run"
    changes = [*tiny.overrides, "train.max_steps=6", "evaluate.pictures=0"]
    code, _, err = rcnn_command("train", "quickstart", "--data", tiny.data, *changes, "-o", run)
    assert code == 1
    assert "the disk is full: 5.1 MB are needed" in err
    assert f"make room and go on (a training with --resume); the previous file is intact: {run}" in err
    checkpoint, state = read_pair(run / "checkpoints/last.safetensors")
    assert checkpoint.meta.step == state.step == 3
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    code, out, _ = rcnn_command("train", "--resume", run)
    assert code == 0
    assert "AP50" in out
    assert read_pair(run / "checkpoints/last.safetensors")[1].step == 6


def test_two_processes_one_run_said_once(tiny, web, tmp_path: Path) -> None:
    """From a backbone at an address, at a rate of next to nothing: what both read is what the server had."""
    path, content = "/resnet/model_final.pth", BytesIO()
    backbone = TimmBackbone(name="test_resnet", norm="batch", frozen_stages=0).body.state_dict()
    torch.save(backbone, content)
    changes = [f"detector.backbone.weights={web.serve(path, content.getvalue())}", "train.optimizer.lr=1e-12"]
    code, out, err = torchrun(
        "train", "quickstart", "--data", tiny.data, *tiny.overrides, *changes, "--device", "cpu", folder=tmp_path
    )
    assert code == 0, err
    assert out.count("run: runs/quickstart") == 1
    assert err.count('COCO, split "train": 12 pictures') == 1
    assert os.listdir(tmp_path / "runs") == ["quickstart"]
    checkpoint, state = read_pair(tmp_path / "runs/quickstart/checkpoints/last.safetensors")
    assert (state.step, state.num_processes) == (3, 2)
    assert len(list((tmp_path / "runs/quickstart/tensorboard").iterdir())) == 1
    assert_fetched_once(web, path, err)
    learned = {name: value for name, value in backbone.items() if name.endswith((".weight", ".bias"))}
    found = {name: checkpoint.state_dict[f"backbone.body.{name}"] for name in learned}
    torch.testing.assert_close(found, learned, rtol=0, atol=1e-9)


def assert_fetched_once(web, path: str, err: str) -> None:
    """By one process, which said it, and whole."""
    assert web.asked == [path]
    assert "".join(err.split()).count(f"{web.address}{path}:isbeingfetched") == 1
    (folder,) = web.cache.iterdir()
    name = Path(path).name
    assert sorted(os.listdir(folder)) == [name, f"{name}.sha256"]
    assert (folder / name).read_bytes() == web.files[path]


def test_a_picture_that_one_of_two_processes_cannot_read(tiny, web, tmp_path: Path) -> None:
    """Told once, by the one that saw it; the other ends without a traceback of its own. Their start, a detector at an
    address, was fetched once."""
    shutil.copytree(tiny.data, tmp_path / "data")
    picture = tmp_path / "data/train/000003.jpg"
    picture.write_bytes(picture.read_bytes()[:1000])
    address = web.serve("/best.safetensors", tiny.checkpoint.read_bytes())
    arguments = ["train", "quickstart", "--data", "data", *tiny.overrides, "-o", "run", "--device", "cpu"]
    code, _, err = torchrun(*arguments, "--init-from", address, folder=tmp_path)
    assert code == 1
    assert err.count("data/train/000003.jpg: the file is cut short or damaged") == 1
    assert err.count("Traceback") <= 1  # torchrun's own
    assert "its class scores included: the classes are the same" in " ".join(err.split())
    assert_fetched_once(web, "/best.safetensors", err)


def test_what_is_said_before_the_processes_know_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    assert processes.is_first_to_say("x") and processes.is_first_process()
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "1")
    assert not processes.is_first_to_say("x") and not processes.is_first_process()
    processes.leave_group(together=True)  # there is none
    assert not processes.was_left_by_another(RuntimeError("Connection closed by peer"))


def test_what_every_process_has_to_say_is_said_once() -> None:
    """The store that the processes share counts who said it; here one process asks for two."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        assert [processes.is_first_to_say(text) for text in ("no such folder", "no such folder", "x")] == [1, 0, 1]
    finally:
        processes.leave_group(together=True)
    assert not torch.distributed.is_initialized()


# ----------------------------------------------------------------------------------------------------- wrong commands


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "rcnn train: no recipe; name one: rcnn train faster_rcnn_resnet18_fpn --data FOLDER"),
        (["train.epochs=2"], "rcnn train: no recipe before train.epochs=2; name one"),
        (["quikstart"], 'there is no recipe "quikstart"; allowed: a .yaml or .py'),
        (["quickstart"], "data.path: no data set; give its folder: --data DIR"),
        (["--resume", "nowhere"], "nowhere: is not the folder of a run; expected is nowhere/checkpoints/last"),
        (["quickstart", "--resume", "runs/x"], "quickstart beside --resume; allowed: PATH=VALUE"),
        (["--resume", "runs/x", "--data", "y", "-o", "z"], "--data, --out beside --resume"),
        (["quickstart", "--data", "d", "train.precision=fp16"], "fp16 needs a GPU; allowed: float32, bf16"),
        (["quickstart", "--data", "d", "train.accumulate=3"], "train.batch_size: 4 pictures for 1 processes and 3"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_commands(rcnn_command, tmp_path: Path, monkeypatch, arguments: list[str], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = rcnn_command("train", *arguments, *(["--device", "cpu"] if "--data" in arguments else []))
    assert (code, out) == (1, "")
    assert message in err
    assert os.listdir(tmp_path) == []


def test_every_mistake_in_the_settings_at_once(rcnn_command, tiny, tmp_path: Path) -> None:
    code, _, err = rcnn_command(
        "train", "quickstart", "--data", tiny.data, "-o", tmp_path / "run",
        "train.epoch=3", "data.workers=two", "detector.neck.type=fpm",
    )  # fmt: skip
    assert code == 1
    assert "the recipe cannot be used (3 problems)" in err
    assert 'did you mean "epochs"?' in err
    assert 'data.workers (command line): "two"; allowed: a whole number, at least 0' in err
    assert 'there is no variant "fpm"; allowed: one of fpn, none; did you mean "fpn"?' in err


def test_places_that_cannot_hold_a_run(rcnn_command, tiny, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    begin = ["train", "quickstart", "--data", tiny.data, *tiny.overrides, "-o"]
    code, _, err = rcnn_command(*begin, tmp_path / "file/run")
    assert code == 1
    assert "file/run: cannot be written: Not a directory; choose a folder that you may write to" in err
    code, _, err = rcnn_command(*begin, tiny.run)
    assert code == 1
    assert f"holds a run already; go on with it: rcnn train --resume {tiny.run}; or choose another name" in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there(rcnn_command, tiny) -> None:
    code, _, err = rcnn_command("train", "quickstart", "--data", tiny.data, "--device", "cuda")
    assert code == 1
    assert "device: cuda is not usable on this machine; allowed: auto, cpu" in err


def test_weights_that_cannot_be_downloaded(rcnn_command, tiny, tmp_path: Path, monkeypatch) -> None:
    """torchvision's ImageNet file is not there and nobody answers: one message with every way out, and no run."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr("rcnn.backbones.pretrained._TORCHVISION_WEIGHTS", {"resnet18": _Nobody})
    arguments = ["faster_rcnn_resnet18_fpn", "--data", tiny.data, "-o", tmp_path / "run", "--device", "cpu"]
    code, _, err = rcnn_command("train", *arguments)
    assert code == 1
    assert "the download failed (1 problem)" in err
    assert f"put the file at {tmp_path}/hub/hub/checkpoints/resnet18-f37072fd.pth" in err
    assert "or give it with detector.backbone.weights=FILE (null starts from random numbers)" in err
    assert not (tmp_path / "run").exists()


class _Nobody:
    url = "http://127.0.0.1:9/resnet18-f37072fd.pth"


SETTINGS = ("train.init_from", "detector.proposals.init_from", "detector.backbone.weights")


@pytest.mark.parametrize(
    ("setting", "path", "said"),
    [
        (SETTINGS[0], "/none.pth", "could not be fetched (HTTP Error 404: Not Found)"),
        (SETTINGS[1], "/cut.pth", "could not be fetched (the connection ended after 4 of 8 bytes)"),
        (SETTINGS[2], "/a-821213aa.pth", "could not be fetched (what arrived has the SHA-256 f65ca3d4"),
    ],
)
def test_addresses_that_give_no_start(
    rcnn_command, tiny, web, tmp_path: Path, setting: str, path: str, said: str
) -> None:
    """One error each, which names the setting, and no run."""
    web.files.update({"/cut.pth": b"a start.", "/a-821213aa.pth": b"a start."})
    web.cut.add("/cut.pth")
    change = f"{setting}={web.address}{path}"
    code, out, err = rcnn_command(
        "train", "quickstart", "--data", tiny.data, *tiny.overrides, change, "-o", tmp_path / "run", "--device", "cpu"
    )
    assert (code, out) == (1, "")
    assert "the download failed (1 problem)" in err
    assert f"  - {web.address}{path}: {said}" in err
    assert f"or name a file: {setting}=FILE" in err
    assert not (tmp_path / "run").exists()


def test_an_address_of_something_else(rcnn_command, tiny, web, tmp_path: Path) -> None:
    """A page that says to log in, for example: it stays, and how to have it fetched again is said."""
    address = web.serve("/model.pth", b"<html>")
    arguments = ["train", "quickstart", "--data", tiny.data, *tiny.overrides, "-o", tmp_path / "run", "--device", "cpu"]
    code, _, err = rcnn_command(*arguments, "--init-from", address)
    assert code == 1
    assert f"train.init_from: {address}; allowed: a checkpoint of a detector" in err
    (folder,) = web.cache.iterdir()
    assert f"to fetch it again, delete {folder}/model.pth" in err


def test_what_is_no_checkpoint_to_start_from(rcnn_command, tiny, tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pth")
    arguments = ["train", "quickstart", "--data", tiny.data, *tiny.overrides, "-o", tmp_path / "run", "--init-from"]
    code, _, err = rcnn_command(*arguments, tmp_path / "a.pth")
    assert code == 1
    assert f"train.init_from: {tmp_path / 'a.pth'}" in err
    assert "a.pth: keys of no system that is known here" in err
    assert "rcnn convert FILE -o OUT.safetensors" in err
    code, _, err = rcnn_command(*arguments, tiny.run)
    assert code == 1
    assert f"Is a directory; there is: {tiny.checkpoint}" in err
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------------- wrong data


@pytest.fixture
def spoiled(tiny, tmp_path: Path):
    """`spoiled(change, split)`: a copy of the data with its annotations changed by a function."""

    def copy(change=lambda content: None, split: str = "train") -> Path:
        root = tmp_path / "data"
        shutil.copytree(tiny.data, root)
        path = root / f"annotations/instances_{split}.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
        return root

    return copy


@pytest.fixture
def refused(tiny, rcnn_command, tmp_path: Path):
    """What `rcnn train` says about data that it cannot use; no run is left."""

    def call(data: Path, *overrides: str) -> str:
        code, out, err = rcnn_command(
            "train", "quickstart", "--data", data, *tiny.overrides, *overrides, "-o", tmp_path / "run"
        )
        assert (code, out) == (1, "")
        assert not (tmp_path / "run").exists()
        return err

    return call


def test_missing_pictures_of_both_splits(spoiled, refused) -> None:
    root = spoiled()
    for name in ("train/000001.jpg", "train/000007.jpg", "val/000002.jpg"):
        (root / name).unlink()
    err = refused(root)
    assert "the data cannot be used (3 problems)" in err
    assert err.count("the picture is missing") == 3


def test_a_folder_that_is_not_there_or_empty(refused, tmp_path: Path) -> None:
    assert "there is no such folder; check the path" in refused(tmp_path / "nothing")
    (tmp_path / "nothing").mkdir()
    err = refused(tmp_path / "nothing")
    assert "no annotations in a known format; found: an empty folder; allowed: COCO: annotations/" in err


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_empty_data_set(spoiled, refused, split: str) -> None:
    err = refused(spoiled(lambda content: content.update(images=[], annotations=[]), split))
    assert f"instances_{split}.json: there is no picture in it; check the folder and the split" in err


def test_malformed_json(spoiled, refused) -> None:
    root = spoiled()
    path = root / "annotations/instances_train.json"
    path.write_text(path.read_text()[:3000])
    err = refused(root)
    assert "instances_train.json:1:30" in err and "malformed JSON" in err and "export the file again" in err


def test_malformed_xml(refused, tmp_path: Path) -> None:
    root = tmp_path / "data"
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    (root / "ImageSets/Main/train.txt").write_text("0\n")
    (root / "Annotations/0.xml").write_text("<annotation><size><width>64</width>")
    (root / "JPEGImages/0.jpg").write_bytes(b"")
    err = refused(root)
    assert "Annotations/0.xml:1: malformed XML" in err and "export it again" in err


def test_malformed_txt(refused, tiny, tmp_path: Path) -> None:
    root = tmp_path / "data"
    (root / "images/train").mkdir(parents=True)
    (root / "labels/train").mkdir(parents=True)
    shutil.copy(tiny.data / "train/000001.jpg", root / "images/train")
    (root / "labels/train/000001.txt").write_text("0 0.5 0.5 x 0.2\n7 0.5 0.5 0.1 0.1\n")
    (root / "data.yaml").write_text("path: .\ntrain: images/train\nnames: [a, b]\n")
    err = refused(root)
    assert "000001.txt:1: could not convert string to float: 'x'; allowed: numbers" in err
    assert "000001.txt:2: the class is 7; allowed: 0 to 1" in err


def test_two_categories_of_one_name(spoiled, refused) -> None:
    err = refused(spoiled(lambda content: content["categories"].append({"id": 9, "name": "star"})))
    assert 'the name "star" belongs to the categories 4, 9' in err
    assert "delete the one without annotations (id 9)" in err


def wrong_boxes(content: dict) -> None:
    boxes = [[500, 500, 10, 10], [50, 50, -10, 10], [5, 5, 0, 10], [float("nan"), 1, 2, 3], [-5, 10, 30, 30]]
    for annotation, box in zip(content["annotations"], boxes, strict=False):
        annotation["bbox"] = box


def test_wrong_boxes_are_left_out_or_cut_and_told(spoiled, tiny, rcnn_command, tmp_path: Path) -> None:
    code, _, err = rcnn_command(
        "train", "quickstart", "--data", spoiled(wrong_boxes), *tiny.overrides, "-o", tmp_path / "run"
    )
    assert code == 0
    assert "4 of 46 boxes were left out" in err
    assert "1 of 46 boxes was cut to the picture" in err
    assert err.count("lists them") == 1


def test_wrong_boxes_are_mistakes_where_they_shall_be(spoiled, refused) -> None:
    err = refused(spoiled(wrong_boxes), "data.bad_boxes=error")
    assert "the data cannot be used (5 problems)" in err
    for reason in (
        "lies outside the picture of",
        "is reversed",
        "has zero width",
        "no finite number",
        "reaches out of",
    ):
        assert reason in err
    assert "annotation 3: the box x1, y1, x2, y2 = 5, 5, 5, 15 has zero width or height; correct or delete it" in err


def test_a_split_that_the_recipe_asks_for(refused, tiny) -> None:
    err = refused(tiny.data, "data.train_split=trainval")
    assert 'there is no split "trainval"; allowed: train, val' in err
    assert "set data.train_split=NAME" in err
