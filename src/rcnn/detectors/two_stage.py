"""Faster R-CNN and its family: features, proposals, regions.

Letters: N images, L levels.
"""

from __future__ import annotations

from collections.abc import Sequence

from rcnn.backbones.interface import AbstractBackbone
from rcnn.detectors.pyramid import AbstractPyramidDetector, refuse_misfit
from rcnn.necks.interface import AbstractNeck
from rcnn.proposals import AbstractProposalStage, ProposalStage
from rcnn.records import Detections, ImageBatch, Losses, Proposals, Target
from rcnn.roi.interface import AbstractRoIStage
from rcnn.transforms.batching import ImageNormalizer


class TwoStageDetector(AbstractPyramidDetector):
    """Backbone and neck give a pyramid, the first stage proposals on it, the second stage their classes and boxes.

    With `GivenProposals` as the first stage it is Fast R-CNN: the proposals come with the batch.
    """

    def __init__(
        self,
        *,
        normalizer: ImageNormalizer,
        backbone: AbstractBackbone,
        neck: AbstractNeck,
        proposals: AbstractProposalStage,
        roi: AbstractRoIStage,
    ) -> None:
        super().__init__(normalizer=normalizer, backbone=backbone, neck=neck)
        if isinstance(proposals, ProposalStage):
            refuse_misfit(proposals.head, neck)
        self.proposals = proposals
        self.roi = roi

    def loss(self, batch: ImageBatch, targets: Sequence[Target]) -> Losses:
        levels = self.features(batch)
        losses, proposals = self.proposals.loss(levels, targets, batch.proposals)
        return losses | self.roi.loss(levels, proposals, targets)

    def predict(self, batch: ImageBatch) -> list[Detections]:
        levels = self.features(batch)
        return self.roi.predict(levels, self.proposals.propose(levels, batch.proposals))

    def propose(self, batch: ImageBatch) -> list[Proposals]:
        """The first stage alone: proposals per picture in network-input pixels."""
        return self.proposals.propose(self.features(batch), batch.proposals)
