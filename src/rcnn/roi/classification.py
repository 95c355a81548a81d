"""What the class logits of a region mean: how many there are, their loss, and their scores.

Letters: R regions of a batch, K classes; a label of K is background.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

# Logits and targets of one shape to losses of that shape.
ElementLoss = Callable[[Tensor, Tensor], Tensor]


class Classification(Protocol):
    """The part of a second stage that turns logits into a loss and into scores."""

    @property
    def initial_bias(self) -> float:
        """What the biases of the class logits start from."""
        ...

    def num_logits(self, num_classes: int) -> int:
        """How many logits a region has."""
        ...

    def loss(self, logits: Float[Tensor, "r _"], labels: Int[Tensor, " r"]) -> Float[Tensor, ""]:
        """The sum over all regions."""
        ...

    def region_losses(self, logits: Float[Tensor, "r _"], labels: Int[Tensor, " r"]) -> Float[Tensor, " r"]:
        """The loss of each region."""
        ...

    def scores(self, logits: Float[Tensor, "r _"]) -> Float[Tensor, "r k"]:
        """Probabilities of the K classes."""
        ...


@dataclass(frozen=True)
class SoftmaxClassification:
    """K classes and background in competition: K + 1 logits, background last; cross-entropy (Fast R-CNN)."""

    @property
    def initial_bias(self) -> float:
        return 0.0

    def num_logits(self, num_classes: int) -> int:
        return num_classes + 1

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, reduction="sum")

    def region_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, reduction="none")

    def scores(self, logits: Tensor) -> Tensor:
        return F.softmax(logits, dim=1)[:, :-1]


def _binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none")


@dataclass(frozen=True, kw_only=True)
class SigmoidClassification:
    """Each class by itself against all else: K logits, and background is that none is there.

    `element_loss` is taken of each region and class and summed over the classes: binary cross-entropy, or
    `sigmoid_focal_loss`. At the start every class has `initial_probability` (detectron2 with USE_SIGMOID_CE: 0.01;
    MMDetection: 0.5), so that the many backgrounds do not drown the first steps.
    """

    element_loss: ElementLoss = _binary_cross_entropy
    initial_probability: float = 0.01

    @property
    def initial_bias(self) -> float:
        return math.log(self.initial_probability / (1 - self.initial_probability))

    def num_logits(self, num_classes: int) -> int:
        return num_classes

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.region_losses(logits, labels).sum()

    def region_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        targets = F.one_hot(labels, logits.shape[1] + 1)[:, :-1]
        return self.element_loss(logits, targets.to(logits.dtype)).sum(dim=1)

    def scores(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()
