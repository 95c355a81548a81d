"""Files of other systems: every kind is read as torch and numpy wrote it, what is beside the weights is kept plain."""

from __future__ import annotations

import argparse
import collections
import datetime
import os
import pathlib
import pickle
import sys
import types
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from foreign_bytes import array, mapping, pickled, safetensors_file, storage, tensor, torch_legacy, torch_zip, value
from torch import Tensor, nn

from rcnn.engine.checkpoint import CheckpointMeta, save_weights
from rcnn.errors import CheckpointError
from rcnn.records import ClassTable
from rcnn.weight_files.reading import read_foreign


@pytest.fixture
def error_of(tmp_path: Path) -> Callable[[bytes], str]:
    def call(content: bytes) -> str:
        (tmp_path / "file.pth").write_bytes(content)
        with pytest.raises(CheckpointError) as error:
            read_foreign(tmp_path / "file.pth")
        assert all(problem.where.startswith(str(tmp_path / "file.pth")) for problem in error.value.problems)
        return str(error.value)

    return call


def many_kinds() -> dict[str, Tensor]:
    torch.manual_seed(0)
    base = torch.randn(4, 5, 6, 7)
    return {
        "plain.weight": base,
        "transposed": torch.randn(3, 5).t(),
        "channels_last": base.to(memory_format=torch.channels_last),
        "view": base[1:3, ::2, 2:],
        "same": base,
        "expanded": torch.randn(1, 3).expand(4, 3),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 4),
        "double": torch.randn(3, dtype=torch.float64),
        "byte": torch.arange(5, dtype=torch.uint8),
        "bool": torch.tensor([True, False]),
        "complex": torch.randn(2, dtype=torch.complex64),
        "uint16": torch.tensor([1, 65535]).to(torch.uint16),
        "parameter": nn.Parameter(torch.randn(2)),
    }


def assert_equal(found: object, expected: dict[str, Tensor]) -> None:
    assert isinstance(found, dict)
    assert sorted(found) == sorted(expected)
    for name, tensor_ in expected.items():
        assert found[name].is_contiguous()
        torch.testing.assert_close(found[name], tensor_.detach(), rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_of_torch(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "a.pth"
    torch.save(many_kinds(), path, _use_new_zipfile_serialization=zipped)
    file = read_foreign(path)
    assert_equal(file.tensors, many_kinds())
    assert list(file.tensors) == list(many_kinds())
    assert (file.path, file.meta, file.notes) == (path, {}, ())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_half_precision_becomes_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    half = torch.tensor([1.5, -0.25, 2.0]).to(dtype)
    torch.save({"a": half}, tmp_path / "a.pth")
    assert_equal(read_foreign(tmp_path / "a.pth").tensors, {"a": torch.tensor([1.5, -0.25, 2.0])})


def test_torch_without_sums_and_damage_with_them(tmp_path: Path) -> None:
    """torch can leave out the sums of its records. Where they are, a flipped bit is seen."""
    path = tmp_path / "a.pth"
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.arange(100.0)}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert_equal(read_foreign(path).tensors, {"a": torch.arange(100.0)})
    torch.save({"good": torch.zeros(2), "bad": torch.arange(100.0)}, path)
    content = bytearray(path.read_bytes())
    content[content.index(torch.arange(90.0, 100.0).numpy().tobytes())] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a.pth: bad: damaged \(Bad CRC-32 for file 'a/data/1'\)"):
        read_foreign(path)


ARRAYS = {
    "plain": np.arange(6, dtype=np.float32).reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(12, dtype=np.float64).reshape(3, 4)),
    "big_endian": np.arange(4, dtype=">f4"),
    "half": np.array([0.5, 1.5], np.float16),
    "number": np.array(7),
    "flags": np.array([True, False]),
    "empty": np.zeros((0, 3), np.int64),
}


@pytest.mark.parametrize("protocol", range(2, 6))
def test_arrays_of_numpy(tmp_path: Path, protocol: int) -> None:
    """As detectron2's .pkl."""
    content = {"model": ARRAYS, "__author__": "Somebody", "matching_heuristics": True, "ap": np.float64(37.5)}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    file = read_foreign(tmp_path / "a.pkl")
    expected = {name: torch.tensor(np.ascontiguousarray(each).tolist()) for name, each in ARRAYS.items()}
    expected |= {"fortran": torch.arange(12.0).double().reshape(3, 4), "empty": torch.zeros(0, 3, dtype=torch.long)}
    expected["number"] = torch.tensor(7)
    assert_equal(file.tensors, expected)
    assert file.meta == {"__author__": "Somebody", "matching_heuristics": True, "ap": 37.5}


def test_a_pickle_of_python_2(tmp_path: Path) -> None:
    """Detectron's: texts and the bytes of arrays are both strings there. 0x3fc00000 is 1.5, 0xbf800000 is -1."""
    data = b"\x00\x00\xc0\x3f\x00\x00\x80\xbf".decode("latin-1")
    content = mapping(blobs=b"}(" + b"U\x03w_b" + array("f4", (2,), data) + b"u", cfg=b"U\x04a: 1")
    (tmp_path / "a.pkl").write_bytes(pickled(content))
    file = read_foreign(tmp_path / "a.pkl")
    assert_equal(file.tensors, {"w_b": torch.tensor([1.5, -1.0])})
    assert file.meta == {"cfg": "a: 1"}


def test_safetensors(tmp_path: Path) -> None:
    content = {"a": torch.arange(3.0), "b": torch.arange(2), "c": torch.ones(2).half()}
    safetensors.torch.save_file(content, tmp_path / "a.safetensors", {"format": "pt", "architecture": "resnet50"})
    file = read_foreign(tmp_path / "a.safetensors")
    assert_equal(file.tensors, {**content, "c": torch.ones(2)})
    assert file.meta == {"format": "pt", "architecture": "resnet50"}


@pytest.fixture
def mmengine() -> Iterator[types.SimpleNamespace]:
    """Classes of MMEngine's names while a file is written: they are gone when it is read."""

    class HistoryBuffer:
        def __init__(self) -> None:
            self._log_history = np.array([0.5, 0.25])
            self._count_history = np.array([1, 1])
            self._max_length = 1000000

        def mean(self) -> float:
            return 0.0

        def __getstate__(self) -> dict[str, object]:  # as MMEngine's, which saves its methods
            return {**self.__dict__, "statistics_methods": {"mean": HistoryBuffer.mean}}

        def __setstate__(self, state: object) -> None:
            raise AssertionError("a class of the file was used")

    class ConfigDict(dict):
        pass

    modules = {"mmengine": {}, "mmengine.logging": {}, "mmengine.config": {}}
    modules["mmengine.logging.history_buffer"] = {"HistoryBuffer": HistoryBuffer}
    modules["mmengine.config.config"] = {"ConfigDict": ConfigDict}
    for module, members in modules.items():
        sys.modules[module] = types.ModuleType(module)
        for name, member in members.items():
            member.__module__, member.__qualname__ = module, name
            setattr(sys.modules[module], name, member)
    HistoryBuffer.mean.__module__ = "mmengine.logging.history_buffer"
    HistoryBuffer.mean.__qualname__ = "HistoryBuffer.mean"
    yield types.SimpleNamespace(HistoryBuffer=HistoryBuffer, ConfigDict=ConfigDict, forget=lambda: forget(modules))
    forget(modules)


def forget(modules: Iterable[str]) -> None:
    for module in modules:
        sys.modules.pop(module, None)


def test_a_file_of_mmengine(tmp_path: Path, mmengine: types.SimpleNamespace) -> None:
    """weights_only refuses it, for the message hub beside the weights."""
    state = collections.OrderedDict({"backbone.conv1.weight": torch.randn(2, 3), "neck.bias": torch.randn(3)})
    state._metadata = collections.OrderedDict({"": {"version": 1}, "backbone": {"version": 2}})  # pyright: ignore
    content = {
        "meta": {
            "epoch": 12, "iter": 87960, "cfg": "model = dict(type='FasterRCNN')", "mmengine_version": "0.10.7",
            "time": datetime.datetime(2023, 1, 2), "seed": np.int64(7), "experiment_name": "faster-rcnn_20230102",
            "dataset_meta": {"classes": ("cat", "dog"), "palette": [(1, 2, 3), (4, 5, 6)]},
            "config": mmengine.ConfigDict(model=mmengine.ConfigDict(type="FasterRCNN", stages=[1, 2])),
        },
        "state_dict": state,
        "message_hub": {
            "log_scalars": collections.OrderedDict({"train/loss": mmengine.HistoryBuffer()}),
            "runtime_info": {"iter": 87960, "path": pathlib.PurePosixPath("a"), "queue": collections.deque([1])},
            "resumed_keys": {"train/loss": True},
        },
        "optimizer": {"state": {0: {"momentum_buffer": torch.randn(2)}}, "param_groups": [{"lr": 0.02, "params": [0]}]},
        "param_schedulers": [{"last_step": 12, "_last_lr": [np.float64(0.02)]}],
    }  # fmt: skip
    torch.save(content, tmp_path / "epoch_12.pth")
    mmengine.forget()
    with pytest.raises(pickle.UnpicklingError, match="Unsupported global"):
        torch.load(tmp_path / "epoch_12.pth", weights_only=True)
    file = read_foreign(tmp_path / "epoch_12.pth")
    assert "mmengine" not in sys.modules
    assert_equal(file.tensors, dict(state))
    meta = file.meta["meta"]
    assert isinstance(meta, dict)
    assert meta["dataset_meta"] == {"classes": ["cat", "dog"], "palette": [[1, 2, 3], [4, 5, 6]]}
    assert meta["config"] == {"model": {"type": "FasterRCNN", "stages": [1, 2]}}
    assert (meta["epoch"], meta["seed"], meta["cfg"]) == (12, 7, "model = dict(type='FasterRCNN')")
    assert "time" not in meta
    hub = {"log_scalars": {}, "runtime_info": {"iter": 87960, "queue": [1]}, "resumed_keys": {"train/loss": True}}
    assert file.meta["message_hub"] == hub
    assert file.meta["param_schedulers"] == [{"last_step": 12, "_last_lr": [0.02]}]
    assert file.meta["optimizer"] == {"state": {0: {}}, "param_groups": [{"lr": 0.02, "params": [0]}]}
    assert file.meta["_metadata"] == {"": {"version": 1}, "backbone": {"version": 2}}


@pytest.mark.parametrize(
    ("wrap", "meta"),
    [
        (lambda state: state, {}),
        (lambda state: {"model": state, "args": argparse.Namespace(lr=0.1)}, {"args": {"lr": 0.1}}),
        (lambda state: {"model_state_dict": state, "loss": 0.5}, {"loss": 0.5}),
        (lambda state: {"epoch": 1, "net": {"state_dict": state, "arch": "x"}}, {"epoch": 1, "arch": "x"}),
        (lambda state: {"state_dict": state, "ema_state_dict": {"a": state["b"]}}, {"ema_state_dict": {}}),
        (lambda state: {"state_dict": state, "best": torch.tensor(0.5), "epoch": 2}, {"epoch": 2}),
        (lambda state: {**state, "step": 3}, {"step": 3}),
    ],
)
def test_where_the_weights_may_be(tmp_path: Path, wrap: Callable, meta: object) -> None:
    state = {"a": torch.zeros(2), "b": torch.ones(3)}
    torch.save(wrap(state), tmp_path / "a.pth")
    file = read_foreign(tmp_path / "a.pth")
    assert_equal(file.tensors, state)
    assert file.meta == meta


def test_a_prefix_of_every_name_is_taken_off_and_told(tmp_path: Path) -> None:
    layer = nn.Sequential(nn.BatchNorm2d(2))
    torch.save(nn.DataParallel(layer).state_dict(), tmp_path / "a.pth")
    file = read_foreign(tmp_path / "a.pth")
    assert_equal(file.tensors, dict(layer.state_dict()))
    assert file.meta["_metadata"] == {"": {"version": 1}, "module": {"version": 1}, "0": {"version": 2}}
    assert file.notes == ("every name began with module., as a wrapper of the model adds it: taken off",)
    torch.save({"module.a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "a.pth")
    assert list(read_foreign(tmp_path / "a.pth").tensors) == ["module.a", "b"]


def test_names_that_are_no_file_of_weights(tmp_path: Path, error_of: Callable[[bytes], str]) -> None:
    with pytest.raises(CheckpointError, match="there is no such file; check the path"):
        read_foreign(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="this is a folder"):
        read_foreign(tmp_path)
    meta = CheckpointMeta(recipe="", classes=ClassTable(names=("a",)))
    save_weights(tmp_path / "ours.safetensors", {"a": torch.zeros(1)}, meta)
    with pytest.raises(CheckpointError, match="a checkpoint of rcnn already; it is used as it is: rcnn predict"):
        read_foreign(tmp_path / "ours.safetensors")
    assert "not a file of weights (an empty file)" in error_of(b"")
    assert "not a file of weights (a pointer of Git LFS)" in error_of(b"version https://git-lfs.github.com/spec/v1\n")
    assert "not a file of weights (a page of the web)" in error_of(b"<!DOCTYPE html><html>")
    assert "allowed: torch.save (.pth), a pickle of protocol 2 or newer (.pkl), safetensors" in error_of(b"hello")


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.pth").write_bytes(b"x")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match=r"a.pth: cannot be read: Permission denied"):
        read_foreign(tmp_path / "a.pth")


@pytest.mark.parametrize("wrapped", [True, False])
def test_weights_within_an_object(tmp_path: Path, wrapped: bool) -> None:
    model = nn.Linear(2, 2)
    torch.save({"model": model, "epoch": 1} if wrapped else model, tmp_path / "a.pth")
    with pytest.raises(CheckpointError) as error:
        read_foreign(tmp_path / "a.pth")
    assert "its weights are inside an object of torch.nn.modules.linear.Linear, which only its own" in str(error.value)
    assert "torch.save(model.state_dict(), FILE)" in str(error.value)


def test_an_object_among_the_weights(error_of: Callable[[bytes], str]) -> None:
    state = {"good": np.zeros(2), "bad": np.array([None]), "date": datetime.date(2020, 1, 1), "word": np.array("a")}
    error = error_of(pickle.dumps({"model": state}))
    assert "bad: an object of numpy.ndarray without numbers among the weights" in error
    assert "date: an object of datetime.date among the weights, which only its own code can read" in error
    assert "word: an object of numpy.ndarray" in error


def test_no_weights_at_all(error_of: Callable[[bytes], str]) -> None:
    for content in ({}, {"model": {}}, [1], "text", {"a": 1}, {"model": {"a": None}}, None):
        assert "the file holds no state dict; allowed: names and tensors" in error_of(pickle.dumps(content))


def test_archives_of_others(tmp_path: Path, error_of: Callable[[bytes], str]) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("model/weights.txt", "1")
    assert "a zip archive with 0 files data.pkl" in error_of((tmp_path / "a.zip").read_bytes())
    program = torch_zip(mapping(a=tensor()), {"constants.pkl": b"", "code/__torch__.py": b"import os"})
    assert "a program of TorchScript, not weights alone" in error_of(program)


def test_values_beside_the_weights_are_bounded(error_of: Callable[[bytes], str]) -> None:
    deep: list[object] = []
    for _ in range(60):
        deep = [deep]
    assert "values beside the weights: nested more than 50 deep" in error_of(pickle.dumps({"model": ARRAYS, "a": deep}))
    cycle: dict[str, object] = {}
    cycle["again"] = cycle
    assert "nested more than 50 deep" in error_of(pickle.dumps({"model": ARRAYS, "a": cycle}))
    laughs: list[object] = ["ha"] * 10
    for _ in range(20):
        laughs = [laughs] * 10  # 10 to the power of 21 texts
    assert "they unfold into far more than the file holds" in error_of(pickle.dumps({"model": ARRAYS, "a": laughs}))


def test_what_cannot_be_written_again_is_shown_by_its_number(tmp_path: Path) -> None:
    content = {"model": {"a": np.zeros(1)}, "path": os.fsdecode(b"caf\xe9"), "large": 2**70, "places": [1, 2**70]}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content))
    assert read_foreign(tmp_path / "a.pkl").meta == {"path": "caf\\udce9"}


def test_tensors_written_by_hand(tmp_path: Path, error_of: Callable[[bytes], str]) -> None:
    """The builders that the hostile files start from write what torch reads."""
    for content in (torch_zip(mapping(a=tensor())), torch_legacy(mapping(a=tensor(storage(view=None))))):
        (tmp_path / "a.pth").write_bytes(content)
        torch.testing.assert_close(read_foreign(tmp_path / "a.pth").tensors["a"], torch.arange(6.0).reshape(2, 3))
        torch.testing.assert_close(torch.load(tmp_path / "a.pth")["a"], torch.arange(6.0).reshape(2, 3))
    # A view of four elements from the second on, as torch wrote storages that share memory: 1 + 1 and the next.
    view = tensor(storage(view=("v", 1, 4)), offset=1, shape=(2,), stride=(1,), version="")
    (tmp_path / "a.pth").write_bytes(torch_legacy(mapping(a=view)))
    torch.testing.assert_close(read_foreign(tmp_path / "a.pth").tensors["a"], torch.tensor([2.0, 3.0]))
    header = {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    (tmp_path / "a.pth").write_bytes(safetensors_file(header, bytes(4)))
    torch.testing.assert_close(read_foreign(tmp_path / "a.pth").tensors["a"], torch.zeros(1))
    assert "a tensor named '\\x1b[2J'" in error_of(pickled(mapping(model=b"}" + value("\x1b[2J") + array() + b"s")))
