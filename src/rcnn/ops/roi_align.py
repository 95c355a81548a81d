"""RoIAlign (Mask R-CNN, section 3) over all levels of a pyramid, with torchvision's numbers.

On a CPU it is a weighted sum of feature rows: `embedding_bag` over channels-last maps, an order of magnitude faster
than torchvision's kernel, which walks the channels one by one. On CUDA torchvision's kernel is used.

Letters: N images, C channels, R RoIs, S output side, L levels, T taps (cells that contribute to a bin).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from rcnn.ops.levels import pool_level_by_level
from rcnn.ops.roi_taps import AxisTaps, adaptive_taps, fixed_taps

# A piece of the output that stays in the processor's cache while it is written twice.
_PIECE_BYTES = 6 << 20
# Up to so many, cutting them by their number of taps (and, on one map, into pieces) costs more than it saves.
_FEW_ROIS = 256
_FEW_TAPS = 16
# Taps that the backward pass sorts at once: 12 bytes each, and twice that while sorting.
_SORTED_TAPS = 1 << 25


class RoIAlignKernel(Enum):
    """What computes RoIAlign; both give the same numbers up to rounding."""

    ROWS = "rows"  # weighted sums of channels-last rows
    TORCHVISION = "torchvision"  # torchvision's operator, level by level


def roi_align(
    features: Sequence[Float[Tensor, "images channels height width"]],
    boxes_xyxy: Float[Tensor, "rois 4"],
    batch_index: Int[Tensor, " rois"],
    level_index: Int[Tensor, " rois"],
    *,
    scales: Sequence[tuple[float, float]],
    output_size: int | tuple[int, int],
    sampling_ratio: int,
    aligned: bool,
    kernel: RoIAlignKernel | None = None,
) -> Float[Tensor, "rois channels out_height out_width"]:
    """Pools each RoI from its own level of `features`.

    `boxes_xyxy` are in network-input pixels; `scales` are feature cells per pixel (y, x) of each level, the inverse of
    its stride. `sampling_ratio` is the number of samples per bin and axis; 0 or less takes as many as a bin has cells.
    `kernel` None takes the faster one on the device at hand. Differentiable with respect to the features; with no RoI
    the gradients are zeros. Memory layout of the result: channels last with ROWS, contiguous with TORCHVISION.

    Can be exported, except ROWS with an adaptive number of samples, whose shapes depend on the boxes.
    """
    size = (output_size, output_size) if isinstance(output_size, int) else output_size
    if kernel is None:
        kernel = _preferred_kernel(features[0], sampling_ratio)
    dtype = torch.float64 if features[0].dtype == torch.float64 else torch.float32
    boxes_xyxy = boxes_xyxy.detach().to(dtype)
    if kernel is RoIAlignKernel.TORCHVISION:
        return _by_torchvision(features, boxes_xyxy, batch_index, level_index, scales, size, sampling_ratio, aligned)
    grid = _grid(features, boxes_xyxy, batch_index, level_index, scales, size, sampling_ratio, aligned)
    tables = [rows_of(feature) for feature in features]
    if torch.compiler.is_exporting():
        pooled = _sum_in_one_table(grid, tables)
    elif torch.is_grad_enabled() and any(table.requires_grad for table in tables):
        pooled = _WeightedRows.apply(grid, *tables)
    else:
        pooled = _sum_level_by_level(grid, tables)
    return pooled.view(-1, *size, features[0].shape[1]).permute(0, 3, 1, 2)


def _preferred_kernel(feature: Tensor, sampling_ratio: int) -> RoIAlignKernel:
    if feature.device.type != "cpu":
        return RoIAlignKernel.TORCHVISION
    if sampling_ratio <= 0 and torch.compiler.is_exporting():
        return RoIAlignKernel.TORCHVISION
    return RoIAlignKernel.ROWS


def rows_of(feature: Float[Tensor, "images channels height width"]) -> Float[Tensor, "cells channels"]:
    """The cells of a map as rows, image by image in reading order; no copy where the map is channels-last."""
    return feature.permute(0, 2, 3, 1).reshape(-1, feature.shape[1])


# ---------------------------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True, kw_only=True)
class _Grid:
    """All that says where each RoI reads, in the rows of its level."""

    y: AxisTaps
    x: AxisTaps
    width: Int[Tensor, " rois"]  # of the RoI's level, in cells
    first_row: Int[Tensor, " rois"]  # of the RoI's image in the table of its level
    level: Int[Tensor, " rois"]
    first_row_of_level: Int[Tensor, " levels"]  # in a table of all levels

    @property
    def bins(self) -> int:
        return self.y.cells.shape[1] * self.x.cells.shape[1]


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """Some RoIs of one level that have the same number of taps."""

    level: int
    rois: Int[Tensor, " piece"]
    taps_y: int
    taps_x: int

    @property
    def taps(self) -> int:
        return self.taps_y * self.taps_x


def _grid(
    features: Sequence[Tensor],
    boxes_xyxy: Tensor,
    batch_index: Tensor,
    level_index: Tensor,
    scales: Sequence[tuple[float, float]],
    size: tuple[int, int],
    sampling_ratio: int,
    aligned: bool,
) -> _Grid:
    device = boxes_xyxy.device
    shapes = torch.tensor([feature.shape[-2:] for feature in features], device=device)
    cells = shapes.prod(1) * features[0].shape[0]
    height, width = shapes[level_index].unbind(1)
    scale_y, scale_x = torch.tensor(scales, dtype=boxes_xyxy.dtype, device=device)[level_index].unbind(1)
    x1, y1, x2, y2 = boxes_xyxy.unbind(1)

    def taps(start: Tensor, end: Tensor, side: Tensor, bins: int) -> AxisTaps:
        if sampling_ratio <= 0:
            return adaptive_taps(start, end, side, bins=bins, aligned=aligned)
        merge = not torch.compiler.is_exporting() and len(boxes_xyxy) > _FEW_ROIS
        return fixed_taps(start, end, side, bins=bins, sampling_ratio=sampling_ratio, aligned=aligned, merge=merge)

    of_y, of_x = (y1 * scale_y, y2 * scale_y, height), (x1 * scale_x, x2 * scale_x, width)
    if sampling_ratio > 0 and size[0] == size[1]:
        # Both axes in one pass: where RoIs are few, the number of operations is what costs.
        start, end, side = (torch.cat(pair) for pair in zip(of_y, of_x, strict=True))
        y, x = _halves(taps(start, end, side, size[0]))
    else:
        y, x = taps(*of_y, size[0]), taps(*of_x, size[1])
    return _Grid(
        y=y,
        x=x,
        width=width,
        first_row=batch_index * height * width,
        level=level_index,
        first_row_of_level=cells.cumsum(0) - cells,
    )


def _halves(both: AxisTaps) -> tuple[AxisTaps, AxisTaps]:
    pieces = zip(both.cells.chunk(2), both.weights.chunk(2), both.counts.chunk(2), strict=True)
    first, second = (AxisTaps(cells=cells, weights=weights, counts=counts) for cells, weights, counts in pieces)
    return first, second


def _rows_and_weights(grid: _Grid, piece: _Piece) -> tuple[Int[Tensor, "bags taps"], Float[Tensor, "bags taps"]]:
    """The rows that each bin of each RoI of the piece reads, and what they weigh."""
    y, x = piece.taps_y, piece.taps_x
    rows_y = grid.y.cells[piece.rois, :, :y] * grid.width[piece.rois, None, None]
    rows_y = rows_y + grid.first_row[piece.rois, None, None]
    rows = rows_y[:, :, None, :, None] + grid.x.cells[piece.rois, None, :, None, :x]
    weights = grid.y.weights[piece.rois, :, None, :y, None] * grid.x.weights[piece.rois, None, :, None, :x]
    return rows.reshape(-1, y * x), weights.reshape(-1, y * x)


def _pieces(grid: _Grid, most_rois: int) -> Iterator[_Piece]:
    """The RoIs cut into pieces of one level and one number of taps, level by level."""
    wide = int(grid.x.counts.max()) + 1 if grid.level.numel() else 1
    high = int(grid.y.counts.max()) + 1 if grid.level.numel() else 1
    keys = (grid.level * high + grid.y.counts) * wide + grid.x.counts
    order = keys.argsort(stable=True)
    groups, lengths = torch.unique_consecutive(keys[order], return_counts=True)
    for key, rois in zip(groups.tolist(), order.split(lengths.tolist()), strict=True):
        rest, taps_x = divmod(key, wide)
        level, taps_y = divmod(rest, high)
        for some in rois.split(most_rois):
            yield _Piece(level=level, rois=some, taps_y=taps_y, taps_x=taps_x)


def _bag(table: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    return F.embedding_bag(rows, table, per_sample_weights=weights.to(table.dtype), mode="sum")


def _empty(rows: int, columns: int, like: Tensor) -> Tensor:
    """An uninitialised matrix. On a CPU it is NumPy's, which asks for huge pages: first touches then cost a fifth."""
    if like.device.type != "cpu" or rows * columns == 0:
        return like.new_empty(rows, columns)
    block = torch.from_numpy(np.empty(rows * columns * like.element_size(), dtype=np.uint8))
    return block.view(like.dtype).view(rows, columns)


def _sum_level_by_level(grid: _Grid, tables: Sequence[Tensor]) -> Float[Tensor, "rois columns"]:
    channels = tables[0].shape[1]
    columns = grid.bins * channels
    taps = grid.y.cells.shape[2] * grid.x.cells.shape[2]
    if 0 < grid.level.shape[0] <= _FEW_ROIS and taps <= _FEW_TAPS:
        lowest, highest = (int(level) for level in grid.level.aminmax())
        # torchvision's MobileNets, for one, pool every RoI from the first of two maps.
        if lowest == highest:
            return _sum_at_once(grid, tables[lowest], grid.first_row).view(-1, columns)
    pooled = _empty(grid.level.shape[0], columns, like=tables[0])
    most_rois = max(_PIECE_BYTES // max(columns * pooled.element_size(), 1), 1)
    for piece in _pieces(grid, most_rois):
        rows, weights = _rows_and_weights(grid, piece)
        pooled.index_copy_(0, piece.rois, _bag(tables[piece.level], rows, weights).view(-1, columns))
    return pooled


def _sum_in_one_table(grid: _Grid, tables: Sequence[Tensor]) -> Float[Tensor, "rois columns"]:
    """The same with no shape that depends on the boxes: several levels are copied into one table."""
    table = tables[0] if len(tables) == 1 else torch.cat(list(tables))
    return _sum_at_once(grid, table, grid.first_row + grid.first_row_of_level[grid.level])


def _sum_at_once(grid: _Grid, table: Tensor, first_row: Int[Tensor, " rois"]) -> Float[Tensor, "rois columns"]:
    """All RoIs with as many taps as the most that one has; `first_row` is that of each RoI's map in the table."""
    y, x = grid.y.cells.shape[2], grid.x.cells.shape[2]
    rows_y = grid.y.cells * grid.width[:, None, None] + first_row[:, None, None]
    rows = rows_y[:, :, None, :, None] + grid.x.cells[:, None, :, None, :]
    weights = grid.y.weights[:, :, None, :, None] * grid.x.weights[:, None, :, None, :]
    return _bag(table, rows.reshape(-1, y * x), weights.reshape(-1, y * x))


class _WeightedRows(torch.autograd.Function):
    """`_sum_level_by_level` with a gradient: the same sum over the transposed table, rows of the upstream gradient."""

    @staticmethod
    def forward(ctx: Any, grid: _Grid, *tables: Tensor) -> Tensor:
        ctx.grid = grid
        ctx.heights = [table.shape[0] for table in tables]
        return _sum_level_by_level(grid, tables)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator hides the parameters)
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        grid: _Grid = ctx.grid
        upstream = grad_outputs[0].contiguous()
        gradients: list[Tensor | None] = [None] * len(ctx.heights)
        table = upstream.view(upstream.shape[0] * grid.bins, upstream.shape[1] // grid.bins)
        by_level: dict[int, list[_Piece]] = {}
        for piece in _pieces(grid, most_rois=max(grid.level.shape[0], 1)):
            by_level.setdefault(piece.level, []).append(piece)
        for level, height in enumerate(ctx.heights):
            if ctx.needs_input_grad[1 + level]:
                gradients[level] = _scattered(grid, by_level.get(level, []), table, height)
        return None, *gradients


def _scattered(grid: _Grid, pieces: Sequence[_Piece], upstream: Tensor, height: int) -> Float[Tensor, "cells channels"]:
    """The gradient of one level: for every cell the weighted sum of the bins that read it."""
    gradient: Tensor | None = None
    for batch in _batches(pieces, grid.bins):
        part = _transposed_sum(grid, batch, upstream, height)
        gradient = part if gradient is None else gradient.add_(part)
    return upstream.new_zeros(height, upstream.shape[1]) if gradient is None else gradient


def _batches(pieces: Sequence[_Piece], bins: int) -> Iterator[list[_Piece]]:
    """The pieces in batches small enough to sort at once: one, save for thousands of large RoIs."""
    batch: list[_Piece] = []
    taps = 0
    for piece in pieces:
        most_rois = max(_SORTED_TAPS // (bins * piece.taps), 1)
        for rois in piece.rois.split(most_rois):
            some = _Piece(level=piece.level, rois=rois, taps_y=piece.taps_y, taps_x=piece.taps_x)
            count = len(rois) * bins * piece.taps
            if batch and taps + count > _SORTED_TAPS:
                yield batch
                batch, taps = [], 0
            batch.append(some)
            taps += count
    if batch:
        yield batch


def _transposed_sum(grid: _Grid, pieces: Sequence[_Piece], upstream: Tensor, height: int) -> Tensor:
    rows, weights, bags = [], [], []
    bin_index = torch.arange(grid.bins, device=upstream.device)
    for piece in pieces:
        piece_rows, piece_weights = _rows_and_weights(grid, piece)
        bag = (piece.rois[:, None] * grid.bins + bin_index).reshape(-1, 1)
        rows.append(piece_rows.flatten())
        weights.append(piece_weights.flatten())
        bags.append(bag.expand(-1, piece.taps).reshape(-1))
    # Stable, so that the sum has one order and the gradient one value.
    sorted_rows, order = torch.cat(rows).sort(stable=True)
    offsets = torch.searchsorted(sorted_rows, torch.arange(height + 1, device=upstream.device))
    return F.embedding_bag(
        torch.cat(bags)[order],
        upstream,
        offsets,
        per_sample_weights=torch.cat(weights)[order].to(upstream.dtype),
        mode="sum",
        include_last_offset=True,
    )


# --------------------------------------------------------------------------------------------------------- torchvision


def _by_torchvision(
    features: Sequence[Tensor],
    boxes_xyxy: Tensor,
    batch_index: Tensor,
    level_index: Tensor,
    scales: Sequence[tuple[float, float]],
    size: tuple[int, int],
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    def pool(feature: Tensor, rois: Tensor) -> Tensor:
        return torchvision.ops.roi_align(feature, rois, size, 1.0, sampling_ratio, aligned)

    return pool_level_by_level(pool, features, boxes_xyxy, batch_index, level_index, scales)
