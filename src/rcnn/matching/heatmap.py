"""Objects as points (Zhou et al., 2019) on a pyramid, as CenterNet2 has it: heat around each box's centre.

Letters: G ground-truth boxes, L levels, T cells of a picture over all levels, K classes, P peaks, B cells with a box.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rcnn.boxes.geometry import area, centres, lies_inside
from rcnn.records import LevelShape, Target

# Heat below this counts as none.
_LEAST_HEAT = 1e-4


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """What the cells of a picture should be.

    `heat` is 1 at a box's centre and falls to 0 around it, at every level. `peaks` are the cells that are positive:
    those of the centres, at the levels for the box's size; one that is the centre of two boxes is there twice.
    `box_cells` are those that regress a box. `counted` are the cells that may be negative.
    """

    heat: Float[Tensor, "t k"]
    peaks: Int[Tensor, " p"]
    peak_labels: Int[Tensor, " p"]
    box_cells: Int[Tensor, " b"]
    box_gt_index: Int[Tensor, " b"]
    counted: Bool[Tensor, " t"]


@dataclass(frozen=True, kw_only=True)
class HeatMapMatcher:
    """A level is for boxes with half a diagonal of `low_strides` to `high_strides` of its strides, the finest also for
    smaller ones and the coarsest for larger: at strides 8 to 128 CenterNet2's 0-80, 64-160, 128-320, 256-640, 512-.

    Heat falls as a Gaussian whose radius is the shift that leaves a box `min_overlap` with itself (by CenterNet2's
    rule of thumb), at least `min_radius_px`. A level's box is regressed by the 3x3 cells around its centre that lie in
    it; a cell of several boxes takes the one whose centre is nearest in radii.
    """

    low_strides: float = 4.0
    high_strides: float = 10.0
    min_overlap: float = 0.8
    min_radius_px: float = 4.0

    def sizes_px(self, strides_px: Sequence[int]) -> list[tuple[float, float]]:
        """Per level the least and the largest half diagonal, both included; no size is left without a level."""
        highs = [self.high_strides * stride for stride in strides_px[:-1]] + [math.inf]
        before = [0.0, *highs[:-1]]
        return [
            (min(self.low_strides * stride, below), high)
            for stride, below, high in zip(strides_px, before, highs, strict=True)
        ]

    def __call__(
        self,
        points: Sequence[Float[Tensor, "_ 2"]],
        shapes: Sequence[LevelShape],
        target: Target,
        *,
        num_classes: int,
    ) -> HeatMap:
        """`points` are the middles of the cells, level after level."""
        boxes, every_point = target.boxes_xyxy.to(points[0].dtype), torch.cat(list(points))
        centre_cells = self._centre_cells(boxes, shapes)
        distance = self._distance(every_point, boxes, centre_cells)
        suits = self._suits(boxes, shapes)
        near = _near_centre(points, boxes, shapes) & lies_inside(every_point, boxes)
        level = torch.cat([suits.new_full((len(x),), number, dtype=torch.int64) for number, x in enumerate(points)])
        box_cells, box_gt_index = _nearest_box(distance, near & suits[level])
        peak_level, peak_gt = suits.nonzero(as_tuple=True)
        return HeatMap(
            heat=_heat(distance, target.labels, num_classes),
            peaks=centre_cells[peak_level, peak_gt],
            peak_labels=target.labels[peak_gt],
            box_cells=box_cells,
            box_gt_index=box_gt_index,
            counted=~lies_inside(every_point, target.ignore_xyxy).any(dim=1),
        )

    def _suits(self, boxes: Tensor, shapes: Sequence[LevelShape]) -> Bool[Tensor, "l gt"]:
        half_diagonal = (boxes[:, 2:] - boxes[:, :2]).square().sum(dim=1).sqrt() / 2
        ranges = half_diagonal.new_tensor(self.sizes_px([shape.stride_px for shape in shapes]))
        return (half_diagonal >= ranges[:, :1]) & (half_diagonal <= ranges[:, 1:])

    def _centre_cells(self, boxes: Tensor, shapes: Sequence[LevelShape]) -> Int[Tensor, "l gt"]:
        """The cell, counted over all levels, that each box's centre lies in."""
        cells, start = [], 0
        for shape in shapes:
            column, row = _cell(boxes, shape)
            cells.append(start + row * shape.width + column)
            start += shape.height * shape.width
        return torch.stack(cells)

    def _distance(self, points: Tensor, boxes: Tensor, centre_cells: Tensor) -> Float[Tensor, "t gt"]:
        """Squared distances of cells to centres in squared radii; 0 for the cell that a centre lies in."""
        delta = (1 - self.min_overlap) / (1 + self.min_overlap)
        squared_radius = (2 * delta**2 * area(boxes)).clamp(min=self.min_radius_px**2)
        distance = (points[:, None] - centres(boxes)[None]).square().sum(dim=-1) / squared_radius
        return distance.scatter(0, centre_cells, 0.0)


def _cell(boxes: Tensor, shape: LevelShape) -> tuple[Tensor, Tensor]:
    """Column and row of each box's centre. A centre on the far edge of the picture belongs to the last cell."""
    cell = (centres(boxes) / shape.stride_px).long()
    return cell[:, 0].clamp(0, shape.width - 1), cell[:, 1].clamp(0, shape.height - 1)


def _near_centre(points: Sequence[Tensor], boxes: Tensor, shapes: Sequence[LevelShape]) -> Bool[Tensor, "t gt"]:
    """Which cells are among the 3x3 around which box's centre cell."""
    near = []
    for level_points, shape in zip(points, shapes, strict=True):
        middle = (torch.stack(_cell(boxes, shape), dim=-1) + 0.5) * shape.stride_px
        near.append((level_points[:, None] - middle[None]).abs().amax(dim=-1) < 1.5 * shape.stride_px)
    return torch.cat(near)


def _nearest_box(distance: Tensor, allowed: Tensor) -> tuple[Int[Tensor, " b"], Int[Tensor, " b"]]:
    if distance.shape[1] == 0:
        nothing = torch.zeros(0, dtype=torch.int64, device=distance.device)
        return nothing, nothing
    nearest, gt_index = torch.where(allowed, distance, math.inf).min(dim=1)
    cells = nearest.isfinite().nonzero().flatten()
    return cells, gt_index[cells]


def _heat(distance: Float[Tensor, "t gt"], labels: Int[Tensor, " gt"], num_classes: int) -> Float[Tensor, "t k"]:
    heat = (-distance).exp()
    heat = torch.where(heat < _LEAST_HEAT, 0.0, heat)
    return heat.new_zeros(len(heat), num_classes).scatter_reduce(1, labels.expand_as(heat), heat, "amax")
