"""Matching rules, worked by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rcnn.matching.iou import IoUMatcher, Matches, match_by_iou
from rcnn.records import Target


def match(overlaps: list[list[float]], low_quality_iou: float | None = None) -> Matches:
    return match_by_iou(torch.tensor(overlaps), positive_iou=0.7, negative_iou=0.3, low_quality_iou=low_quality_iou)


def test_thresholds() -> None:
    # At the upper one positive, at the lower one neither (it is not below).
    matches = match([[0.75, 0.7, 0.5, 0.3, 0.25, 0.0]])
    assert matches.positive.tolist() == [True, True, False, False, False, False]
    assert matches.negative.tolist() == [False, False, False, False, True, True]


def test_a_reference_belongs_to_the_box_it_overlaps_most() -> None:
    assert match([[0.75, 0.1], [0.8, 0.9]]).gt_index.tolist() == [1, 1]


def test_the_best_of_a_box_is_claimed_ties_included() -> None:
    matches = match([[0.2, 0.1, 0.2]], low_quality_iou=0.0)
    assert matches.positive.tolist() == [True, False, True]
    assert matches.negative.tolist() == [False, True, False]


def test_a_claimed_reference_stays_with_its_own_best() -> None:
    # Box 1 claims reference 0 (0.4 is its best), which overlaps box 0 more.
    matches = match([[0.5, 0.9], [0.4, 0.1]], low_quality_iou=0.0)
    assert matches.positive.tolist() == [True, True]
    assert matches.gt_index.tolist() == [0, 0]


def test_a_box_that_overlaps_nothing_claims_nothing() -> None:
    """torchvision and simple-faster-rcnn make every reference positive here."""
    matches = match([[0.0, 0.0]], low_quality_iou=0.0)
    assert not matches.positive.any()
    assert matches.negative.all()


def test_a_claim_has_a_least_overlap() -> None:
    # MMDetection's min_pos_iou = 0.3: at it, yes; below, no.
    overlaps = [[0.25, 0.1, 0.0], [0.0, 0.0, 0.3]]
    assert match(overlaps, low_quality_iou=0.3).positive.tolist() == [False, False, True]


def test_no_boxes_and_no_references() -> None:
    without_boxes = match_by_iou(torch.zeros(0, 3), positive_iou=0.7, negative_iou=0.3, low_quality_iou=0.0)
    assert without_boxes.negative.all()
    assert not without_boxes.positive.any()
    nothing = match_by_iou(torch.zeros(2, 0), positive_iou=0.7, negative_iou=0.3, low_quality_iou=0.0)
    assert len(nothing.positive) == len(nothing.negative) == len(nothing.gt_index) == 0


def test_an_overlap_that_is_no_number_takes_no_part() -> None:
    matches = match([[math.nan, 0.9]], low_quality_iou=0.0)
    assert matches.positive.tolist()[0] is False
    assert matches.negative.tolist()[0] is False


REFERENCES = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]])


def target(boxes: list[list[float]], ignore: list[list[float]] | None = None) -> Target:
    def tensor(rows: list[list[float]]) -> Tensor:
        return torch.tensor(rows).reshape(-1, 4)

    return Target(
        boxes_xyxy=tensor(boxes), labels=torch.zeros(len(boxes), dtype=torch.int64), ignore_xyxy=tensor(ignore or [])
    )


def test_an_ignore_region_is_neither() -> None:
    matcher = IoUMatcher(positive_iou=0.7, negative_iou=0.3)
    # The region holds the first box, which is positive and stays it, all of the second, 4 tenths of the third.
    matches = matcher(REFERENCES, target([[0, 0, 10, 10]], [[0, 0, 44, 10]]))
    assert matches.positive.tolist() == [True, False, False]
    assert matches.negative.tolist() == [False, False, True]


def test_the_share_of_an_ignore_region() -> None:
    # 4 tenths: at the share it is left out.
    matches = IoUMatcher(positive_iou=0.7, negative_iou=0.3, ignore_share=0.4)(
        REFERENCES, target([], [[40, 0, 44, 10]])
    )
    assert matches.negative.tolist() == [True, True, False]


def test_a_box_without_area_matches_nothing_and_harms_nothing() -> None:
    matcher = IoUMatcher(positive_iou=0.7, negative_iou=0.3, low_quality_iou=0.0)
    matches = matcher(REFERENCES, target([[5, 5, 5, 5], [20, 0, 30, 10]]))
    assert matches.positive.tolist() == [False, True, False]
    assert matches.gt_index.tolist()[1] == 1
    assert matches.negative.tolist() == [True, False, True]


def test_a_claimed_reference_may_go_to_its_claimer() -> None:
    # Boxes 1 and 2 claim reference 0, which overlaps box 0 most; box 0 claims reference 1.
    matches = match_by_iou(
        torch.tensor([[0.5, 0.9], [0.4, 0.1], [0.3, 0.2]]),
        positive_iou=0.7,
        negative_iou=0.3,
        low_quality_iou=0.0,
        claim_owner="claimer",
    )
    assert matches.positive.tolist() == [True, True]
    assert matches.gt_index.tolist() == [2, 0]


@pytest.mark.parametrize(
    ("name", "positive_iou", "negative_iou", "low_quality_iou"),
    [("rpn", 0.7, 0.3, 0.3), ("rpn_min0", 0.7, 0.3, 0.0), ("rcnn", 0.5, 0.5, None), ("retina", 0.5, 0.4, 0.0)],
)
def test_as_mmdetection(
    shared: Path, name: str, positive_iou: float, negative_iou: float, low_quality_iou: float | None
) -> None:
    """Its `MaxIoUAssigner` on the first six boxes: 0 is negative, -1 neither, else one more than the box's number."""
    with np.load(shared / "oracles" / "mmdetection" / "maths" / "arrays.npz") as arrays:
        boxes, priors = (torch.from_numpy(arrays[key]) for key in ("coder/gt", "assigner/priors"))
        expected = arrays[f"assigner/{name}/gt_inds"].tolist()
    target = Target(boxes_xyxy=boxes[:6], labels=torch.arange(6))
    matches = IoUMatcher(
        positive_iou=positive_iou,
        negative_iou=negative_iou,
        low_quality_iou=low_quality_iou,
        claim_owner="claimer",
    )(priors, target)
    found = torch.where(matches.positive, matches.gt_index + 1, torch.where(matches.negative, 0, -1))
    assert found.tolist() == expected
