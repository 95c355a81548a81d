"""ResNet (He et al., 2015) as a backbone: C2 to C5. Module names are torchvision's, so its ImageNet files load."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from rcnn.backbones.interface import AbstractBackbone, freeze
from rcnn.backbones.norm import MakeNorm, conv_norm

# Where a block with stride 2 has it: in its 3x3 convolution ("pytorch") or its first 1x1 ("caffe", MSRA weights).
StrideStyle = Literal["pytorch", "caffe"]
Depth = Literal[18, 34, 50, 101]
# Of the last stage's 3x3 convolutions. 2: the stage keeps the size of C4 instead of halving it (DC5).
Dilation = Literal[1, 2]
# Where the stem's max pool is padded: a cell on all four sides, or what the windows lack right and below (MindSpore's
# "same" of maps with even sides).
StemPool = Literal["centred", "far_end"]

BLOCKS: dict[Depth, tuple[int, int, int, int]] = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
}


@dataclass(frozen=True, kw_only=True)
class Cardinality:
    """ResNeXt (Xie et al., 2016): the 3x3 convolution of a bottleneck in groups, each `group_width` wide in C2."""

    groups: int = 1
    group_width: int = 64

    def width(self, channels: int) -> int:
        """Of the bottleneck, where a ResNet has `channels`."""
        return channels * self.group_width // 64 * self.groups


PLAIN = Cardinality()


class Downsample(nn.Sequential):
    """The projection on the shortcut of a block that changes its shape."""

    def __init__(self, in_channels: int, channels: int, stride: int, make_norm: MakeNorm) -> None:
        super().__init__(nn.Conv2d(in_channels, channels, 1, stride, bias=False), make_norm(channels))

    def forward(self, input: Tensor) -> Tensor:
        conv, norm = self
        assert isinstance(conv, nn.Conv2d)
        return conv_norm(conv, norm, input)


def _shortcut(in_channels: int, channels: int, stride: int, make_norm: MakeNorm) -> Downsample | None:
    changes = stride != 1 or in_channels != channels
    return Downsample(in_channels, channels, stride, make_norm) if changes else None


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (ResNet-18 and -34)."""

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        style: StrideStyle,
        make_norm: MakeNorm,
        dilation: Dilation = 1,
        cardinality: Cardinality = PLAIN,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, dilation, dilation, bias=False)
        self.bn1 = make_norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, dilation, dilation, bias=False)
        self.bn2 = make_norm(channels)
        self.downsample = _shortcut(in_channels, channels, stride, make_norm)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = F.relu(conv_norm(self.conv1, self.bn1, x), inplace=True)
        out = conv_norm(self.conv2, self.bn2, out)
        out += shortcut
        return F.relu(out, inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut (ResNet-50 and -101)."""

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        style: StrideStyle,
        make_norm: MakeNorm,
        dilation: Dilation = 1,
        cardinality: Cardinality = PLAIN,
    ) -> None:
        super().__init__()
        first, middle = (stride, 1) if style == "caffe" else (1, stride)
        out_channels = channels * self.expansion
        width, groups = cardinality.width(channels), cardinality.groups
        self.conv1 = nn.Conv2d(in_channels, width, 1, first, bias=False)
        self.bn1 = make_norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, middle, dilation, dilation, groups, bias=False)
        self.bn2 = make_norm(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = make_norm(out_channels)
        self.downsample = _shortcut(in_channels, out_channels, stride, make_norm)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = F.relu(conv_norm(self.conv1, self.bn1, x), inplace=True)
        out = F.relu(conv_norm(self.conv2, self.bn2, out), inplace=True)
        out = conv_norm(self.conv3, self.bn3, out)
        out += shortcut
        return F.relu(out, inplace=True)


_WIDTHS = (64, 128, 256, 512)


def stage_channels(depth: Depth) -> tuple[int, int, int, int]:
    """Channels of C2, C3, C4 and C5."""
    expansion = _block(depth).expansion
    first, second, third, fourth = (width * expansion for width in _WIDTHS)
    return first, second, third, fourth


def _block(depth: Depth) -> type[BasicBlock] | type[Bottleneck]:
    return BasicBlock if depth in (18, 34) else Bottleneck


def resnet_stage(
    *,
    depth: Depth,
    index: int,
    style: StrideStyle,
    make_norm: MakeNorm,
    dilation: Dilation = 1,
    cardinality: Cardinality = PLAIN,
) -> nn.Sequential:
    """The blocks of stage `index`, 0 (C2) to 3 (C5). All but the first halve the map, unless they are dilated."""
    block, width = _block(depth), _WIDTHS[index]
    in_channels = 64 if index == 0 else stage_channels(depth)[index - 1]
    stride = 1 if index == 0 or dilation > 1 else 2
    blocks = [block(in_channels, width, stride, style, make_norm, dilation, cardinality)]
    out_channels = width * block.expansion
    rest = BLOCKS[depth][index] - 1
    blocks += [block(out_channels, width, 1, style, make_norm, dilation, cardinality) for _ in range(rest)]
    return nn.Sequential(*blocks)


def initialise_convolutions(module: nn.Module) -> None:
    """The start of He et al. for layers that no file brings."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")


class ResNetBackbone(AbstractBackbone):
    """The maps C2, C3, C4, C5 at strides 4, 8, 16, 32 (C5 at 16 with `dilation` 2).

    `frozen_stages` counts from the stem (1) to layer4 (5): that many leading stages are not trained.
    """

    def __init__(
        self,
        *,
        depth: Depth,
        make_norm: MakeNorm,
        style: StrideStyle = "pytorch",
        frozen_stages: int = 0,
        cardinality: Cardinality = PLAIN,
        dilation: Dilation = 1,
        stem_pool: StemPool = "centred",
    ) -> None:
        super().__init__()
        self.stem_pool: StemPool = stem_pool
        self.channels: tuple[int, ...] = stage_channels(depth)
        self.strides_px: tuple[int, ...] = (4, 8, 16, 32 // dilation)
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = make_norm(64)
        for index in range(4):
            of_stage: Dilation = dilation if index == 3 else 1
            stage = resnet_stage(
                depth=depth,
                index=index,
                style=style,
                make_norm=make_norm,
                dilation=of_stage,
                cardinality=cardinality,
            )
            self.add_module(f"layer{index + 1}", stage)
        self.layer_names = ("layer1", "layer2", "layer3", "layer4")
        initialise_convolutions(self)
        stages = [[self.conv1, self.bn1], *[[self.get_submodule(name)] for name in self.layer_names]]
        for stage in stages[:frozen_stages]:
            freeze(*stage)

    def keep_maps(self, count: int) -> None:
        for name in self.layer_names[count:]:
            delattr(self, name)
        self.layer_names = self.layer_names[:count]
        self.channels, self.strides_px = self.channels[:count], self.strides_px[:count]

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        x = F.relu(conv_norm(self.conv1, self.bn1, pixels), inplace=True)
        far_end = self.stem_pool == "far_end"
        x = F.max_pool2d(x, 3, 2, 0 if far_end else 1, ceil_mode=far_end)
        maps = []
        for name in self.layer_names:
            x = self.get_submodule(name)(x)
            maps.append(x)
        return tuple(maps)
