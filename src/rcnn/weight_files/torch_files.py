"""Files of `torch.save`: a zip archive of records (since torch 1.6), or one pickle after another (before).

Both keep the elements of the tensors, storage by storage, beside the pickle that describes them. A storage is read when
a tensor of it is wanted, into memory of its own, and never more than the file holds: lengths that the file states are
compared with it before anything is reserved.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO

import torch
from torch import Tensor

from rcnn.errors import CheckpointError, Problem
from rcnn.weight_files.pickled_values import Budget, PickledStorage, StorageKind, counts
from rcnn.weight_files.pickles import BoundedReader, read_pickle

ZIP_START = b"PK\x03\x04"
# A pickle of protocol 2 with torch's magic number.
LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


@dataclass(frozen=True, kw_only=True)
class TorchFile:
    """What the pickle of a file describes, and the bytes of its storages."""

    value: object
    read_storage: Callable[[PickledStorage], Tensor]


@contextmanager
def open_torch_zip(path: Path, budget: Budget) -> Iterator[TorchFile]:
    """Raises `CheckpointError` for an archive that `torch.save` did not write, or that is damaged."""
    with ExitStack() as stack:
        with _refusing_damage(path):
            archive = stack.enter_context(zipfile.ZipFile(path))
            content = _described_by_zip(path, archive, budget)
        yield content


@contextmanager
def open_torch_legacy(path: Path, budget: Budget) -> Iterator[TorchFile]:
    """Raises `CheckpointError` for a file that is damaged."""
    with path.open("rb") as file:
        with _refusing_damage(path):
            content = _described_by_pickles(path, file, budget)
        yield content


def _described_by_zip(path: Path, archive: zipfile.ZipFile, budget: Budget) -> TorchFile:
    records = _records(archive, path.stat().st_size)
    pickled = [name for name in records if name.endswith("data.pkl") and name.count("/") <= 1]
    if len(pickled) != 1:
        given = f"a zip archive with {len(pickled)} files data.pkl, which torch.save did not write"
        raise CheckpointError(Problem(where=str(path), given=given, remedy="unpack it where a checkpoint is inside"))
    folder = pickled[0].removesuffix("data.pkl")
    if f"{folder}constants.pkl" in records:
        given = "a program of TorchScript, not weights alone"
        remedy = "where it was made, save its weights: torch.save(model.state_dict(), FILE)"
        raise CheckpointError(Problem(where=str(path), given=given, remedy=remedy))
    if f"{folder}byteorder" in records and _bytes(archive, records[f"{folder}byteorder"]) != b"little":
        raise ValueError(_BIG_ENDIAN)
    description = io.BytesIO(_bytes(archive, records[pickled[0]]))
    value = read_pickle(description, where=str(path), budget=budget, load_persistent=_storage)

    def read_storage(storage: PickledStorage) -> Tensor:
        record, expected = records.get(f"{folder}data/{storage.key}"), _storage_bytes(storage)
        if record is None:
            raise ValueError("its record is missing")
        if record.file_size != expected:
            raise ValueError(f"its record has {record.file_size} bytes where it needs {expected}")
        return _read(archive, record)

    return TorchFile(value=value, read_storage=read_storage)


def _described_by_pickles(path: Path, file: BinaryIO, budget: Budget) -> TorchFile:
    source = BoundedReader(file, path.stat().st_size)
    found: dict[str, PickledStorage] = {}

    def load(identity: object) -> object:
        if isinstance(identity, tuple) and identity[:1] == ("module",):
            return identity[1]  # a class and its source, which is not read
        storage = _storage(identity)
        known = found.setdefault(storage.key, storage)
        if (known.dtype, known.whole) != (storage.dtype, storage.whole):
            raise ValueError("a storage of two lengths")
        return storage

    # A magic number, a version, what the machine was, the file's content, the keys of its storages.
    _, _, system, value, keys = (
        read_pickle(source, where=str(path), budget=budget, load_persistent=load) for _ in range(5)
    )
    if isinstance(system, dict) and system.get("little_endian") is False:
        raise ValueError(_BIG_ENDIAN)
    places = _places(source, keys, found, path.stat().st_size)
    return TorchFile(value=value, read_storage=lambda storage: _read_at(file, places, storage))


_BIG_ENDIAN = "numbers in another order of bytes than little-endian"


@contextmanager
def _refusing_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # the bytes of a damaged archive can end in any error of those who read it
        given = f"damaged, or not what it claims to be ({error if type(error) is ValueError else type(error).__name__})"
        raise CheckpointError(Problem(where=str(path), given=given, remedy="take another copy of it")) from error


def _records(archive: zipfile.ZipFile, file_size: int) -> dict[str, zipfile.ZipInfo]:
    """Name to record. All together they are not longer than the file: none is packed, none shares its bytes."""
    records = archive.infolist()
    if any(record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1 for record in records):
        raise ValueError("packed or encrypted records, where torch stores them as they are")
    if any(record.file_size != record.compress_size for record in records):
        raise ValueError("records of two lengths")
    if sum(record.file_size for record in records) > file_size:
        raise ValueError(f"records longer than the file, which has {file_size} bytes")
    named = {record.filename: record for record in records}
    if len(named) != len(records):
        raise ValueError("several records of one name")
    return named


def _read(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> Tensor:
    """The bytes of a record, checked by their sum where the file has one (torch can leave it out)."""
    if record.CRC == 0 and record.file_size:
        record.CRC = None  # pyright: ignore[reportAttributeAccessIssue]
    buffer = torch.empty(record.file_size, dtype=torch.uint8)
    with archive.open(record) as file:
        _fill(file, buffer)
    return buffer


def _bytes(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> bytes:
    return _read(archive, record).numpy().tobytes()


def _fill(file: BinaryIO | IO[bytes], buffer: Tensor) -> None:
    """Raises ValueError where the file ends before the buffer does."""
    target = memoryview(buffer.numpy())  # pyright: ignore[reportArgumentType]
    while len(target):
        chunk = file.read(min(len(target), _CHUNK))
        if not chunk:
            raise ValueError("it ends within a tensor")
        target[: len(chunk)] = chunk
        target = target[len(chunk) :]


_CHUNK = 1 << 20


def _storage(identity: object) -> PickledStorage:
    """`('storage', class, key, device, elements)`, and in old files the part that a view has. ValueError otherwise."""
    if not isinstance(identity, tuple) or len(identity) not in (5, 6) or identity[0] != "storage":
        raise ValueError("it refers to what is no storage")
    _, kind, key, _, elements, *view = identity
    if not isinstance(kind, StorageKind) or not isinstance(key, str):
        raise ValueError("a storage of an unknown kind")
    (whole,) = counts((elements,))
    start, count = 0, whole
    if view and view[0] is not None:
        if not isinstance(view[0], tuple):
            raise ValueError("a view that is none")
        _, *bounds = view[0]
        start, count = counts(bounds)
        if start + count > whole:
            raise ValueError(f"a view of {count} elements from {start} of a storage of {whole}")
    return PickledStorage(key=key, dtype=kind.dtype, whole=whole, start=start, count=count)


def _storage_bytes(storage: PickledStorage) -> int:
    return storage.whole * (storage.dtype.itemsize if storage.dtype is not None else 1)


def _places(source: BoundedReader, keys: object, found: dict[str, PickledStorage], end: int) -> dict[str, int]:
    """Where the elements of each storage begin: after its number of elements, in the order of the keys."""
    if not isinstance(keys, list) or not all(isinstance(key, str) and key in found for key in keys):
        raise ValueError("a list of storages that the file does not describe")
    places: dict[str, int] = {}
    for key in keys:
        elements = int.from_bytes(source.read(8), "little", signed=True)
        if elements != found[key].whole:
            raise ValueError(f"a storage of {elements} elements where its tensor says {found[key].whole}")
        places[key] = source.tell()
        if places[key] + _storage_bytes(found[key]) > end:
            raise ValueError("it ends within a tensor")
        source.skip(_storage_bytes(found[key]))
    return places


def _read_at(file: BinaryIO, places: dict[str, int], storage: PickledStorage) -> Tensor:
    if storage.key not in places:
        raise ValueError("its elements are missing")
    file.seek(places[storage.key])
    buffer = torch.empty(_storage_bytes(storage), dtype=torch.uint8)
    _fill(file, buffer)
    return buffer
