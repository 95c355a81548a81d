"""YOLOX's head: maps, norms of a single value, losses and scores, worked by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from rcnn.backbones.norm import SyncBatchNorm
from rcnn.dense.interface import DensePrediction
from rcnn.dense.yolox import YOLOXHead, normalize
from rcnn.matching.simota import SimOTAMatcher
from rcnn.records import Levels, LevelShape, Size, Target

# 4 x 4 cells of 8 px, 2 x 2 of 16 px.
SHAPES = (LevelShape(height=4, width=4, stride_px=8), LevelShape(height=2, width=2, stride_px=16))
SIZE = Size(height=32, width=32)
NUM_CELLS = 20
CHANNELS = 4


def levels(num_images: int = 1, shapes: tuple[LevelShape, ...] = SHAPES) -> Levels:
    generator = torch.Generator().manual_seed(0)
    return Levels(
        maps=tuple(
            torch.randn(num_images, CHANNELS, shape.height, shape.width, generator=generator, dtype=torch.float64)
            for shape in shapes
        ),
        shapes=shapes,
        padded_size=SIZE,
        image_sizes=(SIZE,) * num_images,
        image_scales=(1.0,) * num_images,
        num_roi_levels=2,
    )


def head(**choices: object) -> YOLOXHead:
    torch.manual_seed(0)
    return YOLOXHead(in_channels=CHANNELS, strides_px=(8, 16), **choices).double()  # type: ignore[arg-type]


def target(
    *boxes: tuple[float, float, float, float],
    labels: Sequence[int] | None = None,
    ignore: tuple[tuple[float, float, float, float], ...] = (),
) -> Target:
    return Target(
        boxes_xyxy=torch.tensor(boxes).reshape(-1, 4),
        labels=torch.tensor(labels or [0] * len(boxes), dtype=torch.int64),
        ignore_xyxy=torch.tensor(ignore).reshape(-1, 4),
    )


def silent(num_classes: int = 1, num_images: int = 1) -> DensePrediction:
    """All maps 0: every cell a square of one stride around its top left corner, scores and objectness one half."""

    def maps(width: int) -> tuple[Tensor, ...]:
        return tuple(torch.zeros(num_images, width, shape.height, shape.width, dtype=torch.float64) for shape in SHAPES)

    return DensePrediction(classes=maps(num_classes), boxes=maps(4), quality=maps(1), levels=levels(num_images))


# ------------------------------------------------------------------------------------------------------- maps and norms


def test_shapes_and_start_of_the_maps() -> None:
    found = head(num_classes=3)(levels(2))
    assert [tuple(x.shape) for x in found.classes] == [(2, 3, 4, 4), (2, 3, 2, 2)]
    assert [tuple(x.shape) for x in found.boxes] == [(2, 4, 4, 4), (2, 4, 2, 2)]
    assert [tuple(x.shape) for x in found.quality] == [(2, 1, 4, 4), (2, 1, 2, 2)]
    for level in head().levels:
        for name in ("classes", "objectness"):
            bias = level.get_parameter(f"{name}.bias")
            torch.testing.assert_close(bias.sigmoid(), torch.full_like(bias, 0.01))


def test_every_level_has_layers_of_its_own() -> None:
    names = [name for name, _ in head().named_parameters()]
    assert sum(name.endswith("convs.0.weight") for name in names) == 2 * 2
    assert sum(name.endswith("convs.1.weight") for name in names) == 2 * 2
    norm = head().levels[0].get_submodule("class_tower.norms.0")
    assert isinstance(norm, nn.BatchNorm2d)
    assert (norm.eps, norm.momentum) == (1e-3, 0.03)


@pytest.mark.parametrize("make", [nn.BatchNorm2d, SyncBatchNorm])
def test_batch_norm_of_a_single_value_uses_stored_statistics(make: type[nn.BatchNorm2d]) -> None:
    norm = make(2).double()
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(torch.tensor([1.0, -2.0]))
    norm.running_var.copy_(torch.tensor([4.0, 9.0]))
    x = torch.tensor([3.0, 4.0], dtype=torch.float64).reshape(1, 2, 1, 1)
    # (3 - 1) / 2 and (4 + 2) / 3, eps aside.
    expected = torch.tensor([1.0, 2.0], dtype=torch.float64).reshape(1, 2, 1, 1)
    torch.testing.assert_close(normalize(norm.train(), x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(normalize(norm.eval(), x), expected, rtol=1e-5, atol=1e-5)
    assert norm.running_mean.tolist() == [1.0, -2.0]


def test_batch_norm_of_more_values_is_the_layer_itself() -> None:
    x = torch.randn(2, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(normalize(nn.BatchNorm2d(3), x), nn.BatchNorm2d(3)(x), rtol=0, atol=0)
    group = nn.GroupNorm(1, 3)
    torch.testing.assert_close(normalize(group, x[:1]), group(x[:1]), rtol=0, atol=0)


def test_a_batch_of_one_trains_on_maps_of_one_cell() -> None:
    shapes = (LevelShape(height=1, width=2, stride_px=8), LevelShape(height=1, width=1, stride_px=16))
    working = head().train()
    losses = working.loss(working(levels(shapes=shapes)), [target((0.0, 0.0, 8.0, 8.0))])
    torch.stack(list(losses.values())).sum().backward()
    assert all(parameter.grad is not None for parameter in working.parameters())


# --------------------------------------------------------------------------------------------------------------- losses


def test_losses_without_boxes_by_hand() -> None:
    losses = head().loss(silent(), [target()])
    assert losses["objectness"].item() == pytest.approx(NUM_CELLS * math.log(2))
    assert losses["classification"].item() == 0
    assert losses["box"].item() == 0


def test_losses_of_a_box_by_hand() -> None:
    # The box (10, 10, 22, 22). Level 0's cell (1, 1) has its middle at (12, 12) and its square, 4 to 12 both ways,
    # shares 2 x 2 with the box: IoU 4 / (64 + 144 - 4) = 1/51. Cells (2, 1) and (1, 2): squares from 12 to 20 and from
    # 4 to 12: 8 x 2 = 16, 16 / 192 = 1/12. Cell (2, 2), middle (20, 20): 12 to 20 both ways, inside: 64 / 144 = 4/9.
    # Level 1: the cells' middles (8, 8), (24, 8), (8, 24), (24, 24) lie outside but within 40 px of the box's (16, 16);
    # squares of 16: of (0, 0) none beyond (8, 8); of (1, 0) x 8 to 24, y -8 to 8: none; so is (0, 1); of (1, 1) 8 to 24
    # both ways: all 144, 144 / 256 = 9/16, but its middle (24, 24) lies outside the box.
    # Ten best overlaps: 1/51 + 2/12 + 4/9 + 9/16 and a few of the cells around: with squares 12 to 20 by 20 to 28 (and
    # its mirror) 8 x 2 / 192 = 1/12 each, 20 to 28 both ways 4 / 204, 4 to 12 by 20 to 28 (twice) 4 / 204: in all
    # 4/9 + 9/16 + 4/12 + 4/51 = 1.42: one, and the cheapest inside the centre is (2, 2).
    # The scores are all the root of 1/4: equal for all. IoU 4/9.
    overlap = 4 / 9
    losses = head().loss(silent(), [target((10.0, 10.0, 22.0, 22.0))])
    assert losses["box"].item() == pytest.approx(5 * (1 - overlap**2))
    # Binary cross-entropy of a logit 0 is ln 2 for any truth.
    assert losses["classification"].item() == pytest.approx(math.log(2))
    assert losses["objectness"].item() == pytest.approx(NUM_CELLS * math.log(2))
    assert set(losses) == {"classification", "box", "objectness"}


def test_classes_are_taught_their_overlap() -> None:
    # Of three classes, label 2 at the cell above: truth (0, 0, 4/9) against logits (0, 1, 2).
    found = silent(num_classes=3)
    for label in range(3):
        found.classes[0][0, label, 2, 2] = float(label)
    losses = head(num_classes=3).loss(found, [target((10.0, 10.0, 22.0, 22.0), labels=[2])])
    # softplus(z) - t z.
    expected = math.log(2) + math.log1p(math.e) + math.log1p(math.e**2) - 4 / 9 * 2
    assert losses["classification"].item() == pytest.approx(expected)


def test_raw_boxes_can_be_taught_too() -> None:
    # From the corner (16, 16) of cell (2, 2) to the box's middle (16, 16): 0 strides; 12 px are 1.5 strides: ln 1.5.
    losses = head(l1_weight=1.0).loss(silent(), [target((10.0, 10.0, 22.0, 22.0))])
    assert losses["l1"].item() == pytest.approx(2 * math.log(1.5))


def test_losses_are_divided_by_the_positives() -> None:
    one = head().loss(silent(), [target((10.0, 10.0, 22.0, 22.0))])
    two = head().loss(silent(num_images=2), [target((10.0, 10.0, 22.0, 22.0))] * 2)
    for name, loss in one.items():
        assert two[name].item() == pytest.approx(loss.item())


def test_ignore_regions_take_no_part() -> None:
    # x, y under 16: four cells of level 0, one of level 1.
    losses = head().loss(silent(), [target(ignore=((0.0, 0.0, 16.0, 16.0),))])
    assert losses["objectness"].item() == pytest.approx((NUM_CELLS - 5) * math.log(2))


def test_the_matcher_is_a_part() -> None:
    # With a radius of 0.01 strides no cell is central: none is in both, and the cheapest in the box is taken all the
    # same: of the four whose middles lie in it (12 and 20) the one of IoU 4/9.
    far = head(matcher=SimOTAMatcher(centre_radius=0.01)).loss(silent(), [target((10.0, 10.0, 22.0, 22.0))])
    assert far["box"].item() == pytest.approx(5 * (1 - (4 / 9) ** 2))


# --------------------------------------------------------------------------------------------------------------- decode


def test_decode_by_hand() -> None:
    # Cell (column 1, row 2) of level 1... has rows 0 and 1 alone: cell (1, 0) of level 1, corner (16, 0), stride 16:
    # moved by (-0.25, 0.75) strides to (12, 12), e^0 = 1 stride wide (16), e^ln 0.5 high (8).
    found = silent(num_classes=2)
    found.classes[1][0, 1, 0, 1] = 3.0
    found.quality[1][0, 0, 0, 1] = 1.0
    for index, value in enumerate((-0.25, 0.75, 0.0, math.log(0.5))):
        found.boxes[1][0, index, 0, 1] = value
    (best,) = head(num_classes=2).decode(found, per_level=1, score_threshold=0.3)
    torch.testing.assert_close(best.boxes_xyxy, torch.tensor([[4.0, 8.0, 20.0, 16.0]], dtype=torch.float64))
    expected = 1 / (1 + math.exp(-3)) / (1 + math.exp(-1))
    assert best.scores.tolist() == pytest.approx([expected])
    assert best.labels.tolist() == [1]
    assert best.level.tolist() == [1]


def test_a_box_far_too_wide_stays_a_number() -> None:
    found = silent()
    found.boxes[0][0, 2:] = 1000.0
    (candidates,) = head().decode(found, per_level=None, score_threshold=0.0)
    assert candidates.boxes_xyxy.isfinite().all()
    losses = head().loss(found, [target((10.0, 10.0, 22.0, 22.0))])
    assert all(loss.isfinite() for loss in losses.values())


# ------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("num_classes", [1, 3])
def test_it_learns_a_picture(num_classes: int) -> None:
    working = head(num_classes=num_classes, num_convs=1).train()
    optimizer = torch.optim.Adam(working.parameters(), lr=0.02)
    box = (10.0, 10.0, 22.0, 22.0)
    pyramid, truth = levels(), [target(box, labels=[num_classes - 1])]
    for _ in range(150):
        losses = working.loss(working(pyramid), truth)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
    with torch.no_grad():
        (found,) = working.decode(working(pyramid), per_level=None, score_threshold=0.0)
    best = found.scores.argmax()
    assert found.labels[best] == num_classes - 1
    assert (found.boxes_xyxy[best] - torch.tensor(box)).abs().max() < 2
