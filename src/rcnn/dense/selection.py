"""From a head's raw maps to its best candidates: what every one-stage head's `decode` does.

Letters: N images, L levels, A priors per cell, T priors of a picture or of one of its levels, K classes, D numbers that
a box is predicted with (4, or more where a side is a distribution), S selected candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rcnn.boxes.geometry import clip
from rcnn.dense.interface import Candidates, DensePrediction
from rcnn.records import Size

# The chosen ones' raw numbers [S, D], their priors [S, ...] and their levels' strides in pixels [S, 1] to boxes [S, 4].
DecodeBoxes = Callable[[Tensor, Tensor, Tensor], Tensor]

# How a second map (centerness, objectness) enters the score.
# "none": it does not. "rescore": candidates are ranked and thresholded by class score, and only then is the score
# multiplied by the quality (MMDetection's heads). "product" and "sqrt": ranked and thresholded by class score times
# quality (YOLOX) or by the root of it (torchvision's FCOS, CenterNet2).
ScoreFusion = Literal["none", "rescore", "product", "sqrt"]
# Where boxes are cut: at the edge of the picture, or one pixel inside the edge of the padded input (MindSpore).
ClipTo = Literal["picture", "inside_padding"]


def per_prior(maps: Sequence[Float[Tensor, "n _ _ _"]], width: int) -> Float[Tensor, "n t {width}"]:
    """Maps [N, A * width, H_l, W_l] to [N, T, width], in the order of the priors. Free for channels-last maps."""
    flat = [x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, width) for x in maps]
    return flat[0] if len(flat) == 1 else torch.cat(flat, dim=1)


@dataclass(frozen=True, kw_only=True)
class CandidateSelector:
    """How a head's candidates are chosen from its maps.

    `activation` makes scores of logits without changing their order: the sigmoid, or `torch.exp` where a head gives
    logarithms of probabilities. Without `clips` boxes stay as predicted, also beyond the picture: detectron2's
    RetinaNet suppresses overlaps before it cuts.
    """

    num_classes: int
    box_width: int = 4
    fusion: ScoreFusion = "none"
    activation: Callable[[Tensor], Tensor] = torch.sigmoid
    clips: bool = True
    clip_to: ClipTo = "picture"

    def __call__(
        self,
        prediction: DensePrediction,
        priors: Sequence[Float[Tensor, "t _"]],
        decode_boxes: DecodeBoxes,
        *,
        per_level: int | None,
        score_threshold: float,
    ) -> list[Candidates]:
        """Per picture the best `per_level` (prior, class) pairs of each level, best first, level after level.

        Those whose score (the one they are ranked by) is under `score_threshold` or no number are left out. Boxes are
        decoded for the chosen alone, in the dtype of `priors`, and clipped to the picture.
        """
        sizes = prediction.levels.image_sizes
        if self.clip_to == "inside_padding":
            padded = prediction.levels.padded_size
            sizes = (Size(padded.height - 1, padded.width - 1),) * len(sizes)
        return [
            self._of_image(prediction, image, size, priors, decode_boxes, per_level, score_threshold)
            for image, size in enumerate(sizes)
        ]

    def _of_image(
        self,
        prediction: DensePrediction,
        image: int,
        size: Size,
        priors: Sequence[Tensor],
        decode_boxes: DecodeBoxes,
        per_level: int | None,
        score_threshold: float,
    ) -> Candidates:
        chosen, raw, ranks, qualities, indices = [], [], [], [], []
        for level, level_priors in enumerate(priors):
            rank, index = self._best(prediction, image, level, level_priors.dtype, per_level)
            prior = index if self.num_classes == 1 else index // self.num_classes
            raw.append(self._of_level(prediction.boxes, image, level, self.box_width)[prior])
            chosen.append(level_priors[prior])
            ranks.append(rank)
            indices.append(index)
            if self.fusion == "rescore":
                qualities.append(self._of_level(prediction.quality, image, level, 1).flatten()[prior])
        # All levels at once from here: small networks feel every operation.
        level = torch.cat([some.new_full(some.shape, level) for level, some in enumerate(indices)])
        score = self._score(torch.cat(ranks).to(priors[0].dtype))
        # What is no number is under every threshold.
        keep = (score >= score_threshold).nonzero().flatten()
        if qualities:
            score = score * torch.cat(qualities).to(score.dtype).sigmoid()
            keep = keep[score[keep].argsort(descending=True, stable=True)]
            keep = keep[level[keep].argsort(stable=True)]
        level = level[keep]
        stride_px = level.new_tensor([shape.stride_px for shape in prediction.levels.shapes])[level, None]
        boxes = decode_boxes(torch.cat(raw)[keep].to(score.dtype), torch.cat(chosen)[keep], stride_px)
        return Candidates(
            boxes_xyxy=clip(boxes, size) if self.clips else boxes,
            scores=score[keep],
            labels=torch.cat(indices)[keep] % self.num_classes,
            level=level,
        )

    def _best(
        self, prediction: DensePrediction, image: int, level: int, dtype: torch.dtype, per_level: int | None
    ) -> tuple[Tensor, Tensor]:
        """What the best of one level are ranked by, best first, and their flat indices."""
        rank = self._of_level(prediction.classes, image, level, self.num_classes)
        if self.fusion in ("product", "sqrt"):
            quality = self._of_level(prediction.quality, image, level, 1).to(dtype).sigmoid()
            rank = self.activation(rank.to(dtype)) * quality
        rank = rank.flatten()
        return rank.topk(len(rank) if per_level is None else min(per_level, len(rank)))

    def _score(self, rank: Tensor) -> Tensor:
        """Of the chosen alone: logits and squares have the order of scores."""
        if self.fusion in ("none", "rescore"):
            return self.activation(rank)
        return rank.sqrt() if self.fusion == "sqrt" else rank

    def _of_level(self, maps: Sequence[Tensor], image: int, level: int, width: int) -> Float[Tensor, "t {width}"]:
        return per_prior([maps[level][image : image + 1]], width)[0]
