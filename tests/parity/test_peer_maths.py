"""Coding, anchors, matching, levels, suppression and pooling against MMDetection's and detectron2's recorded operators.

What else their `maths` cases hold is compared beside our own operators: losses, soft NMS, points, resizing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from oracle import Oracle
from torch import Tensor

from rcnn.boxes.coding import DeltaCoder, DistanceCoder
from rcnn.boxes.geometry import centres, clip
from rcnn.dense.fcos import FCOSHead
from rcnn.matching.iou import match_by_iou
from rcnn.ops.nms import class_offset_nms, nms
from rcnn.ops.roi_align import roi_align
from rcnn.priors import AnchorGenerator, octave_anchors
from rcnn.records import LevelShape, Size
from rcnn.roi.pooling import LevelMap

FOUR, FIVE = (4, 8, 16, 32), (8, 16, 32, 64, 128)
FPN_SIZES = tuple((8.0 * stride,) for stride in (*FOUR, 64))


@pytest.fixture(scope="module")
def mmdetection(oracle: Callable[[str], Oracle]) -> Oracle:
    return oracle("mmdetection/maths")


@pytest.fixture(scope="module")
def detectron2(oracle: Callable[[str], Oracle]) -> Oracle:
    return oracle("detectron2/maths")


@pytest.fixture(scope="module")
def torchvision(oracle: Callable[[str], Oracle]) -> Oracle:
    return oracle("torchvision/ops")


# ---------------------------------------------------------------------------------------------------------------- boxes


@pytest.mark.parametrize(
    ("name", "stds"),
    [
        ("1", (1.0, 1.0, 1.0, 1.0)),
        ("0.1", (0.1, 0.1, 0.2, 0.2)),
        ("0.05", (0.05, 0.05, 0.1, 0.1)),
        ("0.033", (0.033, 0.033, 0.067, 0.067)),
    ],
)
def test_mmdetections_coder(mmdetection: Oracle, name: str, stds: tuple[float, float, float, float]) -> None:
    """Its `stds` are the inverse of our weights; sizes are limited on both sides. Recorded in float32."""
    x, y, width, height = stds
    coder = DeltaCoder(weights=(1 / x, 1 / y, 1 / width, 1 / height), symmetric_clamp=True)
    anchors, truth = mmdetection.full("coder/anchors"), mmdetection.full("coder/gt")
    mmdetection.check(f"coder/encode/{name}", coder.encode(truth, anchors))
    deltas = mmdetection.full("coder/deltas") / torch.tensor(stds, dtype=torch.float64)
    boxes = coder.decode(deltas, anchors)
    mmdetection.check(f"coder/decode/{name}", boxes)
    mmdetection.check(f"coder/decode_clip_h250_w280/{name}", clip(boxes, Size(height=250, width=280)))


@pytest.mark.parametrize("weight", [1.0, 10.0, 20.0, 30.0])
def test_detectron2s_coder(detectron2: Oracle, weight: float) -> None:
    """Faster R-CNN's weights and those of the cascade's stages. Recorded in float32 where decoded."""
    size_weight = 1.0 if weight == 1 else weight / 2
    weights = (weight, weight, size_weight, size_weight)
    anchors, truth = detectron2.full("coder/anchors"), detectron2.full("coder/gt")
    coder = DeltaCoder(weights=weights)
    detectron2.check(f"coder/get_deltas/{weight:g}", coder.encode(truth, anchors))
    deltas = detectron2.full("coder/deltas") * torch.tensor(weights, dtype=torch.float64)
    detectron2.check(f"coder/apply_deltas/{weight:g}", coder.decode(deltas, anchors))


def test_detectron2s_linear_coder(detectron2: Oracle) -> None:
    """Its FCOS's distances to the four sides, in sizes of a reference box, none below 0: our head's where a cell's
    reference is as large as its stride. Here references are of any size; what was decoded are magnitudes."""
    anchors, truth = detectron2.full("coder/anchors"), detectron2.full("coder/gt")
    sizes = (anchors[:, 2:] - anchors[:, :2]).repeat(1, 2)
    coder, points = DistanceCoder(), centres(anchors)
    detectron2.check("linear/get_deltas", coder.encode(truth, points) / sizes)
    head = FCOSHead(in_channels=1, channels=1, num_classes=1, strides_px=FIVE, distances="relu", make_norm=None)
    distances = head.to_pixels(detectron2.full("coder/deltas").abs(), sizes)
    detectron2.check("linear/apply_deltas", coder.decode(distances, points))


# -------------------------------------------------------------------------------------------------------------- anchors


def all_anchors(recorded: Oracle, case: str, generator: AnchorGenerator, strides: tuple[int, ...]) -> Tensor:
    """Of all levels, one after the other, cells times anchors of a cell."""
    shapes = [
        LevelShape(height=height, width=width, stride_px=stride)
        for (height, width), stride in zip(recorded.full(f"anchors/{case}/feature_hw").tolist(), strides, strict=True)
    ]
    padded = Size(shapes[0].height * strides[0], shapes[0].width * strides[0])
    of_levels = generator(shapes, padded, dtype=torch.float64, device=torch.device("cpu"))
    return torch.cat(of_levels).reshape(-1, generator.num_per_cell, 4)


@pytest.mark.parametrize(
    ("case", "generator", "strides"),
    [
        ("faster_rcnn", AnchorGenerator(sizes_px=FPN_SIZES), (*FOUR, 64)),
        ("retinanet", octave_anchors(FIVE), FIVE),
        (
            "atss",
            AnchorGenerator(sizes_px=tuple((8.0 * stride,) for stride in FIVE), heights_over_widths=(1.0,)),
            FIVE,
        ),
    ],
)
def test_mmdetections_anchors(
    mmdetection: Oracle, case: str, generator: AnchorGenerator, strides: tuple[int, ...]
) -> None:
    mmdetection.check(f"anchors/{case}/cell", torch.cat(generator.cells))
    mmdetection.check(f"anchors/{case}/all", all_anchors(mmdetection, case, generator, strides).reshape(-1, 4))


@pytest.mark.parametrize(
    ("case", "generator", "strides"),
    [
        ("fpn", AnchorGenerator(sizes_px=FPN_SIZES), (*FOUR, 64)),
        ("c4", AnchorGenerator(sizes_px=((32.0, 64.0, 128.0, 256.0, 512.0),)), (16,)),
        ("retinanet", octave_anchors(FIVE), FIVE),
    ],
)
def test_detectron2s_anchors(
    detectron2: Oracle, case: str, generator: AnchorGenerator, strides: tuple[int, ...]
) -> None:
    """Size by size there, ratio by ratio here. Recorded with the generator's own offset, a half; its configs have 0."""
    generator = replace(generator, centre_offset=0.5)

    def theirs(anchors: Tensor) -> Tensor:
        return anchors.reshape(-1, 3, generator.num_per_cell // 3, 4).transpose(1, 2).reshape(-1, 4)

    detectron2.check(f"anchors/{case}/cell", theirs(torch.cat(generator.cells)))
    detectron2.check(f"anchors/{case}/all", theirs(all_anchors(detectron2, case, generator, strides)))


# -------------------------------------------------------------------------------------------------- matching and levels


@pytest.mark.parametrize(
    ("name", "negative", "positive", "low_quality"),
    [
        ("0.3_0.7/low_quality=True", 0.3, 0.7, 0.0),
        ("0.5/low_quality=False", 0.5, 0.5, None),
        ("0.4_0.5/low_quality=True", 0.4, 0.5, 0.0),
    ],
)
def test_detectron2s_matcher(
    detectron2: Oracle, name: str, negative: float, positive: float, low_quality: float | None
) -> None:
    """Labels of 1 (positive), 0 (negative) and -1 (neither), and the box of each positive."""
    found = match_by_iou(
        detectron2.full("matcher/quality"),
        positive_iou=positive,
        negative_iou=negative,
        low_quality_iou=low_quality,
    )
    detectron2.check(f"matcher/{name}/labels", found.positive.int() - (~found.positive & ~found.negative).int())
    expected = detectron2.full(f"matcher/{name}/matches")[found.positive]
    assert found.gt_index[found.positive].tolist() == expected.tolist()


def test_detectron2s_levels(detectron2: Oracle) -> None:
    rule = LevelMap(epsilon=1e-8, epsilon_place="inside")
    detectron2.check("levels/assigned", rule(detectron2.full("levels/boxes"), FOUR))


# ---------------------------------------------------------------------------------------------- suppression and pooling


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
def test_mmcvs_suppression(mmdetection: Oracle, torchvision: Oracle, threshold: float) -> None:
    """The same boxes stay; only those of equal scores come in another order, because its sort is not stable."""
    boxes, scores = (torchvision.full(f"nms/{name}").float() for name in ("boxes", "scores"))
    labels = torchvision.full("nms/labels").long()
    found = {"nms": nms(boxes, scores, threshold), "batched_nms": class_offset_nms(boxes, scores, labels, threshold)}
    for name, kept in found.items():
        recorded = mmdetection.full(f"{name}/keep/{threshold}")
        torch.testing.assert_close(scores[kept], scores[recorded], rtol=0, atol=0)
        assert set(kept.tolist()) == set(recorded.tolist())


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [0, 1, 2])
def test_mmcvs_roi_align(mmdetection: Oracle, torchvision: Oracle, aligned: bool, ratio: int) -> None:
    features, rois = torchvision.full("roi/input"), torchvision.full("roi/rois_batch_xyxy")
    # Without the one of negative size, on which its operator stops.
    rois = rois[(rois[:, 3] >= rois[:, 1]) & (rois[:, 4] >= rois[:, 2])]
    found = roi_align(
        [features],
        rois[:, 1:],
        rois[:, 0].long(),
        torch.zeros(len(rois), dtype=torch.int64),
        scales=[(0.125, 0.125)],
        output_size=7,
        sampling_ratio=ratio,
        aligned=aligned,
    )
    mmdetection.check(f"roi_align/aligned={aligned}/sampling={ratio}/out=7x7", found)
