"""The region proposal network (Ren et al., 2015) as a dense head.

Letters: N images, L levels, A anchors per cell, K classes (1 as a first stage), T anchors of a picture over all levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from rcnn.boxes.coding import DeltaCoder
from rcnn.boxes.geometry import FarEnds, is_inside
from rcnn.boxes.loss import DeltaLoss, smooth_l1_ninth
from rcnn.dense.assignment import cells_of_picture, scatter_matches
from rcnn.dense.interface import AbstractDenseHead, Candidates, DensePrediction
from rcnn.dense.selection import CandidateSelector, ClipTo, per_prior
from rcnn.matching.iou import IoUMatcher, Matches
from rcnn.matching.sampling import BalancedSampler, EverySampler, Sample
from rcnn.ops.sparse_gradient import conv_for_sampled_loss
from rcnn.priors import AnchorGenerator, priors_of
from rcnn.records import Levels, LevelShape, Losses, Size, Target

# A logit per class, or one more for background.
Objectness = Literal["sigmoid", "softmax"]
# By how many anchors of a picture the losses are divided: those that were sampled; the same, but that a picture without
# a positive counts as if it had one (MMDetection); or a number whatever was sampled (detectron2: 256).
LossCount = Literal["sampled", "at_least_one_positive"] | int


class RPNTower(nn.Module):
    """`num_convs` 3x3 convolutions with ReLU, then two 1x1 ones: class logits and box deltas of one map."""

    def __init__(self, *, in_channels: int, channels: int, num_convs: int, num_anchors: int, num_classes: int) -> None:
        super().__init__()
        widths = [in_channels] + [channels] * num_convs
        self.convs = nn.ModuleList(nn.Conv2d(before, after, 3, padding=1) for before, after in pairwise(widths))
        self.classes = nn.Conv2d(channels, num_anchors * num_classes, 1)
        self.deltas = nn.Conv2d(channels, num_anchors * 4, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for conv in self.convs:
            assert isinstance(conv, nn.Conv2d)
            x = F.relu(conv_for_sampled_loss(conv, x))
        return self.classes(x), self.deltas(x)


class RPNHead(AbstractDenseHead):
    """Scores and deltas for each anchor; cross-entropy over a balanced sample, smooth L1 on positives.

    Scores are sigmoids, or with `objectness="softmax"` a softmax over the classes and, last, background (the paper;
    MMDetection's `use_sigmoid=False`): its class maps are [N, A * (K + 1), H_l, W_l].
    Both losses are divided by the number of sampled anchors of the batch (`loss_count` knows others). `border_px`
    leaves out anchors that reach further over the edge of the picture (0: only those inside, as in the paper), with
    `border_ends="excluded"` those that end exactly there, too (MMDetection); None keeps all. `size_divisor_px` leaves
    out the anchors of cells beyond a picture's own size rounded up to it, which see nothing but the padding that a
    larger picture of the batch brought (MMDetection: 32); None keeps them as negatives (torchvision, detectron2).
    """

    def __init__(
        self,
        *,
        in_channels: int,
        anchors: AnchorGenerator,
        num_classes: int = 1,
        channels: int | None = None,
        num_convs: int = 1,
        coder: DeltaCoder | None = None,
        matcher: IoUMatcher | None = None,
        sampler: BalancedSampler | EverySampler | None = None,
        box_loss: DeltaLoss = smooth_l1_ninth,
        border_px: float | None = None,
        border_ends: FarEnds = "included",
        size_divisor_px: int | None = None,
        loss_count: LossCount = "sampled",
        objectness: Objectness = "sigmoid",
        clip_to: ClipTo = "picture",
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.objectness: Objectness = objectness
        self.num_logits = num_classes + (objectness == "softmax")
        self.selector = CandidateSelector(
            num_classes=num_classes,
            activation=torch.sigmoid if objectness == "sigmoid" else torch.exp,
            clip_to=clip_to,
        )
        self.anchors = anchors
        self.tower = RPNTower(
            in_channels=in_channels,
            channels=channels or in_channels,
            num_convs=num_convs,
            num_anchors=anchors.num_per_cell,
            num_classes=self.num_logits,
        )
        self.coder = coder or DeltaCoder()
        self.matcher = matcher or IoUMatcher(positive_iou=0.7, negative_iou=0.3, low_quality_iou=0.0)
        self.sampler = sampler or BalancedSampler(total=256, positive_fraction=0.5)
        self.box_loss = box_loss
        self.border_px = border_px
        self.border_ends: FarEnds = border_ends
        self.size_divisor_px = size_divisor_px
        self.loss_count: LossCount = loss_count

    def misfit(self, strides_px: Sequence[int]) -> str | None:
        if self.anchors.num_levels == len(strides_px):
            return None
        return f"{self.anchors.num_levels} maps, one for each list of anchor sizes"

    def forward(self, levels: Levels) -> DensePrediction:
        outputs = [self.tower(x) for x in levels.maps]
        return DensePrediction(
            classes=tuple(classes for classes, _ in outputs),
            boxes=tuple(deltas for _, deltas in outputs),
            levels=levels,
        )

    def make_anchors(self, prediction: DensePrediction) -> list[Tensor]:
        """Anchors per level [H_l * W_l * A, 4], at least in float32."""
        return priors_of(self.anchors, prediction.levels, like=prediction.boxes[0])

    def match(
        self, anchors_xyxy: Tensor, target: Target, size: Size, shapes: Sequence[LevelShape] | None = None
    ) -> Matches:
        """Matches of all anchors of a picture. `shapes` are asked for by `size_divisor_px` alone."""
        taking_part = self._taking_part(anchors_xyxy, size, shapes)
        if taking_part is None:
            return self.matcher(anchors_xyxy, target)
        # Matched among them alone: a box's best anchor must be one that may be used.
        return scatter_matches(self.matcher(anchors_xyxy[taking_part], target), taking_part)

    def _taking_part(self, anchors_xyxy: Tensor, size: Size, shapes: Sequence[LevelShape] | None) -> Tensor | None:
        """Which anchors may be used; None for all."""
        inside = None
        if self.border_px is not None:
            inside = is_inside(anchors_xyxy, size, self.border_px, far_ends=self.border_ends)
        if self.size_divisor_px is None:
            return inside
        assert shapes is not None
        cells = cells_of_picture(shapes, size, divisor_px=self.size_divisor_px, device=anchors_xyxy.device)
        own = torch.cat(cells).repeat_interleave(self.anchors.num_per_cell)
        return own if inside is None else own & inside

    def loss(self, prediction: DensePrediction, targets: Sequence[Target]) -> Losses:
        anchors = torch.cat(self.make_anchors(prediction))
        logits = per_prior(prediction.classes, self.num_logits)
        deltas = per_prior(prediction.boxes, 4)
        class_loss, box_loss, count = anchors.new_zeros(()), anchors.new_zeros(()), 0
        for image, target in enumerate(targets):
            size, shapes = prediction.levels.image_sizes[image], prediction.levels.shapes
            matches = self.match(anchors, target, size, shapes)
            sample = self.sampler(matches)
            chosen = torch.cat((sample.positive, sample.negative))
            labels = self._labels(sample, matches, target)
            class_loss = class_loss + self._class_loss(logits[image, chosen].to(anchors.dtype), labels)
            # Also where nothing is positive: a sum over no anchors is zero, and keeps the parameters in the graph.
            truth = target.boxes_xyxy[matches.gt_index[sample.positive]]
            wanted = self.coder.encode(truth, anchors[sample.positive])
            box_loss = box_loss + self.box_loss(deltas[image, sample.positive].to(anchors.dtype), wanted)
            count += self._count(sample)
        return {"classification": class_loss / max(count, 1), "box": box_loss / max(count, 1)}

    def _count(self, sample: Sample) -> int:
        if isinstance(self.loss_count, int):
            return self.loss_count
        positive = len(sample.positive)
        return len(sample.negative) + (positive if self.loss_count == "sampled" else max(positive, 1))

    def _labels(self, sample: Sample, matches: Matches, target: Target) -> Int[Tensor, " s"]:
        """Of the sampled anchors, positive ones first; K is background."""
        of_positive = target.labels[matches.gt_index[sample.positive]]
        return torch.cat((of_positive, torch.full_like(sample.negative, self.num_classes)))

    def _class_loss(self, logits: Float[Tensor, "s _"], labels: Int[Tensor, " s"]) -> Tensor:
        if self.objectness == "softmax":
            return F.cross_entropy(logits, labels, reduction="sum")
        wanted = F.one_hot(labels, self.num_classes + 1)[:, : self.num_classes].to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum")

    def decode(self, prediction: DensePrediction, *, per_level: int | None, score_threshold: float) -> list[Candidates]:
        return self.selector(
            self._without_background(prediction),
            self.make_anchors(prediction),
            lambda deltas, anchors, _: self.coder.decode(deltas, anchors),
            per_level=per_level,
            score_threshold=score_threshold,
        )

    def _without_background(self, prediction: DensePrediction) -> DensePrediction:
        """With as many class maps as there are classes; of a softmax, the logarithms of probabilities."""
        if self.objectness == "sigmoid":
            return prediction
        shape = (self.anchors.num_per_cell, self.num_classes + 1)
        wide = [x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(1, shape) for x in prediction.classes]
        return replace(prediction, classes=tuple(x.log_softmax(2)[:, :, :-1].flatten(1, 2) for x in wide))
