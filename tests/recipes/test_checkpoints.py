"""From a checkpoint back to its detector, without a second copy of its weights."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest
import torch
from torch import nn

from rcnn.config.edit import edit
from rcnn.config.text import to_yaml
from rcnn.detectors.pyramid import AbstractPyramidDetector
from rcnn.engine.checkpoint import CheckpointMeta, save_weights
from rcnn.recipes import checkpoints
from rcnn.recipes.catalogue import RECIPES
from rcnn.recipes.checkpoints import read_detector
from rcnn.recipes.models import build_detector
from rcnn.records import ClassTable

CLASSES = ClassTable(names=("cup", "key"), category_ids=(1, 2))
SMALL = {"detector.neck.channels": 16, "detector.roi.box_head.features": 8}
RECIPE = edit(RECIPES["faster_rcnn_resnet18_fpn"](), SMALL)


@pytest.mark.parametrize("name", RECIPES)
def test_a_checkpoint_holds_all_that_the_meta_device_leaves_open(name: str) -> None:
    with torch.device("meta"):
        detector = build_detector(RECIPES[name]().detector, num_classes=2, pretrained=False)
    left = {name for name, tensor in named_tensors(detector) if tensor.is_meta} - set(detector.state_dict())
    assert left == set()


def named_tensors(module: nn.Module) -> chain[tuple[str, torch.Tensor]]:
    return chain(module.named_parameters(), module.named_buffers())


@pytest.fixture
def written(tmp_path: Path) -> tuple[AbstractPyramidDetector, Path]:
    detector = build_detector(RECIPE.detector, num_classes=2, pretrained=False)
    path = tmp_path / "last.safetensors"
    save_weights(path, detector.state_dict(), CheckpointMeta(recipe=to_yaml(RECIPE), classes=CLASSES))
    return detector, path


def test_the_detector_that_was_written(written: tuple[AbstractPyramidDetector, Path]) -> None:
    detector, path = written
    read = read_detector(path).detector
    ours, theirs = dict(named_tensors(detector)), dict(named_tensors(read))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=0)
    assert [tensor.requires_grad for tensor in theirs.values()] == [tensor.requires_grad for tensor in ours.values()]


def test_constants_that_no_checkpoint_holds_are_computed(
    written: tuple[AbstractPyramidDetector, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def build_with_constant(*arguments: object, **more: object) -> AbstractPyramidDetector:
        built = build_detector(*arguments, **more)  # type: ignore[arg-type]
        built.register_buffer("constant", torch.arange(3), persistent=False)
        return built

    monkeypatch.setattr(checkpoints, "build_detector", build_with_constant)
    detector, path = written
    read = read_detector(path).detector
    assert read.get_buffer("constant").tolist() == [0, 1, 2]
    torch.testing.assert_close(read.state_dict(), detector.state_dict(), rtol=0, atol=0)
