"""The records that the parts hand to each other: frozen, named, with units and frames in the names.

Letters: N images, G ground-truth boxes, I ignore regions, R proposals, D detections, H W padded height and width.
Boxes are x1, y1, x2, y2 in continuous pixel coordinates: width is x2 - x1, the first pixel spans 0 to 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rcnn.plain_records import ClassTable as ClassTable
from rcnn.plain_records import Size as Size

# One loss tensor (a scalar) by the name of its term.
Losses = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class LevelShape:
    """The grid of one pyramid level and the distance of its cells in input pixels."""

    height: int
    width: int
    stride_px: int


@dataclass(frozen=True, kw_only=True)
class ImageBatch:
    """Pictures as the network gets them: RGB, 0 to 255, resized, padded at the bottom and right.

    `pixels` is uint8 or floating point and not normalised (the detector normalises, in one pass).
    `sizes` are the resized pictures without padding; `original_sizes` the pictures as they were before the resize.
    `proposals` are regions given from outside, one entry for each picture, in network-input pixels; None: none were.
    `scales` are network-input pixels per original pixel along both axes, where pictures were fitted into a canvas;
    None: each axis has the ratio of its sides.
    """

    pixels: Tensor  # [N, 3, H, W]
    sizes: tuple[Size, ...]
    original_sizes: tuple[Size, ...]
    image_ids: tuple[int, ...] = ()
    proposals: tuple[Proposals, ...] | None = None
    scales: tuple[float, ...] | None = None

    def __len__(self) -> int:
        return len(self.sizes)

    def ratio_xy(self, picture: int) -> tuple[float, float]:
        """Original pixels per network-input pixel of a picture, along x and along y."""
        if self.scales is not None:
            return 1 / self.scales[picture], 1 / self.scales[picture]
        size, original = self.sizes[picture], self.original_sizes[picture]
        return original.width / size.width, original.height / size.height

    @property
    def padded_size(self) -> Size:
        return Size(*self.pixels.shape[-2:])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ImageBatch:
        proposals = self.proposals
        if proposals is not None:
            proposals = tuple(given.to(device, non_blocking=non_blocking) for given in proposals)
        return replace(self, pixels=self.pixels.to(device, non_blocking=non_blocking), proposals=proposals)

    def pin_memory(self) -> ImageBatch:
        """The same in page-locked memory, which a loader asks for where a device copies from it."""
        proposals = None if self.proposals is None else tuple(given.pin_memory() for given in self.proposals)
        return replace(self, pixels=self.pixels.pin_memory(), proposals=proposals)


@dataclass(frozen=True, kw_only=True)
class Levels:
    """The feature maps of a batch, finest first, and the geometry of the pictures they were made from.

    `image_scales` is network-input pixels per original pixel (by width). The first `num_roi_levels` maps are those that
    regions are pooled from: a map that was only added for larger anchors (FPN's P6 by pooling) is not one of them.
    """

    maps: tuple[Tensor, ...]  # each [N, C, H_l, W_l]
    shapes: tuple[LevelShape, ...]
    padded_size: Size
    image_sizes: tuple[Size, ...]
    image_scales: tuple[float, ...]
    num_roi_levels: int


def _no_boxes() -> Tensor:
    return torch.zeros(0, 4)


@dataclass(frozen=True, kw_only=True)
class Target:
    """The truth about one picture, in the frame of the picture it travels with (resized pixels inside a batch).

    `labels` are 0..K-1. `ignore_xyxy` are regions (crowd, difficult) that are neither right nor wrong. `proposals` are
    regions given from outside, on their way through the transforms; inside a batch they are the batch's.
    """

    boxes_xyxy: Float[Tensor, "gt 4"]
    labels: Int[Tensor, " gt"]
    ignore_xyxy: Float[Tensor, "ignore 4"] = field(default_factory=_no_boxes)
    proposals: Proposals | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Target:
        return Target(
            boxes_xyxy=self.boxes_xyxy.to(device, non_blocking=non_blocking),
            labels=self.labels.to(device, non_blocking=non_blocking),
            ignore_xyxy=self.ignore_xyxy.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> Target:
        """The same in page-locked memory, which a loader asks for where a device copies from it."""
        return Target(
            boxes_xyxy=self.boxes_xyxy.pin_memory(),
            labels=self.labels.pin_memory(),
            ignore_xyxy=self.ignore_xyxy.pin_memory(),
        )


@dataclass(frozen=True, kw_only=True)
class Proposals:
    """Class-agnostic boxes of one picture, best first, in network-input pixels.

    `scores` are probabilities; None where the giver knows none (a file of boxes alone).
    """

    boxes_xyxy: Float[Tensor, "proposals 4"]
    scores: Float[Tensor, " proposals"] | None

    def __len__(self) -> int:
        return len(self.boxes_xyxy)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Proposals:
        return Proposals(
            boxes_xyxy=self.boxes_xyxy.to(device, non_blocking=non_blocking),
            scores=None if self.scores is None else self.scores.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> Proposals:
        """The same in page-locked memory, which a loader asks for where a device copies from it."""
        return Proposals(
            boxes_xyxy=self.boxes_xyxy.pin_memory(),
            scores=None if self.scores is None else self.scores.pin_memory(),
        )


@dataclass(frozen=True, kw_only=True)
class Detections:
    """What was found in one picture, best first. The frame is that of the giver: network input from a detector,
    original pixels from a `Predictor`. `labels` are 0..K-1, `scores` probabilities."""

    boxes_xyxy: Float[Tensor, "detections 4"]
    scores: Float[Tensor, " detections"]
    labels: Int[Tensor, " detections"]

    def __len__(self) -> int:
        return len(self.scores)

    def to(self, device: torch.device | str) -> Detections:
        return Detections(
            boxes_xyxy=self.boxes_xyxy.to(device), scores=self.scores.to(device), labels=self.labels.to(device)
        )
