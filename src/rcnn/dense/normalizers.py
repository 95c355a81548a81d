"""What the losses of a batch are divided by, where they count every prior: three peers, three ways.

Letters: N images.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rcnn.ops.losses import mean_over_processes

# From the number of positives of each picture to what the sum of each picture's losses is divided by.
LossNormalizer = Callable[[Int[Tensor, " n"]], Float[Tensor, " n"]]


def by_batch(num_positive: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The positives of the batch, a picture without any counted as one (MMDetection); the mean over the processes."""
    total = mean_over_processes(num_positive.clamp(min=1).sum().to(torch.float64))
    return total.expand(len(num_positive))


def by_picture(num_positive: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Each picture by its own positives, and then the mean of the pictures (torchvision)."""
    return num_positive.clamp(min=1).to(torch.float64) * len(num_positive)


class MovingNormalizer(nn.Module):
    """A moving mean of the batches' numbers of positives (detectron2): few positives do not make large steps.

    Each call in training mode adds its batch; in evaluation mode it is added for that call alone. The mean starts at
    `initial` and is part of the state dict, so that a resumed training goes on as it would have. The positives are the
    mean over the processes (detectron2 keeps a mean for each).
    """

    def __init__(self, *, initial: float = 100.0, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.tensor(initial))

    @torch.no_grad()
    def forward(self, num_positive: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        old = self.get_buffer("mean")
        count = mean_over_processes(num_positive.sum().to(old.dtype)).clamp(min=1)
        mean = old * self.momentum + count * (1 - self.momentum)
        if self.training:
            old.copy_(mean)
        return mean.expand(len(num_positive))
