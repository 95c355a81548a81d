"""Losses of dense heads, per element: the head sums them, and divides by what it was published with.

Letters: N boxes, or any shape of logits.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
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


def quality_focal_loss(
    logits: Float[Tensor, "*shape"], quality: Float[Tensor, "*shape"], *, beta: float = 2.0
) -> Float[Tensor, "*shape"]:
    """Cross-entropy with how good a prediction is (0 for a negative) instead of 1, times the distance to it to the
    power of `beta` (generalized focal loss, Li et al., 2020, equation 5)."""
    losses = F.binary_cross_entropy_with_logits(logits, quality, reduction="none")
    return losses * (quality - logits.sigmoid()).abs() ** beta


def distribution_focal_loss(logits: Float[Tensor, "n bins"], targets: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Cross-entropy with the two bins around each target, shared by nearness (Li et al., 2020, equation 6).

    Bin b stands for the number b; `targets` are at least 0 and below the last bin.
    """
    left = targets.long()
    logarithms = logits.log_softmax(dim=1)
    right_share = targets - left
    of_left, of_right = (logarithms.gather(1, bins[:, None])[:, 0] for bins in (left, left + 1))
    return -((1 - right_share) * of_left + right_share * of_right)


def mean_over_processes(count: Tensor) -> Tensor:
    """The mean of a number over the processes of a training; itself where there is one. No gradient passes."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return count.detach()
    total = count.detach().clone()
    distributed.all_reduce(total)
    return total / distributed.get_world_size()


# What a heat map's logits are kept within before their logarithm, as probabilities: CenterNet's clamp.
_LEAST_HEAT_SCORE = 1e-4


def peak_focal_loss(logits: Float[Tensor, "*shape"], *, gamma: float = 2.0) -> Float[Tensor, "*shape"]:
    """CenterNet's loss of cells that are an object's centre: cross-entropy, less where they already score high."""
    score = _clamped_score(logits)
    return -score.log() * (1 - score).pow(gamma)


def off_peak_focal_loss(
    logits: Float[Tensor, "*shape"],
    heat: Float[Tensor, "*shape"],
    *,
    beta: float = 4.0,
    gamma: float = 2.0,
    ignore_above: float | None = None,
) -> Float[Tensor, "*shape"]:
    """CenterNet's loss of all other cells, less the hotter (0 to 1) they should be: a peak, of heat 1, has none.

    0 as well for those that score `ignore_above` or more (CenterNet2: such an object may only lack its annotation).
    """
    score = _clamped_score(logits)
    loss = -(1 - score).log() * score.pow(gamma) * (1 - heat).pow(beta)
    return loss if ignore_above is None else torch.where(score < ignore_above, loss, 0.0)


def _clamped_score(logits: Tensor) -> Tensor:
    return logits.sigmoid().clamp(_LEAST_HEAT_SCORE, 1 - _LEAST_HEAT_SCORE)


def distance_giou_loss(
    predicted: Float[Tensor, "n 4"], truth: Float[Tensor, "n 4"], *, smoothing: float = 1.0
) -> Float[Tensor, " n"]:
    """One minus the generalised IoU of boxes given as distances (left, top, right, bottom, none negative) from a point.

    `smoothing` joins intersection and union of the IoU, as CenterNet2 and FCOS's authors have it: distances are in
    strides there, so it is one cell.
    """
    inner, outer = torch.minimum(predicted, truth), torch.maximum(predicted, truth)
    shared, enclosing = _spanned_area(inner), _spanned_area(outer)
    union = _spanned_area(predicted) + _spanned_area(truth) - shared
    return 1 - (shared + smoothing) / (union + smoothing) + (enclosing - union) / enclosing


def _spanned_area(distances: Tensor) -> Tensor:
    left, top, right, bottom = distances.unbind(-1)
    return (left + right) * (top + bottom)
