"""Boxes as numbers that a network can regress, relative to reference boxes (anchors or proposals)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

# The paper's clamp on the predicted log size: no box grows beyond 1000/16 of its reference.
MAX_LOG_RATIO = math.log(1000 / 16)


@dataclass(frozen=True, kw_only=True)
class DeltaCoder:
    """Faster R-CNN's (dx, dy, dw, dh): shifts of the centre in reference sizes, logarithms of the size ratios.

    `weights` multiply the encoded numbers (MMDetection's `stds` are their inverse). `max_log_ratio` limits dw and dh
    when decoding: None for no limit (simple-faster-rcnn), log(1000/16) in torchvision; `symmetric_clamp` limits below
    as well (MMDetection).
    """

    weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    max_log_ratio: float | None = MAX_LOG_RATIO
    symmetric_clamp: bool = False

    def encode(self, boxes_xyxy: Float[Tensor, "a 4"], references_xyxy: Float[Tensor, "a 4"]) -> Float[Tensor, "a 4"]:
        """The deltas that turn each reference into its box. Both must have area."""
        size = references_xyxy[:, 2:] - references_xyxy[:, :2]
        centre = references_xyxy[:, :2] + 0.5 * size
        box_size = boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]
        box_centre = boxes_xyxy[:, :2] + 0.5 * box_size
        deltas = torch.cat(((box_centre - centre) / size, torch.log(box_size / size)), dim=1)
        return deltas * deltas.new_tensor(self.weights)

    def decode(
        self, deltas: Float[Tensor, "*lead 4"], references_xyxy: Float[Tensor, "*lead 4"]
    ) -> Float[Tensor, "*lead 4"]:
        """The boxes that the deltas describe; leading dimensions broadcast."""
        size = references_xyxy[..., 2:] - references_xyxy[..., :2]
        centre = references_xyxy[..., :2] + 0.5 * size
        deltas = deltas / deltas.new_tensor(self.weights)
        log_ratio = deltas[..., 2:]
        if self.max_log_ratio is not None:
            lowest = -self.max_log_ratio if self.symmetric_clamp else None
            log_ratio = log_ratio.clamp(min=lowest, max=self.max_log_ratio)
        new_centre = centre + deltas[..., :2] * size
        half = 0.5 * torch.exp(log_ratio) * size
        return torch.cat((new_centre - half, new_centre + half), dim=-1)


@dataclass(frozen=True, kw_only=True)
class DistanceCoder:
    """FCOS's (left, top, right, bottom): the distances in pixels from a point to the sides of its box.

    All four are positive where the point lies inside the box.
    """

    def encode(self, boxes_xyxy: Float[Tensor, "a 4"], points_xy: Float[Tensor, "a 2"]) -> Float[Tensor, "a 4"]:
        """The distances of each point to its box."""
        return torch.cat((points_xy - boxes_xyxy[:, :2], boxes_xyxy[:, 2:] - points_xy), dim=1)

    def decode(
        self, distances: Float[Tensor, "*lead 4"], points_xy: Float[Tensor, "*lead 2"]
    ) -> Float[Tensor, "*lead 4"]:
        """The boxes that lie around the points at these distances; leading dimensions broadcast."""
        return torch.cat((points_xy - distances[..., :2], points_xy + distances[..., 2:]), dim=-1)


def centerness_of(points_xy: Float[Tensor, "p 2"], boxes_xyxy: Float[Tensor, "p 4"]) -> Float[Tensor, " p"]:
    """1 in the middle of the box, falling to 0 at its sides (FCOS, equation 3). Every point lies in its box."""
    before, after = points_xy - boxes_xyxy[:, :2], boxes_xyxy[:, 2:] - points_xy
    ratio = torch.minimum(before, after) / torch.maximum(before, after)
    return ratio.prod(dim=1).sqrt()
