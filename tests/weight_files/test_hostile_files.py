"""Hundreds of files that are damaged or made to harm: each is refused with an error of ours, or harmless and read.

Nothing is run (a file that would be made is not there, no module is imported), no memory is reserved for what a file
merely states, and every value of what is read can be looked at.
"""

from __future__ import annotations

import builtins
import codecs
import collections
import io
import os
import pickle
import random
import resource
import struct
import sys
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from foreign_bytes import (
    array,
    call,
    mapping,
    name,
    pickled,
    safetensors_file,
    storage,
    tensor,
    torch_legacy,
    torch_zip,
    value,
)

from rcnn.converters.interface import ForeignFile
from rcnn.errors import CheckpointError
from rcnn.weight_files.reading import read_foreign

MEGABYTE = 1 << 20


class Guard:
    """Reads a file: the tensors' sum where it can be read, else the text of our error."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.canary = folder / "canary"
        self.modules = set(sys.modules)

    def read(self, content: bytes, suffix: str = ".pth") -> ForeignFile | str:
        path = self.folder / f"file{suffix}"
        path.write_bytes(content)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        tracemalloc.start()
        try:
            found = read_foreign(path)
            for each in found.tensors.values():
                each.sum()
            assert all(isinstance(text, str) and text.isprintable() for text in found.tensors)
            repr(found.meta)
            return found
        except CheckpointError as error:
            assert all(problem.where.startswith(str(path)) for problem in error.problems)
            assert str(error).isascii()
            return str(error)
        finally:
            python_bytes = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
            assert python_bytes < 8 * MEGABYTE + 100 * len(content)
            assert grown < 100 * MEGABYTE + 100 * len(content)
            assert not self.canary.exists()
            assert set(sys.modules) <= self.modules

    def refused(self, content: bytes, suffix: str = ".pth") -> str:
        found = self.read(content, suffix)
        assert isinstance(found, str), found
        return found


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is imported on first use, is."""
    codecs.lookup("cp437")  # of names in an archive that do not say that they are UTF-8
    for content in HONEST.values():
        path = tmp_path_factory.mktemp("warm") / "file.pth"
        path.write_bytes(content())
        for each in read_foreign(path).tensors.values():
            each.sum()
        path.write_bytes(content()[:-9])
        with pytest.raises(CheckpointError):
            read_foreign(path)


@pytest.fixture
def guard(warm: None, tmp_path: Path) -> Guard:
    return Guard(tmp_path)


# ------------------------------------------------------------------------------------------------- damage, by chance


def saved(content: object, zipped: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def training() -> dict[str, object]:
    torch.manual_seed(0)
    weight = torch.randn(3, 4)
    state = collections.OrderedDict(
        {"conv.weight": weight, "tied": weight, "bn.num": torch.tensor(5), "h": weight.half()}
    )
    state = collections.OrderedDict(state)
    return {"state_dict": state, "meta": {"CLASSES": ("a", "b"), "seed": np.int64(3), "loss": [0.5] * 9}, "epoch": 1}


def arrays(protocol: int) -> bytes:
    state = {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.arange(3), "c": np.float32(1)}
    return pickle.dumps({"model": {"a": state["a"], "b": state["b"]}, "__author__": "x"}, protocol=protocol)


HONEST: dict[str, Callable[[], bytes]] = {
    "zip": lambda: saved(training(), zipped=True),
    "legacy": lambda: saved(training(), zipped=False),
    "pickle of protocol 2": lambda: arrays(2),
    "pickle of protocol 5": lambda: arrays(5),
    "safetensors": lambda: safetensors.torch.save({"a": torch.arange(6.0), "b": torch.ones(2).half()}, {"x": "y"}),
}


def cut(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(len(content))]


def flip(content: bytes, chance: random.Random) -> bytes:
    found = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 4))):
        found[chance.randrange(len(found))] ^= 1 << chance.randrange(8)
    return bytes(found)


def overwrite(content: bytes, chance: random.Random) -> bytes:
    """A length, if it hits one, that is as large, as negative or as small as can be."""
    field = chance.choice((b"\xff" * 8, b"\xff\xff\xff\x7f", b"\xff" * 7 + b"\x7f", bytes(8), b"\xff" * 2))
    place = chance.randrange(len(content))
    return content[:place] + field + content[place + len(field) :]


def shuffle(content: bytes, chance: random.Random) -> bytes:
    """A part of the file at another place."""
    start, length = chance.randrange(len(content)), chance.randrange(1, 40)
    part, rest = content[start : start + length], content[:start] + content[start + length :]
    place = chance.randrange(len(rest))
    return rest[:place] + part + rest[place:]


MUTATIONS = (cut, flip, overwrite, shuffle)
SEEDS = 25


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
@pytest.mark.parametrize("kind", HONEST)
def test_damage(guard: Guard, kind: str, mutation: Callable[[bytes, random.Random], bytes]) -> None:
    content = HONEST[kind]()
    assert isinstance(guard.read(content), ForeignFile)
    results = [guard.read(mutation(content, random.Random(seed))) for seed in range(SEEDS)]
    if mutation is cut:
        assert all(isinstance(result, str) for result in results)


def test_there_are_hundreds_of_files() -> None:
    assert len(HONEST) * len(MUTATIONS) * SEEDS + len(HOSTILE) >= 500 + 60


# --------------------------------------------------------------------------------------------------- harm, on purpose


class Runs:
    """Pickled, it makes a folder when it is read by Python's own unpickler."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_the_canary_would_sing(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Runs(tmp_path / "canary")))
    assert (tmp_path / "canary").is_dir()


@pytest.mark.parametrize("zipped", [True, False, None])
def test_code_beside_the_weights(guard: Guard, zipped: bool | None) -> None:
    content = {"model": {"a": torch.zeros(2) if zipped is not None else np.zeros(2)}, "meta": Runs(guard.canary)}
    evil = pickle.dumps(content) if zipped is None else saved(content, zipped)
    assert f"it wants {os.mkdir.__module__}.mkdir, which is no data and could run code" in guard.refused(evil)


def test_code_by_every_operation_that_calls(guard: Guard) -> None:
    source = f"open({str(guard.canary)!r}, 'w')"
    run = value(source)
    evil = {
        "reduce": call(name("builtins", "exec"), run),
        "nested": call(call(name("builtins", "getattr"), name("builtins", "__import__"), value("eval")), run),
        "attribute": call(call(name("builtins", "getattr"), call(name("builtins", "__import__"), value("os"))), run),
        "object": b"(" + name("builtins", "eval") + run + b"o",
        "instance": b"(" + run + b"ibuiltins\nexec\n",
        "new": name("builtins", "eval") + b"(" + run + b"t\x81",
        "stack": value("builtins") + value("exec") + b"\x93(" + run + b"tR",
        "state": name("mymodule", "Thing") + b")\x81" + mapping(__class__=name("os", "system")) + b"b",
        "reconstructed": call(name("copy_reg", "_reconstructor"), name("os", "system"), name("os", "x"), b"N"),
        "partial": call(name("functools", "partial"), name("os", "system"), run),
        "factory": call(name("collections", "defaultdict"), name("os", "system")) + run + b"N" + b"s",
        "rebuilt": call(
            name("torch._tensor", "_rebuild_from_type_v2"), name("os", "system"), name("torch", "Tensor"),
            b"(" + run + b"t", b"}",
        ),
        "after the end": b"}" + b"." + call(name("builtins", "exec"), run),
    }  # fmt: skip
    for how, operations in evil.items():
        for content in (torch_zip(mapping(model=mapping(a=tensor()), x=operations)), pickled(operations)):
            error = guard.refused(content)
            assert how == "after the end" or "it wants " in error, how
    assert builtins.exec.__module__ == "builtins"


def changed_directory(content: bytes, change: Callable[[bytearray, int], None]) -> bytes:
    """The archive with the entry of data/0 in its directory changed; `change` gets its start."""
    found = bytearray(content)
    place = content.rindex(b"archive/data/0") - 46
    assert found[place : place + 4] == b"PK\x01\x02"
    change(found, place)
    return bytes(found)


def set_sizes(size: int) -> Callable[[bytearray, int], None]:
    return lambda found, place: struct.pack_into("<II", found, place + 20, size, size)


def set_offset(offset: int) -> Callable[[bytearray, int], None]:
    return lambda found, place: struct.pack_into("<I", found, place + 42, offset)


def overlapping() -> bytes:
    """Two records of 4000 numbers in the same bytes: a directory of many would be a bomb."""
    content = torch_zip(mapping(a=tensor()), {"data/0": bytes(16000), "data/1": bytes(16000)})
    found = bytearray(content)
    first, second = (content.rindex(f"archive/data/{key}".encode()) - 46 for key in "01")
    found[second + 42 : second + 46] = found[first + 42 : first + 46]
    return bytes(found)


def appended(content: bytes, record: str) -> bytes:
    buffer = io.BytesIO(content)
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "a") as archive:
        warnings.simplefilter("ignore", UserWarning)  # of a name that is there twice
        archive.writestr(record, bytes(24))
    return buffer.getvalue()


def laughs(depth: int) -> bytes:
    """A list of ten lists of ten lists ..."""
    operations = b"]q\x00(" + value("ha") * 10 + b"e"
    for level in range(depth):
        operations += b"0" + b"]q" + bytes((level + 1,)) + b"(" + (b"h" + bytes((level,))) * 10 + b"e"
    return operations


def many_names() -> bytes:
    """Ten thousand tensors of one storage: as float32 each would be its own."""
    half = tensor(storage("HalfStorage", elements=100_000), shape=(100_000,), stride=(1,)) + b"q\x00"
    entries = b"".join(value(f"w{index}") + b"h\x00" for index in range(10_000))
    return torch_zip(b"}(" + value("first") + half + entries + b"u", {"data/0": bytes(200_000)})


def nested_json(depth: int) -> bytes:
    return b'{"a":' + b"[" * depth + b"]" * depth + b"}"


def entry(**changes: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


SIX = mapping(a=tensor())
HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    # Tensors that reach beyond their storages, or say what cannot be.
    "negative size": (lambda: torch_zip(mapping(a=tensor(shape=(-2, 3)))), "negative, too large or no whole number"),
    "negative stride": (lambda: torch_zip(mapping(a=tensor(stride=(3, -1)))), "negative, too large or no"),
    "negative offset": (lambda: torch_zip(mapping(a=tensor(offset=-1))), "negative, too large or no whole number"),
    "beyond by offset": (lambda: torch_zip(mapping(a=tensor(offset=1))), "ends at element 7 of a storage of 6"),
    "beyond by stride": (lambda: torch_zip(mapping(a=tensor(stride=(4, 1)))), "ends at element 7 of a storage of 6"),
    "beyond by shape": (lambda: torch_zip(mapping(a=tensor(shape=(3, 3)))), "ends at element 9 of a storage of 6"),
    "stride that wraps": (lambda: torch_zip(mapping(a=tensor(stride=(2**63, 1)))), "negative, too large or no"),
    "size that wraps": (lambda: torch_zip(mapping(a=tensor(shape=(2**40, 2**40), stride=(0, 0)))), "too large"),
    "size of text": (lambda: torch_zip(mapping(a=tensor(shape=("2", 3)))), "no whole number"),
    "size of truth": (lambda: torch_zip(mapping(a=tensor(shape=(True, 3)))), "no whole number"),
    "size of a fraction": (lambda: torch_zip(mapping(a=tensor(shape=(2.0, 3)))), "no whole number"),
    "too many dimensions": (lambda: torch_zip(mapping(a=tensor(shape=(1,) * 99, stride=(1,) * 99))), "at most 32"),
    "strides for others": (lambda: torch_zip(mapping(a=tensor(stride=(1,)))), "2 dimensions and 1 strides"),
    "one number, a terabyte": (
        lambda: torch_zip(mapping(a=tensor(shape=(2**38,), stride=(0,)))), "tensors of 1099511627776 bytes in a file",
    ),
    "ten thousand names": (many_names, "tensors of 2000200000 bytes in a file of"),
    "no storage": (lambda: torch_zip(mapping(a=tensor(value("0")))), "a tensor without a storage"),
    "storage of no kind": (lambda: torch_zip(mapping(a=tensor(storage("Evil")))), "a storage of an unknown kind"),
    "storage elsewhere": (lambda: torch_zip(mapping(a=value("/etc/passwd") + b"Q")), "refers to what is no storage"),
    "storage without end": (
        lambda: torch_zip(mapping(a=tensor(storage(elements=2**40)))), "has 24 bytes where it needs 4398046511104",
    ),
    "storage of less": (lambda: torch_zip(mapping(a=tensor(storage(elements=7)))), "24 bytes where it needs 28"),
    "storage of another type": (lambda: torch_zip(mapping(a=tensor(storage("DoubleStorage")))), "24 bytes where it"),
    "storage of minus one": (lambda: torch_zip(mapping(a=tensor(storage(elements=-1)))), "negative, too large or no"),
    "record missing": (lambda: torch_zip(SIX, {}), "a: damaged (its record is missing)"),
    "record outside": (
        lambda: torch_zip(mapping(a=tensor(storage(key="../../../etc/passwd")))), "a: damaged (its record is missing)",
    ),
    "tensor in a plain pickle": (lambda: pickled(SIX), "it refers to data outside of it"),
    # Archives.
    "no description": (lambda: torch_zip(b""), "IndexError"),
    "sizes of the directory": (lambda: changed_directory(torch_zip(SIX), set_sizes(2**31)), "longer than the file"),
    "less than the record": (lambda: changed_directory(torch_zip(SIX), set_sizes(3)), "3 bytes where it needs 24"),
    "record at another place": (lambda: changed_directory(torch_zip(SIX), set_offset(7)), "a: damaged"),
    "record behind the end": (lambda: changed_directory(torch_zip(SIX), set_offset(2**31)), "a: damaged"),
    "records in each other": (overlapping, "a: damaged"),
    "two of one name": (lambda: appended(torch_zip(SIX), "archive/data/0"), "several records of one name"),
    "bomb": (
        lambda: torch_zip(SIX, {"data/0": bytes(20 * MEGABYTE)}, zipfile.ZIP_DEFLATED), "packed or encrypted records",
    ),
    "bomb of another kind": (lambda: torch_zip(SIX, {"data/0": bytes(24)}, zipfile.ZIP_LZMA), "packed or encrypted"),
    "big-endian": (lambda: torch_zip(SIX).replace(b"little", b"bigger"), "BadZipFile"),
    "two descriptions": (lambda: appended(torch_zip(SIX), "other/data.pkl"), "a zip archive with 2 files data.pkl"),
    # Files of before 1.6.
    "legacy without end": (
        lambda: torch_legacy(mapping(a=tensor(storage(elements=2**40))), {"0": (2**40, bytes(24))}), "ends within a",
    ),
    "legacy of two lengths": (
        lambda: torch_legacy(mapping(a=tensor(), b=tensor(storage(elements=2**40)))), "a storage of two lengths",
    ),
    "legacy of minus one": (lambda: torch_legacy(SIX, {"0": (-1, bytes(24))}), "storage of -1 elements where its"),
    "legacy with other keys": (lambda: torch_legacy(SIX, keys=["1"]), "storages that the file does not describe"),
    "legacy without keys": (lambda: torch_legacy(SIX, keys=[]), "a: damaged (its elements are missing)"),
    "legacy view beyond": (
        lambda: torch_legacy(mapping(a=tensor(storage(view=("v", 3, 4))))), "a view of 4 elements from 3 of a storage",
    ),
    "legacy view of text": (lambda: torch_legacy(mapping(a=tensor(storage(view="v")))), "a view that is none"),
    # Arrays.
    "array of less": (lambda: pickled(mapping(model=mapping(a=array(shape=(3,))))), "8 bytes where it needs 12"),
    "array without end": (lambda: pickled(mapping(model=mapping(a=array(shape=(2**40,))))), "where it needs 439804651"),
    "array of minus one": (lambda: pickled(mapping(model=mapping(a=array(shape=(-2,))))), "negative, too large or no"),
    "array of objects": (lambda: pickled(mapping(model=mapping(a=array("O8")))), "numpy.ndarray without numbers"),
    "array of an odd order": (lambda: pickled(mapping(model=mapping(a=array(order="evil")))), "a state of what has"),
    # Names.
    "name of bytes": (lambda: torch_zip(b"}" + b"C\x02\xff\xfe" + tensor() + b"s"), "a tensor named"),
    "name of a number": (lambda: torch_zip(b"}" + value(1) + tensor() + b"s"), "a tensor named '1'"),
    "name that paints": (lambda: torch_zip(b"}" + value("\x1b[31m") + tensor() + b"s"), "a tensor named '\\x1b[31m'"),
    "name without end": (lambda: torch_zip(b"}" + value("a" * 9999) + tensor() + b"s"), "of at most 500 characters"),
    "name that is no text": (lambda: torch_zip(b"}X\x02\0\0\0\xff\xfe" + tensor() + b"s"), "UnicodeDecodeError"),
    # Values beside the weights.
    "ten to the thirty": (lambda: torch_zip(mapping(model=SIX, meta=laughs(30))), "unfold into far more than"),
    "a list in a list": (lambda: torch_zip(mapping(model=SIX, meta=b"]" * 9999 + b"a" * 9998)), "nested more than 50"),
    "a tuple in a tuple": (lambda: torch_zip(mapping(model=SIX, meta=b")" + b"\x85" * 20_000)), "nested more than"),
    "a state that is itself": (lambda: pickled(b"}q\x00" + value("model") + b"h\x00s"), "holds no state dict"),
    # safetensors.
    "header without end": (lambda: struct.pack("<Q", 2**63) + b'{"a":1}', "truncated"),
    "header that is short": (lambda: safetensors_file({"a": entry()}, bytes(4)), "truncated"),
    "header with more behind": (lambda: safetensors_file({"a": entry()}, bytes(12)), "damaged"),
    "header in a header": (lambda: safetensors_file(nested_json(100_000)), "damaged: its header cannot be read"),
    "header that is a list": (lambda: safetensors_file(b"{}"[:1] + b'"a":[]}'), "its header cannot be read"),
    "header with metadata of none": (lambda: safetensors_file({"__metadata__": [1]}), "its header cannot be read"),
    "header with metadata of numbers": (lambda: safetensors_file({"__metadata__": {"a": 1}}), "cannot be read"),
    "header with another shape": (lambda: safetensors_file({"a": entry(shape=[3])}, bytes(8)), "damaged"),
    "header with a shape that wraps": (lambda: safetensors_file({"a": entry(shape=[2**63, 2])}, bytes(8)), "damaged"),
    "header with an odd type": (lambda: safetensors_file({"a": entry(dtype="X9")}, bytes(8)), "damaged"),
    "header that overlaps": (lambda: safetensors_file({"a": entry(), "b": entry()}, bytes(8)), "damaged"),
    "header with a name that paints": (lambda: safetensors_file({"\x1b[2J": entry()}, bytes(8)), "a tensor named"),
    "header of ours, wrong": (lambda: safetensors_file({"__metadata__": {"system": "rcnn"}}), "already"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_harm(guard: Guard, case: str) -> None:
    make, given = HOSTILE[case]
    assert given in guard.refused(make())


def test_names_in_an_archive_are_no_paths(guard: Guard) -> None:
    """Nothing is unpacked: what would lie elsewhere is not looked at."""
    found = guard.read(torch_zip(SIX, {"data/0": bytes(24), "../../canary": b"x", "/tmp/canary": b"x"}))
    assert isinstance(found, ForeignFile)
    assert not (guard.folder.parent / "canary").exists()


def test_a_header_is_bounded_however_long_the_file_is(guard: Guard) -> None:
    path = guard.folder / "file.safetensors"
    with path.open("wb") as file:  # a sparse file
        file.write(struct.pack("<Q", 1 << 30) + b'{"')
        file.truncate(2 << 30)
    with pytest.raises(CheckpointError, match="a header of 1073741824 bytes, at most 16777216 are read"):
        read_foreign(path)


@pytest.fixture(autouse=True)
def no_leak() -> Iterator[None]:
    yield
    assert not tracemalloc.is_tracing()
