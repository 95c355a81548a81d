"""OpenCV's kernels on bytes, in its own arithmetic, so that pixels are equal to the bit.

`interpolate` is INTER_LINEAR, `average` INTER_AREA of a picture that shrinks. Both take what cv2.resize is given: a
size, or the scale that the size was rounded from.
"""

from __future__ import annotations

import math
import sys
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from rcnn.records import Size

# ------------------------------------------------------------------------------------------------------ interpolation

# The weights of OpenCV's linear interpolation of bytes are multiples of 2^-11.
_WEIGHT_BITS = 11


def interpolate(image: Tensor, size: Size, scale: float | None = None) -> Tensor:
    """OpenCV's INTER_LINEAR on uint8, in its integers: rows first, cut to seven more bits, then columns."""
    low, high, low_weight, high_weight = _fixed_point_taps(image.shape[2], size.width, scale, stop_at_edge=True)
    wide = image.to(torch.int32)
    rows = (wide.index_select(2, low) * low_weight + wide.index_select(2, high) * high_weight) >> 4
    low, high, low_weight, high_weight = _fixed_point_taps(image.shape[1], size.height, scale, stop_at_edge=False)
    upper = (rows.index_select(1, low) * low_weight[:, None]) >> 16
    lower = (rows.index_select(1, high) * high_weight[:, None]) >> 16
    return ((upper + lower + 2) >> 2).clamp(0, 255).to(torch.uint8)


def _fixed_point_taps(
    length: int, new_length: int, scale: float | None, *, stop_at_edge: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each new pixel two old ones and their integer weights. Beyond the edge both are the pixel at the edge.

    There OpenCV gives it the whole weight along rows (`stop_at_edge`), but leaves the two weights along columns, whose
    products are cut one by one: a pixel there may be one less.
    """
    places = (
        (torch.arange(new_length, dtype=torch.float64) + 0.5) * (1.0 / (scale or new_length / length)) - 0.5
    ).float()
    low = places.floor()
    weight = places - low
    if stop_at_edge:
        weight = torch.where((low < 0) | (low >= length - 1), torch.zeros_like(weight), weight)
    low = low.long()
    unit = 1 << _WEIGHT_BITS
    low_weight, high_weight = (((1 - weight) * unit).round().int(), (weight * unit).round().int())
    return low.clamp(0, length - 1), (low + 1).clamp(0, length - 1), low_weight, high_weight


# -------------------------------------------------------------------------------------------------------------- areas


def average(image: Tensor, size: Size, scale: float | None = None) -> Tensor:
    """OpenCV's INTER_AREA on uint8 [3, H, W], for a picture that shrinks: the mean of what each new pixel covers.

    Whole numbers of pixels are summed as integers. Else each row is weighted and summed in float32 from left to right,
    then the rows from top to bottom, as its builds for x86 do (those for ARM fuse each product with its sum).
    """
    steps = [1.0 / (scale or new / old) for old, new in zip(image.shape[1:], size, strict=True)]
    whole = [round(step) for step in steps]
    if all(abs(step - number) < sys.float_info.epsilon for step, number in zip(steps, whole, strict=True)):
        return _average_blocks(image, size, whole[0], whole[1])
    pixels = image.float()
    for axis, length, step in ((2, size.width, steps[1]), (1, size.height, steps[0])):
        shape = (1, -1, 1) if axis == 1 else (1, 1, -1)
        parts = (
            pixels.index_select(axis, places) * weights.view(shape)
            for places, weights in _covered(image.shape[axis], length, step)
        )
        pixels = reduce(torch.add, parts)
    return pixels.round().clamp(0, 255).to(torch.uint8)


def _covered(old: int, new: int, step: float) -> list[tuple[Tensor, Tensor]]:
    """The old pixels that each new one covers, one after the other, with their shares of it (0 where it has fewer).

    A share below a thousandth of an old pixel is left out.
    """
    places: list[list[int]] = []
    weights: list[list[float]] = []
    for number in range(new):
        start, end = number * step, number * step + step
        width = min(step, old - start)
        last = min(math.floor(end), old - 1)
        first = min(math.ceil(start), last)
        found = [(first - 1, (first - start) / width)] if first - start > 1e-3 else []
        found += [(place, 1.0 / width) for place in range(first, last)]
        if end - last > 1e-3:
            found.append((last, min(end - last, 1.0, width) / width))
        places.append([place for place, _ in found])
        weights.append([weight for _, weight in found])
    most = max(map(len, places))
    taps = torch.tensor([[*some, *[0] * (most - len(some))] for some in places])
    shares = torch.tensor([[*some, *[0.0] * (most - len(some))] for some in weights], dtype=torch.float32)
    return list(zip(taps.unbind(1), shares.unbind(1), strict=True))


def _average_blocks(image: Tensor, size: Size, tall: int, wide: int) -> Tensor:
    """Means of blocks of `tall` x `wide` pixels; those at the edge have what is left of them.

    A half goes up in blocks of two by two, to the even number in all others.
    """
    sums, counts = image.to(torch.int32), torch.ones(1, 1, 1, dtype=torch.int32)
    for axis, length, side in ((2, size.width, wide), (1, size.height, tall)):
        old = image.shape[axis]
        missing = max(length * side - old, 0)
        sums = F.pad(sums, (0, missing, 0, 0) if axis == 2 else (0, 0, 0, missing)).narrow(axis, 0, length * side)
        sums = sums.unflatten(axis, (length, side)).sum(axis + 1, dtype=torch.int32)
        left = (old - torch.arange(length, dtype=torch.int32) * side).clamp(max=side)
        counts = counts * left.view((1, -1, 1) if axis == 1 else (1, 1, -1))
    area = tall * wide
    full = (sums + 2) >> 2 if (tall, wide) == (2, 2) else (sums * torch.tensor(1.0).div(area)).round()
    means = torch.where(counts == area, full, (sums / counts).round())
    return means.clamp(0, 255).to(torch.uint8)
