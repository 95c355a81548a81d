"""Values of a config that know where they were written, so that each can be named with its file and line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a value was written: a file and a line, counted from 1."""

    file: Path
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class Section(dict[str, Any]):
    """A mapping that knows where each of its values was written."""

    def __init__(self) -> None:
        super().__init__()
        self.places: dict[str, Place] = {}

    def put(self, key: str, value: Any, place: Place) -> None:
        self[key] = value
        self.places[key] = place

    def copy(self) -> Section:
        other = Section()
        other.update(self)
        other.places = dict(self.places)
        return other


class Items(list[Any]):
    """A list or tuple that knows where each of its values was written."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[Place] = []

    def add(self, value: Any, place: Place) -> None:
        self.append(value)
        self.places.append(place)
