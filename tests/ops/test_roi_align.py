from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from rcnn.ops import roi_align as module_under_test
from rcnn.ops.roi_align import RoIAlignKernel, roi_align

ROWS, TORCHVISION = RoIAlignKernel.ROWS, RoIAlignKernel.TORCHVISION
STRIDES = (4, 8, 16, 32)
SCALES = [(1 / stride, 1 / stride) for stride in STRIDES]


@pytest.fixture(scope="module")
def oracle(shared: Path) -> dict[str, Tensor]:
    with np.load(shared / "oracles/torchvision/ops/arrays.npz") as arrays:
        wanted = ("roi", "multiscale")
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files if name.startswith(wanted)}


def assert_samples(given: Tensor, oracle: dict[str, Tensor], name: str) -> None:
    """`given` at the recorded places of array `name`."""
    assert_close(given.flatten()[oracle[f"{name}@idx"]], oracle[f"{name}@val"], rtol=1e-9, atol=1e-11)


def pyramid(images: int = 2, channels: int = 5, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(128 // stride, 192 // stride) for stride in STRIDES]
    return [torch.randn(images, channels, *shape, generator=generator, dtype=dtype) for shape in shapes]


def random_rois(count: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes within, across and beyond the borders of a 128x192 picture, two images, four levels."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.rand(count, 2, generator=generator, dtype=dtype) * torch.tensor([230.0, 170.0]) - 20
    side = torch.exp(torch.rand(count, 2, generator=generator, dtype=dtype) * 6 - 1)
    image = torch.randint(0, 2, (count,), generator=generator)
    level = torch.randint(0, len(STRIDES), (count,), generator=generator)
    return torch.cat([centre - side / 2, centre + side / 2], 1).to(dtype), image, level


def torchvision_levels(
    features: list[Tensor], boxes: Tensor, image: Tensor, level: Tensor, size: int, ratio: int, aligned: bool
) -> Tensor:
    rois = torch.cat([image[:, None].to(boxes), boxes], 1)
    pooled = torch.zeros(len(boxes), features[0].shape[1], size, size, dtype=features[0].dtype)
    for index, (feature, stride) in enumerate(zip(features, STRIDES, strict=True)):
        some = (level == index).nonzero()[:, 0]
        part = torchvision.ops.roi_align(feature, rois[some], size, 1 / stride, ratio, aligned)
        pooled = pooled.index_copy(0, some, part)
    return pooled


@pytest.mark.parametrize("kernel", [ROWS, TORCHVISION])
@pytest.mark.parametrize("size", [(7, 7), (3, 5)])
@pytest.mark.parametrize("ratio", [0, 1, 2])
@pytest.mark.parametrize("aligned", [False, True])
def test_recorded_output_and_gradient(
    oracle: dict[str, Tensor], aligned: bool, ratio: int, size: tuple[int, int], kernel: RoIAlignKernel
) -> None:
    feature = oracle["roi/input"].clone().requires_grad_()
    rois = oracle["roi/rois_batch_xyxy"]
    pooled = roi_align(
        [feature], rois[:, 1:], rois[:, 0].long(), torch.zeros(len(rois), dtype=torch.int64),
        scales=[(0.125, 0.125)], output_size=size, sampling_ratio=ratio, aligned=aligned, kernel=kernel,
    )  # fmt: skip
    upstream = torch.from_numpy(np.random.RandomState(7).standard_normal(tuple(pooled.shape)))
    (gradient,) = torch.autograd.grad((pooled * upstream).sum(), feature)
    name = f"roi_align/aligned={aligned}/sampling={ratio}/out={size[0]}x{size[1]}"
    assert_samples(pooled, oracle, f"{name}/output")
    assert_samples(gradient, oracle, f"{name}/grad_input")


@pytest.mark.parametrize(
    ("case", "size", "ratio"), [("multiscale", (7, 7), 2), ("multiscale_s112_l3_sampling0_out3x5", (3, 5), 0)]
)
def test_recorded_pyramid(oracle: dict[str, Tensor], case: str, size: tuple[int, int], ratio: int) -> None:
    features = [oracle[f"multiscale/input/{level}"] for level in range(4)]
    boxes = [oracle["multiscale/boxes/0"], oracle["multiscale/boxes/1"]]
    image = torch.repeat_interleave(torch.tensor([0, 1]), torch.tensor([len(some) for some in boxes]))
    pooled = roi_align(
        features, torch.cat(boxes), image, oracle[f"{case}/levels"],
        scales=[(scale, scale) for scale in oracle["multiscale/scales"].tolist()],
        output_size=size, sampling_ratio=ratio, aligned=False,
    )  # fmt: skip
    assert_samples(pooled, oracle, f"{case}/output")


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("ratio", "aligned"), [(2, False), (2, True), (0, False), (0, True), (3, True)])
def test_pyramid_equals_torchvision(
    ratio: int, aligned: bool, dtype: torch.dtype, tolerance: float, channels_last: bool
) -> None:
    features = [feature.requires_grad_() for feature in pyramid(dtype=dtype)]
    if channels_last:
        features = [feature.detach().contiguous(memory_format=torch.channels_last) for feature in features]
        features = [feature.requires_grad_() for feature in features]
    boxes, image, level = random_rois(300, dtype)
    expected = torchvision_levels(features, boxes, image, level, 7, ratio, aligned)
    pooled = roi_align(
        features, boxes, image, level, scales=SCALES, output_size=7, sampling_ratio=ratio, aligned=aligned
    )
    assert_close(pooled, expected, rtol=tolerance, atol=tolerance)
    upstream = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    gradients = torch.autograd.grad(pooled, features, upstream)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, features, upstream), strict=True):
        assert_close(gradient, wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))


coordinate = st.one_of(
    st.floats(-300, 500, width=32), st.sampled_from([-4.0, 0.0, 4.0, 100.0, 124.0, 127.999, 128.0, 192.0, 196.0])
)
roi = st.tuples(coordinate, coordinate, coordinate, coordinate, st.integers(0, 1), st.integers(0, 3))


@settings(max_examples=60, deadline=None)
@given(
    rois=st.lists(roi, max_size=6),
    ratio=st.integers(0, 3),
    aligned=st.booleans(),
    size=st.integers(1, 4),
    merge=st.booleans(),
)
def test_any_boxes_equal_torchvision(rois: list[tuple], ratio: int, aligned: bool, size: int, merge: bool) -> None:
    features = [feature.requires_grad_() for feature in pyramid(channels=2)]
    boxes = torch.tensor([some[:4] for some in rois], dtype=torch.float64).view(-1, 4)
    if ratio == 0:  # torchvision reserves as much memory as there are samples and fails where width times height is < 0
        boxes = torch.cat([boxes.view(-1, 2, 2).amin(1), boxes.view(-1, 2, 2).amax(1)], 1)
    image = torch.tensor([some[4] for some in rois], dtype=torch.int64)
    level = torch.tensor([some[5] for some in rois], dtype=torch.int64)
    expected = torchvision_levels(features, boxes, image, level, size, ratio, aligned)
    with patch.object(module_under_test, "_FEW_ROIS", 0 if merge else 256):
        pooled = roi_align(
            features, boxes, image, level, scales=SCALES, output_size=size, sampling_ratio=ratio, aligned=aligned
        )
    assert_close(pooled, expected, rtol=1e-10, atol=1e-10)
    if rois:
        gradients = torch.autograd.grad(pooled.square().sum(), features)
        wanted = torch.autograd.grad(expected.square().sum(), features)
        assert_close(gradients, wanted, rtol=1e-10, atol=1e-10)


def test_reversed_box_with_adaptive_samples_is_zero() -> None:
    features = pyramid()
    zero = torch.zeros(1, dtype=torch.int64)
    box = torch.tensor([[40.0, 10.0, 20.0, 60.0]])
    pooled = roi_align(features, box, zero, zero, scales=SCALES, output_size=7, sampling_ratio=0, aligned=True)
    assert not pooled.any()


def test_hand_worked_bin() -> None:
    # A 2x2 map, cells 1 2 / 3 4, one RoI over cells 0..1 with one bin of one sample at (0.5, 0.5): the mean, 2.5.
    feature = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    box, zero = torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.zeros(1, dtype=torch.int64)
    pooled = roi_align([feature], box, zero, zero, scales=[(1.0, 1.0)], output_size=1, sampling_ratio=1, aligned=False)
    assert pooled.tolist() == [[[[2.5]]]]


def test_vertical_and_horizontal_scale_differ() -> None:
    feature = torch.randn(1, 3, 16, 24, dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.int64)
    for kernel in RoIAlignKernel:
        pooled = roi_align(
            [feature], torch.tensor([[8.0, 4.0, 80.0, 30.0]]).double(), zero, zero,
            scales=[(0.5, 0.125)], output_size=7, sampling_ratio=2, aligned=True, kernel=kernel,
        )  # fmt: skip
        # The same box in cells: x / 8, y / 2.
        cells = torch.tensor([[0.0, 1.0, 2.0, 10.0, 15.0]]).double()
        assert_close(pooled, torchvision.ops.roi_align(feature, cells, 7, 1.0, 2, True))


@pytest.mark.parametrize("kernel", list(RoIAlignKernel))
@pytest.mark.parametrize("ratio", [0, 2])
def test_no_roi_keeps_the_graph(kernel: RoIAlignKernel, ratio: int) -> None:
    features = [feature.requires_grad_() for feature in pyramid()]
    empty = torch.zeros(0, dtype=torch.int64)
    pooled = roi_align(
        features, torch.zeros(0, 4), empty, empty,
        scales=SCALES, output_size=7, sampling_ratio=ratio, aligned=False, kernel=kernel,
    )  # fmt: skip
    assert pooled.shape == (0, 5, 7, 7)
    for gradient in torch.autograd.grad(pooled.sum(), features):
        assert not gradient.any()


@pytest.mark.parametrize("kernel", list(RoIAlignKernel))
def test_bfloat16_errs_by_its_rounding(kernel: RoIAlignKernel) -> None:
    exact = pyramid(dtype=torch.float32)
    boxes, image, level = random_rois(200, torch.float32)
    options = {"scales": SCALES, "output_size": 7, "sampling_ratio": 2, "aligned": False, "kernel": kernel}
    halves = [feature.bfloat16().requires_grad_() for feature in exact]
    wide = [feature.detach().float().requires_grad_() for feature in halves]
    pooled, expected = (roi_align(some, boxes, image, level, **options) for some in (halves, wide))
    assert pooled.dtype == torch.bfloat16
    # bfloat16 has 8 significant bits: half a unit for the sum, and half a unit of each weighted feature (up to 4 here).
    assert_close(pooled.float(), expected, rtol=2**-8, atol=4 * 2**-9)
    upstream = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    gradients = torch.autograd.grad(pooled, halves, upstream)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, wide, upstream.float()), strict=True):
        assert gradient.dtype == torch.bfloat16
        assert (gradient.float() - wanted).norm() < 2**-8 * wanted.norm()


def test_gradient_is_the_same_in_small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    features = [feature.requires_grad_() for feature in pyramid()]
    boxes, image, level = random_rois(100)
    results = []
    for most in (1 << 25, 3000):
        monkeypatch.setattr(module_under_test, "_SORTED_TAPS", most)
        pooled = roi_align(features, boxes, image, level, scales=SCALES, output_size=7, sampling_ratio=0, aligned=True)
        results.append(torch.autograd.grad(pooled.square().sum(), features))
    assert_close(results[0], results[1])


def test_only_wanted_gradients() -> None:
    features = pyramid()
    features[1].requires_grad_()
    boxes, image, level = random_rois(50)
    pooled = roi_align(features, boxes, image, level, scales=SCALES, output_size=7, sampling_ratio=2, aligned=False)
    assert torch.autograd.grad(pooled.sum(), features[1])[0].any()


class Pooling(nn.Module):
    def __init__(self, kernel: RoIAlignKernel | None, ratio: int) -> None:
        super().__init__()
        self.kernel, self.ratio = kernel, ratio
        self.project = nn.Conv2d(5, 4, 1, dtype=torch.float64)

    def forward(self, features: list[Tensor], boxes: Tensor, image: Tensor, level: Tensor) -> Tensor:
        return roi_align(
            [self.project(feature) for feature in features], boxes, image, level,
            scales=SCALES, output_size=7, sampling_ratio=self.ratio, aligned=False, kernel=self.kernel,
        )  # fmt: skip


@pytest.mark.parametrize(("kernel", "ratio"), [(ROWS, 2), (TORCHVISION, 2), (None, 2), (None, 0)])
def test_can_be_exported(kernel: RoIAlignKernel | None, ratio: int) -> None:
    module = Pooling(kernel, ratio)
    program = torch.export.export(module, (pyramid(), *random_rois(30)))
    other = (pyramid(seed=2), *random_rois(30, seed=3))
    assert_close(program.module()(*other), module(*other))
