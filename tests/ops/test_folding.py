from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchvision
from timm.layers.norm_act import FrozenBatchNormAct2d
from torch import nn
from torch.testing import assert_close

from rcnn.ops.folding import affine_of, folded, is_fixed_norm

NORMS = {
    "batch": lambda: nn.BatchNorm2d(6, eps=1e-3).eval(),
    "no affine": lambda: nn.BatchNorm2d(6, affine=False).eval(),
    "torchvision frozen": lambda: torchvision.ops.FrozenBatchNorm2d(6, eps=1e-3),
    "timm frozen": lambda: FrozenBatchNormAct2d(6, eps=1e-3, apply_act=False),
}


def with_statistics(norm: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*norm.named_parameters(), *norm.named_buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + (0.5 if "var" in name else 0.0))
    return norm.double()


def test_hand_worked_affine() -> None:
    # weight 3, bias 1, mean 2, variance 3.75, eps 0.25: sqrt 4 = 2, scale 3 / 2, shift 1 - 2 * 3 / 2 = -2.
    norm = torchvision.ops.FrozenBatchNorm2d(1, eps=0.25)
    for name, value in {"weight": 3.0, "bias": 1.0, "running_mean": 2.0, "running_var": 3.75}.items():
        norm.get_buffer(name).fill_(value)
    scale, shift = affine_of(norm)
    assert (scale.tolist(), shift.tolist()) == ([1.5], [-2.0])
    assert scale.dtype == torch.float64


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_folded_equals_convolution_and_norm(kind: str, has_bias: bool, groups: int) -> None:
    torch.manual_seed(0)
    norm = with_statistics(NORMS[kind]())
    conv = nn.Conv2d(4, 6, 3, groups=groups, bias=has_bias).double()
    x = torch.randn(2, 4, 9, 9).double()
    assert is_fixed_norm(norm)
    assert_close(F.conv2d(x, *folded(conv.weight, conv.bias, norm), groups=groups), norm(conv(x)))


def test_without_norm_only_the_bias_is_filled_in() -> None:
    weight = torch.randn(2, 3, 1, 1)
    got, bias = folded(weight, None, None)
    assert_close(got, weight.double())
    assert not bias.any()


def test_what_is_not_a_fixed_norm() -> None:
    for module in (nn.BatchNorm2d(3).train(), nn.GroupNorm(1, 3), nn.Conv2d(3, 3, 1), nn.LayerNorm(3)):
        assert not is_fixed_norm(module)
    assert not is_fixed_norm(nn.BatchNorm2d(3, track_running_stats=False).eval())
