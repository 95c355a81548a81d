"""Areas, overlaps and limits, worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torchvision

from rcnn.boxes.geometry import (
    area,
    clip,
    giou,
    has_min_side,
    intersection,
    iou,
    is_inside,
    overlap_share,
    paired_giou,
    paired_iou,
)
from rcnn.records import Size

NAN = math.nan


def boxes(*rows: tuple[float, float, float, float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 4)


def test_area_is_width_times_height() -> None:
    # 4 x 6; a point; a line.
    torch.testing.assert_close(
        area(boxes((1, 2, 5, 8), (3, 3, 3, 3), (0, 0, 7, 0))), torch.tensor([24.0, 0, 0]).double()
    )


def test_iou_of_a_pair() -> None:
    # 4x4 at the origin and 4x4 moved by (2, 1): shared 2 x 3 = 6, union 16 + 16 - 6 = 26.
    a, b = boxes((0, 0, 4, 4)), boxes((2, 1, 6, 5))
    torch.testing.assert_close(intersection(a, b), boxes((6, 0, 0, 0))[:, :1])
    assert iou(a, b).item() == pytest.approx(6 / 26)
    # The enclosing box is 6 x 5 = 30, of which 4 are empty.
    assert giou(a, b).item() == pytest.approx(6 / 26 - 4 / 30)


def test_boxes_that_touch_share_nothing() -> None:
    assert iou(boxes((0, 0, 4, 4)), boxes((4, 0, 8, 4))).item() == 0
    # Enclosing 8 x 4 = 32 = the union: nothing is empty.
    assert giou(boxes((0, 0, 4, 4)), boxes((4, 0, 8, 4))).item() == 0


def test_boxes_apart_in_both_directions_share_nothing() -> None:
    """The product of two negative extents is no area."""
    assert intersection(boxes((0, 0, 1, 1)), boxes((3, 3, 4, 4))).item() == 0


def test_no_boxes() -> None:
    some = boxes((0, 0, 4, 4), (1, 1, 2, 2))
    assert iou(boxes(), some).shape == (0, 2)
    assert iou(some, boxes()).shape == (2, 0)
    assert giou(boxes(), boxes()).shape == (0, 0)
    assert clip(boxes(), Size(4, 4)).shape == (0, 4)
    assert has_min_side(boxes(), 1).shape == (0,)


def test_overlap_with_a_box_without_area() -> None:
    point, square = boxes((1, 1, 1, 1)), boxes((0, 0, 4, 4))
    assert iou(point, square).item() == 0
    assert math.isnan(iou(point, point).item())
    assert overlap_share(point, square).item() == 0


def test_share_is_of_the_first() -> None:
    # 2 x 2 of the 4 x 4 box lie in the region, and 2 x 2 of the region's 2 x 10.
    box, region = boxes((0, 0, 4, 4)), boxes((2, 2, 4, 12))
    assert overlap_share(box, region).item() == pytest.approx(4 / 16)
    assert overlap_share(region, box).item() == pytest.approx(4 / 20)


def test_clip_knows_width_from_height() -> None:
    clipped = clip(boxes((-5, -6, 200, 300)), Size(height=60, width=70))
    assert clipped.tolist() == [[0, 0, 70, 60]]


def test_clip_takes_any_leading_dimensions() -> None:
    assert clip(torch.full((2, 3, 4), 9.0), Size(height=5, width=7)).tolist() == [[[7, 5, 7, 5]] * 3] * 2


def test_a_side_of_the_limit_is_large_enough() -> None:
    found = has_min_side(boxes((0, 0, 10, 10), (0, 0, 9.99, 10), (0, 0, 10, 9.99), (0, 0, NAN, 10)), 10)
    assert found.tolist() == [True, False, False, False]


def test_inside_with_a_border() -> None:
    size = Size(height=20, width=30)
    some = boxes((0, 0, 30, 20), (-1, 0, 30, 20), (0, 0, 30, 21), (0, 0, 31, 20), (NAN, 0, 30, 20))
    assert is_inside(some, size, 0).tolist() == [True, False, False, False, False]
    assert is_inside(some, size, 1).tolist() == [True, True, True, True, False]
    at_the_end = torch.tensor([[0.0, 0.0, size.width, size.height], [0.0, 0.0, size.width - 1, size.height - 1]])
    assert is_inside(at_the_end, size, 0).tolist() == [True, True]
    assert is_inside(at_the_end, size, 0, far_ends="excluded").tolist() == [False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_overlaps_are_torchvisions(dtype: torch.dtype) -> None:
    random = torch.rand(2, 40, 4, generator=torch.Generator().manual_seed(0), dtype=dtype) * 50
    a, b = (torch.cat((x[:, :2], x[:, :2] + x[:, 2:]), dim=1) for x in random)
    torch.testing.assert_close(iou(a, b), torchvision.ops.box_iou(a, b))
    torch.testing.assert_close(giou(a, b), torchvision.ops.generalized_box_iou(a, b))


def test_pairs_are_those_at_the_same_place() -> None:
    a = boxes((0, 0, 4, 4), (0, 0, 4, 4), (0, 0, 1, 1))
    b = boxes((2, 1, 6, 5), (0, 0, 4, 4), (3, 3, 4, 4))
    # As above; the same box; two unit boxes in the corners of a 4 x 4 one: 0 less 14 empty of 16.
    torch.testing.assert_close(paired_iou(a, b), torch.tensor([6 / 26, 1, 0]).double())
    torch.testing.assert_close(paired_giou(a, b), torch.tensor([6 / 26 - 4 / 30, 1, -14 / 16]).double())
    torch.testing.assert_close(paired_iou(a, b), iou(a, b).diagonal())
    torch.testing.assert_close(paired_giou(a, b), giou(a, b).diagonal())


def test_pairs_without_area() -> None:
    point = boxes((1, 1, 1, 1))
    assert math.isnan(paired_iou(point, point).item())
    assert paired_iou(point, point, eps=1e-6).item() == 0
    assert paired_giou(point, point, eps=1e-6).item() == 0
    assert paired_iou(boxes(), boxes()).shape == paired_giou(boxes(), boxes()).shape == (0,)
