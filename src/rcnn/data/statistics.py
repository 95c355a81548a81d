"""What a table holds, counted: pictures, boxes per class and size, shapes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rcnn.data.table import AnnotationTable

# COCO's borders between small, medium and large objects, in square pixels of the original picture.
COCO_AREA_BORDERS = (32.0**2, 96.0**2)


@dataclass(frozen=True, kw_only=True)
class ClassCount:
    """One class: its boxes that count, its ignored ones, and the pictures that show it."""

    name: str
    boxes: int
    ignored: int
    pictures: int


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Counts of one split; sizes and sides are in original pixels, quantiles at 0, 25, 50, 75 and 100 percent."""

    pictures: int
    empty_pictures: int  # without a box that counts
    boxes: int
    ignored: int
    small: int
    medium: int
    large: int
    classes: tuple[ClassCount, ...]
    picture_heights: tuple[float, ...]
    picture_widths: tuple[float, ...]
    box_sides: tuple[float, ...]  # square root of width x height
    box_height_over_width: tuple[float, ...]
    boxes_per_picture: tuple[float, ...]


def count(table: AnnotationTable) -> Statistics:
    """Count what is in a table."""
    counts = ~table.ignored
    owners = np.repeat(np.arange(len(table)), np.diff(table.starts))
    per_picture = np.bincount(owners[counts], minlength=len(table))
    sides = table.boxes_xyxy[counts, 2:] - table.boxes_xyxy[counts, :2]
    areas = table.areas[counts]
    small, large = COCO_AREA_BORDERS
    return Statistics(
        pictures=len(table),
        empty_pictures=int((per_picture == 0).sum()),
        boxes=int(counts.sum()),
        ignored=int(table.ignored.sum()),
        small=int((areas < small).sum()),
        medium=int(((areas >= small) & (areas < large)).sum()),
        large=int((areas >= large).sum()),
        classes=_class_counts(table, owners),
        picture_heights=_quantiles(table.sizes[:, 0]),
        picture_widths=_quantiles(table.sizes[:, 1]),
        box_sides=_quantiles(np.sqrt(sides.prod(axis=1))),
        box_height_over_width=_quantiles(sides[:, 1] / sides[:, 0]),
        boxes_per_picture=_quantiles(per_picture),
    )


def _class_counts(table: AnnotationTable, owners: np.ndarray) -> tuple[ClassCount, ...]:
    num_classes = len(table.classes)
    boxes = np.bincount(table.labels[~table.ignored], minlength=num_classes)
    ignored = np.bincount(table.labels[table.ignored], minlength=num_classes)
    shown = np.unique(np.stack([owners, table.labels], axis=1), axis=0)[:, 1]
    pictures = np.bincount(shown, minlength=num_classes)
    return tuple(
        ClassCount(name=name, boxes=int(boxes[label]), ignored=int(ignored[label]), pictures=int(pictures[label]))
        for label, name in enumerate(table.classes.names)
    )


def _quantiles(values: np.ndarray) -> tuple[float, ...]:
    return tuple(np.quantile(values, (0, 0.25, 0.5, 0.75, 1)).tolist()) if len(values) else ()
