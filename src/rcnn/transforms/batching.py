"""From single pictures to what the network sees: padding into one tensor, and normalisation in one pass on it.

Letters: N images, H W padded height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rcnn.records import ImageBatch, Size, Target
from rcnn.transforms.geometry import scale_onto, sizes_of

ChannelOrder = Literal["rgb", "bgr"]
# What the network sees on the padding: exactly zero, or what it sees of a black pixel (MindSpore).
PaddingValue = Literal["zero", "black"]
# What batches are padded to multiples of: one number; or the height and width of a canvas that all pictures of the
# batch were fitted into, each by one scale.
Divisor = int | tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One picture on its way into a batch: RGB [3, h, w], 0 to 255, resized, with its truth in the same pixels."""

    image: Tensor
    target: Target
    original_size: Size
    image_id: int


def collate(samples: Sequence[Sample], *, divisor: Divisor) -> tuple[ImageBatch, list[Target]]:
    """Samples as a batch, padded with zeros at the bottom and right to the largest, rounded up to `divisor` (1: not).

    A pair of sides is a canvas: the batch then knows the scale at which each picture was fitted into it. Pixels stay
    uint8 where all are, else they become floating point (float64 where one is). Given proposals go from the targets to
    the batch.
    """
    proposals = tuple(sample.target.proposals for sample in samples if sample.target.proposals is not None)
    assert len(proposals) in (0, len(samples)), "all pictures of a batch have proposals, or none"
    batch = ImageBatch(
        pixels=pad_images([sample.image for sample in samples], divisor=divisor),
        sizes=sizes_of([sample.image for sample in samples]),
        original_sizes=tuple(sample.original_size for sample in samples),
        image_ids=tuple(sample.image_id for sample in samples),
        proposals=proposals or None,
        scales=_scales_onto(divisor, samples) if isinstance(divisor, tuple) else None,
    )
    return batch, [replace(sample.target, proposals=None) for sample in samples]


def _scales_onto(canvas: tuple[int, int], samples: Sequence[Sample]) -> tuple[float, ...]:
    return tuple(scale_onto(Size(*canvas), sample.original_size) for sample in samples)


def pad_images(images: Sequence[Tensor], *, divisor: Divisor) -> Tensor:
    """Pictures [3, h, w] as one tensor [N, 3, H, W], zeros at the bottom and right."""
    sizes = sizes_of(images)
    of_height, of_width = divisor if isinstance(divisor, tuple) else (divisor, divisor)
    height = _round_up(max(size.height for size in sizes), of_height)
    width = _round_up(max(size.width for size in sizes), of_width)
    dtype = images[0].dtype
    for image in images[1:]:
        dtype = torch.promote_types(dtype, image.dtype)
    padded = torch.zeros(len(images), 3, height, width, dtype=dtype, device=images[0].device)
    for row, image, size in zip(padded, images, sizes, strict=True):
        row[:, : size.height, : size.width] = image
    return padded


def _round_up(length: int, divisor: int) -> int:
    return -(-length // divisor) * divisor


class ImageNormalizer(nn.Module):
    """Pixels 0 to 255 in RGB to what a backbone was trained on: (pixel - mean) / std, exactly zero on the padding.

    With `padding` "black" the padding is normalised as the pixels are, from 0.

    `mean` and `std` are on the scale 0 to 255 and in the order of the network's channels: for `bgr` blue comes first
    (detectron2 and Caffe: 103.53, 116.28, 123.675). The result has the dtype of the module; below float32 it is
    computed in float32 and rounded once.
    """

    mean: Tensor
    std: Tensor
    dtype_marker: Tensor

    def __init__(
        self,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        channel_order: ChannelOrder = "rgb",
        padding: PaddingValue = "zero",
    ) -> None:
        super().__init__()
        self.mean_values = tuple(float(value) for value in mean)
        self.std_values = tuple(float(value) for value in std)
        self.channel_order: ChannelOrder = channel_order
        self.padding: PaddingValue = padding
        # On the CPU even where a detector is built on the meta device: no checkpoint holds these.
        self.register_buffer("dtype_marker", torch.zeros((), device="cpu"), persistent=False)
        self.register_buffer("mean", torch.tensor(self.mean_values, device="cpu").view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(self.std_values, device="cpu").view(3, 1, 1), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ImageNormalizer:
        """Move the module, then write the constants anew: a change of dtype must not round them."""
        super()._apply(fn, recurse)
        dtype = torch.promote_types(self.dtype_marker.dtype, torch.float32)
        self.mean = torch.tensor(self.mean_values, dtype=dtype, device=self.mean.device).view(3, 1, 1)
        self.std = torch.tensor(self.std_values, dtype=dtype, device=self.std.device).view(3, 1, 1)
        return self

    def forward(self, batch: ImageBatch) -> Float[Tensor, "images 3 height width"]:
        pixels = batch.pixels.flip(1) if self.channel_order == "bgr" else batch.pixels
        if self.padding == "black" or all(size == batch.padded_size for size in batch.sizes):
            return self._normalize(pixels)
        result = torch.zeros(pixels.shape, dtype=self.dtype_marker.dtype, device=pixels.device)
        for row, image, size in zip(result, pixels, batch.sizes, strict=True):
            row[:, : size.height, : size.width] = self._normalize(image[:, : size.height, : size.width])
        return result

    def _normalize(self, pixels: Tensor) -> Tensor:
        return torch.sub(pixels, self.mean).div_(self.std).to(self.dtype_marker.dtype)

    def extra_repr(self) -> str:
        return f"mean={self.mean_values}, std={self.std_values}, channel_order={self.channel_order!r}"
