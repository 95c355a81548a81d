"""The one interface of second stages: one stage, or a cascade of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import nn

from rcnn.records import Detections, Levels, Losses, Proposals, Target


class AbstractRoIStage(nn.Module, ABC):
    """From proposals to detections of `num_classes` classes."""

    num_classes: int

    @abstractmethod
    def loss(self, levels: Levels, proposals: Sequence[Proposals], targets: Sequence[Target]) -> Losses:
        """The terms as scalars, each with a name that begins with `roi`; defined where there are no boxes."""

    @abstractmethod
    def predict(self, levels: Levels, proposals: Sequence[Proposals]) -> list[Detections]:
        """Detections per picture in network-input pixels, best first."""
