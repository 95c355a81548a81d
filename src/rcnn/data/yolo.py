"""YOLO txt: what a data.yaml says, and reading the labels beside the pictures.

data.yaml has `names` (a list, or a mapping from class number to name), `train`, `val`, `test` (a folder of pictures,
a list file, or several of them), and perhaps `path` (what these are relative to) and `nc`. The labels of
.../images/a.jpg are in .../labels/a.txt, or beside the picture: a class number, then centre x, centre y, width and
height as fractions of the picture (an outline of three or more points is read as the box around it). A picture
without a label file has no objects.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from rcnn.data.chosen_classes import ChosenClasses
from rcnn.data.draft import Draft, empty_problem, finish, map_classes, missing_files, read_sizes
from rcnn.data.findings import BadBoxes
from rcnn.data.image import IMAGE_SUFFIXES
from rcnn.data.table import AnnotationTable
from rcnn.errors import DataError, Problem
from rcnn.plain_records import ClassTable

LOOKED_FOR = "YOLO: data.yaml with names and train, val or test"

_SPLITS = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True)
class YoloSplit:
    name: str
    file: Path  # the data.yaml
    places: tuple[str, ...]  # folders and list files, as stated
    content: dict[str, Any]


@dataclass(kw_only=True)
class _Labels:
    """The lines of all label files read so far."""

    image_rows: list[int] = field(default_factory=list)
    classes: list[int] = field(default_factory=list)
    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)  # x1 y1 x2 y2, fractions
    places: list[tuple[Path, int]] = field(default_factory=list)  # file and line
    num_files: int = 0


def find_yolo_splits(path: Path) -> dict[str, YoloSplit]:
    """The splits by name; empty where the path holds no data.yaml. Raises `DataError` for a malformed one."""
    if path.is_file():
        return _splits_of(path) if path.suffix in (".yaml", ".yml") else {}
    for file in sorted([*path.glob("*.yaml"), *path.glob("*.yml")], key=lambda file: (file.stem != "data", file.name)):
        found = _splits_of(file)
        if found:
            return found
    return {}


def _splits_of(file: Path) -> dict[str, YoloSplit]:
    content = _load(file)
    if not isinstance(content, dict) or "names" not in content:
        return {}
    found = {}
    for name in _SPLITS:
        stated = content.get(name) or (content.get("valid") if name == "val" else None)
        places = [stated] if isinstance(stated, str) else stated
        if isinstance(places, list) and places and all(isinstance(place, str) for place in places):
            found[name] = YoloSplit(name=name, file=file, places=tuple(places), content=content)
    return found


def _load(file: Path) -> Any:
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    # What YAML lets pass and Python does not: a day 2001-99-99, lists within lists, a number of thousands of digits.
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or error
        raise DataError(Problem(where=f"{file}{line}", given=f"malformed YAML ({reason})")) from error


def read_yolo(
    split: YoloSplit,
    *,
    classes: ClassTable | None = None,
    chosen: ChosenClasses | None = None,
    bad_boxes: BadBoxes = "mend",
    check_files: bool = True,
) -> AnnotationTable:
    """The annotations of one split. With `classes`, labels are given by class name in that table; with
    `chosen`, which takes its place, the others are not read."""
    problems: list[Problem] = []
    names = _class_names(split, problems)
    pictures = _pictures(split, problems)
    if not pictures and not problems:
        problems.append(empty_problem(split.file))
    labels = _Labels()
    for row, picture in enumerate(pictures):
        _read_labels(_label_file(picture), row, len(names), labels, problems)
    if pictures and not labels.num_files:
        problems.append(_no_labels(split, pictures[0]))
    root = _common_root(pictures)
    file_names = [picture.relative_to(root).as_posix() for picture in pictures]
    if check_files or problems:
        problems += missing_files(root, file_names)
    if problems:
        raise DataError(problems)
    own_labels = np.array(labels.classes, np.int64)
    table_classes = ClassTable(names=names)
    if classes is not None:
        used = np.bincount(own_labels, minlength=len(names)) > 0
        mapped, problems = map_classes(names, used, classes, split.file)
        own_labels, table_classes = mapped[own_labels], classes
    image_rows = np.array(labels.image_rows, np.int64)
    sizes = read_sizes(pictures)
    fractions = np.array(labels.boxes, np.float64).reshape(-1, 4)
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is found below
        boxes = fractions * sizes[image_rows][:, [1, 0, 1, 0]].astype(np.float64)
    draft = Draft(
        root=root,
        format="YOLO",
        split=split.name,
        source=split.file,
        image_ids=np.arange(1, len(pictures) + 1),
        file_names=file_names,
        sizes=sizes,
        image_rows=image_rows,
        boxes_xyxy=boxes,
        stated_xyxy=None,
        labels=own_labels,
        ignored=np.zeros(len(own_labels), bool),
        areas=np.full(len(own_labels), np.nan),
        where=lambda row: f"{labels.places[row][0]}:{labels.places[row][1]}",
    )
    return finish(draft, table_classes, problems, chosen=chosen, bad_boxes=bad_boxes, check_files=False)


def _class_names(split: YoloSplit, problems: list[Problem]) -> tuple[str, ...]:
    stated, where = split.content["names"], f"{split.file}: names"
    if isinstance(stated, dict):
        numbered = all(type(key) is int for key in stated) and sorted(stated) == list(range(len(stated)))
        if not numbered:
            given = f"the class numbers are {', '.join(map(repr, stated))}"
            problems.append(Problem(where=where, given=given, allowed=f"0 to {len(stated) - 1}, each once"))
        stated = [stated[key] for key in (sorted(stated) if numbered else stated)]
    if not isinstance(stated, list) or not stated:
        problems.append(
            Problem(where=where, given=f"{stated!r}", allowed="a list of names, or a mapping of numbers to names")
        )
        return ()
    problems += [
        Problem(where=where, given=f"class {number} is {name!r}", allowed="a text", remedy="put the name in quotes")
        for number, name in enumerate(stated)
        if name is None or isinstance(name, bool | list | dict)  # no and yes are truth values in YAML
    ]
    names = tuple(str(name) for name in stated)
    for name in sorted({name for name in names if names.count(name) > 1}):
        numbers = ", ".join(str(number) for number, other in enumerate(names) if other == name)
        problems.append(
            Problem(where=where, given=f'the name "{name}" belongs to the classes {numbers}', allowed="once")
        )
    stated_count = split.content.get("nc")
    if stated_count is not None and stated_count != len(names):
        given = f"nc is {stated_count!r}, but there are {len(names)} names"
        problems.append(Problem(where=str(split.file), given=given, remedy="delete nc or correct it"))
    return names


def _pictures(split: YoloSplit, problems: list[Problem]) -> list[Path]:
    pictures: dict[Path, None] = {}
    for place in split.places:
        found = _resolve(split, place)
        if found is None:
            bases = ", ".join(str(base) for base in _bases(split))
            given = f'"{place}" is not there (looked in {bases})'
            problems.append(
                Problem(where=f"{split.file}: {split.name}", given=given, remedy="correct path or the entry")
            )
        elif found.is_dir():
            pictures |= dict.fromkeys(_pictures_in(found))
        else:
            pictures |= dict.fromkeys(_listed(found, f"{split.file}: {split.name}", problems))
    return [Path(os.path.abspath(picture)) for picture in pictures]


def _bases(split: YoloSplit) -> list[Path]:
    """What the entries are relative to: `path`, else the folder of the file."""
    folder = split.file.parent
    stated = split.content.get("path")
    return [folder / stated, folder] if isinstance(stated, str) and stated not in ("", ".") else [folder]


def _resolve(split: YoloSplit, place: str) -> Path | None:
    """The folder or list file meant. Roboflow writes ../train/images for train/images, which ultralytics accepts."""
    for base in _bases(split):
        for name in (place, place.removeprefix("../")):
            if os.path.exists(base / name):
                return base / name
    return None


def _pictures_in(folder: Path) -> Iterator[Path]:
    for root, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
                yield Path(root, name)


def _listed(file: Path, named_by: str, problems: list[Problem]) -> Iterator[Path]:
    """The pictures that a list file names; those that begin with ./ (or are relative) are relative to the file."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        given = f"{file} cannot be read as a list of pictures ({error})"
        problems.append(Problem(where=named_by, given=given, allowed="a folder, or a text file in UTF-8"))
        return
    for line in lines:
        if line.strip():
            yield file.parent / line.strip().removeprefix("./")


def _label_file(picture: Path) -> Path:
    """.../images/a.jpg has .../labels/a.txt (the last folder called images), other pictures a.txt beside them."""
    parts = list(picture.parts)
    for index in range(len(parts) - 2, -1, -1):
        if parts[index] == "images":
            parts[index] = "labels"
            beside = picture.with_suffix(".txt")
            mirrored = Path(*parts).with_suffix(".txt")
            return beside if not os.path.exists(mirrored) and os.path.exists(beside) else mirrored
    return picture.with_suffix(".txt")


def _no_labels(split: YoloSplit, picture: Path) -> Problem:
    return Problem(
        where=f"{split.file}: {split.name}",
        given=f"no picture has a label file (the first was looked for at {_label_file(picture)})",
        allowed="labels in a folder labels/ beside images/, or .txt files beside the pictures",
    )


def _read_labels(file: Path, row: int, num_classes: int, labels: _Labels, problems: list[Problem]) -> None:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:  # not UTF-8, or a null in its name
        problems.append(Problem(where=str(file), given=f"the file cannot be read ({error})"))
        return
    labels.num_files += 1
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words:
            continue
        where = f"{file}:{number}"
        values = _numbers(words, where, problems)
        if values is None or not _is_class(values[0], where, num_classes, problems):
            continue
        labels.image_rows.append(row)
        labels.classes.append(int(values[0]))
        labels.boxes.append(_box(values[1:]))
        labels.places.append((file, number))


def _numbers(words: list[str], where: str, problems: list[Problem]) -> list[float] | None:
    if len(words) != 5 and not (len(words) >= 7 and len(words) % 2):
        allowed = "5 (class, centre x, centre y, width, height), or a class and three or more points"
        problems.append(Problem(where=where, given=f"{len(words)} columns", allowed=allowed))
        return None
    try:
        return [float(word) for word in words]
    except ValueError as error:
        problems.append(Problem(where=where, given=f"{error}", allowed="numbers"))
        return None


def _is_class(value: float, where: str, num_classes: int, problems: list[Problem]) -> bool:
    if value in range(num_classes):
        return True
    if num_classes:
        problems.append(Problem(where=where, given=f"the class is {value:g}", allowed=f"0 to {num_classes - 1}"))
    return False


def _box(values: list[float]) -> tuple[float, float, float, float]:
    if len(values) == 4:
        x, y, width, height = values
        return x - width / 2, y - height / 2, x + width / 2, y + height / 2
    return min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])


def _common_root(pictures: list[Path]) -> Path:
    return Path(os.path.commonpath([picture.parent for picture in pictures])) if pictures else Path()
