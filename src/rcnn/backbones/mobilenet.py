"""MobileNetV2 and MobileNetV3-Large as backbones, on torchvision's modules (so its ImageNet files load)."""

from __future__ import annotations

from typing import Literal

import torchvision
from torch import Tensor, nn

from rcnn.backbones.interface import AbstractBackbone, freeze
from rcnn.backbones.norm import MakeNorm

MobileNetVersion = Literal["v2", "v3_large"]
# "pyramid": the last block at each of the strides 4, 8, 16, 32. "last_two": the first block at stride 32 and the last
# convolution, both at stride 32: what torchvision's detectors on MobileNetV3 use.
MapChoice = Literal["pyramid", "last_two"]

_BUILDERS = {"v2": torchvision.models.mobilenet_v2, "v3_large": torchvision.models.mobilenet_v3_large}
# The blocks that halve the map, in order; the stem (block 0) is at stride 2.
_STRIDED_BLOCKS = {"v2": (2, 4, 7, 14), "v3_large": (2, 4, 7, 13)}


class MobileNetBackbone(AbstractBackbone):
    """`frozen_stages` counts from the stem (1) to the last convolution (6); a stage begins where the map is halved."""

    def __init__(
        self, *, version: MobileNetVersion, make_norm: MakeNorm, maps: MapChoice = "pyramid", frozen_stages: int = 0
    ) -> None:
        super().__init__()
        self.features: nn.Sequential = _BUILDERS[version](weights=None, norm_layer=make_norm).features
        strided, last = _STRIDED_BLOCKS[version], len(self.features) - 1
        self.strides_px: tuple[int, ...] = (32, 32) if maps == "last_two" else (4, 8, 16, 32)
        self.map_indices = (strided[-1], last) if maps == "last_two" else (*(block - 1 for block in strided[1:]), last)
        self.channels = tuple(_out_channels(self.features[index]) for index in self.map_indices)
        stage_starts = (0, *strided, last, last + 1)
        freeze(*self.features[: stage_starts[frozen_stages]])

    def keep_maps(self, count: int) -> None:
        self.map_indices, self.strides_px = self.map_indices[:count], self.strides_px[:count]
        self.channels = self.channels[:count]
        self.features = self.features[: self.map_indices[-1] + 1]

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        maps = []
        x = pixels
        for index, block in enumerate(self.features):
            x = block(x)
            if index in self.map_indices:
                maps.append(x)
        return tuple(maps)


def _out_channels(block: nn.Module) -> int:
    channels = block.out_channels
    assert isinstance(channels, int)
    return channels
