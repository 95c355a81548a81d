"""RetinaNet (Lin et al., 2017) as a dense head: nine anchors per cell, focal loss over all of them.

Letters: N images, L levels, A anchors per cell, K classes (1 as a first stage), T anchors of a picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
import torchvision
from jaxtyping import Float
from torch import Tensor, nn

from rcnn.boxes.coding import DeltaCoder
from rcnn.boxes.loss import AbstractDecodedLoss, BoxLoss, box_term, per_box
from rcnn.dense.assignment import Assignment, assign, cells_of_picture, scatter_matches
from rcnn.dense.class_loss import focal_class_loss
from rcnn.dense.interface import AbstractDenseHead, Candidates, DensePrediction
from rcnn.dense.normalizers import LossNormalizer, by_batch
from rcnn.dense.selection import CandidateSelector, per_prior
from rcnn.dense.towers import MakeNorm, prior_bias, start_small, two_towers
from rcnn.matching.iou import IoUMatcher, Matches
from rcnn.priors import AnchorGenerator, octave_anchors, priors_of
from rcnn.records import Levels, LevelShape, Losses, Size, Target

l1_per_box = per_box(partial(F.l1_loss, reduction="none"))


@dataclass(frozen=True, kw_only=True)
class DecodedGIoULoss(AbstractDecodedLoss):
    """One minus the generalised IoU of the boxes that deltas describe, as torchvision's second RetinaNet is trained.

    `eps` is added to the union and to the area of the enclosing box.
    """

    eps: float = 1e-7

    def __call__(self, predicted_xyxy: Float[Tensor, "p 4"], truth_xyxy: Float[Tensor, "p 4"]) -> Float[Tensor, " p"]:
        return torchvision.ops.generalized_box_iou_loss(predicted_xyxy, truth_xyxy, reduction="none", eps=self.eps)


class RetinaNetTower(nn.Module):
    """Two towers of convolutions on one map: class logits from the first, deltas from the second."""

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        num_anchors: int,
        channels: int,
        num_convs: int,
        make_norm: MakeNorm | None,
    ) -> None:
        super().__init__()
        self.class_tower, self.box_tower = two_towers(
            in_channels=in_channels, channels=channels, num_convs=num_convs, make_norm=make_norm
        )
        width = self.class_tower.out_channels
        self.classes = nn.Conv2d(width, num_anchors * num_classes, 3, padding=1)
        self.deltas = nn.Conv2d(width, num_anchors * 4, 3, padding=1)
        start_small(self.classes, bias=prior_bias())
        start_small(self.deltas)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.classes(self.class_tower(x)), self.deltas(self.box_tower(x))


class RetinaNetHead(AbstractDenseHead):
    """Sigmoid classes with focal loss over all anchors, a loss of each positive's deltas (L1) or of its box
    (`DecodedGIoULoss`), both divided as `normalizer` says.

    The defaults are MMDetection's (36.5 AP on COCO with ResNet-50, 12 epochs): anchors of 4 strides and two sizes more
    before twice that, three ratios. `size_divisor_px` leaves out the anchors of cells beyond a picture's own size
    rounded up to it; None keeps them as negatives (torchvision, detectron2). Without `clips_candidates` boxes are cut
    to the picture by the detector, after NMS (detectron2).
    """

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        strides_px: Sequence[int],
        channels: int = 256,
        num_convs: int = 4,
        make_norm: MakeNorm | None = None,
        anchors: AnchorGenerator | None = None,
        matcher: IoUMatcher | None = None,
        coder: DeltaCoder | None = None,
        box_loss: BoxLoss = l1_per_box,
        normalizer: LossNormalizer = by_batch,
        size_divisor_px: int | None = 32,
        clips_candidates: bool = True,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.strides_px = tuple(strides_px)
        self.anchors = anchors or octave_anchors(strides_px)
        self.tower = RetinaNetTower(
            in_channels=in_channels,
            num_classes=num_classes,
            num_anchors=self.anchors.num_per_cell,
            channels=channels,
            num_convs=num_convs,
            make_norm=make_norm,
        )
        self.matcher = matcher or IoUMatcher(
            positive_iou=0.5, negative_iou=0.4, low_quality_iou=0.0, claim_owner="claimer"
        )
        self.coder = coder or DeltaCoder(symmetric_clamp=True)
        self.box_loss = box_loss
        self.normalizer = normalizer
        self.size_divisor_px = size_divisor_px
        self.selector = CandidateSelector(num_classes=num_classes, clips=clips_candidates)

    def forward(self, levels: Levels) -> DensePrediction:
        outputs = [self.tower(x) for x in levels.maps]
        classes, deltas = zip(*outputs, strict=True)
        return DensePrediction(classes=classes, boxes=deltas, levels=levels)

    def make_anchors(self, prediction: DensePrediction) -> list[Float[Tensor, "_ 4"]]:
        """Anchors per level, at least in float32."""
        return priors_of(self.anchors, prediction.levels, like=prediction.boxes[0])

    def match(self, anchors_xyxy: Tensor, target: Target, size: Size, shapes: Sequence[LevelShape]) -> Matches:
        """Matches of all anchors of a picture."""
        if self.size_divisor_px is None:
            return self.matcher(anchors_xyxy, target)
        cells = cells_of_picture(shapes, size, divisor_px=self.size_divisor_px, device=anchors_xyxy.device)
        own = torch.cat(cells).repeat_interleave(self.anchors.num_per_cell)
        return scatter_matches(self.matcher(anchors_xyxy[own], target), own)

    def loss(self, prediction: DensePrediction, targets: Sequence[Target]) -> Losses:
        anchors, levels = torch.cat(self.make_anchors(prediction)), prediction.levels
        wanted = assign(
            [
                self.match(anchors, target, size, levels.shapes)
                for target, size in zip(targets, levels.image_sizes, strict=True)
            ],
            targets,
        )
        weights = 1 / self.normalizer(wanted.num_positive).to(anchors.dtype)
        class_losses = focal_class_loss(prediction.classes, wanted, num_classes=self.num_classes, dtype=anchors.dtype)
        return {
            # Not a matrix product, which mixed precision would round.
            "classification": (class_losses * weights).sum(),
            "box": self._box_loss(prediction, wanted, anchors, weights),
        }

    def _box_loss(
        self, prediction: DensePrediction, wanted: Assignment, anchors: Tensor, weights: Float[Tensor, " n"]
    ) -> Tensor:
        deltas = per_prior(prediction.boxes, 4).flatten(0, 1)[wanted.positive].to(anchors.dtype)
        references, truth_xyxy = anchors[wanted.priors], wanted.boxes_xyxy.to(anchors.dtype)
        losses = box_term(self.box_loss, self.coder, deltas, references, truth_xyxy)
        # Also where nothing is positive: a sum over no anchors is zero, and keeps the parameters in the graph.
        return (losses * weights[wanted.positive // len(anchors)]).sum()

    def decode(self, prediction: DensePrediction, *, per_level: int | None, score_threshold: float) -> list[Candidates]:
        return self.selector(
            prediction,
            self.make_anchors(prediction),
            lambda deltas, anchors, _: self.coder.decode(deltas, anchors),
            per_level=per_level,
            score_threshold=score_threshold,
        )
