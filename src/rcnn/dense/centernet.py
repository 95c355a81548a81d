"""CenterNet as CenterNet2 has it (Zhou et al., 2021): an object is a peak in a heat map, and four distances from it.

Letters: N images, L levels, T cells of a picture over all levels, K classes (1 as a first stage).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rcnn.boxes.coding import DistanceCoder
from rcnn.dense.interface import AbstractDenseHead, Candidates, DensePrediction
from rcnn.dense.selection import CandidateSelector, per_prior
from rcnn.dense.towers import ConvTower, MakeNorm, Scale, group_norm, prior_bias, start_small
from rcnn.matching.heatmap import HeatMap, HeatMapMatcher
from rcnn.ops.losses import distance_giou_loss, mean_over_processes, off_peak_focal_loss, peak_focal_loss
from rcnn.priors import PointGenerator, priors_of
from rcnn.records import Levels, Losses, Target

# "shared": the heat map is read from the boxes' tower (CenterNet2's class-agnostic one). "own": from a second one.
HeatTower = Literal["shared", "own"]
# What a candidate's score is: the heat, or its root (CenterNet2 where the heat map knows no classes).
HeatScore = Literal["heat", "root"]
# What the box loss of a cell weighs: 1, or the heat that the cell should have (CenterNet2's NOT_NORM_REG: False).
BoxWeights = Literal["equal", "heat"]
# Distances start at eight strides: the ReLU behind them would let nothing learn that starts below 0.
_FIRST_DISTANCE = 8.0


class CenterNetHead(AbstractDenseHead):
    """A heat map of each class and four distances in strides per cell, from towers of 3x3 convolutions with norm.

    Focal losses of the peaks and of all other cells, these the less the hotter they should be; generalised IoU of the
    boxes of the 3x3 cells around each peak. The former are divided by the number of peaks, the latter by its weights,
    both as the mean over the processes. With one class the heat map shares the boxes' tower and the score is the root
    of the heat, as in CenterNet2's first stage; with more it has a tower of its own and the score is the heat, as in
    the one-stage CenterNet* of the same paper. That one's losses weigh twice as much (`peak_weight` 1,
    `off_peak_weight` 1, `box_weight` 2, `ignore_above` None); the further peaks that its code can add where a box is
    already predicted well (MORE_POS) are not here.

    An off-peak cell is left out where it scores `ignore_above` or more (an object that was not annotated?), and where
    its middle lies in an ignore region.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        strides_px: Sequence[int],
        num_classes: int = 1,
        channels: int | None = None,
        num_convs: int = 4,
        make_norm: MakeNorm | None = group_norm,
        heat_tower: HeatTower | None = None,
        score: HeatScore | None = None,
        matcher: HeatMapMatcher | None = None,
        coder: DistanceCoder | None = None,
        alpha: float = 0.25,
        beta: float = 4.0,
        gamma: float = 2.0,
        ignore_above: float | None = 0.85,
        peak_weight: float = 0.5,
        off_peak_weight: float = 0.5,
        box_weight: float = 1.0,
        box_weights: BoxWeights = "equal",
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.strides_px = tuple(strides_px)
        make_tower = partial(
            ConvTower,
            in_channels=in_channels,
            channels=channels or in_channels,
            num_convs=num_convs,
            make_norm=make_norm,
            conv_bias=True,
        )
        self.tower = make_tower()
        own = (heat_tower or ("shared" if num_classes == 1 else "own")) == "own"
        self.heat_tower = make_tower() if own else None
        self.heat = nn.Conv2d(self.tower.out_channels, num_classes, 3, padding=1)
        self.distances = nn.Conv2d(self.tower.out_channels, 4, 3, padding=1)
        start_small(self.heat, bias=prior_bias())
        start_small(self.distances, bias=_FIRST_DISTANCE)
        self.scales = nn.ModuleList(Scale() for _ in strides_px)
        self.points = PointGenerator(offset=0.5)
        self.matcher = matcher or HeatMapMatcher()
        self.coder = coder or DistanceCoder()
        rooted = (score or ("root" if num_classes == 1 else "heat")) == "root"
        self.selector = CandidateSelector(
            num_classes=num_classes, activation=_root_of_sigmoid if rooted else torch.sigmoid
        )
        self.peak_loss = partial(peak_focal_loss, gamma=gamma)
        self.off_peak_loss = partial(off_peak_focal_loss, beta=beta, gamma=gamma, ignore_above=ignore_above)
        self.peak_weight = peak_weight * alpha
        self.off_peak_weight = off_peak_weight * (1 - alpha)
        self.box_weight = box_weight
        self.box_weights: BoxWeights = box_weights

    def forward(self, levels: Levels) -> DensePrediction:
        """Heat as logits, distances in strides before their ReLU."""
        heat, distances = [], []
        for x, scale in zip(levels.maps, self.scales, strict=True):
            features = self.tower(x)
            heat.append(self.heat(features if self.heat_tower is None else self.heat_tower(x)))
            distances.append(scale(self.distances(features)))
        return DensePrediction(classes=tuple(heat), boxes=tuple(distances), levels=levels)

    def make_points(self, prediction: DensePrediction) -> list[Tensor]:
        """The middles of the cells per level, at least in float32."""
        return priors_of(self.points, prediction.levels, like=prediction.boxes[0])

    def loss(self, prediction: DensePrediction, targets: Sequence[Target]) -> Losses:
        points = self.make_points(prediction)
        dtype, shapes = points[0].dtype, prediction.levels.shapes
        wanted = [self.matcher(points, shapes, target, num_classes=self.num_classes) for target in targets]
        logits = per_prior(prediction.classes, self.num_classes).to(dtype)
        distances = F.relu(per_prior(prediction.boxes, 4).to(dtype))
        num_peaks = mean_over_processes(logits.new_tensor(sum(len(one.peaks) for one in wanted))).clamp(min=1)
        peak, off_peak = self._heat_losses(logits, wanted)
        box, box_norm = self._box_loss(distances, points, prediction, wanted, targets)
        return {
            "peak": self.peak_weight * peak / num_peaks,
            "off_peak": self.off_peak_weight * off_peak / num_peaks,
            "box": self.box_weight * box / mean_over_processes(box_norm).clamp(min=1),
        }

    def _heat_losses(self, logits: Tensor, wanted: Sequence[HeatMap]) -> tuple[Tensor, Tensor]:
        at_peaks = torch.cat(
            [of_image[one.peaks, one.peak_labels] for of_image, one in zip(logits, wanted, strict=True)]
        )
        heat = torch.stack([one.heat for one in wanted])
        counted = torch.stack([one.counted for one in wanted])[..., None]
        off_peak = torch.where(counted, self.off_peak_loss(logits, heat), 0.0)
        return self.peak_loss(at_peaks).sum(), off_peak.sum()

    def _box_loss(
        self,
        distances: Tensor,
        points: Sequence[Tensor],
        prediction: DensePrediction,
        wanted: Sequence[HeatMap],
        targets: Sequence[Target],
    ) -> tuple[Tensor, Tensor]:
        """The weighted sum over the cells that regress a box, and the sum of the weights."""
        places = torch.cat(list(points))
        strides = torch.cat(
            [
                x.new_full((len(x), 1), shape.stride_px)
                for x, shape in zip(points, prediction.levels.shapes, strict=True)
            ]
        )
        found = torch.cat([of_image[one.box_cells] for of_image, one in zip(distances, wanted, strict=True)])
        truth = torch.cat(
            [
                self.coder.encode(target.boxes_xyxy[one.box_gt_index], places[one.box_cells]) / strides[one.box_cells]
                for one, target in zip(wanted, targets, strict=True)
            ]
        )
        weights = torch.cat([one.heat[one.box_cells].amax(dim=1) for one in wanted])
        if self.box_weights == "equal":
            weights = torch.ones_like(weights)
        return (weights * distance_giou_loss(found, truth.to(found.dtype))).sum(), weights.sum()

    def decode(self, prediction: DensePrediction, *, per_level: int | None, score_threshold: float) -> list[Candidates]:
        def boxes_of(distances: Tensor, points: Tensor, stride_px: Tensor) -> Tensor:
            return self.coder.decode(F.relu(distances) * stride_px, points)

        return self.selector(
            prediction, self.make_points(prediction), boxes_of, per_level=per_level, score_threshold=score_threshold
        )


def _root_of_sigmoid(logits: Tensor) -> Tensor:
    return logits.sigmoid().sqrt()
