"""Which positives and negatives take part in a loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rcnn.matching.iou import Matches


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Indices of the reference boxes that were drawn."""

    positive: Int[Tensor, " p"]
    negative: Int[Tensor, " n"]


def _random_order(count: int, device: torch.device) -> Tensor:
    return torch.randperm(count, device=device)


@dataclass(frozen=True, kw_only=True)
class BalancedSampler:
    """At most `total` references, at most `positive_fraction` of them positive, the rest negatives (Fast R-CNN).

    With `negatives` "share" these are never more than what positives may not be, also where positives are few: a
    smaller sample (MindSpore).

    `order` gives the random order of n things, of which the first ones are kept; inject another for a known draw.
    """

    total: int
    positive_fraction: float
    negatives: Literal["fill", "share"] = "fill"
    order: Callable[[int, torch.device], Tensor] = _random_order

    def __call__(self, matches: Matches) -> Sample:
        most_positive = int(self.total * self.positive_fraction)
        positive = self._draw(matches.positive, most_positive)
        taken = most_positive if self.negatives == "share" else len(positive)
        negative = self._draw(matches.negative, self.total - taken)
        return Sample(positive=positive, negative=negative)

    def _draw(self, candidates: Tensor, limit: int) -> Tensor:
        indices = candidates.nonzero().flatten()
        if len(indices) <= limit:
            return indices
        return indices[self.order(len(indices), indices.device)[:limit]]


@dataclass(frozen=True, kw_only=True)
class EverySampler:
    """All positives and all negatives (focal losses, and the recorded training stages of the peers)."""

    def __call__(self, matches: Matches) -> Sample:
        return Sample(positive=matches.positive.nonzero().flatten(), negative=matches.negative.nonzero().flatten())


@dataclass(frozen=True, kw_only=True)
class HardExampleSampler:
    """The places of a `BalancedSampler`, given to the references with the largest losses (OHEM, Shrivastava et al.,
    2016, with quotas for positives and negatives as MMDetection has it).
    """

    total: int
    positive_fraction: float

    def __call__(self, matches: Matches, losses: Float[Tensor, " a"]) -> Sample:
        """`losses` of all references; a loss that is not a number counts as the largest."""
        positive = _hardest(matches.positive, losses, int(self.total * self.positive_fraction))
        negative = _hardest(matches.negative, losses, self.total - len(positive))
        return Sample(positive=positive, negative=negative)


def _hardest(candidates: Tensor, losses: Tensor, limit: int) -> Tensor:
    indices = candidates.nonzero().flatten()
    if len(indices) <= limit:
        return indices
    return indices[losses[indices].topk(limit).indices]
