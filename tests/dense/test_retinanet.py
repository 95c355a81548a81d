"""RetinaNet: torchvision's with equal weights, normalisation worked by hand, the contract."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peers import (
    CASES,
    CHANNELS,
    STRIDES,
    NoBackbone,
    Peer,
    assert_equal_detections,
    assert_equal_losses,
    pyramid,
    spread,
    truth,
)
from torchvision.models.detection.retinanet import RetinaNet, _default_anchorgen

from rcnn.boxes.coding import DeltaCoder
from rcnn.boxes.filtering import DetectionFilter
from rcnn.dense.contract import assert_is_dense_head
from rcnn.dense.interface import DensePrediction
from rcnn.dense.normalizers import MovingNormalizer, by_batch, by_picture
from rcnn.dense.retinanet import DecodedGIoULoss, RetinaNetHead
from rcnn.matching.iou import IoUMatcher
from rcnn.priors import AnchorGenerator
from rcnn.records import Levels, LevelShape, Size, Target

NUM_CLASSES = 5
TERMS = {"classification": "classification", "box": "bbox_regression"}


def torchvisions_choices() -> RetinaNetHead:
    sizes = tuple(tuple(int(4 * stride * 2 ** (k / 3)) for k in range(3)) for stride in STRIDES)
    return RetinaNetHead(
        in_channels=CHANNELS,
        num_classes=NUM_CLASSES,
        strides_px=STRIDES,
        channels=CHANNELS,
        anchors=AnchorGenerator(sizes_px=sizes, rounded=True, stride_rule="image_over_grid"),
        matcher=IoUMatcher(positive_iou=0.5, negative_iou=0.4, low_quality_iou=0.0),
        coder=DeltaCoder(),
        normalizer=by_picture,
        size_divisor_px=None,
    )


@pytest.fixture(scope="module")
def pair() -> tuple[RetinaNetHead, Peer]:
    """Our head and torchvision's with the same numbers."""
    peer = RetinaNet(NoBackbone(), NUM_CLASSES, anchor_generator=_default_anchorgen(), score_thresh=0.6).double()
    spread(peer.head)
    head = torchvisions_choices().double()
    theirs = peer.head.state_dict()
    state = {}
    for branch, tower in (("classification_head", "class_tower"), ("regression_head", "box_tower")):
        for number in range(4):
            for kind in ("weight", "bias"):
                state[f"tower.{tower}.layers.{number}.0.{kind}"] = theirs[f"{branch}.conv.{number}.0.{kind}"]
    outputs = {"classes": "classification_head.cls_logits", "deltas": "regression_head.bbox_reg"}
    state |= {
        f"tower.{ours}.{kind}": theirs[f"{name}.{kind}"]
        for ours, name in outputs.items()
        for kind in ("weight", "bias")
    }
    head.load_state_dict(state)
    return head, Peer(peer)


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_as_torchvision(pair: tuple[RetinaNetHead, Peer], case: str) -> None:
    head, peer = pair
    head.zero_grad()
    peer.model.zero_grad()
    levels = pyramid()
    theirs = peer.losses(levels, CASES[case])
    assert_equal_losses(head, head.loss(head(levels), CASES[case]), theirs, peer.model, TERMS)


@pytest.mark.parametrize("case", CASES)
def test_losses_of_the_boxes_themselves_as_torchvisions_second_retinanet(
    pair: tuple[RetinaNetHead, Peer], case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `retinanet_resnet50_fpn_v2` sets it."""
    head, peer = pair
    monkeypatch.setattr(peer.model.head.regression_head, "_loss_type", "giou")
    monkeypatch.setattr(head, "box_loss", DecodedGIoULoss())
    test_losses_and_gradients_as_torchvision(pair, case)


def test_detections_as_torchvision(pair: tuple[RetinaNetHead, Peer]) -> None:
    head, peer = pair
    levels = pyramid()
    with torch.no_grad():
        candidates = head.decode(head(levels), per_level=1000, score_threshold=0.6)
        chosen = DetectionFilter(score_threshold=0.6, nms_iou=0.5, max_detections=300, min_side_px=0.0)
        ours = [chosen(found.boxes_xyxy, found.scores, found.labels) for found in candidates]
        assert_equal_detections(ours, peer.detections(levels))


# ---------------------------------------------------------------------------------------------------------- by hand

# 2 x 2 cells of 8 px, an anchor of 8 x 8 around the corner of each: (0, 0), (8, 0), (0, 8), (8, 8).
SHAPE = LevelShape(height=2, width=2, stride_px=8)
SIZE = Size(height=16, width=16)
ANCHORS = AnchorGenerator(sizes_px=((8.0,),), heights_over_widths=(1.0,))


def one_level(**choices: object) -> RetinaNetHead:
    torch.manual_seed(0)
    given = {"anchors": ANCHORS} | choices
    return RetinaNetHead(in_channels=2, num_classes=2, strides_px=(8,), channels=4, num_convs=1, **given)  # type: ignore[arg-type]


def prediction(num_images: int = 1, sizes: tuple[Size, ...] = ()) -> DensePrediction:
    """Logits and deltas of 0."""
    levels = Levels(
        maps=(torch.zeros(num_images, 2, 2, 2),),
        shapes=(SHAPE,),
        padded_size=SIZE,
        image_sizes=sizes or (SIZE,) * num_images,
        image_scales=(1.0,) * num_images,
        num_roi_levels=1,
    )
    return DensePrediction(
        classes=(torch.zeros(num_images, 2, 2, 2),), boxes=(torch.zeros(num_images, 4, 2, 2),), levels=levels
    )


def focal_sum(positives: int, logits: int) -> float:
    """Of logits of 0: ln 2 / 4, times 1/4 for a positive and 3/4 for a negative."""
    return math.log(2) / 4 * (positives * 0.25 + (logits - positives) * 0.75)


# The anchor at (8, 8), 4..12, moved by a quarter of its width: IoU 48 / 80 = 0.6. The one at (8, 0), 4..12 x -4..4,
# touches it, and so do the others at most.
BOX = truth((6, 4, 14, 12), labels=[1])


def test_losses_by_hand() -> None:
    found = one_level().loss(prediction(), [BOX])
    assert found["classification"].item() == pytest.approx(focal_sum(1, 8))
    # |0 - 2/8|, and nothing for the other three numbers.
    assert found["box"].item() == pytest.approx(0.25)


def test_the_loss_of_a_box_by_hand() -> None:
    """Deltas of 0 are the anchor.

    The boxes 4..12 and 6..14, both 4..12 high: shared 6 x 8 = 48, union 64 + 64 - 48 = 80, enclosing 10 x 8 = 80.
    """
    found = one_level(box_loss=DecodedGIoULoss()).loss(prediction(), [BOX])
    assert found["box"].item() == pytest.approx(1 - 48 / 80)
    # A box of 8 x 8 that is 1 lower as well, 6..14 x 5..13: shared 6 x 7 = 42, union 86, enclosing 10 x 9 = 90.
    lower = one_level(box_loss=DecodedGIoULoss()).loss(prediction(), [truth((6, 5, 14, 13), labels=[1])])
    assert lower["box"].item() == pytest.approx(1 - 42 / 86 + 4 / 90)


def test_between_the_thresholds_nothing_is_learnt() -> None:
    # IoU of 4..12 with 7.5..15.5 x 4..12: 36 / 92 = 0.39, negative; with 7.2: 38.4 / 89.6 = 0.43, neither.
    matcher = IoUMatcher(positive_iou=0.5, negative_iou=0.4)
    for x, logits in ((7.5, 8), (7.2, 6)):
        found = one_level(matcher=matcher).loss(prediction(), [truth((x, 4, x + 8, 12))])
        assert found["classification"].item() == pytest.approx(focal_sum(0, logits))
        assert found["box"].item() == 0


def test_a_box_that_no_anchor_fits_claims_its_best() -> None:
    found = one_level().loss(prediction(), [truth((7.5, 4, 15.5, 12))])
    assert found["classification"].item() == pytest.approx(focal_sum(1, 8))


def test_the_loss_of_a_number_is_a_choice() -> None:
    def squared(given: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return (given - wanted) ** 2

    assert one_level(box_loss=squared).loss(prediction(), [BOX])["box"].item() == pytest.approx(0.0625)


def test_cells_in_the_padding() -> None:
    """A picture 8 px wide, in a batch of 16: the two cells that begin at x = 8 see padding."""
    narrow = prediction(sizes=(Size(height=16, width=8),))
    found = one_level(size_divisor_px=8).loss(narrow, [truth()])
    assert found["classification"].item() == pytest.approx(focal_sum(0, 4))
    everywhere = one_level(size_divisor_px=None).loss(narrow, [truth()])
    assert everywhere["classification"].item() == pytest.approx(focal_sum(0, 8))


def test_what_the_sums_are_divided_by() -> None:
    positives = torch.tensor([3, 0])
    # 3 + 1, each 3 and 1 times two pictures.
    assert by_batch(positives).tolist() == [4, 4]
    assert by_picture(positives).tolist() == [6, 2]
    two = [BOX, truth()]
    classes = {"batch": (focal_sum(1, 8) + focal_sum(0, 8)) / 2, "picture": (focal_sum(1, 8) + focal_sum(0, 8)) / 2}
    for name, normalizer in (("batch", by_batch), ("picture", by_picture)):
        found = one_level(normalizer=normalizer).loss(prediction(2), two)
        assert found["classification"].item() == pytest.approx(classes[name])
        assert found["box"].item() == pytest.approx(0.125)


def test_a_moving_mean_of_positives() -> None:
    normalizer = MovingNormalizer(initial=100.0, momentum=0.9)
    # 100 * .9 + 5 * .1 = 90.5; none count as one: 90.5 * .9 + 1 * .1 = 81.55.
    torch.testing.assert_close(normalizer(torch.tensor([3, 2])), torch.tensor([90.5, 90.5]))
    torch.testing.assert_close(normalizer(torch.tensor([0])), torch.tensor([81.55]))
    assert normalizer.state_dict()["mean"].item() == pytest.approx(81.55)
    normalizer.eval()
    # 81.55 * .9 + 10 * .1, and it is forgotten.
    torch.testing.assert_close(normalizer(torch.tensor([10])), torch.tensor([74.395]))
    assert normalizer.state_dict()["mean"].item() == pytest.approx(81.55)


def test_the_moving_mean_travels_with_the_head() -> None:
    head = one_level(normalizer=MovingNormalizer())
    head.loss(prediction(), [BOX])
    other = one_level(normalizer=MovingNormalizer())
    other.load_state_dict(head.state_dict())
    assert other.state_dict()["normalizer.mean"].item() == pytest.approx(90.1)
    # 90.1 * .9 + .1 = 81.19.
    assert other.loss(prediction(), [BOX])["box"].item() == pytest.approx(0.25 / 81.19)


def test_an_anchor_in_an_ignore_region_is_no_negative() -> None:
    # The anchor at (0, 0) lies in it, that at (8, 0) by half, those below not.
    target = Target(boxes_xyxy=BOX.boxes_xyxy, labels=BOX.labels, ignore_xyxy=torch.tensor([[-4.0, -4.0, 8.0, 4.0]]))
    found = one_level().loss(prediction(), [target])
    assert found["classification"].item() == pytest.approx(focal_sum(1, 4))


def test_the_default_anchors_follow_the_strides() -> None:
    head = RetinaNetHead(in_channels=2, num_classes=2, strides_px=(8, 32), channels=4, num_convs=1)
    assert head.anchors.num_per_cell == 9
    # 4 strides, and times the cube roots of two and four.
    expected = [[32, 32 * 2 ** (1 / 3), 32 * 4 ** (1 / 3)], [128, 128 * 2 ** (1 / 3), 128 * 4 ** (1 / 3)]]
    for found, wanted in zip(head.anchors.sizes_px, expected, strict=True):
        assert found == pytest.approx(wanted)


def test_the_start() -> None:
    head = one_level()
    torch.testing.assert_close(head.tower.classes.bias, torch.full((2,), -math.log(99)))
    assert not head.tower.deltas.bias.any()  # type: ignore[union-attr]


# The three peers on their common recording: the order of the anchors of a cell, the matcher, what is left out.
RECORDED = {
    "mmdetection/retinanet_r50_fpn_1x": {},
    "torchvision/retinanet_resnet50_fpn": {
        "anchors": AnchorGenerator(
            sizes_px=tuple(tuple(int(4 * stride * 2 ** (k / 3)) for k in range(3)) for stride in STRIDES),
            rounded=True,
            stride_rule="image_over_grid",
        ),
        "matcher": IoUMatcher(positive_iou=0.5, negative_iou=0.4, low_quality_iou=0.0),
        "size_divisor_px": None,
    },
    "detectron2/retinanet_R_50_FPN_1x": {
        "matcher": IoUMatcher(positive_iou=0.5, negative_iou=0.4, low_quality_iou=0.0),
        "size_divisor_px": None,
    },
}


@pytest.mark.parametrize("case", RECORDED)
@pytest.mark.parametrize("picture", [0, 1])
def test_matching_as_recorded(shared: Path, case: str, picture: int) -> None:
    with np.load(shared / "oracles" / case / "arrays.npz") as arrays:
        index = next(
            name
            for name in arrays.files
            if name.startswith("train/assign/positive") and name.endswith(f"index/{picture}")
        )
        expected = torch.from_numpy(arrays[index])
        counts = arrays[f"train/assign/num_pos_neg_ignored/{picture}"].tolist()
        boxes = torch.from_numpy(arrays[f"train/pre/gt_boxes/{picture}"]).double()
    head = RetinaNetHead(
        in_channels=1,
        num_classes=1,
        strides_px=STRIDES,
        channels=1,
        num_convs=0,
        **RECORDED[case],  # type: ignore[arg-type]
    )
    shapes = tuple(
        LevelShape(height=math.ceil(480 / stride), width=math.ceil(608 / stride), stride_px=stride)
        for stride in STRIDES
    )
    size = Size(height=400, width=600) if picture == 0 else Size(height=480, width=400)
    anchors = head.anchors(shapes, Size(height=480, width=608), dtype=torch.float64, device=torch.device("cpu"))
    target = Target(boxes_xyxy=boxes, labels=torch.zeros(len(boxes), dtype=torch.int64))
    matches = head.match(torch.cat(anchors), target, size, shapes)
    if case.startswith("detectron2"):  # in a cell size by size, ours ratio by ratio
        cell, within = expected // 9, expected % 9
        expected = (cell * 9 + within % 3 * 3 + within // 3).sort().values
    assert matches.positive.nonzero().flatten().tolist() == expected.tolist()
    positive, negative = int(matches.positive.sum()), int(matches.negative.sum())
    assert [positive, negative, len(matches.positive) - positive - negative] == counts


def small(normalizer: object) -> Callable[[int], RetinaNetHead]:
    def make(num_classes: int) -> RetinaNetHead:
        torch.manual_seed(0)
        return RetinaNetHead(
            in_channels=4,
            num_classes=num_classes,
            strides_px=(16, 64),
            channels=4,
            num_convs=1,
            normalizer=normalizer,  # type: ignore[arg-type]
        )

    return make


def test_the_contract() -> None:
    assert_is_dense_head(small(by_batch), in_channels=4, strides_px=(16, 64))
    assert_is_dense_head(small(MovingNormalizer()), in_channels=4, strides_px=(16, 64))
