"""Small annotated folders to read, made in the temporary folder of a test from plain pictures of 100 x 80."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image


@dataclass(frozen=True)
class Folders:
    root: Path

    def picture(self, path: Path | str, width: int = 100, height: int = 80) -> Path:
        path = self.root / path
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (width, height), (90, 120, 150)).save(path)
        return path

    @staticmethod
    def coco_content(**changes: Any) -> dict[str, Any]:
        """Two pictures, the second empty; ids with gaps; a crowd; categories not in the order of their ids."""
        content = {
            "images": [
                {"id": 7, "file_name": "a.jpg", "width": 100, "height": 80},
                {"id": 3, "file_name": "b.jpg", "width": 100, "height": 80},
            ],
            "categories": [{"id": 20, "name": "dog"}, {"id": 5, "name": "cat"}],
            "annotations": [
                {"id": 1, "image_id": 7, "category_id": 20, "bbox": [10, 20, 30, 40], "area": 600.5, "iscrowd": 0},
                {"id": 2, "image_id": 7, "category_id": 5, "bbox": [0, 0, 100, 80], "iscrowd": 1},
            ],
        }
        return content | changes

    def coco(self, content: Mapping[str, Any] | None = None, split: str = "train") -> Path:
        content = self.coco_content() if content is None else content
        self.text(f"annotations/instances_{split}.json", json.dumps(content))
        for image in content["images"]:
            self.picture(f"{split}/{image['file_name']}")
        return self.root

    def text(self, path: str, text: str) -> Path:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    @staticmethod
    def voc_object(name: str, box: Sequence[Any], difficult: int = 0) -> str:
        sides = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
        corners = "".join(f"<{side}>{value}</{side}>" for side, value in sides)
        return f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{corners}</bndbox></object>"

    @staticmethod
    def voc_xml(stem: str, objects: str = "", size: str = "<width>100</width><height>80</height>") -> str:
        return f"<annotation><filename>{stem}.jpg</filename><size>{size}</size>{objects}</annotation>"

    def voc(self, documents: Mapping[str, str], splits: Mapping[str, Sequence[str]] | None = None) -> Path:
        for stem, document in documents.items():
            self.text(f"Annotations/{stem}.xml", document)
            self.picture(f"JPEGImages/{stem}.jpg")
        for name, stems in (splits or {}).items():
            self.text(f"ImageSets/Main/{name}.txt", "".join(f"{stem}\n" for stem in stems))
        return self.root

    def yolo(self, labels: Mapping[str, str | None], names: str = "[cat, dog]", split: str = "train") -> Path:
        for stem, text in labels.items():
            self.picture(f"images/{split}/{stem}.jpg")
            if text is not None:
                self.text(f"labels/{split}/{stem}.txt", text)
        self.text("data.yaml", f"path: .\n{split}: images/{split}\nnames: {names}\n")
        return self.root


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return Folders(tmp_path)
