"""Convolution and linear layers for inference: activation and residual sum in the same pass, weights packed once.

On a CPU they run on oneDNN through PyTorch's own private operators (those torch.compile emits), which are tested for at
first use; where they are absent, fail or do not apply (CUDA, float64), the public operators do the same arithmetic.

Letters: N images, C channels, H W height and width, O output channels, S side of a pooled map.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from rcnn.ops.folding import FoldedWeights, StackedWeights, Unchanged


class Activation(Enum):
    """The value is oneDNN's name."""

    NONE = "none"
    RELU = "relu"
    RELU6 = "hardtanh"
    HARDSWISH = "hardswish"
    HARDSIGMOID = "hardsigmoid"
    SILU = "swish"
    SIGMOID = "sigmoid"


# What the activations do to a tensor that nobody else holds.
_IN_PLACE: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.NONE: lambda x: x,
    Activation.RELU: lambda x: F.relu(x, inplace=True),
    Activation.RELU6: lambda x: F.relu6(x, inplace=True),
    Activation.HARDSWISH: lambda x: F.hardswish(x, inplace=True),
    Activation.HARDSIGMOID: lambda x: F.hardsigmoid(x, inplace=True),
    Activation.SILU: lambda x: F.silu(x, inplace=True),
    Activation.SIGMOID: lambda x: x.sigmoid_(),
}


def _scalars(activation: Activation) -> list[float]:
    return [0.0, 6.0] if activation is Activation.RELU6 else []


@dataclass(frozen=True, kw_only=True)
class ConvGeometry:
    """How a convolution walks. `same` pads to ceil(size / stride) at run time, as TensorFlow's models do."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    same: bool = False

    def padded(self, x: Tensor, kernel: tuple[int, int]) -> Tensor:
        """The input with what `padding` cannot say: another number of cells on either side."""
        if not self.same:
            return x
        over = [
            max((math.ceil(size / stride) - 1) * stride + (side - 1) * dilation + 1 - size, 0)
            for size, side, stride, dilation in zip(x.shape[-2:], kernel, self.stride, self.dilation, strict=True)
        ]
        if not any(over):
            return x
        return F.pad(x, [over[1] // 2, over[1] - over[1] // 2, over[0] // 2, over[0] - over[0] // 2])

    def output_size(self, x: Tensor, kernel: tuple[int, int]) -> tuple[int, int]:
        height, width = (
            (size + 2 * padding - dilation * (side - 1) - 1) // stride + 1
            for size, side, padding, stride, dilation in zip(
                x.shape[-2:], kernel, self.padding, self.stride, self.dilation, strict=True
            )
        )
        return height, width


@dataclass(frozen=True, kw_only=True)
class OneDNNOperators:
    """PyTorch's private operators on oneDNN that are used here."""

    pointwise: Callable[..., Tensor]
    add_pointwise: Callable[..., Tensor]
    add_pointwise_: Callable[..., Tensor]  # writes into its first argument
    linear: Callable[..., Tensor]
    pack_convolution: Callable[..., Tensor]
    pack_linear: Callable[..., Tensor]


@cache
def onednn_operators() -> OneDNNOperators:
    """Raises AttributeError where the build lacks one."""
    operators = torch.ops.mkldnn
    return OneDNNOperators(
        pointwise=operators._convolution_pointwise.default,
        add_pointwise=operators._convolution_pointwise.binary,
        add_pointwise_=operators._convolution_pointwise_.binary,
        linear=operators._linear_pointwise.default,
        pack_convolution=operators._reorder_convolution_weight.default,
        pack_linear=operators._reorder_linear_weight.default,
    )


class FusedConv2d(nn.Module):
    """activation(conv(x) + other). `other` is optional, and is overwritten where `overwrites_other` says so.

    Holds its weights outside of parameters and buffers: it neither moves nor trains nor saves. They are folded at the
    first call, which tells the size of the map: the pack that oneDNN wants depends on it.
    """

    def __init__(
        self,
        *,
        weights: FoldedWeights,
        geometry: ConvGeometry,
        activation: Activation,
        overwrites_other: bool = False,
    ) -> None:
        super().__init__()
        self.geometry = geometry
        self.activation = activation
        self.overwrites_other = overwrites_other
        self.out_channels = weights.shape[0]
        self.kernel = (weights.shape[2], weights.shape[3])
        self.uses_onednn = onednn_serves(weights.device, weights.dtype)
        self._folded: FoldedWeights | None = weights
        self._weight: Tensor = torch.empty(0)
        self._bias: Tensor = torch.empty(0)
        self._is_packed = False
        # As oneDNN's operators want them after the weights. Small networks feel every list that is built per call.
        self._walk = (list(geometry.padding), list(geometry.stride), list(geometry.dilation), geometry.groups)
        self._ending = (activation.value, _scalars(activation), "")

    def forward(self, x: Float[Tensor, "n c h w"], other: Tensor | None = None) -> Tensor:
        if self._folded is not None:
            self._fold(self._folded)
        if self.geometry.same:
            x = self.geometry.padded(x, self.kernel)
        if not self.uses_onednn or x.numel() == 0:
            return self._plain(x, other)
        if not self._is_packed:
            self._pack(x)
        if other is None:
            return self._operators.pointwise(x, self._weight, self._bias, *self._walk, *self._ending)
        size = self.geometry.output_size(x, self.kernel)
        if other.shape != (x.shape[0], self.out_channels, *size):
            return self._activate(self._convolve_alone(x) + other)
        return self._convolve_and_add(x, other)

    def walking(self, geometry: ConvGeometry) -> FusedConv2d:
        """The same layer with another geometry. To be asked for before the first call."""
        assert self._folded is not None
        return FusedConv2d(weights=self._folded, geometry=geometry, activation=self.activation)

    def _fold(self, weights: FoldedWeights) -> None:
        weight, self._bias = weights.get()
        # The pack is made from the usual layout: nothing is copied for it before.
        self._weight = weight if self.uses_onednn else weight.contiguous(memory_format=torch.channels_last)
        self._folded = None

    def _pack(self, x: Tensor) -> None:
        self._operators = onednn_operators()
        self._weight = self._operators.pack_convolution(self._weight, *self._walk, list(x.shape))
        self._is_packed = True

    def _plain(self, x: Tensor, other: Tensor | None) -> Tensor:
        weight = self._weight.to_dense() if self._is_packed else self._weight
        geometry = self.geometry
        out = F.conv2d(x, weight, self._bias, geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
        if other is not None:
            out = out.add_(other) if other.shape == out.shape else out + other
        return self._activate(out)

    def _activate(self, x: Tensor) -> Tensor:
        return _IN_PLACE[self.activation](x)

    def _convolve_alone(self, x: Tensor) -> Tensor:
        return self._operators.pointwise(x, self._weight, self._bias, *self._walk, "none", [], "")

    def _convolve_and_add(self, x: Tensor, other: Tensor) -> Tensor:
        relu = "relu" if self.activation is Activation.RELU else None
        ending = ("add", 1.0, relu, [], None)
        if self.overwrites_other and other.is_contiguous(memory_format=torch.channels_last):
            out = self._operators.add_pointwise_(other, x, self._weight, self._bias, *self._walk, *ending)
        else:
            out = self._operators.add_pointwise(x, other, self._weight, self._bias, *self._walk, *ending)
        return out if relu else self._activate(out)


class FusedPointwise(nn.Module):
    """activation(conv(x)) of a 1x1 convolution of every cell: a linear layer, of which oneDNN has less overhead.

    Holds its weights as `FusedConv2d` does.
    """

    def __init__(self, *, weights: FoldedWeights | StackedWeights, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        self.out_channels = weights.shape[0]
        self.uses_onednn = onednn_serves(weights.device, weights.dtype)
        self._folded: FoldedWeights | StackedWeights | None = weights
        self._weight: Tensor = torch.empty(0)
        self._bias: Tensor = torch.empty(0)
        self._is_packed = False
        self._ending = (activation.value, _scalars(activation), "")

    @classmethod
    def joined(cls, layers: Sequence[FusedPointwise]) -> FusedPointwise:
        """Several layers of one map, with one activation, as one. To be asked for before the first call."""
        parts = [part for layer in layers if isinstance(part := layer._folded, FoldedWeights)]
        assert len(parts) == len(layers)
        return cls(weights=StackedWeights(parts), activation=layers[0].activation)

    @staticmethod
    def serves(kernel: tuple[int, ...], geometry: ConvGeometry) -> bool:
        """Whether a convolution is of that kind."""
        return kernel == (1, 1) and geometry.stride == (1, 1) and geometry.padding == (0, 0) and geometry.groups == 1

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n o h w"]:
        if self._folded is not None:
            weight, self._bias = self._folded.get()
            self._weight, self._folded = weight.flatten(1), None
        cells = x.permute(0, 2, 3, 1)
        # Of maps of one cell (squeeze and excitation) the public operator has the least overhead.
        if not self.uses_onednn or x.numel() == 0 or (x.shape[2:] == (1, 1) and not self._is_packed):
            weight = self._weight.to_dense() if self._is_packed else self._weight
            out = _IN_PLACE[self.activation](F.linear(cells, weight, self._bias))
        else:
            if not self._is_packed:
                rows = x.numel() // x.shape[1]
                self._weight, self._is_packed = onednn_operators().pack_linear(self._weight, rows), True
            out = onednn_operators().linear(cells, self._weight, self._bias, *self._ending)
        return out.permute(0, 3, 1, 2)


class FusedLinear(nn.Module):
    """activation(linear(x)). Not for moving, training or saving, as `FusedConv2d`. Packed at once, where oneDNN serves;
    else the weight is shared."""

    def __init__(self, *, weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"], activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        self._bias = bias.contiguous()
        self._is_packed = onednn_serves(weight.device, weight.dtype)
        self._shared = Unchanged(onednn_operators().pack_linear(weight) if self._is_packed else weight)
        self._ending = (activation.value, _scalars(activation), "")

    def forward(self, x: Float[Tensor, "*rows i"]) -> Float[Tensor, "*rows o"]:
        (weight,) = self._shared.read()
        assert weight is not None
        if not self._is_packed or x.numel() == 0:
            dense = weight.to_dense() if self._is_packed else weight
            return _IN_PLACE[self.activation](F.linear(x, dense, self._bias))
        return onednn_operators().linear(x, weight, self._bias, *self._ending)


class FusedFlatLinear(nn.Module):
    """activation(linear(x.flatten(1))) for square maps of `channels` channels, which are read as they lie in memory.

    Flattening would transpose channels-last ones (50 MB for a thousand RoIs). To oneDNN it is a convolution with a
    kernel of the maps' size. This weight can be most of a detector, and packing makes two more copies of what it packs,
    hence in parts, and at once: while a detector is prepared there are no activations beside them.
    Not for moving, training or saving, as `FusedConv2d`.
    """

    def __init__(
        self, *, weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"], activation: Activation, channels: int
    ) -> None:
        super().__init__()
        self.activation = activation
        side = math.isqrt(weight.shape[1] // channels)
        self._map = (channels, side, side)
        self._bias = bias.contiguous()
        self._ending = (activation.value, _scalars(activation), "")
        self._packed: list[tuple[Tensor, Tensor]] = []
        self._shared = Unchanged()
        if onednn_serves(weight.device, weight.dtype) and math.prod(self._map) == weight.shape[1]:
            sizes = _halves(len(weight))
            parts = zip(weight.split(sizes), self._bias.split(sizes), strict=True)
            self._packed = [(self._pack(part), own_bias) for part, own_bias in parts]
        else:
            self._shared = Unchanged(weight)

    def _pack(self, weight: Float[Tensor, "o i"]) -> Tensor:
        kernel = weight.view(len(weight), *self._map)
        packed = onednn_operators().pack_convolution(kernel, *_UNMOVED, [_PACKED_ROWS, *self._map])
        _return_freed_memory()
        return packed

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n o"]:
        if not self._packed or x.shape[1:] != self._map or x.numel() == 0:
            return _IN_PLACE[self.activation](F.linear(x.flatten(1), self._dense_weight(), self._bias))
        pointwise = onednn_operators().pointwise
        parts = [pointwise(x, weight, bias, *_UNMOVED, *self._ending).flatten(1) for weight, bias in self._packed]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _dense_weight(self) -> Float[Tensor, "o i"]:
        if self._packed:
            return torch.cat([weight.to_dense().flatten(1) for weight, _ in self._packed])
        (weight,) = self._shared.read()
        assert weight is not None
        return weight


# The rows that a pack is made for. It serves 10 to 1,000 as fast as a pack of their own does.
_PACKED_ROWS = 512
# Fewer outputs are not packed apart.
_FEWEST_OUTPUTS = 64
# Padding, stride, dilation and groups of a kernel that covers its map.
_UNMOVED = ([0, 0], [1, 1], [1, 1], 1)


def _halves(outputs: int) -> list[int]:
    """Half of the outputs, half of the rest, and so on: with the second copy of a part beside them, packed parts need
    no more memory at any time than all do with that of the last, small one."""
    sizes = []
    while outputs > _FEWEST_OUTPUTS:
        sizes.append(outputs // 2)
        outputs -= sizes[-1]
    return [*sizes, outputs]


def _return_freed_memory() -> None:
    """To the system, where the C library can: else the second copy of a part stays with the process, unused."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


# ----------------------------------------------------------------------------------------------------- the feature test


def onednn_serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN's fused operators can be used there."""
    return device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and onednn_works(dtype)


@cache
def onednn_works(dtype: torch.dtype) -> bool:
    """Whether oneDNN's operators work in that dtype: each is run once and compared with the public one."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:  # type: ignore[attr-defined]
        return False
    try:
        with torch.inference_mode():
            if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
                return False
            return _convolutions_agree(dtype) and _linear_agrees(dtype)
    except (AttributeError, RuntimeError, TypeError, ValueError):  # absent, refused, or with another signature
        return False


def _convolutions_agree(dtype: torch.dtype) -> bool:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 8, 6, 6, generator=generator).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(8, 8, 3, 3, generator=generator).to(dtype)
    bias = torch.randn(8, generator=generator).to(dtype)
    other = torch.randn(1, 8, 6, 6, generator=generator).to(dtype).contiguous(memory_format=torch.channels_last)
    walk, ending = ([1, 1], [1, 1], [1, 1], 1), ("add", 1.0, "relu", [], None)
    operators = onednn_operators()
    packed = operators.pack_convolution(weight, *walk, [1, 8, 6, 6])
    expected = F.conv2d(x.float(), weight.float(), bias.float(), padding=1)
    agree = all(
        _close(
            operators.pointwise(x, packed, bias, *walk, activation.value, _scalars(activation), ""),
            _IN_PLACE[activation](expected.clone()),
        )
        for activation in Activation
    )
    summed = (expected + other.float()).relu_()
    agree = agree and _close(operators.add_pointwise(x, other, packed, bias, *walk, *ending), summed)
    return agree and _close(operators.add_pointwise_(other, x, packed, bias, *walk, *ending), summed)


def _linear_agrees(dtype: torch.dtype) -> bool:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((5, 8), (4, 8), (4,)))
    operators = onednn_operators()
    packed = operators.pack_linear(weight, 5)
    expected = F.linear(x.float(), weight.float(), bias.float())
    # Transposed and without bias, as a backward pass needs it.
    turned = operators.linear(weight, x.t().contiguous().t(), None, "none", [], "")
    return _close(turned, expected.t() - bias.float()[:, None]) and all(
        _close(
            operators.linear(x, packed, bias, activation.value, _scalars(activation), ""),
            _IN_PLACE[activation](expected.clone()),
        )
        for activation in Activation
    )


def _close(given: Tensor, expected: Tensor) -> bool:
    tolerance = 0.1 if given.dtype == torch.bfloat16 else 1e-4
    return bool(torch.isfinite(given).all()) and float((given.float() - expected).abs().max()) < tolerance
