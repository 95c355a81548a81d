"""COCO json: where its splits lie in a folder, and reading them.

Layouts: annotations/instances_SPLIT.json with pictures in SPLIT/ or images/SPLIT/ (COCO's own),
SPLIT/_annotations.coco.json beside the pictures (Roboflow), one json beside the pictures or above them. A crowd
region (`iscrowd`) is ignored ground truth. Classes are in the order of their category ids.
"""

from __future__ import annotations

import json
import mmap
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rcnn.data.chosen_classes import ChosenClasses
from rcnn.data.draft import Draft, finish, map_classes
from rcnn.data.findings import BadBoxes
from rcnn.data.table import AnnotationTable
from rcnn.errors import DataError, Problem
from rcnn.plain_records import ClassTable

LOOKED_FOR = (
    "COCO: annotations/instances_SPLIT.json, SPLIT/_annotations.coco.json, or a json file with images and annotations"
)

_OTHER_TASKS = ("captions_", "person_keypoints_", "stuff_", "panoptic_", "image_info_")
# Outlines are four fifths of a COCO file and nothing here needs them: without them the file is parsed in a third of
# the time and memory. A quotation mark inside a json string is escaped, so this cannot match inside one.
_OUTLINES = re.compile(rb'"segmentation"\s*:\s*\[[\[\]0-9eE+\-.,\s]*\]')
_ABSENT = object()
# A whole number that is larger, either way, is none: arrays hold 64 bits.
_MOST = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class CocoSplit:
    name: str
    annotations: Path
    image_folders: tuple[Path, ...]  # where the pictures may be, best guess first


def find_coco_splits(path: Path) -> dict[str, CocoSplit]:
    """The splits by name; empty where the path holds no COCO json."""
    if path.is_file():
        return _by_name([_split(path, path.parent)]) if path.suffix == ".json" else {}
    files = sorted((path / "annotations").glob("*.json"))
    files = [file for file in files if not file.name.startswith(_OTHER_TASKS)]
    files = [file for file in files if file.name.startswith("instances_")] or files
    if not files:
        files = sorted(path.glob("*/_annotations.coco.json"))
    if not files:
        files = [file for file in sorted(path.glob("*.json")) if _names_pictures(file)]
    return _by_name([_split(file, path) for file in files])


def _by_name(splits: list[CocoSplit]) -> dict[str, CocoSplit]:
    return {split.name: split for split in splits}


def _split(file: Path, root: Path) -> CocoSplit:
    name = file.stem.removeprefix("instances_")
    if file.name == "_annotations.coco.json":
        name = file.parent.resolve().name
    above = root.parent if root.name == "annotations" else root
    folders = [above / name, above / "images" / name, above / "images", file.parent, above]
    return CocoSplit(name=name, annotations=file, image_folders=tuple(dict.fromkeys(folders)))


def _names_pictures(file: Path) -> bool:
    try:
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.find(b'"images"') >= 0 and content.find(b'"annotations"') >= 0
    except (OSError, ValueError):
        return False


def read_coco(
    split: CocoSplit,
    *,
    classes: ClassTable | None = None,
    chosen: ChosenClasses | None = None,
    bad_boxes: BadBoxes = "mend",
    check_files: bool = True,
) -> AnnotationTable:
    """The annotations of one json. With `classes`, labels are given by class name in that table; with
    `chosen`, which takes its place, the others are not read."""
    file = split.annotations
    content = _parse(file)
    problems: list[Problem] = []
    images, image_ids = _records(content, "images", file, problems)
    annotations, annotation_image_ids = _annotations(content, file, problems)
    categories, category_ids = _records(content, "categories", file, problems)
    names = _texts(categories, "name", "category", file, problems)
    file_names = _texts(images, "file_name", "image", file, problems)
    problems += _repeated_names(names, category_ids, annotations, file)
    if problems:
        raise DataError(problems)
    order = np.argsort(category_ids, kind="stable")
    own_classes = ClassTable(
        names=tuple(names[index] for index in order), category_ids=tuple(category_ids[order].tolist())
    )
    image_rows = _places(annotation_image_ids, image_ids)
    labels = _places(_integers(annotations, "category_id"), category_ids[order])
    problems += _unknown(annotations, image_rows, "image_id", "no such image is listed", file)
    problems += _unknown(annotations, labels, "category_id", "no such category is listed", file)
    boxes, box_problems = _boxes(annotations, file)
    problems += box_problems
    if problems:
        raise DataError(problems)
    if classes is not None:
        used = np.bincount(labels, minlength=len(own_classes)) > 0
        mapped, problems = map_classes(own_classes.names, used, classes, file)
        labels = mapped[labels]
    folder = _image_folder(split, file_names)
    draft = Draft(
        root=folder,
        format="COCO",
        split=split.name,
        source=file,
        image_ids=image_ids,
        file_names=file_names,
        sizes=_sizes(images),
        image_rows=image_rows,
        boxes_xyxy=boxes,
        stated_xyxy=None,
        labels=labels,
        ignored=np.array([bool(annotation.get("iscrowd")) for annotation in annotations], bool),
        areas=_numbers(annotations, "area"),
        where=lambda row: _place(file, "annotation", annotations[row]),
        looked_in=split.image_folders,
    )
    return finish(draft, classes or own_classes, problems, chosen=chosen, bad_boxes=bad_boxes, check_files=check_files)


def _parse(file: Path) -> dict[str, Any]:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise DataError(Problem(where=str(file), given=f"the file cannot be read ({error.strerror})")) from error
    try:
        content = json.loads(_OUTLINES.sub(b'"segmentation":0', data))
    except (ValueError, RecursionError):
        content = _parse_whole(file, data)
    if not isinstance(content, dict):
        raise DataError(Problem(where=str(file), given="this is no COCO file", allowed="an object with images in it"))
    return content


def _parse_whole(file: Path, data: bytes) -> Any:
    """Parse without leaving anything out, so that a message has the line of the file as it is."""
    try:
        return json.loads(data)
    except json.JSONDecodeError as error:
        where = f"{file}:{error.lineno}:{error.colno}"
        raise DataError(
            Problem(where=where, given=f"malformed JSON ({error.msg})", remedy="export the file again")
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(Problem(where=str(file), given=f"the text is not UTF-8 ({error.reason})")) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists within lists
        raise DataError(Problem(where=str(file), given=f"the JSON cannot be read ({error})")) from error


def _place(file: Path, kind: str, record: dict[str, Any]) -> str:
    return f"{file}: {kind} {record.get('id', 'without id')}"


def _records(
    content: dict[str, Any], key: str, file: Path, problems: list[Problem]
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """The list at `key` and the ids of its records, which must be whole numbers and differ."""
    records = _list(content, key, file, problems)
    ids = [record.get("id", _ABSENT) for record in records]
    for record, given in zip(records, ids, strict=True):
        if not _is_whole(given):
            stated = "has no id" if given is _ABSENT else f"has the id {given!r}"
            problems.append(
                Problem(where=f"{file}: {key}", given=f"{_shorten(record)} {stated}", allowed="a whole number")
            )
    numbers = np.array([given if _is_whole(given) else -1 for given in ids], np.int64)
    values, counts = np.unique(numbers, return_counts=True)
    for value, count in zip(values[counts > 1].tolist(), counts[counts > 1].tolist(), strict=True):
        if value != -1:
            problems.append(
                Problem(
                    where=f"{file}: {key}", given=f"{count} of them have the id {value}", allowed="an id of its own"
                )
            )
    return records, numbers


def _annotations(
    content: dict[str, Any], file: Path, problems: list[Problem]
) -> tuple[list[dict[str, Any]], np.ndarray]:
    annotations = _list(content, "annotations", file, problems)
    return annotations, _integers(annotations, "image_id")


def _list(content: dict[str, Any], key: str, file: Path, problems: list[Problem]) -> list[dict[str, Any]]:
    records = content.get(key)
    if not isinstance(records, list):
        given = "is missing" if records is None else f"is of type {type(records).__name__}"
        problems.append(Problem(where=f"{file}: {key}", given=given, allowed="a list of objects"))
        return []
    wrong = [number for number, record in enumerate(records) if not isinstance(record, dict)]
    problems += [Problem(where=f"{file}: {key}[{number}]", given="is no object") for number in wrong]
    return [record for record in records if isinstance(record, dict)]


def _shorten(record: dict[str, Any]) -> str:
    text = json.dumps(record)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _texts(records: list[dict[str, Any]], key: str, kind: str, file: Path, problems: list[Problem]) -> list[str]:
    texts = [record.get(key) for record in records]
    for record, text in zip(records, texts, strict=True):
        if not isinstance(text, str) or not text:
            problems.append(Problem(where=_place(file, kind, record), given=f"{key} is {text!r}", allowed="a text"))
    return [text if isinstance(text, str) else "" for text in texts]


def _repeated_names(
    names: list[str], category_ids: np.ndarray, annotations: list[dict[str, Any]], file: Path
) -> list[Problem]:
    ids_of: dict[str, list[int]] = {}
    for name, category_id in zip(names, category_ids.tolist(), strict=True):
        ids_of.setdefault(name, []).append(category_id)
    repeated = {name: ids for name, ids in ids_of.items() if len(set(ids)) > 1 and name}
    if not repeated:
        return []
    used = set(_integers(annotations, "category_id").tolist())
    problems = []
    for name, ids in repeated.items():
        unused = [str(category_id) for category_id in ids if category_id not in used]
        remedy = f"delete the one without annotations (id {', '.join(unused)})" if unused else "rename one of them"
        given = f'the name "{name}" belongs to the categories {", ".join(map(str, ids))}'
        problems.append(Problem(where=f"{file}: categories", given=given, allowed="a name of its own", remedy=remedy))
    return problems


def _integers(records: list[dict[str, Any]], key: str) -> np.ndarray:
    """The whole numbers at `key`; the smallest integer stands for what is none, and is found in no list."""
    nothing = np.iinfo(np.int64).min
    return np.array([value if _is_whole(value := record.get(key)) else nothing for record in records], np.int64)


def _is_whole(value: Any) -> bool:
    return type(value) is int and -_MOST <= value <= _MOST


def _numbers(records: list[dict[str, Any]], key: str) -> np.ndarray:
    return np.array([value if _is_number(value := record.get(key)) else np.nan for record in records], np.float64)


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and -_MOST <= value <= _MOST)


def _places(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """The place of each value in `known`, -1 where it is not there."""
    if not len(known):
        return np.full(len(values), -1, np.int64)
    order = np.argsort(known)
    slots = np.minimum(np.searchsorted(known[order], values), len(known) - 1)
    return np.where(known[order][slots] == values, order[slots], -1)


def _unknown(annotations: list[dict[str, Any]], places: np.ndarray, key: str, remedy: str, file: Path) -> list[Problem]:
    return [
        Problem(
            where=_place(file, "annotation", annotations[row]),
            given=f"{key} is {annotations[row].get(key)!r}",
            remedy=remedy,
        )
        for row in np.flatnonzero(places < 0).tolist()
    ]


def _boxes(annotations: list[dict[str, Any]], file: Path) -> tuple[np.ndarray, list[Problem]]:
    """x1 y1 x2 y2 [M, 4] from COCO's x y width height; null, NaN and infinity are left for the check of the boxes."""
    stated = [annotation.get("bbox") for annotation in annotations]
    problems = [
        Problem(
            where=_place(file, "annotation", annotation),
            given=f"bbox is {box!r}",
            allowed="four numbers: x, y, width, height",
        )
        for annotation, box in zip(annotations, stated, strict=True)
        if not _is_box(box)
    ]
    if problems:
        return np.zeros((0, 4)), problems
    boxes = np.array(stated, np.float64).reshape(-1, 4)
    with np.errstate(invalid="ignore"):
        boxes[:, 2:] += boxes[:, :2]
    return boxes, []


def _is_box(box: Any) -> bool:
    return isinstance(box, list) and len(box) == 4 and all(value is None or _is_number(value) for value in box)


def _sizes(images: list[dict[str, Any]]) -> np.ndarray:
    sizes = np.stack([_numbers(images, "height"), _numbers(images, "width")], axis=1)
    sizes = np.nan_to_num(sizes, nan=0.0, posinf=0.0, neginf=0.0)
    return np.clip(sizes, 0, np.iinfo(np.int32).max).astype(np.int32)


def _image_folder(split: CocoSplit, file_names: list[str]) -> Path:
    """The folder that holds most of the first pictures named; the first guess where none does."""
    first = file_names[:20]
    return max(split.image_folders, key=lambda folder: sum((folder / name).is_file() for name in first))
