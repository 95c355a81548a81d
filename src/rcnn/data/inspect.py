"""Find what would spoil a training before it starts: every mistake in annotations and pictures, all at once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from rcnn.data.findings import BadBoxes
from rcnn.data.folder import Format, find_layout, read_dataset, resolve_split
from rcnn.data.image import is_turned_by_exif, read_image, read_image_size
from rcnn.data.table import AnnotationTable
from rcnn.errors import DataError, ImageError, Problem

# Called with the number of pictures looked at and of all pictures.
Progress = Callable[[int, int], None]


@dataclass(kw_only=True)
class Inspection:
    """What was found. `errors` stop a training; `warnings` are what a person should know."""

    errors: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    tables: list[AnnotationTable] = field(default_factory=list)  # the splits that could be read
    num_pictures: int = 0  # looked at


def inspect_dataset(
    path: Path | str,
    *,
    split: str | None = None,
    format: Format | None = None,
    bad_boxes: BadBoxes = "mend",
    decode: bool = False,
    progress: Progress = lambda done, total: None,
) -> Inspection:
    """Read every split (or one) and the head of every picture; with `decode` every picture whole.

    Raises `DataError` only where the path is no data set at all or has no such split.
    """
    layout = find_layout(path, format=format)
    names = list(layout.splits) if split is None else [resolve_split(layout, split)]
    result = Inspection()
    for name in names:
        try:
            table = read_dataset(path, split=name, format=layout.format, bad_boxes=bad_boxes)
        except (DataError, ImageError) as error:
            result.errors += _new(error.problems, result.errors)
            continue
        result.tables.append(table)
        result.warnings += _new((*table.findings.left_out, *table.findings.cut), result.warnings)
        result.warnings += _new(_repeated_boxes(table), result.warnings)
    _look_at_pictures(result, decode, progress)
    result.warnings += _classes_without_boxes(result.tables)
    return result


def _new(problems: Iterable[Problem], known: Sequence[Problem]) -> list[Problem]:
    """Those not yet reported: splits such as trainval repeat what train has."""
    seen = set(known)
    return [problem for problem in problems if problem not in seen]


def _repeated_boxes(table: AnnotationTable) -> Iterator[Problem]:
    owners = np.repeat(np.arange(len(table)), np.diff(table.starts))
    rows = np.column_stack([owners, table.labels, table.boxes_xyxy])
    values, counts = np.unique(rows, axis=0, return_counts=True)
    for value, times in zip(values[counts > 1], counts[counts > 1].tolist(), strict=True):
        box = ", ".join(f"{side:.6g}" for side in value[2:])
        yield Problem(
            where=str(table.path(int(value[0]))),
            given=f'{times} equal boxes of "{table.classes.names[int(value[1])]}" (x1, y1, x2, y2 = {box})',
            remedy="keep one of them",
        )


@dataclass(frozen=True, kw_only=True)
class _Look:
    error: Problem | None = None
    turned: bool = False
    digest: bytes = b""


def _look_at_pictures(result: Inspection, decode: bool, progress: Progress) -> None:
    first_places: dict[Path, tuple[AnnotationTable, int]] = {}
    for table in result.tables:
        for index in range(len(table)):
            first_places.setdefault(table.path(index), (table, index))
    looks: dict[Path, _Look] = {}
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda place: _look(*place, decode=decode), first_places.values())
        for path, look in zip(first_places, found, strict=True):
            looks[path] = look
            progress(len(looks), len(first_places))
    result.num_pictures = len(looks)
    result.errors += [look.error for look in looks.values() if look.error is not None]
    result.warnings += [
        Problem(
            where=str(path),
            given="an EXIF orientation turns the picture; its stated size is that of the turned one",
            remedy="see that its boxes were drawn on what a viewer shows",
        )
        for path, look in looks.items()
        if look.turned and look.error is None
    ]
    result.warnings += _shared_pictures(result.tables, looks)


def _look(table: AnnotationTable, index: int, *, decode: bool) -> _Look:
    path = table.path(index)
    try:
        table.check_size(index, read_image_size(path))
        if decode:
            read_image(path)
        digest = hashlib.sha1(path.read_bytes(), usedforsecurity=False).digest() if decode else b""
        return _Look(turned=is_turned_by_exif(path), digest=digest)
    except (ImageError, DataError) as error:
        return _Look(error=error.problems[0])


def _shared_pictures(tables: Sequence[AnnotationTable], looks: dict[Path, _Look]) -> Iterator[Problem]:
    """Pictures that training and evaluation share, by content where it was read: the evaluation would flatter."""

    def key(path: Path) -> bytes | Path:
        return looks[path].digest or path.resolve()

    training = [table for table in tables if _is_training(table)]
    trained = {key(table.path(index)): table.path(index) for table in training for index in range(len(table))}
    for table in tables:
        if _is_training(table) or _holds_training(table):
            continue
        for index in range(len(table)):
            path = table.path(index)
            if key(path) in trained:
                given = f'the picture of split "{table.split}" is also trained on ({trained[key(path)]})'
                yield Problem(where=str(path), given=given, remedy="take it out of one of the splits")


def _is_training(table: AnnotationTable) -> bool:
    return table.split.rpartition("/")[2].startswith("train") and not _holds_training(table)


def _holds_training(table: AnnotationTable) -> bool:
    """VOC's trainval is train and val together."""
    return table.split.rpartition("/")[2] in ("trainval", "all")


def _classes_without_boxes(tables: Sequence[AnnotationTable]) -> list[Problem]:
    """Classes without a box in training (or, without such a split, anywhere)."""
    training = [table for table in tables if _is_training(table)] or list(tables)
    if not training:
        return []
    used = {table.classes.names[label] for table in training for label in np.unique(table.labels[~table.ignored])}
    split = training[0].split
    return [
        Problem(where=f'split "{split}"', given=f'the class "{name}" has no box', remedy="nothing can be learned of it")
        for name in training[0].classes.names
        if name not in used
    ]
