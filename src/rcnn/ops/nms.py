"""Non-maximum suppression: greedy, best score first, on boxes of one group or of several at once."""

from __future__ import annotations

import torch
import torchvision
from jaxtyping import Float, Int
from torch import Tensor


def nms(
    boxes_xyxy: Float[Tensor, "boxes 4"], scores: Float[Tensor, " boxes"], iou_threshold: float
) -> Int[Tensor, " kept"]:
    """Indices of the boxes kept, best first: none overlaps a better kept one by more than `iou_threshold` (IoU).

    Equal scores keep their order. torchvision's operator, quadratic in the number of boxes: call it per level, rather
    than once with offsets, where there are thousands. Half precisions go through float32, which holds them exactly.
    """
    dtype = torch.promote_types(torch.promote_types(boxes_xyxy.dtype, scores.dtype), torch.float32)
    return torchvision.ops.nms(boxes_xyxy.to(dtype), scores.to(dtype), iou_threshold)


def class_offset_nms(
    boxes_xyxy: Float[Tensor, "boxes 4"],
    scores: Float[Tensor, " boxes"],
    groups: Int[Tensor, " boxes"],
    iou_threshold: float,
) -> Int[Tensor, " kept"]:
    """`nms` within each group (a class, a level): boxes of different groups never suppress each other.

    One pass over all groups without a branch on the data, so that it can be exported: group g is moved by g times the
    extent of all boxes. In float64 and by whole pixels, so that moving a float32 box does not round it (torchvision
    moves in float32, and a box of class 90 then loses seven bits).
    """
    boxes = boxes_xyxy.double()
    with_origin = torch.cat([boxes, boxes.new_zeros(1, 4)])  # amax and amin need an element
    step = (with_origin.amax() - with_origin.amin()).ceil() + 1.0
    return torchvision.ops.nms(boxes + (groups * step)[:, None], scores.double(), iou_threshold)
