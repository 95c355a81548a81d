"""Which priors of a batch a loss counts, and what it wants of them.

Letters: N images, T priors of a picture over all levels, P positives of the batch, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rcnn.matching.iou import Matches
from rcnn.records import LevelShape, Size, Target


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """The matches of a batch as indices into its flat priors: prior t of picture n is row n * T + t.

    `counted` are the rows that take part in the classification loss: the positive and the negative ones.
    `num_positive` is by picture.
    """

    positive: Int[Tensor, " p"]
    priors: Int[Tensor, " p"]
    labels: Int[Tensor, " p"]
    boxes_xyxy: Float[Tensor, "p 4"]
    counted: Bool[Tensor, " nt"]
    num_positive: Int[Tensor, " n"]

    def class_targets(self, values: Float[Tensor, " p"], num_classes: int) -> Float[Tensor, "nt k"]:
        """`values` at the positives' own classes, 0 elsewhere."""
        targets = values.new_zeros(len(self.counted), num_classes)
        targets[self.positive, self.labels] = values
        return targets


def assign(matches: Sequence[Matches], targets: Sequence[Target]) -> Assignment:
    """The matches of each picture with its truth, as those of the batch."""
    positive = torch.stack([one.positive for one in matches])
    image, prior = positive.nonzero(as_tuple=True)
    gt = [one.gt_index[one.positive] for one in matches]
    return Assignment(
        positive=image * positive.shape[1] + prior,
        priors=prior,
        labels=torch.cat([target.labels[index] for target, index in zip(targets, gt, strict=True)]),
        boxes_xyxy=torch.cat([target.boxes_xyxy[index] for target, index in zip(targets, gt, strict=True)]),
        counted=torch.cat([one.positive | one.negative for one in matches]),
        num_positive=positive.sum(dim=1),
    )


def cells_of_picture(
    shapes: Sequence[LevelShape], size: Size, *, divisor_px: int, device: torch.device
) -> list[Bool[Tensor, " _"]]:
    """Per level, row-major, the cells that begin within a picture of `size` rounded up to `divisor_px`.

    The others see nothing but the padding that a larger picture of the batch brought; MMDetection trains on none.
    """
    inside = []
    for shape in shapes:
        height, width = (-(-length // divisor_px) * divisor_px for length in (size.height, size.width))
        y = torch.arange(shape.height, device=device) * shape.stride_px < height
        x = torch.arange(shape.width, device=device) * shape.stride_px < width
        inside.append((y[:, None] & x).flatten())
    return inside


def scatter_matches(matches: Matches, taking_part: Bool[Tensor, " t"]) -> Matches:
    """Matches of the priors that take part as those of all priors: the others are neither positive nor negative."""
    index = taking_part.nonzero().flatten()
    neither = torch.zeros_like(taking_part)
    return Matches(
        gt_index=neither.long().index_put((index,), matches.gt_index),
        positive=neither.index_put((index,), matches.positive),
        negative=neither.index_put((index,), matches.negative),
    )
