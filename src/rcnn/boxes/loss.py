"""The loss of predicted deltas: on the deltas themselves, or on the boxes that they describe.

Letter: P boxes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from rcnn.boxes.coding import DeltaCoder

# From predicted and wanted deltas [P, 4] to a loss of each number, of each box, or to their sum.
DeltaLoss = Callable[[Tensor, Tensor], Tensor]
# torchvision's and simple-faster-rcnn's (sigma 3) bend of smooth L1, summed.
smooth_l1_ninth: DeltaLoss = partial(F.smooth_l1_loss, beta=1 / 9, reduction="sum")


def per_box(loss: DeltaLoss) -> DeltaLoss:
    """A loss of each number [P, 4] as one of each box [P]."""
    return partial(_summed_by_box, loss)


def _summed_by_box(loss: DeltaLoss, deltas: Float[Tensor, "p 4"], wanted: Float[Tensor, "p 4"]) -> Float[Tensor, " p"]:
    return loss(deltas, wanted).sum(dim=1)


class AbstractDecodedLoss(ABC):
    """A loss on the boxes themselves: of each, or their sum."""

    @abstractmethod
    def __call__(self, predicted_xyxy: Float[Tensor, "p 4"], truth_xyxy: Float[Tensor, "p 4"]) -> Tensor: ...


BoxLoss = DeltaLoss | AbstractDecodedLoss


def box_term(
    loss: BoxLoss,
    coder: DeltaCoder,
    deltas: Float[Tensor, "p 4"],
    references_xyxy: Float[Tensor, "p 4"],
    truth_xyxy: Float[Tensor, "p 4"],
) -> Tensor:
    """The loss of predicted deltas. Over no boxes it is zero or empty, and keeps the parameters in the graph."""
    if isinstance(loss, AbstractDecodedLoss):
        return loss(coder.decode(deltas, references_xyxy), truth_xyxy)
    return loss(deltas, coder.encode(truth_xyxy, references_xyxy))
