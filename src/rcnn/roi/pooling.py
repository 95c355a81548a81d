"""From proposals to feature blocks: which level of the pyramid, and RoIAlign or RoIPool on it.

Letters: R regions of a batch, L levels, C channels, S output size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rcnn.boxes.geometry import area
from rcnn.ops.roi_align import roi_align
from rcnn.ops.roi_pool import roi_pool
from rcnn.records import Levels

# What `canonical_level` counts. "by_stride": level k is the map with stride 2^k, whichever maps there are;
# "by_position": the k-th map, whatever its stride (MMDetection).
LevelCount = Literal["by_stride", "by_position"]

# (features, boxes_xyxy, batch_index, level_index, scales=, output_size=) to [R, C, S, S]
Pool = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class LevelMap:
    """The FPN paper's rule: side `canonical_size_px` belongs to level `canonical_level`, twice that side to the next.

    Sides beyond the maps that exist belong to the first or last one. `epsilon` keeps sides on a border from falling by
    rounding; the systems add it in different places: "outside" the logarithm in torchvision, "inside" in MMDetection
    and detectron2. MMDetection's `finest_scale=56` is 56 px at level 0, "by_position", epsilon "inside": where the maps
    begin with P3, regions come from one map coarser than the paper has them, and its checkpoints need that.
    """

    canonical_size_px: float = 224
    canonical_level: int = 4
    epsilon: float = 1e-6
    epsilon_place: Literal["outside", "inside"] = "outside"
    count: LevelCount = "by_stride"

    def __call__(self, boxes_xyxy: Float[Tensor, "r 4"], strides_px: Sequence[int]) -> Int[Tensor, " r"]:
        """The index into `strides_px` for each region."""
        lowest, highest = 0, len(strides_px) - 1
        if self.count == "by_stride":
            lowest, highest = int(math.log2(strides_px[0])), int(math.log2(strides_px[-1]))
        ratio = area(boxes_xyxy).sqrt() / self.canonical_size_px
        inside = self.epsilon if self.epsilon_place == "inside" else 0.0
        outside = self.epsilon if self.epsilon_place == "outside" else 0.0
        level = torch.floor(self.canonical_level + torch.log2(ratio + inside) + outside)
        return level.clamp(lowest, highest).to(torch.int64) - lowest


@dataclass(frozen=True, kw_only=True)
class RoIPooling:
    """Pools each region from its level. `pool` is `align(...)` or `roi_pool`."""

    output_size: int
    pool: Pool
    level_map: LevelMap = LevelMap()

    def __call__(self, levels: Levels, boxes_xyxy: Sequence[Float[Tensor, "r 4"]]) -> Tensor:
        """The regions of each picture, in network-input pixels, to [R, C, S, S], pictures one after the other."""
        counts = torch.tensor([len(boxes) for boxes in boxes_xyxy])
        joined = torch.cat(list(boxes_xyxy))
        batch_index = torch.repeat_interleave(torch.arange(len(counts)), counts).to(joined.device)
        maps = levels.maps[: levels.num_roi_levels]
        strides = [shape.stride_px for shape in levels.shapes[: levels.num_roi_levels]]
        return self.pool(
            maps,
            joined,
            batch_index,
            self.level_map(joined, strides),
            scales=[(1 / stride, 1 / stride) for stride in strides],
            output_size=self.output_size,
        )


def align(*, sampling_ratio: int, aligned: bool) -> Pool:
    """RoIAlign (He et al., 2017). torchvision: ratio 2, not aligned; MMDetection and detectron2: 0, aligned."""
    return partial(roi_align, sampling_ratio=sampling_ratio, aligned=aligned)


def quantised() -> Pool:
    """RoIPool (Girshick, 2015), as in the paper."""
    return roi_pool
