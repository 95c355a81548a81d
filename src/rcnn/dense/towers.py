"""Pieces that one-stage heads are made of: convolutions above a pyramid's maps, a scale per level, the first bias."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

MakeNorm = Callable[[int], nn.Module]


def group_norm(channels: int) -> nn.Module:
    """Group norm of 32 groups, or of as many as `channels` share with 32; two channels or more in each, since the one
    number of a group on a map of a single cell would have no deviation."""
    groups = math.gcd(32, channels)
    return nn.GroupNorm(max(groups // 2, 1) if groups == channels else groups, channels)


class ConvTower(nn.Module):
    """`num_convs` 3x3 convolutions with ReLU on one map, each with a norm of its own if `make_norm` makes one.

    With a norm a convolution has no bias, unless `conv_bias` asks for one (torchvision's FCOS has both). Weights start
    normal with deviation 0.01, biases at 0, as in RetinaNet and FCOS. `out_channels` are `in_channels` without
    convolutions.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        channels: int,
        num_convs: int,
        make_norm: MakeNorm | None = None,
        conv_bias: bool | None = None,
    ) -> None:
        super().__init__()
        has_bias = make_norm is None if conv_bias is None else conv_bias
        self.out_channels = channels if num_convs else in_channels
        self.layers = nn.ModuleList()
        for number in range(num_convs):
            conv = nn.Conv2d(channels if number else in_channels, channels, 3, padding=1, bias=has_bias)
            start_small(conv)
            self.layers.append(nn.Sequential(conv) if make_norm is None else nn.Sequential(conv, make_norm(channels)))

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n channels h w"]:
        for layer in self.layers:
            x = F.relu(layer(x))
        return x


def two_towers(
    *, in_channels: int, channels: int, num_convs: int, make_norm: MakeNorm | None, conv_bias: bool | None = None
) -> tuple[ConvTower, ConvTower]:
    """Equal ones, for classes and for boxes."""
    for_classes, for_boxes = (
        ConvTower(
            in_channels=in_channels, channels=channels, num_convs=num_convs, make_norm=make_norm, conv_bias=conv_bias
        )
        for _ in range(2)
    )
    return for_classes, for_boxes


class Scale(nn.Module):
    """A number that is learnt and that a map is multiplied with: one per pyramid level lets levels share a tower."""

    def __init__(self, initial: float = 1.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(float(initial)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def prior_bias(probability: float = 0.01) -> float:
    """The logit of `probability`: where classes start, so that the many negatives weigh little (RetinaNet, 4.1)."""
    return math.log(probability / (1 - probability))


def start_small(conv: nn.Conv2d, bias: float = 0.0) -> None:
    """Weights normal with deviation 0.01, the bias at `bias`."""
    nn.init.normal_(conv.weight, std=0.01)
    if conv.bias is not None:
        nn.init.constant_(conv.bias, bias)
