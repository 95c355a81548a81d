"""Files of other systems, read without running anything in them.

What a file is, its first bytes say: a zip archive or a row of pickles of `torch.save`, a plain pickle (detectron2 and
Detectron), safetensors (timm) or MindSpore's protobuf (`mindspore_file`). Pickles go through a machine of our own
(`pickles`) and not through `torch.load`: `weights_only=True` trusts the lengths that a file states, and refuses
MMDetection's files for what lies beside the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from rcnn.errors import CheckpointError, Problem
from rcnn.weight_files import pickles
from rcnn.weight_files.foreign_file import ForeignFile
from rcnn.weight_files.mindspore_file import is_mindspore, read_mindspore
from rcnn.weight_files.pickled_values import (
    Attributed,
    Budget,
    Inert,
    PickledArray,
    PickledStorage,
    PickledTensor,
    printable,
)
from rcnn.weight_files.plain_values import plain_values
from rcnn.weight_files.safetensors_header import read_header
from rcnn.weight_files.torch_files import LEGACY_START, ZIP_START, TorchFile, open_torch_legacy, open_torch_zip

# Where systems keep the weights in their files, the first that is there. torch.save of a state dict has none of these.
WRAPPINGS = ("state_dict", "model", "model_state_dict", "net", "params", "blobs", "model_ema", "state_dict_ema", "ema")
# What wrappers of a model put before every name, the outer first: torch.compile, DataParallel.
_PREFIXES = ("_orig_mod.", "module.", "_orig_mod.")
_LONGEST_NAME = 500
_COPIES = 4
"""How many times the size of the file its tensors may have: those that share their elements, or repeat them."""
_SLACK = 1 << 20
_SHARED = 50_000

_Lazy = PickledTensor | PickledArray
_ReadStorage = Callable[[PickledStorage], Tensor]


def read_foreign(source: Path) -> ForeignFile:
    """`read_as_named`, without a prefix that all names have from a wrapper of the model; `notes` say so."""
    return _without_prefixes(read_as_named(source))


def read_as_named(source: Path) -> ForeignFile:
    """The tensors of the file and the plain values beside them, also of a whole training.

    Tensors are on the CPU, contiguous, with the names of the file. Those of half precision become float32, others keep
    their type. Raises `CheckpointError` for a file that is none, that is ours already, that is damaged, or that wants
    to run code, with the name of what it wanted.
    """
    if not source.is_file():
        given = "this is a folder" if source.is_dir() else "there is no such file"
        raise CheckpointError(Problem(where=str(source), given=given, remedy="check the path"))
    try:
        with source.open("rb") as file:
            start = file.read(512)
        return _read_by_content(source, start)
    except OSError as error:
        raise CheckpointError(Problem(where=str(source), given=f"cannot be read: {error.strerror}")) from error


def _read_by_content(source: Path, start: bytes) -> ForeignFile:
    if start.startswith(ZIP_START):
        return _read_torch(source, open_torch_zip)
    if start.startswith(LEGACY_START):
        return _read_torch(source, open_torch_legacy)
    if start.startswith(pickles.STARTS):
        return _read_pickle(source)
    if start[8:9] == b"{":
        return _read_safetensors(source)
    if is_mindspore(start):
        return _read_mindspore(source)
    known = {b"": "an empty file", b"version https://git-lfs": "a pointer of Git LFS", b"<": "a page of the web"}
    what = next((text for begin, text in known.items() if start.startswith(begin) and (begin or not start)), None)
    given = f"not a file of weights{f' ({what})' if what else ''}"
    allowed = "torch.save (.pth), a pickle of protocol 2 or newer (.pkl), safetensors, MindSpore (.ckpt)"
    raise CheckpointError(Problem(where=str(source), given=given, allowed=allowed, remedy="take another copy of it"))


def _read_safetensors(source: Path) -> ForeignFile:
    header = read_header(source)
    meta = header.get("__metadata__", {})
    if meta.get("system") == "rcnn":
        given = "a checkpoint of rcnn already"
        raise CheckpointError(
            Problem(where=str(source), given=given, remedy="it is used as it is: rcnn predict, rcnn train --init-from")
        )
    try:
        tensors = safetensors.torch.load_file(source, device="cpu", backend="pread")
    except Exception as error:  # of a type that torch lacks, a shape that does not fit: the library has no one error
        given = f"damaged ({printable(error)})"
        raise CheckpointError(
            Problem(where=str(source), given=given, remedy="take another copy of the file")
        ) from error
    _refuse(list(_odd_names(source, tensors)))
    usable = {name: _usable(value) for name, value in tensors.items()}
    return ForeignFile(path=source, tensors=usable, meta=meta)


def _read_mindspore(source: Path) -> ForeignFile:
    found = read_mindspore(source)
    tensors = {name: _usable(value) for name, value in found.tensors.items()}
    return ForeignFile(path=source, tensors=tensors, meta=found.texts)


def _read_pickle(source: Path) -> ForeignFile:
    size = source.stat().st_size
    budget = Budget(_COPIES * size + _SLACK)
    with source.open("rb") as file:
        value = pickles.read_pickle(pickles.BoundedReader(file, size), where=str(source), budget=budget)

    def read_storage(storage: PickledStorage) -> Tensor:
        raise ValueError("a tensor of torch, which keeps its elements elsewhere")

    return _foreign(source, value, read_storage)


def _read_torch(source: Path, opened: Callable[[Path, Budget], AbstractContextManager[TorchFile]]) -> ForeignFile:
    with opened(source, Budget(_COPIES * source.stat().st_size + _SLACK)) as file:
        return _foreign(source, file.value, file.read_storage)


def _foreign(source: Path, value: object, read_storage: _ReadStorage) -> ForeignFile:
    """The weights within what a pickle holds, and what is plain beside them."""
    state, beside = _find_state(source, value)
    lazy = {name: entry for name, entry in state.items() if isinstance(entry, _Lazy)}
    _refuse([*_odd_names(source, lazy), *_unreadable(source, state)])
    total, size = sum(entry.num_bytes for entry in lazy.values()), source.stat().st_size
    if total > _COPIES * size + _SLACK:
        given = f"tensors of {total} bytes in a file of {size}"
        raise CheckpointError(Problem(where=str(source), given=given, remedy="take another copy of the file"))
    try:
        among = {name: entry for name, entry in state.items() if name not in lazy}
        # A value takes a byte at least, but for those that are there several times.
        meta = plain_values({**among, **beside}, most=size + _SHARED)
    except ValueError as error:
        raise CheckpointError(Problem(where=str(source), given=f"values beside the weights: {error}")) from error
    return ForeignFile(path=source, tensors=_tensors(source, lazy, read_storage), meta=meta)


def _tensors(source: Path, lazy: Mapping[object, _Lazy], read_storage: _ReadStorage) -> dict[str, Tensor]:
    """The elements of every tensor, each storage read once; all that cannot be read are reported together."""
    storages: dict[str, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    problems = []

    def read_once(storage: PickledStorage) -> Tensor:
        if storage.key not in storages:
            storages[storage.key] = read_storage(storage)
        return storages[storage.key]

    for name, entry in lazy.items():
        try:
            tensor = entry.to_tensor() if isinstance(entry, PickledArray) else entry.to_tensor(read_once)
            tensors[str(name)] = _usable(tensor)
        except Exception as error:  # damage that the descriptions did not show: an archive's sum, a type's size
            problems.append(_damaged(f"{source}: {name}", error))
    _refuse(problems)
    return tensors


def _damaged(where: str, error: Exception) -> Problem:
    return Problem(where=where, given=f"damaged ({printable(error)})", remedy="take another copy of the file")


def _find_state(source: Path, value: object) -> tuple[Mapping[object, object], dict[object, object]]:
    """The mapping of names to tensors, and what is beside it on the way there."""
    if isinstance(value, Mapping):
        for key in WRAPPINGS:
            if isinstance(inner := value.get(key), Mapping) and _holds_tensors(inner):
                beside = {name: entry for name, entry in value.items() if name != key}
                return _deepest(inner, beside)
        if _holds_tensors(value, depth=0):
            return _deepest(value, {})
    objects = [value, *(value.get(key) for key in WRAPPINGS)] if isinstance(value, Mapping) else [value]
    foreign = next((entry.name for entry in objects if isinstance(entry, Inert)), None)
    if foreign:
        given = f"its weights are inside an object of {printable(foreign)}, which only its own code can read"
        remedy = "where it was made, save the weights alone: torch.save(model.state_dict(), FILE)"
    else:
        given, remedy = "the file holds no state dict", "give the file that has the weights"
    allowed = f"names and tensors, bare or under {', '.join(WRAPPINGS)}"
    raise CheckpointError(Problem(where=str(source), given=given, allowed=allowed, remedy=remedy))


def _deepest(state: Mapping[object, object], beside: dict[object, object]) -> tuple[Mapping, dict[object, object]]:
    """A state dict within a state dict (`{'model': {'state_dict': ...}}`), and torch's notes on its modules."""
    for key in WRAPPINGS:
        if isinstance(inner := state.get(key), Mapping) and _holds_tensors(inner, depth=0):
            return _deepest(inner, {**{name: entry for name, entry in state.items() if name != key}, **beside})
    versions = state.attributes.get("_metadata") if isinstance(state, Attributed) else None
    return state, {**beside, "_metadata": versions} if isinstance(versions, Mapping) else beside


def _holds_tensors(state: Mapping[object, object], depth: int = 1) -> bool:
    if any(isinstance(entry, _Lazy) for entry in state.values()):
        return True
    inner = [state.get(key) for key in WRAPPINGS]
    return depth > 0 and any(isinstance(entry, Mapping) and _holds_tensors(entry, depth - 1) for entry in inner)


def _odd_names(source: Path, names: Iterable[object]) -> Iterator[Problem]:
    for name in names:
        if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= _LONGEST_NAME:
            allowed = f"printable text of at most {_LONGEST_NAME} characters"
            yield Problem(where=str(source), given=f"a tensor named '{printable(name)}'", allowed=allowed)


def _unreadable(source: Path, state: Mapping[object, object]) -> Iterator[Problem]:
    """What stands among the tensors and is none: leaving it out would be leaving out weights."""
    for name, entry in state.items():
        what = entry.name if isinstance(entry, Inert) else "numpy.ndarray without numbers"
        if isinstance(entry, Inert) or (isinstance(entry, PickledArray) and entry.dtype is None):
            given = f"an object of {printable(what)} among the weights, which only its own code can read"
            yield Problem(where=f"{source}: {printable(name)}", given=given, allowed="a tensor or an array of numbers")


def _refuse(problems: list[Problem]) -> None:
    if problems:
        raise CheckpointError(problems)


def _without_prefixes(file: ForeignFile) -> ForeignFile:
    """The file with names that lack what a wrapper of the model put before each, and a note for what was taken off."""
    for prefix in _PREFIXES:
        if file.tensors and all(name.startswith(prefix) for name in file.tensors):
            versions = file.meta.get("_metadata")
            meta = dict(file.meta)
            if isinstance(versions, Mapping):
                meta["_metadata"] = {str(name).removeprefix(prefix): version for name, version in versions.items()}
            note = f"every name began with {prefix}, as a wrapper of the model adds it: taken off"
            tensors = {name.removeprefix(prefix): value for name, value in file.tensors.items()}
            file = replace(file, tensors=tensors, meta=meta, notes=(*file.notes, note))
    return file


def _usable(tensor: Tensor) -> Tensor:
    kept = (torch.float32, torch.float64)
    wide = tensor.float() if tensor.is_floating_point() and tensor.dtype not in kept else tensor
    return wide.contiguous()
