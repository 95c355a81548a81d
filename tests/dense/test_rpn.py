"""The region proposal network: order of its maps, matching, losses and decoding, worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rcnn.boxes.coding import DeltaCoder
from rcnn.dense.contract import assert_is_dense_head
from rcnn.dense.interface import DensePrediction
from rcnn.dense.rpn import RPNHead
from rcnn.matching.sampling import EverySampler
from rcnn.priors import AnchorGenerator
from rcnn.records import Levels, LevelShape, Size, Target

# Two levels, 2x3 cells of 16 px and 1x2 of 32 px, an upright and a lying anchor each.
SHAPES = (LevelShape(height=2, width=3, stride_px=16), LevelShape(height=1, width=2, stride_px=32))
ANCHORS = AnchorGenerator(sizes_px=((16.0,), (32.0,)), heights_over_widths=(4.0, 0.25))
SIZE = Size(height=32, width=48)
CHANNELS = 3


def levels(num_images: int = 1, dtype: torch.dtype = torch.float32) -> Levels:
    generator = torch.Generator().manual_seed(0)
    return Levels(
        maps=tuple(
            torch.randn(num_images, CHANNELS, shape.height, shape.width, generator=generator, dtype=dtype)
            for shape in SHAPES
        ),
        shapes=SHAPES,
        padded_size=SIZE,
        image_sizes=(SIZE,) * num_images,
        image_scales=(1.0,) * num_images,
        num_roi_levels=2,
    )


def head(**choices: object) -> RPNHead:
    torch.manual_seed(0)
    return RPNHead(in_channels=CHANNELS, anchors=ANCHORS, **choices)  # type: ignore[arg-type]


def target(*boxes: tuple[float, float, float, float], labels: list[int] | None = None) -> Target:
    return Target(
        boxes_xyxy=torch.tensor(boxes).reshape(-1, 4),
        labels=torch.tensor(labels or [0] * len(boxes), dtype=torch.int64),
    )


def prediction(class_maps: list[Tensor], box_maps: list[Tensor]) -> DensePrediction:
    return DensePrediction(classes=tuple(class_maps), boxes=tuple(box_maps), levels=levels(len(class_maps[0])))


def silent(num_images: int = 1, num_classes: int = 1) -> tuple[list[Tensor], list[Tensor]]:
    """Logits and deltas of zero everywhere: 12 + 4 anchors, each with a score of one half and its own box."""
    sizes = [(num_images, 2, shape.height, shape.width) for shape in SHAPES]
    return (
        [torch.zeros(n, a * num_classes, h, w) for n, a, h, w in sizes],
        [torch.zeros(n, a * 4, h, w) for n, a, h, w in sizes],
    )


# ----------------------------------------------------------------------------------------------------------------- maps


@pytest.mark.parametrize("num_classes", [1, 3])
def test_shapes_of_the_maps(num_classes: int) -> None:
    found = head(num_classes=num_classes)(levels(2))
    assert [tuple(x.shape) for x in found.classes] == [(2, 2 * num_classes, 2, 3), (2, 2 * num_classes, 1, 2)]
    assert [tuple(x.shape) for x in found.boxes] == [(2, 8, 2, 3), (2, 8, 1, 2)]


def test_the_start_is_detectrons() -> None:
    """Normal with deviation 0.01, biases 0: every score starts near one half."""
    tower = RPNHead(in_channels=64, anchors=ANCHORS, num_convs=2).tower
    for name, parameter in tower.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        else:
            assert parameter.std().item() == pytest.approx(0.01, rel=0.15)
    assert len(tower.convs) == 2


def test_decode_follows_the_order_of_the_anchors() -> None:
    """One lying anchor of one cell is made to stand out: level 0, row 1, column 2, anchor 1."""
    classes, deltas = silent()
    classes[0][0, 1, 1, 2] = 5.0
    deltas[0][0, 4:8, 1, 2] = torch.tensor([0.25, 0.0, 0.0, 0.0])  # moved by a quarter of its width
    (found,) = head().decode(prediction(classes, deltas), per_level=1, score_threshold=0.0)
    # Centred at x = 2 * 16, y = 16: 32 wide, 8 high, moved by 8 to (40, 16), clipped at 48.
    assert found.boxes_xyxy[0].tolist() == [24, 12, 48, 20]
    assert found.scores.tolist() == [pytest.approx(1 / (1 + math.exp(-5))), 0.5]
    assert found.level.tolist() == [0, 1]


def test_the_best_of_each_level() -> None:
    classes, deltas = silent()
    classes[0][0, 0] = torch.tensor([[0.0, 1, 2], [3, 4, 5]])
    (found,) = head().decode(prediction(classes, deltas), per_level=3, score_threshold=0.0)
    assert found.level.tolist() == [0, 0, 0, 1, 1, 1]
    torch.testing.assert_close(found.scores[:3], torch.tensor([5.0, 4, 3]).sigmoid())
    (every,) = head().decode(prediction(classes, deltas), per_level=None, score_threshold=0.0)
    assert len(every.scores) == 16


def test_several_classes() -> None:
    classes, deltas = silent(num_classes=3)
    classes[1][0, 3 * 1 + 2, 0, 1] = 2.0  # anchor 1, class 2 of the last cell
    (found,) = head(num_classes=3).decode(prediction(classes, deltas), per_level=1, score_threshold=0.6)
    assert found.labels.tolist() == [2]
    # Centred at (32, 0), 64 wide and 16 high, in a picture of 48 x 32.
    assert found.boxes_xyxy.tolist() == [[0, 0, 48, 8]]


def test_a_score_at_the_threshold_stays() -> None:
    # Every score is one half.
    (found,) = head().decode(prediction(*silent()), per_level=4, score_threshold=0.5)
    assert len(found.scores) == 8
    (none,) = head().decode(prediction(*silent()), per_level=4, score_threshold=0.51)
    assert len(none.scores) == 0


def test_logits_that_are_no_numbers_are_left_out() -> None:
    classes, deltas = silent()
    classes[0][0, 0, 0, 0] = math.nan
    (found,) = head().decode(prediction(classes, deltas), per_level=20, score_threshold=0.0)
    assert len(found.scores) == 15
    assert found.scores.isfinite().all()


# ------------------------------------------------------------------------------------------------------------- matching


def test_anchors_over_the_edge() -> None:
    # Upright 8 x 32 and lying 32 x 8 at (0, 0), (16, 0), (32, 0), (0, 16), ...: upright ones at y = 16 with x >= 4
    # reach from 0 to 32 and lie inside, x = 16 and 32; lying ones at y = 16 inside for x = 16 and 32 (0..32, 16..48).
    flat = head(border_px=0.0)
    found = flat.match(torch.cat(flat.make_anchors(prediction(*silent()))), target(), SIZE)
    assert found.negative.nonzero().flatten().tolist() == [8, 9, 10, 11]
    assert not found.positive.any()


def test_a_box_claims_an_anchor_that_may_be_used() -> None:
    """Its best anchor of all, centred at (0, 16), reaches over the edge: the best inside is another."""
    truth = target((0.0, 0.0, 8.0, 32.0))
    anchors = torch.cat(head().make_anchors(prediction(*silent())))
    # IoU with the upright one at x = 0 (-4..4): 4 * 32 of 12 * 32 = 1/3. Inside, at (16, 16), the upright one
    # (12..20) shares nothing, the lying one (0..32 x 12..20) 8 * 8 of 256 + 256 - 64: 1/7.
    assert head().match(anchors, truth, SIZE).positive.nonzero().flatten().tolist() == [6]
    assert head(border_px=0.0).match(anchors, truth, SIZE).positive.nonzero().flatten().tolist() == [9]


def test_cells_beyond_the_picture() -> None:
    """In a batch of 32 x 48 a picture of 20 x 10, rounded up to 16: 32 x 16. It has the first column of the first level
    (cells 0 and 3, anchors 0, 1, 6 and 7) and the first cell of the second (12 and 13)."""
    one = head(size_divisor_px=16)
    anchors = torch.cat(one.make_anchors(prediction(*silent())))
    found = one.match(anchors, target(), Size(height=20, width=10), SHAPES)
    assert found.negative.nonzero().flatten().tolist() == [0, 1, 6, 7, 12, 13]
    both = head(size_divisor_px=16, border_px=0.0)
    assert not both.match(anchors, target(), Size(height=20, width=10), SHAPES).negative.any()


# --------------------------------------------------------------------------------------------------------------- losses


def test_losses_by_hand() -> None:
    """All anchors sampled, logits 0: ln 2 for each. One positive, whose box is a fourth of its width to the right."""
    truth = target((14.0, 0.0, 22.0, 32.0))  # the upright anchor at (16, 16), 12..20, moved by 2 of 8
    one = head(sampler=EverySampler())
    found = one.loss(prediction(*silent()), [truth])
    matches = one.match(torch.cat(one.make_anchors(prediction(*silent()))), truth, SIZE)
    count = int(matches.positive.sum() + matches.negative.sum())
    assert int(matches.positive.sum()) == 1
    assert found["classification"].item() == pytest.approx(math.log(2))
    # Smooth L1, bend at 1/9: 0.25 - 1/18 for dx, 0 for the others, over the number of sampled anchors.
    assert found["box"].item() == pytest.approx((0.25 - 1 / 18) / count)


def test_losses_of_several_classes() -> None:
    truth = target((12.0, 0.0, 20.0, 32.0), labels=[2])
    classes, deltas = silent(num_classes=3)
    classes[0][0, 2, 1, 1] = 1.0  # the positive anchor's logit of its class
    one = head(num_classes=3, sampler=EverySampler())
    found = one.loss(prediction(classes, deltas), [truth])
    matches = one.match(torch.cat(one.make_anchors(prediction(classes, deltas))), truth, SIZE)
    count = int(matches.positive.sum() + matches.negative.sum())
    # Three terms for each anchor, ln 2 but for the one: ln(1 + e^-1).
    expected = ((3 * count - 1) * math.log(2) + math.log(1 + math.exp(-1))) / count
    assert found["classification"].item() == pytest.approx(expected)


def test_losses_are_shared_by_the_batch() -> None:
    """Divided by the sampled anchors of all pictures, not a mean of means."""
    truths = [target((12.0, 0.0, 20.0, 32.0)), target()]
    one = head(sampler=EverySampler())
    both = one.loss(one(levels(2)), truths)
    assert set(both) == {"classification", "box"}
    assert all(value.ndim == 0 and value.isfinite() for value in both.values())


@pytest.mark.parametrize(("count", "divisor"), [("sampled", 32), ("at_least_one_positive", 34), (10, 20)])
def test_what_the_losses_are_divided_by(count: str | int, divisor: int) -> None:
    """Two pictures without boxes, all of whose 16 anchors are sampled: ln 2 for each."""
    one = head(sampler=EverySampler(), loss_count=count)
    found = one.loss(prediction(*silent(num_images=2)), [target(), target()])
    assert found["classification"].item() == pytest.approx(32 * math.log(2) / divisor)


@pytest.mark.parametrize("truth", [target(), target((3.0, 3.0, 3.0, 9.0))])
def test_gradients_without_a_positive(truth: Target) -> None:
    one = head()
    losses = one.loss(one(levels()), [truth])
    assert losses["box"].item() == 0
    torch.stack(list(losses.values())).sum().backward()
    for name, parameter in one.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all()


def test_a_loss_that_is_no_number_is_seen() -> None:
    classes, deltas = silent()
    classes[0][:] = math.nan
    losses = head(sampler=EverySampler()).loss(prediction(classes, deltas), [target()])
    assert losses["classification"].isnan()


def test_half_precision_maps_are_decoded_in_float32() -> None:
    """A coordinate near 1000 has steps of 4 px in bfloat16."""
    classes, deltas = silent()
    half = prediction([x.bfloat16() for x in classes], [x.bfloat16() for x in deltas])
    one = head(coder=DeltaCoder())
    (found,) = one.decode(half, per_level=4, score_threshold=0.0)
    assert found.boxes_xyxy.dtype == found.scores.dtype == torch.float32
    losses = one.loss(half, [target((14.0, 0.0, 22.0, 32.0))])
    assert {value.dtype for value in losses.values()} == {torch.float32}


# -------------------------------------------------------------------------------------------------------------- softmax


def test_scores_of_a_softmax() -> None:
    classes, deltas = silent(num_classes=2)  # a class and, last, background
    classes[0][0, 2 * 1, 1, 2] = 3.0  # anchor 1 of cell (1, 2): its class
    classes[0][0, 2 * 0 + 1, 0, 0] = 2.0  # anchor 0 of the first cell: background
    (found,) = head(objectness="softmax").decode(prediction(classes, deltas), per_level=None, score_threshold=0.0)
    # One score per anchor, 12 and 4: e^3 / (e^3 + 1), halves, and at the end of its level 1 / (1 + e^2).
    assert found.scores[:12].tolist() == pytest.approx([1 / (1 + math.exp(-3)), *[0.5] * 10, 1 / (1 + math.exp(2))])
    assert found.boxes_xyxy[0].tolist() == [16, 12, 48, 20]
    assert not found.labels.any()


def test_several_classes_share_a_softmax() -> None:
    classes, deltas = silent(num_classes=4)
    classes[1][0, 4 * 1 + 2, 0, 1] = math.log(3)  # anchor 1, class 2 of the last cell: 3 / (3 + 3)
    found = head(num_classes=3, objectness="softmax").decode(
        prediction(classes, deltas), per_level=1, score_threshold=0.4
    )
    assert found[0].scores.tolist() == pytest.approx([0.5])
    assert found[0].labels.tolist() == [2]


def test_losses_of_a_softmax() -> None:
    truth = target((12.0, 0.0, 20.0, 32.0))
    classes, deltas = silent(num_classes=2)
    classes[0][0, 1, 1, 1] = 1.0  # background of the positive anchor, 0 at (1, 1)
    one = head(objectness="softmax", sampler=EverySampler())
    found = one.loss(prediction(classes, deltas), [truth])
    matches = one.match(torch.cat(one.make_anchors(prediction(classes, deltas))), truth, SIZE)
    count = int(matches.positive.sum() + matches.negative.sum())
    # ln 2 for each but the one: ln(1 + e).
    assert found["classification"].item() == pytest.approx(((count - 1) * math.log(2) + math.log(1 + math.e)) / count)


@pytest.mark.parametrize("choices", [{"objectness": "softmax"}, {"num_convs": 2, "size_divisor_px": 32}])
def test_the_contract(choices: dict[str, object]) -> None:
    def make(num_classes: int) -> RPNHead:
        return head(num_classes=num_classes, **choices)

    assert_is_dense_head(make, in_channels=CHANNELS, strides_px=(16, 32))
