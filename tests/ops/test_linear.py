from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from rcnn.ops import linear as module_under_test
from rcnn.ops.linear import linear, linear_over_maps

SHAPES = [(5, 12), (5, 3, 2, 2), (1, 3, 2, 2)]


def layer_and_input(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, outputs: int = 7
) -> tuple[nn.Linear, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=dtype)
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    return nn.Linear(12, outputs, dtype=dtype), x.requires_grad_()


def apply(layer: nn.Linear, x: Tensor) -> Tensor:
    return linear(layer, x) if x.dim() == 2 else linear_over_maps(layer, x)


@pytest.mark.parametrize("shape", [*SHAPES, (0, 12), (0, 3, 2, 2)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_output_and_gradients_are_the_layers(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    layer, x = layer_and_input(shape, dtype)
    variables = [x, *layer.parameters()]
    expected, given = layer(x.flatten(1)), apply(layer, x)
    upstream = torch.randn_like(expected)
    assert_close(given, expected, rtol=tolerance, atol=tolerance)
    wanted = torch.autograd.grad(expected, variables, upstream)
    assert_close(torch.autograd.grad(given, variables, upstream), wanted, rtol=tolerance, atol=tolerance)


def test_more_outputs_than_are_computed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_under_test, "_OUTPUTS_AT_ONCE", 3)
    test_output_and_gradients_are_the_layers((5, 3, 2, 2), torch.float32, 1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_under_autocast(shape: tuple[int, ...]) -> None:
    layer, x = layer_and_input(shape)
    half = x.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        given = apply(layer, half)
    expected = layer(x.flatten(1))
    assert given.dtype == torch.bfloat16
    assert_close(given.float(), expected, rtol=2**-6, atol=2**-5)
    of_x, of_weight, of_bias = torch.autograd.grad(given.sum(), [half, *layer.parameters()])
    assert (of_x.dtype, of_weight.dtype, of_bias.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    wanted = torch.autograd.grad(expected.sum(), [x, *layer.parameters()])
    for one, other in zip((of_x, of_weight, of_bias), wanted, strict=True):
        assert_close(one.float(), other, rtol=2**-6, atol=2**-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_frozen_layer_and_input_without_gradient(shape: tuple[int, ...]) -> None:
    layer, x = layer_and_input(shape)
    layer.requires_grad_(False)
    assert_close(torch.autograd.grad(apply(layer, x).sum(), x), torch.autograd.grad(layer(x.flatten(1)).sum(), x))
    layer.requires_grad_(True)
    fixed = x.detach()
    expected = torch.autograd.grad(layer(fixed.flatten(1)).sum(), layer.weight)
    assert_close(torch.autograd.grad(apply(layer, fixed).sum(), layer.weight), expected)


def test_without_a_graph_it_is_the_layer() -> None:
    layer, x = layer_and_input((5, 3, 2, 2))
    with torch.no_grad():
        assert_close(linear_over_maps(layer, x), layer(x.flatten(1)), rtol=0, atol=0)


def test_where_onednn_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_under_test, "onednn_works", lambda dtype: False)
    test_output_and_gradients_are_the_layers((5, 3, 2, 2), torch.float32, 1e-6)
