"""`rcnn convert`: torchvision's files as ours, with torchvision's own detections; hostile and wrong ones refused."""

from __future__ import annotations

import argparse
import os
import pickle
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn
from torchvision.transforms.functional import pil_to_tensor

import rcnn
from rcnn.converters.torchvision import coco_91_classes
from rcnn.engine.checkpoint import read_weights

pytestmark = pytest.mark.xdist_group("convert")

NAMES = [f"class {number}" for number in range(90)]


def pixels_of(shared: Path, name: str) -> torch.Tensor:
    with Image.open(shared / "oracles/inputs" / name) as picture:
        return pil_to_tensor(picture.convert("RGB")) / 255


@pytest.fixture(scope="module")
def theirs(shared: Path) -> nn.Module:
    """torchvision's 320-pixel detector from random numbers, with scores that are far apart."""
    torch.manual_seed(0)
    model = fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None).eval()
    # Random features die within the trunk unless its norms know their statistics: here, those of a picture.
    body = model.backbone.body.train()
    for module in body.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        body(model.transform([pixels_of(shared, "coffee_480x320.png")])[0].tensors)
    for parameter in model.roi_heads.box_predictor.cls_score.parameters():
        parameter.data.mul_(20)
    model.eval()
    return model


@pytest.fixture(scope="module")
def file(theirs: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("torchvision") / "fasterrcnn_mobilenet_v3_large_320_fpn-1234abcd.pth"
    torch.save(theirs.state_dict(), path)
    return path


def test_the_converted_detector_detects_the_same(
    shared: Path, theirs: nn.Module, file: Path, tmp_path: Path, rcnn_command
) -> None:
    ours = tmp_path / "new" / "ours.safetensors"
    code, out, _ = rcnn_command("convert", file, "--from", "torchvision", "-o", ours)
    assert code == 0
    assert "the structure of faster_rcnn_mobilenet_v3_large_320_fpn, 90 classes" in out
    assert "assumed: the 320-pixel model, by the name of the file" in out
    assert f"written: {ours}" in out
    predictor = rcnn.load(ours, device="cpu")
    assert predictor.classes == coco_91_classes()
    for name in ("coffee_480x320.png", "astronaut_300x360.png"):
        with torch.no_grad():
            (expected,) = theirs([pixels_of(shared, name)])
        found = predictor.predict(shared / "oracles/inputs" / name)[0]
        assert len(found) == len(expected["scores"]) > 20
        assert expected["scores"].diff().abs().median() > 1e-3  # far apart: their order is no matter of rounding
        torch.testing.assert_close(found.scores, expected["scores"], rtol=0, atol=5e-4)
        torch.testing.assert_close(found.boxes_xyxy, expected["boxes"], rtol=0, atol=0.02)
        assert (found.labels + 1).tolist() == expected["labels"].tolist()


def test_the_file_of_a_whole_training(theirs: nn.Module, file: Path, tmp_path: Path, rcnn_command) -> None:
    """As torchvision's references save it: optimizer, schedule, epoch, and the command line as a Namespace; and with
    the prefix that it has where the wrapper for several devices was saved."""
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    content = {
        "model": nn.DataParallel(theirs).state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3,
        "lr_scheduler": {"last_epoch": 3}, "args": argparse.Namespace(dataset="coco", lr=0.02, world_size=8),
    }  # fmt: skip
    torch.save(content, tmp_path / "model_3.pth")
    (tmp_path / "names.txt").write_text("\n".join(NAMES) + "\n\n")
    code, out, _ = rcnn_command(
        "convert", tmp_path / "model_3.pth", "-o", tmp_path / "a.safetensors", "--classes", tmp_path / "names.txt",
        "detector.roi.score_threshold=0.3", "--keys",
    )  # fmt: skip
    assert code == 0
    assert "every name began with module., as a wrapper of the model adds it: taken off" in out
    assert "800 pixels; for the 320-pixel model: --recipe faster_rcnn_mobilenet_v3_large_320_fpn" in out
    assert "rpn.head.cls_logits.weight -> proposals.head.tower.classes.weight" in out
    checkpoint = read_weights(tmp_path / "a.safetensors")
    assert checkpoint.meta.classes.names == tuple(NAMES)
    predictor = rcnn.load(tmp_path / "a.safetensors")
    assert (predictor.recipe.detector.image.short_side, predictor.recipe.detector.roi.score_threshold) == (800, 0.3)
    code, _, _ = rcnn_command(
        "convert", file, "-o", tmp_path / "b.safetensors", "--classes", ",".join(NAMES),
        "--recipe", "faster_rcnn_mobilenet_v3_large_320_fpn",
    )  # fmt: skip
    assert code == 0
    again = read_weights(tmp_path / "b.safetensors")
    assert again.meta.classes.names == tuple(NAMES)
    torch.testing.assert_close(dict(again.state_dict), dict(checkpoint.state_dict), rtol=0, atol=0)


class _Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code(tmp_path: Path, rcnn_command, zipped: bool) -> None:
    evil = tmp_path / "evil.pth"
    if zipped:
        torch.save({"model": _Hostile(tmp_path / "hacked")}, evil)
    else:
        evil.write_bytes(pickle.dumps(_Hostile(tmp_path / "hacked")))
    code, _, err = rcnn_command("convert", evil, "-o", tmp_path / "out.safetensors")
    assert code == 1
    assert f"evil.pth: it wants {os.mkdir.__module__}.mkdir, which is no data and could run code; nothing in the" in err
    assert os.listdir(tmp_path) == ["evil.pth"]


@pytest.fixture
def refused(rcnn_command, tmp_path: Path):
    def call(file: Path, *options: object) -> str:
        code, out, err = rcnn_command("convert", file, "-o", tmp_path / "out.safetensors", *options)
        assert (code, out) == (1, "")
        assert not (tmp_path / "out.safetensors").exists()
        return err

    return call


def test_what_is_none_of_torchvisions(refused, tiny, tmp_path: Path) -> None:
    assert "nowhere.pth: there is no such file; check the path" in refused(tmp_path / "nowhere.pth")
    assert "this is a folder" in refused(tmp_path)
    torch.save({"a.weight": torch.zeros(3)}, tmp_path / "a.pth")
    err = refused(tmp_path / "a.pth")
    assert "a.pth: keys of no system that is known here (1 tensors, first ['a.weight'])" in err
    assert "say which it is: --from SYSTEM" in err
    err = refused(tmp_path / "a.pth", "--from", "torchvision")
    assert f"{tmp_path}/a.pth: the keys: no roi_heads.box_predictor.cls_score.weight among 1 keys" in err
    (tmp_path / "b.pth").write_text("hello")
    assert "b.pth: not a file of weights" in refused(tmp_path / "b.pth")
    assert "a checkpoint of rcnn already; it is used as it is: rcnn predict" in refused(tiny.checkpoint)


def test_class_names_that_do_not_fit(refused, file: Path, tmp_path: Path) -> None:
    assert "90 classes and background, and 2 class names" in refused(file, "--classes", "cat,dog")
    assert "cat more than once; allowed: a name of its own for each class" in refused(file, "--classes", "cat,dog,cat")
    (tmp_path / "names.txt").write_bytes(b"\xff\xfe\x00")
    assert "names.txt: cannot be read" in refused(file, "--classes", tmp_path / "names.txt")


def test_a_recipe_of_another_structure(refused, file: Path) -> None:
    err = refused(file, "--recipe", "faster_rcnn_resnet18_fpn", "--classes", ",".join(NAMES))
    assert (
        "its tensors do not fit the recipe faster_rcnn_resnet18_fpn; without --recipe or --config the structure is read"
        in err
    )


def test_a_place_that_cannot_be_written(rcnn_command, file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, _, err = rcnn_command("convert", file, "-o", tmp_path / "file/a.safetensors")
    assert code == 1
    assert "file/a.safetensors: cannot be written: File exists; choose another place" in err
