"""Boxes, coding, matching, anchors and levels against torchvision's recorded operators, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oracle import Oracle

from rcnn.boxes.coding import DeltaCoder
from rcnn.boxes.geometry import clip, giou, has_min_side, iou
from rcnn.matching.iou import Matches, match_by_iou
from rcnn.priors import AnchorGenerator
from rcnn.records import LevelShape, Size
from rcnn.roi.pooling import LevelMap


@pytest.fixture(scope="module")
def ops(oracle: Callable[[str], Oracle]) -> Oracle:
    return oracle("torchvision/ops")


def test_overlaps(ops: Oracle) -> None:
    a, b = ops.full("iou/a"), ops.full("iou/b")
    ops.check("iou/box_iou", iou(a, b), rtol=1e-12)
    ops.check("iou/generalized_box_iou", giou(a, b), rtol=1e-12)


def test_limits(ops: Oracle) -> None:
    boxes = ops.full("iou/a")
    ops.check("clip/out_h60_w70", clip(boxes, Size(height=60, width=70)), rtol=1e-12)
    ops.check("small/keep_min10", has_min_side(boxes, 10).nonzero().flatten())


@pytest.mark.parametrize(("case", "weights"), [("w1", (1.0, 1.0, 1.0, 1.0)), ("w10", (10.0, 10.0, 5.0, 5.0))])
def test_delta_coding(ops: Oracle, case: str, weights: tuple[float, float, float, float]) -> None:
    coder = DeltaCoder(weights=weights)
    anchors = ops.full("coder/anchors")
    ops.check(f"coder/encode/{case}", coder.encode(ops.full("coder/gt"), anchors), rtol=1e-12)
    deltas = ops.full("coder/deltas") * torch.tensor(weights, dtype=torch.float64)
    ops.check(f"coder/decode/{case}", coder.decode(deltas, anchors), rtol=1e-12)


def as_recorded(matches: Matches) -> torch.Tensor:
    """torchvision's coding: the ground truth's index, -1 for a negative, -2 for neither."""
    coded = torch.where(matches.positive, matches.gt_index, torch.full_like(matches.gt_index, -2))
    return torch.where(matches.negative, torch.full_like(coded, -1), coded)


@pytest.mark.parametrize(
    ("positive", "negative", "low_quality"), [(0.7, 0.3, True), (0.7, 0.3, False), (0.5, 0.5, False), (0.5, 0.4, True)]
)
def test_matching(ops: Oracle, positive: float, negative: float, low_quality: bool) -> None:
    matches = match_by_iou(
        ops.full("matcher/quality"),
        positive_iou=positive,
        negative_iou=negative,
        low_quality_iou=0.0 if low_quality else None,
    )
    assert not (matches.positive & matches.negative).any()
    ops.check(f"matcher/hi={positive}/lo={negative}/low_quality={low_quality}", as_recorded(matches))


FIVE_SIZES = (32.0, 64.0, 128.0, 256.0, 512.0)
# torchvision's defaults; RetinaNet's sizes are x, int(x * 2^(1/3)), int(x * 2^(2/3)).
SIZES = {
    "fpn": tuple((size,) for size in FIVE_SIZES),
    "mobilenet": (FIVE_SIZES,) * 3,
    "retinanet": ((32, 40, 50), (64, 80, 101), (128, 161, 203), (256, 322, 406), (512, 645, 812)),
}


@pytest.mark.parametrize("case", SIZES)
def test_anchors(ops: Oracle, case: str) -> None:
    generator = AnchorGenerator(sizes_px=SIZES[case], rounded=True, stride_rule="image_over_grid")
    ops.check(f"anchors/{case}/cell", torch.cat(generator.cells))
    grids, size = ops.full(f"anchors/{case}/feature_hw").tolist(), Size(*ops.full(f"anchors/{case}/image_hw").tolist())
    # The nominal stride is not looked at by this rule: zero shows it.
    shapes = [LevelShape(height=height, width=width, stride_px=0) for height, width in grids]
    anchors = generator(shapes, size, dtype=torch.float64, device=torch.device("cpu"))
    ops.check(f"anchors/{case}/all", torch.cat(anchors))


@pytest.mark.parametrize(
    ("case", "level_map"),
    [
        ("multiscale", LevelMap()),
        ("multiscale_s112_l3_sampling0_out3x5", LevelMap(canonical_size_px=112, canonical_level=3)),
    ],
)
def test_levels_of_regions(ops: Oracle, case: str, level_map: LevelMap) -> None:
    boxes = torch.cat([ops.full("multiscale/boxes/0"), ops.full("multiscale/boxes/1")])
    strides = (1 / ops.full("multiscale/scales")).round().int().tolist()
    assert strides == [4, 8, 16, 32]
    ops.check(f"{case}/levels", level_map(boxes, strides))
