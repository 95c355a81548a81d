"""ResNets against torchvision's, live."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

from rcnn.backbones.norm import NormKind, norm_factory
from rcnn.backbones.resnet import Cardinality, Depth, ResNetBackbone


def theirs_and_ours(depth: Depth, norm: NormKind) -> tuple[nn.Module, ResNetBackbone]:
    """torchvision's classifier and our backbone with its numbers, in float64."""
    torch.manual_seed(0)
    make = FrozenBatchNorm2d if norm == "frozen" else nn.BatchNorm2d
    theirs = torchvision.models.get_model(f"resnet{depth}", weights=None, norm_layer=make).double().eval()
    for name, value in theirs.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2)
        elif "bn" in name and value.is_floating_point():
            value.add_(torch.randn_like(value) * 0.1)
    ours = ResNetBackbone(depth=depth, make_norm=norm_factory(norm, 1e-5)).double().eval()
    state = {name: value for name, value in theirs.state_dict().items() if not name.startswith("fc.")}
    if norm == "frozen":
        assert set(state) == set(ours.state_dict())
    ours.load_state_dict(state)
    return theirs, ours


def stages(model: nn.Module, x: Tensor) -> Iterator[Tensor]:
    for name, module in model.named_children():
        if name == "avgpool":
            return
        x = module(x)
        if name.startswith("layer"):
            yield x


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("norm", ["frozen", "batch", "fixed_statistics", "sync"])
def test_maps_are_torchvisions(depth: Depth, norm: NormKind) -> None:
    theirs, ours = theirs_and_ours(depth, norm)
    # 75 x 97: every level is rounded up.
    pixels = torch.randn(1, 3, 75, 97, dtype=torch.float64)
    maps = ours(pixels)  # with a graph: a frozen norm is folded
    for found, expected, channels, stride in zip(
        maps, stages(theirs, pixels), ours.channels, ours.strides_px, strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        assert found.shape == (1, channels, -(-75 // stride), -(-97 // stride))
    with torch.no_grad():  # without: it is not
        for found, expected in zip(ours(pixels), maps, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_gradients_through_a_folded_norm_are_torchvisions() -> None:
    theirs, ours = theirs_and_ours(18, "frozen")
    pixels = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    sum(x.square().sum() for x in stages(theirs, pixels)).backward()
    sum(x.square().sum() for x in ours(pixels)).backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-9, atol=1e-9)


def test_caffe_style_has_its_stride_in_the_first_convolution() -> None:
    strides = {
        style: [
            (block.conv1.stride[0], block.conv2.stride[0])
            for block in ResNetBackbone(depth=50, make_norm=nn.BatchNorm2d, style=style)
            .get_submodule("layer2")
            .children()
        ]
        for style in ("pytorch", "caffe")
    }
    assert strides == {"pytorch": [(1, 2), (1, 1), (1, 1), (1, 1)], "caffe": [(2, 1), (1, 1), (1, 1), (1, 1)]}


@pytest.mark.parametrize("frozen_stages", range(6))
@pytest.mark.parametrize("norm", ["frozen", "batch"])
def test_frozen_stages_are_torchvisions(norm: NormKind, frozen_stages: int) -> None:
    theirs = resnet_fpn_backbone(
        backbone_name="resnet18",
        weights=None,
        trainable_layers=5 - frozen_stages,
        norm_layer=FrozenBatchNorm2d if norm == "frozen" else nn.BatchNorm2d,
    )
    expected = {name: parameter.requires_grad for name, parameter in theirs.body.named_parameters()}
    ours = ResNetBackbone(depth=18, make_norm=norm_factory(norm, 1e-5), frozen_stages=frozen_stages)
    assert {name: parameter.requires_grad for name, parameter in ours.named_parameters()} == expected


def test_coarser_maps_are_dropped() -> None:
    ours = ResNetBackbone(depth=18, make_norm=nn.BatchNorm2d)
    ours.keep_maps(3)
    assert [tuple(x.shape) for x in ours(torch.zeros(1, 3, 64, 64))] == [
        (1, 64, 16, 16),
        (1, 128, 8, 8),
        (1, 256, 4, 4),
    ]
    assert ours.strides_px == (4, 8, 16)
    assert not [name for name in ours.state_dict() if name.startswith("layer4")]


def test_a_dilated_last_stage_keeps_the_size_of_c4() -> None:
    theirs, _ = theirs_and_ours(50, "frozen")
    ours = ResNetBackbone(depth=50, make_norm=norm_factory("frozen", 1e-5), dilation=2).double().eval()
    ours.load_state_dict({name: value for name, value in theirs.state_dict().items() if not name.startswith("fc.")})
    # torchvision's own option leaves the first block's 3x3 convolution as it is; detectron2's DC5 dilates it too.
    for block in theirs.get_submodule("layer4").children():
        block.conv2.stride, block.conv2.dilation, block.conv2.padding = (1, 1), (2, 2), (2, 2)
    theirs.get_submodule("layer4.0.downsample.0").stride = (1, 1)
    pixels = torch.randn(1, 3, 75, 97, dtype=torch.float64)
    with torch.no_grad():
        found, expected = ours(pixels)[-1], list(stages(theirs, pixels))[-1]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert found.shape == (1, 2048, 5, 7)
    assert ours.strides_px == (4, 8, 16, 16)


def test_a_resnext_is_torchvisions() -> None:
    from torchvision.models import resnext50_32x4d

    torch.manual_seed(0)
    theirs = resnext50_32x4d().double().eval()
    cardinality = Cardinality(groups=32, group_width=4)
    ours = ResNetBackbone(depth=50, make_norm=nn.BatchNorm2d, cardinality=cardinality).double().eval()
    ours.load_state_dict({name: value for name, value in theirs.state_dict().items() if not name.startswith("fc.")})
    pixels = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        found, expected = ours(pixels)[-1], list(stages(theirs, pixels))[-1]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
