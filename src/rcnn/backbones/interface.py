"""What a neck and a detector know of a backbone."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class AbstractBackbone(nn.Module, ABC):
    """Pictures to feature maps, finest first. `channels[i]` and `strides_px[i]` describe map i."""

    channels: tuple[int, ...]
    strides_px: tuple[int, ...]

    @abstractmethod
    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Normalised pixels [N, 3, H, W] to maps [N, channels[i], ceil(H / strides_px[i]), ceil(W / strides_px[i])]."""

    @abstractmethod
    def keep_maps(self, count: int) -> None:
        """Give the `count` finest maps alone. What only coarser ones need is neither run nor trained.

        A parameter without influence on the loss would get no gradient, which training on several processes cannot do.
        """


def freeze(*modules: nn.Module) -> None:
    """No gradient for any parameter of the modules. Batch norms keep the behaviour that their kind has."""
    for module in modules:
        module.requires_grad_(False)
