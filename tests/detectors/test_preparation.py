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
        detector.roi.predictor.classes.weight.mul_(10)
        detector.proposals.head.tower.classes.weight.mul_(30)
    return detector


def batch() -> ImageBatch:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, 3, 64, 96), generator=generator, dtype=torch.uint8)
    sizes = (Size(60, 96), Size(64, 80))
    return ImageBatch(pixels=pixels, sizes=sizes, original_sizes=sizes)


@pytest.fixture(params=["onednn", "plain"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "plain":
        monkeypatch.setattr(fused, "onednn_works", lambda dtype: False)
    return request.param


@pytest.mark.parametrize("name", RECIPES)
def test_boxes_are_equal_in_float32(name: str, path: str) -> None:
    detector = build(name)
    prepared = prepared_detector(detector)
    with torch.inference_mode():
        for given, expected in zip(prepared.predict(batch()), detector.predict(batch()), strict=True):
            assert len(expected) > 0
            assert_close(given.labels, expected.labels)
            # The limits that the design sets for faster paths.
            assert_close(given.boxes_xyxy, expected.boxes_xyxy, rtol=0, atol=0.02)
            assert_close(given.scores, expected.scores, rtol=0, atol=5e-4)
        proposals = zip(prepared.propose(batch()), detector.propose(batch()), strict=True)
        assert all(len(given.scores) == len(expected.scores) for given, expected in proposals)


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
