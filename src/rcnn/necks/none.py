"""No neck: the heads see one of the backbone's maps as it is (C4, C5)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rcnn.necks.interface import AbstractNeck


class SingleMap(AbstractNeck):
    """The map number `index` of the backbone; negative numbers count from the coarsest."""

    def __init__(self, *, in_channels: Sequence[int], in_strides_px: Sequence[int], index: int = -1) -> None:
        super().__init__()
        self.index = range(len(in_channels))[index]
        self.num_maps_used = self.index + 1
        self.channels = in_channels[self.index]
        self.strides_px = (in_strides_px[self.index],)
        self.num_roi_levels = 1

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (maps[self.index],)
