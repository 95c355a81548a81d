"""The GFL head: its maps, losses recomputed with torchvision's and in loops, decoding by hand, and the contract.

The recorded detector of MMDetection is compared in tests/parity.
"""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torchvision
from torch import Tensor, nn

from rcnn.dense.contract import assert_is_dense_head
from rcnn.dense.gfl import GFLHead
from rcnn.dense.interface import DensePrediction
from rcnn.ops.preparation import prepare_for_inference
from rcnn.records import Levels, LevelShape, Size, Target

STRIDES = (8, 16)
CHANNELS = 4
SIZE = Size(64, 96)
BINS = 5


def levels(num_images: int = 1, dtype: torch.dtype = torch.float64) -> Levels:
    generator = torch.Generator().manual_seed(0)
    shapes = tuple(
        LevelShape(height=SIZE.height // stride, width=SIZE.width // stride, stride_px=stride) for stride in STRIDES
    )
    return Levels(
        maps=tuple(
            torch.randn(num_images, CHANNELS, shape.height, shape.width, generator=generator, dtype=dtype)
            for shape in shapes
        ),
        shapes=shapes,
        padded_size=SIZE,
        image_sizes=(SIZE,) * num_images,
        image_scales=(1.0,) * num_images,
        num_roi_levels=2,
    )


def head(num_classes: int = 3, strides: tuple[int, ...] = STRIDES) -> GFLHead:
    torch.manual_seed(0)
    return GFLHead(
        in_channels=CHANNELS,
        num_classes=num_classes,
        strides_px=strides,
        channels=8,
        num_convs=2,
        make_norm=partial(nn.GroupNorm, 4),
        max_distance=BINS - 1,
        anchor_scale=2.0,
    )


def target(*boxes: tuple[float, ...], labels: list[int] | None = None) -> Target:
    return Target(
        boxes_xyxy=torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4),
        labels=torch.tensor(labels or [0] * len(boxes), dtype=torch.int64),
        ignore_xyxy=torch.zeros(0, 4, dtype=torch.float64),
    )


def test_the_contract_in_both_roles() -> None:
    strides = (8, 16, 32)
    assert_is_dense_head(lambda num_classes: head(num_classes, strides), in_channels=CHANNELS, strides_px=strides)


def test_maps_and_start() -> None:
    one = GFLHead(in_channels=CHANNELS, num_classes=3, strides_px=STRIDES)
    assert one.bin_distances.tolist() == list(range(17))
    torch.testing.assert_close(one.tower.classes.bias, torch.full((3,), -math.log(99)))
    found = one(levels(dtype=torch.float32))
    assert [tuple(x.shape) for x in found.classes] == [(1, 3, 8, 12), (1, 3, 4, 6)]
    assert [tuple(x.shape) for x in found.boxes] == [(1, 4 * 17, 8, 12), (1, 4 * 17, 4, 6)]
    assert not found.quality


def test_decode_by_hand() -> None:
    """Cell (row 2, column 3) of level 1 is at (48, 32). Sides: half at 1 and half at 2 strides of 16 px, certainly 1,
    all five bins alike (2), and certainly 0."""
    on = levels()
    prediction = DensePrediction(
        classes=tuple(x.new_zeros(1, 3, *x.shape[2:]) for x in on.maps),
        boxes=tuple(x.new_zeros(1, 4 * BINS, *x.shape[2:]) for x in on.maps),
        levels=on,
    )
    prediction.classes[1][0, 1, 2, 3] = 1.0
    sides = prediction.boxes[1][0, :, 2, 3].view(4, BINS)
    sides[0, [0, 3, 4]] = -1e3
    sides[1, 1] = 1e3
    sides[3, 0] = 1e3
    (found,) = head().double().decode(prediction, per_level=1, score_threshold=0.6)
    assert found.labels.tolist() == [1]
    assert found.scores.item() == pytest.approx(1 / (1 + math.exp(-1)))
    assert found.boxes_xyxy.tolist() == [[48 - 24, 32 - 16, 48 + 32, 32]]


def cross_entropy(probability: float, wanted: float) -> float:
    return -wanted * math.log(probability) - (1 - wanted) * math.log1p(-probability)


def by_the_rule(
    one: GFLHead, prediction: DensePrediction, positives: list[dict[int, tuple[list[float], int]]]
) -> dict[str, float]:
    """The three losses in loops: `positives` by picture, from prior to its box and label."""
    cells = [
        (column * shape.stride_px, row * shape.stride_px, shape.stride_px)
        for shape in prediction.levels.shapes
        for row in range(shape.height)
        for column in range(shape.width)
    ]
    scores = torch.cat([x.flatten(2) for x in prediction.classes], dim=2).sigmoid()
    bins = torch.cat([x.flatten(2) for x in prediction.boxes], dim=2)
    classes = box_loss = side_loss = total = 0.0
    for image, mine in enumerate(positives):
        for prior, (x, y, stride) in enumerate(cells):
            wanted = [0.0] * 3
            if prior in mine:
                truth, label = mine[prior]
                shares = bins[image, :, prior].view(4, BINS).softmax(dim=1)
                left, top, right, bottom = [
                    stride * sum(number * share for number, share in enumerate(side)) for side in shares.tolist()
                ]
                predicted = torch.tensor([[x - left, y - top, x + right, y + bottom]], dtype=torch.float64)
                true_box = torch.tensor([truth], dtype=torch.float64)
                weight = scores[image, :, prior].max().item()
                wanted[label] = torchvision.ops.box_iou(predicted, true_box).item()
                box_loss += weight * torchvision.ops.generalized_box_iou_loss(predicted, true_box).item()
                distances = [x - truth[0], y - truth[1], truth[2] - x, truth[3] - y]
                for side, distance in zip(shares.tolist(), distances, strict=True):
                    place = min(max(distance / stride, 0.0), BINS - 1 - 0.1)
                    low = math.floor(place)
                    entropy = -(low + 1 - place) * math.log(side[low]) - (place - low) * math.log(side[low + 1])
                    side_loss += weight * entropy / 4
                total += weight
            for label, quality in enumerate(wanted):
                p = scores[image, label, prior].item()
                classes += abs(quality - p) ** 2 * cross_entropy(p, quality)
    count = sum(max(len(mine), 1) for mine in positives)
    return {
        "classification": classes / count,
        "box": 2 * box_loss / max(total, 1.0),
        "distribution": 0.25 * side_loss / max(total, 1.0),
    }


@pytest.mark.parametrize("confidence", [0.0, 4.0])
def test_losses_against_the_rule_in_loops(confidence: float) -> None:
    """Two pictures, one without boxes; with scores so low that their sum counts as 1, and with high ones."""
    on = levels(2)
    one = head().double()
    with torch.no_grad():
        one.tower.sides.weight.mul_(100)
        one.tower.classes.bias.add_(confidence)
    prediction = one(on)
    truths = [target((10.0, 10.0, 40.0, 50.0), (60.0, 5.0, 90.0, 30.0), labels=[2, 0]), target()]
    anchors = one.anchors(on.shapes, on.padded_size, dtype=torch.float64, device=torch.device("cpu"))
    matches = one.matcher(anchors, truths[0])
    positives = {
        i: (truths[0].boxes_xyxy[matches.gt_index[i]].tolist(), int(truths[0].labels[matches.gt_index[i]]))
        for i in matches.positive.nonzero().flatten().tolist()
    }
    assert len(positives) == 4
    expected = by_the_rule(one, prediction, [positives, {}])
    found = one.loss(prediction, truths)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value, rel=1e-6), name


def test_no_gradient_through_what_is_wanted() -> None:
    """Neither the IoU that a class is wanted to be nor the weights of the box losses pull at what they came from."""
    on = levels()
    one = head().double()
    prediction = one(on)
    truth = [target((10.0, 10.0, 40.0, 50.0))]
    losses = one.loss(prediction, truth)

    def reached(loss: Tensor, maps: tuple[Tensor, ...]) -> bool:
        found = torch.autograd.grad(loss, maps, retain_graph=True, allow_unused=True)
        return any(x is not None and bool(x.any()) for x in found)

    assert reached(losses["classification"], prediction.classes)
    assert not reached(losses["classification"], prediction.boxes)
    for name in ("box", "distribution"):
        assert reached(losses[name], prediction.boxes)
        assert not reached(losses[name], prediction.classes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prepared_for_inference(dtype: torch.dtype) -> None:
    on = levels(dtype=torch.float32)
    one = head().eval()
    with torch.no_grad():
        plain = one(on)
        one.tower = prepare_for_inference(one.tower, dtype=dtype)  # type: ignore[assignment]
        prepared = one(on)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    for mine, other in zip((*plain.classes, *plain.boxes), (*prepared.classes, *prepared.boxes), strict=True):
        torch.testing.assert_close(mine, other.float(), rtol=0, atol=tolerance)
