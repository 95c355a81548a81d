"""Losses of dense heads, per element: the head sums them, and divides by what it was published with.

Letters: N boxes, or any shape of logits.
"""

from __future__ import annotations

from typing import Literal

import torch
import torchvision
from jaxtyping import Float
from torch import Tensor

from rcnn.boxes.geometry import paired_giou, paired_iou

# "iou": the negative logarithm (UnitBox, FCOS); "linear_iou": one minus it; "giou": one minus the generalised IoU.
IoULossKind = Literal["iou", "linear_iou", "giou"]


def sigmoid_focal_loss(
    logits: Float[Tensor, "*shape"], targets: Float[Tensor, "*shape"], *, alpha: float = 0.25, gamma: float = 2.0
) -> Float[Tensor, "*shape"]:
    """Cross-entropy of a sigmoid, less for what is already right (Lin et al., 2017). `alpha` weighs the positives."""
    return torchvision.ops.sigmoid_focal_loss(logits, targets, alpha=alpha, gamma=gamma, reduction="none")


def iou_loss(
    predicted_xyxy: Float[Tensor, "n 4"],
    truth_xyxy: Float[Tensor, "n 4"],
    *,
    kind: IoULossKind = "iou",
    eps: float = 1e-6,
) -> Float[Tensor, " n"]:
    """The loss of each predicted box against its own truth. `eps` is the least area, and the least IoU of a logarithm
    (its gradient is then zero, as in MMDetection)."""
    if kind == "giou":
        return 1 - paired_giou(predicted_xyxy, truth_xyxy, eps=eps)
    overlap = paired_iou(predicted_xyxy, truth_xyxy, eps=eps).clamp(min=eps)
    return 1 - overlap if kind == "linear_iou" else -overlap.log()


def mean_over_processes(count: Tensor) -> Tensor:
    """The mean of a number over the processes of a training; itself where there is one. No gradient passes."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return count.detach()
    total = count.detach().clone()
    distributed.all_reduce(total)
    return total / distributed.get_world_size()
