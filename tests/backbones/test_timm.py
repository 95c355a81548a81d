"""Any timm model: maps, norms, what is frozen, and what is said where there is none."""

from __future__ import annotations

import socket

import pytest
import timm
import torch
from huggingface_hub import constants
from torch import nn

from rcnn.backbones.norm import SyncBatchNorm
from rcnn.backbones.timm import TimmBackbone, TimmNorm, imagenet_tensors
from rcnn.errors import DownloadError, SetupError


def frozen(backbone: TimmBackbone) -> set[str]:
    """Children of the model that have a parameter which is not trained."""
    return {name.split(".")[1] for name, parameter in backbone.named_parameters() if not parameter.requires_grad}


@pytest.mark.parametrize("norm", ["frozen", "batch", "sync"])
@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050"])
def test_maps_are_timms(name: str, norm: TimmNorm) -> None:
    torch.manual_seed(0)
    theirs = timm.create_model(name, features_only=True).eval()
    for buffer_name, buffer in theirs.named_buffers():
        if buffer_name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    ours = TimmBackbone(name=name, norm=norm).eval()
    missing = ours.body.load_state_dict(theirs.state_dict(), strict=False).missing_keys
    assert not missing
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = theirs(pixels)[1:]  # without the map at stride 2
        for found, x, channels, stride in zip(ours(pixels), expected, ours.channels, ours.strides_px, strict=True):
            torch.testing.assert_close(found, x)
            assert found.shape == (1, channels, 64 // stride, 64 // stride)


@pytest.mark.parametrize(("norm", "kind"), [("batch", nn.BatchNorm2d), ("sync", SyncBatchNorm), ("frozen", None)])
def test_kinds_of_norm(norm: TimmNorm, kind: type | None) -> None:
    trained = [
        module
        for module in TimmBackbone(name="resnet10t", norm=norm).modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    # 3 of the deep stem, 2 in each of 4 blocks, 1 on each of 3 shortcuts; layer1 keeps its shape.
    assert len(trained) == (0 if kind is None else 14)
    assert all(kind is not None and isinstance(module, kind) for module in trained)


@pytest.mark.parametrize(
    ("name", "frozen_stages", "expected"),
    [
        ("resnet10t", 0, set()),
        ("resnet10t", 1, {"conv1", "bn1"}),
        ("resnet10t", 2, {"conv1", "bn1", "layer1"}),
        # No map at stride 2: the first is that of stage 0, and layer scales that belong to a block go with it.
        ("convnext_atto", 1, {"stem_0", "stem_1", "stages_0"}),
    ],
)
def test_frozen_stages(name: str, frozen_stages: int, expected: set[str]) -> None:
    backbone = TimmBackbone(name=name, norm="batch", frozen_stages=frozen_stages)
    assert frozen(backbone) == expected
    for parameter_name, parameter in backbone.named_parameters():
        assert parameter.requires_grad == (parameter_name.split(".")[1] not in expected)


def test_maps_that_end_with_channels_are_turned() -> None:
    backbone = TimmBackbone(name="swin_tiny_patch4_window7_224")
    maps = backbone(torch.zeros(1, 3, 224, 224))
    assert [tuple(x.shape) for x in maps] == [(1, 96, 56, 56), (1, 192, 28, 28), (1, 384, 14, 14), (1, 768, 7, 7)]


def test_what_only_coarser_maps_need_is_not_trained() -> None:
    backbone = TimmBackbone(name="resnet10t", norm="batch")
    backbone.keep_maps(2)
    maps = backbone(torch.zeros(2, 3, 64, 64))
    assert [x.shape[-1] for x in maps] == [16, 8]
    assert frozen(backbone) == {"layer3", "layer4"}
    sum(x.sum() for x in maps).backward()
    assert all(p.grad is not None for p in backbone.parameters() if p.requires_grad)


def test_a_name_that_timm_does_not_know() -> None:
    with pytest.raises(SetupError, match='did you mean "resnet50"'):
        TimmBackbone(name="resnett50")


def test_a_model_without_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **choices: object) -> None:
        raise RuntimeError("features_only not implemented for Some models.")

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(SetupError, match="gives no feature maps"):
        TimmBackbone(name="resnet10t")


def test_weights_that_do_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **choices: object) -> None:
        raise FileNotFoundError("no connection")

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(DownloadError, match="no connection"):
        imagenet_tensors("resnet10t")


def test_a_hub_that_cannot_be_reached_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked_offline = []

    def refuse(*args: object, **choices: object) -> None:
        asked_offline.append(constants.HF_HUB_OFFLINE)
        raise FileNotFoundError("not in the cache")

    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound and not listening: a connection is refused
        port = closed.getsockname()[1]
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr("urllib.request.getproxies", dict)
        monkeypatch.setattr(timm, "create_model", refuse)
        with pytest.raises(DownloadError, match="not in the cache"):
            imagenet_tensors("resnet10t")
    assert asked_offline == [True]
    assert not constants.HF_HUB_OFFLINE


def test_more_frozen_stages_than_maps() -> None:
    with pytest.raises(SetupError, match="0 to 5"):
        TimmBackbone(name="resnet10t", frozen_stages=6)
