"""CenterNet's head: maps, losses and scores, worked by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from rcnn.dense.centernet import CenterNetHead
from rcnn.dense.interface import DensePrediction
from rcnn.records import Levels, LevelShape, Losses, Size, Target

# 12 x 8 cells of 8 px, 6 x 4 of 16 px.
SHAPES = (LevelShape(height=8, width=12, stride_px=8), LevelShape(height=4, width=6, stride_px=16))
SIZE = Size(height=64, width=96)
NUM_CELLS = 96 + 24
CHANNELS = 4
BOX = (12.0, 8.0, 72.0, 48.0)  # its centre (42, 28) lies in cell (5, 3) of level 0, which is for its size


def levels(num_images: int = 1, dtype: torch.dtype = torch.float64) -> Levels:
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


def head(**choices: object) -> CenterNetHead:
    torch.manual_seed(0)
    return CenterNetHead(in_channels=CHANNELS, strides_px=(8, 16), **choices).double()  # type: ignore[arg-type]


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


def prediction(
    *, logit: float = 0.0, distance: float = 2.0, num_classes: int = 1, num_images: int = 1
) -> DensePrediction:
    """The same everywhere, to be edited."""
    sizes = [(shape.height, shape.width) for shape in SHAPES]
    return DensePrediction(
        classes=tuple(torch.full((num_images, num_classes, *size), logit, dtype=torch.float64) for size in sizes),
        boxes=tuple(torch.full((num_images, 4, *size), distance, dtype=torch.float64) for size in sizes),
        levels=levels(num_images),
    )


# ----------------------------------------------------------------------------------------------------------------- maps


def test_shapes_and_start_of_the_maps() -> None:
    found = head(num_classes=3)(levels(2))
    assert [tuple(x.shape) for x in found.classes] == [(2, 3, 8, 12), (2, 3, 4, 6)]
    assert [tuple(x.shape) for x in found.boxes] == [(2, 4, 8, 12), (2, 4, 4, 6)]
    assert found.quality == ()
    # Weights of deviation 0.01: the maps start at their biases, a heat of 0.01 and distances of 8 strides.
    assert (found.classes[0].sigmoid() - 0.01).abs().max() < 0.005
    assert (found.boxes[0] - 8).abs().max() < 0.5


def test_layers_are_those_of_centernet2() -> None:
    # One tower of four 3x3 convolutions (with bias) and group norm, 3x3 outputs, a scale per level; two towers where
    # the heat map has classes.
    agnostic = {name: tuple(x.shape) for name, x in head().named_parameters()}
    convs = {name: shape for name, shape in agnostic.items() if len(shape) == 4}
    assert convs == {f"tower.layers.{i}.0.weight": (4, 4, 3, 3) for i in range(4)} | {
        "heat.weight": (1, 4, 3, 3),
        "distances.weight": (4, 4, 3, 3),
    }
    assert sum(name.startswith("scales.") for name in agnostic) == 2
    per_class = head(num_classes=3)
    assert per_class.heat_tower is not None
    assert head(heat_tower="own").heat_tower is not None
    assert head(num_classes=3, heat_tower="shared").heat_tower is None


# --------------------------------------------------------------------------------------------------------------- losses


def test_losses_without_boxes_by_hand() -> None:
    # Every cell scores 1/2: -(1/2)^2 ln(1/2) each, 120 cells, no peak (counted as one), weights 0.5 and 0.75.
    losses = head().loss(prediction(), [target()])
    assert losses["off_peak"].item() == pytest.approx(0.5 * 0.75 * NUM_CELLS * math.log(2) / 4)
    assert losses["peak"].item() == 0
    assert losses["box"].item() == 0


def test_heat_losses_of_a_box_by_hand() -> None:
    # The peak scores 1/2: (1/2)^2 ln 2, times 0.5 * 0.25. All other cells lose (1 - heat)^4 of theirs; the two cells
    # of the centre (one per level) have heat 1.
    losses = head().loss(prediction(), [target(BOX)])
    assert losses["peak"].item() == pytest.approx(0.5 * 0.25 * math.log(2) / 4)
    radius = 2 * 2400 / 81
    cold = 0.0
    for shape in SHAPES:
        for row in range(shape.height):
            for column in range(shape.width):
                x, y = (column + 0.5) * shape.stride_px, (row + 0.5) * shape.stride_px
                heat = math.exp(-((x - 42) ** 2 + (y - 28) ** 2) / radius)
                is_peak = (column, row) in ((5, 3),) if shape.stride_px == 8 else (column, row) == (2, 1)
                cold += (1 - (1 if is_peak else heat if heat >= 1e-4 else 0)) ** 4
    assert losses["off_peak"].item() == pytest.approx(0.5 * 0.75 * cold * math.log(2) / 4)


def test_losses_are_divided_by_the_peaks_of_the_batch() -> None:
    one = head().loss(prediction(), [target(BOX)])
    two = head().loss(prediction(num_images=2), [target(BOX), target(BOX)])
    for name, loss in one.items():
        assert two[name].item() == pytest.approx(loss.item())


def test_box_loss_by_hand() -> None:
    # Nine cells around (5, 3), their middles at x 36, 44, 52 and y 20, 28, 36; the box spans x 12 to 72, y 8 to 48: in
    # strides 7.5 x 5. All four distances are predicted as 2, a box of 4 x 4. The true ones are l = 3, 4, 5 and r = 4.5,
    # 3.5, 2.5, all over 2, and t = 1.5, 2.5, 3.5 and b = 3.5, 2.5, 1.5. Rows 2 and 4: shared height 1.5 + 2 = 3.5,
    # enclosing 7.5 x 5.5; row 3: shared 4, enclosing 7.5 x 5.
    def of_row(shared_height: float, enclosing_height: float) -> float:
        shared, enclosing = 4 * shared_height, 7.5 * enclosing_height
        union = 16 + 37.5 - shared
        return 1 - (shared + 1) / (union + 1) + (enclosing - union) / enclosing

    expected = (6 * of_row(3.5, 5.5) + 3 * of_row(4.0, 5.0)) / 9
    losses = head().loss(prediction(distance=2.0), [target(BOX)])
    assert losses["box"].item() == pytest.approx(expected)
    assert head(box_weight=2.0).loss(prediction(), [target(BOX)])["box"].item() == pytest.approx(2 * expected)


def test_box_weights_by_heat() -> None:
    # Only the cell of the centre is right; it weighs 1, the eight others their heat.
    found = prediction(distance=2.0)
    for side, distance in enumerate((4.0, 2.5, 3.5, 2.5)):
        found.boxes[0][0, side, 3, 5] = distance
    weighted = head(box_weights="heat").loss(found, [target(BOX)])["box"].item()
    equal = head().loss(found, [target(BOX)])["box"].item()
    radius = 2 * 2400 / 81
    heats = [math.exp(-((x - 42) ** 2 + (y - 28) ** 2) / radius) for x in (36, 44, 52) for y in (20, 28, 36)]
    others = sum(heats) - heats[4]
    assert 0 < weighted < equal
    assert weighted * (1 + others) < equal * 9


def test_negative_distances_count_as_none() -> None:
    found = head().loss(prediction(distance=-3.0), [target(BOX)])["box"]
    assert found.item() == pytest.approx(head().loss(prediction(distance=0.0), [target(BOX)])["box"].item())


def test_hot_cells_without_a_box_are_left_out() -> None:
    # A logit of 2 is a score of 0.881, of 1.7 0.846.
    found = prediction(logit=-20.0)
    found.classes[0][0, 0, 7, 11] = 2.0
    # Nothing but the clamp: a score of 1e-4 in all other cells.
    assert head().loss(found, [target()])["off_peak"].item() == pytest.approx(0.0, abs=1e-9)
    counted = head(ignore_above=None).loss(found, [target()])["off_peak"].item()
    score = 1 / (1 + math.exp(-2))
    assert counted == pytest.approx(-0.375 * math.log(1 - score) * score**2)
    found.classes[0][0, 0, 7, 11] = 1.7
    assert head().loss(found, [target()])["off_peak"].item() > 0.1


def test_ignore_regions_take_no_part() -> None:
    # Level 0: the middles 4 to 28 by 4, 12 (y up to 16) and x under 32: 4 x 2 cells; level 1: (8, 24) by 8: 2.
    losses = head().loss(prediction(), [target(ignore=((0.0, 0.0, 32.0, 16.0),))])
    assert losses["off_peak"].item() == pytest.approx(0.375 * (NUM_CELLS - 10) * math.log(2) / 4)


def test_only_the_class_of_the_box_has_a_peak() -> None:
    found = prediction(num_classes=2)
    per_class = head(num_classes=2).loss(found, [target(BOX, labels=[1])])
    alone = head().loss(prediction(), [target(BOX)])
    nothing = head().loss(prediction(), [target()])
    assert per_class["peak"].item() == pytest.approx(alone["peak"].item())
    assert per_class["off_peak"].item() == pytest.approx((alone["off_peak"] + nothing["off_peak"]).item())


# --------------------------------------------------------------------------------------------------------------- decode


def test_a_peak_is_its_box() -> None:
    found = prediction(logit=-4.0, distance=1.0)
    found.classes[0][0, 0, 3, 5] = 2.0
    found.classes[1][0, 0, 0, 0] = 0.0
    for side, distance in enumerate((4.0, 2.5, 3.5, 2.5)):  # of 8 px from (44, 28)
        found.boxes[0][0, side, 3, 5] = distance
    (best,) = head().decode(found, per_level=1, score_threshold=0.0)
    torch.testing.assert_close(best.boxes_xyxy[0], torch.tensor(BOX, dtype=torch.float64))
    # The root of the heat with one class, the heat with more.
    score = 1 / (1 + math.exp(-2))
    assert best.scores[0].item() == pytest.approx(math.sqrt(score))
    (plain,) = head(score="heat").decode(found, per_level=1, score_threshold=0.0)
    assert plain.scores[0].item() == pytest.approx(score)
    assert best.level.tolist() == [0, 1]
    # Level 1: 16 px around (8, 8), clipped.
    assert best.boxes_xyxy[1].tolist() == [0.0, 0.0, 24.0, 24.0]


def test_scores_of_classes_are_the_heat() -> None:
    found = prediction(num_classes=2)
    found.classes[1][0, 1, 2, 2] = 1.0
    (best,) = head(num_classes=2).decode(found, per_level=1, score_threshold=0.6)
    assert best.labels.tolist() == [1]
    assert best.scores.tolist() == pytest.approx([1 / (1 + math.exp(-1))])


def test_negative_distances_give_a_box_without_area() -> None:
    (found,) = head().decode(prediction(distance=-1.0), per_level=1, score_threshold=0.0)
    assert found.boxes_xyxy[0].tolist() == [4.0, 4.0, 4.0, 4.0]


# ------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("num_classes", [1, 3])
def test_it_learns_a_picture(num_classes: int) -> None:
    working = head(num_classes=num_classes, num_convs=1, make_norm=None)
    optimizer = torch.optim.Adam(working.parameters(), lr=0.02)
    pyramid, truth = levels(), [target(BOX, labels=[num_classes - 1])]
    history: list[float] = []
    for _ in range(120):
        losses: Losses = working.loss(working(pyramid), truth)
        total: Tensor = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        history.append(total.item())
    assert history[-1] < 0.5 * history[0]
    with torch.no_grad():
        (found,) = working.decode(working(pyramid), per_level=1, score_threshold=0.0)
    assert found.labels[0] == num_classes - 1
    assert (found.boxes_xyxy[0] - torch.tensor(BOX)).abs().max() < 4
