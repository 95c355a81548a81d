"""Picture files that a person names, and names for what is made of each."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from rcnn.data.image import IMAGE_SUFFIXES
from rcnn.errors import DataError, Problem

_ALLOWED = f"pictures ({', '.join(sorted(IMAGE_SUFFIXES))}), folders, or patterns such as 'a/*.jpg'"


def find_pictures(sources: Iterable[str]) -> list[Path]:
    """The pictures that files, folders (searched through) and patterns name, each once, in a stable order.

    Raises `DataError` that lists every source without a picture.
    """
    found: dict[Path, None] = {}
    problems = []
    for source in sources:
        paths = list(_pictures_of(source))
        found.update(dict.fromkeys(paths))
        if not paths:
            problems.append(Problem(where=source, given=_nothing(source), allowed=_ALLOWED, remedy="check the path"))
    if problems:
        raise DataError(problems)
    return list(found)


def _pictures_of(source: str) -> Iterator[Path]:
    path = Path(source)
    if path.is_file():
        yield path
    elif path.is_dir():
        yield from sorted(child for child in path.rglob("*") if _is_picture(child))
    elif glob.has_magic(source):
        yield from sorted(match for match in map(Path, glob.glob(source, recursive=True)) if _is_picture(match))


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()


def _nothing(source: str) -> str:
    if Path(source).is_dir():
        return "a folder without pictures"
    return "no picture matches this pattern" if glob.has_magic(source) else "there is no such file"


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """A name for each of the paths, none twice: its stem; with folders and suffix where others have that stem."""
    stems = Counter(path.stem for path in paths)
    names = [path.stem if stems[path.stem] == 1 else "_".join(_parts(path)) for path in paths]
    taken: set[str] = set()
    for index, name in enumerate(names):
        number = 2
        while names[index] in taken:
            names[index] = f"{name}-{number}"
            number += 1
        taken.add(names[index])
    return names


def _parts(path: Path) -> tuple[str, ...]:
    return tuple(part for part in path.parts if part not in (path.anchor, "..", "."))
