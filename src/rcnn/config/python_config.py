"""A Python config file with its bases as one tree of values, each with the file and line that wrote it.

The format is mmengine's (and mmcv's before it): `_base_` names files that come first, dicts merge into those of the
bases, everything else replaces, `_delete_=True` in a dict replaces it whole. Nothing is executed (python_data.py).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rcnn.config.placed_values import Items, Place, Section
from rcnn.config.python_data import BASE, FileReader
from rcnn.config.python_syntax import base_of, parse
from rcnn.config.refusal import MAX_BYTES, MAX_NESTING, Budget, kind_of
from rcnn.errors import Problem, RecipeError

DELETE = "_delete_"
_MAX_DEPTH = 20
_MAX_FILES = 100
_TOO_DEEP = f"nested deeper than {MAX_NESTING}"


@dataclass(frozen=True, kw_only=True)
class PythonConfig:
    """What a config file and its bases say together."""

    path: Path
    root: Section


def read_python_config(path: Path) -> PythonConfig:
    """The config at `path`. Errors: `RecipeError` with every problem of it and of its bases, each with its line."""
    reading = _Reading()
    root = reading.file(path, asked_by=str(path))
    if reading.problems:
        raise RecipeError(reading.problems)
    return PythonConfig(path=path, root=root)


@dataclass(kw_only=True)
class _Reading:
    """One reading of a file and of its bases."""

    budget: Budget = field(default_factory=Budget)
    problems: list[Problem] = field(default_factory=list)
    open_files: list[Path] = field(default_factory=list)
    num_files: int = 0

    def file(self, path: Path, *, asked_by: str) -> Section:
        """The values of a file over those of its bases; empty where the file cannot be read."""
        identity = _identity(path)
        if identity in self.open_files:
            circle = [*self.open_files[self.open_files.index(identity) :], identity]
            self._report(asked_by, "the files are bases of each other: " + " -> ".join(file.name for file in circle))
            return Section()
        self.num_files += 1
        if len(self.open_files) >= _MAX_DEPTH or self.num_files > _MAX_FILES:
            self._report(asked_by, f"more than {_MAX_DEPTH} files above each other, or {_MAX_FILES} in all")
            return Section()
        text = self._text(path, asked_by)
        tree = None if text is None else parse(text, path)
        if isinstance(tree, Problem):
            self.problems.append(tree)
        if tree is None or isinstance(tree, Problem):
            return Section()
        self.open_files.append(identity)
        base_nodes = [node for statement in tree.body if (node := base_of(statement)) is not None]
        before = len(self.problems)
        base = self._bases(path, base_nodes[-1]) if base_nodes else None
        self.open_files.pop()
        reader = FileReader(file=path, budget=self.budget, base=base)
        if base_nodes and len(self.problems) > before:
            return Section()  # what refers to a base that cannot be read would be reported once more
        section = reader.read(tree)
        self.problems += reader.problems
        if problem := _shape_problem(section, path) or _shape_problem(base or Section(), path):
            self.problems.append(problem)
            return Section()
        return self._merged(section, base or Section(), "")

    def _text(self, path: Path, asked_by: str) -> str | None:
        where = str(path)
        try:
            if path.stat().st_size > MAX_BYTES:
                self._report(where, f"a file of {path.stat().st_size:,} bytes", f"at most {MAX_BYTES:,}")
                return None
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            reason = (
                "not UTF-8" if isinstance(error, UnicodeDecodeError) else getattr(error, "strerror", "") or str(error)
            )
            self._report(asked_by, f"{where} cannot be read ({reason})", "a .py file; _base_ is relative to its file")
            return None

    def _bases(self, path: Path, node: Any) -> Section:
        place = f"{path}:{node.lineno}"
        reader = FileReader(file=path, budget=self.budget)
        named = reader.expression(node)
        self.problems += reader.problems
        names = named if isinstance(named, Items) else [named] if named is not None else []
        merged = Section()
        if len(names) > _MAX_FILES:
            self._report(place, f"{len(names)} bases", f"at most {_MAX_FILES}")
            return merged
        for name in names:
            if not isinstance(name, str) or not name.endswith(".py") or "::" in name:
                self._report(f"{place}: {BASE}", kind_of(name), "the path of a .py file, relative to this one")
                continue
            file = Path(os.path.normpath(path.parent / os.path.expanduser(name)))
            section = self.file(file, asked_by=f"{place}: {BASE}")
            twice = sorted(set(section) & set(merged))
            if twice:
                self._report(
                    f"{place}: {BASE}", f"{', '.join(twice)} in several bases", "each name in one of the bases"
                )
            merged.update(section)
            merged.places.update(section.places)
        return merged

    def _merged(self, new: Section, old: Section, above: str) -> Section:
        """`new` over `old`. Neither is changed."""
        result = old.copy()
        for key, value in new.items():
            if key == DELETE:
                continue
            place, path = new.places[key], f"{above}{key}"
            if not isinstance(value, Section):
                result.put(key, value, place)
            elif key not in old or value.get(DELETE):
                result.put(key, _without_delete(value), place)
            elif isinstance(old[key], Section):
                result.put(key, self._merged(value, old[key], f"{path}."), place)
            else:
                remedy = f"put {DELETE}=True into it to replace what the base has"
                self._report(f"{place}: {path}", f"a dict, where the base has {kind_of(old[key])}", remedy=remedy)
        return result

    def _report(self, where: str, given: str, allowed: str = "", remedy: str = "") -> None:
        self.problems.append(Problem(where=where, given=given, allowed=allowed, remedy=remedy))


def _identity(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, ValueError, RuntimeError):  # a loop of links, a null in the name: told when it is opened
        return path


def _without_delete(value: Section) -> Section:
    result = Section()
    for key, inner in value.items():
        if key != DELETE:
            result.put(key, _without_delete(inner) if isinstance(inner, Section) else inner, value.places[key])
    return result


def _shape_problem(root: Section, path: Path) -> Problem | None:
    """Why a tree cannot be walked: it holds itself, is too deep, or too large where the same part stands often."""
    measured: dict[int, tuple[int, int]] = {}  # how many values, and how many floors
    trouble: list[str] = []

    def measure(value: Any, above: tuple[int, ...]) -> tuple[int, int]:
        if not isinstance(value, Section | Items) or trouble:
            return 1, 0
        if id(value) not in measured:
            if id(value) in above or len(above) > MAX_NESTING:
                trouble.append("a value that holds itself" if id(value) in above else _TOO_DEEP)
                return 1, 0
            items = value.values() if isinstance(value, Section) else value
            inner = [measure(item, (*above, id(value))) for item in items]
            sizes, floors = [size for size, _ in inner], [floors for _, floors in inner]
            measured[id(value)] = 1 + sum(sizes), 1 + max(floors, default=0)
        return measured[id(value)]

    size, floors = measure(root, ())
    if floors > MAX_NESTING + 1 or size > MAX_BYTES:
        trouble.append(_TOO_DEEP if floors > MAX_NESTING + 1 else "more values than a config can have")
    return Problem(where=str(path), given=trouble[0]) if trouble else None


def place_of(section: Section, key: str, path: Path) -> Place:
    """Where a key was written; the file itself where nobody did."""
    return section.places.get(key, Place(file=path, line=1))
