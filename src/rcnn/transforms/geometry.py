"""What moves pixels and boxes together: horizontal flip and resize. Random choices come from a generator that is given.

The resize rules are properties of the system a checkpoint comes from:

    torchvision             floor, bilinear_float
    simple-faster-rcnn      round, bilinear_float_mirror (skimage, order 1, mode "reflect")
    MMDetection             round_half_up, bilinear_uint8 (OpenCV, to the bit)
    detectron2              round_half_up, bilinear_uint8_antialias (Pillow, within one grey level)
    MindSpore RCNN          round, area_uint8 (OpenCV, to the bit: INTER_AREA where it shrinks), on a canvas

The bilinear kernels differ in what lies beyond the last pixel (the same pixel again, or the one before it), in whether
a smaller picture is an average of all pixels (antialias) or of the nearest four, and in their arithmetic.

A picture is [3, H, W], 0 to 255; its boxes are x1 y1 x2 y2 in its pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from rcnn.boxes.geometry import clip
from rcnn.records import Size, Target
from rcnn.transforms.opencv_kernels import average, interpolate

# "round" is half to even, as skimage does; "round_half_up" is int(x + 0.5), as detectron2 and MMDetection do.
Rounding = Literal["floor", "round", "round_half_up"]
# "area_uint8" averages the area that a new pixel covers, where the picture shrinks; else it is "bilinear_uint8".
Kernel = Literal["bilinear_float", "bilinear_float_mirror", "bilinear_uint8", "bilinear_uint8_antialias", "area_uint8"]


def resized_size(size: Size, *, short_side: int, max_long_side: int, rounding: Rounding) -> Size:
    """The size whose short side is `short_side`, or smaller where the long side would pass `max_long_side`.

    The arithmetic (Python's double precision, one scale for both sides) is that of torchvision and simple-faster-rcnn,
    so that sizes are equal to the pixel: 427 at 800 / 427 is 800 or 799 depending on it.
    """
    scale = min(short_side / min(size), max_long_side / max(size))
    height, width = (_to_integer(side * scale, rounding) for side in size)
    return Size(max(height, 1), max(width, 1))


def scale_onto(canvas: Size, size: Size) -> float:
    """The largest scale at which a picture fits."""
    return min(canvas.width / size.width, canvas.height / size.height)


def size_on(canvas: Size, size: Size, *, rounding: Rounding) -> Size:
    """The size of a picture of `size` that fills the canvas along one side."""
    scale = scale_onto(canvas, size)
    height, width = (min(_to_integer(side * scale, rounding), most) for side, most in zip(size, canvas, strict=True))
    return Size(max(height, 1), max(width, 1))


def _to_integer(length: float, rounding: Rounding) -> int:
    match rounding:
        case "floor":
            return math.floor(length)
        case "round":
            return round(length)
        case "round_half_up":
            return math.floor(length + 0.5)


def resize_pixels(image: Tensor, size: Size, kernel: Kernel, scale: float | None = None) -> Tensor:
    """The picture [3, H, W] at `size`, in floating point (float64 stays float64) or in uint8, as the kernel says.

    `scale` is what the size was rounded from, where OpenCV was given it rather than the size: its kernels place their
    pixels by it.
    """
    if kernel in ("bilinear_float", "bilinear_float_mirror"):
        # Planes first: a decoded picture has its channels last, where this kernel takes more than twice as long.
        dtype = image.dtype if image.is_floating_point() else torch.float32
        image = image.to(dtype, memory_format=torch.contiguous_format)
    if kernel == "bilinear_float_mirror":
        return _interpolate_axis(_interpolate_axis(image, 1, size.height), 2, size.width)
    if kernel == "bilinear_float":
        return F.interpolate(image[None], size=tuple(size), mode="bilinear", align_corners=False)[0]
    if image.dtype != torch.uint8:
        image = image.round().clamp(0, 255).to(torch.uint8)
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    if kernel == "area_uint8" and size.height <= image.shape[1] and size.width <= image.shape[2]:
        return average(image, size, scale)
    if kernel in ("bilinear_uint8", "area_uint8"):
        return interpolate(image, size, scale)
    return F.interpolate(image[None], size=tuple(size), mode="bilinear", align_corners=False, antialias=True)[0]


def _interpolate_axis(image: Tensor, axis: int, length: int) -> Tensor:
    """Linear interpolation along one axis at pixel centres, mirrored about the centre of the first and last pixel."""
    last = image.shape[axis] - 1
    places = (torch.arange(length, dtype=torch.float64) + 0.5) * (image.shape[axis] / length) - 0.5
    places = places.abs()
    places = torch.where(places > last, 2 * last - places, places).clamp(min=0)
    low = places.floor().long()
    weight = (places - low).to(image.dtype).view([-1 if axis == other else 1 for other in range(3)])
    low_pixels = image.index_select(axis, low)
    return torch.lerp(low_pixels, image.index_select(axis, (low + 1).clamp(max=last)), weight)


def scale_boxes(boxes_xyxy: Float[Tensor, "boxes 4"], old: Size, new: Size) -> Float[Tensor, "boxes 4"]:
    """Boxes of a picture of size `old` in the same picture at size `new`: each axis by the ratio of its sides."""
    ratio_x, ratio_y = new.width / old.width, new.height / old.height
    return boxes_xyxy * boxes_xyxy.new_tensor([ratio_x, ratio_y, ratio_x, ratio_y])


def flip_boxes(boxes_xyxy: Float[Tensor, "boxes 4"], width: int) -> Float[Tensor, "boxes 4"]:
    """Boxes of a mirrored picture: x becomes width - x (continuous coordinates: no -1)."""
    x1, y1, x2, y2 = boxes_xyxy.unbind(1)
    return torch.stack((width - x2, y1, width - x1, y2), dim=1)


def move_boxes(target: Target, move: Callable[[Tensor], Tensor]) -> Target:
    """The target with all its boxes moved: true ones, ignore regions and given proposals."""
    proposals = target.proposals
    return replace(
        target,
        boxes_xyxy=move(target.boxes_xyxy),
        ignore_xyxy=move(target.ignore_xyxy),
        proposals=None if proposals is None else replace(proposals, boxes_xyxy=move(proposals.boxes_xyxy)),
    )


def image_size(image: Tensor) -> Size:
    return Size(int(image.shape[-2]), int(image.shape[-1]))


@dataclass(frozen=True, kw_only=True)
class Resize:
    """Resize to a short side, one of `short_sides` drawn for each picture; `max_long_side` bounds the other.

    With a `canvas` to its size instead, as far as the picture's shape lets it: neither of the two is read.
    """

    short_sides: tuple[int, ...]
    max_long_side: int
    rounding: Rounding = "floor"
    kernel: Kernel = "bilinear_float"
    canvas: Size | None = None

    def __call__(self, image: Tensor, target: Target, generator: torch.Generator) -> tuple[Tensor, Target]:
        choice = 0
        if len(self.short_sides) > 1:
            choice = int(torch.randint(len(self.short_sides), (), generator=generator))
        return self.apply(image, target, self.short_sides[choice])

    def apply(self, image: Tensor, target: Target, short_side: int) -> tuple[Tensor, Target]:
        old = image_size(image)
        if self.canvas is not None:
            return self._fit(image, target, old, self.canvas)
        new = resized_size(old, short_side=short_side, max_long_side=self.max_long_side, rounding=self.rounding)
        return resize_pixels(image, new, self.kernel), move_boxes(target, partial(scale_boxes, old=old, new=new))

    def _fit(self, image: Tensor, target: Target, old: Size, canvas: Size) -> tuple[Tensor, Target]:
        new, scale = size_on(canvas, old, rounding=self.rounding), scale_onto(canvas, old)
        pixels = resize_pixels(image, new, self.kernel, scale)
        # One scale for both axes, whatever the size was rounded to; what that leaves outside is cut.
        return pixels, move_boxes(target, lambda boxes: clip(boxes * scale, new))


@dataclass(frozen=True, kw_only=True)
class HorizontalFlip:
    """Mirror left and right with the given probability."""

    probability: float = 0.5

    def __call__(self, image: Tensor, target: Target, generator: torch.Generator) -> tuple[Tensor, Target]:
        if float(torch.rand((), generator=generator)) >= self.probability:
            return image, target
        width = image_size(image).width
        return image.flip(-1), move_boxes(target, partial(flip_boxes, width=width))


@dataclass(frozen=True, kw_only=True)
class TrainTransform:
    """What a picture goes through in training, in order: flip, then resize."""

    flip: HorizontalFlip
    resize: Callable[[Tensor, Target, torch.Generator], tuple[Tensor, Target]]

    def __call__(self, image: Tensor, target: Target, generator: torch.Generator) -> tuple[Tensor, Target]:
        image, target = self.flip(image, target, generator)
        return self.resize(image, target, generator)


@dataclass(frozen=True, kw_only=True)
class EvalTransform:
    """What a picture goes through in evaluation: the resize, at the last of its short sides (as torchvision)."""

    resize: Resize

    def __call__(
        self, image: Tensor, target: Target, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Target]:
        return self.resize.apply(image, target, self.resize.short_sides[-1])


def no_target() -> Target:
    """The truth about a picture of which nothing is known, for the transforms of prediction."""
    return Target(boxes_xyxy=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))


def sizes_of(images: Sequence[Tensor]) -> tuple[Size, ...]:
    return tuple(image_size(image) for image in images)


def no_change(image: Tensor, target: Target, generator: torch.Generator) -> tuple[Tensor, Target]:
    """The picture and its truth as they are: for looking at them."""
    return image, target
