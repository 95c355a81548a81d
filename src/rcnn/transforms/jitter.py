"""Large-scale jitter (Ghiasi et al., 2020): a random scale, then a random part of the picture."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from rcnn.boxes.geometry import clip, has_min_side
from rcnn.records import Proposals, Size, Target
from rcnn.transforms.geometry import Kernel, Rounding, image_size, move_boxes, resize_pixels, resized_size, scale_boxes

# What a crop leaves of a box is none below this side (MMDetection's configs).
_MIN_SIDE_PX = 1e-2


@dataclass(frozen=True, kw_only=True)
class LargeScaleJitter:
    """Resize to the usual size times a factor drawn from `factors`, then keep a part of `crop_px` a side at most."""

    short_side: int
    max_long_side: int
    factors: tuple[float, float]
    crop_px: int | None
    rounding: Rounding = "round_half_up"
    kernel: Kernel = "bilinear_uint8"

    def __call__(self, image: Tensor, target: Target, generator: torch.Generator) -> tuple[Tensor, Target]:
        low, high = self.factors
        factor = low + (high - low) * float(torch.rand((), generator=generator))
        old = image_size(image)
        # The scaled sides are cut to whole pixels, as MMDetection does.
        short_side, max_long_side = (max(int(side * factor), 1) for side in (self.short_side, self.max_long_side))
        new = resized_size(old, short_side=short_side, max_long_side=max_long_side, rounding=self.rounding)
        image = resize_pixels(image, new, self.kernel)
        target = move_boxes(target, partial(scale_boxes, old=old, new=new))
        return (image, target) if self.crop_px is None else self._cropped(image, target, self.crop_px, generator)

    def _cropped(self, image: Tensor, target: Target, side: int, generator: torch.Generator) -> tuple[Tensor, Target]:
        size = image_size(image)
        kept = Size(min(size.height, side), min(size.width, side))
        top, left = (
            int(torch.randint(whole - part + 1, (), generator=generator))
            for whole, part in zip(size, kept, strict=True)
        )
        pixels = image[:, top : top + kept.height, left : left + kept.width]
        return pixels, crop_target(target, top=top, left=left, size=kept)


def crop_target(target: Target, *, top: int, left: int, size: Size) -> Target:
    """The truth about the part of a picture that begins at `top`, `left`: boxes cut to it, those outside left out."""

    def cut(boxes_xyxy: Tensor) -> Tensor:
        return clip(boxes_xyxy - boxes_xyxy.new_tensor([left, top, left, top]), size)

    moved = move_boxes(target, cut)
    kept = has_min_side(moved.boxes_xyxy, _MIN_SIDE_PX)
    return replace(
        moved,
        boxes_xyxy=moved.boxes_xyxy[kept],
        labels=moved.labels[kept],
        ignore_xyxy=moved.ignore_xyxy[has_min_side(moved.ignore_xyxy, _MIN_SIDE_PX)],
        proposals=None if moved.proposals is None else _large_enough(moved.proposals),
    )


def _large_enough(proposals: Proposals) -> Proposals:
    kept = has_min_side(proposals.boxes_xyxy, _MIN_SIDE_PX)
    scores = proposals.scores
    return Proposals(boxes_xyxy=proposals.boxes_xyxy[kept], scores=None if scores is None else scores[kept])
