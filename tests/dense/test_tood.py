"""The TOOD head: each step recomputed another way, losses in loops, the batches that it matches as ATSS does, and the
contract. No peer's run is recorded; the rules are those of MMDetection's `TOODHead`.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from rcnn.dense.contract import assert_is_dense_head
from rcnn.dense.interface import DensePrediction
from rcnn.dense.tood import TaskDecomposition, TOODHead, geometric_mean_logit, read_shifted
from rcnn.dense.towers import group_norm
from rcnn.ops.preparation import prepare_for_inference
from rcnn.records import Levels, LevelShape, Size, Target

STRIDES = (8, 16)
CHANNELS = 4
SIZE = Size(64, 96)


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


def head(num_classes: int = 3, strides: tuple[int, ...] = STRIDES, initial_batches: int = 0) -> TOODHead:
    torch.manual_seed(0)
    return TOODHead(
        in_channels=CHANNELS,
        num_classes=num_classes,
        strides_px=strides,
        channels=16,
        num_convs=2,
        anchor_scale=2.0,
        initial_batches=initial_batches,
    )


def livelier(one: TOODHead) -> TOODHead:
    """In float64, with scores and boxes that differ from cell to cell."""
    with torch.no_grad():
        for layer in (one.tower.classes, one.tower.distances, one.tower.fit[-1], one.tower.shifts[-1]):
            layer.weight.mul_(100)  # type: ignore[operator, union-attr]
        one.tower.classes.bias.fill_(1.0)  # type: ignore[union-attr]
        one.tower.fit[-1].bias.fill_(1.0)  # type: ignore[operator, union-attr]
    return one.double()


def target(*boxes: tuple[float, ...], labels: list[int] | None = None) -> Target:
    return Target(
        boxes_xyxy=torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4),
        labels=torch.tensor(labels or [0] * len(boxes), dtype=torch.int64),
        ignore_xyxy=torch.zeros(0, 4, dtype=torch.float64),
    )


TRUTHS = [target((10.0, 10.0, 40.0, 50.0), (60.0, 5.0, 90.0, 30.0), labels=[2, 0]), target()]


@pytest.mark.parametrize("initial_batches", [0, 10**6])
def test_the_contract_in_both_roles(initial_batches: int) -> None:
    strides = (8, 16, 32)
    assert_is_dense_head(
        lambda num_classes: head(num_classes, strides, initial_batches), in_channels=CHANNELS, strides_px=strides
    )


# ----------------------------------------------------------------------------------------------------------------- maps


def test_maps_and_start() -> None:
    torch.manual_seed(0)
    one = TOODHead(in_channels=CHANNELS, num_classes=3, strides_px=STRIDES)
    assert len(one.tower.layers) == 6
    # MMDetection's `la_down_rate` of 48 of 6 * 256 channels.
    assert one.tower.class_features.attention[0].weight.shape == (32, 6 * 256, 1, 1)  # type: ignore[union-attr]
    for bias in (one.tower.classes.bias, one.tower.fit[-1].bias):
        torch.testing.assert_close(bias, torch.full_like(bias, -math.log(99)))  # type: ignore[arg-type]
    found = one(levels(dtype=torch.float32))
    assert [tuple(x.shape) for x in found.classes] == [(1, 3, 8, 12), (1, 3, 4, 6)]
    assert [tuple(x.shape) for x in found.boxes] == [(1, 4, 8, 12), (1, 4, 4, 6)]
    assert not found.quality
    # The root of about 0.01 * 0.01.
    torch.testing.assert_close(found.classes[0].sigmoid(), torch.full((1, 3, 8, 12), 0.01), rtol=1.0, atol=0)


def test_decomposition_is_a_convolution_of_weighted_maps() -> None:
    torch.manual_seed(0)
    part = TaskDecomposition(channels=16, num_maps=3, make_norm=group_norm).double()
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.normal_()
    stacked = torch.randn(2, 48, 5, 7, dtype=torch.float64)
    mean = stacked.mean(dim=(2, 3), keepdim=True)
    share = part.attention(mean)
    weighted = torch.cat([some * share[:, i : i + 1] for i, some in enumerate(stacked.split(16, dim=1))], dim=1)
    expected = F.relu(part.norm(F.conv2d(weighted, part.weight[:, :, None, None])))
    torch.testing.assert_close(part(stacked, mean), expected)


def test_scores_are_geometric_means() -> None:
    a, b = torch.linspace(-8, 8, 9, dtype=torch.float64)[:, None], torch.linspace(-6, 6, 7, dtype=torch.float64)
    found = geometric_mean_logit(a, b).sigmoid()
    torch.testing.assert_close(found, (a.sigmoid() * b.sigmoid()).sqrt())


def test_scores_near_certainty() -> None:
    """1 - sqrt((1 - e)(1 - e)) is e: two logits of 30 make one of 30, which a probability in float32 cannot say."""
    logits = torch.tensor([30.0, -30.0, 200.0, -200.0], requires_grad=True)
    found = geometric_mean_logit(logits, logits)
    torch.testing.assert_close(found[:2], torch.tensor([30.0, -30.0]))
    found.sum().backward()
    assert found.isfinite().all()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_each_side_is_read_where_its_shift_points() -> None:
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(1, 2, 4, 5, generator=generator, dtype=torch.float64)
    boxes = torch.cat((low, low + 2), dim=1)
    shifts = 3 * torch.rand(1, 8, 4, 5, generator=generator, dtype=torch.float64) - 1.5
    found = read_shifted(boxes, shifts)

    def value(side: int, y: int, x: int) -> float:
        return boxes[0, side, y, x].item() if 0 <= y < 4 and 0 <= x < 5 else 0.0

    crossed = 0
    for row in range(4):
        for column in range(5):
            sides = []
            for side in range(4):
                y, x = (
                    row + shifts[0, 2 * side, row, column].item(),
                    column + shifts[0, 2 * side + 1, row, column].item(),
                )
                top, left = math.floor(y), math.floor(x)
                dy, dx = y - top, x - left
                upper = (1 - dx) * value(side, top, left) + dx * value(side, top, left + 1)
                lower = (1 - dx) * value(side, top + 1, left) + dx * value(side, top + 1, left + 1)
                sides.append((1 - dy) * upper + dy * lower)
            if sides[0] > sides[2] or sides[1] > sides[3]:
                crossed += 1
                sides = boxes[0, :, row, column].tolist()
            assert found[0, :, row, column].tolist() == pytest.approx(sides)
    assert 0 < crossed < 20


def test_boxes_without_a_shift() -> None:
    """Distances of 1, 2, 3 and 0.5 strides around the cell's corner; the scale of a level multiplies them."""
    one = head().double()
    with torch.no_grad():
        for parameter in one.tower.shifts.parameters():
            parameter.zero_()
        one.tower.distances.weight.zero_()
        one.tower.distances.bias.copy_(torch.tensor([1.0, 2.0, 3.0, 0.5]).log())  # type: ignore[union-attr]
        one.tower.scales[1].scale.fill_(0.5)  # type: ignore[operator, union-attr]
    found = one(levels())
    expected = torch.tensor([40.0 - 8, 16 - 16, 40 + 24, 16 + 4], dtype=torch.float64)
    torch.testing.assert_close(found.boxes[0][0, :, 2, 5], expected)
    expected = torch.tensor([48.0 - 8, 32 - 16, 48 + 24, 32 + 4], dtype=torch.float64)
    torch.testing.assert_close(found.boxes[1][0, :, 2, 3], expected)


def test_decode_by_hand() -> None:
    on = levels()
    prediction = DensePrediction(
        classes=tuple(x.new_zeros(1, 3, *x.shape[2:]) for x in on.maps),
        boxes=tuple(x.new_zeros(1, 4, *x.shape[2:]) for x in on.maps),
        levels=on,
    )
    prediction.classes[1][0, 1, 2, 3] = 1.0
    prediction.boxes[1][0, :, 2, 3] = torch.tensor([-3.0, 10.0, 50.0, 70.0])
    (found,) = head().decode(prediction, per_level=1, score_threshold=0.6)
    assert found.labels.tolist() == [1]
    assert found.level.tolist() == [1]
    assert found.scores.item() == pytest.approx(1 / (1 + math.exp(-1)))
    assert found.boxes_xyxy.tolist() == [[0, 10, 50, 64]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prepared_for_inference(dtype: torch.dtype) -> None:
    on = levels(dtype=torch.float32)
    one = head().eval()
    with torch.no_grad():
        plain = one(on)
        one.tower = prepare_for_inference(one.tower, dtype=dtype)  # type: ignore[assignment]
        prepared = one(on)
    tolerance = 1e-4 if dtype == torch.float32 else 0.5
    for mine, other in zip((*plain.classes, *plain.boxes), (*prepared.classes, *prepared.boxes), strict=True):
        assert other.dtype == torch.float32
        torch.testing.assert_close(mine, other, rtol=0, atol=tolerance)


# --------------------------------------------------------------------------------------------------------------- losses


def flat(maps: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([x.flatten(2) for x in maps], dim=2).transpose(1, 2)


def giou_loss(box: Tensor, truth: Tensor) -> float:
    return torchvision.ops.generalized_box_iou_loss(box[None], truth[None], reduction="sum").item()


def near_the_truth(noise_px: float) -> DensePrediction:
    """Two pictures, every cell with one of the boxes of the first, moved by some noise, and with random scores."""
    on = levels(2)
    generator = torch.Generator().manual_seed(3)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    boxes = []
    for shape in on.shapes:
        turn = torch.arange(shape.height * shape.width).view(shape.height, shape.width) % 2
        truth = TRUTHS[0].boxes_xyxy[turn].permute(2, 0, 1)
        low, high = (truth + noise_px * noise(2, 4, shape.height, shape.width)).chunk(2, dim=1)
        boxes.append(torch.cat((torch.minimum(low, high), torch.maximum(low, high)), dim=1))
    classes = tuple(noise(2, 3, shape.height, shape.width) for shape in on.shapes)
    return DensePrediction(classes=classes, boxes=tuple(boxes), levels=on)


# Boxes so near that the alignments sum to more than 1, and so far off that they count as 1.
@pytest.mark.parametrize(("noise_px", "above_one"), [(3.0, True), (60.0, False)])
def test_aligned_losses_against_the_rule_in_loops(noise_px: float, above_one: bool) -> None:
    one = head()
    prediction = near_the_truth(noise_px)
    scores, boxes = flat(prediction.classes).sigmoid(), flat(prediction.boxes)
    points = torch.tensor(
        [
            (x * s.stride_px, y * s.stride_px)
            for s in prediction.levels.shapes
            for y in range(s.height)
            for x in range(s.width)
        ],
        dtype=torch.float64,
    )
    # The matcher has tests of its own.
    found = [
        one.matcher(points_xy=points, boxes_xyxy=boxes[n].detach(), scores=scores[n].detach(), target=truth)
        for n, truth in enumerate(TRUTHS)
    ]
    assert found[0].matches.positive.any()
    assert not found[1].matches.positive.any()
    classes = box = total = 0.0
    for n, truth in enumerate(TRUTHS):
        for prior in range(len(points)):
            quality, wanted = found[n].quality[prior].item(), [0.0] * 3
            if found[n].matches.positive[prior]:
                gt = found[n].matches.gt_index[prior]
                wanted[int(truth.labels[gt])] = quality
                box += quality * giou_loss(boxes[n, prior], truth.boxes_xyxy[gt])
                total += quality
            for label, value in enumerate(wanted):
                p = scores[n, prior, label].item()
                entropy = -value * math.log(p) - (1 - value) * math.log1p(-p)
                classes += abs(value - p) ** 2 * entropy
    assert (total > 1) == above_one
    total = max(total, 1.0)
    losses = one.loss(prediction, TRUTHS)
    assert losses.keys() == {"classification", "box"}
    assert losses["classification"].item() == pytest.approx(classes / total)
    assert losses["box"].item() == pytest.approx(2 * box / total, rel=1e-6)


def test_initial_losses_against_the_rule_in_loops() -> None:
    one = livelier(head(initial_batches=1))
    prediction = one(levels(2))
    scores, boxes = flat(prediction.classes).sigmoid(), flat(prediction.boxes)
    anchors = one.anchors(prediction.levels.shapes, SIZE, dtype=torch.float64, device=torch.device("cpu"))
    matches = one.initial_matcher(anchors, TRUTHS[0])
    classes = box = total = 0.0
    for n in range(2):
        for prior, anchor in enumerate(torch.cat(anchors)):
            wanted = [0.0] * 3
            if n == 0 and matches.positive[prior]:
                truth = TRUTHS[0].boxes_xyxy[matches.gt_index[prior]]
                wanted[int(TRUTHS[0].labels[matches.gt_index[prior]])] = 1.0
                x, y = ((anchor[:2] + anchor[2:]) / 2).tolist()
                left, top, right, bottom = x - truth[0], y - truth[1], truth[2] - x, truth[3] - y
                centerness = (min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom)).sqrt().item()
                box += centerness * giou_loss(boxes[n, prior], truth)
                total += centerness
            for label, value in enumerate(wanted):
                p = scores[n, prior, label].item()
                classes += -0.25 * (1 - p) ** 2 * math.log(p) if value else -0.75 * p**2 * math.log1p(-p)
    count = int(matches.positive.sum())
    assert count > 1
    assert total > 1
    losses = one.loss(prediction, TRUTHS)
    assert losses["classification"].item() == pytest.approx(classes / count)
    assert losses["box"].item() == pytest.approx(2 * box / total, rel=1e-6)


def test_a_small_picture_learns_from_its_own_cells() -> None:
    """Of a batch of 64 x 96 a picture of 20 x 30 is 32 x 32 rounded up: nothing beyond has a gradient."""
    on = levels()
    on = Levels(
        maps=on.maps,
        shapes=on.shapes,
        padded_size=SIZE,
        image_sizes=(Size(20, 30),),
        image_scales=(1.0,),
        num_roi_levels=2,
    )
    for initial_batches in (0, 1):
        one = livelier(head(initial_batches=initial_batches))
        prediction = one(on)
        losses = one.loss(prediction, [target((2.0, 2.0, 25.0, 18.0))])
        (gradient,) = torch.autograd.grad(losses["classification"], prediction.classes[0])
        assert gradient[0, :, :4, :4].any(dim=0).all()
        assert not gradient[0, :, 4:].any()
        assert not gradient[0, :, :, 4:].any()


def test_initial_batches_are_counted_and_kept() -> None:
    one = livelier(head(initial_batches=2)).train()
    prediction = one(levels(2))
    aligned = livelier(head()).loss(prediction, TRUTHS)["classification"].item()

    def is_aligned() -> bool:
        return one.loss(prediction, TRUTHS)["classification"].item() == pytest.approx(aligned)

    # A loss that nothing is learnt from does not count.
    with torch.no_grad():
        assert not is_aligned()
    assert not one.eval().batches_seen
    assert not is_aligned()
    one.train()
    assert int(one.batches_seen) == 0
    assert not is_aligned()
    resumed = livelier(head(initial_batches=2))
    resumed.load_state_dict(one.state_dict())
    assert int(resumed.batches_seen) == 1
    assert [is_aligned(), is_aligned(), is_aligned()] == [False, True, True]
    assert int(one.batches_seen) == 2
    one.eval()
    assert is_aligned()


@pytest.mark.parametrize("shift", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_a_shift_that_went_astray_reads_no_memory_beyond_the_map(shift: float) -> None:
    """A training that diverged ended in a segmentation fault here."""
    boxes = torch.rand(1, 4, 40, 60) + torch.tensor([0.0, 0.0, 2.0, 2.0])[:, None, None]
    shifts = torch.zeros(1, 8, 40, 60)
    shifts[0, 2, 20, 30] = shift  # y of the top side of one cell
    found = read_shifted(boxes, shifts)
    if shift == 1e30:  # beyond the map lie zeros
        assert float(found[0, 1, 20, 30]) == 0
    else:
        assert bool(found[0, 1, 20, 30].isnan())
    others = torch.ones(4, 40, 60, dtype=torch.bool)
    others[:, 20, 30] = False
    torch.testing.assert_close(found[0][others], boxes[0][others])
