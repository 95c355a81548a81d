"""Write a table in another format: COCO json, VOC XML or YOLO txt, with its pictures. Boxes survive to the last digit.

What a format has no place for is said in `Conversion.lost`: YOLO knows no ignored regions, VOC and YOLO no areas of
outlines.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal
from xml.etree import ElementTree

import numpy as np
import yaml

from rcnn.data.folder import Format
from rcnn.data.table import AnnotationTable
from rcnn.errors import DataError, Problem

# "none" leaves the pictures out: for a folder that has them already.
Pictures = Literal["copy", "link", "none"]


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What was written, and what the format could not hold (sentences for people); findings are the tables'."""

    out: Path
    num_pictures: int
    num_boxes: int
    lost: tuple[str, ...]


def convert_tables(
    tables: Sequence[AnnotationTable], out: Path | str, *, to: Format, pictures: Pictures = "copy"
) -> Conversion:
    """Write the splits of a data set to a new folder. Raises `DataError` where `out` is not empty, or names clash."""
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(
            Problem(where=str(out), given="the folder is not empty", remedy="choose a new one: nothing is overwritten")
        )
    _check_classes(tables)
    match to:
        case "coco":
            places = [_coco_places(table) for table in tables]
        case "voc":
            places = [_voc_places(table) for table in tables]
        case "yolo":
            places = [_yolo_places(table) for table in tables]
    _check_places(tables, places)
    out.mkdir(parents=True, exist_ok=True)
    for table, own_places in zip(tables, places, strict=True):
        if pictures != "none":
            _bring_pictures(table, out, own_places, pictures)
        match to:
            case "coco":
                _write_coco(table, out, own_places)
            case "voc":
                _write_voc(table, out, own_places)
            case "yolo":
                _write_yolo(table, out, own_places)
    if to == "yolo":
        _write_data_yaml(tables, out)
    return Conversion(
        out=out,
        num_pictures=sum(len(table) for table in tables),
        num_boxes=sum(len(table.labels) - (int(table.ignored.sum()) if to == "yolo" else 0) for table in tables),
        lost=tuple(_lost(tables, to)),
    )


def _check_classes(tables: Sequence[AnnotationTable]) -> None:
    for table in tables[1:]:
        if table.classes.names != tables[0].classes.names:
            given = f'the splits "{tables[0].split}" and "{table.split}" have different classes'
            raise DataError(Problem(where=str(table.root), given=given, remedy="convert them one by one (--split)"))


def _lost(tables: Sequence[AnnotationTable], to: Format) -> list[str]:
    lost = []
    num_ignored = sum(int(table.ignored.sum()) for table in tables)
    if to == "yolo" and num_ignored:
        lost.append(f"ignored regions (crowd, difficult) left out, as YOLO has no place for them: {num_ignored:,}")
    sides = [table.boxes_xyxy[:, 2:] - table.boxes_xyxy[:, :2] for table in tables]
    if to != "coco" and any(not np.allclose(t.areas, s.prod(axis=1)) for t, s in zip(tables, sides, strict=True)):
        lost.append(f"the areas of the outlines were left out: {to.upper()} has no place for them")
    num_thin = sum(int((side <= 1).any(axis=1).sum()) for side in sides)
    if to == "voc" and num_thin:
        lost.append(f"boxes at most one pixel wide or high, which VOC cannot tell from points: {num_thin:,}")
    return lost


def _coco_places(table: AnnotationTable) -> list[str]:
    """Where each picture goes, relative to the new folder."""
    return [f"{_plain(table.split)}/{_inside(table.file_names[index])}" for index in range(len(table))]


def _voc_places(table: AnnotationTable) -> list[str]:
    return [f"JPEGImages/{PurePosixPath(table.file_names[index]).name}" for index in range(len(table))]


def _yolo_places(table: AnnotationTable) -> list[str]:
    split = _yolo_split(table.split)
    return [f"images/{split}/{PurePosixPath(table.file_names[index]).name}" for index in range(len(table))]


def _plain(split: str) -> str:
    return split.replace("/", "_")


def _inside(name: str) -> str:
    """VOC and YOLO tables name their pictures from the folder above; a COCO json beside its own folder does not."""
    return re.sub(r"^(JPEGImages|images)/", "", name)


def _yolo_split(split: str) -> str:
    match = re.fullmatch(r"(?:.*/)?(train|val|test)(?:id(?:ation)?)?\d*", split)
    if match is None:
        raise DataError(
            Problem(
                where=f'split "{split}"',
                given="YOLO's data.yaml has no place for it",
                allowed="train, val or test",
                remedy="choose the splits to convert (--split)",
            )
        )
    return match[1]


def _check_places(tables: Sequence[AnnotationTable], places: Sequence[Sequence[str]]) -> None:
    """Two pictures must not get one name (for VOC and YOLO: not one stem, which names the annotations)."""
    taken: dict[str, Path] = {}
    problems = []
    for table, own_places in zip(tables, places, strict=True):
        for index, place in enumerate(own_places):
            stem = str(PurePosixPath(place).with_suffix(""))
            first = taken.setdefault(stem, table.path(index))
            if first != table.path(index):
                given = f"its name clashes with that of {first}"
                problems.append(Problem(where=str(table.path(index)), given=given, remedy="rename one of the files"))
    if problems:
        raise DataError(problems)


def _bring_pictures(table: AnnotationTable, out: Path, places: Sequence[str], how: Pictures) -> None:
    for index, place in enumerate(places):
        target = out / place
        if target.exists():  # VOC's splits overlap; _check_places saw that it is the same picture
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if how == "link":
            target.symlink_to(table.path(index).resolve())
        else:
            shutil.copyfile(table.path(index), target)


def _write_coco(table: AnnotationTable, out: Path, places: Sequence[str]) -> None:
    folder = f"{_plain(table.split)}/"
    images = [
        {
            "id": int(table.image_ids[index]),
            "file_name": place.removeprefix(folder),
            "height": table.size(index).height,
            "width": table.size(index).width,
        }
        for index, place in enumerate(places)
    ]
    owners = np.repeat(table.image_ids, np.diff(table.starts)).tolist()
    starts, sides = table.boxes_xyxy[:, :2], table.boxes_xyxy[:, 2:] - table.boxes_xyxy[:, :2]
    annotations = [
        {
            "id": row + 1,
            "image_id": owners[row],
            "category_id": table.classes.category_ids[label],
            "bbox": [*starts[row].tolist(), *sides[row].tolist()],
            "area": float(table.areas[row]),
            "iscrowd": int(table.ignored[row]),
        }
        for row, label in enumerate(table.labels.tolist())
    ]
    categories = [
        {"id": category_id, "name": name}
        for category_id, name in zip(table.classes.category_ids, table.classes.names, strict=True)
    ]
    file = out / "annotations" / f"instances_{_plain(table.split)}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


def _write_voc(table: AnnotationTable, out: Path, places: Sequence[str]) -> None:
    (out / "Annotations").mkdir(exist_ok=True)
    lists = out / "ImageSets" / "Main"
    lists.mkdir(parents=True, exist_ok=True)
    stems = [PurePosixPath(place).stem for place in places]
    for index, (place, stem) in enumerate(zip(places, stems, strict=True)):
        document = _voc_document(table, index, PurePosixPath(place).name)
        (out / "Annotations" / f"{stem}.xml").write_bytes(ElementTree.tostring(document, encoding="utf-8"))
    (lists / f"{_plain(table.split)}.txt").write_text("".join(f"{stem}\n" for stem in stems), encoding="utf-8")


def _voc_document(table: AnnotationTable, index: int, name: str) -> ElementTree.Element:
    document = ElementTree.Element("annotation")
    ElementTree.SubElement(document, "filename").text = name
    size = ElementTree.SubElement(document, "size")
    for side, value in (("width", table.size(index).width), ("height", table.size(index).height), ("depth", 3)):
        ElementTree.SubElement(size, side).text = str(value)
    rows = range(len(table.labels))[table.rows(index)]
    for row in rows:
        element = ElementTree.SubElement(document, "object")
        ElementTree.SubElement(element, "name").text = table.classes.names[table.labels[row]]
        ElementTree.SubElement(element, "difficult").text = str(int(table.ignored[row]))
        box = ElementTree.SubElement(element, "bndbox")
        # Back to pixels counted from 1, the last one included.
        stated = table.boxes_xyxy[row] + np.array([1.0, 1.0, 0.0, 0.0])
        for side, value in zip(("xmin", "ymin", "xmax", "ymax"), stated.tolist(), strict=True):
            ElementTree.SubElement(box, side).text = str(int(value)) if value.is_integer() else repr(value)
    ElementTree.indent(document)
    return document


def _write_yolo(table: AnnotationTable, out: Path, places: Sequence[str]) -> None:
    for index, place in enumerate(places):
        size = table.size(index)
        lines = []
        for row in range(len(table.labels))[table.rows(index)]:
            if not table.ignored[row]:
                x1, y1, x2, y2 = table.boxes_xyxy[row].tolist()
                numbers = ((x1 + x2) / 2 / size.width, (y1 + y2) / 2 / size.height)
                numbers += ((x2 - x1) / size.width, (y2 - y1) / size.height)
                lines.append(" ".join([str(int(table.labels[row])), *map(repr, numbers)]) + "\n")
        file = (out / "labels" / place.removeprefix("images/")).with_suffix(".txt")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(lines))


def _write_data_yaml(tables: Sequence[AnnotationTable], out: Path) -> None:
    content = {"path": "."} | {_yolo_split(table.split): f"images/{_yolo_split(table.split)}" for table in tables}
    content |= {"names": dict(enumerate(tables[0].classes.names))}
    (out / "data.yaml").write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
