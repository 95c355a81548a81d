"""MindSpore's `.ckpt`: a small reader of its protobuf messages. Nothing in the file is executed.

    Checkpoint   field 1, repeated: Value
    Value        field 1: tag (name), field 2: Tensor, field 3: a hash table (refused)
    Tensor       field 1, repeated: dims, field 2: type, field 3: content (little-endian)

A tensor over half a gigabyte is split: values of one tag follow each other, each with all dims and a part of the
content. After the last value may stand `crc_num` and ten bytes, the CRC-32 of all before (big-endian).

Every length is checked against what holds it and every count is bounded, so a file cannot ask for more memory than
it has bytes.
"""

from __future__ import annotations

import binascii
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rcnn.errors import CheckpointError, Problem

_MOST_VALUES = 200_000
_MOST_FIELDS = 64
_MOST_DIMS = 16
_LONGEST_NAME = 4096
_CRC_MARK, _CRC_BYTES = b"crc_num", 10

_TYPES: dict[str, tuple[str, torch.dtype | None]] = {
    # Ours after numpy's: None where the two are one.
    "Int8": ("<i1", None),
    "UInt8": ("<u1", None),
    "Int16": ("<i2", None),
    "Int32": ("<i4", None),
    "Int64": ("<i8", None),
    "Float16": ("<f2", None),
    "Float32": ("<f4", None),
    "Float64": ("<f8", None),
    "Bool": ("<u1", torch.bool),
    "BFloat16": ("<i2", torch.bfloat16),
}
_TEXT = "str"


@dataclass(frozen=True, kw_only=True)
class MindSporeFile:
    """Tensors in the file's own types and order, and the texts that were appended."""

    tensors: dict[str, Tensor]
    texts: dict[str, str]


@dataclass(kw_only=True)
class _Entry:
    """What the values of one tag say together."""

    dims: tuple[int, ...]
    type: str
    parts: list[memoryview] = field(default_factory=list)


class _Field(NamedTuple):
    number: int
    value: int | memoryview


class _Malformed(Exception):
    """What is wrong with the bytes, for the message."""


def is_mindspore(start: bytes) -> bool:
    """Whether a file that begins so (some hundred bytes) is one: a value, in it a printable tag, then a tensor."""
    try:
        if start[:1] != b"\x0a":
            return False
        _, place = _varint(memoryview(start), 1)
        if start[place : place + 1] != b"\x0a":
            return False
        length, place = _varint(memoryview(start), place + 1)
        name, rest = start[place : place + length], start[place + length :]
        return 0 < length <= _LONGEST_NAME and name.decode().isprintable() and rest[:1] in (b"\x12", b"\x1a", b"")
    except (_Malformed, UnicodeDecodeError):
        return False


def read_mindspore(path: Path) -> MindSporeFile:
    """What the file holds. Raises `CheckpointError` where it cannot be read, is damaged or holds what is no tensor."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(Problem(where=str(path), given=f"cannot be read: {error.strerror}")) from error
    try:
        entries = _entries(_without_crc(memoryview(content)))
        tensors = {name: _tensor(name, entry) for name, entry in entries.items() if entry.type != _TEXT}
        texts = {name: _text(name, entry) for name, entry in entries.items() if entry.type == _TEXT}
    except _Malformed as error:
        allowed = "a checkpoint that MindSpore's save_checkpoint wrote"
        remedy = "take another copy of the file"
        raise CheckpointError(Problem(where=str(path), given=str(error), allowed=allowed, remedy=remedy)) from error
    return MindSporeFile(tensors=tensors, texts=texts)


def _without_crc(content: memoryview) -> memoryview:
    """The messages alone, after a look at their checksum where there is one."""
    end = len(content) - _CRC_BYTES - len(_CRC_MARK)
    if end < 0 or content[end : end + len(_CRC_MARK)] != _CRC_MARK:
        return content
    stated = int.from_bytes(content[-_CRC_BYTES:], "big")
    if binascii.crc32(content[:end]) != stated:
        raise _Malformed("damaged: its content is not that of its checksum")
    return content[:end]


def _entries(content: memoryview) -> dict[str, _Entry]:
    entries: dict[str, _Entry] = {}
    last = None
    for count, (number, value) in enumerate(_fields(content)):
        if count >= _MOST_VALUES:
            raise _Malformed(f"more than {_MOST_VALUES} values")
        if number != 1 or isinstance(value, int):
            raise _Malformed(f"field {number} where a value is expected")
        name, part = _value(value)
        if name == last:
            entry = entries[name]
            if (entry.dims, entry.type) != (part.dims, part.type):
                raise _Malformed(f"{name}: parts of different shapes or types")
            entry.parts += part.parts
        elif name in entries:
            raise _Malformed(f"{name}: there twice")
        else:
            entries[name] = part
        last = name
    if not entries:
        raise _Malformed("holds no tensor")
    return entries


def _value(message: memoryview) -> tuple[str, _Entry]:
    name, entry = None, None
    for number, value in _few_fields(message):
        if number == 1 and not isinstance(value, int):
            name = _utf8(value, _LONGEST_NAME)
        elif number == 2 and not isinstance(value, int):
            entry = _tensor_message(value)
        elif number == 3:
            raise _Malformed(f"{name or 'a value'}: a hash table, which no detector has")
    if name is None or entry is None:
        raise _Malformed(f"{name or 'a value'}: a name without a tensor, or a tensor without a name")
    return name, entry


def _tensor_message(message: memoryview) -> _Entry:
    dims: list[int] = []
    type_name, parts = None, []
    for number, value in _few_fields(message):
        if number == 1 and isinstance(value, int):
            dims.append(value)
        elif number == 2 and not isinstance(value, int):
            type_name = _utf8(value, 64)
        elif number == 3 and not isinstance(value, int):
            parts.append(value)
    if type_name is None or len(dims) > _MOST_DIMS:
        raise _Malformed(f"a tensor of type {type_name} with {len(dims)} dimensions")
    return _Entry(dims=tuple(dims), type=type_name, parts=parts)


def _tensor(name: str, entry: _Entry) -> Tensor:
    if entry.type not in _TYPES:
        raise _Malformed(f"{name}: of type {entry.type}, known are {', '.join(_TYPES)}")
    layout, dtype = _TYPES[entry.type]
    given = sum(len(part) for part in entry.parts)
    size = np.dtype(layout).itemsize
    # Older releases write one number as of shape (0,).
    dims = () if entry.dims == (0,) and given == size else entry.dims
    if any(side < 0 for side in dims) or math.prod(dims) * size != given:
        raise _Malformed(f"{name}: {given} bytes for {entry.type} of shape {entry.dims}")
    if not given:
        return torch.empty(dims, dtype=dtype or torch.from_numpy(np.empty(0, layout)).dtype)
    values = torch.from_numpy(np.frombuffer(bytearray().join(entry.parts), dtype=layout))
    if dtype == torch.bool:
        values = values != 0
    elif dtype is not None:
        values = values.view(dtype)
    return values.reshape(dims)


def _text(name: str, entry: _Entry) -> str:
    try:
        return b"".join(entry.parts).decode("utf-32-le")
    except UnicodeDecodeError as error:
        raise _Malformed(f"{name}: no text ({error.reason})") from error


# -------------------------------------------------------------------------------------------------------- wire format


def _few_fields(message: memoryview) -> Iterator[_Field]:
    for count, one in enumerate(_fields(message)):
        if count >= _MOST_FIELDS:
            raise _Malformed(f"a message of more than {_MOST_FIELDS} fields")
        yield one


def _fields(message: memoryview) -> Iterator[_Field]:
    """The fields of a message in order: numbers, and bytes as views into it."""
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, place = _varint(message, place)
            yield _Field(number, value)
            continue
        if wire != 2:
            raise _Malformed(f"wire type {wire} at byte {place}")
        length, place = _varint(message, place)
        if not 0 <= length <= len(message) - place:
            raise _Malformed(f"truncated: {length} bytes stated, {len(message) - place} there")
        yield _Field(number, message[place : place + length])
        place += length


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    """A number of seven bits a byte, least first, and the place after it; signed as int64 is."""
    value = 0
    for count in range(10):
        if place + count >= len(message):
            raise _Malformed("truncated within a number")
        byte = message[place + count]
        value |= (byte & 0x7F) << (7 * count)
        if byte < 0x80:
            value &= (1 << 64) - 1
            return (value - (1 << 64) if value >> 63 else value), place + count + 1
    raise _Malformed("a number of more than ten bytes")


def _utf8(value: memoryview, longest: int) -> str:
    if len(value) > longest:
        raise _Malformed(f"a name of {len(value)} bytes")
    try:
        return bytes(value).decode()
    except UnicodeDecodeError as error:
        raise _Malformed("a name that is no UTF-8") from error
