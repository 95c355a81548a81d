"""Areas, overlaps and limits of boxes. Boxes are x1 y1 x2 y2 in continuous pixels; letters: A and B boxes."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rcnn.records import Size


def area(boxes_xyxy: Float[Tensor, "a 4"]) -> Float[Tensor, " a"]:
    """Width times height."""
    return (boxes_xyxy[:, 2] - boxes_xyxy[:, 0]) * (boxes_xyxy[:, 3] - boxes_xyxy[:, 1])


def clip(boxes_xyxy: Float[Tensor, "*lead 4"], size: Size) -> Float[Tensor, "*lead 4"]:
    """The part of each box inside a picture: x in 0..width, y in 0..height."""
    x = boxes_xyxy[..., 0::2].clamp(min=0, max=size.width)
    y = boxes_xyxy[..., 1::2].clamp(min=0, max=size.height)
    return torch.stack((x, y), dim=-1).flatten(-2)


def intersection(a_xyxy: Float[Tensor, "a 4"], b_xyxy: Float[Tensor, "b 4"]) -> Float[Tensor, "a b"]:
    """The shared area of each pair."""
    # One coordinate at a time: half the memory of the [A, B, 2] form, and the anchors of one picture are many.
    width = torch.minimum(a_xyxy[:, None, 2], b_xyxy[None, :, 2]) - torch.maximum(
        a_xyxy[:, None, 0], b_xyxy[None, :, 0]
    )
    height = torch.minimum(a_xyxy[:, None, 3], b_xyxy[None, :, 3]) - torch.maximum(
        a_xyxy[:, None, 1], b_xyxy[None, :, 1]
    )
    return width.clamp_(min=0).mul_(height.clamp_(min=0))


def iou(a_xyxy: Float[Tensor, "a 4"], b_xyxy: Float[Tensor, "b 4"]) -> Float[Tensor, "a b"]:
    """Intersection over union of each pair; NaN between two boxes without area, as torchvision has it."""
    shared = intersection(a_xyxy, b_xyxy)
    return shared / (area(a_xyxy)[:, None] + area(b_xyxy)[None, :] - shared)


def giou(a_xyxy: Float[Tensor, "a 4"], b_xyxy: Float[Tensor, "b 4"]) -> Float[Tensor, "a b"]:
    """Generalised IoU of each pair (Rezatofighi et al., 2019): IoU less the empty share of the enclosing box."""
    shared = intersection(a_xyxy, b_xyxy)
    union = area(a_xyxy)[:, None] + area(b_xyxy)[None, :] - shared
    width = torch.maximum(a_xyxy[:, None, 2], b_xyxy[None, :, 2]) - torch.minimum(
        a_xyxy[:, None, 0], b_xyxy[None, :, 0]
    )
    height = torch.maximum(a_xyxy[:, None, 3], b_xyxy[None, :, 3]) - torch.minimum(
        a_xyxy[:, None, 1], b_xyxy[None, :, 1]
    )
    enclosing = width * height
    return shared / union - (enclosing - union) / enclosing


def paired_iou(a_xyxy: Float[Tensor, "a 4"], b_xyxy: Float[Tensor, "a 4"], *, eps: float = 0.0) -> Float[Tensor, " a"]:
    """Intersection over union of each box with the one at its place; unions count as at least `eps`."""
    shared = _paired_intersection(a_xyxy, b_xyxy)
    return shared / (area(a_xyxy) + area(b_xyxy) - shared).clamp(min=eps)


def paired_giou(a_xyxy: Float[Tensor, "a 4"], b_xyxy: Float[Tensor, "a 4"], *, eps: float = 0.0) -> Float[Tensor, " a"]:
    """Generalised IoU of each box with the one at its place; areas that are divided by count as at least `eps`."""
    shared = _paired_intersection(a_xyxy, b_xyxy)
    union = (area(a_xyxy) + area(b_xyxy) - shared).clamp(min=eps)
    low = torch.minimum(a_xyxy[:, :2], b_xyxy[:, :2])
    high = torch.maximum(a_xyxy[:, 2:], b_xyxy[:, 2:])
    width, height = (high - low).unbind(1)
    enclosing = (width * height).clamp(min=eps)
    return shared / union - (enclosing - union) / enclosing


def _paired_intersection(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    low = torch.maximum(a_xyxy[:, :2], b_xyxy[:, :2])
    high = torch.minimum(a_xyxy[:, 2:], b_xyxy[:, 2:])
    width, height = (high - low).clamp(min=0).unbind(1)
    return width * height


def overlap_share(boxes_xyxy: Float[Tensor, "a 4"], regions_xyxy: Float[Tensor, "b 4"]) -> Float[Tensor, "a b"]:
    """The share of each box's area that lies in each region; 0 for a box without area."""
    return intersection(boxes_xyxy, regions_xyxy) / area(boxes_xyxy)[:, None].clamp(min=1e-9)


def has_min_side(boxes_xyxy: Float[Tensor, "a 4"], min_side_px: float) -> Bool[Tensor, " a"]:
    """Which boxes have both sides at least `min_side_px`."""
    return (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2] >= min_side_px).all(1)


def centres(boxes_xyxy: Float[Tensor, "a 4"]) -> Float[Tensor, "a 2"]:
    """The middle of each box."""
    return (boxes_xyxy[:, :2] + boxes_xyxy[:, 2:]) / 2


def lies_inside(
    points_xy: Float[Tensor, "a 2"], boxes_xyxy: Float[Tensor, "gt 4"], *, by_px: float = 0.0
) -> Bool[Tensor, "a gt"]:
    """Which points lie in which boxes, further than `by_px` from every side."""
    x, y = points_xy[:, 0, None], points_xy[:, 1, None]
    x1, y1, x2, y2 = boxes_xyxy.unbind(1)
    return (x - x1 > by_px) & (y - y1 > by_px) & (x2 - x > by_px) & (y2 - y > by_px)


# Whether a box that ends exactly at the right or lower limit counts as inside: it does in simple-faster-rcnn, not in
# MMDetection.
FarEnds = Literal["included", "excluded"]


def is_inside(
    boxes_xyxy: Float[Tensor, "a 4"], size: Size, border_px: float, *, far_ends: FarEnds = "included"
) -> Bool[Tensor, " a"]:
    """Which boxes reach at most `border_px` over the edge of the picture."""
    x1, y1, x2, y2 = boxes_xyxy.unbind(-1)
    right, bottom = size.width + border_px, size.height + border_px
    ends = (x2 <= right) & (y2 <= bottom) if far_ends == "included" else (x2 < right) & (y2 < bottom)
    return (x1 >= -border_px) & (y1 >= -border_px) & ends
