"""Anchors: the published table of the paper's code, order, frame, and one tall anchor."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from rcnn.priors import AnchorGenerator, PointGenerator, cell_anchors, octave_anchors
from rcnn.records import LevelShape, Size

CPU = torch.device("cpu")


def test_a_tall_anchor_is_tall() -> None:
    # Size 16, height over width 4: 32 high, 8 wide.
    assert cell_anchors([16], [4.0]).tolist() == [[-4, -16, 4, 16]]


def test_order_in_a_cell_is_by_ratio_then_size() -> None:
    anchors = cell_anchors([10, 20], [1.0, 4.0])
    # 10 x 10, 20 x 20, then half as wide and twice as high.
    assert anchors.tolist() == [[-5, -5, 5, 5], [-10, -10, 10, 10], [-2.5, -10, 2.5, 10], [-5, -20, 5, 20]]


def test_torchvisions_rounded_table() -> None:
    # 32 * sqrt(0.5) / 2 = 11.31 and 32 / sqrt(0.5) / 2 = 22.63.
    rounded = cell_anchors([32], [0.5, 1.0, 2.0], rounded=True)
    assert rounded.tolist() == [[-23, -11, 23, 11], [-16, -16, 16, 16], [-11, -23, 11, 23]]


def test_row_major_over_the_cells() -> None:
    generator = AnchorGenerator(sizes_px=((8.0,),), heights_over_widths=(1.0,))
    (anchors,) = generator([LevelShape(height=2, width=3, stride_px=16)], Size(32, 48), dtype=torch.float32, device=CPU)
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    assert centres.tolist() == [[0, 0], [16, 0], [32, 0], [0, 16], [16, 16], [32, 16]]


def test_the_anchors_of_a_cell_stay_together() -> None:
    generator = AnchorGenerator(sizes_px=((8.0, 16.0),), heights_over_widths=(1.0,))
    (anchors,) = generator([LevelShape(height=1, width=2, stride_px=4)], Size(4, 8), dtype=torch.float32, device=CPU)
    assert (anchors[:, 2] - anchors[:, 0]).tolist() == [8, 16, 8, 16]
    assert generator.num_per_cell == 2


def test_the_centre_of_a_cell() -> None:
    generator = AnchorGenerator(sizes_px=((16.0,),), heights_over_widths=(1.0,), centre_offset=0.5)
    (anchors,) = generator([LevelShape(height=1, width=1, stride_px=16)], Size(16, 16), dtype=torch.float32, device=CPU)
    assert anchors.tolist() == [[0, 0, 16, 16]]


def test_strides_of_a_rounded_up_level() -> None:
    # 608 px: P6 has 10 cells. 608 // 10 = 60 px apart as torchvision infers it, 64 nominally.
    shape, size = LevelShape(height=10, width=10, stride_px=64), Size(608, 608)
    for rule, step in (("image_over_grid", 60), ("nominal", 64)):
        generator = AnchorGenerator(sizes_px=((8.0,),), heights_over_widths=(1.0,), stride_rule=rule)
        (anchors,) = generator([shape], size, dtype=torch.float32, device=CPU)
        assert (anchors[1] - anchors[0]).tolist() == [step, 0, step, 0]
        assert (anchors[10] - anchors[0]).tolist() == [0, step, 0, step]


def test_an_empty_level() -> None:
    generator = AnchorGenerator(sizes_px=((8.0,),))
    (anchors,) = generator([LevelShape(height=0, width=3, stride_px=4)], Size(0, 12), dtype=torch.float32, device=CPU)
    assert anchors.shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_generator_serves_every_precision(dtype: torch.dtype) -> None:
    generator = copy.deepcopy(AnchorGenerator(sizes_px=((8.0,), (16.0,))))
    shapes = [LevelShape(height=2, width=2, stride_px=4), LevelShape(height=1, width=1, stride_px=8)]
    anchors = generator(shapes, Size(8, 8), dtype=dtype, device=CPU)
    assert [(len(of_level), of_level.dtype) for of_level in anchors] == [(12, dtype), (3, dtype)]
    assert generator.num_levels == 2


@pytest.mark.parametrize("strict", [False, True])
def test_a_generator_that_is_first_called_while_it_is_exported(strict: bool) -> None:
    """The exported graph and the generator itself give the same afterwards."""
    network = _Anchored()
    maps = torch.zeros(1, 1, 2, 3)
    exported = torch.export.export(network, (maps,), strict=strict).module()(maps)
    # Size 8 around (0, 0), (4, 0), ...
    assert exported[:2].tolist() == [[-4, -4, 4, 4], [0, -4, 8, 4]]
    assert network(maps).tolist() == exported.tolist()


class _Anchored(torch.nn.Module):
    """The anchors of a map, as a head makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.anchors = AnchorGenerator(sizes_px=((8.0,),), heights_over_widths=(1.0,))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = LevelShape(height=x.shape[2], width=x.shape[3], stride_px=4)
        return self.anchors([shape], Size(8, 12), dtype=x.dtype, device=x.device)[0]


def test_points_are_the_middles_of_cells() -> None:
    shapes = [LevelShape(height=2, width=3, stride_px=8), LevelShape(height=1, width=1, stride_px=16)]
    fine, coarse = PointGenerator()(shapes, dtype=torch.float64, device=CPU)
    assert fine.tolist() == [[4, 4], [12, 4], [20, 4], [4, 12], [12, 12], [20, 12]]
    assert coarse.tolist() == [[8, 8]]
    assert fine.dtype == torch.float64


def test_points_may_be_the_corners_of_cells() -> None:
    (points,) = PointGenerator(offset=0.0)(
        [LevelShape(height=1, width=2, stride_px=8)], dtype=torch.float32, device=CPU
    )
    assert points.tolist() == [[0, 0], [8, 0]]


def test_points_of_an_empty_level() -> None:
    (points,) = PointGenerator()([LevelShape(height=0, width=3, stride_px=4)], dtype=torch.float32, device=CPU)
    assert points.shape == (0, 2)


def test_points_as_mmdetection(shared: Path) -> None:
    with np.load(shared / "oracles" / "mmdetection" / "maths" / "arrays.npz") as arrays:
        sizes = arrays["anchors/atss/feature_hw"].tolist()
        head, tail = (torch.from_numpy(arrays[f"points/fcos@{end}"]) for end in ("head", "tail"))
    shapes = [
        LevelShape(height=h, width=w, stride_px=stride)
        for (h, w), stride in zip(sizes, (8, 16, 32, 64, 128), strict=True)
    ]
    points = torch.cat(PointGenerator()(shapes, dtype=torch.float32, device=CPU))
    assert len(points) == 1293
    # x, y and twice the stride.
    assert points[:20].tolist() == head[:, :2].tolist()
    assert points[-5:].tolist() == tail[:, :2].tolist()


def test_points_of_a_rounded_up_level() -> None:
    # As torchvision infers it: 480 // 4 = 120 and 608 // 5 = 121 instead of 128.
    generator = PointGenerator(offset=0.0, stride_rule="image_over_grid")
    shape = LevelShape(height=4, width=5, stride_px=128)
    (points,) = generator([shape], Size(480, 608), dtype=torch.float32, device=CPU)
    assert points[6].tolist() == [121, 120]


def test_octave_anchors_as_mmdetection(shared: Path) -> None:
    with np.load(shared / "oracles" / "mmdetection" / "maths" / "arrays.npz") as arrays:
        expected = torch.from_numpy(arrays["anchors/retinanet/cell"])
    cells = torch.cat(octave_anchors((8, 16, 32, 64, 128)).cells)
    # Recorded in float32.
    torch.testing.assert_close(cells.float(), expected, rtol=1e-6, atol=1e-4)
