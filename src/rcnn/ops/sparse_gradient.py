"""A 3x3 convolution whose backward pass visits only the cells that have a gradient.

A loss over a sample of anchors leaves nearly all cells of an RPN's map without one: all but a few hundred of fifty
thousand. The backward pass, twice the work of the forward, is then a matter of small products over those few.

Letters: N images, C input and O output channels, H W height and width, A active cells.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rcnn.ops.roi_align import rows_of

# Above this share of active cells the dense backward pass is as fast.
_MOST_ACTIVE = 1 / 8


def conv_for_sampled_loss(conv: nn.Conv2d, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n o h w"]:
    """`conv(x)` for a 3x3 convolution with stride 1 and padding 1, with a backward pass made for sparse gradients.

    The gradients are those of `conv`, in another order of summation. On a CPU; elsewhere, and where no graph is
    recorded, it is `conv(x)` itself.
    """
    # Asked first: without a graph (inference, tracing for it) only the plain call may be seen.
    if (
        not torch.is_grad_enabled()
        or torch.compiler.is_exporting()
        or x.device.type != "cpu"
        or not _is_plain_3x3(conv)
    ):
        return conv(x)
    assert conv.bias is not None
    return _SparseBackwardConv.apply(x, conv.weight, conv.bias)


def _is_plain_3x3(conv: nn.Conv2d) -> bool:
    walk = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    return walk == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros") and conv.bias is not None


class _SparseBackwardConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        return F.conv2d(x, weight, bias, padding=1)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator hides the parameters)
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        (upstream,) = grad_outputs
        dtypes = (x.dtype, weight.dtype, bias.dtype)
        # Under autocast the forward pass ran in the dtype of `upstream`.
        x, own_weight = x.to(upstream.dtype), weight.to(upstream.dtype)
        active = rows_of(upstream).any(1).nonzero()[:, 0]
        if len(active) > _MOST_ACTIVE * upstream[:, 0].numel():
            gradients = torch.ops.aten.convolution_backward(
                upstream,
                x,
                own_weight,
                [len(bias)],
                [1, 1],
                [1, 1],
                [1, 1],
                False,
                [0, 0],
                1,
                list(ctx.needs_input_grad),
            )
        else:
            gradients = _sparse_gradients(x, own_weight, upstream, active, ctx.needs_input_grad[0])
        return tuple(None if g is None else g.to(dtype) for g, dtype in zip(gradients, dtypes, strict=True))


def _sparse_gradients(
    x: Tensor, weight: Tensor, upstream: Tensor, active: Int[Tensor, " a"], wants_x: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    channels, out_channels = x.shape[1], weight.shape[0]
    rows, inside = _neighbours(active, x.shape[-2], x.shape[-1])
    gradient = rows_of(upstream)[active]
    table = rows_of(x)
    patches = table[rows].mul_(inside[:, :, None])
    of_weight = (gradient.t() @ patches.flatten(1)).view(out_channels, 3, 3, channels).permute(0, 3, 1, 2)
    of_x = None
    if wants_x:
        back = (gradient @ weight.permute(0, 2, 3, 1).reshape(out_channels, -1)).view(len(active), 9, channels)
        summed = torch.zeros_like(table).index_add_(0, rows.flatten(), back.mul_(inside[:, :, None]).flatten(0, 1))
        of_x = summed.view(x.shape[0], x.shape[2], x.shape[3], channels).permute(0, 3, 1, 2)
    return of_x, of_weight, gradient.sum(0)


def _neighbours(active: Tensor, height: int, width: int) -> tuple[Int[Tensor, "a nine"], Tensor]:
    """The rows of the 3x3 cells around each active one, and whether they lie on the map (else some row that does)."""
    step = torch.arange(-1, 2, device=active.device)
    y, x = (active // width % height)[:, None, None] + step[:, None], (active % width)[:, None, None] + step
    inside = ((y >= 0) & (y < height) & (x >= 0) & (x < width)).flatten(1)
    first = (active // (height * width) * height * width)[:, None, None]
    rows = first + y.clamp(0, height - 1) * width + x.clamp(0, width - 1)
    return rows.flatten(1), inside
