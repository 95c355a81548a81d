"""MindSpore RCNN's files: every key, what is left out, and the depths. The parity test loads one into a detector."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rcnn.config.edit import edit
from rcnn.converters.interface import ForeignFile, ForeignModel, Wanted
from rcnn.converters.mindspore import MindSporeSystem
from rcnn.errors import CheckpointError
from rcnn.recipes.models import build_detector
from rcnn.weight_files.reading import read_foreign


@pytest.fixture(scope="module")
def layout(shared: Path) -> dict[str, Tensor]:
    manifest = json.loads((shared / "oracles/mindspore/faster_rcnn_resnet50_fpn/manifest.json").read_text())
    entries = enumerate(manifest["state_dict"])
    return {key: torch.tensor(float(number)).expand(shape) for number, (key, shape, _) in entries}


def recognised(state: dict[str, Tensor], wanted: Wanted | None = None) -> ForeignModel:
    return MindSporeSystem().recognise(ForeignFile(path=Path("a.ckpt"), tensors=state), wanted or Wanted())


@pytest.mark.parametrize("norm", ["batch", "frozen"])
def test_every_key_there_and_back(layout: dict[str, Tensor], norm: str) -> None:
    model = recognised(layout)
    recipe = edit(model.recipe, {"detector.backbone.norm": norm})
    key_map = model.key_map(recipe)
    converted = key_map.to_ours(layout)
    assert set(converted.names) == set(layout)
    # A ResNet-50 has 53 norms, which count their batches unless they are frozen.
    assert len(converted.added) == (53 if norm == "batch" else 0)
    with torch.device("meta"):
        own = build_detector(recipe.detector, num_classes=80, pretrained=False).state_dict()
    assert {name: value.shape for name, value in converted.state.items()} == {n: v.shape for n, v in own.items()}
    assert converted.names["backbone.bottom_up.bn1.gamma"] == "backbone.bn1.weight"
    shortcut = "backbone.bottom_up.layer1.0.down_sample.1.moving_variance"
    assert converted.names[shortcut] == "backbone.layer1.0.downsample.1.running_var"
    back = key_map.to_theirs(converted.state)
    assert all(back[key] is value for key, value in layout.items())


def test_what_a_whole_training_saves(layout: dict[str, Tensor]) -> None:
    more = {"moments.bbox_head.bbox_cls.bias": torch.zeros(81), "global_step": torch.zeros(1)}
    model = recognised(layout | more)
    converted = model.key_map(model.recipe).to_ours(layout | more)
    assert converted.dropped == {
        "moments.bbox_head.bbox_cls.bias": "of the optimizer",
        "global_step": "of the training, not of the detector",
    }


def test_what_is_refused(layout: dict[str, Tensor]) -> None:
    with pytest.raises(CheckpointError, match=r"mask_head\.conv\.weight: a Mask R-CNN"):
        recognised(layout | {"mask_head.conv.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"bbox_head\.bbox_cls\.weight: missing"):
        recognised({key: value for key, value in layout.items() if "bbox_cls" not in key})
    with pytest.raises(CheckpointError, match=r"layers of \(3, 4, 5, 3\) blocks"):
        recognised({key: value for key, value in layout.items() if "layer3.5" not in key})
    with pytest.raises(CheckpointError, match="80 classes and background, and 1 class names"):
        recognised(layout, Wanted(class_names=("cat",)))
    unknown = layout | {"bbox_head.other": torch.zeros(1)}
    model = recognised(unknown)
    with pytest.raises(CheckpointError, match=r"bbox_head\.other: no rule"):
        model.key_map(model.recipe).to_ours(unknown)


def test_a_ckpt_is_read_where_any_file_is(shared: Path, tmp_path: Path) -> None:
    source = shared / "oracles/mindspore/tiny_ckpt/tiny_append_info.ckpt"
    file = read_foreign(source)
    assert file.tensors["half"].dtype == torch.float32  # as of every system
    assert file.meta == {"name": "x"}
    (tmp_path / "cut.ckpt").write_bytes(source.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=r"cut\.ckpt: truncated"):
        read_foreign(tmp_path / "cut.ckpt")
