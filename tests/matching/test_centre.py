"""FCOS's matching: worked by hand, and as MMDetection and torchvision recorded it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rcnn.boxes.coding import DistanceCoder
from rcnn.matching.centre import CentreMatcher
from rcnn.priors import PointGenerator
from rcnn.records import LevelShape, Size, Target

CPU = torch.device("cpu")
STRIDES = (8, 16)
# Points (4, 4), (12, 4), (20, 4), (28, 4) of 8 px, and (8, 8), (24, 8) of 16 px.
POINTS = [torch.tensor([[4.0, 4], [12, 4], [20, 4], [28, 4]]), torch.tensor([[8.0, 8], [24, 8]])]


def target(*boxes: tuple[float, float, float, float], ignore: tuple[tuple[float, ...], ...] = ()) -> Target:
    return Target(
        boxes_xyxy=torch.tensor(boxes).reshape(-1, 4),
        labels=torch.zeros(len(boxes), dtype=torch.int64),
        ignore_xyxy=torch.tensor(ignore).reshape(-1, 4),
    )


def positives(matcher: CentreMatcher, given: Target) -> dict[int, int]:
    """Number of the box by number of the point."""
    matches = matcher(POINTS, STRIDES, given)
    assert not (matches.positive & matches.negative).any()
    return {int(point): int(matches.gt_index[point]) for point in matches.positive.nonzero().flatten()}


def test_ranges_follow_the_strides() -> None:
    expected = [(0, 64), (64, 128), (128, 256), (256, 512), (512, math.inf)]
    assert CentreMatcher().ranges_px((8, 16, 32, 64, 128)) == expected
    assert CentreMatcher().ranges_px((16,)) == [(0, math.inf)]
    assert CentreMatcher(range_strides=4.0).ranges_px((8, 32)) == [(0, 32), (32, math.inf)]


def test_every_point_in_a_box() -> None:
    # Farthest sides of 4..16 px: the finer level's. The point (12, 4) lies on the right side, not inside.
    assert positives(CentreMatcher(), target((0, 0, 12, 8))) == {0: 0}
    assert positives(CentreMatcher(), target((0, 0, 13, 8))) == {0: 0, 1: 0}


def test_a_large_box_belongs_to_the_coarser_level() -> None:
    # With ranges of 0..16 and 16..: from (4, 4) to the right side of 0..24 it is 20, from (12, 4) 12.
    matcher = CentreMatcher(range_strides=2.0)
    assert positives(matcher, target((0, 0, 24, 8.5))) == {1: 0, 4: 0}


@pytest.mark.parametrize(("ends", "found"), [("included", {0: 0, 4: 0}), ("excluded", {})])
def test_a_side_at_a_limit(ends: str, found: dict[int, int]) -> None:
    # Ranges of 0..16 and 16..: 16 px from (4, 4) to the right side at 20, and from (8, 8) to that at 24.
    matcher = CentreMatcher(range_strides=2.0, range_ends=ends)  # type: ignore[arg-type]
    first = positives(matcher, target((0, 0, 20, 5)))
    second = positives(matcher, target((0, 7, 24, 9)))
    assert {key: value for key, value in first.items() if key == 0} | second == found


def test_the_smallest_box_wins() -> None:
    boxes = target((0, 0, 32, 8), (9, 0, 22, 8), (8, 0, 24, 8))
    # 256, 104 and 128 px: the second has the points at 12 and 20. (8, 8) lies on edges.
    assert positives(CentreMatcher(), boxes) == {0: 0, 1: 1, 2: 1, 3: 0}


def test_of_equal_boxes_the_first_wins() -> None:
    assert positives(CentreMatcher(), target((0, 0, 12, 8), (0, 0, 12, 8))) == {0: 0}


def test_only_near_the_centre() -> None:
    # Centre (16, 4): 12 px = 1.5 strides away from 4 and 28, which is too far; 4 px from the others.
    box = target((0, 0, 32, 8))
    assert positives(CentreMatcher(radius_strides=1.5), box) == {1: 0, 2: 0}
    assert positives(CentreMatcher(radius_strides=1.6), box) == {0: 0, 1: 0, 2: 0, 3: 0}


def test_the_radius_is_in_strides_of_the_level() -> None:
    # Ranges 0..16 and 16..; centre (15, 6). From 8 and 24 it is 7 and 9 px, of 16 px strides.
    matcher = CentreMatcher(radius_strides=0.5, range_strides=2.0)
    assert positives(matcher, target((-10, -3, 40, 15))) == {4: 0}


def test_ignore_regions() -> None:
    given = target((0, 0, 12, 8), ignore=((0.0, 0.0, 25.0, 9.0),))
    matches = CentreMatcher()(POINTS, STRIDES, given)
    assert matches.positive.nonzero().flatten().tolist() == [0]
    # All others lie in it but for (28, 4).
    assert matches.negative.nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("given", [target(), target((4, 4, 4, 4)), target((0, 0, 32, 0)), target((math.nan, 0, 8, 8))])
def test_nothing_to_find(given: Target) -> None:
    matches = CentreMatcher()(POINTS, STRIDES, given)
    assert not matches.positive.any()
    assert matches.negative.all()
    assert not matches.gt_index.any()


def test_no_points() -> None:
    matches = CentreMatcher()([torch.zeros(0, 2)], (8,), target((0, 0, 4, 4)))
    assert matches.positive.shape == (0,)


# --------------------------------------------------------------------------------------------------------- recorded

# Both peers trained on 480 x 608: cells of P3 to P7.
PADDED = Size(height=480, width=608)
SHAPES = [
    LevelShape(height=math.ceil(480 / stride), width=math.ceil(608 / stride), stride_px=stride)
    for stride in (8, 16, 32, 64, 128)
]


def recorded(shared: Path, case: str) -> dict[str, Tensor]:
    with np.load(shared / "oracles" / case / "arrays.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files if "/assign/" in name or "/gt_" in name}


@pytest.mark.parametrize("stage", ["train", "train_empty"])
@pytest.mark.parametrize("picture", [0, 1])
def test_as_mmdetection(shared: Path, stage: str, picture: int) -> None:
    arrays = recorded(shared, "mmdetection/fcos_r50-caffe_fpn_gn-head_1x")
    boxes = arrays[f"{stage}/pre/gt_boxes/{picture}"]
    points = PointGenerator()(SHAPES, dtype=torch.float64, device=CPU)
    matches = CentreMatcher()(points, [shape.stride_px for shape in SHAPES], target_of(boxes))
    expected = arrays[f"{stage}/assign/positive_index/{picture}"]
    assert matches.positive.nonzero().flatten().tolist() == expected.tolist()
    counts = [int(matches.positive.sum()), int(matches.negative.sum())]
    assert counts == arrays[f"{stage}/assign/num_pos_neg/{picture}"].tolist()
    distances = DistanceCoder().encode(boxes[matches.gt_index[expected]], torch.cat(points)[expected])
    torch.testing.assert_close(distances, arrays[f"{stage}/assign/positive_ltrb_targets/{picture}"].double())


@pytest.mark.parametrize("picture", [0, 1])
def test_as_torchvision(shared: Path, picture: int) -> None:
    arrays = recorded(shared, "torchvision/fcos_resnet50_fpn")
    boxes = arrays[f"train/pre/gt_boxes/{picture}"].double()
    # Its P6 and P7 have cells of 60 px, and of 120 x 121.
    points = PointGenerator(offset=0.0, stride_rule="image_over_grid")(SHAPES, PADDED, dtype=torch.float64, device=CPU)
    matcher = CentreMatcher(radius_strides=1.5, range_ends="excluded")
    matches = matcher(points, [shape.stride_px for shape in SHAPES], target_of(boxes))
    expected = arrays[f"train/assign/positive_anchor_index/{picture}"]
    assert matches.positive.nonzero().flatten().tolist() == expected.tolist()
    assert matches.gt_index[expected].tolist() == arrays[f"train/assign/positive_matched_gt/{picture}"].tolist()


def target_of(boxes: Tensor) -> Target:
    boxes = boxes.double().reshape(-1, 4)
    return Target(boxes_xyxy=boxes, labels=torch.zeros(len(boxes), dtype=torch.int64))
