"""Files of ImageNet weights: every tensor accounted for, nothing executed, every mistake at once."""

from __future__ import annotations

import pickle
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from rcnn.backbones import pretrained
from rcnn.backbones.pretrained import (
    efficientnet_lite0_file,
    efficientnet_lite0_names,
    imagenet_file,
    load_backbone,
    read_tensors,
)
from rcnn.backbones.timm import TimmBackbone
from rcnn.errors import CheckpointError, DownloadError, SetupError
from rcnn.recipes.models import build_backbone, load_imagenet
from rcnn.recipes.recipe import BackboneSpec, EfficientNetLite0Spec, MobileNetSpec, ResNetSpec, VGG16Spec

STATE = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(2)}

# -------------------------------------------------------------------------------------------------------- reading files


@pytest.mark.parametrize(
    "wrap", [lambda state: state, lambda state: {"state_dict": state, "epoch": 3}, lambda state: {"model": state}]
)
def test_state_dicts_and_what_surrounds_them(tmp_path: Path, wrap) -> None:
    torch.save(wrap(STATE), tmp_path / "file.pth")
    torch.testing.assert_close(read_tensors(tmp_path / "file.pth"), STATE)


def test_safetensors(tmp_path: Path) -> None:
    safetensors.torch.save_file(STATE, tmp_path / "file.safetensors")
    torch.testing.assert_close(read_tensors(tmp_path / "file.safetensors"), STATE)


def test_floats_become_float32_and_integers_stay(tmp_path: Path) -> None:
    torch.save(
        {"half": torch.ones(1).half(), "double": torch.ones(1).double(), "count": torch.tensor(3)}, tmp_path / "x.pt"
    )
    found = read_tensors(tmp_path / "x.pt")
    assert [value.dtype for value in found.values()] == [torch.float32, torch.float32, torch.int64]


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        read_tensors(tmp_path / "nothing.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04" + bytes(100), bytes(1000)])
def test_not_a_file_of_weights(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"file{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="file"):
        read_tensors(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_truncated_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"file{suffix}"
    (torch.save if suffix == ".pth" else safetensors.torch.save_file)(STATE, path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(CheckpointError, match=r"damaged|truncated"):
        read_tensors(path)


@pytest.mark.parametrize("content", [torch.ones(3), [torch.ones(3)], {"weight": 3.0}, {"a": {"b": torch.ones(1)}}])
def test_no_state_dict(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match="holds no state dict"):
        read_tensors(tmp_path / "file.pth")


class Hostile:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("write", [lambda value, file: file.write(pickle.dumps(value)), torch.save])
def test_a_pickle_that_would_run_code_is_not_run(tmp_path: Path, write) -> None:
    trace = tmp_path / "it-ran"
    with (tmp_path / "file.pth").open("wb") as file:
        write({"weight": torch.ones(1), "x": Hostile(trace)}, file)
    with pytest.raises(CheckpointError, match=r"could run code|only its own code can read"):
        read_tensors(tmp_path / "file.pth")
    assert not trace.exists()


def test_a_pickle_of_arrays(tmp_path: Path) -> None:
    """detectron2's `.pkl`."""
    arrays = {"weight": np.arange(6.0, dtype=np.float32).reshape(2, 3), "bias": np.ones(2, dtype=np.float32)}
    (tmp_path / "file.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "someone"}))
    torch.testing.assert_close(read_tensors(tmp_path / "file.pkl"), STATE)


def test_a_file_that_states_more_than_it_holds_takes_no_memory(tmp_path: Path) -> None:
    """Half a number, repeated to two terabytes: torch.load gives it, and its float32 copy would need four."""
    torch.save({"weight": torch.zeros(1, dtype=torch.half).expand(1 << 40)}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=f"tensors of {1 << 41} bytes in a file of"):
        read_tensors(tmp_path / "file.pth")
    (tmp_path / "file.pkl").write_bytes(b"\x80\x04\x8e" + (1 << 40).to_bytes(8, "little") + b"short.")
    with pytest.raises(CheckpointError, match="damaged"):
        read_tensors(tmp_path / "file.pkl")


# ---------------------------------------------------------------------------------------------------- loading backbones


def test_every_mistake_at_once() -> None:
    backbone = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    tensors = {
        "0.weight": torch.zeros(5, 5),
        "0.bias": torch.zeros(7),
        "1.weight": torch.zeros(2),
        "1.running_mean": torch.zeros(2),
        "1.running_var": torch.ones(2),
        "layer9.weight": torch.zeros(1),
        "fc.weight": torch.zeros(1),
    }
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_backbone(backbone, tensors, where="my.pth")
    assert [str(problem) for problem in caught.value.problems] == [
        "my.pth: 1.bias: missing in the file",
        "my.pth: layer9.weight: the backbone has no such tensor",
        "my.pth: 0.weight: shape (5, 5); allowed: (2, 3)",
        "my.pth: 0.bias: shape (7,); allowed: (2,)",
    ]
    torch.testing.assert_close(dict(backbone.state_dict()), before)


# What the files hold beyond the backbone.
FILES: dict[str, tuple[BackboneSpec, set[str]]] = {
    "resnet18_backbone.pth": (ResNetSpec(depth=18), set()),
    "vgg16_features.pth": (VGG16Spec(), set()),
    "mobilenet_v2-b0353104.pth": (MobileNetSpec(version="v2"), {"classifier"}),
    "efficientnet-lite0-57934424.pth": (EfficientNetLite0Spec(), {"_conv_head", "_bn1", "_fc"}),
}


@pytest.mark.parametrize("name", FILES)
def test_real_files_load(shared: Path, name: str) -> None:
    spec, beyond = FILES[name]
    spec = spec.model_copy(update={"weights": str(shared / "weights" / name)})
    backbone = build_backbone(spec)
    rest = load_imagenet(backbone, spec)
    assert {key.split(".")[0] for key in rest} == beyond
    own = (backbone.body if isinstance(backbone, TimmBackbone) else backbone).state_dict()
    given = efficientnet_lite0_names(read_tensors(shared / "weights" / name))
    counters = {key for key in given if key.endswith("num_batches_tracked")}
    assert set(given) - set(rest) - counters == set(own) - counters
    for key, value in own.items():
        torch.testing.assert_close(value, given[key], rtol=0, atol=0)


def test_a_classifier_of_mmpretrain() -> None:
    """Its names are torchvision's under `backbone.`; that of a detector are not taken for it."""
    spec = ResNetSpec(depth=18, weights=None)
    backbone, own = build_backbone(spec), build_backbone(spec).state_dict()
    theirs = {f"backbone.{name}": torch.full_like(value, 2) for name, value in own.items()}
    classifier = {"head.fc.weight": torch.ones(3, 4)}
    assert load_backbone(backbone, theirs | classifier, where="here").keys() == classifier.keys()
    assert all((value == 2).all() for value in backbone.state_dict().values())
    with pytest.raises(CheckpointError, match="not one of its names is the backbone's"):
        load_backbone(backbone, theirs | {"neck.lateral_convs.0.conv.weight": torch.ones(1)}, where="here")


def test_names_of_another_system_are_said_first() -> None:
    """As the classic file of detectron2, whose names are Caffe2's, has them."""
    with pytest.raises(CheckpointError) as caught:
        load_backbone(nn.Linear(3, 2), {"conv1_w": torch.zeros(2, 3)}, where="R-50.pkl")
    assert "R-50.pkl: not one of its names is the backbone's" in str(caught.value.problems[0])
    assert "rcnn convert FILE" in caught.value.problems[0].remedy
    assert len(caught.value.problems) == 4


# Mean and standard deviation of each map, computed with the package's own model.
PACKAGE_MAPS = ((0.409469, 8.813934), (0.035849, 7.748842), (0.492207, 6.420938), (-0.044255, 2.757107))


def test_efficientnet_lite0_is_that_of_its_package(shared: Path) -> None:
    """The package efficientnet_lite_pytorch 0.1.0 with this file, on the first 224 x 224 pixels of the photograph."""
    import numpy as np
    from PIL import Image

    spec = EfficientNetLite0Spec(weights=str(shared / "weights" / "efficientnet-lite0-57934424.pth"))
    backbone = build_backbone(spec).eval()
    load_imagenet(backbone, spec)
    picture = Image.open(shared / "oracles" / "inputs" / "coffee_480x320.png").convert("RGB")
    pixels = torch.from_numpy(np.array(picture))[:224, :224].permute(2, 0, 1)[None]
    with torch.no_grad():
        maps = backbone((pixels - 127.0) / 128.0)
    for found, (mean, std) in zip(maps, PACKAGE_MAPS, strict=True):
        assert found.mean().item() == pytest.approx(mean, abs=1e-4)
        assert found.std().item() == pytest.approx(std, rel=1e-4)


# ---------------------------------------------------------------------------------------------------- finding the files


def test_efficientnet_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "_EFFICIENTNET_PACKAGE", "no_such_package")
    with pytest.raises(SetupError, match=r"rcnn\[efficientnet\]"):
        efficientnet_lite0_file()


def test_a_file_in_torchs_folder_is_used(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's own, under its published name; one that is not whole is refused."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    path = tmp_path / "checkpoints" / "mobilenet_v2-b0353104.pth"
    path.parent.mkdir()
    path.symlink_to(shared / "weights" / path.name)
    assert imagenet_file("mobilenet_v2") == path
    path.unlink()
    path.write_bytes((shared / "weights" / path.name).read_bytes()[:-1])
    with pytest.raises(DownloadError, match="one that begins b0353104, by its name; delete it: it will be fetched"):
        imagenet_file("mobilenet_v2")


def test_weights_at_an_address(shared: Path, web) -> None:
    """Fetched once, then at hand; names of other systems are no addresses."""
    address = web.serve("/resnet18.pth", (shared / "weights" / "resnet18_backbone.pth").read_bytes())
    spec = ResNetSpec(depth=18, weights=address)
    for _ in range(2):
        backbone = build_backbone(spec)
        load_imagenet(backbone, spec)
    given = read_tensors(shared / "weights" / "resnet18_backbone.pth")
    torch.testing.assert_close(backbone.state_dict()["conv1.weight"], given["conv1.weight"], rtol=0, atol=0)
    assert web.asked == ["/resnet18.pth"]
    with pytest.raises(CheckpointError, match=r"open-mmlab://resnet18; allowed: imagenet, a file, its address \(https"):
        load_imagenet(backbone, ResNetSpec(depth=18, weights="open-mmlab://resnet18"))


def test_no_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **choices: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(DownloadError, match="no route to host") as caught:
        imagenet_file("resnet50")
    assert f"put the file at {tmp_path / 'checkpoints' / 'resnet50-0676ba61.pth'}" in str(caught.value)
    assert "detector.backbone.weights=FILE" in str(caught.value)
