"""Safetensors written in a stream: read by safetensors' own reader, and what is no such file by ours."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from rcnn.data.tensor_file import TensorFile, TensorFileWriter
from rcnn.errors import DataError

FIXED = {"ids": np.array([3, 7], np.int64), "bytes": np.frombuffer(b"12345678", np.uint8)}


def write(path: Path, *pieces: np.ndarray) -> None:
    with path.open("w+b") as file:
        writer = TensorFileWriter(
            file, metadata={"kind": "test"}, fixed=FIXED, growing="rows", dtype=np.dtype(np.float32), row_shape=(3,)
        )
        for piece in pieces:
            writer.append(piece)
        writer.finish(ids=np.array([4, 8], np.int64))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "a.safetensors"
    write(path, np.arange(6.0).reshape(2, 3), np.zeros((0, 3)), np.arange(6.0, 9.0).reshape(1, 3))
    return path


def test_the_library_reads_what_was_written_in_pieces(path: Path) -> None:
    tensors = safetensors.numpy.load_file(path)
    np.testing.assert_array_equal(tensors["rows"], np.arange(9.0, dtype=np.float32).reshape(3, 3))
    np.testing.assert_array_equal(tensors["ids"], [4, 8])
    assert tensors["bytes"].tobytes() == b"12345678"
    with safetensors.safe_open(path, framework="np") as file:
        assert file.metadata() == {"kind": "test"}


def test_we_read_what_the_library_wrote(tmp_path: Path) -> None:
    tensors = {"a": np.arange(12.0).reshape(4, 3), "b": np.array([[1, 2]], np.int32), "half": np.zeros(3, np.float16)}
    safetensors.numpy.save_file(tensors, tmp_path / "b.safetensors", metadata={"x": "y"})
    file = TensorFile(tmp_path / "b.safetensors")
    assert file.metadata == {"x": "y"}
    np.testing.assert_array_equal(file.read("a"), tensors["a"])
    np.testing.assert_array_equal(file.rows("a", 1, 3), tensors["a"][1:3])
    np.testing.assert_array_equal(file.read("b"), tensors["b"])
    assert file.shape("half") == (3,)
    assert file.shape("none") is None


def test_nothing_and_rows_of_nothing(tmp_path: Path) -> None:
    write(tmp_path / "c.safetensors")
    assert safetensors.numpy.load_file(tmp_path / "c.safetensors")["rows"].shape == (0, 3)
    assert TensorFile(tmp_path / "c.safetensors").rows("rows", 0, 0).shape == (0, 3)


def test_a_copy_for_another_process_opens_the_file_again(path: Path) -> None:
    file = TensorFile(path)
    copy = pickle.loads(pickle.dumps(file))
    np.testing.assert_array_equal(copy.read("rows"), file.read("rows"))
    assert len(pickle.dumps(file)) < 300


def refused(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        TensorFile(path)
    (problem,) = caught.value.problems
    assert problem.where == str(path)
    return problem.given


def test_what_is_no_such_file(path: Path, tmp_path: Path) -> None:
    whole, other = path.read_bytes(), tmp_path / "other"
    assert refused(other, b"") == "an empty file"
    assert refused(other, b"hello, I am text " * 9) == "no safetensors file: it has no such header"
    assert "a pickle or zip" in refused(other, pickle.dumps({"boxes": [1, 2]}))
    assert "Git LFS" in refused(other, b"version https://git-lfs.github.com/spec/v1\n")
    assert refused(other, whole[:60]).startswith("truncated: 60 bytes, its header alone has")
    assert refused(other, whole[:-4]) == f"truncated: {len(whole) - 4} bytes where its header states {len(whole)}"
    assert refused(other, whole + b"x") == f"damaged: {len(whole) + 1} bytes where its header states {len(whole)}"
    assert refused(other, whole[:20] + b"}{" + whole[22:]) == "damaged: its header cannot be read"
    assert refused(other, whole.replace(b'"shape":[3,3]', b'"shape":[3,4]')) == "damaged: its header cannot be read"


def test_a_folder_and_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        TensorFile(tmp_path / "none")
    with pytest.raises(DataError, match="cannot be read"):
        TensorFile(tmp_path)


def test_a_file_that_shrinks_while_it_is_read(path: Path) -> None:
    file = TensorFile(path)
    with path.open("r+b") as other:
        other.truncate(path.stat().st_size - 8)
    np.testing.assert_array_equal(file.rows("rows", 0, 2), np.arange(6.0).reshape(2, 3))
    with pytest.raises(DataError, match="was cut or replaced while it was read"):
        file.read("rows")
