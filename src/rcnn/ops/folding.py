"""Batch norms with fixed statistics as what they are: an affine map that a convolution can take over.

Letters: O output channels, I input channels per group, K kernel side.
"""

from __future__ import annotations

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


def _double(tensor: Tensor | nn.Module) -> Tensor:
    assert isinstance(tensor, Tensor)
    return tensor.detach().to(torch.float64)
