"""VOC XML: where its splits lie in a folder, and reading them.

Layouts: Annotations/, JPEGImages/ and ImageSets/Main/SPLIT.txt (VOC's own, also inside VOCdevkit/VOC2007), the same
without ImageSets (one split, "all"), and XML files beside the pictures, in the folder or in SPLIT/ (labelImg,
Roboflow).

VOC counts pixels from 1 and includes the last one: a box x1..x2 becomes x1 - 1 to x2 in continuous coordinates (as
detectron2 reads it: 1 is subtracted from xmin and ymin only). `difficult` objects are ignored ground truth. Classes
are in the order of their names, over all splits.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from rcnn.data.chosen_classes import ChosenClasses
from rcnn.data.draft import Draft, empty_problem, finish, unknown_class
from rcnn.data.findings import BadBoxes
from rcnn.data.image import IMAGE_SUFFIXES
from rcnn.data.table import AnnotationTable
from rcnn.errors import DataError, Problem, nearest
from rcnn.plain_records import ClassTable

LOOKED_FOR = "VOC: Annotations/*.xml with JPEGImages/ and ImageSets/Main/SPLIT.txt, or XML files beside pictures"

_SIDES = ("xmin", "ymin", "xmax", "ymax")


@dataclass(frozen=True, kw_only=True)
class VocSplit:
    name: str
    root: Path
    annotations: Path  # folder of the XML files
    images: Path
    list_file: Path | None  # the names of the split, one a line; None where it is every XML file of the folder


@dataclass(kw_only=True)
class _Objects:
    """The objects of all XML files read so far, row by row."""

    image_rows: list[int] = field(default_factory=list)
    boxes: list[list[float]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    difficult: list[bool] = field(default_factory=list)
    places: list[tuple[str, int]] = field(default_factory=list)  # stem of the file, number of the object


def find_voc_splits(path: Path) -> dict[str, VocSplit]:
    """The splits by name; empty where the path is no VOC folder. Those of several years are named VOC2007/train."""
    if not path.is_dir():
        return {}
    if (path / "VOCdevkit").is_dir():
        path = path / "VOCdevkit"
    if (path / "Annotations").is_dir():
        return _named(_standard_splits(path))
    years = [folder for folder in sorted(path.iterdir()) if (folder / "Annotations").is_dir()]
    if years:
        return {
            (name if len(years) == 1 else f"{year.name}/{name}"): split
            for year in years
            for name, split in _named(_standard_splits(year)).items()
        }
    folders = [path, *sorted(folder for folder in path.iterdir() if folder.is_dir())]
    beside = [folder for folder in folders if next(folder.glob("*.xml"), None) is not None]
    return _named(
        VocSplit(
            name="all" if folder == path else folder.name, root=path, annotations=folder, images=folder, list_file=None
        )
        for folder in beside
    )


def _named(splits: Iterable[VocSplit]) -> dict[str, VocSplit]:
    return {split.name: split for split in splits}


def _standard_splits(root: Path) -> list[VocSplit]:
    images = next((root / name for name in ("JPEGImages", "images", "Images") if (root / name).is_dir()), root)
    lists = [file for file in sorted((root / "ImageSets" / "Main").glob("*.txt")) if _is_split(file)]
    annotations = root / "Annotations"
    if not lists:
        return [VocSplit(name="all", root=root, annotations=annotations, images=images, list_file=None)]
    return [
        VocSplit(name=file.stem, root=root, annotations=annotations, images=images, list_file=file) for file in lists
    ]


def _is_split(file: Path) -> bool:
    """VOC's lists for one class (aeroplane_train.txt) have a second column."""
    with file.open(encoding="utf-8", errors="replace") as lines:
        return len(next(lines, "").split()) <= 1


def read_voc(
    split: VocSplit,
    *,
    classes: ClassTable | None = None,
    chosen: ChosenClasses | None = None,
    bad_boxes: BadBoxes = "mend",
    check_files: bool = True,
) -> AnnotationTable:
    """The annotations of one split. With `classes`, labels are given by class name in that table; with
    `chosen`, which takes its place, the others are not read."""
    problems: list[Problem] = []
    stems = _stems(split, problems)
    if not stems and not problems:
        problems.append(empty_problem(split.list_file or split.annotations))
    pictures = _pictures_by_stem(split.images)
    objects, file_names = _Objects(), []
    sizes = np.zeros((len(stems), 2), np.int32)
    for row, (stem, where) in enumerate(stems):
        document = _parse(split.annotations / f"{stem}.xml", where, problems)
        if document is None:
            continue
        sizes[row] = _size(document)
        file_names.append(_picture(split, stem, document, pictures, problems))
        _read_objects(split, stem, row, document, objects, problems)
    labels, table_classes = _labels(split, objects, classes, problems)
    if problems:
        raise DataError(problems)
    stated = np.array(objects.boxes, np.float64).reshape(-1, 4)
    draft = Draft(
        root=split.root,
        format="VOC",
        split=split.name,
        source=split.list_file or split.annotations,
        image_ids=_image_ids([stem for stem, _ in stems]),
        file_names=file_names,
        sizes=sizes,
        image_rows=np.array(objects.image_rows, np.int64),
        boxes_xyxy=stated - np.array([1.0, 1.0, 0.0, 0.0]),
        stated_xyxy=stated,
        labels=labels,
        ignored=np.array(objects.difficult, bool),
        areas=np.full(len(stated), np.nan),
        where=lambda row: _place(split, *objects.places[row]),
    )
    return finish(draft, table_classes, problems, chosen=chosen, bad_boxes=bad_boxes, check_files=check_files)


def _place(split: VocSplit, stem: str, number: int) -> str:
    return f"{split.annotations / f'{stem}.xml'}: object {number}"


def _stems(split: VocSplit, problems: list[Problem]) -> list[tuple[str, str]]:
    """The names of the split's files without their endings, and where each is named."""
    if split.list_file is None:
        return [(file.stem, str(file)) for file in sorted(split.annotations.glob("*.xml"))]
    stems: dict[str, str] = {}
    try:
        lines = split.list_file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        problems.append(Problem(where=str(split.list_file), given=f"the file cannot be read ({error})"))
        return []
    for number, line in enumerate(lines, start=1):
        words, where = line.split(), f"{split.list_file}:{number}"
        if not words:
            continue
        if len(words) > 1:
            problems.append(Problem(where=where, given=f"{len(words)} columns", allowed="one name on a line"))
        elif words[0] in stems:
            problems.append(
                Problem(where=where, given=f'"{words[0]}" is listed twice', remedy="delete one of the lines")
            )
        else:
            stems[words[0]] = where
    return list(stems.items())


def _pictures_by_stem(folder: Path) -> dict[str, list[str]]:
    pictures: dict[str, list[str]] = {}
    for name in sorted(os.listdir(folder)):
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in IMAGE_SUFFIXES:
            pictures.setdefault(stem, []).append(name)
    return pictures


def _picture(
    split: VocSplit,
    stem: str,
    document: ElementTree.Element,
    pictures: dict[str, list[str]],
    problems: list[Problem],
) -> str:
    """The picture of an XML file relative to the root: the one of the same name, else the one that it names."""
    stated = (document.findtext("filename") or "").strip().replace("\\", "/").rpartition("/")[2]
    found = pictures.get(stem, [])
    name = found[0] if found else ""
    if stated in found or (not found and stated in pictures.get(os.path.splitext(stated)[0], [])):
        name = stated
    elif len(found) > 1:
        where = str(split.annotations / f"{stem}.xml")
        problems.append(
            Problem(where=where, given=f"several pictures fit: {', '.join(found)}", remedy="keep one of them")
        )
    if not name:
        problems.append(
            Problem(
                where=str(split.images / (stated or f"{stem}.jpg")),
                given=f"the picture of {stem}.xml is missing",
                remedy=nearest(stem, tuple(pictures)) if len(problems) < DataError.shown else "",
            )
        )
    folder = split.images.relative_to(split.root).as_posix()
    return name if folder == "." else f"{folder}/{name}"


def _parse(file: Path, listed_at: str, problems: list[Problem]) -> ElementTree.Element | None:
    try:
        return ElementTree.parse(file).getroot()
    except FileNotFoundError:
        problems.append(Problem(where=str(file), given=f"the annotation file is missing (listed at {listed_at})"))
    except OSError as error:
        problems.append(Problem(where=str(file), given=f"the file cannot be read ({error.strerror})"))
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        line = f":{error.position[0]}" if isinstance(error, ElementTree.ParseError) else ""
        problems.append(Problem(where=f"{file}{line}", given=f"malformed XML ({error})", remedy="export it again"))
    return None


def _size(document: ElementTree.Element) -> tuple[int, int]:
    """Height and width as stated; 0, 0 where the file has none that can be used."""
    try:
        height, width = (int(float(document.findtext(f"size/{side}") or 0)) for side in ("height", "width"))
    except (ValueError, OverflowError):
        return 0, 0
    return (height, width) if min(height, width) > 0 and max(height, width) < 2**31 else (0, 0)


def _read_objects(
    split: VocSplit,
    stem: str,
    row: int,
    document: ElementTree.Element,
    objects: _Objects,
    problems: list[Problem],
) -> None:
    for number, element in enumerate(document.findall("object"), start=1):
        name = (element.findtext("name") or "").strip()
        texts = [element.findtext(f"bndbox/{side}") for side in _SIDES]
        box = [_number(text) for text in texts]
        if not name:
            problems.append(Problem(where=_place(split, stem, number), given="the object has no name"))
        for side, text, value in zip(_SIDES, texts, box, strict=True):
            if value is None:
                given = f"bndbox/{side} is missing" if text is None else f'bndbox/{side} is "{text.strip()}"'
                problems.append(Problem(where=_place(split, stem, number), given=given, allowed="a number"))
        objects.image_rows.append(row)
        objects.boxes.append([np.nan if value is None else value for value in box])
        objects.names.append(name)
        objects.difficult.append((element.findtext("difficult") or "0").strip() not in ("", "0"))
        objects.places.append((stem, number))


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def _labels(
    split: VocSplit, objects: _Objects, classes: ClassTable | None, problems: list[Problem]
) -> tuple[np.ndarray, ClassTable]:
    if classes is None:
        classes = ClassTable(names=tuple(sorted(set(objects.names) | _names_elsewhere(split))))
    place = {name: label for label, name in enumerate(classes.names)}
    for row, name in enumerate(objects.names):
        if name and name not in place:
            problems.append(unknown_class(_place(split, *objects.places[row]), name, classes))
    return np.array([place.get(name, -1) for name in objects.names], np.int64), classes


def _names_elsewhere(split: VocSplit) -> set[str]:
    """Class names in every XML file of the data set: a class that one split lacks has its label all the same.

    A file that cannot be read is reported when its own split is read.
    """
    names = set()
    folders = {split.annotations, *(other.annotations for other in find_voc_splits(split.root).values())}
    for folder in folders:
        for file in folder.glob("*.xml"):
            document = _parse(file, "", [])
            if document is not None:
                names |= {(name.text or "").strip() for name in document.iterfind("object/name")}
    return names - {""}


def _image_ids(stems: list[str]) -> np.ndarray:
    """VOC2007's names are numbers and serve as ids; others are numbered from 1."""
    if all(stem.isdecimal() and len(stem) < 18 for stem in stems):
        ids = np.array([int(stem) for stem in stems], np.int64)
        if len(np.unique(ids)) == len(ids):
            return ids
    return np.arange(1, len(stems) + 1)
