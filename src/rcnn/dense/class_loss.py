"""The classification loss of heads that train on every prior.

Letters: N images, L levels, T priors of a picture over all levels, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from rcnn.dense.assignment import Assignment
from rcnn.dense.selection import per_prior
from rcnn.ops.losses import sigmoid_focal_loss


def focal_class_loss(
    class_maps: Sequence[Tensor], wanted: Assignment, *, num_classes: int, dtype: torch.dtype
) -> Float[Tensor, " n"]:
    """The focal losses of all counted priors, summed by picture; a positive is to be certain of its class."""
    logits = per_prior(class_maps, num_classes).flatten(0, 1).to(dtype)
    ones = logits.new_ones(len(wanted.positive))
    losses = sigmoid_focal_loss(logits, wanted.class_targets(ones, num_classes)).sum(dim=1)
    return (losses * wanted.counted).reshape(len(wanted.num_positive), -1).sum(dim=1)
