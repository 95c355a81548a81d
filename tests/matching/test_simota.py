"""SimOTA against what MMDetection's own tests expect, arithmetic by hand, and a naive computation of the same rule."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rcnn.matching.simota import FAR_COST, SimOTAMatcher, class_cost, take_cheapest
from rcnn.records import Target


def target(
    boxes: list[list[float]], labels: list[int] | None = None, ignore: list[list[float]] | None = None
) -> Target:
    return Target(
        boxes_xyxy=torch.tensor(boxes).reshape(-1, 4),
        labels=torch.tensor(labels or [0] * len(boxes), dtype=torch.int64),
        ignore_xyxy=torch.tensor(ignore or []).reshape(-1, 4),
    )


# ------------------------------------------------------------------------------- MMDetection's test_simota_assigner.py


def test_a_prediction_in_the_box_and_one_far_from_it() -> None:
    found = SimOTAMatcher(num_candidates=1)(
        boxes_xyxy=torch.tensor([[23.0, 23, 43, 43], [4.0, 5, 6, 7]]),
        scores=torch.tensor([[0.2], [0.8]]),
        points_xy=torch.tensor([[30.0, 30], [4.0, 5]]),
        strides_px=torch.tensor([8.0, 6.0]),
        target=target([[23.0, 23, 43, 43]]),
    )
    assert found.positive.tolist() == [True, False]
    assert found.negative.tolist() == [False, True]
    assert found.gt_index[0] == 0


@pytest.mark.parametrize("boxes", [[[0.0, 0, 1, 1]], []])
def test_no_prior_near_a_box_and_no_box(boxes: list[list[float]]) -> None:
    found = SimOTAMatcher(num_candidates=1)(
        boxes_xyxy=torch.tensor([[123.0, 123, 143, 143], [114.0, 151, 161, 171]]),
        scores=torch.tensor([[0.2], [0.8]]),
        points_xy=torch.tensor([[30.0, 30], [55.0, 55]]),
        strides_px=torch.tensor([8.0, 8.0]),
        target=target(boxes),
    )
    assert not found.positive.any()
    assert found.negative.all()


# -------------------------------------------------------------------------------------------------------------- by hand


def test_class_cost_by_hand() -> None:
    # Scores 0.9 and 0.2; were it class 0: -ln 0.9 - ln (1 - 0.2); class 1: -ln (1 - 0.9) - ln 0.2.
    found = class_cost(torch.tensor([[0.9, 0.2]], dtype=torch.float64), torch.tensor([0, 1]))
    expected = [-math.log(0.9) - math.log(0.8), -math.log(0.1) - math.log(0.2)]
    torch.testing.assert_close(found, torch.tensor([expected], dtype=torch.float64))


def test_class_cost_of_certain_scores_is_finite() -> None:
    # torch's binary cross-entropy stops its logarithms at -100.
    scores, labels = torch.tensor([[0.0, 1.0]]), torch.tensor([0, 1])
    expected = [torch.nn.functional.binary_cross_entropy(scores[0], truth, reduction="sum") for truth in torch.eye(2)]
    torch.testing.assert_close(class_cost(scores, labels)[0], torch.stack(expected))


def test_a_box_takes_as_many_as_its_overlaps_add_up_to() -> None:
    # Box 0: 0.9 + 0.8 + 0.7 = 2.4 of its best three: two. Box 1: 0.3 + 0.2 + 0.1: under one, so one.
    overlaps = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.0]])
    cost = torch.tensor([[4.0, 9.0], [1.0, 9.0], [2.0, 9.0], [3.0, 8.0]])
    found = take_cheapest(cost, overlaps, num_candidates=3)
    assert found.tolist() == [[False, False], [True, False], [True, False], [False, True]]


def test_a_prediction_that_two_boxes_take_goes_where_it_is_cheapest() -> None:
    # Both take prediction 0, which is cheaper for box 1; box 0 keeps none.
    overlaps = torch.tensor([[0.5, 0.5], [0.1, 0.1]])
    cost = torch.tensor([[1.0, 0.5], [2.0, 2.0]])
    assert take_cheapest(cost, overlaps, num_candidates=10).tolist() == [[False, True], [False, False]]


def test_the_centre_is_preferred_to_the_rest_of_the_box() -> None:
    # A box of 64 x 64, stride 8: within 20 px of its middle (32, 32) is the centre. The far prior overlaps perfectly
    # and scores high, yet the one at the centre is taken: 3 ln 4 + ln 10 is less than what is added for the far one.
    points = torch.tensor([[60.0, 60.0], [32.0, 32.0], [100.0, 100.0]])
    found = SimOTAMatcher(num_candidates=1)(
        boxes_xyxy=torch.tensor([[0.0, 0, 64, 64], [0.0, 0, 32, 32], [0.0, 0, 64, 64]]),
        scores=torch.tensor([[0.99], [0.1], [0.99]]),
        points_xy=points,
        strides_px=torch.full((3,), 8.0),
        target=target([[0.0, 0, 64, 64]]),
    )
    assert found.positive.tolist() == [False, True, False]
    assert 3 * math.log(4) + math.log(10) < FAR_COST


@pytest.mark.parametrize("x", [51.9, 52.1])
def test_a_small_box_is_reached_from_two_and_a_half_strides(x: float) -> None:
    # Its middle is at 32, the stride 8: 32 + 20 = 52 is the limit.
    found = SimOTAMatcher()(
        boxes_xyxy=torch.tensor([[30.0, 30, 34, 34]]),
        scores=torch.tensor([[0.5]]),
        points_xy=torch.tensor([[x, 32.0]]),
        strides_px=torch.tensor([8.0]),
        target=target([[31.0, 31, 33, 33]]),
    )
    assert found.positive.tolist() == [x < 52]


def test_ignore_regions_spare_negatives_alone() -> None:
    found = SimOTAMatcher()(
        boxes_xyxy=torch.tensor([[0.0, 0, 16, 16]] * 3),
        scores=torch.full((3, 1), 0.5),
        points_xy=torch.tensor([[8.0, 8.0], [60.0, 60.0], [90.0, 90.0]]),
        strides_px=torch.full((3,), 8.0),
        target=target([[0.0, 0, 16, 16]], ignore=[[0.0, 0, 70, 70]]),
    )
    assert found.positive.tolist() == [True, False, False]
    assert found.negative.tolist() == [False, False, True]


# ---------------------------------------------------------------------------------------- the rule once more, naively


def naive(boxes: Tensor, scores: Tensor, points: Tensor, strides: Tensor, truth: Target) -> dict[int, int]:
    """SimOTA one number at a time: prior to ground truth."""
    cost: dict[int, list[float]] = {}
    overlaps: dict[int, list[float]] = {}
    for prior, (x, y) in enumerate(points.tolist()):
        inside, central = [], []
        for x1, y1, x2, y2 in truth.boxes_xyxy.tolist():
            reach = 2.5 * float(strides[prior])
            inside.append(x1 < x < x2 and y1 < y < y2)
            central.append(abs(x - (x1 + x2) / 2) < reach and abs(y - (y1 + y2) / 2) < reach)
        if not any(inside + central):
            continue
        cost[prior], overlaps[prior] = [], []
        for gt, box in enumerate(truth.boxes_xyxy.tolist()):
            iou = naive_iou(boxes[prior].tolist(), box)
            classes = 0.0
            for label, score in enumerate(scores[prior].tolist()):
                classes -= math.log(score if label == int(truth.labels[gt]) else 1 - score)
            far = 0.0 if inside[gt] and central[gt] else 1e5
            cost[prior].append(classes - 3 * math.log(iou + 1e-7) + far)
            overlaps[prior].append(iou)
    claims: dict[int, list[int]] = {prior: [] for prior in cost}
    for gt in range(len(truth.labels)):
        best = sorted((overlaps[prior][gt] for prior in cost), reverse=True)[:10]
        for prior in sorted(cost, key=lambda prior: cost[prior][gt])[: max(int(sum(best)), 1)]:
            claims[prior].append(gt)
    return {
        prior: of[0] if len(of) == 1 else min(range(len(cost[prior])), key=lambda gt: cost[prior][gt])
        for prior, of in claims.items()
        if of
    }


def naive_iou(a: list[float], b: list[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


@pytest.mark.parametrize("seed", range(8))
def test_random_pictures_as_computed_naively(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    strides = torch.cat((torch.full((100,), 8.0), torch.full((25,), 16.0))).double()
    points = random(125, 2) * 80
    half = (random(125, 2) + 0.3) * 15
    boxes = torch.cat((points - half, points + half), dim=1)
    corner = random(5, 2) * 50
    truth = Target(
        boxes_xyxy=torch.cat((corner, corner + 6 + 30 * random(5, 2)), dim=1),
        labels=torch.randint(0, 3, (5,), generator=generator),
    )
    scores = 0.01 + 0.98 * random(125, 3)
    found = SimOTAMatcher()(boxes_xyxy=boxes, scores=scores, points_xy=points, strides_px=strides, target=truth)
    expected = naive(boxes, scores, points, strides, truth)
    positive = found.positive.nonzero().flatten().tolist()
    assert {prior: int(found.gt_index[prior]) for prior in positive} == expected
    assert torch.equal(found.negative, ~found.positive)
    assert len(expected) > 5
