"""The ATSS head: its maps, losses recomputed with torchvision's, decoding by hand, and the contract in both roles.

The recorded detector of MMDetection is compared in tests/parity.
"""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torchvision
from torch import Tensor, nn

from rcnn.boxes.coding import centerness_of
from rcnn.dense.assignment import cells_of_picture
from rcnn.dense.atss import ATSSHead
from rcnn.dense.contract import assert_is_dense_head
from rcnn.dense.interface import DensePrediction
from rcnn.ops.preparation import prepare_for_inference
from rcnn.records import Levels, LevelShape, Size, Target

STRIDES = (8, 16)
CHANNELS = 4


def levels(*sizes: Size, padded: Size = Size(64, 96), dtype: torch.dtype = torch.float64) -> Levels:
    generator = torch.Generator().manual_seed(0)
    shapes = tuple(
        LevelShape(height=padded.height // stride, width=padded.width // stride, stride_px=stride) for stride in STRIDES
    )
    sizes = sizes or (padded,)
    return Levels(
        maps=tuple(
            torch.randn(len(sizes), CHANNELS, shape.height, shape.width, generator=generator, dtype=dtype)
            for shape in shapes
        ),
        shapes=shapes,
        padded_size=padded,
        image_sizes=sizes,
        image_scales=(1.0,) * len(sizes),
        num_roi_levels=2,
    )


def head(num_classes: int = 3, strides: tuple[int, ...] = STRIDES) -> ATSSHead:
    torch.manual_seed(0)
    return ATSSHead(
        in_channels=CHANNELS,
        num_classes=num_classes,
        strides_px=strides,
        channels=8,
        num_convs=2,
        make_norm=partial(nn.GroupNorm, 4),
        anchor_scale=2.0,
    )


def target(*boxes: tuple[float, ...], labels: list[int] | None = None) -> Target:
    return Target(
        boxes_xyxy=torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4),
        labels=torch.tensor(labels or [0] * len(boxes), dtype=torch.int64),
        ignore_xyxy=torch.zeros(0, 4, dtype=torch.float64),
    )


def silent(on: Levels, num_classes: int = 3) -> DensePrediction:
    """Zero everywhere: each anchor is its own box, and every probability one half."""
    return DensePrediction(
        classes=tuple(x.new_zeros(len(x), num_classes, *x.shape[2:]) for x in on.maps),
        boxes=tuple(x.new_zeros(len(x), 4, *x.shape[2:]) for x in on.maps),
        quality=tuple(x.new_zeros(len(x), 1, *x.shape[2:]) for x in on.maps),
        levels=on,
    )


def test_the_contract_in_both_roles() -> None:
    strides = (8, 16, 32)
    assert_is_dense_head(lambda num_classes: head(num_classes, strides), in_channels=CHANNELS, strides_px=strides)


def test_maps_and_start() -> None:
    one = ATSSHead(in_channels=CHANNELS, num_classes=3, strides_px=STRIDES)
    assert [len(tower.layers) for tower in (one.tower.class_tower, one.tower.box_tower)] == [4, 4]
    norm = one.tower.class_tower.layers[0][1]  # type: ignore[index]
    assert isinstance(norm, nn.GroupNorm)
    assert (norm.num_groups, norm.num_channels) == (32, 256)
    # The logit of one in a hundred.
    torch.testing.assert_close(one.tower.classes.bias, torch.full((3,), -math.log(99)))
    found = one(levels(dtype=torch.float32))
    assert [tuple(x.shape) for x in found.classes] == [(1, 3, 8, 12), (1, 3, 4, 6)]
    assert [tuple(x.shape) for x in found.boxes] == [(1, 4, 8, 12), (1, 4, 4, 6)]
    assert [tuple(x.shape) for x in found.quality] == [(1, 1, 8, 12), (1, 1, 4, 6)]


def test_anchors_are_squares_around_corners() -> None:
    found = head().anchors(levels().shapes, Size(64, 96), dtype=torch.float64, device=torch.device("cpu"))
    assert found[0][:2].tolist() == [[-8, -8, 8, 8], [0, -8, 16, 8]]
    assert found[1][7].tolist() == [0, 0, 32, 32]  # row 1, column 1


def test_a_scale_for_each_level() -> None:
    one = head().double()
    with torch.no_grad():
        one.tower.scales[1].scale.fill_(2.0)  # type: ignore[operator, union-attr]
    plain, scaled = head().double()(levels()), one(levels())
    torch.testing.assert_close(scaled.boxes[0], plain.boxes[0])
    torch.testing.assert_close(scaled.boxes[1], 2 * plain.boxes[1])


def test_decode_by_hand() -> None:
    """The anchor of level 1, row 1, column 2 is 16..48 x 0..32; moved by a tenth of its width times 2.5."""
    prediction = silent(levels())
    prediction.classes[1][0, 2, 1, 2] = 3.0
    prediction.classes[1][0, 0, 3, 3] = 2.0
    prediction.boxes[1][0, :, 1, 2] = torch.tensor([2.5, 0.0, 0.0, 0.0])
    prediction.quality[1][0, 0, 1, 2] = -2.0
    (found,) = head().decode(prediction, per_level=2, score_threshold=0.6)
    # Chosen by class score; then the second one, of quality one half, passes the first.
    assert found.labels.tolist() == [0, 2]
    assert found.level.tolist() == [1, 1]
    expected = torch.tensor([2.0, 3.0]).sigmoid() * torch.tensor([0.0, -2.0]).sigmoid()
    torch.testing.assert_close(found.scores.float(), expected)
    assert found.boxes_xyxy[1].tolist() == [24, 0, 56, 32]


def by_the_rule(
    one: ATSSHead, prediction: DensePrediction, positives: list[dict[int, tuple[Tensor, int]]], left_out: list[set[int]]
) -> dict[str, float]:
    """The three losses in loops: `positives` by picture, from prior to its box and label."""
    anchors = torch.cat(
        one.anchors(
            prediction.levels.shapes, prediction.levels.padded_size, dtype=torch.float64, device=torch.device("cpu")
        )
    )
    flat = {
        name: torch.cat([x.flatten(2) for x in maps], dim=2)
        for name, maps in (("c", prediction.classes), ("b", prediction.boxes), ("q", prediction.quality))
    }
    classes = box = centerness_loss = total = 0.0
    for image, mine in enumerate(positives):
        for prior, anchor in enumerate(anchors):
            if prior in left_out[image]:
                continue
            wanted = torch.zeros(3, dtype=torch.float64)
            if prior in mine:
                wanted[mine[prior][1]] = 1
            classes += torchvision.ops.sigmoid_focal_loss(flat["c"][image, :, prior], wanted, reduction="sum").item()
            if prior not in mine:
                continue
            x1, y1, x2, y2 = mine[prior][0].tolist()
            cx, cy = (anchor[:2] + anchor[2:]).div(2).tolist()
            side = (anchor[2] - anchor[0]).item()
            left, top, right, bottom = cx - x1, cy - y1, x2 - cx, y2 - cy
            center = math.sqrt(min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom))
            dx, dy, dw, dh = flat["b"][image, :, prior].tolist()
            px, py = cx + dx * 0.1 * side, cy + dy * 0.1 * side
            w, h = side * math.exp(0.2 * dw), side * math.exp(0.2 * dh)
            predicted = torch.tensor([[px - w / 2, py - h / 2, px + w / 2, py + h / 2]], dtype=torch.float64)
            truth = torch.tensor([[x1, y1, x2, y2]], dtype=torch.float64)
            box += center * torchvision.ops.generalized_box_iou_loss(predicted, truth, reduction="sum").item()
            logit = flat["q"][image, 0, prior].item()
            centerness_loss += math.log1p(math.exp(-logit)) + (1 - center) * logit
            total += center
    count = sum(max(len(mine), 1) for mine in positives)
    return {
        "classification": classes / count,
        "box": 2 * box / max(total, 1.0),
        "centerness": centerness_loss / count,
    }


def test_losses_against_the_rule_in_loops() -> None:
    """Three pictures of a batch: with boxes, smaller and with boxes, and without any."""
    sizes = (Size(64, 96), Size(30, 40), Size(64, 96))
    on = levels(*sizes)
    one = head().double()
    prediction = one(on)
    truths = [
        target((10.0, 10.0, 40.0, 50.0), (60.0, 5.0, 90.0, 30.0), labels=[2, 0]),
        target((4.0, 2.0, 36.0, 28.0), labels=[1]),
        target(),
    ]
    anchors = one.anchors(on.shapes, on.padded_size, dtype=torch.float64, device=torch.device("cpu"))
    # A picture of 30 x 40 is 32 x 64 rounded up: of level 0 (8 x 12 cells of 8 px) the first 4 rows and 8 columns are
    # its own, of level 1 (4 x 6 of 16 px) 2 rows and 4 columns.
    own = [8 * 12, 4 * 6]
    small = [row * 12 + column for row in range(4) for column in range(8)]
    small += [own[0] + row * 6 + column for row in range(2) for column in range(4)]
    everything = set(range(sum(own)))
    kept = [everything, set(small), everything]
    positives = []
    for truth, mine in zip(truths, kept, strict=True):
        chosen = [[i for i in range(own[0]) if i in mine], [i for i in range(own[1]) if i + own[0] in mine]]
        matches = one.matcher([some[index] for some, index in zip(anchors, chosen, strict=True)], truth)
        names = chosen[0] + [i + own[0] for i in chosen[1]]
        positives.append(
            {
                names[i]: (truth.boxes_xyxy[matches.gt_index[i]], int(truth.labels[matches.gt_index[i]]))
                for i in matches.positive.nonzero().flatten().tolist()
            }
        )
    assert [len(mine) > 0 for mine in positives] == [True, True, False]
    expected = by_the_rule(one, prediction, positives, [everything - mine for mine in kept])
    found = one.loss(prediction, truths)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value, rel=1e-9), name


def test_cells_of_a_small_picture() -> None:
    shapes = [LevelShape(height=3, width=4, stride_px=16), LevelShape(height=1, width=2, stride_px=64)]
    first, second = cells_of_picture(shapes, Size(20, 40), divisor_px=8, device=torch.device("cpu"))
    # Rounded up to 24 x 40: two rows (0, 16) and three columns (0, 16, 32).
    assert first.view(3, 4).tolist() == [[True, True, True, False], [True, True, True, False], [False] * 4]
    assert second.tolist() == [True, False]


def test_centerness_by_hand() -> None:
    # 3 and 1 from left and right, 2 and 2 from top and bottom: sqrt(1/3 * 1). In the middle: 1.
    boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 6, 4]])
    found = centerness_of(torch.tensor([[3.0, 2.0], [3.0, 2.0]]), boxes)
    torch.testing.assert_close(found, torch.tensor([math.sqrt(1 / 3), 1.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prepared_for_inference(dtype: torch.dtype) -> None:
    on = levels(dtype=torch.float32)
    one = head().eval()
    with torch.no_grad():
        plain = one(on)
        one.tower = prepare_for_inference(one.tower, dtype=dtype)  # type: ignore[assignment]
        prepared = one(on)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    for mine, other in zip(
        (*plain.classes, *plain.boxes, *plain.quality),
        (*prepared.classes, *prepared.boxes, *prepared.quality),
        strict=True,
    ):
        torch.testing.assert_close(mine, other.float(), rtol=0, atol=tolerance)
