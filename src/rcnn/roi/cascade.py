"""Cascade R-CNN (Cai and Vasconcelos, 2018): each stage starts from the boxes that the last one moved.

Letters: R regions of a batch, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from rcnn.errors import Problem, SetupError
from rcnn.records import Detections, Levels, Losses, Proposals, Target
from rcnn.roi.fusion import fuse
from rcnn.roi.interface import AbstractRoIStage
from rcnn.roi.regions import SampledRegions
from rcnn.roi.stage import RoIStage

# What is averaged over the stages for the final score: probabilities (detectron2, CenterNet2), or the logits before
# the softmax (MMDetection).
ScoreAverage = Literal["probabilities", "logits"]


class CascadeStage(AbstractRoIStage):
    """A chain of stages, each with its own matcher, coder, box head and predictor.

    In training a stage is given the boxes of the last one's regions as it moved them; the ground truth that had joined
    them leaves where the next stage lets it join anew. In prediction all regions pass all stages; the scores are
    averaged, the boxes are the last stage's, and so are the detection filter and the fusion. `loss_weights` weigh the
    stages' terms (MMDetection: 1, 0.5, 0.25); `gradient_share` is what reaches the pyramid of each stage's gradient
    (detectron2: a third, with all weights 1).
    """

    def __init__(
        self,
        *,
        stages: Sequence[RoIStage],
        loss_weights: Sequence[float] = (1.0, 0.5, 0.25),
        average: ScoreAverage = "probabilities",
        gradient_share: float = 1.0,
    ) -> None:
        super().__init__()
        _check(stages, loss_weights)
        self.num_classes = stages[-1].num_classes
        self.stages = nn.ModuleList(stages)
        self.loss_weights = tuple(loss_weights)
        self.average: ScoreAverage = average
        self.gradient_share = gradient_share

    @property
    def chain(self) -> list[RoIStage]:
        """The stages, first to last."""
        return [cast(RoIStage, stage) for stage in self.stages]

    def loss(self, levels: Levels, proposals: Sequence[Proposals], targets: Sequence[Target]) -> Losses:
        if self.gradient_share != 1.0:
            levels = replace(levels, maps=tuple(_ScaledGradient.apply(x, self.gradient_share) for x in levels.maps))
        losses: Losses = {}
        for index, (stage, weight) in enumerate(zip(self.chain, self.loss_weights, strict=True)):
            regions = stage.draw(levels, proposals, targets)
            logits, deltas = stage(levels, [some.boxes_xyxy for some in regions])
            terms = stage.losses(logits, deltas, regions)
            losses |= {f"roi{index + 1}_{name}": weight * value for name, value in terms.items()}
            if index + 1 < len(self.stages):
                joined_anew = self.chain[index + 1].join_truth
                proposals = _refined(stage, logits, deltas, regions, levels, without_truth=joined_anew)
        return losses

    def predict(self, levels: Levels, proposals: Sequence[Proposals]) -> list[Detections]:
        *earlier, last = self.chain
        boxes = [found.boxes_xyxy for found in proposals]
        all_logits = []
        for stage in earlier:
            logits, deltas = stage(levels, boxes)
            all_logits.append(logits)
            boxes = stage.refine(logits, deltas, boxes, levels.image_sizes)
        logits, deltas = last(levels, boxes)
        scores = self.mean_scores([each.to(boxes[0].dtype) for each in (*all_logits, logits)])
        scores = fuse(scores, [found.scores for found in proposals], last.fusion)
        return last.detect_scored(scores, deltas, boxes, levels.image_sizes)

    def mean_scores(self, logits: Sequence[Tensor]) -> Tensor:
        """Scores [R, K] of regions from their logits in each stage."""
        if self.average == "logits":
            return self.chain[-1].classification.scores(torch.stack(list(logits)).mean(dim=0))
        scores = [stage.classification.scores(each) for stage, each in zip(self.chain, logits, strict=True)]
        return torch.stack(scores).mean(dim=0)


def _refined(
    stage: RoIStage,
    logits: Tensor,
    deltas: Tensor,
    regions: Sequence[SampledRegions],
    levels: Levels,
    *,
    without_truth: bool,
) -> list[Proposals]:
    labels = torch.cat([some.labels for some in regions])
    boxes = stage.refine(logits, deltas, [some.boxes_xyxy for some in regions], levels.image_sizes, labels)
    if without_truth:
        boxes = [moved[~some.is_truth] for moved, some in zip(boxes, regions, strict=True)]
    return [Proposals(boxes_xyxy=moved, scores=None) for moved in boxes]


class _ScaledGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None


def _check(stages: Sequence[RoIStage], loss_weights: Sequence[float]) -> None:
    """Raise `SetupError` with all that does not fit."""
    problems = []
    if not stages:
        problems.append(Problem(where="detector.roi.stages", given="no stage", allowed="at least one"))
    if len(loss_weights) != len(stages):
        given = f"{len(loss_weights)} weights for {len(stages)} stages"
        problems.append(Problem(where="detector.roi.loss_weights", given=given, allowed="one for each stage"))
    if len({stage.num_classes for stage in stages}) > 1:
        given = f"stages of {', '.join(str(stage.num_classes) for stage in stages)} classes"
        problems.append(Problem(where="detector.roi.stages", given=given, allowed="the same classes in all stages"))
    if problems:
        raise SetupError(problems)
