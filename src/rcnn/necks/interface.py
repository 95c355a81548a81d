"""What a detector knows of a neck."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn


class AbstractNeck(nn.Module, ABC):
    """A backbone's maps to the maps that the heads see, all with `channels` channels, finest first.

    The first `num_roi_levels` of them are those that regions are pooled from. `num_maps_used` of the backbone's maps,
    counted from the finest, are enough for it.
    """

    channels: int
    strides_px: tuple[int, ...]
    num_roi_levels: int
    num_maps_used: int

    @abstractmethod
    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Maps of the backbone, [N, C_i, H_i, W_i], to `len(strides_px)` maps [N, channels, H_l, W_l]."""
