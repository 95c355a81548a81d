"""The proposals of a one-stage detector: its candidates of all classes as if they had none."""

from __future__ import annotations

from rcnn.detectors.one_stage import OneStageDetector
from rcnn.proposals import ProposalFilter
from rcnn.records import ImageBatch, Proposals


class OneStageProposer:
    """What a one-stage detector would propose: the union over its classes, one box for boxes that overlap.

    A cell gives a candidate for each class, so that a box may come several times with other scores; NMS, which looks at
    no class here, keeps the best. The detector's own filter and score threshold take no part: a second stage wants more
    boxes, and worse ones, than a detector shows.
    """

    def __init__(self, detector: OneStageDetector, *, proposal_filter: ProposalFilter) -> None:
        self.detector = detector
        self.proposal_filter = proposal_filter

    def __call__(self, batch: ImageBatch) -> list[Proposals]:
        """Proposals per picture, best first, in network-input pixels."""
        chosen, head = self.proposal_filter, self.detector.head
        prediction = head(self.detector.features(batch))
        candidates = head.decode(
            prediction, per_level=chosen.candidates_per_level, score_threshold=chosen.score_threshold
        )
        levels = prediction.levels
        return [
            chosen(found, num_levels=len(levels.shapes), image_scale=scale)
            for found, scale in zip(candidates, levels.image_scales, strict=True)
        ]
