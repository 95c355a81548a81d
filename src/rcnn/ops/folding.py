"""Batch norms with fixed statistics as what they are: an affine map that a convolution can take over.

Letters: O output channels, I input channels per group, K kernel side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn


def is_fixed_norm(module: nn.Module) -> bool:
    """Whether the module is a batch norm on stored statistics: frozen, or `nn.BatchNorm2d` in evaluation mode.

    Known by its tensors, since torchvision, timm and we each have a frozen one.
    """
    tensors = [getattr(module, name, None) for name in ("running_mean", "running_var")]
    if not all(isinstance(tensor, Tensor) and tensor.dim() == 1 for tensor in tensors):
        return False
    return hasattr(module, "eps") and not (module.training and isinstance(module, nn.modules.batchnorm._BatchNorm))


def affine_of(norm: nn.Module) -> tuple[Float[Tensor, " o"], Float[Tensor, " o"]]:
    """Scale and shift per channel of a fixed norm, in float64."""
    mean, variance = _double(norm.running_mean), _double(norm.running_var)
    scale = (variance + float(norm.eps)).rsqrt()  # type: ignore[arg-type]
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if weight is not None:
        scale = scale * _double(weight)
    shift = -mean * scale
    return scale, shift if bias is None else shift + _double(bias)


def folded(
    weight: Float[Tensor, "o i k k"], bias: Float[Tensor, " o"] | None, norm: nn.Module | None
) -> tuple[Float[Tensor, "o i k k"], Float[Tensor, " o"]]:
    """Weight and bias of the convolution that equals the given one followed by `norm`, in float64."""
    weight = _double(weight)
    bias = weight.new_zeros(weight.shape[0]) if bias is None else _double(bias)
    if norm is None:
        return weight, bias
    scale, shift = affine_of(norm)
    return weight * scale[:, None, None, None], bias * scale + shift


class Unchanged:
    """Tensors that are not copied (they can be half of the detector), and so must not change until they are read."""

    def __init__(self, *tensors: Tensor | None) -> None:
        self.tensors = tensors
        self._versions = self._counted()

    def read(self) -> tuple[Tensor | None, ...]:
        """Raises RuntimeError where a tensor was changed in the meantime."""
        if self._counted() != self._versions:
            raise RuntimeError("the module was trained or loaded after it was prepared: prepare it again")
        return self.tensors

    def _counted(self) -> list[int]:
        return [tensor._version for tensor in self.tensors if tensor is not None and not tensor.is_inference()]


class FoldedWeights:
    """Weight and bias of a convolution and the fixed norm after it, folded when they are first needed.

    So a detector that is prepared and then let go is never there twice.
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.Module | None, dtype: torch.dtype) -> None:
        self.shape = conv.weight.shape
        self.device, self.dtype = conv.weight.device, dtype
        self._conv, self._norm = conv, norm
        of_norm = [] if norm is None else [*norm.parameters(), *norm.buffers()]
        self._unchanged = Unchanged(conv.weight, conv.bias, *of_norm)

    def get(self) -> tuple[Float[Tensor, "o i k k"], Float[Tensor, " o"]]:
        self._unchanged.read()
        weight, bias = folded(self._conv.weight, self._conv.bias, self._norm)
        return weight.to(self.dtype, copy=True), bias.to(self.dtype, copy=True)


class StackedWeights:
    """Those of several convolutions of one map, as one whose outputs come one after the other."""

    def __init__(self, parts: Sequence[FoldedWeights]) -> None:
        first = parts[0]
        self.shape = torch.Size((sum(part.shape[0] for part in parts), *first.shape[1:]))
        self.device, self.dtype = first.device, first.dtype
        self._parts = parts

    def get(self) -> tuple[Float[Tensor, "o i k k"], Float[Tensor, " o"]]:
        weights, biases = zip(*(part.get() for part in self._parts), strict=True)
        return torch.cat(weights), torch.cat(biases)


def _double(tensor: Tensor | nn.Module) -> Tensor:
    assert isinstance(tensor, Tensor)
    return tensor.detach().to(torch.float64)
