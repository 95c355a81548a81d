"""A folder of annotated pictures: which format it is in, what splits it has, and reading one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rcnn.data import coco, voc, yolo
from rcnn.data.chosen_classes import ChosenClasses
from rcnn.data.coco import CocoSplit, find_coco_splits, read_coco
from rcnn.data.findings import BadBoxes
from rcnn.data.table import AnnotationTable
from rcnn.data.voc import VocSplit, find_voc_splits, read_voc
from rcnn.data.yolo import YoloSplit, find_yolo_splits, read_yolo
from rcnn.errors import DataError, Problem, nearest
from rcnn.plain_records import ClassTable

Format = Literal["coco", "voc", "yolo"]

# What people and tools call the same split.
_ALIASES = {"val": ("valid", "validation"), "valid": ("val", "validation"), "validation": ("val", "valid")}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A recognised folder: its format and its splits."""

    path: Path
    format: Format
    splits: dict[str, CocoSplit | VocSplit | YoloSplit]


def find_layout(path: Path | str, *, format: Format | None = None) -> Layout:
    """Recognise the format of a folder, a COCO json or a YOLO data.yaml. Raises `DataError` for none or several."""
    path = Path(path)
    if not path.exists():
        hint = nearest(path.name, [entry.name for entry in path.parent.iterdir()]) if path.parent.is_dir() else ""
        raise DataError(Problem(where=str(path), given="there is no such folder", remedy=hint or "check the path"))
    found: dict[Format, dict[str, CocoSplit | VocSplit | YoloSplit]] = {
        "coco": dict(find_coco_splits(path)),
        "voc": dict(find_voc_splits(path)),
        "yolo": dict(find_yolo_splits(path)),
    }
    layouts = [
        Layout(path=path, format=name, splits=splits)
        for name, splits in found.items()
        if splits and format in (None, name)
    ]
    if not layouts:
        raise DataError(_unrecognised(path))
    if len(layouts) > 1:
        names = " and ".join(layout.format.upper() for layout in layouts)
        raise DataError(
            Problem(
                where=str(path),
                given=f"annotations in several formats: {names}",
                allowed="one format, or a choice of one",
                remedy='say which one is meant (format="coco", "voc" or "yolo"), or name its json or yaml file',
            )
        )
    return layouts[0]


def _unrecognised(path: Path) -> Problem:
    entries = sorted(path.iterdir()) if path.is_dir() else [path]
    names = [f"{entry.name}/" if entry.is_dir() else entry.name for entry in entries]
    shown = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    return Problem(
        where=str(path),
        given=f"no annotations in a known format; found: {shown or 'an empty folder'}",
        allowed="; ".join((coco.LOOKED_FOR, voc.LOOKED_FOR, yolo.LOOKED_FOR)),
        remedy="check the path, or convert the annotations to one of these",
    )


def splits(path: Path | str, *, format: Format | None = None) -> tuple[str, ...]:
    """The names of the splits of a data set."""
    return tuple(find_layout(path, format=format).splits)


def read_dataset(
    path: Path | str,
    *,
    split: str | None = None,
    classes: ClassTable | None = None,
    only: Sequence[str] | None = None,
    bad_boxes: BadBoxes = "mend",
    format: Format | None = None,
    check_files: bool = True,
) -> AnnotationTable:
    """One split of the data set at `path`, whatever its format; `table.findings` says what was left out or cut.

    With `classes` (of a checkpoint, or of the training split) labels are given by class name in that table. `only`:
    these classes alone are read, in this order where there is no `classes`; boxes of others are left out. `split`
    may be left out where there is only one; "val" also finds "valid" and "val2017". `check_files=False` skips the
    look whether every picture is there. Raises `DataError` with all mistakes at once.
    """
    layout = find_layout(path, format=format)
    found = layout.splits[resolve_split(layout, split)]
    chosen = None if only is None else ChosenClasses(names=tuple(only), table=classes)
    given = classes if only is None else None
    match found:
        case CocoSplit():
            return read_coco(found, classes=given, chosen=chosen, bad_boxes=bad_boxes, check_files=check_files)
        case VocSplit():
            return read_voc(found, classes=given, chosen=chosen, bad_boxes=bad_boxes, check_files=check_files)
        case YoloSplit():
            return read_yolo(found, classes=given, chosen=chosen, bad_boxes=bad_boxes, check_files=check_files)


def resolve_split(layout: Layout, name: str | None) -> str:
    """The split of that name or of a usual variant of it. Raises `DataError` that names the splits there are."""
    known = list(layout.splits)
    if name is None and len(known) == 1:
        return known[0]
    if name in known:
        return name
    for wanted in (name, *_ALIASES.get(name, ())) if name is not None else ():
        found = [other for other in known if re.fullmatch(rf"{re.escape(wanted)}[-_]?(\d{{4}})?", other)]
        if len(found) == 1:
            return found[0]
    given = "several splits, and none was chosen" if name is None else f'there is no split "{name}"'
    remedy = nearest(name, known) if name is not None else ""
    raise DataError(
        Problem(where=str(layout.path), given=given, allowed=", ".join(known), remedy=remedy or "choose one of them")
    )


def describe(table: AnnotationTable) -> str:
    """One line for people: what was recognised and how much there is."""
    num_ignored = int(table.ignored.sum())
    ignored = f" ({num_ignored:,} of them ignored)" if num_ignored else ""
    return (
        f'{table.format}, split "{table.split}": {len(table):,} pictures, {len(table.labels):,} boxes{ignored}, '
        f"{len(table.classes)} classes in {table.root}"
    )
