"""Detections of many pictures as flat arrays: what evaluation reads and prediction writes.

Letter: D detections over all pictures.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # importing torch takes half a gigabyte, which evaluation does not need
    from rcnn.records import Detections


@dataclass(frozen=True, kw_only=True)
class DetectionTable:
    """Boxes are x1 y1 x2 y2 in original pixels; `labels` 0..K-1; `image_ids` as in the annotation table."""

    image_ids: np.ndarray  # int64 [D]
    boxes_xyxy: np.ndarray  # float64 [D, 4]
    scores: np.ndarray  # float64 [D]
    labels: np.ndarray  # int64 [D]

    def __len__(self) -> int:
        return len(self.scores)

    @classmethod
    def from_detections(cls, pairs: Iterable[tuple[int, Detections]]) -> DetectionTable:
        """`pairs`: image id and the detections of that picture, in original pixels."""
        pairs = [(image_id, found) for image_id, found in pairs if len(found)]
        if not pairs:
            return cls(
                image_ids=np.zeros(0, np.int64),
                boxes_xyxy=np.zeros((0, 4)),
                scores=np.zeros(0),
                labels=np.zeros(0, np.int64),
            )
        return cls(
            image_ids=np.concatenate([np.full(len(found), image_id, np.int64) for image_id, found in pairs]),
            boxes_xyxy=np.concatenate([found.boxes_xyxy.double().cpu().numpy() for _, found in pairs]),
            scores=np.concatenate([found.scores.double().cpu().numpy() for _, found in pairs]),
            labels=np.concatenate([found.labels.cpu().numpy() for _, found in pairs]),
        )
