"""From scored boxes of one picture to its detections. Letter: P scored boxes."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from rcnn.boxes.geometry import has_min_side
from rcnn.ops.nms import Decay, best_kept, class_offset_nms, soft_nms
from rcnn.records import Detections


@dataclass(frozen=True, kw_only=True)
class SoftNMS:
    """Scores of overlapping boxes are lowered rather than boxes dropped; those under `min_score` leave.

    The paper's and MMDetection's numbers are the defaults. `sigma` is of the gaussian decay; the linear one begins at
    the filter's `nms_iou`.
    """

    decay: Decay = "linear"
    sigma: float = 0.5
    min_score: float = 1e-3


@dataclass(frozen=True, kw_only=True)
class DetectionFilter:
    """Scores above the threshold, sides of at least `min_side_px`, NMS per class, the best `max_detections`.

    NMS drops what overlaps a better one by more than `nms_iou`; `soft_nms` takes its place. The giver leaves out scores
    at or below `score_threshold` before it decodes boxes: most are, and decoding costs.
    """

    score_threshold: float = 0.05
    nms_iou: float = 0.5
    max_detections: int | None = 100
    min_side_px: float = 1e-2
    soft_nms: SoftNMS | None = None

    def __call__(
        self, boxes_xyxy: Float[Tensor, "p 4"], scores: Float[Tensor, " p"], labels: Int[Tensor, " p"]
    ) -> Detections:
        large = (has_min_side(boxes_xyxy, self.min_side_px) & (scores > self.score_threshold)).nonzero().flatten()
        boxes, scores, labels = boxes_xyxy[large], scores[large], labels[large]
        keep, scores = self._suppress(boxes, scores, labels)
        return Detections(boxes_xyxy=boxes[keep], scores=scores, labels=labels[keep])

    def _suppress(self, boxes: Tensor, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The indices and scores of the best that stay, best first."""
        soft = self.soft_nms
        if soft is None:

            def suppress(best: Tensor) -> Tensor:
                return best[class_offset_nms(boxes[best], scores[best], labels[best], self.nms_iou)]

            keep = best_kept(suppress, scores, self.max_detections)
            return keep, scores[keep]
        keep, scores = soft_nms(
            boxes,
            scores,
            labels,
            decay=soft.decay,
            iou_threshold=self.nms_iou,
            sigma=soft.sigma,
            min_score=soft.min_score,
        )
        return keep[: self.max_detections], scores[: self.max_detections]
