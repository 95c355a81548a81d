from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from rcnn.ops import sparse_gradient
from rcnn.ops.sparse_gradient import conv_for_sampled_loss

HEIGHT, WIDTH = 9, 11


def conv_and_map(dtype: torch.dtype = torch.float64, channels_last: bool = True) -> tuple[nn.Conv2d, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 4, HEIGHT, WIDTH, dtype=dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    return nn.Conv2d(4, 6, 3, padding=1, dtype=dtype), x.requires_grad_()


def upstream_at(cells: list[tuple[int, int, int]], dtype: torch.dtype = torch.float64) -> Tensor:
    gradient = torch.zeros(2, 6, HEIGHT, WIDTH, dtype=dtype)
    for image, y, x in cells:
        gradient[image, :, y, x] = torch.randn(6, dtype=dtype)
    return gradient


CELLS = {
    "none": [],
    "one inside": [(1, 4, 5)],
    "corners": [(0, 0, 0), (0, 0, WIDTH - 1), (1, HEIGHT - 1, 0), (1, HEIGHT - 1, WIDTH - 1)],
    "borders of both pictures": [(0, HEIGHT - 1, 3), (1, 0, 3), (0, 4, 0), (0, 3, WIDTH - 1)],
    "neighbours": [(0, 4, 4), (0, 4, 5), (0, 5, 5)],
    "many": [(0, y, x) for y in range(HEIGHT) for x in range(WIDTH)],  # the dense way
}


@pytest.mark.parametrize("cells", CELLS)
@pytest.mark.parametrize("channels_last", [True, False])
def test_gradients_are_those_of_the_convolution(cells: str, channels_last: bool) -> None:
    conv, x = conv_and_map(channels_last=channels_last)
    variables = [x, *conv.parameters()]
    upstream = upstream_at(CELLS[cells])
    given, expected = conv_for_sampled_loss(conv, x), conv(x)
    assert_close(given, expected)
    assert_close(
        torch.autograd.grad(given, variables, upstream),
        torch.autograd.grad(expected, variables, upstream),
        atol=1e-12,
        rtol=1e-12,
    )


def test_both_ways_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    sparse = sparse_gradient._sparse_gradients
    monkeypatch.setattr(sparse_gradient, "_sparse_gradients", lambda *given: taken.append(1) or sparse(*given))
    conv, x = conv_and_map()
    for cells, count in (("neighbours", 1), ("many", 1)):
        conv_for_sampled_loss(conv, x).backward(upstream_at(CELLS[cells]))
        assert len(taken) == count


def test_fixed_input_and_fixed_weights() -> None:
    conv, x = conv_and_map()
    upstream = upstream_at(CELLS["corners"])
    (given,) = torch.autograd.grad(conv_for_sampled_loss(conv, x.detach()), conv.weight, upstream)
    assert_close(given, torch.autograd.grad(conv(x.detach()), conv.weight, upstream)[0])
    conv.requires_grad_(False)
    (given,) = torch.autograd.grad(conv_for_sampled_loss(conv, x), x, upstream)
    assert_close(given, torch.autograd.grad(conv(x), x, upstream)[0])


def test_under_autocast() -> None:
    conv, x = conv_and_map(torch.float32)
    upstream = upstream_at(CELLS["neighbours"], torch.float32)
    variables = [x, *conv.parameters()]
    expected = torch.autograd.grad(conv(x), variables, upstream)
    with torch.autocast("cpu", torch.bfloat16):
        given = conv_for_sampled_loss(conv, x)
    assert given.dtype == torch.bfloat16
    for one, other in zip(torch.autograd.grad(given, variables, upstream.bfloat16()), expected, strict=True):
        assert one.dtype == torch.float32
        assert_close(one, other, rtol=2**-5, atol=2**-4)


def test_other_convolutions_are_called_as_they_are() -> None:
    x = torch.randn(1, 4, 9, 9, requires_grad=True)
    for conv in (
        nn.Conv2d(4, 4, 1),
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, 3, 2, 1),
        nn.Conv2d(4, 4, 3, 1, 1, bias=False),
    ):
        out = conv_for_sampled_loss(conv, x)
        assert_close(out, conv(x), rtol=0, atol=0)
        assert "SparseBackward" not in type(out.grad_fn).__name__


def test_without_a_graph_it_is_the_convolution() -> None:
    conv, x = conv_and_map()
    with torch.no_grad():
        assert_close(conv_for_sampled_loss(conv, x), conv(x), rtol=0, atol=0)
