"""The detector as a whole: geometry, precision, and graphs."""

from __future__ import annotations

import copy

import pytest
import torch

from rcnn.config.edit import edit
from rcnn.detectors.two_stage import TwoStageDetector
from rcnn.recipes.catalogue import faster_rcnn_resnet18_fpn
from rcnn.recipes.models import build_detector
from rcnn.records import ImageBatch, Size, Target

SIZES = (Size(height=64, width=96), Size(height=50, width=60))
ORIGINAL_SIZES = (Size(height=32, width=48), Size(height=100, width=120))


@pytest.fixture(scope="module")
def detector() -> TwoStageDetector:
    torch.manual_seed(0)
    recipe = edit(faster_rcnn_resnet18_fpn(), {"detector.neck.channels": 16, "detector.roi.box_head.features": 16})
    return build_detector(recipe.detector, num_classes=3, pretrained=False)


def batch() -> ImageBatch:
    pixels = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageBatch(pixels=pixels, sizes=SIZES, original_sizes=ORIGINAL_SIZES)


def targets() -> list[Target]:
    boxes = torch.tensor([[4.0, 4, 60, 50], [30, 8, 44, 40]])
    return [
        Target(boxes_xyxy=boxes, labels=torch.tensor([0, 2])),
        Target(boxes_xyxy=boxes[:0], labels=torch.tensor([], dtype=torch.int64)),
    ]


def test_levels(detector: TwoStageDetector) -> None:
    levels = detector.features(batch())
    # 64 x 96 at strides 4 to 32, and P6: every second cell of 2 x 3.
    assert [(shape.height, shape.width, shape.stride_px) for shape in levels.shapes] == [
        (16, 24, 4),
        (8, 12, 8),
        (4, 6, 16),
        (2, 3, 32),
        (1, 2, 64),
    ]
    assert levels.num_roi_levels == 4
    assert levels.image_scales == (2.0, 0.5)
    assert (levels.padded_size, levels.image_sizes) == (Size(64, 96), SIZES)


def test_the_four_losses(detector: TwoStageDetector) -> None:
    losses = detector.loss(batch(), targets())
    assert set(losses) == {"rpn_classification", "rpn_box", "roi_classification", "roi_box"}


def test_proposals_lie_inside_their_pictures(detector: TwoStageDetector) -> None:
    for found, size in zip(detector.propose(batch()), SIZES, strict=True):
        assert len(found.scores) > 0
        assert (found.scores[:-1] >= found.scores[1:]).all()
        assert (found.boxes_xyxy >= 0).all()
        assert (found.boxes_xyxy <= torch.tensor([size.width, size.height] * 2)).all()


def test_a_picture_is_not_changed_by_its_neighbours(detector: TwoStageDetector) -> None:
    """In the same padding."""
    double = copy.deepcopy(detector).double().eval()
    both = batch()
    alone = ImageBatch(pixels=both.pixels[1:], sizes=SIZES[1:], original_sizes=ORIGINAL_SIZES[1:])
    with torch.no_grad():
        second, single = double.predict(both)[1], double.predict(alone)[0]
    torch.testing.assert_close(second.boxes_xyxy, single.boxes_xyxy)
    torch.testing.assert_close(second.scores, single.scores)


def test_with_or_without_a_graph(detector: TwoStageDetector) -> None:
    """A frozen norm is folded in one case and not in the other."""
    double = copy.deepcopy(detector).double().eval()
    with torch.no_grad():
        without = double.predict(batch())
    for found, expected in zip(double.predict(batch()), without, strict=True):
        torch.testing.assert_close(found.boxes_xyxy, expected.boxes_xyxy)
        torch.testing.assert_close(found.scores, expected.scores)
        assert found.labels.tolist() == expected.labels.tolist()


def test_bfloat16_stays_in_the_layers(detector: TwoStageDetector) -> None:
    """Boxes, scores and losses are float32, and every parameter has a gradient of its own precision."""
    working = copy.deepcopy(detector)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = working.loss(batch(), targets())
        with torch.no_grad():
            (found, _) = working.predict(batch())
            (proposals, _) = working.propose(batch())
    assert {value.dtype for value in losses.values()} == {torch.float32}
    torch.stack(list(losses.values())).sum().backward()
    for parameter in working.parameters():
        assert not parameter.requires_grad or (parameter.grad is not None and parameter.grad.dtype == torch.float32)
    for values in (found.boxes_xyxy, found.scores, proposals.boxes_xyxy, proposals.scores):
        assert values.dtype == torch.float32
    # Boxes on a grid of bfloat16 would be multiples of 1/4 px here.
    assert (proposals.boxes_xyxy * 4 % 1 != 0).any()


def test_losses_in_bfloat16_are_near_those_of_float32(detector: TwoStageDetector) -> None:
    every = edit(
        faster_rcnn_resnet18_fpn(),
        {
            "detector.neck.channels": 16,
            "detector.roi.box_head.features": 16,
            "detector.proposals.head.sampler": {"type": "every"},
            "detector.roi.sampler": {"type": "every"},
        },
    )
    working = build_detector(every.detector, num_classes=3, pretrained=False)
    working.load_state_dict(detector.state_dict())
    with torch.no_grad():
        exact = working.loss(batch(), targets())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = working.loss(batch(), targets())
    for name in ("rpn_classification", "rpn_box"):
        assert rough[name].item() == pytest.approx(exact[name].item(), rel=0.02)
