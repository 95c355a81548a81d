"""Files of weights: what comes back, what is refused, and what a full disk leaves."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

from rcnn import atomic_file
from rcnn.engine.checkpoint import CheckpointMeta, load_into, read_meta, read_weights, save_weights
from rcnn.errors import CheckpointError, RunError
from rcnn.records import ClassTable

META = CheckpointMeta(
    recipe="base: x\nset: {a: 'é'}\n",
    classes=ClassTable(names=("Zelle", "細胞"), category_ids=(3, 17)),
    step=12,
    epoch=2,
    metrics={"AP": 0.25, "AP50": 0.5},
)


def weights() -> dict[str, torch.Tensor]:
    return {"a": torch.arange(6.0).reshape(2, 3), "b.c": torch.tensor(7), "empty": torch.zeros(0, 4)}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "last.safetensors"
    save_weights(path, weights(), META)
    return path


def test_everything_comes_back(file: Path) -> None:
    checkpoint = read_weights(file)
    assert checkpoint.meta == META
    assert read_meta(file) == META
    torch.testing.assert_close(checkpoint.state_dict, weights(), rtol=0, atol=0)
    assert os.listdir(file.parent) == ["last.safetensors"]


def test_others_can_read_it(file: Path) -> None:
    """Through the reference library: a plain safetensors file whose metadata are strings."""
    with safetensors.safe_open(file, "pt") as opened:
        assert opened.metadata()["recipe"] == META.recipe
        torch.testing.assert_close(opened.get_tensor("a"), weights()["a"])


def test_shared_strided_and_half_tensors(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(1, 2, 3, 4)
    given = {
        "x": base,
        "same": base,
        "part": base[:, 1:],
        "last": base.to(memory_format=torch.channels_last),
        "half": base.bfloat16(),
    }
    save_weights(tmp_path / "w.safetensors", given, META)
    torch.testing.assert_close(dict(read_weights(tmp_path / "w.safetensors").state_dict), given)


def test_a_full_disk_keeps_the_previous_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()

    def no_space(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic_file.os, "fsync", no_space)
    with pytest.raises(RunError) as caught:
        save_weights(file, {"big": torch.zeros(1_000_000)}, META)
    message = str(caught.value)
    assert "the disk is full: 4.0 MB are needed" in message
    assert f"the previous file is intact: {file}" in message
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]


def test_a_missing_folder_is_made(tmp_path: Path) -> None:
    save_weights(tmp_path / "absent" / "w.safetensors", weights(), META)
    assert read_meta(tmp_path / "absent" / "w.safetensors") == META
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"file: cannot be written: File exists; choose another place"):
        save_weights(tmp_path / "file" / "w.safetensors", weights(), META)


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_weights(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_missing_file_names_what_is_there(file: Path) -> None:
    message = refusal(file.with_name("best.safetensors"))
    assert "No such file" in message
    assert f"there is: {file}" in message


def test_a_folder_is_not_a_file(file: Path) -> None:
    assert f"there is: {file}" in refusal(file.parent)


@pytest.mark.parametrize("kept", [0, 5, 60, 300, -1])
def test_truncated(file: Path, kept: int) -> None:
    file.write_bytes(file.read_bytes()[:kept])
    message = refusal(file)
    assert any(word in message for word in ("empty", "truncated", "no safetensors header"))


def test_trailing_bytes(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"x")
    assert "damaged" in refusal(file)


def test_damaged_header(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[20:30] = b'{"{"{"{"{"'
    file.write_bytes(content)
    assert "damaged: its header cannot be read" in refusal(file)


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.marker),)


def test_a_hostile_pickle_is_never_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    pickled, zipped = tmp_path / "a.pkl", tmp_path / "b.pth"
    pickled.write_bytes(pickle.dumps(Hostile(marker)))
    torch.save({"model": Hostile(marker)}, zipped)
    for path in (pickled, zipped, zipped.rename(tmp_path / "renamed.safetensors")):
        if path.exists():
            assert "a pickle" in (message := refusal(path))
            assert "rcnn convert" in message
    assert not marker.exists()


def test_other_files(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("<!DOCTYPE html><html>404</html>")
    assert "not a checkpoint" in refusal(path)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "git lfs pull" in refusal(path)
    safetensors.torch.save_file(weights(), path)
    assert "not written by rcnn" in refusal(path)
    safetensors.torch.save_file(weights(), path, {"system": "rcnn", "recipe": ""})
    assert "its description of itself is malformed (KeyError" in refusal(path)


def test_load_into_copies() -> None:
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    load_into(target, source.state_dict())
    torch.testing.assert_close(target.weight, source.weight)


def test_load_into_lists_every_difference_and_copies_nothing() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    given = {"0.weight": torch.zeros(91, 3), "0.bias": torch.zeros(2), "1.weights": torch.zeros(1, 2)}
    with pytest.raises(CheckpointError) as caught:
        load_into(module, given)
    assert [str(problem) for problem in caught.value.problems] == [
        "1.weight: missing in the checkpoint; allowed: shape (1, 2)",
        "1.bias: missing in the checkpoint; allowed: shape (1,)",
        "0.weight: shape (91, 3); allowed: shape (2, 3)",
        '1.weights: in the checkpoint, but unknown to the detector; did you mean "1.weight"?',
    ]
    torch.testing.assert_close(dict(module.state_dict()), before)


def test_a_module_on_the_meta_device_takes_the_tensors_in_its_own_dtype() -> None:
    source = nn.Linear(3, 2)
    with torch.device("meta"):
        target = nn.Linear(3, 2)
    given = {"weight": source.weight.detach().half(), "bias": source.bias.detach()}
    load_into(target, given)
    torch.testing.assert_close(target.weight.detach(), given["weight"].float(), rtol=0, atol=0)
    assert target.bias.data_ptr() == given["bias"].data_ptr()
    assert target.weight.requires_grad and target.bias.requires_grad


def test_what_was_read_does_not_change_with_the_file(file: Path) -> None:
    state = read_weights(file).state_dict
    with file.open("r+b") as opened:
        opened.seek(0)
        opened.write(b"\xff" * file.stat().st_size)
    torch.testing.assert_close(state, weights(), rtol=0, atol=0)
