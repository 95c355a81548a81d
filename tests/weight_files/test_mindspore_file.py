"""MindSpore's checkpoints byte by byte: real files, files built here from the format's own rules, and damaged ones."""

from __future__ import annotations

import binascii
import random
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from rcnn.errors import CheckpointError
from rcnn.weight_files.mindspore_file import is_mindspore, read_mindspore

FILES = ["tiny.ckpt", "tiny_append_info.ckpt", "tiny_crc.ckpt"]


@pytest.fixture(scope="module")
def case(shared: Path) -> Path:
    return shared / "oracles/mindspore/tiny_ckpt"


@pytest.mark.parametrize("name", FILES)
def test_real_files(case: Path, name: str) -> None:
    found = read_mindspore(case / name)
    expected = np.load(case / "arrays.npz")
    appended = {"epoch_num", "lr", "done"} if name == "tiny_append_info.ckpt" else set()
    assert set(found.tensors) == set(expected.files) | appended
    for key in expected.files:
        torch.testing.assert_close(
            found.tensors[key].double(), torch.from_numpy(expected[key]).double(), rtol=0, atol=0
        )
    kinds = {"half": torch.float16, "ints": torch.int32, "f64": torch.float64, "flag": torch.bool}
    kinds |= {"bf16": torch.bfloat16, "scalar": torch.float32}
    assert {key: found.tensors[key].dtype for key in kinds} == kinds
    assert is_mindspore((case / name).read_bytes()[:256])


def test_what_was_appended(case: Path) -> None:
    found = read_mindspore(case / "tiny_append_info.ckpt")
    assert found.texts == {"name": "x"}
    assert [found.tensors[key].item() for key in ("epoch_num", "lr", "done")] == [12, 0.25, True]


def test_a_larger_file(case: Path) -> None:
    """The values are those of the recording's fill.py, for "big.weight" and "big.bias"."""
    found = read_mindspore(case / "dense_300x64.ckpt").tensors
    for key, shape, scale in (("weight", (300, 64), (2 / 64) ** 0.5), ("bias", (300,), 0.1)):
        normals = np.random.RandomState(zlib.crc32(f"big.{key}".encode())).standard_normal(shape)
        torch.testing.assert_close(found[key], torch.from_numpy(normals * scale).float(), rtol=0, atol=0)


# ------------------------------------------------------------------------------------- files built from the format


def number(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = b""
    while value >= 0x80:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def block(field: int, content: bytes) -> bytes:
    return bytes([field << 3 | 2]) + number(len(content)) + content


def value(name: str, dims: tuple[int, ...], kind: str, content: bytes) -> bytes:
    tensor = b"".join(b"\x08" + number(side) for side in dims) + block(2, kind.encode()) + block(3, content)
    return block(1, block(1, name.encode()) + block(2, tensor))


def read(tmp_path: Path, content: bytes):
    (tmp_path / "a.ckpt").write_bytes(content)
    return read_mindspore(tmp_path / "a.ckpt")


def floats(*values: float) -> bytes:
    return np.array(values, dtype="<f4").tobytes()


def test_a_tensor_in_parts(tmp_path: Path) -> None:
    """Each part states the whole shape; the parts follow each other."""
    parts = [value("fc6.weight", (2, 3), "Float32", floats(*some)) for some in ((0, 1, 2, 3), (4,), (5,))]
    found = read(tmp_path, parts[0] + parts[1] + parts[2] + value("b", (1,), "Float32", floats(7)))
    assert found.tensors["fc6.weight"].tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(CheckpointError, match=r"fc6\.weight: there twice"):
        read(tmp_path, parts[0] + value("b", (1,), "Float32", floats(7)) + parts[1])
    with pytest.raises(CheckpointError, match=r"20 bytes for Float32 of shape \(2, 3\)"):
        read(tmp_path, parts[0] + parts[1])
    with pytest.raises(CheckpointError, match="parts of different shapes"):
        read(tmp_path, parts[0] + value("fc6.weight", (1,), "Float32", floats(5)))


def test_a_number_of_an_older_release(tmp_path: Path) -> None:
    found = read(tmp_path, value("a", (0,), "Float32", floats(3)) + value("b", (0, 4), "Int64", b""))
    assert (found.tensors["a"].shape, found.tensors["b"].shape) == ((), (0, 4))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no tensor"),
        (value("a", (1 << 62, 1 << 62), "Float32", floats(1)), "4 bytes for Float32"),
        (value("a", (-1,), "Float32", b""), "0 bytes for Float32 of shape \\(-1,\\)"),
        (value("a", (1,) * 17, "Float32", floats(1)), "17 dimensions"),
        (value("a", (1,), "Complex", floats(1)), "of type Complex"),
        (value("a", (1,), "str", b"\xff\xff\xff\xff"), "no text"),
        (block(1, block(1, b"a") + block(3, b"")), "a: a hash table"),
        (block(1, block(1, b"a")), "a name without a tensor"),
        (block(1, b"\x08\x01" * 65), "more than 64 fields"),
        (block(1, block(1, b"\xff")), "no UTF-8"),
        (block(1, block(1, b"a" * 5000)), "a name of 5000 bytes"),
        (block(2, b""), "field 2 where a value"),
        (b"\x0a" + number(1 << 40), "1099511627776 bytes stated, 0 there"),
        (b"\x0a" + number(-1), "-1 bytes stated"),
        (b"\x0a" + b"\xff" * 10, "more than ten bytes"),
        (b"\x0d", "wire type 5"),
    ],
)
def test_what_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path, content)


def test_a_checksum(tmp_path: Path) -> None:
    content = value("a", (1,), "Float32", floats(1))
    stated = b"crc_num" + binascii.crc32(content).to_bytes(10, "big")
    assert read(tmp_path, content + stated).tensors["a"].tolist() == [1]
    with pytest.raises(CheckpointError, match="not that of its checksum"):
        read(tmp_path, value("a", (1,), "Float32", floats(2)) + stated)


def test_many_values(tmp_path: Path) -> None:
    """Two bytes each: half a million in a megabyte end at the bound."""
    with pytest.raises(CheckpointError, match="a name without a tensor"):
        read(tmp_path, b"\x0a\x00" * 500_000)


def test_damaged_files_end_in_our_error_or_in_tensors(case: Path, tmp_path: Path) -> None:
    """300 of them: bytes changed, cut, doubled or with large lengths put in."""
    draw = random.Random(0)
    content = (case / "tiny_append_info.ckpt").read_bytes()
    refused = 0
    for _ in range(300):
        broken = bytearray(content)
        place = draw.randrange(len(broken))
        match draw.randrange(4):
            case 0:
                broken[place] ^= 1 << draw.randrange(8)
            case 1:
                del broken[place:]
            case 2:
                broken[place:place] = broken[draw.randrange(len(broken)) :][:50]
            case _:
                broken[place : place + 1] = number(draw.choice([1 << 20, 1 << 40, 1 << 63, (1 << 64) - 1]))
        try:
            found = read(tmp_path, bytes(broken))
        except CheckpointError:
            refused += 1
        else:
            assert sum(tensor.nbytes for tensor in found.tensors.values()) <= len(broken)
    assert refused > 150


def test_what_else_begins_alike() -> None:
    assert not is_mindspore(b"")
    assert not is_mindspore(b"\x0a")
    assert not is_mindspore(b"PK\x03\x04")
    assert not is_mindspore(b"\x80\x02}q\x00.")
    # A safetensors file whose header has 10 bytes.
    assert not is_mindspore(b"\x0a\x00\x00\x00\x00\x00\x00\x00{}        ")
