"""From deltas to boxes: those of the detections, and those that a cascade goes on from.

Letters: R regions, K classes, B = K or 1 boxes per region.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rcnn.boxes.coding import DeltaCoder
from rcnn.boxes.filtering import DetectionFilter
from rcnn.boxes.geometry import clip
from rcnn.records import Detections, Size

# When the boxes of detections are cut to the picture.
ClipOrder = Literal["before_nms", "after_nms"]


def deltas_of(
    deltas: Float[Tensor, "r b 4"], regions: Int[Tensor, " s"], labels: Int[Tensor, " s"]
) -> Float[Tensor, "s 4"]:
    """The deltas of some regions: of each one's label, or the only ones there are."""
    return deltas[regions, labels if deltas.shape[1] > 1 else torch.zeros_like(labels)]


def find_detections(
    scores: Float[Tensor, "r k"],
    deltas: Float[Tensor, "r b 4"],
    references_xyxy: Float[Tensor, "r 4"],
    size: Size,
    *,
    coder: DeltaCoder,
    detection_filter: DetectionFilter,
    clip_order: ClipOrder = "before_nms",
) -> Detections:
    """The detections of one picture; a region can be one for each of its classes."""
    index = (scores > detection_filter.score_threshold).flatten().nonzero().flatten()
    region, label = index // scores.shape[1], index % scores.shape[1]
    boxes = coder.decode(deltas_of(deltas, region, label), references_xyxy[region])
    if clip_order == "before_nms":
        return detection_filter(clip(boxes, size), scores.flatten()[index], label)
    found = detection_filter(boxes, scores.flatten()[index], label)
    return replace(found, boxes_xyxy=clip(found.boxes_xyxy, size))


@torch.no_grad()
def moved_boxes(
    deltas: Float[Tensor, "r b 4"],
    labels: Int[Tensor, " r"],
    boxes_xyxy: Sequence[Float[Tensor, "_ 4"]],
    image_sizes: Sequence[Size],
    *,
    coder: DeltaCoder,
) -> list[Float[Tensor, "_ 4"]]:
    """The regions of each picture, each moved by its own deltas and clipped."""
    references = torch.cat(list(boxes_xyxy))
    every = torch.arange(len(references), device=references.device)
    moved = coder.decode(deltas_of(deltas, every, labels).to(references.dtype), references)
    parts = moved.split([len(of_image) for of_image in boxes_xyxy])
    return [clip(some, size) for some, size in zip(parts, image_sizes, strict=True)]
