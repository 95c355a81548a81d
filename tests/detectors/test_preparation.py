from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from rcnn.detectors.preparation import prepared_detector
from rcnn.detectors.two_stage import TwoStageDetector
from rcnn.ops import fused
from rcnn.ops.folding import is_fixed_norm
from rcnn.recipes import catalogue
from rcnn.recipes.models import build_detector
from rcnn.records import ImageBatch, Size

RECIPES = {
    "resnet18": catalogue.faster_rcnn_resnet18_fpn,
    "resnet50 v2": catalogue.faster_rcnn_resnet50_fpn_v2,
    "mobilenet_v3": catalogue.faster_rcnn_mobilenet_v3_large_320_fpn,
    "efficientnet lite0": catalogue.faster_rcnn_efficientnet_lite0_fpn,
}


def build(name: str) -> TwoStageDetector:
    """Random weights whose norms have statistics and whose scores spread."""
    torch.manual_seed(0)
    detector = build_detector(RECIPES[name]().detector, num_classes=3, pretrained=False).eval()
    with torch.no_grad():
        for module in detector.modules():
            if is_fixed_norm(module):
                module.get_buffer("running_mean").uniform_(-0.1, 0.1)
                module.get_buffer("running_var").uniform_(0.8, 1.6)
        levels = detector.features(batch())
        # Neither all alike nor saturated, where the order would be one of rounding errors.
        for logits in detector.proposals.head(levels).classes[:1]:
            detector.proposals.head.tower.classes.weight.mul_(2 / logits.std())
        logits, _ = detector.roi(levels, [torch.tensor([[4.0, 4.0, 40.0, 30.0], [0.0, 0.0, 96.0, 60.0]])] * 2)
        detector.roi.predictor.classes.weight.mul_(2 / logits.std())
    return detector


def batch(scale: int = 1) -> ImageBatch:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, 3, 64 * scale, 96 * scale), generator=generator, dtype=torch.uint8)
    sizes = (Size(60 * scale, 96 * scale), Size(64 * scale, 80 * scale))
    return ImageBatch(pixels=pixels, sizes=sizes, original_sizes=sizes)


@pytest.fixture(params=["onednn", "plain"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "plain":
        monkeypatch.setattr(fused, "onednn_works", lambda dtype: False)
    return request.param


@pytest.mark.parametrize("name", RECIPES)
def test_every_stage_is_equal_in_float32(name: str, path: str) -> None:
    detector = build(name)
    prepared = prepared_detector(detector)
    boxes = [torch.tensor([[4.0, 4.0, 40.0, 30.0], [0.0, 0.0, 96.0, 60.0]]), torch.tensor([[8.0, 10.0, 70.0, 60.0]])]
    with torch.inference_mode():
        levels, expected = prepared.features(batch()), detector.features(batch())
        heads = prepared.proposals.head(levels), detector.proposals.head(expected)
        pairs = [
            *zip(levels.maps, expected.maps, strict=True),
            *zip(heads[0].classes + heads[0].boxes, heads[1].classes + heads[1].boxes, strict=True),
            *zip(prepared.roi(levels, boxes), detector.roi(expected, boxes), strict=True),
        ]
    for given, wanted in pairs:
        assert (given - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("name", RECIPES)
def test_boxes_are_equal(name: str) -> None:
    # In float64: random networks propose boxes that are so alike that rounding in float32 can choose among them. And on
    # maps of more than a few cells (MobileNet's are all at stride 32): boxes that pool the same cells score alike.
    pictures = batch(3 if name == "mobilenet_v3" else 1)
    detector = build(name).double()
    prepared = prepared_detector(detector, torch.float64)
    with torch.inference_mode():
        for given, expected in zip(prepared.predict(pictures), detector.predict(pictures), strict=True):
            assert len(expected) > 0
            assert_close(given.labels, expected.labels)
            assert_close(given.boxes_xyxy, expected.boxes_xyxy)
            assert_close(given.scores, expected.scores)
        for given, expected in zip(prepared.propose(pictures), detector.propose(pictures), strict=True):
            assert_close(given.boxes_xyxy, expected.boxes_xyxy)


def test_bfloat16_keeps_boxes_and_scores_in_float32() -> None:
    detector = build("resnet18")
    prepared = prepared_detector(detector, torch.bfloat16)
    with torch.inference_mode():
        levels, expected = prepared.features(batch()), detector.features(batch())
        for given, wanted in zip(levels.maps, expected.maps, strict=True):
            assert given.dtype == torch.bfloat16
            assert (given.float() - wanted).norm() < 0.05 * wanted.norm()
        for found in prepared.predict(batch()):
            assert found.boxes_xyxy.dtype == found.scores.dtype == torch.float32
            assert len(found) > 0


def test_the_original_is_untouched_and_trains_on() -> None:
    detector = build("resnet18").train()
    state = {name: value.clone() for name, value in detector.state_dict().items()}
    names = [name for name, _ in detector.named_modules()]
    with torch.inference_mode():
        prepared_detector(detector).predict(batch())
    assert [name for name, _ in detector.named_modules()] == names
    assert detector.training
    for name, value in detector.state_dict().items():
        assert_close(value, state[name], rtol=0, atol=0)
    assert all(not parameter.is_inference() for parameter in detector.parameters())


def test_without_a_graph_and_without_being_told() -> None:
    # Outside of inference_mode: a prepared detector records nothing by itself.
    for found in prepared_detector(build("resnet18")).predict(batch()):
        assert not found.boxes_xyxy.requires_grad
