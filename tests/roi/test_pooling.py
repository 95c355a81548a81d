"""Which level a region belongs to, and the order in which regions are pooled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rcnn.records import Levels, LevelShape, Size
from rcnn.roi.pooling import LevelMap, RoIPooling, align, quantised

STRIDES = (4, 8, 16, 32)


def squares(*sides: float) -> Tensor:
    return torch.tensor([[0.0, 0.0, side, side] for side in sides], dtype=torch.float64)


def test_the_papers_rule() -> None:
    # 224 belongs to level 4 (stride 16, index 2); each doubling is one more; the ends take the rest.
    found = LevelMap()(squares(1, 55, 112, 200, 224, 447, 448, 5000), STRIDES)
    assert found.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_side_on_the_border_belongs_above() -> None:
    # log2(223.9999 / 224) = -6.4e-7, less than the epsilon of 1e-6.
    assert LevelMap()(squares(223.9999, 224), STRIDES).tolist() == [2, 2]
    assert LevelMap(epsilon=0)(squares(223.9999, 224), STRIDES).tolist() == [1, 2]


def test_where_the_epsilon_stands() -> None:
    # 223.9999 / 224 = 1 - 4.5e-7: the logarithm to base 2 is -6.4e-7. An epsilon of 5e-7 lifts the ratio to 1 and
    # above, inside; outside it leaves -1.4e-7.
    side = squares(223.9999)
    assert LevelMap(epsilon=5e-7, epsilon_place="inside")(side, STRIDES).tolist() == [2]
    assert LevelMap(epsilon=5e-7, epsilon_place="outside")(side, STRIDES).tolist() == [1]


# P3 to P7: 224 px belong to the map with stride 16, the second one.
COARSE_STRIDES = (8, 16, 32, 64, 128)
SIDES = (1, 111, 112, 223, 224, 447, 448, 895, 896, 1791, 1792, 9000)


def test_a_pyramid_from_p3_up() -> None:
    # Sides from 224 up to 448 are level 4 (stride 16); below is P3, which takes all that P2 would; P7 begins at 1792.
    assert LevelMap()(squares(*SIDES), COARSE_STRIDES).tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_mmdetections_rule_counts_from_the_first_map() -> None:
    rule = LevelMap(canonical_size_px=56, canonical_level=0, epsilon_place="inside", count="by_position")
    # floor(log2(side / 56)) is 1 from 112 up, 2 from 224 up: one map coarser than the paper's.
    assert rule(squares(*SIDES), COARSE_STRIDES).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 4, 4]
    # From P2 up the two rules are one.
    assert rule(squares(*SIDES), STRIDES).tolist() == LevelMap()(squares(*SIDES), STRIDES).tolist()


@pytest.mark.parametrize("num_levels", [4, 5])
def test_mmdetections_recorded_levels(shared: Path, num_levels: int) -> None:
    rule = LevelMap(canonical_size_px=56, canonical_level=0, epsilon_place="inside", count="by_position")
    with np.load(shared / "oracles/mmdetection/maths/arrays.npz") as arrays:
        boxes = torch.from_numpy(arrays["levels/rois"][:, 1:])
        recorded = arrays[f"levels/assigned_{num_levels}_levels"].tolist()
    for strides in (STRIDES, COARSE_STRIDES)[num_levels - 4 :]:
        assert rule(boxes, strides[:num_levels]).tolist() == recorded


def test_levels_of_one_stride() -> None:
    """torchvision's MobileNet detectors: every region comes from the first map."""
    assert LevelMap()(squares(1, 224, 5000), (32, 32)).tolist() == [0, 0, 0]


def test_a_region_without_area_belongs_to_the_finest() -> None:
    assert LevelMap()(squares(0), STRIDES).tolist() == [0]


def test_no_region() -> None:
    assert LevelMap()(torch.zeros(0, 4), STRIDES).shape == (0,)


def levels(*maps: Tensor, strides: tuple[int, ...], num_roi_levels: int) -> Levels:
    size = Size(64, 64)
    return Levels(
        maps=maps,
        shapes=tuple(
            LevelShape(height=x.shape[2], width=x.shape[3], stride_px=stride)
            for x, stride in zip(maps, strides, strict=True)
        ),
        padded_size=size,
        image_sizes=(size, size),
        image_scales=(1.0, 1.0),
        num_roi_levels=num_roi_levels,
    )


@pytest.mark.parametrize("pool", [align(sampling_ratio=2, aligned=False), quantised()])
def test_regions_come_back_picture_by_picture(pool) -> None:
    """Each map is constant, with its own number for each picture: what is pooled says where it came from."""

    def constant(size: int, *values: float) -> Tensor:
        return torch.tensor(values, dtype=torch.float32).reshape(2, 1, 1, 1).expand(2, 3, size, size).contiguous()

    # The last map is for anchors alone.
    pyramid = levels(constant(16, 1, 2), constant(8, 10, 20), constant(4, 7, 7), strides=(4, 8, 16), num_roi_levels=2)
    pooling = RoIPooling(output_size=2, pool=pool, level_map=LevelMap(canonical_size_px=32, canonical_level=3))
    small, large = [0.0, 0, 16, 16], [0.0, 0, 48, 48]
    pooled = pooling(pyramid, [torch.tensor([large, small]), torch.tensor([small, large, small])])
    assert pooled.shape == (5, 3, 2, 2)
    assert pooled.mean((1, 2, 3)).tolist() == [10, 1, 2, 20, 2]


@pytest.mark.parametrize("pool", [align(sampling_ratio=0, aligned=True), quantised()])
def test_pictures_without_regions(pool) -> None:
    pyramid = levels(torch.zeros(2, 3, 16, 16, requires_grad=True), strides=(4,), num_roi_levels=1)
    pooled = RoIPooling(output_size=2, pool=pool)(pyramid, [torch.zeros(0, 4), torch.zeros(0, 4)])
    assert pooled.shape == (0, 3, 2, 2)
    pooled.sum().backward()
