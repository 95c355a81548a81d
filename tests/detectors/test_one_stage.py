"""One-stage detectors: a dense head on a pyramid, its thresholds and its preparation for inference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from rcnn.backbones.norm import norm_factory
from rcnn.backbones.resnet import ResNetBackbone
from rcnn.boxes.filtering import DetectionFilter
from rcnn.dense.centernet import CenterNetHead
from rcnn.dense.fcos import FCOSHead
from rcnn.dense.gfl import GFLHead
from rcnn.dense.interface import AbstractDenseHead
from rcnn.dense.retinanet import RetinaNetHead
from rcnn.dense.rpn import RPNHead
from rcnn.detectors.contract import assert_is_detector
from rcnn.detectors.one_stage import OneStageDetector
from rcnn.detectors.preparation import prepared_detector
from rcnn.errors import SetupError
from rcnn.necks.fpn import FPN
from rcnn.priors import AnchorGenerator
from rcnn.records import ImageBatch, Size
from rcnn.transforms.batching import ImageNormalizer

NUM_CLASSES = 3
SIZES = (Size(height=60, width=96), Size(height=64, width=80))

HEADS: dict[str, Callable[[FPN], AbstractDenseHead]] = {
    "fcos": lambda neck: FCOSHead(
        in_channels=16, num_classes=NUM_CLASSES, strides_px=neck.strides_px, channels=16, num_convs=1
    ),
    "retinanet": lambda neck: RetinaNetHead(
        in_channels=16, num_classes=NUM_CLASSES, strides_px=neck.strides_px, channels=16, num_convs=1
    ),
    "rpn": lambda neck: RPNHead(
        in_channels=16,
        num_classes=NUM_CLASSES,
        anchors=AnchorGenerator(sizes_px=tuple((4.0 * stride,) for stride in neck.strides_px)),
    ),
    "gfl": lambda neck: GFLHead(
        in_channels=16,
        num_classes=NUM_CLASSES,
        strides_px=neck.strides_px,
        channels=16,
        num_convs=1,
        make_norm=lambda channels: nn.GroupNorm(4, channels),
    ),
    "centernet": lambda neck: CenterNetHead(
        in_channels=16, num_classes=NUM_CLASSES, strides_px=neck.strides_px, num_convs=1
    ),
}


def build(name: str, **choices: object) -> OneStageDetector:
    """On a ResNet-18 with P3 to P7 of 16 channels."""
    torch.manual_seed(0)
    backbone = ResNetBackbone(depth=18, make_norm=norm_factory("frozen", 1e-5))
    neck = FPN(
        in_channels=backbone.channels,
        in_strides_px=backbone.strides_px,
        channels=16,
        extra="convs_on_p5",
        first_map=1,
    )
    normalizer = ImageNormalizer(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375))
    return OneStageDetector(normalizer=normalizer, backbone=backbone, neck=neck, head=HEADS[name](neck), **choices)  # type: ignore[arg-type]


def batch() -> ImageBatch:
    pixels = torch.randint(0, 256, (2, 3, 64, 96), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return ImageBatch(pixels=pixels, sizes=SIZES, original_sizes=SIZES)


def test_the_contract() -> None:
    assert_is_detector(build("fcos", score_threshold=0.0), num_classes=NUM_CLASSES)


def test_the_defaults_are_the_published_ones() -> None:
    detector = build("fcos")
    assert (detector.pre_nms, detector.score_threshold) == (1000, 0.05)
    chosen = detector.detection_filter
    assert (chosen.nms_iou, chosen.max_detections, chosen.score_threshold) == (0.5, 100, 0.0)


def test_detections_are_the_heads_candidates_filtered() -> None:
    chosen = DetectionFilter(score_threshold=0.0, nms_iou=0.6, max_detections=7)
    detector = build("retinanet", detection_filter=chosen, pre_nms=20, score_threshold=0.01).eval()
    with torch.no_grad():
        candidates = detector.head.decode(detector.head(detector.features(batch())), per_level=20, score_threshold=0.01)
        found = detector.predict(batch())
    for detections, given in zip(found, candidates, strict=True):
        assert len(detections) == 7
        expected = chosen(given.boxes_xyxy, given.scores, given.labels)
        assert_close(detections.boxes_xyxy, expected.boxes_xyxy)
        assert_close(detections.labels, expected.labels)


def test_the_threshold_is_of_the_score_that_is_ranked() -> None:
    """FCOS ranks by class score and then multiplies by centerness: lower scores pass, unless the filter stops them."""
    detector = build("fcos", score_threshold=0.009).eval()
    with torch.no_grad():
        scores = detector.predict(batch())[0].scores
        # The first class scores are about 0.01, centerness about a half.
        assert len(scores) > 0
        assert scores.max() < 0.009
        detector.detection_filter = DetectionFilter(score_threshold=0.009)
        assert len(detector.predict(batch())[0]) == 0


def spread(detector: OneStageDetector, name: str) -> None:
    """Class scores that are neither alike nor saturated."""
    last = detector.head.get_submodule("heat" if name == "centernet" else "tower.classes")
    assert isinstance(last, nn.Conv2d)
    assert last.bias is not None
    with torch.no_grad():
        maps = detector.head(detector.features(batch())).classes
        last.weight.mul_(2 / torch.cat([x.flatten() for x in maps]).std())
        last.bias.zero_()


@pytest.mark.parametrize("name", HEADS)
def test_a_prepared_detector_finds_the_same(name: str) -> None:
    # In float64: random networks give boxes so alike that rounding in float32 can choose among them.
    detector = build(name, score_threshold=0.1).double().eval()
    spread(detector, name)
    prepared = prepared_detector(detector, torch.float64)
    with torch.inference_mode():
        for given, expected in zip(prepared.predict(batch()), detector.predict(batch()), strict=True):
            assert len(expected) > 0
            assert_close(given.labels, expected.labels)
            assert_close(given.boxes_xyxy, expected.boxes_xyxy)
            assert_close(given.scores, expected.scores)


@pytest.mark.parametrize("name", HEADS)
def test_prepared_maps_are_equal_in_float32(name: str) -> None:
    detector = build(name).eval()
    prepared = prepared_detector(detector)
    with torch.inference_mode():
        ours = prepared.head(prepared.features(batch()))
        theirs = detector.head(detector.features(batch()))
    for given, wanted in zip(
        ours.classes + ours.boxes + ours.quality, theirs.classes + theirs.boxes + theirs.quality, strict=True
    ):
        assert (given - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_the_original_is_untouched() -> None:
    detector = build("fcos").train()
    names = [name for name, _ in detector.named_modules()]
    with torch.inference_mode():
        prepared_detector(detector, torch.bfloat16).predict(batch())
    assert [name for name, _ in detector.named_modules()] == names
    assert detector.training


MISFITS: dict[str, Callable[[], AbstractDenseHead]] = {
    "strides 4, 8": lambda: FCOSHead(in_channels=16, num_classes=2, strides_px=(4, 8), channels=16, num_convs=1),
    "2 maps": lambda: RPNHead(in_channels=16, num_classes=2, anchors=AnchorGenerator(sizes_px=((8.0,), (16.0,)))),
}


@pytest.mark.parametrize("given", list(MISFITS))
def test_a_head_for_other_maps_than_the_neck_gives_is_refused(given: str) -> None:
    neck = FPN(in_channels=(16, 32, 64, 128), in_strides_px=(4, 8, 16, 32), channels=16, extra="pool")
    backbone = ResNetBackbone(depth=18, make_norm=norm_factory("frozen", 1e-5))
    with pytest.raises(SetupError) as caught:
        OneStageDetector(
            normalizer=ImageNormalizer(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
            backbone=backbone,
            neck=neck,
            head=MISFITS[given](),
        )
    assert given in str(caught.value)
    assert "strides 4, 8, 16, 32, 64" in str(caught.value)
