"""Adaptive sample selection: MMDetection's recorded assignments, arithmetic by hand, ignore regions."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rcnn.matching.atss import ATSSMatcher, match_by_atss
from rcnn.priors import AnchorGenerator
from rcnn.records import LevelShape, Size, Target

# One level of 3 x 3 cells, 8 px apart, anchors of 8 px around the cells' corners: centres at 0, 8 and 16.
CENTRES = [(x, y) for y in (0, 8, 16) for x in (0, 8, 16)]
GRID = torch.tensor([[x - 4.0, y - 4.0, x + 4.0, y + 4.0] for x, y in CENTRES])


def target(*boxes: tuple[float, ...], ignore: tuple[tuple[float, ...], ...] = ()) -> Target:
    return Target(
        boxes_xyxy=torch.tensor(boxes).reshape(-1, 4),
        labels=torch.zeros(len(boxes), dtype=torch.int64),
        ignore_xyxy=torch.tensor(ignore).reshape(-1, 4),
    )


def indices(mask: Tensor) -> list[int]:
    return mask.nonzero().flatten().tolist()


@pytest.mark.parametrize("case", ["atss_r50_fpn_1x", "gfl_r50_fpn_1x"])
@pytest.mark.parametrize("image", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_assignments_of_mmdetection(shared: Path, case: str, image: int, dtype: torch.dtype) -> None:
    """Real pictures of 400 x 600 and 480 x 400 in a batch of 480 x 608; each is matched on its own cells."""
    with np.load(shared / "oracles" / "mmdetection" / case / "arrays.npz") as arrays:
        boxes, index, truth = (
            torch.from_numpy(arrays[f"train/{name}/{image}"])
            for name in ("pre/gt_boxes", "assign/positive_index", "assign/positive_bbox_targets")
        )
        num_positive, num_negative, num_left_out = arrays[f"train/assign/num_pos_neg_ignored/{image}"].tolist()
    strides = (8, 16, 32, 64, 128)
    shapes = [
        LevelShape(height=math.ceil(480 / stride), width=math.ceil(608 / stride), stride_px=stride)
        for stride in strides
    ]
    generator = AnchorGenerator(sizes_px=tuple((8.0 * stride,) for stride in strides), heights_over_widths=(1.0,))
    anchors = generator(shapes, Size(480, 608), dtype=dtype, device=torch.device("cpu"))
    # Rounded up to 32: the first picture is 416 px high, the second 416 px wide.
    limit = torch.tensor([(math.inf, 416.0), (416.0, math.inf)][image], dtype=dtype)
    own = [(some[:, :2] + some[:, 2:]).div(2).lt(limit).all(dim=1) for some in anchors]
    labels = torch.zeros(len(boxes), dtype=torch.int64)
    found = ATSSMatcher()(
        [some[mine] for some, mine in zip(anchors, own, strict=True)],
        Target(boxes_xyxy=boxes.to(dtype), labels=labels),
    )
    assert torch.cat(own).nonzero().flatten()[found.positive].tolist() == index.tolist()
    torch.testing.assert_close(boxes[found.gt_index[found.positive]], truth.to(boxes.dtype))
    assert [int(found.positive.sum()), int(found.negative.sum())] == [num_positive, num_negative]
    assert len(torch.cat(own)) - len(found.positive) == num_left_out


def test_threshold_by_hand() -> None:
    """All nine anchors are candidates. The box is the middle anchor moved by (1, 0): IoU with it 7 * 8 / 72 = 7/9, with
    the one to its right 1 * 8 / 120 = 1/15, with all others 0. Mean 0.0938, deviation 0.2573: the threshold is 0.3511.
    """
    overlaps = [7 / 9, 1 / 15] + [0.0] * 7
    mean = sum(overlaps) / 9
    deviation = math.sqrt(sum((x - mean) ** 2 for x in overlaps) / 8)
    assert 1 / 15 < mean + deviation < 7 / 9
    found = match_by_atss([GRID], torch.tensor([[5.0, 4.0, 13.0, 12.0]]), candidates_per_level=9)
    assert indices(found.positive) == [4]
    assert indices(found.negative) == [0, 1, 2, 3, 5, 6, 7, 8]


def test_the_centre_must_lie_in_the_box() -> None:
    # A box from 1 to 7 holds neither centre (0 and 8); once it reaches over 0 it holds the left one.
    between = match_by_atss([GRID[:2]], torch.tensor([[1.0, -4.0, 7.0, 4.0]]), candidates_per_level=1)
    assert not between.positive.any()
    over = match_by_atss([GRID[:2]], torch.tensor([[-1.0, -4.0, 7.0, 4.0]]), candidates_per_level=1)
    assert indices(over.positive) == [0]
    # A centre on the side itself (x = 0) does not count.
    beside = match_by_atss([GRID[:1]], torch.tensor([[0.0, -4.0, 7.0, 4.0]]), candidates_per_level=1)
    assert not beside.positive.any()


def test_candidates_come_from_every_level() -> None:
    """A box of 8 px at (8, 8): one candidate per level. IoU 1 with the small anchor, 64 / 1024 with the large one; mean
    0.53, deviation 0.66: the threshold of two candidates is above the larger one. With three it is not."""
    large = torch.tensor([[-8.0, -8.0, 24.0, 24.0]])
    box = GRID[4:5]
    assert not match_by_atss([GRID, large], box, candidates_per_level=1).positive.any()
    # 1, 1/16 and 1/16: mean 0.375, deviation 0.541.
    assert indices(match_by_atss([GRID, large, large], box, candidates_per_level=1).positive) == [4]


def test_an_anchor_of_two_boxes() -> None:
    """Both claim the middle anchor; it overlaps the second more, and the first is left without one."""
    boxes = torch.tensor([[4.0, 4.0, 12.0, 11.0], [4.0, 4.0, 12.0, 12.0]])
    found = match_by_atss([GRID], boxes, candidates_per_level=9)
    assert indices(found.positive) == [4]
    assert found.gt_index[4] == 1


@pytest.mark.parametrize("boxes", [[], [(3.0, 3.0, 3.0, 9.0)], [(30.0, 30.0, 40.0, 40.0)]])
def test_nothing_to_match(boxes: list[tuple[float, ...]]) -> None:
    """No box, one without area, one far from every anchor."""
    found = ATSSMatcher()([GRID, GRID[:0]], target(*boxes))
    assert not found.positive.any()
    assert found.negative.all()


def test_a_single_anchor_in_all() -> None:
    """The deviation of one candidate is none: it is positive where its centre lies in the box."""
    found = match_by_atss([GRID[4:5], GRID[:0]], torch.tensor([[0.0, 0.0, 12.0, 12.0]]), candidates_per_level=9)
    assert found.positive.tolist() == [True]


def test_ignore_regions_by_centre() -> None:
    """The region holds the centres at (0, 0) and (8, 0), and the one at (8, 8), which is positive and stays so."""
    found = ATSSMatcher()([GRID], target((5.0, 4.0, 13.0, 12.0), ignore=((-1.0, -1.0, 9.0, 1.0), (7.0, 7.0, 9.0, 9.0))))
    assert indices(found.positive) == [4]
    assert indices(found.negative) == [2, 3, 5, 6, 7, 8]


def test_ignore_regions_by_share() -> None:
    """Half of the anchor at (0, 0), all of the one at (8, 0), a fourth of the one at (16, 0)."""
    found = ATSSMatcher(ignore_share=0.5)([GRID], target(ignore=((0.0, -4.0, 14.0, 4.0),)))
    assert indices(found.negative) == [2, 3, 4, 5, 6, 7, 8]
