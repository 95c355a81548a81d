"""The box head of Faster R-CNN on C4: the last stage of the ResNet, run on each region.

Letters: R regions, C channels, S pooled size.
"""

from __future__ import annotations

from torch import Tensor, nn

from rcnn.backbones.norm import MakeNorm
from rcnn.backbones.resnet import Depth, StrideStyle, initialise_convolutions, resnet_stage, stage_channels


class Res5Head(nn.Module):
    """`layer4` on pooled C4, [R, C, S, S] to maps of half the size, and their mean [R, 2048] (He et al., 2015, on C4).

    Its layers are named as in the backbone, whose file of ImageNet weights it starts from.
    """

    def __init__(self, *, depth: Depth, style: StrideStyle, make_norm: MakeNorm) -> None:
        super().__init__()
        self.in_channels, self.out_features = stage_channels(depth)[2:]
        self.layer4 = resnet_stage(depth=depth, index=3, style=style, make_norm=make_norm)
        initialise_convolutions(self.layer4)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.layer4(pooled).mean((2, 3))
