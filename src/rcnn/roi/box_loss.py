"""The second stage's loss of the predicted boxes.

Letter: F foreground regions.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from rcnn.boxes.loss import AbstractDecodedLoss
from rcnn.ops.losses import IoULossKind, iou_loss


@dataclass(frozen=True, kw_only=True)
class DecodedBoxLoss(AbstractDecodedLoss):
    """An IoU loss on the boxes themselves, summed. MMDetection's Faster R-CNN with GIoU or IoU has weight 10."""

    kind: IoULossKind = "giou"
    weight: float = 1.0

    def __call__(self, predicted_xyxy: Float[Tensor, "f 4"], truth_xyxy: Float[Tensor, "f 4"]) -> Float[Tensor, ""]:
        return self.weight * iou_loss(predicted_xyxy, truth_xyxy, kind=self.kind).sum()
