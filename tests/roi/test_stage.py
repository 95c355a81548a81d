"""The second stage: sampling, losses and detections, worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from rcnn.boxes.coding import DeltaCoder
from rcnn.boxes.filtering import DetectionFilter
from rcnn.errors import SetupError
from rcnn.matching.sampling import BalancedSampler, EverySampler, HardExampleSampler
from rcnn.records import Levels, LevelShape, Proposals, Size, Target
from rcnn.roi.box_head import BoxPredictor, BoxRegression
from rcnn.roi.box_loss import DecodedBoxLoss
from rcnn.roi.classification import SigmoidClassification
from rcnn.roi.pooling import RoIPooling, align
from rcnn.roi.stage import RoIStage

K = 2
SIZE = Size(height=100, width=120)
BOX = (10.0, 10.0, 50.0, 50.0)
# 40 x 40 moved by 4: shared 36 x 40 = 1440, union 3200 - 1440 = 1760, IoU 0.818.
NEAR = (14.0, 10.0, 54.0, 50.0)
FAR = (60.0, 60.0, 100.0, 90.0)


def stage(regression: BoxRegression = "per_class", **choices: object) -> RoIStage:
    torch.manual_seed(0)
    return RoIStage(
        pooling=RoIPooling(output_size=1, pool=align(sampling_ratio=2, aligned=True)),
        box_head=nn.Flatten(),
        predictor=BoxPredictor(in_features=3, num_classes=K, regression=regression),
        num_classes=K,
        **choices,  # type: ignore[arg-type]
    )


def levels(num_images: int = 1) -> Levels:
    return Levels(
        maps=(torch.zeros(num_images, 3, 25, 30),),
        shapes=(LevelShape(height=25, width=30, stride_px=4),),
        padded_size=SIZE,
        image_sizes=(SIZE,) * num_images,
        image_scales=(1.0,) * num_images,
        num_roi_levels=1,
    )


def proposals(*boxes: tuple[float, float, float, float]) -> Proposals:
    scores = torch.linspace(0.9, 0.1, len(boxes)) if boxes else torch.zeros(0)
    return Proposals(boxes_xyxy=torch.tensor(boxes).reshape(-1, 4), scores=scores)


def target(*boxes: tuple[float, float, float, float], labels: tuple[int, ...] = (), ignore: tuple = ()) -> Target:
    return Target(
        boxes_xyxy=torch.tensor(boxes).reshape(-1, 4),
        labels=torch.tensor(labels, dtype=torch.int64),
        ignore_xyxy=torch.tensor(ignore).reshape(-1, 4),
    )


# ------------------------------------------------------------------------------------------------------------- sampling


def test_the_truth_joins_the_proposals() -> None:
    regions = stage(sampler=EverySampler()).sample(proposals(FAR, NEAR), target(BOX, labels=(1,)))
    assert regions.boxes_xyxy.tolist() == [list(FAR), list(NEAR), list(BOX)]
    assert regions.labels.tolist() == [K, 1, 1]
    assert regions.gt_boxes_xyxy[1:].tolist() == [list(BOX)] * 2


def test_a_sample_keeps_the_order_of_the_proposals() -> None:
    # A quarter of 4 is positive: the truth or NEAR. The rest are negatives, of which there are two.
    sampler = BalancedSampler(total=4, positive_fraction=0.25, order=lambda count, device: torch.arange(count).flip(0))
    regions = stage(sampler=sampler).sample(proposals(FAR, NEAR, FAR), target(BOX, labels=(0,)))
    assert regions.labels.tolist() == [K, K, 0]
    assert regions.boxes_xyxy.tolist() == [list(FAR), list(FAR), list(BOX)]


def test_regions_to_ignore_are_no_background() -> None:
    crowd = ((55.0, 55.0, 110.0, 95.0),)
    regions = stage(sampler=EverySampler()).sample(proposals(FAR, NEAR), target(BOX, labels=(0,), ignore=crowd))
    assert regions.boxes_xyxy.tolist() == [list(NEAR), list(BOX)]


def test_nothing_to_sample() -> None:
    regions = stage().sample(proposals(), target())
    assert regions.boxes_xyxy.shape == (0, 4)


def test_boxes_in_another_precision() -> None:
    truth = target(BOX, labels=(1,))
    double = Target(boxes_xyxy=truth.boxes_xyxy.double(), labels=truth.labels)
    assert stage().sample(proposals(NEAR), double).boxes_xyxy.dtype == torch.float32


# --------------------------------------------------------------------------------------------------------------- losses


def still(one: RoIStage) -> RoIStage:
    """Logits and deltas of zero."""
    for parameter in one.predictor.parameters():
        nn.init.zeros_(parameter)
    return one


@pytest.mark.parametrize("regression", ["per_class", "agnostic"])
def test_losses_by_hand(regression: BoxRegression) -> None:
    one = still(stage(regression, sampler=EverySampler(), box_loss=nn.SmoothL1Loss(reduction="sum", beta=1 / 9)))
    losses = one.loss(levels(), [proposals(FAR, NEAR)], [target(BOX, labels=(1,))])
    # Three regions, three equal classes.
    assert losses["roi_classification"].item() == pytest.approx(math.log(3))
    # NEAR to BOX: -4 of 40, times the weight 10: 1, less half the bend. BOX to itself: 0. Divided by three regions.
    assert losses["roi_box"].item() == pytest.approx((1 - 1 / 18) / 3)


def test_the_box_of_the_right_class_is_trained() -> None:
    one = still(stage(sampler=EverySampler()))
    one.loss(levels(), [proposals(NEAR)], [target(BOX, labels=(1,))])["roi_box"].backward()
    gradient = one.predictor.deltas.bias.grad
    assert gradient is not None
    # dx alone, of class 1.
    assert gradient.reshape(K, 4).nonzero().tolist() == [[1, 0]]


@pytest.mark.parametrize(
    ("found", "truth"),
    [
        (proposals(FAR), target()),
        (proposals(), target()),
        (proposals(), target(BOX, labels=(1,))),
        (proposals(FAR), target(ignore=((0.0, 0.0, 120.0, 100.0),))),
        (proposals(FAR), target((20.0, 20.0, 20.0, 40.0), labels=(0,))),
    ],
    ids=["no boxes", "nothing", "no proposals", "all ignored", "a box without area"],
)
def test_every_parameter_has_a_gradient(found: Proposals, truth: Target) -> None:
    one = stage()
    losses = one.loss(levels(), [found], [truth])
    assert all(value.isfinite() for value in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    assert all(parameter.grad is not None for parameter in one.parameters())


def test_losses_are_over_the_regions_of_all_pictures() -> None:
    one = still(stage(sampler=EverySampler()))
    losses = one.loss(levels(2), [proposals(FAR), proposals(NEAR)], [target(), target(BOX, labels=(0,))])
    assert losses["roi_box"].item() == pytest.approx((1 - 1 / 18) / 3)


def test_the_truth_may_stay_out() -> None:
    regions = stage(sampler=EverySampler(), join_truth=False).sample(proposals(FAR, NEAR), target(BOX, labels=(1,)))
    assert regions.boxes_xyxy.tolist() == [list(FAR), list(NEAR)]
    assert regions.labels.tolist() == [K, 1]


def sigmoid_stage(**choices: object) -> RoIStage:
    sigmoid = SigmoidClassification(initial_probability=0.5)
    return RoIStage(
        pooling=RoIPooling(output_size=1, pool=align(sampling_ratio=2, aligned=True)),
        box_head=nn.Flatten(),
        predictor=BoxPredictor(in_features=3, num_classes=K, classification=sigmoid),
        num_classes=K,
        sampler=EverySampler(),
        classification=sigmoid,
        **choices,  # type: ignore[arg-type]
    )


def test_sigmoids_and_a_loss_on_boxes() -> None:
    one = still(sigmoid_stage(box_loss=DecodedBoxLoss(kind="linear_iou", weight=10)))
    losses = one.loss(levels(), [proposals(FAR, NEAR)], [target(BOX, labels=(1,))])
    # Two classes at 1/2 for each of three regions.
    assert losses["roi_classification"].item() == pytest.approx(2 * math.log(2))
    # NEAR to BOX: an IoU of 36/44. BOX to itself: 1.
    assert losses["roi_box"].item() == pytest.approx(10 * (8 / 44) / 3)


def test_the_classification_must_be_the_predictors() -> None:
    with pytest.raises(SetupError, match="3 class logits; allowed: 2"):
        stage(classification=SigmoidClassification())


def test_the_hardest_regions_are_trained() -> None:
    # The head looks at the maps, which are constant but for two places; what it sees there is more like class 0.
    one = stage(sampler=HardExampleSampler(total=2, positive_fraction=0.5), join_truth=False)
    for layer in (one.predictor.classes, one.predictor.deltas):
        nn.init.zeros_(layer.weight)
    with torch.no_grad():
        one.predictor.classes.weight[0] = 1.0
    pyramid = levels()
    pyramid.maps[0][:, :, 15:, 15:] = 1.0
    easy, hard = (0.0, 60.0, 30.0, 90.0), FAR
    with torch.no_grad():
        (regions,) = one.draw(pyramid, [proposals(easy, hard, NEAR, BOX)], [target(BOX, labels=(0,))])
    # One positive of two, which are equally hard to the head; and of the negatives the one that looks like class 0.
    assert sorted(regions.labels.tolist()) == [0, K]
    assert list(hard) in regions.boxes_xyxy.tolist()
    losses = one.loss(pyramid, [proposals(easy, hard, NEAR, BOX)], [target(BOX, labels=(0,))])
    torch.stack(list(losses.values())).sum().backward()
    assert all(parameter.grad is not None for parameter in one.parameters())


# ----------------------------------------------------------------------------------------------------------- detections


def detect(
    logits: list[list[float]], deltas: Tensor | None = None, boxes: tuple = (BOX, FAR), **choices: object
) -> list[tuple[list[float], float, int]]:
    one = stage(detection_filter=DetectionFilter(**choices), coder=DeltaCoder())  # type: ignore[arg-type]
    references = torch.tensor(boxes).reshape(-1, 4)
    deltas = torch.zeros(len(references), K, 4) if deltas is None else deltas
    (found,) = one.detect(torch.tensor(logits).reshape(-1, K + 1), deltas, [references], [SIZE])
    rows = zip(found.boxes_xyxy.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)
    return [(box, round(score, 6), label) for box, score, label in rows]


def test_one_region_can_be_several_classes() -> None:
    # exp: 4, 2, 2 of 8.
    found = detect([[math.log(4), math.log(2), math.log(2)]], boxes=(BOX,))
    assert found == [(list(BOX), 0.5, 0), (list(BOX), 0.25, 1)]


def test_background_is_the_last_class() -> None:
    assert detect([[0.0, 0.0, 9.0], [9.0, 0.0, 0.0]]) == [(list(FAR), 0.999753, 0)]


def test_each_class_moves_its_own_box() -> None:
    deltas = torch.zeros(1, K, 4)
    deltas[0, 1, 0] = 0.5  # 20 px to the right
    found = detect([[math.log(4), math.log(2), math.log(2)]], deltas, boxes=(BOX,))
    assert [box for box, _, _ in found] == [list(BOX), [30, 10, 70, 50]]


def test_one_box_serves_all_classes() -> None:
    deltas = torch.tensor([[[0.5, 0.0, 0.0, 0.0]]])
    found = detect([[math.log(4), math.log(2), math.log(2)]], deltas, boxes=(BOX,))
    assert [box for box, _, _ in found] == [[30, 10, 70, 50]] * 2


def test_boxes_are_cut_at_the_picture() -> None:
    deltas = torch.tensor([[[2.0, 1.0, 0.0, 0.0]] * K])
    ((box, _, _),) = detect([[9.0, 0.0, 0.0]], deltas, boxes=(BOX,))
    # 80 px right and 40 down: 90..130 x 50..90, cut at 120.
    assert box == [90, 50, 120, 90]


@pytest.mark.parametrize("logits", [[[math.nan] * 3] * 2, [[-9.0, -9.0, 9.0]] * 2, []])
def test_nothing_is_found(logits: list[list[float]]) -> None:
    assert detect(logits, boxes=(BOX, FAR) if logits else ()) == []


def test_pictures_stay_apart() -> None:
    one = stage(coder=DeltaCoder())
    logits = torch.tensor([[9.0, 0, 0], [0, 9.0, 0], [9.0, 0, 0]])
    boxes = [torch.tensor([BOX]), torch.zeros(0, 4), torch.tensor([FAR, BOX])]
    found = one.detect(logits, torch.zeros(3, K, 4), boxes, [SIZE] * 3)
    assert [detections.labels.tolist() for detections in found] == [[0], [], [1, 0]]


def test_half_precision_logits_give_float32_detections() -> None:
    (found,) = stage(coder=DeltaCoder()).detect(
        torch.tensor([[9.0, 0, 0]]).bfloat16(), torch.zeros(1, K, 4).bfloat16(), [torch.tensor([BOX])], [SIZE]
    )
    assert found.boxes_xyxy.dtype == found.scores.dtype == torch.float32


def test_sigmoid_scores() -> None:
    one = sigmoid_stage(coder=DeltaCoder())
    (found,) = one.detect(torch.tensor([[math.log(3), 0.0]]), torch.zeros(1, K, 4), [torch.tensor([BOX])], [SIZE])
    torch.testing.assert_close(found.scores, torch.tensor([0.75, 0.5]))
    assert found.labels.tolist() == [0, 1]


def test_the_score_of_the_proposal_is_fused() -> None:
    one = still(stage(fusion="product"))
    (found,) = one.predict(levels(), [proposals(FAR, BOX)])
    # A third for each class, times 0.9 and 0.1: those of 0.033 are under the threshold.
    torch.testing.assert_close(found.scores, torch.tensor([0.3, 0.3]))
    without = Proposals(boxes_xyxy=torch.tensor([FAR]), scores=None)
    with pytest.raises(SetupError, match="proposals without scores"):
        one.predict(levels(), [without])
    assert len(still(stage()).predict(levels(), [without])[0]) == 2
