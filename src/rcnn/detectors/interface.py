"""What the engine, evaluation and prediction know of a detector."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import nn

from rcnn.records import Detections, ImageBatch, Losses, Target


class AbstractDetector(nn.Module, ABC):
    """A detector has two verbs, and neither looks at `self.training` to choose what it returns."""

    @abstractmethod
    def loss(self, batch: ImageBatch, targets: Sequence[Target]) -> Losses:
        """Every loss term of the batch as a scalar, also for pictures without boxes. Their sum is what is trained."""

    @abstractmethod
    def predict(self, batch: ImageBatch) -> list[Detections]:
        """Detections per picture, boxes in network-input pixels (of the resized picture), best first."""
