"""The loss of predicted deltas, on them or on the boxes that they describe."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rcnn.boxes.coding import DeltaCoder
from rcnn.boxes.loss import AbstractDecodedLoss, BoxLoss, box_term, per_box, smooth_l1_ninth

CODER = DeltaCoder(weights=(10.0, 10.0, 5.0, 5.0))
REFERENCES = torch.tensor([[10.0, 10.0, 50.0, 50.0], [0.0, 0.0, 20.0, 10.0]])
TRUTH = torch.tensor([[14.0, 10.0, 54.0, 50.0], [0.0, 0.0, 20.0, 10.0]])
l1_per_box = per_box(partial(F.l1_loss, reduction="none"))


class Shift(AbstractDecodedLoss):
    """How far the left sides lie apart."""

    def __call__(self, predicted_xyxy: Tensor, truth_xyxy: Tensor) -> Tensor:
        return (predicted_xyxy - truth_xyxy).abs()[:, 0]


def test_on_deltas() -> None:
    # 4 of 40 px times 10 is 1, less half the bend; the second box is its reference.
    assert box_term(smooth_l1_ninth, CODER, torch.zeros(2, 4), REFERENCES, TRUTH).item() == pytest.approx(1 - 1 / 18)
    # One wanted of 1 and 0.5 too much in each of four.
    assert box_term(l1_per_box, CODER, torch.full((2, 4), 0.5), REFERENCES, TRUTH).tolist() == pytest.approx([2, 2])


def test_on_boxes() -> None:
    # A delta of 0.5 moves by 0.05 of the width: 2 of the 4 px that it should, and 1 px that it should not.
    deltas = torch.tensor([[0.5, 0, 0, 0], [0.5, 0, 0, 0]])
    assert box_term(Shift(), CODER, deltas, REFERENCES, TRUTH).tolist() == pytest.approx([2, 1], rel=1e-5)


@pytest.mark.parametrize("loss", [smooth_l1_ninth, l1_per_box, Shift()])
def test_no_box(loss: BoxLoss) -> None:
    deltas = torch.zeros(0, 4, requires_grad=True)
    term = box_term(loss, CODER, deltas, torch.zeros(0, 4), torch.zeros(0, 4)).sum()
    term.backward()
    assert term.item() == 0
    assert deltas.grad is not None
