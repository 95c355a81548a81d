"""Losses per element: recorded values of MMDetection, torchvision live, and arithmetic."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor

from rcnn.ops.losses import (
    distance_giou_loss,
    distribution_focal_loss,
    iou_loss,
    mean_over_processes,
    off_peak_focal_loss,
    peak_focal_loss,
    quality_focal_loss,
    sigmoid_focal_loss,
)


@pytest.fixture(scope="module")
def recorded(shared: Path) -> dict[str, Tensor]:
    folder = shared / "oracles" / "mmdetection" / "maths"
    assert json.loads((folder / "manifest.json").read_text())["case"] == "maths"
    with np.load(folder / "arrays.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files if name.startswith("losses/")}


@pytest.mark.parametrize(
    ("name", "kind", "eps"), [("iou_log", "iou", 1e-6), ("iou_linear", "linear_iou", 1e-6), ("giou", "giou", 1e-7)]
)
def test_iou_losses_as_mmdetection(recorded: dict[str, Tensor], name: str, kind: str, eps: float) -> None:
    boxes, truth = recorded["losses/pred_boxes"], recorded["losses/target_boxes"]
    found = iou_loss(boxes, truth, kind=kind, eps=eps)  # type: ignore[arg-type]
    # Recorded in float32.
    torch.testing.assert_close(found.float(), recorded[f"losses/{name}"], rtol=2e-6, atol=1e-6)


def test_focal_loss_as_mmdetection(recorded: dict[str, Tensor]) -> None:
    labels = recorded["losses/labels_5_is_background"]
    targets = torch.nn.functional.one_hot(labels, 6)[:, :5].double()
    total = sigmoid_focal_loss(recorded["losses/logits"], targets).sum()
    torch.testing.assert_close(total.float(), recorded["losses/focal_sum"], rtol=1e-6, atol=0)


def test_giou_loss_as_torchvision() -> None:
    generator = torch.Generator().manual_seed(0)
    corner, size = (torch.rand(2, 50, 2, generator=generator, dtype=torch.float64) * 20 for _ in range(2))
    a, b = torch.cat((corner, corner + size), dim=-1)
    expected = torchvision.ops.generalized_box_iou_loss(a, b)
    torch.testing.assert_close(iou_loss(a, b, kind="giou"), expected, rtol=1e-6, atol=1e-6)


def test_focal_loss_by_hand() -> None:
    # A logit of 0: p = 1/2, cross-entropy ln 2, (1 - p_t)^2 = 1/4; 0.25 for a positive, 0.75 for a negative.
    found = sigmoid_focal_loss(torch.zeros(2), torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(found, torch.tensor([0.25, 0.75]) * math.log(2) / 4)


def test_iou_losses_by_hand() -> None:
    # 4 x 4 and the same moved by (2, 0): shared 8, union 24, enclosing 24.
    a, b = torch.tensor([[0.0, 0, 4, 4]]), torch.tensor([[2.0, 0, 6, 4]])
    assert iou_loss(a, b).item() == pytest.approx(math.log(3))
    assert iou_loss(a, b, kind="linear_iou").item() == pytest.approx(2 / 3)
    assert iou_loss(a, b, kind="giou").item() == pytest.approx(2 / 3)


@pytest.mark.parametrize("kind", ["iou", "linear_iou", "giou"])
def test_degenerate_boxes_have_finite_losses_and_gradients(kind: str) -> None:
    point = torch.full((1, 4), 3.0, requires_grad=True)
    apart = torch.tensor([[10.0, 10, 12, 12]])
    for truth in (point.detach(), apart):
        loss = iou_loss(point, truth, kind=kind).sum()  # type: ignore[arg-type]
        (gradient,) = torch.autograd.grad(loss, point)
        assert loss.isfinite()
        assert gradient.isfinite().all()
    # The logarithm stops at the least IoU: -ln 1e-6.
    assert iou_loss(point, apart).item() == pytest.approx(6 * math.log(10))


def test_no_boxes_and_no_logits() -> None:
    none = torch.zeros(0, 4, requires_grad=True)
    for kind in ("iou", "linear_iou", "giou"):
        assert iou_loss(none, none.detach(), kind=kind).sum().item() == 0  # type: ignore[arg-type]
    assert sigmoid_focal_loss(torch.zeros(0, 3), torch.zeros(0, 3)).sum().item() == 0


def test_the_mean_of_one_process_is_itself() -> None:
    count = torch.tensor(3.0, requires_grad=True)
    assert mean_over_processes(count).item() == 3
    assert not mean_over_processes(count).requires_grad


# -------------------------------------------------------------------------------------------- generalized focal losses


def test_quality_focal_loss_as_mmdetection(recorded: dict[str, Tensor]) -> None:
    labels, quality = recorded["losses/labels_5_is_background"], recorded["losses/quality"]
    targets = torch.nn.functional.one_hot(labels, 6)[:, :5] * quality[:, None]
    found = quality_focal_loss(recorded["losses/logits"], targets).sum(dim=1)
    torch.testing.assert_close(found.float(), recorded["losses/qfl_none"], rtol=2e-6, atol=1e-6)


def test_distribution_focal_loss_as_mmdetection(recorded: dict[str, Tensor]) -> None:
    found = distribution_focal_loss(recorded["losses/dfl_logits"], recorded["losses/dfl_target"])
    torch.testing.assert_close(found.float(), recorded["losses/dfl_none"], rtol=2e-6, atol=1e-6)


def test_quality_focal_loss_by_hand() -> None:
    # A logit of 0: p = 1/2, cross-entropy ln 2 whatever the target; distances 0.5, 0.25 and 0, squared.
    found = quality_focal_loss(torch.zeros(3), torch.tensor([0.0, 0.75, 0.5]))
    torch.testing.assert_close(found, math.log(2) * torch.tensor([0.25, 0.0625, 0.0]))


def test_distribution_focal_loss_by_hand() -> None:
    # Shares 1/2, 1/4 and 1/4. A target of 0.25: 3/4 ln 2 + 1/4 ln 4 = 5/4 ln 2; one of 1 is all in its bin: ln 4.
    logits = torch.tensor([0.5, 0.25, 0.25]).log().repeat(2, 1)
    found = distribution_focal_loss(logits, torch.tensor([0.25, 1.0]))
    torch.testing.assert_close(found, math.log(2) * torch.tensor([1.25, 2.0]))
    assert distribution_focal_loss(logits[:0], torch.zeros(0)).shape == (0,)


def test_heat_losses_by_hand() -> None:
    # A score of 3/4: at a peak (1/4)^2 ln(4/3); elsewhere (3/4)^2 ln 4, times (1 - heat)^4.
    logit = torch.full((3,), math.log(3), dtype=torch.float64)
    torch.testing.assert_close(peak_focal_loss(logit), torch.full_like(logit, math.log(4 / 3) / 16))
    found = off_peak_focal_loss(logit, torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    expected = 9 / 16 * math.log(4) * torch.tensor([1.0, 1 / 16, 0.0], dtype=torch.float64)
    torch.testing.assert_close(found, expected)
    assert off_peak_focal_loss(logit, torch.zeros(3, dtype=torch.float64), ignore_above=0.75).tolist() == [0.0] * 3
    assert off_peak_focal_loss(logit, torch.zeros(3, dtype=torch.float64), ignore_above=0.76).all()


def test_heat_losses_of_certain_scores_are_finite() -> None:
    # Scores stay within 1e-4 and 1 - 1e-4.
    logits = torch.tensor([-200.0, 200.0])
    found = peak_focal_loss(logits)
    torch.testing.assert_close(found, torch.tensor([-math.log(1e-4) * 0.9999**2, 1e-12]), rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(off_peak_focal_loss(logits, torch.zeros(2)), found.flip(0), rtol=1e-3, atol=1e-9)


def test_distance_giou_by_hand() -> None:
    # From one point, 2 x 2 and 6 x 4 around it, (1, 1, 1, 1) and (1, 2, 5, 2): shared 2 x 2, union 24, enclosing 24:
    # no penalty. With a cell added to both: 5 / 25.
    a, b = torch.tensor([[1.0, 1, 1, 1]]), torch.tensor([[1.0, 2, 5, 2]])
    assert distance_giou_loss(a, b).item() == pytest.approx(1 - 5 / 25)
    # (3, 1, 1, 1) and (1, 1, 3, 1): both 4 x 2, shared 2 x 2, union 12, enclosing 6 x 2: 12. IoU 4/12.
    a, b = torch.tensor([[3.0, 1, 1, 1]]), torch.tensor([[1.0, 1, 3, 1]])
    assert distance_giou_loss(a, b, smoothing=0.0).item() == pytest.approx(1 - 4 / 12)
    # (3, 1, 1, 1) and (1, 3, 1, 1): 4 x 2 and 2 x 4, shared 2 x 2, union 12, enclosing 4 x 4: penalty 4/16.
    b = torch.tensor([[1.0, 3, 1, 1]])
    assert distance_giou_loss(a, b, smoothing=0.0).item() == pytest.approx(1 - 4 / 12 + 4 / 16)


def test_distance_giou_is_that_of_the_boxes() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(50, 4, generator=generator, dtype=torch.float64) * 10 for _ in range(2))
    boxes = [torch.cat((-x[:, :2], x[:, 2:]), dim=1) for x in (a, b)]
    expected = torchvision.ops.generalized_box_iou_loss(*boxes)
    torch.testing.assert_close(distance_giou_loss(a, b, smoothing=0.0), expected, rtol=1e-6, atol=1e-6)
