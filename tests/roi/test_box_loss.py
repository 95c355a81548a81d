"""The second stage's loss on boxes."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close
from torchvision.ops import generalized_box_iou_loss

from rcnn.boxes.coding import DeltaCoder
from rcnn.boxes.loss import box_term
from rcnn.roi.box_loss import DecodedBoxLoss

CODER = DeltaCoder(weights=(10.0, 10.0, 5.0, 5.0))
REFERENCE = torch.tensor([[10.0, 10.0, 50.0, 50.0]])
TRUTH = torch.tensor([[14.0, 10.0, 54.0, 50.0]])


def test_on_boxes() -> None:
    # Without deltas the box is the reference: shared 36 x 40 of a union of 44 x 40, which is also the enclosing box.
    share = 36 / 44
    for kind, expected in (("iou", -math.log(share)), ("linear_iou", 1 - share), ("giou", 1 - share)):
        loss = DecodedBoxLoss(kind=kind, weight=10.0)  # type: ignore[arg-type]
        assert box_term(loss, CODER, torch.zeros(1, 4), REFERENCE, TRUTH).item() == pytest.approx(10 * expected)


def test_the_deltas_that_are_right_have_no_loss() -> None:
    deltas = CODER.encode(TRUTH, REFERENCE)
    assert box_term(DecodedBoxLoss(), CODER, deltas, REFERENCE, TRUTH).item() == pytest.approx(0, abs=1e-6)


def test_gradients_are_those_of_torchvision() -> None:
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(20, 2, generator=generator, dtype=torch.float64) * 100
    references = torch.cat((corner, corner + 40), dim=1)
    truth = references + torch.rand(20, 4, generator=generator, dtype=torch.float64) * 10
    start = torch.rand(20, 4, generator=generator, dtype=torch.float64) - 0.5
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    box_term(DecodedBoxLoss(), CODER, ours, references, truth).backward()
    generalized_box_iou_loss(CODER.decode(theirs, references), truth, reduction="sum").backward()
    assert_close(ours.grad, theirs.grad)


def test_no_box() -> None:
    deltas = torch.zeros(0, 4, requires_grad=True)
    term = box_term(DecodedBoxLoss(), CODER, deltas, torch.zeros(0, 4), torch.zeros(0, 4))
    term.backward()
    assert (term.item(), term.ndim) == (0, 0)
