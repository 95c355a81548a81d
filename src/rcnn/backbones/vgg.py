"""VGG16 (Simonyan and Zisserman, 2014) up to conv5_3: the paper's backbone."""

from __future__ import annotations

import torchvision
from torch import Tensor

from rcnn.backbones.interface import AbstractBackbone, freeze


class VGG16Backbone(AbstractBackbone):
    """One map at stride 16: conv5_3 after its ReLU, without the last pooling.

    `frozen_convs` leading convolutions are not trained: 4 (conv1_1 to conv2_2) in the paper.
    """

    def __init__(self, *, frozen_convs: int = 4) -> None:
        super().__init__()
        self.channels = (512,)
        self.strides_px = (16,)
        self.features = torchvision.models.vgg16(weights=None).features[:30]
        convs = [module for module in self.features if hasattr(module, "weight")]
        freeze(*convs[:frozen_convs])

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        return (self.features(pixels),)
