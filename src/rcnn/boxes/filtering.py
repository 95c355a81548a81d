"""From scored boxes of one picture to its detections. Letter: P scored boxes."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from rcnn.boxes.geometry import has_min_side
from rcnn.ops.nms import class_offset_nms
from rcnn.records import Detections


@dataclass(frozen=True, kw_only=True)
class DetectionFilter:
    """Scores above the threshold, sides of at least `min_side_px`, NMS per class, the best `max_detections`.

    The giver leaves out scores at or below `score_threshold` before it decodes boxes: most are, and decoding costs.
    """

    score_threshold: float = 0.05
    nms_iou: float = 0.5
    max_detections: int | None = 100
    min_side_px: float = 1e-2

    def __call__(
        self, boxes_xyxy: Float[Tensor, "p 4"], scores: Float[Tensor, " p"], labels: Int[Tensor, " p"]
    ) -> Detections:
        large = has_min_side(boxes_xyxy, self.min_side_px) & (scores > self.score_threshold)
        boxes, scores, labels = boxes_xyxy[large], scores[large], labels[large]
        keep = class_offset_nms(boxes, scores, labels, self.nms_iou)[: self.max_detections]
        return Detections(boxes_xyxy=boxes[keep], scores=scores[keep], labels=labels[keep])
