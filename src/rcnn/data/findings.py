"""Boxes that cannot be trained on as they are: what was done about each, and where it is.

Letters: M annotations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rcnn.errors import Problem

# "mend": boxes without area or outside their picture are left out, those partly outside are cut to it, and each is
# reported in the findings. "error": each is an error.
BadBoxes = Literal["mend", "error"]

# Sources round: COCO to 0.01 px, YOLO to 1e-6 of the side. A box this little beyond the edge is kept as stated.
ROUNDING_PX = 0.05


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What a reader changed, box by box; empty where the data were used as they are."""

    num_boxes: int = 0  # stated in the source
    left_out: tuple[Problem, ...] = ()
    cut: tuple[Problem, ...] = ()
    of_other_classes: int = 0  # not among `num_boxes`: boxes of classes that were not chosen

    def __bool__(self) -> bool:
        return bool(self.left_out or self.cut or self.of_other_classes)

    def summary(self) -> str:
        """What was done to how many boxes and the first of them, in one line for people; empty where nothing was."""
        parts = []
        if self.of_other_classes:
            parts.append(f"{self.of_other_classes:,} boxes of other classes are not read (data.classes)")
        for changed, done in ((self.left_out, "left out"), (self.cut, "cut to the picture")):
            if changed:
                were, which = ("was", "") if len(changed) == 1 else ("were", "the first: ")
                parts.append(f"{len(changed):,} of {self.num_boxes:,} boxes {were} {done} ({which}{changed[0]})")
        if len(self.left_out) + len(self.cut) > 1:
            parts.append('"rcnn data check" lists them all')
        return "; ".join(parts)


@dataclass(frozen=True, kw_only=True)
class CheckedBoxes:
    """Which rows stay, and the boxes of all rows after cutting."""

    keep: np.ndarray  # bool [M]
    boxes_xyxy: np.ndarray  # float64 [M, 4]
    cut: np.ndarray  # bool [M]
    findings: Findings


def check_boxes(
    boxes_xyxy: np.ndarray, sizes: np.ndarray, where: Callable[[int], str], *, stated_xyxy: np.ndarray | None = None
) -> CheckedBoxes:
    """Judge each box by its picture: `boxes_xyxy` [M, 4] in pixels, `sizes` [M, 2] height and width.

    `where(row)` names the place of a box. `stated_xyxy` are the numbers of the source where they differ (VOC's
    1-based ones): a box is without area if they say so.
    """
    stated = boxes_xyxy if stated_xyxy is None else stated_xyxy
    width, height = sizes[:, 1].astype(np.float64), sizes[:, 0].astype(np.float64)
    limits = np.stack([width, height, width, height], axis=1)
    finite = np.isfinite(boxes_xyxy).all(axis=1)
    has_area = finite & (stated[:, 2:] > stated[:, :2]).all(axis=1)
    beyond = np.maximum(-boxes_xyxy, boxes_xyxy - limits).max(axis=1, initial=-np.inf)
    clipped = np.clip(boxes_xyxy, 0, limits)
    inside = np.logical_and(has_area, (clipped[:, 2:] > clipped[:, :2]).all(axis=1))
    cut = inside & (beyond > ROUNDING_PX)
    findings = Findings(
        num_boxes=len(boxes_xyxy),
        left_out=tuple(
            _problem(where(row), stated[row], _reason(stated[row], sizes[row]))
            for row in np.flatnonzero(~inside).tolist()
        ),
        cut=tuple(
            _problem(where(row), stated[row], f"reaches out of {_size_text(sizes[row])}")
            for row in np.flatnonzero(cut).tolist()
        ),
    )
    boxes = np.where(cut[:, None], clipped, boxes_xyxy)
    return CheckedBoxes(keep=inside, boxes_xyxy=boxes, cut=cut, findings=findings)


def _problem(where: str, box: np.ndarray, reason: str) -> Problem:
    text = ", ".join(f"{value:.6g}" for value in box)
    return Problem(where=where, given=f"the box x1, y1, x2, y2 = {text} {reason}", remedy="correct or delete it")


def _size_text(size: np.ndarray) -> str:
    return f"the picture of {size[1]} x {size[0]} pixels (width x height)"


def _reason(box: np.ndarray, size: np.ndarray) -> str:
    if not np.isfinite(box).all():
        return "has a coordinate that is no finite number"
    if (box[2:] < box[:2]).any():
        return "is reversed (x2 < x1 or y2 < y1)"
    if (box[2:] == box[:2]).any():
        return "has zero width or height"
    return f"lies outside {_size_text(size)}"
