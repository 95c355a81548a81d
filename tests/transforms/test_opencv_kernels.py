"""OpenCV's averages of areas: what its versions 4.11 and 5.0 gave on x86 (run once each; it is no dependency).

Beside these eight pictures 500 others of 20 to 1280 pixels a side were compared, on two canvases: no value differed,
and with INTER_LINEAR neither.
"""

from __future__ import annotations

import zlib

import pytest
import torch
from torch import Tensor

from rcnn.records import Size
from rcnn.transforms.geometry import resize_pixels
from rcnn.transforms.opencv_kernels import average


def picture(height: int, width: int) -> Tensor:
    c, y, x = torch.meshgrid(torch.arange(3), torch.arange(height), torch.arange(width), indexing="ij")
    return ((7 * y * y + 13 * x * x + 29 * x * y * (c + 1) + 50 * c) % 256).to(torch.uint8)


# The sides, the scale that cv2.resize was given, and the green values of its INTER_AREA.
RECORDED = [
    (9, 11, 0.37, [[107, 135, 133, 105], [112, 148, 139, 117], [110, 149, 102, 129]]),
    # Blocks of two: 4.5 is 4, and 5.5 is 6, whose last column has one pixel's width left.
    (
        *(9, 11, 0.5),
        [
            [75, 147, 131, 91, 91, 108],
            [111, 95, 183, 183, 95, 158],
            [139, 163, 99, 139, 91, 136],
            [95, 159, 135, 87, 143, 170],
        ],
    ),
    (11, 8, 1 / 3, [[113, 141, 138], [107, 145, 136], [143, 133, 90], [147, 160, 82]]),
    (8, 13, 0.25, [[106, 146, 106], [138, 114, 122]]),
]


@pytest.mark.parametrize(("height", "width", "scale", "expected"), RECORDED)
def test_small_pictures(height: int, width: int, scale: float, expected: list[list[int]]) -> None:
    size = Size(len(expected), len(expected[0]))
    assert resize_pixels(picture(height, width), size, "area_uint8", scale)[1].tolist() == expected


@pytest.mark.parametrize(
    ("scale", "size", "crc_32"),
    [
        (0.7351, Size(157, 251), 3757518026),
        (0.43, Size(92, 147), 937916837),
        (0.2, Size(43, 68), 3828168617),
        (0.5, Size(106, 170), 1707713890),
    ],
)
def test_every_byte_of_larger_pictures(scale: float, size: Size, crc_32: int) -> None:
    found = resize_pixels(picture(213, 341), size, "area_uint8", scale)
    assert found.shape == (3, *size)
    assert zlib.crc32(found.contiguous().numpy().tobytes()) == crc_32


def test_halves() -> None:
    """Up where two by two pixels become one, to the even number in other blocks."""
    two = torch.tensor([[0, 2, 0, 2], [0, 0, 4, 4]], dtype=torch.uint8).expand(3, 2, 4)
    assert average(two, Size(1, 2))[0].tolist() == [[1, 3]]  # 2 / 4 and 10 / 4
    four = torch.zeros(3, 4, 8, dtype=torch.uint8)
    four[:, 0, 0], four[:, 0, 4] = 8, 24
    assert average(four, Size(1, 2))[0].tolist() == [[0, 2]]  # 8 / 16 and 24 / 16
