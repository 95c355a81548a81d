"""What lies beside the weights in a file, as texts, numbers, lists and mappings alone."""

from __future__ import annotations

from collections.abc import Mapping

DEEPEST = 50
_LARGEST_NUMBER = 1 << 63
_DROPPED = object()
"""Stands for a value that is none of these: a tensor, an object of a class that is not read."""


def plain_values(values: Mapping[object, object], *, most: int) -> dict[str, object]:
    """The values that are plain, within lists and mappings too; a list that holds another is left out whole.

    Raises ValueError where they are nested deeper than `DEEPEST`, or unfold into more than `most`: in a pickle a list
    may hold another many times, or itself.
    """
    found = _Plain(most).of(values, 0)
    return {key: value for key, value in found.items() if isinstance(key, str)} if isinstance(found, dict) else {}


class _Plain:
    def __init__(self, left: int) -> None:
        self.left = left

    def of(self, value: object, depth: int) -> object:
        self.left -= 1
        if self.left < 0:
            raise ValueError("they unfold into far more than the file holds")
        if depth > DEEPEST:
            raise ValueError(f"nested more than {DEEPEST} deep")
        if isinstance(value, str):
            return _clean(value)
        if value is None or isinstance(value, bool | float):
            return value
        if isinstance(value, int):
            return value if abs(value) < _LARGEST_NUMBER else _DROPPED
        if isinstance(value, Mapping):
            return self._mapping(value, depth)
        if isinstance(value, list | tuple):
            items = [self.of(item, depth + 1) for item in value]
            # Without one of them the others would stand at places that are not theirs.
            return _DROPPED if any(item is _DROPPED for item in items) else items
        return _DROPPED

    def _mapping(self, value: Mapping[object, object], depth: int) -> dict[object, object]:
        found: dict[object, object] = {}
        for name, entry in value.items():
            key = _clean(name) if isinstance(name, str) else name
            content = self.of(entry, depth + 1)
            if isinstance(key, str | int) and content is not _DROPPED:
                found[key] = content
        return found


def _clean(text: str) -> str:
    """Text that can be written: bytes that were no text are shown by their numbers."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
