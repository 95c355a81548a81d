"""Imports point one way, downward through the layers of the design."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "rcnn"

LAYERS = {
    "errors": 0, "plain_records": 0, "records": 0, "config": 0, "atomic_file": 0, "download": 0,
    "boxes": 1, "ops": 1, "weight_files": 1,
    "priors": 2, "matching": 2, "transforms": 2,
    "backbones": 3, "necks": 3, "dense": 3, "data": 3, "evaluation": 3, "drawing": 3,
    "proposals": 4, "roi": 4,
    "detectors": 5,
    "engine": 6,
    "recipes": 7,
    "predict": 8, "export": 8, "explain": 8, "converters": 8,
    "cli": 9, "web": 9, "__main__": 9,
}  # fmt: skip

# Neighbours in a layer that must not see each other.
STRANGERS = [
    ("data", {"backbones", "necks", "dense"}),
    ("evaluation", {"backbones", "necks", "dense"}),
    ("roi", {"dense"}),
    ("dense", {"data", "evaluation"}),
    ("backbones", {"data", "evaluation", "necks", "dense"}),
]


def place_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_places(path: Path) -> set[str]:
    places = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        places |= {name.split(".")[1] for name in names if name.startswith("rcnn.")}
    return places & set(LAYERS)


MODULES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_downward(path: Path) -> None:
    place = place_of(path)
    assert place in LAYERS, f"{place} has no layer: add it to LAYERS"
    for other in imported_places(path) - {place}:
        assert LAYERS[other] <= LAYERS[place], f"{path.name} ({place}) imports {other}, which stands above it"
    for name, strangers in STRANGERS:
        if place == name:
            assert not imported_places(path) & strangers


def test_no_relative_imports() -> None:
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: write the full name"
