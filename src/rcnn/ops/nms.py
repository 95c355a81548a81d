"""Non-maximum suppression: greedy, best score first, on boxes of one group or of several at once.

Letters: G groups, M boxes of the largest group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

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


def best_kept(
    suppress: Callable[[Int[Tensor, " best"]], Int[Tensor, " kept"]], scores: Float[Tensor, " boxes"], limit: int | None
) -> Int[Tensor, " kept"]:
    """Indices of the best `limit` boxes that are kept (None: all), best first; equal scores in their order.

    `suppress` gets the indices of some boxes, best first, and returns those it keeps, in that order. Whether NMS keeps
    a box hangs on better ones alone: so it is asked about the best few first, and about more only while too few are
    kept. It is quadratic in what it is asked about, and a detector gives it thousands to keep a hundred of.
    """
    order = scores.argsort(descending=True, stable=True)
    # An export has one path for all pictures.
    if limit is None or torch.compiler.is_exporting():
        return suppress(order)[:limit]
    asked = _FIRST_ASKED * limit
    while True:
        kept = suppress(order[:asked])
        if len(kept) >= limit or asked >= len(order):
            return kept[:limit]
        asked *= _THEN_ASKED


# Of the boxes that are wanted: so many are asked about first, and then so many times more.
_FIRST_ASKED, _THEN_ASKED = 2, 4


# How soft NMS lowers the score of a box that overlaps a kept one by `iou`: "linear", times 1 - iou from the threshold
# up; "gaussian", times exp(-iou^2 / sigma), always.
Decay = Literal["linear", "gaussian"]


def soft_nms(
    boxes_xyxy: Float[Tensor, "boxes 4"],
    scores: Float[Tensor, " boxes"],
    groups: Int[Tensor, " boxes"],
    *,
    decay: Decay,
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    min_score: float = 1e-3,
) -> tuple[Int[Tensor, " kept"], Float[Tensor, " kept"]]:
    """Indices and lowered scores of the boxes that keep at least `min_score`, best first (Bodla et al., 2017).

    In turn the best box of each group lowers the scores of its group's others, as often as the largest group has boxes;
    all groups at once. Equal final scores keep their order.
    """
    dtype = torch.promote_types(torch.promote_types(boxes_xyxy.dtype, scores.dtype), torch.float32)
    row, column, shape = _places(groups)
    boxes = boxes_xyxy.new_zeros((*shape, 4), dtype=dtype).index_put((row, column), boxes_xyxy.to(dtype))
    # Empty places are under any `min_score`, and so are those whose turn has been and scores that are no numbers.
    start = torch.where(scores >= min_score, scores, -1.0).to(dtype)
    waiting = scores.new_full(shape, -1.0, dtype=dtype).index_put((row, column), start)
    final = torch.full_like(waiting, -1.0)
    areas = (boxes[..., 2:] - boxes[..., :2]).prod(dim=-1)
    rows = torch.arange(shape[0], device=boxes.device)
    for _ in range(shape[1]):
        best, place = waiting.max(dim=1)
        alive = best >= min_score
        if not bool(alive.any()):
            break
        # Where a group has none left, what has the largest of the low numbers keeps what it was given before.
        final[rows, place] = torch.where(alive, best, final[rows, place])
        waiting[rows, place] = -1.0
        overlap = _iou_by_row(boxes[rows, place], areas[rows, place], boxes, areas)
        weight = (
            torch.exp(-(overlap**2) / sigma)
            if decay == "gaussian"
            else torch.where(overlap >= iou_threshold, 1 - overlap, 1.0)
        )
        waiting = torch.where(waiting < 0, waiting, waiting * weight)
    of_box = final[row, column].to(scores.dtype)
    kept = (final[row, column] >= min_score).nonzero().flatten()
    kept = kept[of_box[kept].argsort(descending=True, stable=True)]
    return kept, of_box[kept]


def _places(groups: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """A row for each group and a column for each of its boxes, in their order; and the size of that table."""
    found, row, counts = groups.unique(return_inverse=True, return_counts=True)
    order = row.argsort(stable=True)
    first = counts.cumsum(0) - counts
    column = torch.empty_like(row)
    column[order] = torch.arange(len(row), device=row.device) - first[row[order]]
    return row, column, (len(found), int(counts.max()) if len(row) else 0)


def _iou_by_row(
    one_xyxy: Float[Tensor, "g 4"], area: Float[Tensor, " g"], boxes_xyxy: Float[Tensor, "g m 4"], areas: Tensor
) -> Float[Tensor, "g m"]:
    """One box of each group with all of it; 0 between boxes without area."""
    one = one_xyxy[:, None]
    low, high = torch.maximum(one[..., :2], boxes_xyxy[..., :2]), torch.minimum(one[..., 2:], boxes_xyxy[..., 2:])
    width, height = (high - low).clamp_(min=0).unbind(dim=-1)
    shared = width * height
    # Without area nothing is shared, and the smallest number keeps the division from being one of zeros.
    return shared / (area[:, None] + areas - shared).clamp(min=torch.finfo(shared.dtype).tiny)
