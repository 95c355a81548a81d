from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from rcnn.ops import fused
from rcnn.ops.folding import FoldedWeights
from rcnn.ops.fused import Activation, ConvGeometry, FusedConv2d, FusedFlatLinear, FusedLinear, FusedPointwise

REFERENCES = {
    Activation.NONE: lambda x: x,
    Activation.RELU: F.relu,
    Activation.RELU6: F.relu6,
    Activation.HARDSWISH: F.hardswish,
    Activation.HARDSIGMOID: F.hardsigmoid,
    Activation.SILU: F.silu,
    Activation.SIGMOID: torch.sigmoid,
}
PLAIN = ConvGeometry(stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1)
TOLERANCES = {torch.float32: (1e-5, 1e-5), torch.float64: (1e-12, 1e-12), torch.bfloat16: (2**-6, 0.1)}


@pytest.fixture(params=["onednn", "plain"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to compute: with the private operators, and as if the build had none."""
    if request.param == "plain":
        monkeypatch.setattr(fused, "onednn_works", lambda dtype: False)
    elif not fused.onednn_works(torch.float32):
        pytest.skip("this build of PyTorch has no usable oneDNN operators: the plain path is what runs here")
    return request.param


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def weights_of(weight: Tensor, bias: Tensor) -> FoldedWeights:
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2:], dtype=weight.dtype)
    conv.weight, conv.bias = nn.Parameter(weight), nn.Parameter(bias)
    return FoldedWeights(conv, None, weight.dtype)


def last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def assert_near(given: Tensor, expected: Tensor) -> None:
    rtol, atol = TOLERANCES[given.dtype]
    assert_close(given.double(), expected.double(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("activation", list(Activation))
def test_convolution_and_activation(path: str, activation: Activation, dtype: torch.dtype) -> None:
    weight, bias, x = numbers(6, 4, 3, 3, dtype=dtype), numbers(6, dtype=dtype), last(numbers(2, 4, 7, 5, dtype=dtype))
    layer = FusedConv2d(weights=weights_of(weight, bias), geometry=PLAIN, activation=activation)
    expected = REFERENCES[activation](F.conv2d(x.double(), weight.double(), bias.double(), padding=1))
    for _ in range(2):  # the first call packs
        assert_near(layer(x), expected)
    assert layer(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("overwrites", [False, True])
@pytest.mark.parametrize("activation", [Activation.NONE, Activation.RELU, Activation.HARDSWISH])
def test_residual_sum(path: str, activation: Activation, overwrites: bool) -> None:
    weight, bias, x, other = (
        numbers(6, 4, 3, 3),
        numbers(6),
        last(numbers(2, 4, 7, 5)),
        last(numbers(2, 6, 7, 5, seed=1)),
    )
    layer = FusedConv2d(
        weights=weights_of(weight, bias), geometry=PLAIN, activation=activation, overwrites_other=overwrites
    )
    expected = REFERENCES[activation](F.conv2d(x, weight, bias, padding=1) + other)
    before = other.clone()
    assert_near(layer(x, other), expected)
    if not overwrites:
        assert_close(other, before)


def test_residual_that_broadcasts(path: str) -> None:
    weight, bias, x, other = numbers(6, 4, 3, 3), numbers(6), last(numbers(2, 4, 7, 5)), numbers(1, 6, 1, 1, seed=1)
    layer = FusedConv2d(
        weights=weights_of(weight, bias), geometry=PLAIN, activation=Activation.RELU, overwrites_other=True
    )
    assert_near(layer(x, other), F.relu(F.conv2d(x, weight, bias, padding=1) + other))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_geometry(path: str, groups: int) -> None:
    geometry = ConvGeometry(stride=(2, 1), padding=(2, 1), dilation=(2, 1), groups=groups)
    weight, bias, x = numbers(8, 4 // groups, 3, 3), numbers(8), last(numbers(1, 4, 11, 9))
    layer = FusedConv2d(weights=weights_of(weight, bias), geometry=geometry, activation=Activation.NONE)
    assert_near(layer(x), F.conv2d(x, weight, bias, (2, 1), (2, 1), (2, 1), groups))


def test_other_sizes_than_the_first(path: str) -> None:
    weight, bias = numbers(6, 4, 3, 3), numbers(6)
    layer = FusedConv2d(weights=weights_of(weight, bias), geometry=PLAIN, activation=Activation.NONE)
    for images, height, width in ((1, 7, 5), (3, 40, 31), (1, 1, 1), (0, 7, 5)):
        x = last(numbers(images, 4, height, width))
        assert_near(layer(x), F.conv2d(x, weight, bias, padding=1))


def test_same_padding_by_hand(path: str) -> None:
    # Size 4, stride 2, kernel 3: two outputs span 2 + 3 = 5 cells, one more than there are; it is added at the end.
    geometry = ConvGeometry(stride=(2, 2), padding=(0, 0), dilation=(1, 1), groups=1, same=True)
    layer = FusedConv2d(
        weights=weights_of(torch.ones(1, 1, 3, 3), torch.zeros(1)), geometry=geometry, activation=Activation.NONE
    )
    # Ones: 9 cells inside, 6 where one column or row is padding, 4 in the corner with both.
    assert layer(torch.ones(1, 1, 4, 4)).tolist() == [[[[9.0, 6.0], [6.0, 4.0]]]]


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("activation", list(Activation))
def test_linear(path: str, activation: Activation, dtype: torch.dtype) -> None:
    weight, bias = numbers(6, 12, dtype=dtype), numbers(6, dtype=dtype)
    layer = FusedLinear(weight=weight, bias=bias, activation=activation)
    for rows in (5, 1, 0, 33):
        x = numbers(rows, 12, dtype=dtype)
        expected = REFERENCES[activation](F.linear(x.double(), weight.double(), bias.double()))
        assert_near(layer(x), expected)


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(("height", "width"), [(4, 4), (2, 8), (2, 3)])
def test_linear_over_maps(path: str, height: int, width: int, channels_last: bool, dtype: torch.dtype) -> None:
    weight, bias = numbers(6, 3 * height * width, dtype=dtype), numbers(6, dtype=dtype)
    layer = FusedFlatLinear(weight=weight, bias=bias, activation=Activation.RELU, channels=3)
    for rows in (5, 0, 2):
        x = numbers(rows, 3, height, width, dtype=dtype)
        expected = F.relu(F.linear(x.double().flatten(1), weight.double(), bias.double()))
        assert_near(layer(last(x) if channels_last else x), expected)


def test_linear_over_maps_in_several_packs(path: str) -> None:
    weight, bias = numbers(600, 3 * 2 * 2), numbers(600)
    layer = FusedFlatLinear(weight=weight, bias=bias, activation=Activation.RELU, channels=3)
    for x in (numbers(5, 3, 2, 2), numbers(5, 3, 1, 4)):
        assert_near(layer(last(x)), F.relu(F.linear(x.double().flatten(1), weight.double(), bias.double())))


def test_weights_that_change_before_they_are_read_are_refused(path: str) -> None:
    weight, bias, x = nn.Parameter(numbers(6, 4, 3, 3)), numbers(6), last(numbers(1, 4, 5, 5))
    conv = FusedConv2d(weights=weights_of(weight, bias), geometry=PLAIN, activation=Activation.NONE)
    linear = FusedLinear(weight=weight.detach().flatten(1), bias=bias, activation=Activation.NONE)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="prepare it again"):
        conv(x)
    row = x.reshape(-1)[:36]
    if path == "onednn":  # packed at once, when nothing had changed
        assert_near(linear(row), F.linear(row.double(), weight.detach().double().flatten(1) / 2, bias.double()))
    else:
        with pytest.raises(RuntimeError, match="prepare it again"):
            linear(row)


@pytest.mark.parametrize("cells", [(3, 4), (1, 1)])
@pytest.mark.parametrize("activation", list(Activation))
def test_a_pointwise_convolution_is_a_linear_layer_of_the_cells(
    path: str, activation: Activation, cells: tuple[int, int]
) -> None:
    weight, bias = numbers(6, 4, 1, 1), numbers(6)
    layer = FusedPointwise(weights=weights_of(weight, bias), activation=activation)
    assert layer.uses_onednn == (path == "onednn")
    # Of other sizes too than those of the first call, and in another layout than it is meant for.
    for x in (last(numbers(2, 4, *cells)), last(numbers(1, 4, 5, 2)), numbers(2, 4, 3, 3), numbers(0, 4, 3, 3)):
        found = layer(x)
        assert_near(found, REFERENCES[activation](F.conv2d(x.double(), weight.double(), bias.double())))
        assert found.is_contiguous(memory_format=torch.channels_last)


def test_missing_operators_mean_the_plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    class Absent:
        def __getattr__(self, name: str) -> object:
            raise AttributeError(name)

    monkeypatch.setattr(torch.ops, "mkldnn", Absent())
    monkeypatch.setattr(fused, "onednn_operators", fused.onednn_operators.__wrapped__)
    assert not fused.onednn_works.__wrapped__(torch.float32)


def test_wrong_results_mean_the_plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    if not fused.onednn_works(torch.float32):
        pytest.skip("this build of PyTorch has no usable oneDNN operators")
    monkeypatch.setattr(fused, "_scalars", lambda activation: [0.0, 5.0])
    assert not fused.onednn_works.__wrapped__(torch.float32)
