"""FCOS's matching (Tian et al., 2019): a point belongs to the smallest box around it whose size fits the point's level.

Letters: G ground-truth boxes, T points of a picture or of one level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rcnn.boxes.geometry import lies_inside
from rcnn.matching.iou import Matches
from rcnn.records import Target

# Whether a box whose farthest side is exactly at a limit belongs to both levels (MMDetection) or to none (torchvision).
RangeEnds = Literal["included", "excluded"]


@dataclass(frozen=True, kw_only=True)
class CentreMatcher:
    """A point is positive for a box that it lies in, not `radius_strides` or more of its level from the box's centre
    (the larger of x and y; None: anywhere in the box), and whose farthest side is within the range of its level.

    Of several boxes it takes the smallest. All other points are negative, but for those in ignore regions. A range ends
    at `range_strides` strides of its level, where the next one begins; the first begins at 0 and the last has no end.
    At strides of 8 to 128 px and 8 strides these are the 64, 128, 256 and 512 px of the paper.
    """

    radius_strides: float | None = None
    range_strides: float = 8.0
    range_ends: RangeEnds = "included"

    def ranges_px(self, strides_px: Sequence[int]) -> list[tuple[float, float]]:
        """The least and the greatest distance to a farthest side, per level."""
        limits = [0.0, *(self.range_strides * stride for stride in strides_px[:-1]), math.inf]
        return list(pairwise(limits))

    def __call__(
        self, points_by_level: Sequence[Float[Tensor, "_ 2"]], strides_px: Sequence[int], target: Target
    ) -> Matches:
        """Matches of the points of all levels, level after level."""
        points = torch.cat(list(points_by_level))
        boxes = target.boxes_xyxy.to(points.dtype)
        ranges = self.ranges_px(strides_px)
        fits = torch.cat(
            [
                self._fits(of_level, boxes, stride, limits)
                for of_level, stride, limits in zip(points_by_level, strides_px, ranges, strict=True)
            ]
        )
        # A last column that is larger than every box: for points that fit none, and pictures without boxes.
        width, height = (boxes[:, 2:] - boxes[:, :2]).unbind(1)
        sizes = torch.where(fits, width * height, math.inf)
        smallest, gt_index = torch.cat((sizes, sizes.new_full((len(points), 1), math.inf)), dim=1).min(dim=1)
        positive = smallest < math.inf
        negative = ~positive
        if len(target.ignore_xyxy):
            negative &= ~lies_inside(points, target.ignore_xyxy).any(dim=1)
        return Matches(gt_index=gt_index.masked_fill(~positive, 0), positive=positive, negative=negative)

    def _fits(self, points: Tensor, boxes: Tensor, stride: int, limits: tuple[float, float]) -> Bool[Tensor, "t gt"]:
        x, y = points[:, 0, None], points[:, 1, None]
        x1, y1, x2, y2 = boxes.unbind(1)
        left, top, right, bottom = x - x1, y - y1, x2 - x, y2 - y
        nearest = torch.minimum(torch.minimum(left, right), torch.minimum(top, bottom))
        farthest = torch.maximum(torch.maximum(left, right), torch.maximum(top, bottom))
        low, high = limits
        included = self.range_ends == "included"
        in_range = (farthest >= low) & (farthest <= high) if included else (farthest > low) & (farthest < high)
        fits = (nearest > 0) & in_range
        if self.radius_strides is None:
            return fits
        from_centre = torch.maximum((x - (x1 + x2) / 2).abs(), (y - (y1 + y2) / 2).abs())
        return fits & (from_centre < self.radius_strides * stride)
