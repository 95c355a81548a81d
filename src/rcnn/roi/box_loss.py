"""The loss of the predicted boxes: on deltas, or on the boxes that they describe.

Letter: F foreground regions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from rcnn.boxes.coding import DeltaCoder
from rcnn.ops.losses import IoULossKind, iou_loss

# Predicted and wanted deltas [F, 4] to the sum of their losses.
DeltaLoss = Callable[[Tensor, Tensor], Tensor]
# torchvision's bend of smooth L1, summed.
smooth_l1_ninth: DeltaLoss = partial(F.smooth_l1_loss, beta=1 / 9, reduction="sum")


@dataclass(frozen=True, kw_only=True)
class DecodedBoxLoss:
    """An IoU loss on the boxes themselves, summed. MMDetection's Faster R-CNN with GIoU or IoU has weight 10."""

    kind: IoULossKind = "giou"
    weight: float = 1.0

    def __call__(self, predicted_xyxy: Float[Tensor, "f 4"], truth_xyxy: Float[Tensor, "f 4"]) -> Float[Tensor, ""]:
        return self.weight * iou_loss(predicted_xyxy, truth_xyxy, kind=self.kind).sum()


BoxLoss = DeltaLoss | DecodedBoxLoss


def box_term(
    loss: BoxLoss,
    coder: DeltaCoder,
    deltas: Float[Tensor, "f 4"],
    references_xyxy: Float[Tensor, "f 4"],
    truth_xyxy: Float[Tensor, "f 4"],
) -> Float[Tensor, ""]:
    """The loss of predicted deltas. Over no boxes it is zero, and keeps the parameters in the graph."""
    if isinstance(loss, DecodedBoxLoss):
        return loss(coder.decode(deltas, references_xyxy), truth_xyxy)
    return loss(deltas, coder.encode(truth_xyxy, references_xyxy))
