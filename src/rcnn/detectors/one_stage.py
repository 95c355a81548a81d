"""One-stage detectors: any dense head of K classes on a pyramid, its candidates filtered to detections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rcnn.backbones.interface import AbstractBackbone
from rcnn.boxes.filtering import DetectionFilter
from rcnn.boxes.geometry import clip
from rcnn.dense.interface import AbstractDenseHead, Candidates, DensePrediction
from rcnn.detectors.pyramid import AbstractPyramidDetector, refuse_misfit
from rcnn.necks.interface import AbstractNeck
from rcnn.records import Detections, ImageBatch, Losses, Size, Target
from rcnn.transforms.batching import ImageNormalizer


class OneStageDetector(AbstractPyramidDetector):
    """Backbone and neck give a pyramid, a dense head classes and boxes on it: the same heads as in a first stage.

    The best `pre_nms` candidates of each level (None: all) that score at least `score_threshold` are decoded and
    filtered. The threshold is of the score that the head ranks by: a head that multiplies in a quality only afterwards
    gives lower scores too, and the filter's own threshold, 0 by default, lets them pass as MMDetection does.
    """

    def __init__(
        self,
        *,
        normalizer: ImageNormalizer,
        backbone: AbstractBackbone,
        neck: AbstractNeck,
        head: AbstractDenseHead,
        detection_filter: DetectionFilter | None = None,
        pre_nms: int | None = 1000,
        score_threshold: float = 0.05,
    ) -> None:
        super().__init__(normalizer=normalizer, backbone=backbone, neck=neck)
        refuse_misfit(head, neck)
        self.head = head
        self.detection_filter = detection_filter or DetectionFilter(score_threshold=0.0)
        self.pre_nms = pre_nms
        self.score_threshold = score_threshold

    def loss(self, batch: ImageBatch, targets: Sequence[Target]) -> Losses:
        return self.head.loss(self.head(self.features(batch)), targets)

    def predict(self, batch: ImageBatch) -> list[Detections]:
        return self.detect(self.head(self.features(batch)))

    def detect(self, prediction: DensePrediction) -> list[Detections]:
        """Detections per picture from the head's raw maps."""
        candidates = self.head.decode(prediction, per_level=self.pre_nms, score_threshold=self.score_threshold)
        return [
            self._filtered(of_image, size)
            for of_image, size in zip(candidates, prediction.levels.image_sizes, strict=True)
        ]

    def _filtered(self, candidates: Candidates, size: Size) -> Detections:
        found = self.detection_filter(candidates.boxes_xyxy, candidates.scores, candidates.labels)
        # Most heads gave boxes inside already; one that has NMS see whole boxes did not.
        return replace(found, boxes_xyxy=clip(found.boxes_xyxy, size))
