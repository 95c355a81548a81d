"""A chain of stages: what each is given, its losses and the scores, worked by hand.

`tests/parity/test_mmdetection.py` compares it with MMDetection's, stage by stage.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from rcnn.boxes.coding import DeltaCoder
from rcnn.boxes.filtering import DetectionFilter
from rcnn.errors import SetupError
from rcnn.matching.iou import IoUMatcher
from rcnn.matching.sampling import EverySampler
from rcnn.records import Levels, LevelShape, Proposals, Size, Target
from rcnn.roi.box_head import BoxPredictor, BoxRegression
from rcnn.roi.cascade import CascadeStage
from rcnn.roi.fusion import ProposalFusion
from rcnn.roi.pooling import RoIPooling, align
from rcnn.roi.stage import RoIStage

K = 2
SIZE = Size(height=100, width=120)
BOX = (10.0, 10.0, 50.0, 50.0)
NEAR = (26.0, 10.0, 66.0, 50.0)  # 24 of 56 columns shared: IoU 0.43
FAR = (60.0, 60.0, 100.0, 90.0)
# A tenth of its width to the left, in deltas of weight 1.
LEFT = (-0.1, 0.0, 0.0, 0.0)


def stage(
    *,
    iou: float = 0.5,
    logits: tuple[float, ...] = (0.0, 0.0, 0.0),
    deltas: tuple[tuple[float, ...], ...] = ((0.0,) * 4,),
    join_truth: bool = True,
    num_classes: int = K,
    fusion: ProposalFusion = "none",
) -> RoIStage:
    """It gives the same logits and deltas to all regions: those of its biases."""
    regression: BoxRegression = "agnostic" if len(deltas) == 1 else "per_class"
    predictor = BoxPredictor(in_features=3, num_classes=num_classes, regression=regression)
    for layer, values in ((predictor.classes, logits), (predictor.deltas, sum(deltas, ()))):
        nn.init.zeros_(layer.weight)
        layer.bias.data = torch.tensor(values)
    return RoIStage(
        pooling=RoIPooling(output_size=1, pool=align(sampling_ratio=2, aligned=True)),
        box_head=nn.Flatten(),
        predictor=predictor,
        num_classes=num_classes,
        coder=DeltaCoder(),
        matcher=IoUMatcher(positive_iou=iou, negative_iou=iou),
        sampler=EverySampler(),
        box_loss=nn.L1Loss(reduction="sum"),
        detection_filter=DetectionFilter(),
        fusion=fusion,
        join_truth=join_truth,
    )


def levels(*, gradient: bool = False) -> Levels:
    return Levels(
        maps=(torch.ones(1, 3, 25, 30, requires_grad=gradient),),
        shapes=(LevelShape(height=25, width=30, stride_px=4),),
        padded_size=SIZE,
        image_sizes=(SIZE,),
        image_scales=(1.0,),
        num_roi_levels=1,
    )


def proposals(*boxes: tuple[float, ...], scores: Tensor | None = None) -> list[Proposals]:
    return [Proposals(boxes_xyxy=torch.tensor(boxes).reshape(-1, 4), scores=scores)]


def target(*boxes: tuple[float, ...], labels: tuple[int, ...] = ()) -> list[Target]:
    return [Target(boxes_xyxy=torch.tensor(boxes).reshape(-1, 4), labels=torch.tensor(labels, dtype=torch.int64))]


class Spy:
    """Remembers the regions that a stage draws."""

    def __init__(self, watched: RoIStage, monkeypatch: pytest.MonkeyPatch) -> None:
        self.boxes: list[list[float]] = []
        self.labels: list[int] = []
        draw = watched.draw

        def drawing(*arguments):
            (regions,) = draw(*arguments)
            self.boxes, self.labels = regions.boxes_xyxy.round(decimals=4).tolist(), regions.labels.tolist()
            return [regions]

        monkeypatch.setattr(watched, "draw", drawing)


def test_each_stage_trains_on_what_the_last_one_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = stage(deltas=(LEFT,)), stage(iou=0.5)
    cascade = CascadeStage(stages=[first, second], loss_weights=(1.0, 0.5))
    regions = Spy(first, monkeypatch), Spy(second, monkeypatch)
    cascade.loss(levels(), proposals(NEAR, FAR), target(BOX, labels=(1,)))
    # The ground truth joins at the end, a positive. NEAR is background at 0.43.
    assert regions[0].boxes == [list(NEAR), list(FAR), list(BOX)]
    assert regions[0].labels == [K, K, 1]
    # All moved by a tenth of their width; the moved truth has left, and the truth joins anew. NEAR has 28 of 52
    # columns now: 0.54.
    assert regions[1].boxes == [[22, 10, 62, 50], [56, 60, 96, 90], list(BOX)]
    assert regions[1].labels == [1, K, 1]


def test_the_truth_stays_where_it_does_not_join_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """detectron2: later stages match all the regions of the first, and add none."""
    second = stage(join_truth=False)
    cascade = CascadeStage(stages=[stage(deltas=(LEFT,)), second], loss_weights=(1.0, 1.0))
    regions = Spy(second, monkeypatch)
    cascade.loss(levels(), proposals(NEAR), target(BOX, labels=(1,)))
    assert regions.boxes == [[22, 10, 62, 50], [6, 10, 46, 50]]


def test_moved_boxes_are_cut_at_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    second = stage(join_truth=False)
    cascade = CascadeStage(stages=[stage(deltas=((-0.5, 0.0, 0.0, 0.0),)), second], loss_weights=(1.0, 1.0))
    regions = Spy(second, monkeypatch)
    cascade.loss(levels(), proposals(BOX), target())
    assert regions.boxes == [[0, 10, 30, 50]]


def test_a_box_per_class_moves_by_its_label_or_its_best_class(monkeypatch: pytest.MonkeyPatch) -> None:
    # Class 0 moves left, class 1 does not; class 0 is the better one everywhere.
    first = stage(deltas=(LEFT, (0.0,) * 4), logits=(1.0, 0.0, 5.0))
    second = stage(join_truth=False)
    regions = Spy(second, monkeypatch)
    cascade = CascadeStage(stages=[first, second], loss_weights=(1.0, 1.0))
    # BOX itself is a proposal and the truth, of class 1; FAR is background.
    cascade.loss(levels(), proposals(BOX, FAR), target(BOX, labels=(1,)))
    assert regions.boxes == [list(BOX), [56, 60, 96, 90], list(BOX)]


def test_losses_by_hand() -> None:
    cascade = CascadeStage(
        stages=[stage(iou=0.4), stage(iou=0.5, logits=(math.log(2), 0.0, 0.0)), stage(iou=0.6)],
        loss_weights=(1.0, 0.5, 0.25),
    )
    losses = cascade.loss(levels(), proposals(NEAR), target(BOX, labels=(1,)))
    found = {name: value.item() for name, value in losses.items()}
    # Two regions, NEAR and BOX. NEAR is 16 px from BOX, 0.4 of its width; no stage moves it, and only the first takes
    # it for foreground. The second stage has exp 2, 1, 1 of 4: -log 1/4 for NEAR (background) and for BOX (class 1).
    assert found == pytest.approx(
        {
            "roi1_classification": math.log(3),
            "roi1_box": 0.4 / 2,
            "roi2_classification": 0.5 * math.log(4),
            "roi2_box": 0.0,
            "roi3_classification": 0.25 * math.log(3),
            "roi3_box": 0.0,
        },
        abs=1e-6,
    )


@pytest.mark.parametrize(
    ("found", "truth"),
    [(proposals(FAR), target()), (proposals(), target()), (proposals(), target(BOX, labels=(1,)))],
    ids=["no boxes", "nothing", "no proposals"],
)
def test_every_parameter_has_a_gradient(found: list[Proposals], truth: list[Target]) -> None:
    cascade = CascadeStage(stages=[stage(), stage(iou=0.6), stage(iou=0.7)])
    losses = cascade.loss(levels(), found, truth)
    assert all(value.isfinite() for value in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    assert all(parameter.grad is not None for parameter in cascade.parameters())


def test_the_share_of_the_gradient_that_reaches_the_pyramid() -> None:
    def gradients(share: float) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        one = stage()
        nn.init.normal_(one.predictor.classes.weight)
        cascade = CascadeStage(stages=[one], loss_weights=(1.0,), gradient_share=share)
        pyramid = levels(gradient=True)
        cascade.loss(pyramid, proposals(FAR), target())["roi1_classification"].backward()
        assert pyramid.maps[0].grad is not None and one.predictor.classes.weight.grad is not None
        return pyramid.maps[0].grad, one.predictor.classes.weight.grad

    (whole, weight), (third, same_weight) = gradients(1.0), gradients(0.25)
    assert whole.abs().max() > 0
    assert_close(third, whole / 4)
    assert_close(same_weight, weight)


# ----------------------------------------------------------------------------------------------------------- detections


def test_boxes_pass_all_stages_and_probabilities_are_averaged() -> None:
    # Softmax of (log 2, 0, 0): 1/2, 1/4; of (0, log 2, 0): 1/4, 1/2. The mean is 3/8 for both.
    cascade = CascadeStage(
        stages=[
            stage(deltas=(LEFT,), logits=(math.log(2), 0.0, 0.0)),
            stage(deltas=(LEFT,), logits=(0.0, math.log(2), 0.0)),
        ],
        loss_weights=(1.0, 1.0),
    )
    (found,) = cascade.predict(levels(), proposals(FAR))
    assert_close(found.boxes_xyxy, torch.tensor([[52.0, 60, 92, 90]] * 2))
    assert_close(found.scores, torch.tensor([0.375, 0.375]))
    assert sorted(found.labels.tolist()) == [0, 1]


def test_the_mean_of_logits() -> None:
    # The means are (log 2, 0, 0), where the mean of the probabilities 1/3 and 16/18 were another number.
    stages = [stage(), stage(logits=(math.log(4), 0.0, 0.0))]
    cascade = CascadeStage(stages=stages, loss_weights=(1.0, 1.0), average="logits")
    (found,) = cascade.predict(levels(), proposals(FAR))
    assert_close(found.scores, torch.tensor([0.5, 0.25]))


def test_the_score_of_the_proposal_is_fused_with_the_mean() -> None:
    stages = [stage(), stage(fusion="sqrt")]
    cascade = CascadeStage(stages=stages, loss_weights=(1.0, 1.0))
    (found,) = cascade.predict(levels(), proposals(FAR, BOX, scores=torch.tensor([0.75, 0.1875])))
    # 1/3 of 3/4 and of 3/16: the roots of 1/4 and 1/16.
    assert_close(found.scores, torch.tensor([0.5, 0.5, 0.25, 0.25]))
    with pytest.raises(SetupError, match="proposals without scores"):
        cascade.predict(levels(), proposals(FAR))


def test_no_proposal() -> None:
    (found,) = CascadeStage(stages=[stage()] * 3).predict(levels(), proposals())
    assert len(found) == 0


def test_what_does_not_fit_is_said_at_once() -> None:
    other = stage(num_classes=3, logits=(0.0,) * 4)
    with pytest.raises(SetupError) as caught:
        CascadeStage(stages=[stage(), other])
    assert "3 weights for 2 stages" in str(caught.value)
    assert "stages of 2, 3 classes" in str(caught.value)
    with pytest.raises(SetupError, match="no stage"):
        CascadeStage(stages=[], loss_weights=())


def test_the_names_of_its_weights() -> None:
    names = set(CascadeStage(stages=[stage()] * 3).state_dict())
    layers = ("classes.weight", "classes.bias", "deltas.weight", "deltas.bias")
    assert names == {f"stages.{number}.predictor.{layer}" for number in range(3) for layer in layers}
