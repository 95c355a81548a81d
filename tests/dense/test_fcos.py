"""FCOS: torchvision's with equal weights, MMDetection's recorded matching and losses worked by hand, the contract."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from peers import (
    CASES,
    CHANNELS,
    STRIDES,
    TARGETS,
    NoBackbone,
    Peer,
    assert_equal_detections,
    assert_equal_losses,
    pyramid,
    spread,
    truth,
)
from torchvision.models.detection.fcos import FCOS

from rcnn.boxes.filtering import DetectionFilter
from rcnn.dense.contract import assert_is_dense_head
from rcnn.dense.fcos import FCOSHead
from rcnn.dense.interface import DensePrediction
from rcnn.matching.centre import CentreMatcher
from rcnn.priors import PointGenerator
from rcnn.records import Levels, LevelShape, Size, Target

NUM_CLASSES = 5
TERMS = {"classification": "classification", "box": "bbox_regression", "centerness": "bbox_ctrness"}


def torchvisions_choices(num_classes: int = NUM_CLASSES, channels: int = CHANNELS) -> FCOSHead:
    return FCOSHead(
        in_channels=channels,
        num_classes=num_classes,
        strides_px=STRIDES,
        channels=channels,
        conv_bias=True,
        scaled=False,
        centerness_branch="boxes",
        distances="relu",
        points=PointGenerator(offset=0.0, stride_rule="image_over_grid"),
        matcher=CentreMatcher(radius_strides=1.5, range_ends="excluded"),
        box_loss="giou",
        box_weights="equal",
        score_fusion="sqrt",
    )


@pytest.fixture(scope="module")
def pair() -> tuple[FCOSHead, Peer]:
    """Our head and torchvision's with the same numbers."""
    peer = FCOS(NoBackbone(), NUM_CLASSES, score_thresh=0.1).double()
    spread(peer.head)
    head = torchvisions_choices().double()
    theirs = peer.head.state_dict()
    state = {}
    for branch, tower in (("classification_head", "class_tower"), ("regression_head", "box_tower")):
        for number in range(4):
            for part in (0, 1):
                for kind in ("weight", "bias"):
                    value = theirs[f"{branch}.conv.{3 * number + part}.{kind}"]
                    state[f"tower.{tower}.layers.{number}.{part}.{kind}"] = value
    outputs = {
        "classes": "classification_head.cls_logits",
        "distances": "regression_head.bbox_reg",
        "centerness": "regression_head.bbox_ctrness",
    }
    state |= {
        f"tower.{ours}.{kind}": theirs[f"{name}.{kind}"]
        for ours, name in outputs.items()
        for kind in ("weight", "bias")
    }
    head.load_state_dict(state)
    return head, Peer(peer)


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_as_torchvision(pair: tuple[FCOSHead, Peer], case: str) -> None:
    head, peer = pair
    head.zero_grad()
    peer.model.zero_grad()
    levels = pyramid()
    theirs = peer.losses(levels, CASES[case], [shape.height * shape.width for shape in levels.shapes])
    assert_equal_losses(head, head.loss(head(levels), CASES[case]), theirs, peer.model, TERMS)


def test_detections_as_torchvision(pair: tuple[FCOSHead, Peer]) -> None:
    head, peer = pair
    levels = pyramid()
    with torch.no_grad():
        candidates = head.decode(head(levels), per_level=1000, score_threshold=0.1)
        chosen = DetectionFilter(score_threshold=0.1, nms_iou=0.6, max_detections=100, min_side_px=0.0)
        ours = [chosen(found.boxes_xyxy, found.scores, found.labels) for found in candidates]
        assert_equal_detections(ours, peer.detections(levels))


# ---------------------------------------------------------------------------------------------------------- by hand

# One level of 2 x 2 cells of 8 px: points (4, 4), (12, 4), (4, 12), (12, 12).
SHAPE = LevelShape(height=2, width=2, stride_px=8)
SIZE = Size(height=16, width=16)


def one_level(**choices: object) -> FCOSHead:
    torch.manual_seed(0)
    return FCOSHead(in_channels=2, num_classes=2, strides_px=(8,), channels=4, num_convs=1, **choices)  # type: ignore[arg-type]


def prediction(raw_distance: float = 0.0, quality: float = 0.0, dtype: torch.dtype = torch.float32) -> DensePrediction:
    """Class logits of 0, all raw distances alike, all centerness logits alike."""
    levels = Levels(
        maps=(torch.zeros(1, 2, 2, 2),),
        shapes=(SHAPE,),
        padded_size=SIZE,
        image_sizes=(SIZE,),
        image_scales=(1.0,),
        num_roi_levels=1,
    )
    return DensePrediction(
        classes=(torch.zeros(1, 2, 2, 2, dtype=dtype),),
        boxes=(torch.full((1, 4, 2, 2), raw_distance, dtype=dtype),),
        quality=(torch.full((1, 1, 2, 2), quality, dtype=dtype),),
        levels=levels,
    )


# Around (4, 4) alone: 4 left, 4 up, 6 right, 4 down. Centerness: sqrt(4/6 * 4/4).
BOX = truth((0, 0, 10, 8), labels=[1])
CENTERNESS = math.sqrt(4 / 6)


def focal_sum(positives: int, logits: int = 8) -> float:
    """Of logits of 0: ln 2 / 4, times 1/4 for a positive and 3/4 for a negative."""
    return math.log(2) / 4 * (positives * 0.25 + (logits - positives) * 0.75)


def test_losses_by_hand() -> None:
    # Distances of e^ln 4 = 4: 0..8 x 0..8, of which all 64 px lie in the 80 px of the box.
    found = one_level().loss(prediction(math.log(4)), [BOX])
    assert found["classification"].item() == pytest.approx(focal_sum(1))
    # Weighted by the centerness and divided by its sum, which is the same number: -ln(64 / 80).
    assert found["box"].item() == pytest.approx(math.log(80 / 64))
    # -c ln(1/2) - (1 - c) ln(1/2).
    assert found["centerness"].item() == pytest.approx(math.log(2))


def test_losses_of_two_positives_are_weighted_with_their_centerness() -> None:
    # (4, 4) and (12, 4) in 0..15 x 0..8: centerness sqrt(4/11) and sqrt(3/12); IoU of 8 x 8 in 120: 64 / 120, and of
    # 8..16 x 0..8 with 7 x 8 = 56 shared: 56 / (64 + 120 - 56).
    one, two = math.sqrt(4 / 11), 0.5
    given, box = prediction(math.log(4)), truth((0, 0, 15, 8))
    expected = (one * math.log(120 / 64) + two * math.log(128 / 56)) / (one + two)
    assert one_level().loss(given, [box])["box"].item() == pytest.approx(expected)
    equal = one_level(box_weights="equal").loss(given, [box])["box"].item()
    assert equal == pytest.approx((math.log(120 / 64) + math.log(128 / 56)) / 2)


def test_distances_in_strides() -> None:
    # Half a stride of 8 px: the same boxes.
    found = one_level(distances="relu").loss(prediction(0.5), [BOX])
    assert found["box"].item() == pytest.approx(math.log(80 / 64))
    (candidates,) = one_level(distances="relu").decode(prediction(0.5), per_level=1, score_threshold=0.0)
    assert candidates.boxes_xyxy.shape == (1, 4)
    assert (candidates.boxes_xyxy[0, 2:] - candidates.boxes_xyxy[0, :2]).tolist() == [8, 8]
    # What is below 0 is a distance of 0.
    (none,) = one_level(distances="relu").decode(prediction(-1.0), per_level=None, score_threshold=0.0)
    assert not (none.boxes_xyxy[:, 2:] - none.boxes_xyxy[:, :2]).any()


def test_no_boxes() -> None:
    found = one_level().loss(prediction(), [truth()])
    # All eight logits negative, divided by one.
    assert found["classification"].item() == pytest.approx(focal_sum(0))
    assert found["box"].item() == found["centerness"].item() == 0


def test_points_in_ignore_regions_are_no_negatives() -> None:
    # Of the three negative points the two lower ones lie in the region: two logits less for each.
    target = Target(boxes_xyxy=BOX.boxes_xyxy, labels=BOX.labels, ignore_xyxy=torch.tensor([[0.0, 9.0, 16.0, 16.0]]))
    found = one_level().loss(prediction(), [target])
    assert found["classification"].item() == pytest.approx(focal_sum(1, logits=4))


def test_scores_are_class_scores_times_centerness() -> None:
    (found,) = one_level().decode(prediction(quality=math.log(3)), per_level=None, score_threshold=0.5)
    # sigmoid(0) * sigmoid(ln 3) = 1/2 * 3/4, and the threshold is of the class score.
    torch.testing.assert_close(found.scores, torch.full((8,), 0.375))
    (rooted,) = one_level(score_fusion="sqrt").decode(prediction(quality=math.log(3)), per_level=1, score_threshold=0.0)
    torch.testing.assert_close(rooted.scores, torch.tensor([math.sqrt(0.375)]))


def test_where_centerness_is_read() -> None:
    levels = Levels(
        maps=(torch.randn(1, 2, 2, 2),),
        shapes=(SHAPE,),
        padded_size=SIZE,
        image_sizes=(SIZE,),
        image_scales=(1.0,),
        num_roi_levels=1,
    )
    for branch, silent in (("classes", "box_tower"), ("boxes", "class_tower")):
        head = one_level(centerness_branch=branch)
        before = head(levels).quality[0]
        for parameter in getattr(head.tower, silent).parameters():
            parameter.data.zero_()
        torch.testing.assert_close(head(levels).quality[0], before)


def test_every_level_has_its_scale() -> None:
    head = FCOSHead(in_channels=4, num_classes=1, strides_px=(8, 16), channels=4, num_convs=0)
    names = {name for name, _ in head.named_parameters() if "scale" in name}
    assert names == {"tower.scales.0.scale", "tower.scales.1.scale"}
    x = torch.randn(1, 4, 3, 3)
    before = head.tower(x, 0)[1]
    head.tower.scales[1].scale.data.fill_(3.0)  # type: ignore[union-attr]
    torch.testing.assert_close(head.tower(x, 1)[1], 3 * before)


def test_the_start() -> None:
    head = one_level()
    torch.testing.assert_close(head.tower.classes.bias, torch.full((2,), -math.log(99)))
    assert not head.tower.distances.bias.any()  # type: ignore[union-attr]


def test_half_precision_maps_are_widened() -> None:
    losses = one_level().loss(prediction(math.log(4), dtype=torch.bfloat16), [BOX])
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    # e^ln 4 of a rounded logarithm.
    assert losses["box"].item() == pytest.approx(math.log(80 / 64), abs=0.02)


def small(**choices: object) -> Callable[[int], FCOSHead]:
    def make(num_classes: int) -> FCOSHead:
        torch.manual_seed(0)
        return FCOSHead(in_channels=8, num_classes=num_classes, strides_px=STRIDES, channels=8, num_convs=1, **choices)  # type: ignore[arg-type]

    return make


IMPROVED = {
    "matcher": CentreMatcher(radius_strides=1.5),
    "centerness_branch": "boxes",
    "distances": "relu",
    "box_loss": "giou",
}


@pytest.mark.parametrize("choices", [{}, IMPROVED], ids=["default", "improved"])
def test_the_contract(choices: dict[str, object]) -> None:
    assert_is_dense_head(small(**choices), in_channels=8, strides_px=STRIDES)


def test_targets_are_matched_on_every_level(pair: tuple[FCOSHead, Peer]) -> None:
    """The cases above ask something of the matching: boxes on several levels."""
    head, _ = pair
    given = head(pyramid())
    points = head.make_points(given)
    positive = head.match(points, given.levels.shapes, TARGETS[0]).positive
    assert [int(part.sum()) > 0 for part in positive.split([len(some) for some in points])].count(True) >= 2
