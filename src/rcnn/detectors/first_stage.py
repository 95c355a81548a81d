"""A first stage alone: to train proposals for others, and to measure them."""

from __future__ import annotations

from collections.abc import Sequence

from rcnn.backbones.interface import AbstractBackbone
from rcnn.detectors.pyramid import AbstractPyramidDetector, refuse_misfit
from rcnn.necks.interface import AbstractNeck
from rcnn.proposals import ProposalStage
from rcnn.records import Detections, ImageBatch, Losses, Proposals, Target
from rcnn.transforms.batching import ImageNormalizer


class ProposalDetector(AbstractPyramidDetector):
    """Backbone, neck and first stage. What it finds has no class: as detections, all have label 0."""

    def __init__(
        self, *, normalizer: ImageNormalizer, backbone: AbstractBackbone, neck: AbstractNeck, proposals: ProposalStage
    ) -> None:
        super().__init__(normalizer=normalizer, backbone=backbone, neck=neck)
        refuse_misfit(proposals.head, neck)
        self.proposals = proposals

    def loss(self, batch: ImageBatch, targets: Sequence[Target]) -> Losses:
        return self.proposals.loss(self.features(batch), targets)[0]

    def propose(self, batch: ImageBatch) -> list[Proposals]:
        return self.proposals.propose(self.features(batch))

    def predict(self, batch: ImageBatch) -> list[Detections]:
        return [_as_detections(found) for found in self.propose(batch)]


def _as_detections(found: Proposals) -> Detections:
    assert found.scores is not None, "a dense head gives scores"
    labels = found.scores.new_zeros(len(found.scores), dtype=found.scores.long().dtype)
    return Detections(boxes_xyxy=found.boxes_xyxy, scores=found.scores, labels=labels)
