"""Fully connected layers for training on a CPU.

PyTorch hands float32 matrix products to MKL, which was measured at 40% of oneDNN's rate. These go to oneDNN, by the
operators of `rcnn.ops.fused`, where those work; the weights stay parameters and the gradients are those of `nn.Linear`.

Letters: R rows or maps, C channels, H W height and width, I inputs (C * H * W for maps), O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rcnn.ops.fused import onednn_operators, onednn_works

# Outputs whose weight gradient is computed at once: no second gradient of the whole weight exists.
_OUTPUTS_AT_ONCE = 256


def linear(layer: nn.Linear, x: Float[Tensor, "r i"]) -> Float[Tensor, "r o"]:
    """`layer(x)`."""
    # Asked first: without a graph (inference, tracing for it) only the plain call may be seen.
    if not torch.is_grad_enabled() or x.dtype != torch.float32 or not _is_for_onednn(layer, x):
        return layer(x)
    return _OneDNNLinear.apply(x, layer.weight, layer.bias)


def linear_over_maps(layer: nn.Linear, x: Float[Tensor, "r c h w"]) -> Float[Tensor, "r o"]:
    """`layer(x.flatten(1))`; channels-last maps are read as they lie, where flattening would transpose them."""
    if not torch.is_grad_enabled() or not _is_for_onednn(layer, x):
        return layer(x.flatten(1))
    return _OneDNNLinear.apply(x, layer.weight, layer.bias)


def _is_for_onednn(layer: nn.Linear, x: Tensor) -> bool:
    if torch.compiler.is_exporting() or x.device.type != "cpu" or layer.bias is None or x.numel() == 0:
        return False
    if torch.is_autocast_enabled("cpu"):
        return x.dtype == torch.bfloat16 == torch.get_autocast_dtype("cpu") and onednn_works(torch.bfloat16)
    return x.dtype == layer.weight.dtype and onednn_works(x.dtype)


class _OneDNNLinear(torch.autograd.Function):
    """On rows or on maps; the columns of the weight are brought into the order in which channels-last maps lie."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(_as_rows(x), _as_lying(weight, x).to(x.dtype), bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator hides the parameters)
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        upstream = grad_outputs[0].contiguous()
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = _product(upstream, _as_lying(weight, x).to(x.dtype).t())
            of_x = of_x.view(len(x), *x.shape[2:], x.shape[1]).movedim(-1, 1)
        of_weight = _weight_gradient(upstream, x, weight) if ctx.needs_input_grad[1] else None
        return of_x, of_weight, upstream.sum(0).to(weight.dtype)


def _weight_gradient(upstream: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    gradient = torch.empty_like(weight)
    columns = _as_rows(x).t()
    for outputs, rows in zip(upstream.t().split(_OUTPUTS_AT_ONCE), gradient.split(_OUTPUTS_AT_ONCE), strict=True):
        part = _product(outputs, columns)
        rows.view(len(rows), *x.shape[1:]).copy_(part.view(len(rows), *x.shape[2:], x.shape[1]).movedim(-1, 1))
    return gradient


def _as_rows(x: Tensor) -> Float[Tensor, "r i"]:
    """Maps as rows with the channels of a cell together; rows as they are."""
    return x.movedim(1, -1).flatten(1)


def _as_lying(weight: Tensor, x: Tensor) -> Float[Tensor, "o i"]:
    """The weight with its columns in the order of `_as_rows(x)`."""
    return weight.view(len(weight), *x.shape[1:]).movedim(1, -1).flatten(1)


def _product(
    rows: Float[Tensor, "r i"], weight: Float[Tensor, "o i"], bias: Tensor | None = None
) -> Float[Tensor, "r o"]:
    return onednn_operators().linear(rows, weight, bias, "none", [], "")
