"""TOOD (Feng et al., 2021) as a dense head: classes and boxes from shared features, trained to be good together.

Letters: N images, K classes (1 as a first stage), V convolutions of the tower, C channels, T cells of a picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
import torchvision
from jaxtyping import Float
from torch import Tensor, nn

from rcnn.boxes.coding import DistanceCoder, centerness_of
from rcnn.boxes.geometry import centres
from rcnn.dense.assignment import assign, cells_of_picture, scatter_matches
from rcnn.dense.atss import match_batch, square_anchors
from rcnn.dense.interface import AbstractDenseHead, Candidates, DensePrediction
from rcnn.dense.selection import CandidateSelector, per_prior
from rcnn.dense.towers import ConvTower, MakeNorm, Scale, group_norm, prior_bias, start_small
from rcnn.matching.atss import ATSSMatcher
from rcnn.matching.iou import Matches
from rcnn.matching.task_aligned import TaskAlignedMatcher
from rcnn.ops.losses import iou_loss, mean_over_processes, quality_focal_loss, sigmoid_focal_loss
from rcnn.priors import priors_of
from rcnn.records import Levels, LevelShape, Losses, Target


class TaskDecomposition(nn.Module):
    """The share of each of V stacked maps for one task, found from their mean, and their 1x1 convolution to C channels
    (section 3.1, layer attention)."""

    def __init__(self, *, channels: int, num_maps: int, make_norm: MakeNorm | None) -> None:
        super().__init__()
        self.num_maps = num_maps
        hidden = max(channels // 8, 1)
        self.attention = nn.Sequential(
            nn.Conv2d(channels * num_maps, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, num_maps, 1), nn.Sigmoid()
        )
        self.weight = nn.Parameter(torch.empty(channels, channels * num_maps))
        self.norm = nn.Identity() if make_norm is None else make_norm(channels)
        _start(self.attention, std=0.001)
        nn.init.normal_(self.weight, std=0.01)

    def forward(self, stacked: Float[Tensor, "n v*c h w"], mean: Float[Tensor, "n v*c 1 1"]) -> Tensor:
        share = self.attention(mean).flatten(1)
        # The weights of the convolution are multiplied instead of the maps, which are larger.
        weights = share[:, None, :, None] * self.weight.unflatten(1, (self.num_maps, -1))
        mixed = torch.bmm(weights.flatten(2), stacked.flatten(2))
        return F.relu(self.norm(mixed.unflatten(2, stacked.shape[2:])))


class TOODTower(nn.Module):
    """Class logits, the logit of how well they fit the box, the distances of its sides, and where to read each side.

    Distances are left, top, right and bottom, in strides; the last map holds for each a shift (y, x) in cells.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        num_levels: int,
        channels: int,
        num_convs: int,
        make_norm: MakeNorm | None,
    ) -> None:
        super().__init__()
        tower = ConvTower(in_channels=in_channels, channels=channels, num_convs=num_convs, make_norm=make_norm)
        self.layers = tower.layers  # each one's map is used, not the last one's alone
        self.class_features, self.box_features = (
            TaskDecomposition(channels=channels, num_maps=num_convs, make_norm=make_norm) for _ in range(2)
        )
        self.classes = nn.Conv2d(channels, num_classes, 3, padding=1)
        self.distances = nn.Conv2d(channels, 4, 3, padding=1)
        self.fit, self.shifts = (
            nn.Sequential(
                nn.Conv2d(channels * num_convs, max(channels // 4, 1), 1),
                nn.ReLU(),
                nn.Conv2d(max(channels // 4, 1), width, 3, padding=1),
            )
            for width in (1, 8)
        )
        self.scales = nn.ModuleList(Scale() for _ in range(num_levels))
        _start([*self.fit, self.classes, self.distances], std=0.01)
        _start(self.shifts, std=0.001)
        for layer in (self.classes, self.fit[-1]):
            assert isinstance(layer, nn.Conv2d)
            start_small(layer, bias=prior_bias())

    def forward(self, x: Tensor, level: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        maps = []
        for layer in self.layers:
            x = F.relu(layer(x))
            maps.append(x)
        stacked = torch.cat(maps, dim=1)
        mean = stacked.mean(dim=(2, 3), keepdim=True)
        classes = self.classes(self.class_features(stacked, mean))
        logarithms = self.distances(self.box_features(stacked, mean))
        wide = torch.promote_types(logarithms.dtype, torch.float32)
        return classes, self.fit(stacked), self.scales[level](logarithms.to(wide).exp()), self.shifts(stacked)


class TOODHead(AbstractDenseHead):
    """Task-aligned classes and boxes; as MMDetection's `TOODHead` with points (`anchor_free`).

    `classes[l]` of its prediction are logits of the aligned score, the root of (class probability x fit); `boxes[l]`
    are boxes, x1 y1 x2 y2 in network-input pixels. Both are float32 or wider.

    A positive's class is wanted to be its alignment, with quality focal loss; its GIoU loss is weighted with the
    alignment; both are divided by the sum of alignments over the batch, averaged over the processes and at least 1.
    The first `initial_batches` calls of `loss` while training (in each process) match as ATSS does instead, with focal
    loss, and boxes weighted with centerness: the published schedule does so for four of twelve epochs. The calls are
    counted in the buffer `batches_seen`, which a checkpoint holds, so that a resumed training goes on as it would have.
    `anchor_scale` and `size_divisor_px` are `ATSSHead`'s; ATSS matching alone uses the anchors' sizes.
    """

    batches_seen: Tensor

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        strides_px: Sequence[int],
        channels: int = 256,
        num_convs: int = 6,
        make_norm: MakeNorm | None = group_norm,
        anchor_scale: float = 8.0,
        matcher: TaskAlignedMatcher | None = None,
        initial_matcher: ATSSMatcher | None = None,
        initial_batches: int = 0,
        coder: DistanceCoder | None = None,
        box_weight: float = 2.0,
        size_divisor_px: int = 32,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.strides_px = tuple(strides_px)
        self.tower = TOODTower(
            in_channels=in_channels,
            num_classes=num_classes,
            num_levels=len(strides_px),
            channels=channels,
            num_convs=num_convs,
            make_norm=make_norm,
        )
        self.anchors = square_anchors(strides_px, anchor_scale)
        self.matcher = matcher or TaskAlignedMatcher()
        self.initial_matcher = initial_matcher or ATSSMatcher()
        self.initial_batches = initial_batches
        self.coder = coder or DistanceCoder()
        self.box_weight = box_weight
        self.size_divisor_px = size_divisor_px
        self.selector = CandidateSelector(num_classes=num_classes)
        self.register_buffer("batches_seen", torch.zeros((), dtype=torch.int64))

    def forward(self, levels: Levels) -> DensePrediction:
        anchors = priors_of(self.anchors, levels, like=levels.maps[0])
        classes, boxes = [], []
        for level, (x, some, shape) in enumerate(zip(levels.maps, anchors, levels.shapes, strict=True)):
            logits, fit, distances, shifts = self.tower(x, level)
            classes.append(geometric_mean_logit(logits.to(distances.dtype), fit.to(distances.dtype)))
            boxes.append(read_shifted(self._boxes(distances, some, shape), shifts.to(distances.dtype)))
        return DensePrediction(classes=tuple(classes), boxes=tuple(boxes), levels=levels)

    def _boxes(self, distances: Tensor, anchors: Tensor, shape: LevelShape) -> Float[Tensor, "n 4 h w"]:
        """The box that each cell gives, before another cell's sides are read."""
        points = centres(anchors).view(shape.height, shape.width, 2)
        return self.coder.decode(distances.permute(0, 2, 3, 1) * shape.stride_px, points).permute(0, 3, 1, 2)

    def loss(self, prediction: DensePrediction, targets: Sequence[Target]) -> Losses:
        initial = self._is_initial()
        anchors = priors_of(self.anchors, prediction.levels, like=prediction.boxes[0])
        logits, boxes = per_prior(prediction.classes, self.num_classes), per_prior(prediction.boxes, 4)
        if initial:
            matches = match_batch(self.initial_matcher, anchors, prediction.levels, targets, self.size_divisor_px)
            alignment = torch.ones_like(boxes[..., 0])
        else:
            matches, alignment = self._aligned(anchors, logits, boxes, prediction.levels, targets)
        wanted = assign(matches, targets)
        alignment = alignment.flatten()[wanted.positive]
        truth, flat_logits = wanted.boxes_xyxy.to(boxes.dtype), logits.flatten(0, 1)
        class_loss = sigmoid_focal_loss if initial else quality_focal_loss
        class_losses = class_loss(flat_logits, wanted.class_targets(alignment, self.num_classes))
        box_losses = iou_loss(boxes.flatten(0, 1)[wanted.positive], truth, kind="giou")
        points = centres(torch.cat(anchors)[wanted.priors])
        weights = centerness_of(points, truth) if initial else alignment
        return {
            "classification": (class_losses * wanted.counted[:, None]).sum() / _divisor(alignment),
            "box": self.box_weight * (box_losses * weights).sum() / _divisor(weights),
        }

    def _is_initial(self) -> bool:
        """Whether this call of `loss` still matches as ATSS does; counts it where the head is being trained."""
        if self.initial_batches == 0 or int(self.batches_seen) >= self.initial_batches:
            return False
        if self.training and torch.is_grad_enabled():
            self.batches_seen += 1
        return True

    def _aligned(
        self,
        anchors: Sequence[Tensor],
        logits: Float[Tensor, "n t k"],
        boxes: Float[Tensor, "n t 4"],
        levels: Levels,
        targets: Sequence[Target],
    ) -> tuple[list[Matches], Float[Tensor, "n t"]]:
        points, scores = centres(torch.cat(list(anchors))), logits.detach().sigmoid()
        matches, alignment = [], torch.zeros_like(boxes[..., 0])
        for image, (size, target) in enumerate(zip(levels.image_sizes, targets, strict=True)):
            own = torch.cat(
                cells_of_picture(levels.shapes, size, divisor_px=self.size_divisor_px, device=points.device)
            )
            found = self.matcher(
                points_xy=points[own], boxes_xyxy=boxes[image, own].detach(), scores=scores[image, own], target=target
            )
            matches.append(scatter_matches(found.matches, own))
            alignment[image, own] = found.quality
        return matches, alignment

    def decode(self, prediction: DensePrediction, *, per_level: int | None, score_threshold: float) -> list[Candidates]:
        return self.selector(
            prediction,
            priors_of(self.anchors, prediction.levels, like=prediction.boxes[0]),
            lambda boxes, anchors, _: boxes,
            per_level=per_level,
            score_threshold=score_threshold,
        )


def geometric_mean_logit(a: Float[Tensor, "*shape"], b: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The logit of the geometric mean of two probabilities, from their logits.

    With a logit the losses need no logarithm of a probability, which would lose what is near 0 or 1.
    """
    log_mean = (F.logsigmoid(a) + F.logsigmoid(b)) / 2
    # Never quite 1, whose logit is infinite.
    log_mean = log_mean.clamp(max=-torch.finfo(log_mean.dtype).tiny)
    return log_mean - torch.log(-torch.expm1(log_mean))


def read_shifted(boxes: Float[Tensor, "n 4 h w"], shifts: Float[Tensor, "n 8 h w"]) -> Float[Tensor, "n 4 h w"]:
    """Each side of each cell's box as read, between four cells, at the cell's own shift (y, x) for that side.

    Beyond the map lie zeros. A box whose sides change places by it stays as it was.
    """
    weight = boxes.new_ones(4, 1, 1, 1)
    # torchvision's operator reads anywhere in memory for a shift that is no number. What it would give is none either.
    finite = shifts.isfinite()
    read = torchvision.ops.deform_conv2d(boxes.contiguous(), shifts.where(finite, 0.0).contiguous(), weight)
    read = read.where(finite.unflatten(1, (4, 2)).all(dim=2), torch.nan)
    crossed = (read[:, 0] > read[:, 2]) | (read[:, 1] > read[:, 3])
    return torch.where(crossed[:, None], boxes, read)


def _divisor(weights: Tensor) -> Tensor:
    return mean_over_processes(weights.sum()).clamp(min=1)


def _start(layers: Iterable[nn.Module], std: float) -> None:
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
