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

# "frozen": fixed statistics and affine numbers; "batch": trained on the statistics of each batch; "sync": on those of
# all processes; "fixed_statistics": affine numbers trained, statistics fixed (MMDetection's norm_eval).
NormKind = Literal["frozen", "batch", "sync", "fixed_statistics"]
MakeNorm = Callable[[int], nn.Module]


class FixedStatisticsBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that always uses its stored statistics, while its weight and bias are trained."""

    def train(self, mode: bool = True) -> FixedStatisticsBatchNorm2d:
        super().train(False)
        return self


class SyncBatchNorm(nn.SyncBatchNorm):
    """Batch norm with the statistics of all processes, on every device: torch's own layer refuses to train on a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training and input.device.type == "cpu" and _num_processes() > 1:
            return self._exchange(input)
        return super().forward(input)

    def _exchange(self, input: Tensor) -> Tensor:
        """The same numbers from two differentiable sums over the processes: of the values, and of their squares."""
        axes, shape = (0, 2, 3), (1, -1, 1, 1)
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        sums = _sum_over_processes(torch.cat((x.sum(axes), x.new_tensor([x.numel() / x.shape[1]]))))
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centred = x - mean.reshape(shape)
        variance = _sum_over_processes(centred.square().sum(axes)) / count
        self._track(mean.detach(), variance.detach() * count / (count - 1).clamp(min=1))
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale.reshape(shape) + self.bias.reshape(shape)).to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)


def _num_processes() -> int:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if distributed else 1


def _sum_over_processes(value: Tensor) -> Tensor:
    from torch.distributed.nn.functional import all_reduce

    return all_reduce(value)


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
    scale, shift = _affine(norm)
    weight = conv.weight * scale.reshape(-1, 1, 1, 1)
    return F.conv2d(x, weight, shift, conv.stride, conv.padding, conv.dilation, conv.groups)


def _affine(norm: FrozenBatchNorm2d) -> tuple[Tensor, Tensor]:
    """The scale and shift per channel that a frozen norm amounts to."""
    weight, bias = norm.get_buffer("weight"), norm.get_buffer("bias")
    mean, variance = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
    scale = weight * (variance + norm.eps).rsqrt()
    return scale, bias - mean * scale
