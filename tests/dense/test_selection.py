"""From raw maps to candidates: order, ranking, fusion with a quality map and thresholds, worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rcnn.dense.interface import Candidates, DensePrediction
from rcnn.dense.selection import CandidateSelector, ScoreFusion, per_prior
from rcnn.records import Levels, LevelShape, Size

# One row of three cells of 8 px, and one cell of 16 px; a point in the middle of each.
SHAPES = (LevelShape(height=1, width=3, stride_px=8), LevelShape(height=1, width=1, stride_px=16))
SIZE = Size(height=8, width=20)
POINTS = [torch.tensor([[4.0, 4], [12, 4], [20, 4]]), torch.tensor([[8.0, 8]])]


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def prediction(
    classes: list[list[list[float]]], quality: list[list[float]] | None = None, num_images: int = 1
) -> DensePrediction:
    """`classes[level][class][cell]` and `quality[level][cell]` are probabilities; each box reaches 3 px every way."""
    levels = Levels(
        maps=(),
        shapes=SHAPES,
        padded_size=SIZE,
        image_sizes=(SIZE,) * num_images,
        image_scales=(1.0,) * num_images,
        num_roi_levels=2,
    )

    def maps(values: list[list[float]]) -> Tensor:
        return torch.tensor([[[logit(p) for p in row]] for row in values])[None].expand(num_images, -1, -1, -1)

    return DensePrediction(
        classes=tuple(maps(of_level) for of_level in classes),
        boxes=tuple(torch.full((num_images, 4, shape.height, shape.width), 3.0) for shape in SHAPES),
        quality=tuple(maps([of_level]) for of_level in quality or ()),
        levels=levels,
    )


def around(raw: Tensor, points: Tensor, level: int) -> Tensor:
    return torch.cat((points - raw[:, :2], points + raw[:, 2:]), dim=1)


def select(given: DensePrediction, **choices: object) -> Candidates:
    options = {"per_level": 2, "score_threshold": 0.0} | {
        key: choices.pop(key) for key in ("per_level", "score_threshold") if key in choices
    }
    num_classes = given.classes[0].shape[1]
    selector = CandidateSelector(num_classes=num_classes, **choices)  # type: ignore[arg-type]
    (found,) = selector(given, POINTS, around, **options)  # type: ignore[arg-type]
    return found


TWO_CLASSES = [[[0.9, 0.2, 0.3], [0.1, 0.8, 0.4]], [[0.5], [0.6]]]


def test_maps_become_rows_in_the_order_of_the_priors() -> None:
    # Two priors of three numbers on 2 x 2 cells: row, column, prior, number.
    x = torch.arange(24.0).reshape(1, 6, 2, 2)
    rows = per_prior([x, x], 3)
    assert rows.shape == (1, 16, 3)
    assert rows[0, :3].tolist() == [[0, 4, 8], [12, 16, 20], [1, 5, 9]]
    torch.testing.assert_close(rows[:, :8], per_prior([x.contiguous(memory_format=torch.channels_last)], 3))


def test_pairs_of_prior_and_class_are_ranked_within_their_level() -> None:
    found = select(prediction(TWO_CLASSES))
    torch.testing.assert_close(found.scores, torch.tensor([0.9, 0.8, 0.6, 0.5]))
    assert found.labels.tolist() == [0, 1, 1, 0]
    assert found.level.tolist() == [0, 0, 1, 1]
    # Clipped to 20 x 8: the coarse point's box 5..11 x 5..11 at the lower edge.
    assert found.boxes_xyxy.tolist() == [[1, 1, 7, 7], [9, 1, 15, 7], [5, 5, 11, 8], [5, 5, 11, 8]]


def test_all_of_a_level() -> None:
    assert len(select(prediction(TWO_CLASSES), per_level=None).scores) == 8
    assert len(select(prediction(TWO_CLASSES), per_level=100).scores) == 8


def test_a_score_at_the_threshold_stays() -> None:
    given = prediction([[[0.5, 0.4, 0.7]], [[0.5]]])
    assert len(select(given, per_level=3, score_threshold=0.5).scores) == 3


def test_what_is_no_number_is_left_out() -> None:
    given = prediction([[[0.5, 0.4, 0.7]], [[0.5]]])
    given.classes[0][0, 0, 0, 2] = math.nan
    found = select(given, per_level=3)
    torch.testing.assert_close(found.scores, torch.tensor([0.5, 0.4, 0.5]))


QUALITY = [[0.5, 0.9, 1 - 1e-7], [0.5]]


@pytest.mark.parametrize(
    ("fusion", "scores", "cells"),
    [
        # Class scores .9 .8 .4 are ranked: the third cell is out, and the other two change places: .8 * .9, .9 * .5.
        ("rescore", [0.72, 0.45], [1, 0]),
        # .45, .72 and .4 are ranked.
        ("product", [0.72, 0.45], [1, 0]),
        ("sqrt", [math.sqrt(0.72), math.sqrt(0.45)], [1, 0]),
    ],
)
def test_quality(fusion: ScoreFusion, scores: list[float], cells: list[int]) -> None:
    found = select(prediction([[[0.9, 0.8, 0.4]], [[0.5]]], QUALITY), fusion=fusion)
    torch.testing.assert_close(found.scores[:2], torch.tensor(scores))
    assert found.boxes_xyxy[:2, 0].tolist() == [1 + 8 * cell for cell in cells]


def test_what_is_ranked_differs() -> None:
    """The best class score has the worst quality: it wins before the fusion and loses after it."""
    given = prediction([[[0.9, 0.8, 0.4]], [[0.5]]], [[0.1, 0.2, 0.9], [0.5]])
    assert select(given, fusion="rescore", per_level=1).boxes_xyxy[0, 0] == 1
    # .09, .16, .36: the third cell, 17..20 of 23.
    assert select(given, fusion="product", per_level=1).boxes_xyxy[0].tolist() == [17, 1, 20, 7]


@pytest.mark.parametrize(("fusion", "left"), [("rescore", 2), ("product", 1), ("sqrt", 2)])
def test_what_the_threshold_is_of(fusion: ScoreFusion, left: int) -> None:
    # Class scores .9 .8 .4: two over .5. Products .45 .72 .4: one. Roots .67 .85 .63: all three; per_level allows two.
    given = prediction([[[0.9, 0.8, 0.4]], [[0.1]]], QUALITY)
    assert len(select(given, fusion=fusion, score_threshold=0.5).scores) == left


def test_quality_of_several_classes_belongs_to_the_prior() -> None:
    found = select(prediction(TWO_CLASSES, [[0.5, 0.25, 0.5], [0.5]]), fusion="product", per_level=None)
    # .9 * .5, .4 * .5, .8 * .25, .3 * .5, .1 * .5, .2 * .25 (two pairs are equal).
    torch.testing.assert_close(found.scores[:6], torch.tensor([0.45, 0.2, 0.2, 0.15, 0.05, 0.05]))


def test_logarithms_of_probabilities() -> None:
    given = prediction([[[0.5, 0.5, 0.5]], [[0.5]]])
    given.classes[0][:] = torch.tensor([0.25, 0.75, 0.5]).log()
    found = select(given, activation=torch.exp)
    torch.testing.assert_close(found.scores[:2], torch.tensor([0.75, 0.5]))


def test_each_picture_for_itself() -> None:
    given = prediction(TWO_CLASSES, num_images=2)
    given.classes[0].data = given.classes[0].clone()
    given.classes[0][1] = logit(0.05)
    first, second = CandidateSelector(num_classes=2)(given, POINTS, around, per_level=1, score_threshold=0.0)
    torch.testing.assert_close(first.scores, torch.tensor([0.9, 0.6]))
    torch.testing.assert_close(second.scores, torch.tensor([0.05, 0.6]))


def test_half_precision_is_widened() -> None:
    given = prediction(TWO_CLASSES)
    half = DensePrediction(
        classes=tuple(x.bfloat16() for x in given.classes),
        boxes=tuple(x.bfloat16() for x in given.boxes),
        levels=given.levels,
    )
    found = select(half)
    assert found.boxes_xyxy.dtype == found.scores.dtype == torch.float32
