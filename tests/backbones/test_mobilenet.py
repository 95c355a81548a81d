"""MobileNets against torchvision's classifiers and its detection extractor, live."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.detection.backbone_utils import _mobilenet_extractor
from torchvision.ops import FrozenBatchNorm2d

from rcnn.backbones.mobilenet import MobileNetBackbone, MobileNetVersion
from rcnn.backbones.norm import norm_factory

BUILDERS = {"v2": torchvision.models.mobilenet_v2, "v3_large": torchvision.models.mobilenet_v3_large}


def backbone(version: MobileNetVersion, **choices: object) -> MobileNetBackbone:
    return MobileNetBackbone(version=version, make_norm=norm_factory("frozen", 1e-5), **choices)  # type: ignore[arg-type]


@pytest.mark.parametrize("version", ["v2", "v3_large"])
def test_last_two_maps_are_those_of_torchvisions_detectors(version: MobileNetVersion) -> None:
    body = BUILDERS[version](weights=None, norm_layer=FrozenBatchNorm2d)
    theirs = _mobilenet_extractor(body, fpn=True, trainable_layers=6).body.eval()
    ours = backbone(version, maps="last_two").eval()
    ours.load_state_dict({f"features.{name}": value for name, value in theirs.state_dict().items()})
    pixels = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for found, expected in zip(ours(pixels), theirs(pixels).values(), strict=True):
            torch.testing.assert_close(found, expected)
            assert found.shape[-2:] == (2, 3)
    assert ours.strides_px == (32, 32)


@pytest.mark.parametrize("version", ["v2", "v3_large"])
def test_the_pyramid_halves_from_map_to_map(version: MobileNetVersion) -> None:
    ours = backbone(version)
    maps = ours(torch.zeros(1, 3, 100, 100))
    # ceil(100 / 4), ... / 8, / 16, / 32
    assert [x.shape[-1] for x in maps] == [25, 13, 7, 4]
    assert tuple(x.shape[1] for x in maps) == ours.channels
    # Published widths of the stages: MobileNetV2 table 2, MobileNetV3 table 1.
    assert ours.channels == {"v2": (24, 32, 96, 1280), "v3_large": (24, 40, 112, 960)}[version]


@pytest.mark.parametrize("version", ["v2", "v3_large"])
@pytest.mark.parametrize("frozen_stages", range(7))
def test_frozen_stages_are_torchvisions(version: MobileNetVersion, frozen_stages: int) -> None:
    theirs = _mobilenet_extractor(BUILDERS[version](weights=None), fpn=True, trainable_layers=6 - frozen_stages)
    expected = {f"features.{name}": p.requires_grad for name, p in theirs.body.named_parameters()}
    ours = MobileNetBackbone(version=version, make_norm=nn.BatchNorm2d, frozen_stages=frozen_stages)
    assert {name: p.requires_grad for name, p in ours.named_parameters()} == expected


def test_coarser_maps_are_dropped() -> None:
    ours = backbone("v2")
    ours.keep_maps(2)
    assert [tuple(x.shape) for x in ours(torch.zeros(1, 3, 64, 64))] == [(1, 24, 16, 16), (1, 32, 8, 8)]
    assert len(ours.features) == 7  # up to the last block at stride 8
