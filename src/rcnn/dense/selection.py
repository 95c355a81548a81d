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
        chosen, raw, scores, indices = [], [], [], []
        for level, level_priors in enumerate(priors):
            dtype = level_priors.dtype
            logits = self._of_level(prediction.classes, image, level, self.num_classes).flatten()
            quality = None
            if self.fusion != "none":
                quality = self._of_level(prediction.quality, image, level, 1).flatten().to(dtype).sigmoid()
            score, index = self._best(logits, quality, dtype, per_level, score_threshold)
            prior = index if self.num_classes == 1 else index // self.num_classes
            raw.append(self._of_level(prediction.boxes, image, level, self.box_width)[prior])
            chosen.append(level_priors[prior])
            scores.append(score)
            indices.append(index)
        index = torch.cat(indices)
        level = torch.cat([some.new_full(some.shape, level) for level, some in enumerate(indices)])
        stride_px = level.new_tensor([shape.stride_px for shape in prediction.levels.shapes])[level, None]
        # All levels at once: small networks feel every operation.
        boxes = decode_boxes(torch.cat(raw).to(priors[0].dtype), torch.cat(chosen), stride_px)
        return Candidates(
            boxes_xyxy=clip(boxes, size) if self.clips else boxes,
            scores=torch.cat(scores),
            labels=index % self.num_classes,
            level=level,
        )

    def _of_level(self, maps: Sequence[Tensor], image: int, level: int, width: int) -> Float[Tensor, "t {width}"]:
        return per_prior([maps[level][image : image + 1]], width)[0]

    def _best(
        self, logits: Tensor, quality: Tensor | None, dtype: torch.dtype, per_level: int | None, score_threshold: float
    ) -> tuple[Tensor, Tensor]:
        """Scores and flat indices of the best of one level, best first."""
        if self.fusion in ("none", "rescore"):
            # Ranked by the logits: of most the score itself is not needed.
            index = _largest(logits, per_level)
            score = self.activation(logits[index].to(dtype))
            index, score = _over(index, score, score_threshold)
            if quality is None:
                return score, index
            score, order = (score * quality[index // self.num_classes]).sort(descending=True, stable=True)
            return score, index[order]
        assert quality is not None
        fused = (self.activation(logits.to(dtype)).reshape(len(quality), -1) * quality[:, None]).flatten()
        # The root leaves the order as it is; its gradient at 0 does not matter here.
        index = _largest(fused, per_level)
        score = fused[index].sqrt() if self.fusion == "sqrt" else fused[index]
        index, score = _over(index, score, score_threshold)
        return score, index


def _largest(values: Tensor, count: int | None) -> Tensor:
    return values.topk(len(values) if count is None else min(count, len(values))).indices


def _over(index: Tensor, score: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    # What is no number is under every threshold.
    keep = (score >= threshold).nonzero().flatten()
    return index[keep], score[keep]
