"""What class logits mean: counts, losses and scores, by hand and against torch's own functions."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from rcnn.errors import SetupError
from rcnn.ops.losses import sigmoid_focal_loss
from rcnn.roi.box_head import BoxPredictor
from rcnn.roi.classification import SigmoidClassification, SoftmaxClassification

# Two classes; the regions are of class 1, of background, of class 0.
LABELS = torch.tensor([1, 2, 0])


def test_softmax_is_a_competition_with_background() -> None:
    softmax = SoftmaxClassification()
    assert softmax.num_logits(2) == 3
    # exp: 4, 2, 2 of 8.
    logits = torch.tensor([[math.log(4), math.log(2), math.log(2)]] * 3)
    assert_close(softmax.scores(logits), torch.tensor([[0.5, 0.25]] * 3))
    # -log of 1/4, 1/4 and 1/2.
    assert_close(softmax.region_losses(logits, LABELS), torch.tensor([math.log(4), math.log(4), math.log(2)]))
    assert softmax.loss(logits, LABELS).item() == pytest.approx(5 * math.log(2))


def test_sigmoid_has_no_background() -> None:
    sigmoid = SigmoidClassification()
    assert sigmoid.num_logits(2) == 2
    # The sigmoid of log 3 is 3/4, of 0 it is 1/2.
    logits = torch.tensor([[math.log(3), 0.0]] * 3)
    assert_close(sigmoid.scores(logits), torch.tensor([[0.75, 0.5]] * 3))
    # Class 1: -log(1/4) - log(1/2). Background: the same, as no class is there. Class 0: -log(3/4) - log(1/2).
    expected = [math.log(8), math.log(8), math.log(8 / 3)]
    assert_close(sigmoid.region_losses(logits, LABELS), torch.tensor(expected))
    assert sigmoid.loss(logits, LABELS).item() == pytest.approx(sum(expected))


def test_focal_loss_of_each_class() -> None:
    # p = 1/2 everywhere: cross-entropy log 2, times (1/2)^2; a quarter of it for the class that is there, three
    # quarters for each that is not. Background has two such classes, the others one of each.
    focal = SigmoidClassification(element_loss=partial(sigmoid_focal_loss, alpha=0.25, gamma=2.0))
    unit = math.log(2) / 4
    found = focal.region_losses(torch.zeros(3, 2), LABELS)
    assert_close(found, torch.tensor([unit, unit * 1.5, unit]))


@pytest.mark.parametrize("classification", [SoftmaxClassification(), SigmoidClassification()])
def test_no_region(classification: SoftmaxClassification | SigmoidClassification) -> None:
    logits = torch.zeros(0, classification.num_logits(2), requires_grad=True)
    loss = classification.loss(logits, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0
    assert classification.scores(logits).shape == (0, 2)


def test_the_start_of_a_predictor() -> None:
    torch.manual_seed(0)
    for classification, score in (
        (SigmoidClassification(), 0.01),
        (SigmoidClassification(initial_probability=0.5), 0.5),
    ):
        logits, _ = BoxPredictor(in_features=8, num_classes=3, classification=classification)(torch.zeros(1, 8))
        assert_close(F.sigmoid(logits), torch.full((1, 3), score))
    assert not BoxPredictor(in_features=8, num_classes=3).classes.bias.any()


def test_a_predictor_of_another_classification() -> None:
    predictor = BoxPredictor(in_features=8, num_classes=3, classification=SigmoidClassification())
    predictor.check_logits(3)
    with pytest.raises(SetupError, match="3 class logits; allowed: 4"):
        predictor.check_logits(4)
