"""Heat, peaks and box cells of CenterNet2, worked by hand."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from rcnn.matching.heatmap import HeatMap, HeatMapMatcher
from rcnn.priors import PointGenerator
from rcnn.records import LevelShape, Target

# Two levels of a picture of 96 x 64: 12 x 8 cells of 8 px (rows 0 to 95), 6 x 4 of 16 px (rows 96 to 119).
SHAPES = (LevelShape(height=8, width=12, stride_px=8), LevelShape(height=4, width=6, stride_px=16))
POINTS = PointGenerator()(SHAPES, dtype=torch.float64, device=torch.device("cpu"))


def match(
    *boxes: tuple[float, float, float, float],
    labels: list[int] | None = None,
    num_classes: int = 1,
    ignore: tuple[tuple[float, float, float, float], ...] = (),
    **choices: float,
) -> HeatMap:
    target = Target(
        boxes_xyxy=torch.tensor(boxes).reshape(-1, 4),
        labels=torch.tensor(labels or [0] * len(boxes), dtype=torch.int64),
        ignore_xyxy=torch.tensor(ignore).reshape(-1, 4),
    )
    return HeatMapMatcher(**choices)(POINTS, SHAPES, target, num_classes=num_classes)


def cell(level: int, column: int, row: int) -> int:
    return (0, 96)[level] + row * SHAPES[level].width + column


def test_sizes_are_those_of_centernet2() -> None:
    # SOI [[0, 80], [64, 160], [128, 320], [256, 640], [512, 1e7]] for strides 8 to 128.
    expected = [(0.0, 80.0), (64.0, 160.0), (128.0, 320.0), (256.0, 640.0), (512.0, math.inf)]
    assert HeatMapMatcher().sizes_px((8, 16, 32, 64, 128)) == expected


@pytest.mark.parametrize("strides", [(8, 16, 32), (4, 8, 16, 32), (16,), (8, 64)])
def test_every_size_has_a_level(strides: tuple[int, ...]) -> None:
    ranges = HeatMapMatcher().sizes_px(strides)
    assert ranges[0][0] == 0
    assert ranges[-1][1] == math.inf
    assert all(below[1] >= above[0] for below, above in pairwise(ranges))


def test_heat_by_hand() -> None:
    # A box of 60 x 40 around (42, 28): area 2400. Overlap 0.8: delta = 0.2 / 1.8 = 1/9, squared radius
    # 2 * 2400 / 81 = 59.259. The centre lies in the cell of column 42 // 8 = 5, row 28 // 8 = 3, whose heat is 1 though
    # its middle (44, 28) is 2 px away. The middle (52, 28) of the next cell is 10 px away: exp(-100 / 59.259).
    # Level 1: column 42 // 16 = 2, row 28 // 16 = 1; the cell to its right has its middle at (56, 24):
    # 14^2 + 4^2 = 212.
    heat = match((12.0, 8.0, 72.0, 48.0)).heat[:, 0]
    radius = 2 * 2400 / 81
    assert heat[cell(0, 5, 3)] == 1
    assert heat[cell(1, 2, 1)] == 1
    assert heat[cell(0, 6, 3)].item() == pytest.approx(math.exp(-100 / radius))
    assert heat[cell(1, 3, 1)].item() == pytest.approx(math.exp(-212 / radius))
    # (92, 60): 50^2 + 32^2 = 3524 is 59 radii: under 1e-4, nothing.
    assert heat[cell(0, 11, 7)] == 0


def test_a_small_box_has_the_least_radius() -> None:
    # 4 x 4 px: 2 * 16 / 81 < 16 = 4^2. From (20, 20) to the middle (28, 20): 64 / 16 = 4.
    heat = match((18.0, 18.0, 22.0, 22.0)).heat[:, 0]
    assert heat[cell(0, 2, 2)] == 1
    assert heat[cell(0, 3, 2)].item() == pytest.approx(math.exp(-4))


def test_each_class_has_its_own_heat_and_the_hottest_box_wins() -> None:
    boxes = [(10.0, 10.0, 30.0, 30.0), (34.0, 10.0, 54.0, 30.0), (10.0, 34.0, 30.0, 54.0)]
    found = match(*boxes, labels=[0, 0, 2], num_classes=3).heat
    alone = torch.stack([match(box).heat[:, 0] for box in boxes])
    torch.testing.assert_close(found[:, 0], torch.maximum(alone[0], alone[1]))
    torch.testing.assert_close(found[:, 1], torch.zeros_like(alone[0]))
    torch.testing.assert_close(found[:, 2], alone[2])
    together = match(*boxes).heat[:, 0]
    torch.testing.assert_close(together, alone.amax(dim=0))


def test_peaks_are_at_the_levels_for_the_size() -> None:
    # Two levels of strides 8 and 16: half diagonals up to 80 px, and from 64 px up. 60 x 40: 36 px, level 0.
    # 96 x 64: 57.7, level 0. With high_strides 5 and low_strides 2: up to 40, from 32: 36 px on both.
    small = match((12.0, 8.0, 72.0, 48.0))
    assert small.peaks.tolist() == [cell(0, 5, 3)]
    both = match((12.0, 8.0, 72.0, 48.0), low_strides=2.0, high_strides=5.0)
    assert both.peaks.tolist() == [cell(0, 5, 3), cell(1, 2, 1)]
    # 57.7 px: beyond 40.
    assert match((0.0, 0.0, 96.0, 64.0), low_strides=2.0, high_strides=5.0).peaks.tolist() == [cell(1, 3, 2)]


def test_two_boxes_with_one_centre_are_two_peaks_with_their_labels() -> None:
    found = match((20.0, 20.0, 28.0, 28.0), (16.0, 22.0, 32.0, 26.0), labels=[1, 0], num_classes=2)
    assert found.peaks.tolist() == [cell(0, 3, 3)] * 2
    assert found.peak_labels.tolist() == [1, 0]


def test_box_cells_are_the_three_by_three_that_lie_in_the_box() -> None:
    # Centre (42, 28), cell (5, 3). The box spans x 12 to 72, y 8 to 48, so all nine middles lie in it.
    large = match((12.0, 8.0, 72.0, 48.0))
    nine = {cell(0, column, row) for column in (4, 5, 6) for row in (2, 3, 4)}
    assert set(large.box_cells.tolist()) == nine
    # A flat box, y 26 to 30: of the middles 20, 28, 36 only 28 lies in it.
    flat = match((12.0, 26.0, 72.0, 30.0))
    assert set(flat.box_cells.tolist()) == {cell(0, column, 3) for column in (4, 5, 6)}
    # A box between the middles has none, but still a peak.
    between = match((29.0, 29.0, 31.0, 31.0))
    assert between.box_cells.tolist() == []
    assert between.peaks.tolist() == [cell(0, 3, 3)]


def test_a_cell_of_two_boxes_takes_the_one_nearer_in_radii() -> None:
    # Both around row 3: A = 60 x 40 at (42, 28), radius^2 59.26; B = 20 x 16 at (58, 28), area 320, radius^2
    # max(640 / 81, 16) = 16. Cell (6, 3), middle (52, 28): to A 100 / 59.26 = 1.69, to B 36 / 16 = 2.25: A.
    # Cell (7, 3) is B's centre cell: B. Cell (5, 3) is no neighbour of B's.
    found = match((12.0, 8.0, 72.0, 48.0), (48.0, 20.0, 68.0, 36.0))
    of_cell = dict(zip(found.box_cells.tolist(), found.box_gt_index.tolist(), strict=True))
    assert of_cell[cell(0, 6, 3)] == 0
    assert of_cell[cell(0, 7, 3)] == 1
    assert of_cell[cell(0, 5, 3)] == 0


def test_a_centre_on_the_far_edge_belongs_to_the_last_cell() -> None:
    found = match((96.0, 64.0, 96.0, 64.0))
    assert found.peaks.tolist() == [cell(0, 11, 7)]
    assert found.heat[cell(0, 11, 7)] == 1


def test_no_boxes() -> None:
    found = match(num_classes=2)
    assert found.heat.shape == (120, 2)
    assert not found.heat.any()
    assert found.counted.all()
    assert [len(x) for x in (found.peaks, found.peak_labels, found.box_cells, found.box_gt_index)] == [0] * 4


def test_cells_in_an_ignore_region_are_not_counted() -> None:
    found = match((12.0, 8.0, 72.0, 48.0), ignore=((0.0, 0.0, 16.0, 10.0),))
    # Middles 4 and 12 by 4 on level 0, (8, 8) on level 1.
    expected = {cell(0, 0, 0), cell(0, 1, 0), cell(1, 0, 0)}
    assert set((~found.counted).nonzero().flatten().tolist()) == expected


def naive_heat(box: tuple[float, float, float, float]) -> Tensor:
    """The heat of one box, one cell at a time."""
    x1, y1, x2, y2 = box
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    radius = max(math.sqrt(2 * (x2 - x1) * (y2 - y1)) / 9, 4.0)
    heat = []
    for shape in SHAPES:
        for row in range(shape.height):
            for column in range(shape.width):
                middle = (column + 0.5) * shape.stride_px, (row + 0.5) * shape.stride_px
                is_peak = int(x / shape.stride_px) == column and int(y / shape.stride_px) == row
                value = 1.0 if is_peak else math.exp(-(math.dist(middle, (x, y)) ** 2) / radius**2)
                heat.append(value if value >= 1e-4 else 0.0)
    return torch.tensor(heat, dtype=torch.float64)


def test_random_boxes_as_computed_naively() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        x1, y1 = (torch.rand(2, generator=generator) * torch.tensor([60.0, 40.0])).tolist()
        width, height = (4 + 20 * torch.rand(2, generator=generator)).tolist()
        box = (x1, y1, x1 + width, y1 + height)
        torch.testing.assert_close(match(box).heat[:, 0], naive_heat(box), rtol=1e-5, atol=1e-6)
