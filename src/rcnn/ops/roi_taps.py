"""Where RoIAlign reads: for each RoI and bin, along one axis, the cells that contribute and their weights.

RoIAlign is bilinear, hence separable: the weight of a cell in a bin is its weight along y times its weight along x.
A tap is one cell of one bin along one axis.

Letters: R RoIs, S bins along the axis, G samples in a bin, T taps in a bin.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class AxisTaps:
    """Cells and weights along one axis: of RoI r the first `counts[r]` taps of every bin matter, the others weigh 0."""

    cells: Int[Tensor, "rois bins taps"]
    weights: Float[Tensor, "rois bins taps"]
    counts: Int[Tensor, " rois"]


@dataclass(frozen=True, kw_only=True)
class _Samples:
    """Sampling points in feature cells, already clamped to the map as torchvision clamps them."""

    low: Int[Tensor, "rois bins samples"]
    high: Int[Tensor, "rois bins samples"]
    weight_low: Float[Tensor, "rois bins samples"]
    weight_high: Float[Tensor, "rois bins samples"]


def fixed_taps(
    start: Float[Tensor, " rois"],
    end: Float[Tensor, " rois"],
    size: Int[Tensor, " rois"],
    *,
    bins: int,
    sampling_ratio: int,
    aligned: bool,
    merge: bool,
) -> AxisTaps:
    """Taps of `sampling_ratio` samples in every bin of start..end (feature cells) on an axis of `size` cells.

    With `merge`, bins whose samples lie at most a cell apart share cells: sampling_ratio + 1 taps in place of
    twice sampling_ratio. Without it every shape is known beforehand, as an export needs.
    """
    first, bin_size = _bins(start, end, bins, aligned)
    samples = _samples(first, bin_size, sampling_ratio, size, bins=bins, most=sampling_ratio)
    cells = torch.stack([samples.low, samples.high], dim=-1).flatten(2)
    weights = torch.stack([samples.weight_low, samples.weight_high], dim=-1).flatten(2) / sampling_ratio
    counts = torch.full_like(size, 2 * sampling_ratio)
    if merge and sampling_ratio > 1:
        dense = (bin_size >= 0) & (bin_size <= sampling_ratio)
        most = torch.full_like(size, sampling_ratio + 1)
        merged_cells, merged_weights = _merged(samples, size, taps=2 * sampling_ratio, counts=most)
        cells = torch.where(dense[:, None, None], merged_cells, cells)
        weights = torch.where(dense[:, None, None], merged_weights / sampling_ratio, weights)
        counts = torch.where(dense, most, counts)
    return AxisTaps(cells=cells, weights=weights, counts=counts)


def adaptive_taps(
    start: Float[Tensor, " rois"],
    end: Float[Tensor, " rois"],
    size: Int[Tensor, " rois"],
    *,
    bins: int,
    aligned: bool,
) -> AxisTaps:
    """Taps of ceil(bin size) samples in every bin: at most a cell apart, so they always share cells.

    A RoI of no extent has no sample: its weights are zero. The shapes depend on the largest RoI.
    """
    first, bin_size = _bins(start, end, bins, aligned)
    grid = bin_size.ceil().nan_to_num(0.0).to(torch.int64).clamp(min=0)
    most = max(int(grid.max()), 1) if grid.numel() else 1
    samples = _samples(first, bin_size, grid, size, bins=bins, most=most)
    cells, weights = _merged(samples, size, taps=most + 1, counts=grid + 1)
    return AxisTaps(cells=cells, weights=weights / grid.clamp(min=1)[:, None, None], counts=grid + 1)


def _bins(start: Tensor, end: Tensor, bins: int, aligned: bool) -> tuple[Tensor, Tensor]:
    """Where the first bin starts and how long a bin is, in cells; torchvision's order of rounding."""
    shift = 0.5 if aligned else 0.0
    start, end = start - shift, end - shift
    length = end - start
    return start, (length if aligned else length.clamp(min=1.0)) / bins


def _samples(start: Tensor, bin_size: Tensor, grid: Tensor | int, size: Tensor, *, bins: int, most: int) -> _Samples:
    """`grid` samples in each bin of a RoI: as many for all, or `most` at most."""
    bin_index = torch.arange(bins, dtype=start.dtype, device=start.device)
    sample_index = torch.arange(most, dtype=start.dtype, device=start.device)
    start, bin_size, size = start[:, None, None], bin_size[:, None, None], size[:, None, None]
    grid = grid if isinstance(grid, int) else grid[:, None, None]
    place = start + bin_index[:, None] * bin_size + (sample_index + 0.5) * bin_size / grid
    # Samples more than a cell outside count nothing; those at the border take the border cell.
    outside = (place < -1.0) | (place > size)
    if not isinstance(grid, int):
        outside = outside | (sample_index >= grid)
    place = place.clamp(min=0.0)
    last = size - 1
    low = torch.minimum(place.to(torch.int64).clamp(min=0), last)
    fraction = (place - low).masked_fill(low >= last, 0.0)
    return _Samples(
        low=low,
        high=torch.minimum(low + 1, last),
        weight_low=(1.0 - fraction).masked_fill(outside, 0.0),
        weight_high=fraction.masked_fill(outside, 0.0),
    )


def _merged(samples: _Samples, size: Tensor, *, taps: int, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The samples of a bin summed per cell. Cells are consecutive from that of the first sample.

    Samples at most a cell apart reach one cell more than there are samples. Rounding can push the last one a cell
    further with a weight of rounding size there: it is added to the cell before.
    """
    first = samples.low[:, :, :1]
    last = (counts - 1)[:, None, None]
    steps = torch.arange(taps, device=first.device)
    cells = torch.minimum(first + steps, size[:, None, None] - 1)
    weights = torch.zeros(cells.shape, dtype=samples.weight_low.dtype, device=cells.device)
    weights.scatter_add_(2, torch.minimum((samples.low - first).clamp(min=0), last), samples.weight_low)
    weights.scatter_add_(2, torch.minimum((samples.high - first).clamp(min=0), last), samples.weight_high)
    return cells, weights
