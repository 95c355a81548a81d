"""Normalisation layers of backbones and how a convolution runs with one.

Letters: C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

# "frozen": fixed statistics and affine numbers; "batch": trained on the statistics of each batch;
# "sync": the same over all processes; "fixed_statistics": affine numbers trained, statistics fixed (MMDetection's norm_eval).
NormKind = Literal["frozen", "batch", "sync", "fixed_statistics"]
MakeNorm = Callable[[int], nn.Module]


class FixedStatisticsBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that always uses its stored statistics, while its weight and bias are trained."""

    def train(self, mode: bool = True) -> FixedStatisticsBatchNorm2d:
        return super().train(False)


class SyncBatchNorm(nn.SyncBatchNorm):
    """Batch norm over all processes; on a CPU or in a single process it is plain batch norm."""

    def forward(self, input: Tensor) -> Tensor:
        if input.is_cuda and torch.distributed.is_initialized():
            return super().forward(input)
        return nn.BatchNorm2d.forward(self, input)  # type: ignore[arg-type]

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions, got {input.dim()}")


NORMS: dict[NormKind, Callable[..., nn.Module]] = {
    "frozen": FrozenBatchNorm2d,
    "batch": nn.BatchNorm2d,
    "sync": SyncBatchNorm,
    "fixed_statistics": FixedStatisticsBatchNorm2d,
}


def norm_factory(kind: NormKind, eps: float) -> MakeNorm:
    """The layer of that kind for a number of channels."""
    return partial(NORMS[kind], eps=eps)


def conv_norm(conv: nn.Conv2d, norm: nn.Module, x: Tensor) -> Tensor:
    """`norm(conv(x))`; a frozen norm is folded into the weights while a graph is recorded.

    The activation between the two would be stored for the backward pass: folding saves it and one pass over it. The
    weights' gradient passes through the scale, so what is trained is the same. Without a graph the two stay apart, for
    the preparation of a detector for inference to find and fold once.
    """
    if not (isinstance(norm, FrozenBatchNorm2d) and torch.is_grad_enabled()):
        return norm(conv(x))
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    weight = conv.weight * scale.reshape(-1, 1, 1, 1)
    shift = norm.bias - norm.running_mean * scale
    return F.conv2d(x, weight, shift, conv.stride, conv.padding, conv.dilation, conv.groups)
