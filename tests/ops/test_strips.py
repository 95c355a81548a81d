"""The strips against the two layers as they are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import rcnn.ops.strips
from rcnn.ops.preparation import prepare_for_inference
from rcnn.ops.strips import StripwiseDepthwise


def pair(kernel: int, stride: int, padding: int, *, groups: int = 12) -> nn.Sequential:
    torch.manual_seed(0)
    depthwise = nn.Conv2d(12, 12, kernel, stride, padding, groups=groups)
    return nn.Sequential(nn.Conv2d(5, 12, 1), nn.BatchNorm2d(12), nn.Hardswish(), depthwise, nn.ReLU()).eval()


def strips_of(module: nn.Module) -> list[StripwiseDepthwise]:
    return [part for part in module.modules() if isinstance(part, StripwiseDepthwise)]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows of the expanded map there were at each call of the depthwise convolution."""
    heights: list[int] = []
    rows = StripwiseDepthwise._rows

    def noted(self: StripwiseDepthwise, x: Tensor, first: int, last: int) -> Tensor:
        heights.append(last - first)
        return rows(self, x, first, last)

    monkeypatch.setattr(StripwiseDepthwise, "_rows", noted)
    return heights


@pytest.mark.parametrize("size", [(16, 10), (17, 9)])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (5, 1, 2), (5, 2, 2), (3, 2, 0), (5, 3, 1), (1, 2, 0)]
)
@pytest.mark.parametrize("strips", [2, 3, 5])
def test_strips_give_the_whole(
    monkeypatch: pytest.MonkeyPatch, counted: list[int], kernel: int, stride: int, padding: int,
    size: tuple[int, int], strips: int,
) -> None:  # fmt: skip
    layers = pair(kernel, stride, padding)
    x = torch.randn(2, 5, *size, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(rcnn.ops.strips, "_STRIP_BYTES", -(-12 * 4 * size[0] * size[1] // strips))
    prepared = prepare_for_inference(layers)
    assert len(strips_of(prepared)) == 1
    with torch.no_grad():
        expected, found = layers(x), prepared(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    # Every row once, picture by picture.
    assert len(counted) == 2 * min(strips, expected.shape[2])
    assert sum(counted) == 2 * expected.shape[2]


def test_bfloat16_strips_are_the_whole_in_bfloat16(monkeypatch: pytest.MonkeyPatch, counted: list[int]) -> None:
    layers, x = pair(3, 2, 1), torch.randn(1, 5, 20, 12)
    whole = prepare_for_inference(layers, dtype=torch.bfloat16)(x)
    assert not counted
    monkeypatch.setattr(rcnn.ops.strips, "_STRIP_BYTES", 1000)
    found = prepare_for_inference(layers, dtype=torch.bfloat16)(x)
    assert len(counted) > 1
    assert torch.equal(found, whole)


def test_others_are_left_as_they_are() -> None:
    assert not strips_of(prepare_for_inference(pair(3, 1, 1, groups=3)))
    strided = nn.Sequential(nn.Conv2d(5, 12, 1, stride=2), nn.Conv2d(12, 12, 3, groups=12))
    assert not strips_of(prepare_for_inference(strided))


def test_a_map_that_others_read_stays_whole() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.expand, self.depthwise = nn.Conv2d(5, 12, 1), nn.Conv2d(12, 12, 3, padding=1, groups=12)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            wide = self.expand(x)
            return wide, self.depthwise(wide)

    assert not strips_of(prepare_for_inference(Shared()))
