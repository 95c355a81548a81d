"""COCO's 80 classes, whose ids have gaps."""

from __future__ import annotations

from collections.abc import Sequence

from rcnn.converters.torchvision import coco_91_classes
from rcnn.records import ClassTable


def coco_80_classes() -> ClassTable:
    """In the order of their ids, 1 to 90."""
    every = coco_91_classes()
    used = [(name, id) for name, id in zip(every.names, every.category_ids, strict=True) if "unused " not in name]
    return ClassTable(names=tuple(name for name, _ in used), category_ids=tuple(id for _, id in used))


def with_coco_ids(names: Sequence[str]) -> ClassTable:
    """The classes of that name; with COCO's ids where they are COCO's 80, in order."""
    coco = coco_80_classes()
    return coco if tuple(names) == coco.names else ClassTable(names=tuple(names))
