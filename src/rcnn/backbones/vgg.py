"""VGG16 (Simonyan and Zisserman, 2014) up to conv5_3: the paper's backbone."""

from __future__ import annotations

import torchvision
from torch import Tensor, nn

from rcnn.backbones.interface import AbstractBackbone, freeze


class VGG16Backbone(AbstractBackbone):
    """One map at stride 16: conv5_3 after its ReLU, without the last pooling.

    `frozen_convs` leading convolutions are not trained: 4 (conv1_1 to conv2_2) in the paper.
    """

    def __init__(self, *, frozen_convs: int = 4) -> None:
        super().__init__()
        self.channels = (512,)
        self.strides_px = (16,)
        layers = list(torchvision.models.vgg16(weights=None).features.children())[:30]
        self.features = nn.Sequential(*layers)
        convs = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
        freeze(*convs[:frozen_convs])

    def keep_maps(self, count: int) -> None:
        """There is one map, and whoever uses a backbone uses a map."""

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        return (self.features(pixels),)
