from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor
from torch.testing import assert_close

from rcnn.ops.roi_pool import roi_pool


@pytest.fixture(scope="module")
def oracle(shared: Path) -> dict[str, Tensor]:
    with np.load(shared / "oracles/torchvision/ops/arrays.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files if name.startswith("roi")}


def pooled_from_one_level(feature: Tensor, rois: Tensor, size: tuple[int, int]) -> Tensor:
    level = torch.zeros(len(rois), dtype=torch.int64)
    return roi_pool([feature], rois[:, 1:], rois[:, 0].long(), level, scales=[(0.125, 0.125)], output_size=size)


@pytest.mark.parametrize("size", [(7, 7), (3, 5)])
def test_recorded_output_and_gradient(oracle: dict[str, Tensor], size: tuple[int, int]) -> None:
    feature = oracle["roi/input"].clone().requires_grad_()
    pooled = pooled_from_one_level(feature, oracle["roi/rois_batch_xyxy"], size)
    upstream = torch.from_numpy(np.random.RandomState(7).standard_normal(tuple(pooled.shape)))
    (gradient,) = torch.autograd.grad((pooled * upstream).sum(), feature)
    name = f"roi_pool/out={size[0]}x{size[1]}"
    for given, which in ((pooled, "output"), (gradient, "grad_input")):
        assert_close(given.flatten()[oracle[f"{name}/{which}@idx"]], oracle[f"{name}/{which}@val"])


def test_recorded_halves_round_away_from_zero(oracle: dict[str, Tensor]) -> None:
    pooled = pooled_from_one_level(oracle["roi/input"], oracle["roi_pool_half/rois"], (2, 2))
    assert_close(pooled, oracle["roi_pool_half/output"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_levels_keep_the_order_of_the_rois(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(2, 3, side, side, generator=generator).to(dtype).requires_grad_() for side in (32, 16)]
    corner = torch.rand(20, 2, generator=generator) * 64
    boxes = torch.cat([corner, corner + torch.rand(20, 2, generator=generator) * 60], 1)
    image = torch.randint(0, 2, (20,), generator=generator)
    level = torch.randint(0, 2, (20,), generator=generator)
    pooled = roi_pool(features, boxes, image, level, scales=[(0.25, 0.25), (0.125, 0.125)], output_size=7)
    assert pooled.dtype == dtype
    for index in range(20):
        one = torch.cat([image[index, None, None].float(), boxes[index, None]], 1).double()
        feature = features[level[index]].double()
        expected = torchvision.ops.roi_pool(feature, one, 7, (0.25, 0.125)[level[index]])
        assert_close(pooled[index].double(), expected[0])
    assert all(gradient.any() for gradient in torch.autograd.grad(pooled.sum(), features))


def test_no_roi_keeps_the_graph() -> None:
    feature = torch.randn(1, 3, 8, 8, requires_grad=True)
    pooled = pooled_from_one_level(feature, torch.zeros(0, 5), (7, 7))
    assert pooled.shape == (0, 3, 7, 7)
    assert not torch.autograd.grad(pooled.sum(), feature)[0].any()
