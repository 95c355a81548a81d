"""Towers of convolutions, scales and the first bias."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rcnn.dense.towers import ConvTower, Scale, group_norm, prior_bias

GROUPS_OF_TWO = partial(nn.GroupNorm, 2)


def test_a_tower_is_convolution_norm_relu() -> None:
    tower = ConvTower(in_channels=3, channels=4, num_convs=2, make_norm=GROUPS_OF_TWO)
    assert sorted(dict(tower.named_parameters())) == [
        f"layers.{number}.{name}" for number in (0, 1) for name in ("0.weight", "1.bias", "1.weight")
    ]
    x = torch.randn(2, 3, 5, 7)
    expected = x
    for layer in tower.layers:
        conv, norm = layer
        expected = F.group_norm(F.conv2d(expected, conv.weight, padding=1), 2, norm.weight, norm.bias).relu()
    torch.testing.assert_close(tower(x), expected)
    assert tower.out_channels == 4


def test_biases_without_a_norm_or_on_demand() -> None:
    names = dict(ConvTower(in_channels=3, channels=4, num_convs=1).named_parameters())
    assert set(names) == {"layers.0.0.weight", "layers.0.0.bias"}
    both = ConvTower(in_channels=3, channels=4, num_convs=1, make_norm=GROUPS_OF_TWO, conv_bias=True)
    assert set(dict(both.named_parameters())) == {f"layers.0.{i}.{kind}" for i in "01" for kind in ("weight", "bias")}


def test_the_start() -> None:
    tower = ConvTower(in_channels=64, channels=64, num_convs=2)
    for name, parameter in tower.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        else:
            assert parameter.std().item() == pytest.approx(0.01, rel=0.1)


def test_no_convolutions() -> None:
    tower = ConvTower(in_channels=3, channels=4, num_convs=0)
    x = torch.randn(1, 3, 2, 2)
    assert tower(x) is x
    assert tower.out_channels == 3


def test_scale() -> None:
    scale = Scale(2.0)
    assert scale(torch.tensor([1.5])).item() == 3.0
    assert [tuple(p.shape) for p in scale.parameters()] == [()]


def test_the_first_score_is_the_prior() -> None:
    # -ln 99, as RetinaNet writes it.
    assert prior_bias(0.01) == pytest.approx(-4.59511985)
    assert torch.tensor(prior_bias(0.2)).sigmoid().item() == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("channels", "groups"), [(256, 32), (64, 32), (48, 16), (32, 16), (8, 4), (7, 1), (2, 1), (1, 1)]
)
def test_groups_of_the_norm(channels: int, groups: int) -> None:
    norm = group_norm(channels)
    assert isinstance(norm, nn.GroupNorm)
    assert norm.num_groups == groups
    if channels > 1:
        norm(torch.randn(1, channels, 1, 1))  # of a single cell, which torch refuses for groups of one channel
