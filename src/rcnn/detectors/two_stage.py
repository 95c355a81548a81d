"""Faster R-CNN and its family: features, proposals, regions.

Letters: N images, L levels.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from rcnn.backbones.interface import AbstractBackbone
from rcnn.detectors.interface import AbstractDetector
from rcnn.necks.interface import AbstractNeck
from rcnn.proposals import ProposalStage
from rcnn.records import Detections, ImageBatch, Levels, LevelShape, Losses, Proposals, Target
from rcnn.roi.stage import RoIStage
from rcnn.transforms.batching import ImageNormalizer


class TwoStageDetector(AbstractDetector):
    """Backbone and neck give a pyramid, the first stage proposals on it, the second stage their classes and boxes."""

    def __init__(
        self,
        *,
        normalizer: ImageNormalizer,
        backbone: AbstractBackbone,
        neck: AbstractNeck,
        proposals: ProposalStage,
        roi: RoIStage,
    ) -> None:
        super().__init__()
        self.normalizer = normalizer
        self.backbone: nn.Module = backbone
        self.neck: nn.Module = neck
        self.proposals = proposals
        self.roi = roi
        self.strides_px = neck.strides_px
        self.num_roi_levels = neck.num_roi_levels

    def loss(self, batch: ImageBatch, targets: Sequence[Target]) -> Losses:
        levels = self.features(batch)
        losses, proposals = self.proposals.loss(levels, targets)
        return losses | self.roi.loss(levels, proposals, targets)

    def predict(self, batch: ImageBatch) -> list[Detections]:
        levels = self.features(batch)
        return self.roi.predict(levels, self.proposals.propose(levels))

    def propose(self, batch: ImageBatch) -> list[Proposals]:
        """The first stage alone: proposals per picture in network-input pixels."""
        return self.proposals.propose(self.features(batch))

    def features(self, batch: ImageBatch) -> Levels:
        """The pyramid of a batch."""
        return self.levels(self.neck(self.backbone(self.normalizer(batch))), batch)

    def levels(self, maps: Sequence[Tensor], batch: ImageBatch) -> Levels:
        """The neck's maps of a batch with their geometry."""
        return Levels(
            maps=tuple(maps),
            shapes=tuple(
                LevelShape(height=x.shape[-2], width=x.shape[-1], stride_px=stride)
                for x, stride in zip(maps, self.strides_px, strict=True)
            ),
            padded_size=batch.padded_size,
            image_sizes=batch.sizes,
            image_scales=tuple(
                size.width / original.width for size, original in zip(batch.sizes, batch.original_sizes, strict=True)
            ),
            num_roi_levels=self.num_roi_levels,
        )
