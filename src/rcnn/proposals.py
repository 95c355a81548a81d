"""The first stage: any dense head of one class, its candidates filtered to class-agnostic proposals; or proposals
that were given.

Letters: N images, P candidates, R proposals.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from rcnn.boxes.geometry import has_min_side
from rcnn.dense.interface import AbstractDenseHead, Candidates, DensePrediction
from rcnn.errors import Problem, SetupError
from rcnn.ops.nms import best_kept, nms
from rcnn.records import Levels, Losses, Proposals, Target

# "level": boxes of different levels do not suppress each other (torchvision, detectron2, MMDetection's RPNHead);
# "joint": they do (MMDetection's other heads); "level_then_joint": the best `post_nms` of "level" go through "joint",
# and what leaves there is not replaced (MindSpore).
NMSScope = Literal["level", "joint", "level_then_joint"]
# The frame in which a proposal's sides are measured: network-input or original pixels (simple-faster-rcnn).
SideFrame = Literal["network", "original"]
# When small boxes leave: after the best `pre_nms` were chosen, so that they take places among them (torchvision,
# MMDetection, detectron2), or before (simple-faster-rcnn).
SideTest = Literal["after_pre_nms", "before_pre_nms"]


@dataclass(frozen=True, kw_only=True)
class ProposalFilter:
    """From candidates to at most `post_nms` proposals.

    The best `pre_nms` of each level, clipped; those with a side under `min_side_px` (or that is not a number) and those
    with a score under `score_threshold` left out; NMS at `nms_iou`; the best `post_nms` of all, ties in level order.

    The head itself applies the threshold, to the score that it ranks by. MMDetection's dense heads as RPN: scope
    "joint" (their NMS is per class, and there is one), its RPNHead and torchvision: "level".
    """

    pre_nms: int
    post_nms: int
    nms_iou: float = 0.7
    scope: NMSScope = "level"
    min_side_px: float = 1e-3
    side_frame: SideFrame = "network"
    score_threshold: float = 0.0
    side_test: SideTest = "after_pre_nms"

    @property
    def candidates_per_level(self) -> int | None:
        """How many candidates of each level it asks the head for; None: all."""
        return self.pre_nms if self.side_test == "after_pre_nms" else None

    def __call__(self, candidates: Candidates, *, num_levels: int, image_scale: float) -> Proposals:
        """`image_scale`: network-input pixels per original pixel."""
        scale = image_scale if self.side_frame == "original" else 1.0
        chosen = has_min_side(candidates.boxes_xyxy, self.min_side_px * scale)
        if self.side_test == "before_pre_nms":
            chosen = chosen & self._among_best(candidates, chosen, num_levels)
        chosen = chosen.nonzero().flatten()
        boxes, scores, level = candidates.boxes_xyxy[chosen], candidates.scores[chosen], candidates.level[chosen]

        def suppress(best: Tensor) -> Tensor:
            if self.scope == "joint":
                return best[nms(boxes[best], scores[best], self.nms_iou)]
            return best[self._per_level(boxes[best], scores[best], level[best], num_levels)]

        keep = best_kept(suppress, scores, self.post_nms)
        if self.scope == "level_then_joint":
            keep = keep[nms(boxes[keep], scores[keep], self.nms_iou)]
        return Proposals(boxes_xyxy=boxes[keep], scores=scores[keep])

    def _among_best(self, candidates: Candidates, large: Tensor, num_levels: int) -> Tensor:
        """Which are among the `pre_nms` best large ones of their level."""
        best = torch.zeros_like(large)
        for number in range(num_levels):
            mine = (large & (candidates.level == number)).nonzero().flatten()
            order = candidates.scores[mine].argsort(descending=True, stable=True)
            best[mine[order[: self.pre_nms]]] = True
        return best

    def _per_level(self, boxes: Tensor, scores: Tensor, level: Tensor, num_levels: int) -> Tensor:
        """Which stay, in their order."""
        # One call per level is exact where an offset per level would round coordinates; the number of levels is fixed.
        kept = torch.zeros_like(level, dtype=torch.bool)
        for number in range(num_levels):
            mine = (level == number).nonzero().flatten()
            kept[mine[nms(boxes[mine], scores[mine], self.nms_iou)]] = True
        return kept.nonzero().flatten()


class AbstractProposalStage(nn.Module, ABC):
    """From a pyramid to proposals per picture, best first, in network-input pixels.

    `given` are the proposals that came with the batch, if any did.
    """

    @abstractmethod
    def loss(
        self, levels: Levels, targets: Sequence[Target], given: Sequence[Proposals] | None = None
    ) -> tuple[Losses, list[Proposals]]:
        """The terms of the first stage, and the proposals that the second stage trains on."""

    @abstractmethod
    def propose(self, levels: Levels, given: Sequence[Proposals] | None = None) -> list[Proposals]:
        """The proposals that the second stage predicts on."""


class ProposalStage(AbstractProposalStage):
    """A dense head as the first stage: the only place that knows "class-agnostic".

    The head has one class; labels are mapped to it, boxes detached from the graph, loss terms prefixed with `rpn_`.
    """

    def __init__(self, *, head: AbstractDenseHead, train_filter: ProposalFilter, test_filter: ProposalFilter) -> None:
        super().__init__()
        if head.num_classes != 1:
            raise SetupError(
                Problem(
                    where="proposals.head",
                    given=f"a head of {head.num_classes} classes",
                    allowed="a head of one class: proposals have no class",
                )
            )
        self.head = head
        self.train_filter = train_filter
        self.test_filter = test_filter

    def loss(
        self, levels: Levels, targets: Sequence[Target], given: Sequence[Proposals] | None = None
    ) -> tuple[Losses, list[Proposals]]:
        _refuse(given)
        prediction = self.head(levels)
        agnostic = [
            Target(
                boxes_xyxy=target.boxes_xyxy,
                labels=torch.zeros_like(target.labels),
                ignore_xyxy=target.ignore_xyxy,
            )
            for target in targets
        ]
        losses = {f"rpn_{name}": value for name, value in self.head.loss(prediction, agnostic).items()}
        return losses, self.select(prediction, self.train_filter)

    def propose(self, levels: Levels, given: Sequence[Proposals] | None = None) -> list[Proposals]:
        _refuse(given)
        return self.select(self.head(levels), self.test_filter)

    @torch.no_grad()
    def select(self, prediction: DensePrediction, chosen: ProposalFilter) -> list[Proposals]:
        """Proposals per picture from the head's raw maps."""
        candidates = self.head.decode(
            prediction, per_level=chosen.candidates_per_level, score_threshold=chosen.score_threshold
        )
        levels = prediction.levels
        return [
            chosen(found, num_levels=len(levels.shapes), image_scale=scale)
            for found, scale in zip(candidates, levels.image_scales, strict=True)
        ]


def _refuse(given: Sequence[Proposals] | None) -> None:
    if given is not None:
        raise SetupError(
            Problem(
                where="detector.proposals",
                given="a first stage of its own, and proposals that came with the pictures",
                allowed="one or the other",
                remedy="a Fast R-CNN, which has no first stage, or data without proposals",
            )
        )


class GivenProposals(AbstractProposalStage):
    """Fast R-CNN's first stage: the proposals that came with the batch, the best `train_limit` or `test_limit` of each
    picture (None: all). It has no parameters and no loss.
    """

    def __init__(self, *, train_limit: int | None = None, test_limit: int | None = None) -> None:
        super().__init__()
        self.train_limit = train_limit
        self.test_limit = test_limit

    def loss(
        self, levels: Levels, targets: Sequence[Target], given: Sequence[Proposals] | None = None
    ) -> tuple[Losses, list[Proposals]]:
        return {}, self._take(levels, given, self.train_limit)

    def propose(self, levels: Levels, given: Sequence[Proposals] | None = None) -> list[Proposals]:
        return self._take(levels, given, self.test_limit)

    def _take(self, levels: Levels, given: Sequence[Proposals] | None, limit: int | None) -> list[Proposals]:
        """Raises `SetupError` where the batch has none, or not one entry for each picture."""
        num_images = len(levels.image_sizes)
        if given is None or len(given) != num_images:
            count = "no proposals" if given is None else f"proposals for {len(given)}"
            raise SetupError(
                Problem(
                    where="detector.proposals",
                    given=f"{num_images} pictures and {count}",
                    allowed="proposals for each picture: this detector makes none of its own",
                    remedy="a proposal file (rcnn proposals dump writes one)",
                )
            )
        # A detector in float64 has its proposals in float64, and none has them in half precision.
        like = levels.maps[0]
        dtype = torch.promote_types(like.dtype, torch.float32)
        return [
            Proposals(
                boxes_xyxy=some.boxes_xyxy[:limit].to(like.device, dtype),
                scores=None if some.scores is None else some.scores[:limit].to(like.device, dtype),
            )
            for some in given
        ]
