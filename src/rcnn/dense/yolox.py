"""YOLOX's decoupled head (Ge et al., 2021): classes, boxes and objectness from towers of each level's own.

Letters: N images, L levels, T priors of a picture over all levels, K classes (1 as a first stage), P positives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from rcnn.boxes.coding import DeltaCoder
from rcnn.boxes.geometry import paired_iou
from rcnn.dense.assignment import Assignment, assign
from rcnn.dense.interface import AbstractDenseHead, Candidates, DensePrediction
from rcnn.dense.selection import CandidateSelector, per_prior
from rcnn.dense.towers import MakeNorm, prior_bias
from rcnn.matching.iou import Matches
from rcnn.matching.simota import SimOTAMatcher
from rcnn.ops.losses import mean_over_processes
from rcnn.priors import AnchorGenerator, priors_of
from rcnn.records import Levels, Losses, Target

# A box is at most ten thousand strides wide: what is larger in an untrained head would overflow float32 as an area.
MAX_LOG_STRIDES = math.log(1e4)
# The least union of an IoU, in square pixels (MMDetection).
_LEAST_UNION = 1e-6

batch_norm: MakeNorm = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.03)


class SiLUTower(nn.Module):
    """`num_convs` 3x3 convolutions, each with a norm and SiLU."""

    def __init__(self, *, in_channels: int, channels: int, num_convs: int, make_norm: MakeNorm) -> None:
        super().__init__()
        widths = [in_channels] + [channels] * num_convs
        self.convs = nn.ModuleList(
            nn.Conv2d(before, channels, 3, padding=1, bias=False) for before in widths[:num_convs]
        )
        self.norms = nn.ModuleList(make_norm(channels) for _ in range(num_convs))

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n channels h w"]:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.silu(normalize(norm, conv(x)))
        return x


def normalize(norm: nn.Module, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    """`norm(x)`; batch norm of a single value per channel (one picture, one cell) uses its stored statistics.

    torch refuses to train on one, which has no spread; a small picture alone in its batch gives that. Where several
    processes share their statistics there are more values, and all must take part.
    """
    batch_norm = isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm) and norm.training
    if not batch_norm or x.numel() > x.shape[1] or (isinstance(norm, nn.SyncBatchNorm) and _has_company()):
        return norm(x)
    assert isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm)
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)


def _has_company() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


class YOLOXLevel(nn.Module):
    """The head of one level: a tower for classes, one for boxes and objectness, and a 1x1 convolution for each."""

    def __init__(self, *, make_tower: Callable[[], SiLUTower], channels: int, num_classes: int) -> None:
        super().__init__()
        self.class_tower = make_tower()
        self.box_tower = make_tower()
        self.classes = nn.Conv2d(channels, num_classes, 1)
        self.boxes = nn.Conv2d(channels, 4, 1)
        self.objectness = nn.Conv2d(channels, 1, 1)
        for conv in (self.classes, self.objectness):
            assert conv.bias is not None
            nn.init.constant_(conv.bias, prior_bias())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        of_boxes = self.box_tower(x)
        return self.classes(self.class_tower(x)), self.boxes(of_boxes), self.objectness(of_boxes)


class YOLOXHead(AbstractDenseHead):
    """Classes, boxes relative to each cell's top left corner in strides, and objectness; matched by SimOTA.

    Binary cross-entropy of the objectness of all priors, and of the positives' classes against their IoU; one minus
    the squared IoU of the positives, times `box_weight`. All are divided by the number of positives (its mean over the
    processes). `l1_weight` adds the L1 loss of the raw boxes, which YOLOX does in its last 15 epochs. A candidate's
    score is class times objectness.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        strides_px: Sequence[int],
        num_classes: int = 1,
        channels: int | None = None,
        num_convs: int = 2,
        make_norm: MakeNorm = batch_norm,
        matcher: SimOTAMatcher | None = None,
        coder: DeltaCoder | None = None,
        box_weight: float = 5.0,
        l1_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.strides_px = tuple(strides_px)
        channels = channels or in_channels
        make_tower = partial(
            SiLUTower, in_channels=in_channels, channels=channels, num_convs=num_convs, make_norm=make_norm
        )
        self.levels = nn.ModuleList(
            YOLOXLevel(
                make_tower=make_tower,
                channels=channels if num_convs else in_channels,
                num_classes=num_classes,
            )
            for _ in strides_px
        )
        # Squares of one stride around the corners: relative to them the deltas are YOLOX's offsets and logarithms.
        self.squares = AnchorGenerator(
            sizes_px=tuple((float(stride),) for stride in strides_px), heights_over_widths=(1.0,)
        )
        self.matcher = matcher or SimOTAMatcher()
        self.coder = coder or DeltaCoder(max_log_ratio=MAX_LOG_STRIDES)
        self.selector = CandidateSelector(num_classes=num_classes, fusion="product")
        self.box_weight = box_weight
        self.l1_weight = l1_weight

    def forward(self, levels: Levels) -> DensePrediction:
        outputs = [head(x) for head, x in zip(self.levels, levels.maps, strict=True)]
        return DensePrediction(
            classes=tuple(classes for classes, _, _ in outputs),
            boxes=tuple(boxes for _, boxes, _ in outputs),
            quality=tuple(objectness for _, _, objectness in outputs),
            levels=levels,
        )

    def make_squares(self, prediction: DensePrediction) -> list[Tensor]:
        """Per level a square of one stride around each cell's top left corner [H_l * W_l, 4], at least in float32."""
        return priors_of(self.squares, prediction.levels, like=prediction.boxes[0])

    def loss(self, prediction: DensePrediction, targets: Sequence[Target]) -> Losses:
        squares = torch.cat(self.make_squares(prediction))
        logits = per_prior(prediction.classes, self.num_classes).to(squares.dtype)
        deltas = per_prior(prediction.boxes, 4).to(squares.dtype)
        objectness = per_prior(prediction.quality, 1)[..., 0].to(squares.dtype)
        boxes = self.coder.decode(deltas, squares)
        scores = (logits.sigmoid() * objectness.sigmoid()[..., None]).sqrt()
        parts = zip(boxes, scores, targets, strict=True)
        matches = [self.match(squares, *of_image) for of_image in parts]
        wanted = assign(matches, targets)
        norm = mean_over_processes(objectness.new_tensor(len(wanted.positive))).clamp(min=1)
        losses = self._losses(logits.flatten(0, 1), boxes.flatten(0, 1), objectness.flatten(), wanted)
        if self.l1_weight:
            raw = self.coder.encode(wanted.boxes_xyxy.to(squares.dtype), squares[wanted.priors])
            losses["l1"] = self.l1_weight * (deltas.flatten(0, 1)[wanted.positive] - raw).abs().sum()
        return {name: loss / norm for name, loss in losses.items()}

    @torch.no_grad()
    def match(self, squares: Tensor, boxes: Tensor, scores: Tensor, target: Target) -> Matches:
        """Matches of all priors of a picture by what they predict. The middles of the cells are where they are."""
        side = squares[:, 2:] - squares[:, :2]
        return self.matcher(
            boxes_xyxy=boxes.detach(),
            scores=scores.detach(),
            points_xy=squares[:, 2:],  # the lower right corner of a square around a cell's corner is the cell's middle
            strides_px=side[:, 0],
            target=target,
        )

    def _losses(self, logits: Tensor, boxes: Tensor, objectness: Tensor, wanted: Assignment) -> Losses:
        """The sums over all pictures, flat."""
        overlaps = paired_iou(boxes[wanted.positive], wanted.boxes_xyxy.to(boxes.dtype), eps=_LEAST_UNION)
        truth = F.one_hot(wanted.labels, self.num_classes) * overlaps.detach()[:, None]
        is_object = torch.zeros_like(objectness).index_fill(0, wanted.positive, 1.0)
        return {
            "classification": F.binary_cross_entropy_with_logits(logits[wanted.positive], truth, reduction="sum"),
            "box": self.box_weight * (1 - overlaps.square()).sum(),
            "objectness": F.binary_cross_entropy_with_logits(
                objectness[wanted.counted], is_object[wanted.counted], reduction="sum"
            ),
        }

    def decode(self, prediction: DensePrediction, *, per_level: int | None, score_threshold: float) -> list[Candidates]:
        return self.selector(
            prediction,
            self.make_squares(prediction),
            lambda deltas, squares, _: self.coder.decode(deltas, squares),
            per_level=per_level,
            score_threshold=score_threshold,
        )
