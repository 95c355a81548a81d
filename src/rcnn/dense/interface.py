"""The one interface of one-stage heads: a detector's head and a first stage alike.

Letters: N images, L levels, A priors per cell, K classes, P candidates of one image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor, nn

from rcnn.records import Levels, Losses, Target


@dataclass(frozen=True, kw_only=True)
class DensePrediction:
    """A head's raw maps per level, before any activation, and the pyramid that they were made from.

    `classes[l]` is [N, A * K, H_l, W_l], `boxes[l]` [N, A * 4, H_l, W_l], priors of a cell before classes and
    coordinates; `quality[l]` [N, A, H_l, W_l] where the head has such a branch (FCOS's centerness), else no maps. A
    head whose maps hold more per prior (a logit for background, sides as distributions) says so.
    """

    classes: tuple[Tensor, ...]
    boxes: tuple[Tensor, ...]
    quality: tuple[Tensor, ...] = ()
    levels: Levels


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """What a head found in one picture, before any NMS. `scores` are probabilities, `level` the pyramid's index."""

    boxes_xyxy: Float[Tensor, "candidates 4"]
    scores: Float[Tensor, " candidates"]
    labels: Int[Tensor, " candidates"]
    level: Int[Tensor, " candidates"]


class AbstractDenseHead(nn.Module, ABC):
    """A one-stage head of `num_classes` classes on the maps of a pyramid.

    Matcher, sampler, coder and losses are its own, each with the default that the head was published with.
    """

    num_classes: int
    strides_px: tuple[int, ...] | None = None
    """The strides of the maps that it was built for; None: it takes any."""

    def misfit(self, strides_px: Sequence[int]) -> str | None:
        """What the head was built for, where that is not a pyramid of these strides; None: it fits."""
        if self.strides_px is None or self.strides_px == tuple(strides_px):
            return None
        return f"maps at strides {', '.join(map(str, self.strides_px))}"

    @abstractmethod
    def forward(self, levels: Levels) -> DensePrediction:
        """Raw maps per level."""

    @abstractmethod
    def loss(self, prediction: DensePrediction, targets: Sequence[Target]) -> Losses:
        """The terms, unprefixed, as scalars; defined for pictures without boxes."""

    @abstractmethod
    def decode(self, prediction: DensePrediction, *, per_level: int | None, score_threshold: float) -> list[Candidates]:
        """Per picture at most `per_level` candidates of each level (None: all), best first, levels one after the other.

        Boxes are clipped to the picture. Those that score under `score_threshold`, or no number, are left out: by the
        score that the head ranks by, which may be more than the one it gives (`ScoreFusion` "rescore").
        """
