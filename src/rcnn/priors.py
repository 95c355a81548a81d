"""Anchors and points: the references at each cell of each pyramid level.

Letters: L levels, S sizes per level, Q aspect ratios, A = S x Q anchors per cell.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rcnn.records import Levels, LevelShape, Size

# "nominal": the level's stride. "image_over_grid": padded image side // grid side, as torchvision infers it; the two
# differ where a level was rounded up (its P6 at 608 px has 10 cells, 60 px apart).
StrideRule = Literal["nominal", "image_over_grid"]


# x1, y1, x2, y2 around a cell's origin.
_Corners = tuple[float, float, float, float]


def cell_anchors(
    sizes_px: Sequence[float], heights_over_widths: Sequence[float], *, rounded: bool = False
) -> Float[Tensor, "anchors 4"]:
    """The anchors of one cell around its origin, ratio-major: all sizes of the first ratio, then of the next.

    An anchor of size s and ratio r is s * sqrt(r) high and s / sqrt(r) wide. `rounded` moves the corners to integers,
    as torchvision does.
    """
    return _as_tensor(_cell_corners(sizes_px, heights_over_widths, rounded))


def _cell_corners(
    sizes_px: Sequence[float], heights_over_widths: Sequence[float], rounded: bool
) -> tuple[_Corners, ...]:
    sides = [
        (1 / math.sqrt(ratio) * size, math.sqrt(ratio) * size) for ratio in heights_over_widths for size in sizes_px
    ]
    halves = [(round(width / 2), round(height / 2)) if rounded else (width / 2, height / 2) for width, height in sides]
    return tuple((-x, -y, x, y) for x, y in halves)


def _as_tensor(corners: Sequence[_Corners]) -> Float[Tensor, "anchors 4"]:
    return torch.tensor(corners, dtype=torch.float64, device="cpu").reshape(-1, 4)


def cell_strides(shape: LevelShape, padded_size: Size | None, rule: StrideRule) -> tuple[int, int]:
    """The distance of a level's cells in y and x. `padded_size` is asked for by "image_over_grid" alone."""
    if rule == "nominal":
        return shape.stride_px, shape.stride_px
    assert padded_size is not None
    return padded_size.height // max(shape.height, 1), padded_size.width // max(shape.width, 1)


@dataclass(frozen=True, kw_only=True)
class AnchorGenerator:
    """Anchors of a pyramid: `sizes_px[l]` at level l, every ratio of `heights_over_widths` for each.

    `centre_offset` is where in its cell an anchor is centred, in strides: 0 is the cell's top left corner (torchvision,
    MMDetection, detectron2), 0.5 its middle (simple-faster-rcnn).
    """

    sizes_px: tuple[tuple[float, ...], ...]
    heights_over_widths: tuple[float, ...] = (0.5, 1.0, 2.0)
    rounded: bool = False
    centre_offset: float = 0.0
    stride_rule: StrideRule = "nominal"
    # Kept as numbers: a tensor that is made while torch.export traces is a fake one, and would be found again later.
    _corners: tuple[tuple[_Corners, ...], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        corners = tuple(_cell_corners(sizes, self.heights_over_widths, self.rounded) for sizes in self.sizes_px)
        object.__setattr__(self, "_corners", corners)

    @property
    def num_levels(self) -> int:
        return len(self.sizes_px)

    @property
    def num_per_cell(self) -> int:
        return len(self.sizes_px[0]) * len(self.heights_over_widths)

    @property
    def cells(self) -> tuple[Tensor, ...]:
        """The anchors of one cell per level, in float64."""
        return tuple(_as_tensor(corners) for corners in self._corners)

    def __call__(
        self, shapes: Sequence[LevelShape], padded_size: Size, *, dtype: torch.dtype, device: torch.device
    ) -> list[Float[Tensor, "anchors 4"]]:
        """Anchors per level in network-input pixels, row-major over the cells, the anchors of a cell together."""
        return [
            self._level(corners, shape, padded_size, dtype=dtype, device=device)
            for corners, shape in zip(self._corners, shapes, strict=True)
        ]

    def _level(
        self,
        corners: Sequence[_Corners],
        shape: LevelShape,
        padded_size: Size,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Tensor:
        stride_y, stride_x = cell_strides(shape, padded_size, self.stride_rule)
        # The offset is added before the cast, as in simple-faster-rcnn: which of two anchors overlaps a box most can
        # hang on the last bit. All of it in Python's numbers: of the operators small networks feel every one.
        dx, dy = stride_x * self.centre_offset, stride_y * self.centre_offset
        cell = torch.tensor([(x1 + dx, y1 + dy, x2 + dx, y2 + dy) for x1, y1, x2, y2 in corners], dtype=dtype)
        y = torch.arange(shape.height, device=device, dtype=dtype) * stride_y
        x = torch.arange(shape.width, device=device, dtype=dtype) * stride_x
        y, x = torch.meshgrid(y, x, indexing="ij")
        shifts = torch.stack((x, y, x, y), dim=-1).reshape(-1, 1, 4)
        return (shifts + cell.to(device)).reshape(-1, 4)


def octave_anchors(strides_px: Sequence[int], *, scale: float = 4.0, scales_per_octave: int = 3) -> AnchorGenerator:
    """RetinaNet's anchors (Lin et al., 2017): per level `scales_per_octave` sizes from `scale` strides to below twice
    that, each with three ratios."""
    factors = [2 ** (number / scales_per_octave) for number in range(scales_per_octave)]
    return AnchorGenerator(
        sizes_px=tuple(tuple(stride * scale * factor for factor in factors) for stride in strides_px)
    )


@dataclass(frozen=True, kw_only=True)
class PointGenerator:
    """One point per cell, `offset` of a stride from the cell's top left corner: 0.5 is its middle (FCOS, MMDetection),
    0 the corner (torchvision's FCOS)."""

    offset: float = 0.5
    stride_rule: StrideRule = "nominal"

    def __call__(
        self,
        shapes: Sequence[LevelShape],
        padded_size: Size | None = None,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> list[Float[Tensor, "points 2"]]:
        """Points (x, y) per level in network-input pixels, row-major over the cells.

        `padded_size` is asked for by the stride rule "image_over_grid" alone.
        """
        return [self._level(shape, padded_size, dtype, device) for shape in shapes]

    def _level(self, shape: LevelShape, padded_size: Size | None, dtype: torch.dtype, device: torch.device) -> Tensor:
        stride_y, stride_x = cell_strides(shape, padded_size, self.stride_rule)
        x = (torch.arange(shape.width, device=device, dtype=dtype) + self.offset) * stride_x
        y = (torch.arange(shape.height, device=device, dtype=dtype) + self.offset) * stride_y
        y, x = torch.meshgrid(y, x, indexing="ij")
        return torch.stack((x, y), dim=-1).reshape(-1, 2)


def priors_of(
    generator: AnchorGenerator | PointGenerator, levels: Levels, *, like: Tensor
) -> list[Float[Tensor, "priors _"]]:
    """Anchors or points of each level on the device of `like`, at least in float32: coordinates of large pictures need
    it."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return generator(levels.shapes, levels.padded_size, dtype=dtype, device=like.device)
