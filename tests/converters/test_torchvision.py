"""torchvision's checkpoints: names old and new, both ways, and a model of a user against torchvision, live."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from rcnn.config.text import from_yaml
from rcnn.converters import convert as converting
from rcnn.converters.convert import convert_file, export_file
from rcnn.converters.interface import ForeignFile
from rcnn.converters.torchvision import coco_91_classes, convert, modern_names, recognise
from rcnn.converters.torchvision_system import TorchvisionSystem
from rcnn.engine.checkpoint import load_into, read_weights
from rcnn.errors import CheckpointError
from rcnn.recipes.catalogue import RECIPES
from rcnn.recipes.models import build_detector
from rcnn.recipes.recipe import Recipe
from rcnn.records import Size, Target
from rcnn.transforms.batching import Sample, collate

CASES = ["fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2", "fasterrcnn_mobilenet_v3_large_320_fpn"]
NAMES = ("cat", "dog", "bird")


@pytest.fixture(scope="module")
def layout(shared: Path) -> Callable[[str], tuple[dict[str, Tensor], dict[str, str]]]:
    """A recorded state dict, numbered instead of filled, and its table of older names (new: old)."""

    def read(case: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        manifest = json.loads((shared / "oracles" / "torchvision" / case / "manifest.json").read_text())
        state = {}
        for number, (key, shape, _) in enumerate(manifest["state_dict"]):
            # One number per row is enough to see where each row goes, and takes no memory.
            rows = torch.arange(shape[0] if shape else 1, dtype=torch.float32) + 1000 * number
            state[key] = rows.reshape(shape[:1] + [1] * (len(shape) - 1)).expand(shape) if shape else rows[0]
        return state, manifest["older_key_names"]["names"]

    return read


@pytest.mark.parametrize("case", CASES)
def test_every_key_is_accounted_for(case: str, layout) -> None:
    state, _ = layout(case)
    recipe, classes, converted = convert(state)
    assert set(converted.names) | set(converted.dropped) == set(state)
    assert classes == coco_91_classes()
    with torch.device("meta"):
        own = build_detector(recipe.detector, num_classes=90, pretrained=False).state_dict()
    expected = {name: tuple(value.shape) for name, value in own.items()}
    assert {name: tuple(value.shape) for name, value in converted.state.items()} == expected


@pytest.mark.parametrize("case", CASES)
def test_older_names(case: str, layout) -> None:
    state, older = layout(case)
    old = {older.get(key, key): value for key, value in state.items()}
    assert set(modern_names(old)) == set(state)
    assert convert(old)[2].names == convert(state)[2].names


@pytest.mark.parametrize("case", CASES)
def test_there_and_back(case: str, layout) -> None:
    state, _ = layout(case)
    model = recognise(state)
    converted = model.key_map.to_ours(state)
    back = model.key_map.to_theirs(converted.state)
    # torchvision never reads the box of the background: ours has none, and gives zeros for it.
    for name in ("roi_heads.box_predictor.bbox_pred.weight", "roi_heads.box_predictor.bbox_pred.bias"):
        assert not back[name][:4].any()
        back[name][:4] = state[name][:4]
    torch.testing.assert_close(back, {key: value for key, value in state.items() if key not in converted.dropped})


def test_a_name_old_and_new(layout) -> None:
    state, _ = layout(CASES[0])
    with pytest.raises(CheckpointError, match="under its old and its new name"):
        modern_names({**state, "rpn.head.conv.weight": torch.ones(1)})


def test_keys_that_are_none_of_torchvisions(layout) -> None:
    with pytest.raises(CheckpointError, match=r"torchvision\.models\.detection\.FasterRCNN"):
        convert({"model.0.conv.weight": torch.ones(1)})
    state, _ = layout(CASES[0])
    with pytest.raises(CheckpointError, match=r"roi_heads\.mask_head\.0\.0\.weight: no rule"):
        convert({**state, "roi_heads.mask_head.0.0.weight": torch.ones(1)})
    without = {key: value for key, value in state.items() if "layer3.5" not in key}
    with pytest.raises(CheckpointError, match=r"layers of \(3, 4, 5, 3\) blocks"):
        convert(without)


def test_a_missing_key(layout) -> None:
    state, _ = layout(CASES[0])
    missing = "backbone.body.layer1.0.conv1.weight"
    recipe, _, converted = convert({key: value for key, value in state.items() if key != missing})
    with torch.device("meta"):
        detector = build_detector(recipe.detector, num_classes=90, pretrained=False)
    with pytest.raises(CheckpointError, match=r"backbone\.layer1\.0\.conv1\.weight: missing"):
        load_into(detector, converted.state)


def test_classes() -> None:
    classes = coco_91_classes()
    assert (classes.names[0], classes.names[89]) == ("person", "toothbrush")
    # Id 12 was street sign in the list of 2014.
    assert classes.names[11] == "unused 12"
    assert sum(name.startswith("unused") for name in classes.names) == 10
    assert classes.category_ids == tuple(range(1, 91))


def users_model() -> FasterRCNN:
    """A detector of three classes on ResNet-18, as a user of torchvision builds one, with scores far apart."""
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5)
    model = FasterRCNN(backbone, num_classes=len(NAMES) + 1, min_size=96, max_size=160).eval()
    for parameter in model.roi_heads.box_predictor.parameters():
        parameter.data.mul_(20)
    return model


@pytest.mark.parametrize("given", [None, ("cat", "dog")])
def test_class_names_must_be_given(given: tuple[str, ...] | None) -> None:
    state = users_model().state_dict()
    with pytest.raises(CheckpointError, match="3 classes and background") as caught:
        convert(state, class_names=given)
    assert "--classes" in str(caught.value)


def test_a_users_model_detects_the_same(tmp_path: Path) -> None:
    theirs = users_model()
    torch.save({"model": theirs.state_dict(), "epoch": 25}, tmp_path / "model_25.pth")
    report = convert_file(
        tmp_path / "model_25.pth",
        tmp_path / "out.safetensors",
        classes="cat, dog,bird",
        overrides=["detector.image.short_side=96", "detector.image.max_long_side=160"],
    )
    assert report.classes.names == NAMES
    # A frozen norm has four numbers per channel in both; no key of theirs counts batches.
    assert not report.converted.dropped
    checkpoint = read_weights(tmp_path / "out.safetensors")
    detector = build_detector(
        from_yaml(checkpoint.meta.recipe, Recipe).detector, num_classes=len(checkpoint.meta.classes), pretrained=False
    )
    load_into(detector, checkpoint.state_dict)
    # Of the size that the resize leaves alone: 96 x 128.
    pixels = torch.randint(0, 256, (3, 96, 128), generator=torch.Generator().manual_seed(1)).double()
    nothing = Target(boxes_xyxy=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
    sample = Sample(image=pixels, target=nothing, original_size=Size(96, 128), image_id=0)
    batch, _ = collate([sample], divisor=32)
    with torch.no_grad():
        (expected,) = theirs.double()([pixels / 255])
        (found,) = detector.double().eval().predict(batch)
    assert len(found) > 20
    torch.testing.assert_close(found.boxes_xyxy, expected["boxes"], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(found.scores, expected["scores"], rtol=1e-6, atol=1e-8)
    assert (found.labels + 1).tolist() == expected["labels"].tolist()


def test_a_users_model_there_and_back(tmp_path: Path) -> None:
    theirs = users_model()
    torch.save(theirs.state_dict(), tmp_path / "model.pth")
    convert_file(tmp_path / "model.pth", tmp_path / "ours.safetensors", classes="cat,dog,bird")
    export_file(tmp_path / "ours.safetensors", tmp_path / "back.pth", system="torchvision")
    back, expected = torch.load(tmp_path / "back.pth", weights_only=True), theirs.state_dict()
    for name in ("roi_heads.box_predictor.bbox_pred.weight", "roi_heads.box_predictor.bbox_pred.bias"):
        expected[name][:4] = 0  # the box of the background, which torchvision never reads and ours has not
    torch.testing.assert_close(back, dict(expected), rtol=0, atol=0)


def test_a_recipe_of_ours_that_torchvision_cannot_compute() -> None:
    with pytest.raises(CheckpointError, match=r"detector\.roi\.pooling\.aligned: true; allowed: false"):
        TorchvisionSystem().export({}, RECIPES["faster_rcnn_resnet18_fpn"]())
    for name in ("faster_rcnn_resnet50_fpn", "faster_rcnn_resnet50_fpn_v2", "faster_rcnn_mobilenet_v3_large_320_fpn"):
        assert TorchvisionSystem().export({}, RECIPES[name]()) == {}


def test_an_override_of_something_else_keeps_the_epsilon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout
) -> None:
    """torchvision's COCO_V1 weights go with an epsilon of zero, whatever else is chosen."""
    state, _ = layout(CASES[0])
    monkeypatch.setattr(converting, "read_foreign", lambda path: ForeignFile(path=path, tensors=state))
    monkeypatch.setattr(converting, "save_weights", lambda path, tensors, meta: recipes.append(meta))
    monkeypatch.setattr(converting, "load_into", lambda detector, tensors: None)
    recipes: list = []
    for overrides in ([], ["detector.image.short_side=600"], ["detector.backbone.norm_eps=1e-5"]):
        convert_file(tmp_path / "a.pth", tmp_path / "b.safetensors", overrides=overrides)
    epsilons = [from_yaml(meta.recipe, Recipe).detector.backbone.norm_eps for meta in recipes]  # type: ignore[union-attr]
    assert epsilons == [0.0, 0.0, 1e-5]
