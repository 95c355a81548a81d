"""What a reader has found in the files, before it is judged; `finish` judges it and makes the table.

Letters: N images, M annotations.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from rcnn.data.chosen_classes import ChosenClasses
from rcnn.data.findings import BadBoxes, CheckedBoxes, check_boxes
from rcnn.data.image import read_image_size
from rcnn.data.table import AnnotationTable, PackedStrings
from rcnn.errors import DataError, ImageError, Problem, nearest
from rcnn.plain_records import ClassTable


@dataclass(frozen=True, kw_only=True)
class Draft:
    """Annotations as stated. The rows of an image need not lie together; `areas` are NaN where none is stated."""

    root: Path
    format: str
    split: str
    source: Path  # the file or folder that the annotations come from, for messages
    image_ids: np.ndarray  # int64 [N]
    file_names: Sequence[str]  # relative to root
    sizes: np.ndarray  # int32 [N, 2], 0 where not stated
    image_rows: np.ndarray  # int64 [M], 0..N-1
    boxes_xyxy: np.ndarray  # float64 [M, 4]
    stated_xyxy: np.ndarray | None  # the numbers of the source, where they differ
    labels: np.ndarray  # int64 [M]
    ignored: np.ndarray  # bool [M]
    areas: np.ndarray  # float64 [M]
    where: Callable[[int], str]  # the place of an annotation, for messages
    looked_in: tuple[Path, ...] = ()  # folders where the pictures might have been


def finish(
    draft: Draft,
    classes: ClassTable,
    problems: Iterable[Problem],
    *,
    chosen: ChosenClasses | None,
    bad_boxes: BadBoxes,
    check_files: bool = True,
) -> AnnotationTable:
    """The table, or a `DataError` with all of `problems` and all that is wrong with files and boxes.

    With `chosen`, boxes of all other classes are left out before they are judged; `classes` are then the data's own.
    """
    problems = list(problems)
    if check_files:
        problems += missing_files(draft.root, draft.file_names, looked_in=draft.looked_in)
    if not len(draft.image_ids) and not problems:
        problems.append(empty_problem(draft.source))
    if problems:
        raise DataError(problems)
    sizes = stated_or_read_sizes(draft)
    num_boxes = len(draft.labels)
    if chosen is not None:
        classes, labels = chosen.among(classes, draft.source)
        draft = _relabelled(draft, labels[draft.labels])
    checked = check_boxes(draft.boxes_xyxy, sizes[draft.image_rows], draft.where, stated_xyxy=draft.stated_xyxy)
    if checked.findings and bad_boxes == "error":
        raise DataError(checked.findings.left_out + checked.findings.cut)
    findings = replace(checked.findings, of_other_classes=num_boxes - len(draft.labels))
    return _table(draft, classes, sizes, replace(checked, findings=findings))


def _relabelled(draft: Draft, labels: np.ndarray) -> Draft:
    """The annotations under other labels [M], without those whose label is -1."""
    rows = np.flatnonzero(labels >= 0)
    return replace(
        draft,
        image_rows=draft.image_rows[rows],
        boxes_xyxy=draft.boxes_xyxy[rows],
        stated_xyxy=None if draft.stated_xyxy is None else draft.stated_xyxy[rows],
        labels=labels[rows],
        ignored=draft.ignored[rows],
        areas=draft.areas[rows],
        where=lambda row: draft.where(int(rows[row])),
    )


def _table(draft: Draft, classes: ClassTable, sizes: np.ndarray, checked: CheckedBoxes) -> AnnotationTable:
    kept = np.flatnonzero(checked.keep)
    rows = kept[np.argsort(draft.image_rows[kept], kind="stable")]
    starts = np.zeros(len(draft.image_ids) + 1, np.int64)
    np.cumsum(np.bincount(draft.image_rows[rows], minlength=len(draft.image_ids)), out=starts[1:])
    boxes = checked.boxes_xyxy[rows]
    own_areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    stated_areas = draft.areas[rows]
    return AnnotationTable(
        classes=classes,
        root=draft.root,
        format=draft.format,
        split=draft.split,
        image_ids=draft.image_ids,
        file_names=PackedStrings.pack(draft.file_names),
        sizes=sizes,
        starts=starts,
        boxes_xyxy=boxes,
        labels=draft.labels[rows],
        ignored=draft.ignored[rows],
        areas=np.where(np.isfinite(stated_areas), stated_areas, own_areas),
        findings=checked.findings,
    )


def empty_problem(source: Path) -> Problem:
    return Problem(where=str(source), given="there is no picture in it", remedy="check the folder and the split")


def missing_files(root: Path, file_names: Sequence[str], *, looked_in: Sequence[Path] = ()) -> list[Problem]:
    """A problem for each file that is not there, or one where none of many is: then it is the folder that is wrong.

    Each folder is listed once: a network disk is slow per file.
    """
    listings: dict[str, frozenset[str]] = {}
    problems = []
    for name in file_names:
        folder, _, base = name.rpartition("/")
        if folder not in listings:
            listings[folder] = _names_in(root / folder)
        if base not in listings[folder]:
            hint = nearest(base, tuple(listings[folder])) if len(problems) < DataError.shown else ""
            problems.append(
                Problem(
                    where=str(root / name), given="the picture is missing", remedy=hint or "restore it or its folder"
                )
            )
    if len(problems) == len(file_names) > DataError.shown:
        places = ", ".join(str(folder) for folder in looked_in or [root])
        given = f"none of the {len(file_names):,} pictures is there (the first: {file_names[0]})"
        return [Problem(where=str(root), given=given, allowed=f"pictures in one of {places}", remedy="move them there")]
    return problems


def _names_in(folder: Path) -> frozenset[str]:
    try:
        with os.scandir(folder) as entries:
            return frozenset(entry.name for entry in entries)
    except (OSError, ValueError):  # not there, or a name that no folder can have
        return frozenset()


def stated_or_read_sizes(draft: Draft) -> np.ndarray:
    """Height and width of each picture [N, 2]: as stated, else from the head of its file (EXIF applied)."""
    unknown = np.flatnonzero((draft.sizes <= 0).any(axis=1)).tolist()
    if not unknown:
        return draft.sizes
    sizes = draft.sizes.copy()
    sizes[unknown] = read_sizes([draft.root / draft.file_names[index] for index in unknown])
    return sizes


def read_sizes(paths: Sequence[Path]) -> np.ndarray:
    """Height and width [N, 2], int32. Raises one `ImageError` with every file that cannot be read."""
    problems: list[Problem] = []

    def size_of(path: Path) -> tuple[int, int]:
        try:
            return read_image_size(path)
        except ImageError as error:
            problems.extend(error.problems)
            return (0, 0)

    with ThreadPoolExecutor(8) as pool:
        sizes = list(pool.map(size_of, paths))
    if problems:
        raise ImageError(sorted(problems, key=lambda problem: problem.where))
    return np.array(sizes, np.int32).reshape(-1, 2)


def map_classes(
    own_names: Sequence[str], used: np.ndarray, classes: ClassTable, source: Path
) -> tuple[np.ndarray, list[Problem]]:
    """Labels of a file's own classes in a given class table, by name: [K] (-1 where there is none).

    `used` [K] says which of them have annotations: one that is only listed does no harm.
    """
    place = {name: label for label, name in enumerate(classes.names)}
    labels = np.array([place.get(name, -1) for name in own_names], np.int64)
    problems = [
        unknown_class(str(source), name, classes)
        for name, label, is_used in zip(own_names, labels, used, strict=True)
        if label < 0 and is_used
    ]
    return labels, problems


def unknown_class(where: str, name: str, classes: ClassTable) -> Problem:
    shown = ", ".join(classes.names[:20]) + (", ..." if len(classes.names) > 20 else "")
    return Problem(
        where=where,
        given=f'the class "{name}" is not one that the checkpoint or training split knows',
        allowed=shown,
        remedy=nearest(name, classes.names) or "rename it, or train with data that have it",
    )
