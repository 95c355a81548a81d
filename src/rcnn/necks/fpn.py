"""Feature pyramid network (Lin et al., 2017).

Letters: L maps of the backbone that are used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from rcnn.necks.interface import AbstractNeck

# What is added above the coarsest map: "pool", P6 = every second cell of P5, for anchors only (Faster R-CNN);
# "convs_on_p5" and "convs_on_c5", P6 and P7 by 3x3 convolutions with stride 2 (FCOS and RetinaNet); or nothing.
ExtraLevels = Literal["pool", "convs_on_p5", "convs_on_c5", "none"]
# What P6 goes through on its way to P7: ReLU (torchvision, detectron2, MMDetection's FCOS), or nothing (MMDetection's
# other heads, whose configs do not set `relu_before_extra_convs`).
P7Activation = Literal["relu", "none"]
# How a coarser map comes to the size of the next finer one: nearest (the paper and most others), or bilinear between
# the centres of cells (MindSpore).
Upsampling = Literal["nearest", "bilinear"]


class FPN(AbstractNeck):
    """A top-down pyramid of 1x1 lateral and 3x3 output convolutions, from the backbone's map `first_map` up.

    `make_norm` gives a normalisation after each convolution (which then has no bias), as torchvision's v2 models have.
    """

    def __init__(
        self,
        *,
        in_channels: Sequence[int],
        in_strides_px: Sequence[int],
        channels: int = 256,
        extra: ExtraLevels = "pool",
        first_map: int = 0,
        p7_activation: P7Activation = "relu",
        make_norm: Callable[[int], nn.Module] | None = None,
        upsampling: Upsampling = "nearest",
    ) -> None:
        super().__init__()
        used = list(in_channels)[first_map:]
        strides = list(in_strides_px)[first_map:]
        self.first_map = first_map
        self.channels = channels
        self.extra: ExtraLevels = extra
        self.p7_activation: P7Activation = p7_activation
        self.upsampling: Upsampling = upsampling
        self.lateral = nn.ModuleList(_convolution(count, channels, 1, make_norm) for count in used)
        self.output = nn.ModuleList(_convolution(channels, channels, 3, make_norm) for _ in used)
        self.num_roi_levels = len(used)
        self.num_maps_used = len(in_channels)
        if extra == "pool":
            strides.append(strides[-1] * 2)
        elif extra != "none":
            source = channels if extra == "convs_on_p5" else used[-1]
            self.p6 = nn.Conv2d(source, channels, 3, 2, 1)
            self.p7 = nn.Conv2d(channels, channels, 3, 2, 1)
            strides += [strides[-1] * 2, strides[-1] * 4]
            self.num_roi_levels += 2
        self.strides_px = tuple(strides)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        used = maps[self.first_map :]
        inner = [lateral(x) for lateral, x in zip(self.lateral, used, strict=True)]
        for level in range(len(inner) - 2, -1, -1):
            # Matched to the size of the finer map: a backbone may have rounded it up.
            inner[level] = inner[level] + self._upsampled(inner[level + 1], inner[level])
        out = [output(x) for output, x in zip(self.output, inner, strict=True)]
        if self.extra == "pool":
            out.append(F.max_pool2d(out[-1], kernel_size=1, stride=2))
        elif self.extra != "none":
            p6 = self.p6(out[-1] if self.extra == "convs_on_p5" else used[-1])
            out += [p6, self.p7(F.relu(p6) if self.p7_activation == "relu" else p6)]
        return tuple(out)

    def _upsampled(self, coarse: Tensor, fine: Tensor) -> Tensor:
        if self.upsampling == "bilinear":
            return F.interpolate(coarse, size=fine.shape[-2:], mode="bilinear", align_corners=False)
        return F.interpolate(coarse, size=fine.shape[-2:], mode="nearest")


def _convolution(
    in_channels: int, channels: int, kernel: int, make_norm: Callable[[int], nn.Module] | None
) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2, bias=make_norm is None)
    return nn.Sequential(conv) if make_norm is None else nn.Sequential(conv, make_norm(channels))
