"""Safetensors files that are written in a stream and read a piece at a time, without torch.

The layout is safetensors' own, so that every reader of these files reads ours: 8 bytes with the length of the header,
the header (JSON, filled up with blanks), the tensors without a gap. Its library writes a file from tensors that are
all in memory; here the last tensor grows row by row, and the header, whose room is kept, is written at the end.
Reading asks the file for a range of bytes (no memory map: a file that another process cuts is an error, not a bus
error, and what was read is not counted as memory of this process). Processes that read the same pages share them in
the system's cache.
"""

from __future__ import annotations

import json
import os
import sys
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from rcnn.errors import DataError, Problem

_TYPES = {
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "U8": np.dtype("u1"),
}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}
# For the room that the header gets before the last tensor's length is known.
_MOST_ROWS = 10**15
_LARGEST_READ = 2**30  # systems cut a single read off below 2 GiB
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


class TensorFileWriter:
    """Writes a file whose `growing` tensor comes last. `fixed` arrays may be written over once, with others of their
    shape, by `finish`."""

    def __init__(
        self,
        file: BinaryIO,
        *,
        metadata: Mapping[str, str],
        fixed: Mapping[str, np.ndarray],
        growing: str,
        dtype: np.dtype,
        row_shape: Sequence[int],
    ) -> None:
        self._file = file
        self._metadata = dict(metadata)
        self._fixed = {name: np.ascontiguousarray(array) for name, array in fixed.items()}
        self._growing, self._dtype, self._row_shape = growing, np.dtype(dtype), tuple(row_shape)
        self.num_rows = 0
        self._header_bytes = -(-len(self._header(_MOST_ROWS)) // 8) * 8
        self._write_head()

    def append(self, rows: np.ndarray) -> None:
        rows = np.ascontiguousarray(rows, self._dtype)
        assert rows.shape[1:] == self._row_shape, f"rows of {rows.shape[1:]}, not {self._row_shape}"
        self._file.write(rows.data)
        self.num_rows += len(rows)

    def finish(self, **replaced: np.ndarray) -> None:
        """Writes the header, now that all is known, and the arrays that were not known at the start."""
        for name, array in replaced.items():
            known = self._fixed[name]
            assert array.shape == known.shape and array.dtype == known.dtype, name
            self._fixed[name] = np.ascontiguousarray(array)
        self._file.seek(0)
        self._write_head()
        self._file.seek(0, os.SEEK_END)

    def _write_head(self) -> None:
        self._file.write(self._header_bytes.to_bytes(8, "little"))
        self._file.write(self._header(self.num_rows).ljust(self._header_bytes))
        for array in self._fixed.values():
            self._file.write(array.data)

    def _header(self, num_rows: int) -> bytes:
        entries: dict[str, Any] = {"__metadata__": self._metadata}
        end = 0
        for name, array in self._fixed.items():
            start, end = end, end + array.nbytes
            entries[name] = _entry(array.dtype, array.shape, start, end)
        row_bytes = self._dtype.itemsize * int(np.prod(self._row_shape))
        shape = (num_rows, *self._row_shape)
        entries[self._growing] = _entry(self._dtype, shape, end, end + num_rows * row_bytes)
        return json.dumps(entries, separators=(",", ":")).encode()


def _entry(dtype: np.dtype, shape: Sequence[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": _NAMES[dtype.newbyteorder("<")], "shape": list(shape), "data_offsets": [start, end]}


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """Where a tensor lies: `start` counts from the start of the file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * int(np.prod(self.shape[1:]))


class TensorFile:
    """A safetensors file that is open for reading; a copy in another process opens it again.

    Raises `DataError` for what is no such file, and for one that is not whole.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            self._close = weakref.finalize(self, os.close, self._descriptor)
            self._num_bytes = os.fstat(self._descriptor).st_size
            self.metadata, self._entries = self._read_header()
        except OSError as error:
            raise unusable(path, f"cannot be read: {error.strerror}", "check the path") from error

    def __reduce__(self) -> tuple[type[TensorFile], tuple[Path]]:
        return TensorFile, (self.path,)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """None where there is no tensor of that name."""
        return self._entries[name].shape if name in self._entries else None

    def dtype(self, name: str) -> np.dtype:
        return self._entries[name].dtype

    def read(self, name: str) -> np.ndarray:
        """A whole tensor."""
        return self.rows(name, 0, self._entries[name].shape[0])

    def rows(self, name: str, first: int, last: int) -> np.ndarray:
        """The rows `first:last` of a tensor: only these are read. The array may not be written to."""
        entry = self._entries[name]
        size = (last - first) * entry.row_bytes
        content = self._bytes(entry.start + first * entry.row_bytes, size)
        if len(content) != size:
            raise unusable(self.path, "was cut or replaced while it was read", "leave the file alone while it is used")
        return np.frombuffer(content, entry.dtype).reshape(last - first, *entry.shape[1:])

    def _bytes(self, start: int, size: int) -> bytes:
        """As many of the bytes as are there."""
        pieces = []
        while size > 0:
            piece = _read_at(self._descriptor, min(size, _LARGEST_READ), start)
            if not piece:
                break
            pieces.append(piece)
            start, size = start + len(piece), size - len(piece)
        return b"".join(pieces) if len(pieces) != 1 else pieces[0]

    def _read_header(self) -> tuple[dict[str, str], dict[str, _Entry]]:
        path, size = self.path, self._num_bytes
        start = self._bytes(0, 72)
        length = int.from_bytes(start[:8], "little")
        self._refuse_other_formats(start)
        if size < 8 + length:
            raise unusable(path, f"truncated: {size:,} bytes, its header alone has {8 + length:,}", "copy it again")
        try:
            header = json.loads(self._bytes(8, length))
            metadata = dict(header.pop("__metadata__", {}))
            entries = {name: _read_entry(entry, 8 + length) for name, entry in header.items()}
            expected = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise unusable(path, "damaged: its header cannot be read", "take another copy of the file") from error
        if size != expected:
            kind = "truncated" if size < expected else "damaged"
            given = f"{kind}: {size:,} bytes where its header states {expected:,}"
            raise unusable(path, given, "copy the file again, or make it anew")
        return metadata, entries

    def _refuse_other_formats(self, start: bytes) -> None:
        if not start:
            raise unusable(self.path, "an empty file", "take another copy of the file")
        if start.startswith(_PICKLE_STARTS):
            given = "a pickle or zip (.pkl, .pt, .pth), which can run code when it is read and was not opened"
            raise unusable(self.path, given, "proposals: make the file anew, with rcnn proposals dump")
        if start.startswith(b"version https://git-lfs"):
            raise unusable(self.path, "a pointer of Git LFS, not the file itself", "fetch the content: git lfs pull")
        if start[8:9] != b"{":
            raise unusable(self.path, "no safetensors file: it has no such header", "check the path")


def _read_entry(entry: Mapping[str, Any], data_start: int) -> _Entry:
    """ValueError or KeyError where it makes no sense."""
    dtype, shape = _TYPES.get(entry["dtype"], np.dtype(np.void)), tuple(int(side) for side in entry["shape"])
    start, end = entry["data_offsets"]
    if dtype.kind != "V" and end - start != dtype.itemsize * int(np.prod(shape)):
        raise ValueError("a tensor's length is not that of its shape")
    return _Entry(dtype=dtype, shape=shape, start=data_start + start)


def _read_at(descriptor: int, size: int, start: int) -> bytes:
    if sys.platform == "win32":  # has no pread, and no forked processes that would share the position
        os.lseek(descriptor, start, os.SEEK_SET)
        return os.read(descriptor, size)
    return os.pread(descriptor, size, start)


def unusable(path: Path, given: str, remedy: str = "", allowed: str = "") -> DataError:
    return DataError(Problem(where=str(path), given=given, allowed=allowed, remedy=remedy))
