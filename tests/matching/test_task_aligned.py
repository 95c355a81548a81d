"""Task alignment: arithmetic by hand, and a plain recomputation of MMDetection's rule, box by box."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor

from rcnn.matching.task_aligned import AlignedMatches, TaskAlignedMatcher
from rcnn.records import Target

POINTS = torch.tensor([[4.0, 4.0], [12.0, 4.0], [4.0, 12.0], [12.0, 12.0]])


def target(boxes: list[tuple[float, ...]], labels: list[int], ignore: list[tuple[float, ...]] | None = None) -> Target:
    return Target(
        boxes_xyxy=torch.tensor(boxes).reshape(-1, 4),
        labels=torch.tensor(labels, dtype=torch.int64),
        ignore_xyxy=torch.tensor(ignore or []).reshape(-1, 4),
    )


def match(matcher: TaskAlignedMatcher, boxes: Tensor, scores: Tensor, truth: Target) -> AlignedMatches:
    return matcher(points_xy=POINTS, boxes_xyxy=boxes, scores=scores, target=truth)


def test_quality_by_hand() -> None:
    """One box of 16 x 16. The predictions overlap it by 1, 1/2, 1/2 and 0; class 1 scores 0.5, 0.8, 0.4 and 0.9.

    With powers 1 and 2 the alignments are 0.5, 0.2, 0.1 and 0. The largest IoU is 1, so the qualities are those
    numbers over 0.5: 1, 0.4 and 0.2. The last one is no candidate: its alignment is 0.
    """
    boxes = torch.tensor([[0.0, 0, 16, 16], [0, 0, 16, 8], [0, 8, 16, 16], [20, 0, 36, 16]])
    scores = torch.tensor([[0.9, 0.5], [0.1, 0.8], [0.1, 0.4], [0.1, 0.9]])
    found = match(TaskAlignedMatcher(iou_power=2.0), boxes, scores, target([(0, 0, 16, 16)], [1]))
    assert found.matches.positive.tolist() == [True, True, True, False]
    assert found.matches.negative.tolist() == [False, False, False, True]
    torch.testing.assert_close(found.quality, torch.tensor([1, 0.4, 0.2, 0]), rtol=1e-6, atol=1e-6)
    two = match(TaskAlignedMatcher(iou_power=2.0, candidates=2), boxes, scores, target([(0, 0, 16, 16)], [1]))
    assert two.matches.positive.tolist() == [True, True, False, False]


def test_the_point_must_lie_in_the_box() -> None:
    boxes = torch.tensor([[0.0, 0, 8, 8]]).repeat(4, 1)  # each predicts the box; one point lies in it
    found = match(TaskAlignedMatcher(), boxes, torch.full((4, 1), 0.5), target([(0, 0, 8, 8)], [0]))
    assert found.matches.positive.tolist() == [True, False, False, False]
    torch.testing.assert_close(found.quality, torch.tensor([1.0, 0, 0, 0]), rtol=1e-4, atol=0)


def test_a_prediction_of_two_boxes() -> None:
    """Both hold the first point; its box is nearer to the second (IoU 1 against 1/2), whose class it scores less."""
    boxes = torch.tensor([[0.0, 0, 8, 8], [90, 90, 91, 91], [90, 90, 91, 91], [90, 90, 91, 91]])
    truth = target([(0, 0, 8, 16), (0, 0, 8, 8)], [0, 1])
    found = match(TaskAlignedMatcher(), boxes, torch.tensor([[0.9, 0.2]]).repeat(4, 1), truth)
    assert found.matches.positive.tolist() == [True, False, False, False]
    assert found.matches.gt_index[0] == 1


@pytest.mark.parametrize("boxes", [[], [(3.0, 3.0, 3.0, 9.0)], [(300.0, 300.0, 340.0, 340.0)]])
def test_nothing_to_match(boxes: list[tuple[float, ...]]) -> None:
    """No box, one without area, one that nothing overlaps; a prediction without area, too."""
    predictions = torch.tensor([[0.0, 0, 8, 8], [3, 3, 3, 9], [3, 3, 3, 3], [4, 4, 20, 20]])
    found = match(TaskAlignedMatcher(), predictions, torch.full((4, 1), 0.5), target(boxes, [0] * len(boxes)))
    assert not found.matches.positive.any()
    assert found.matches.negative.all()
    assert not found.quality.any()


def test_ignore_regions() -> None:
    """Points in a region take no part, unless they are positive."""
    boxes = torch.tensor([[0.0, 0, 8, 8], [8, 0, 16, 8], [0, 8, 8, 16], [8, 8, 16, 16]])
    truth = target([(0, 0, 8, 8)], [0], ignore=[(0, 0, 16, 8)])
    found = match(TaskAlignedMatcher(), boxes, torch.full((4, 1), 0.5), truth)
    assert found.matches.positive.tolist() == [True, False, False, False]
    assert found.matches.negative.tolist() == [False, False, True, True]


def by_the_rule(
    points: Tensor, boxes: Tensor, scores: Tensor, truth: Target, count: int
) -> tuple[list[int], list[float]]:
    """Per prediction its box (-1: none) and quality, in loops, with torchvision's IoU."""
    overlaps = torchvision.ops.box_iou(boxes, truth.boxes_xyxy)
    owner, best_overlap = [-1] * len(points), [-1.0] * len(points)
    metric = [[0.0] * len(truth.labels) for _ in points]
    for gt, (box, label) in enumerate(zip(truth.boxes_xyxy.tolist(), truth.labels.tolist(), strict=True)):
        for i in range(len(points)):
            metric[i][gt] = scores[i, label].item() * overlaps[i, gt].item() ** 6
        ranked = sorted(range(len(points)), key=lambda i: -metric[i][gt])[:count]
        for i in ranked:
            x, y = points[i].tolist()
            inside = min(x - box[0], y - box[1], box[2] - x, box[3] - y) > 0.01
            if metric[i][gt] > 0 and inside and overlaps[i, gt] > best_overlap[i]:
                owner[i], best_overlap[i] = gt, overlaps[i, gt].item()
    quality = [0.0] * len(points)
    for gt in set(owner) - {-1}:
        mine = [i for i, one in enumerate(owner) if one == gt]
        largest = max(metric[i][gt] for i in mine)
        for i in mine:
            quality[i] = metric[i][gt] / (largest + 1e-7) * max(best_overlap[j] for j in mine)
    return owner, quality


@pytest.mark.parametrize("seed", range(5))
def test_against_the_rule_in_loops(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    grid = torch.arange(4, 100, 8, dtype=torch.float64)
    points = torch.cartesian_prod(grid, grid)
    boxes = torch.cat((points - 4 - 30 * uniform(len(points), 2), points + 4 + 30 * uniform(len(points), 2)), dim=1)
    corner = 60 * uniform(6, 2)
    truth = Target(boxes_xyxy=torch.cat((corner, corner + 10 + 40 * uniform(6, 2)), dim=1), labels=torch.arange(6) % 3)
    scores = uniform(len(points), 3)
    found = TaskAlignedMatcher()(points_xy=points, boxes_xyxy=boxes, scores=scores, target=truth)
    owner, quality = by_the_rule(points, boxes, scores, truth, 13)
    mine = torch.where(found.matches.positive, found.matches.gt_index, -1)
    assert mine.tolist() == owner
    torch.testing.assert_close(found.quality, torch.tensor(quality, dtype=torch.float64))
