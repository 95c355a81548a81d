"""Trainings that start from whole detectors of other systems, as files and by their addresses; judged by torchvision
itself and by the numbers that were put into the files."""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

import rcnn
from rcnn.config.edit import edit
from rcnn.config.text import to_yaml
from rcnn.converters.convert import export_file
from rcnn.converters.starts import read_any_start
from rcnn.data.shapes import draw_shapes_dataset
from rcnn.engine.checkpoint import CheckpointMeta, save_weights
from rcnn.predict import Predictor
from rcnn.recipes.catalogue import RECIPES
from rcnn.recipes.models import build_detector
from rcnn.recipes.recipe import Recipe
from rcnn.recipes.starts import file_of_start, read_start
from rcnn.recipes.warm_start import SETTING, start_first_stage
from rcnn.records import ClassTable

CLASSES = ClassTable(names=("cat", "dog", "horse"))

# One step, whose rate is 0: the weights after it are those that it started from.
STANDING = (
    "detector.backbone.depth=18",
    "detector.image.short_side=64",
    "detector.image.max_long_side=96",
    "data.workers=0",
    "data.classes=[class 1, class 2, class 3]",
    "train.batch_size=2",
    "train.max_steps=1",
    "train.warm_up.steps=1",
    "train.warm_up.factor=0",
    "evaluate.every_epochs=0",
)


@pytest.fixture(scope="module")
def peer() -> FasterRCNN:
    """torchvision's Faster R-CNN on a ResNet-18, of three classes, no two of whose scores are alike."""
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=3)
    model = FasterRCNN(backbone, num_classes=4, min_size=64, max_size=96).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.startswith(("rpn.head.cls_logits", "roi_heads.box_predictor")):
                tensor.mul_(20)
            if "running_mean" in name:
                tensor.normal_(std=0.1)
    return model


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Pictures whose classes are called as those of a file without names are."""
    draw_shapes_dataset(tmp_path / "data", train_images=2, val_images=1)
    for path in tmp_path.glob("data/annotations/*.json"):
        content = json.loads(path.read_text())
        for number, category in enumerate(content["categories"], 1):
            category["name"] = f"class {number}"
        path.write_text(json.dumps(content))
    return tmp_path / "data"


def test_both_starts_from_torchvisions_file_by_its_address(web, peer: FasterRCNN, picture, data: Path) -> None:
    """The second from what was fetched for the first, when the server is gone."""
    file = io.BytesIO()
    torch.save(peer.state_dict(), file)
    address = web.serve("/a/model_final.pth", file.getvalue())
    with torch.inference_mode():
        pixels = torch.from_numpy(picture).permute(2, 0, 1) / 255
        expected = peer([pixels])[0]
        images, _ = peer.transform([pixels])
        boxes, _ = peer.rpn(images, peer.backbone(images.tensors))
    assert len(expected["boxes"]) > 5

    recipe = rcnn.recipe("faster_rcnn_resnet50_fpn", *STANDING)
    result = rcnn.train(recipe, run_folder=data / "run", data=data, init_from=address, device="cpu")
    found = rcnn.load(result.run.last, device="cpu").predict(picture)[0]
    close(found.boxes_xyxy, expected["boxes"], atol=1e-2)
    close(found.scores, expected["scores"], atol=1e-4)
    assert (found.labels + 1).tolist() == expected["labels"].tolist()

    web.close()
    said: list[str] = []
    path = file_of_start(address, setting=SETTING, say=said.append)
    detector = build_detector(recipe.detector, num_classes=5, pretrained=False).eval()
    said += start_first_stage(detector, recipe, read_start(address, path, setting=SETTING, read=read_any_start))
    assert said[0].startswith(f"{address}: was fetched before (")
    assert "tensors taken of backbone 100, neck 16, proposals.head 6" in said[2]
    predictor = Predictor(
        detector=detector, recipe=recipe, classes=CLASSES, device=torch.device("cpu"), dtype=torch.float32
    )
    close(predictor.propose(picture)[0].boxes_xyxy, boxes[0], atol=1e-2)
    assert web.asked == ["/a/model_final.pth"]


def close(found: Tensor, expected: Tensor, *, atol: float) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


# --------------------------------------------------------------------------------------------------------- MMDetection


@pytest.fixture(scope="module")
def fill(shared: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("fill", shared / "oracles" / "fill.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CHANNELS, CONVS = 32, 1
ONE_STAGE = "fcos_resnet50_caffe_fpn_gn"
TWO_STAGE = "faster_rcnn_resnet50_caffe_fpn_fcos_rpn"


def small(name: str, head: str) -> Recipe:
    sizes = {"detector.backbone.depth": 18, "detector.backbone.weights": None, "detector.neck.channels": CHANNELS}
    recipe = edit(RECIPES[name](), {**sizes, f"{head}.channels": CHANNELS, f"{head}.num_convs": CONVS})
    return edit(recipe, {"detector.roi.box_head.features": 16}) if name == TWO_STAGE else recipe


def test_a_first_stage_from_mmdetections_file(fill: ModuleType, tmp_path: Path) -> None:
    """A file of MMDetection's layout, whose numbers are made from its keys; where they came to, by hand."""
    recipe = small(ONE_STAGE, "detector.head")
    own = build_detector(recipe.detector, num_classes=len(CLASSES), pretrained=False).state_dict()
    meta = CheckpointMeta(recipe=to_yaml(recipe), classes=CLASSES)
    save_weights(tmp_path / "own.safetensors", own, meta)
    path = tmp_path / "fcos_r18_caffe_fpn.pth"
    export_file(tmp_path / "own.safetensors", path, system="mmdet")
    state = torch.load(path, weights_only=True)["state_dict"]
    values = {key: torch.tensor(fill.value(key, value.shape), dtype=value.dtype) for key, value in state.items()}
    torch.save({"state_dict": values}, path)

    target = small(TWO_STAGE, "detector.proposals.head")
    detector = build_detector(target.detector, num_classes=5, pretrained=False)
    lines = start_first_stage(detector, target, read_any_start(path))
    assert lines[0].startswith(f"{path}: mmdet, because ")
    now = detector.state_dict()
    same = {
        "backbone.conv1.weight": "backbone.conv1.weight",
        "backbone.layer4.1.bn2.running_var": "backbone.layer4.1.bn2.running_var",
        "neck.lateral_convs.2.conv.weight": "neck.lateral.2.0.weight",
        "bbox_head.reg_convs.0.conv.weight": "proposals.head.tower.box_tower.layers.0.0.weight",
        "bbox_head.scales.4.scale": "proposals.head.tower.scales.4.scale",
        "bbox_head.conv_reg.weight": "proposals.head.tower.distances.weight",
        "bbox_head.conv_centerness.bias": "proposals.head.tower.centerness.bias",
    }
    for theirs, ours in same.items():
        torch.testing.assert_close(now[ours], values[theirs], rtol=0, atol=0)
    for part in ("weight", "bias"):
        mean = values[f"bbox_head.conv_cls.{part}"].mean(dim=0, keepdim=True)
        torch.testing.assert_close(now[f"proposals.head.tower.classes.{part}"], mean)
    # And no number of theirs is left out, or there twice, but the classes' and the counts of frozen norms.
    started = [value for name, value in now.items() if not name.startswith(("roi.", "proposals.head.tower.classes."))]
    given = [value for key, value in values.items() if "conv_cls" not in key and not key.endswith("_tracked")]
    assert sorted(value.double().sum().item() for value in started) == sorted(
        value.double().sum().item() for value in given
    )
