"""The header of a safetensors file, and what a file without one may be."""

from __future__ import annotations

import json
from pathlib import Path

from rcnn.errors import CheckpointError, Problem

CONVERT = "where it is another system's file, convert it: rcnn convert FILE --from SYSTEM -o OUT.safetensors"
# Names, shapes and places of 2000 tensors are 200 kilobytes; a text of gigabytes would be ten times that in memory.
_LONGEST_HEADER = 16 << 20
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def read_header(path: Path) -> dict[str, dict]:
    """The header of a safetensors file (8 bytes of length, then JSON), after a look at what else the file may be.

    `__metadata__`, where it is there, maps texts to texts. Raises CheckpointError.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            text = file.read(length if length <= min(size, _LONGEST_HEADER) else 64)
    except OSError as error:
        raise unusable(path, f"cannot be read: {error.strerror}", _what_else_is_there(path)) from error
    _refuse_other_formats(path, start + text[:64])
    if size < 8 + length:
        raise unusable(path, f"truncated: {size} bytes, its header alone has {8 + length}", "copy the file again")
    if length > _LONGEST_HEADER:
        given = f"a header of {length} bytes, at most {_LONGEST_HEADER} are read"
        raise unusable(path, given, "take another copy of the file")
    try:
        header = json.loads(text)
        strings = header.get("__metadata__", {})
        if not all(isinstance(text, str) for text in (*strings.keys(), *strings.values())):
            raise TypeError("metadata that are no texts")
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        expected = 8 + length + max(ends, default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise unusable(path, "damaged: its header cannot be read", "take another copy of the file") from error
    if size != expected:
        given = f"{'truncated' if size < expected else 'damaged'}: {size} bytes where its header states {expected}"
        raise unusable(path, given, "copy the file again")
    return header


def _refuse_other_formats(path: Path, start: bytes) -> None:
    if not start:
        raise unusable(path, "an empty file", "take another copy of the file")
    if start.startswith(_PICKLE_STARTS):
        given = "a pickle (.pt, .pth, .pkl), which can run code when it is read and was therefore not opened"
        raise unusable(path, given, "convert it: rcnn convert FILE --from SYSTEM -o OUT.safetensors")
    if start.startswith(b"version https://git-lfs"):
        raise unusable(path, "a pointer of Git LFS, not the file itself", "fetch the content: git lfs pull")
    if start[8:9] != b"{":
        raise unusable(path, "not a checkpoint (no safetensors header)", CONVERT)


def _what_else_is_there(path: Path) -> str:
    folder = path if path.is_dir() else path.parent
    found = sorted(str(item) for item in folder.glob("**/*.safetensors")) if folder.is_dir() else []
    return f"there is: {', '.join(found[:5])}" if found else "check the path"


def unusable(path: Path, given: str, remedy: str) -> CheckpointError:
    """The error of a file that cannot be used."""
    return CheckpointError(Problem(where=str(path), given=given, remedy=remedy))
