from __future__ import annotations

import pytest
import torch
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from rcnn.records import Size, Target
from rcnn.transforms.geometry import (
    EvalTransform,
    HorizontalFlip,
    Resize,
    TrainTransform,
    flip_boxes,
    no_target,
    resize_pixels,
    resized_size,
    scale_boxes,
)


def target_of(boxes: list[list[float]], ignore: list[list[float]] | None = None) -> Target:
    return Target(
        boxes_xyxy=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        labels=torch.arange(len(boxes)),
        ignore_xyxy=torch.tensor(ignore or [], dtype=torch.float32).reshape(-1, 4),
    )


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("short_side", "max_long_side"), [(800, 1333), (320, 640), (600, 1000), (333, 5000)])
def test_floor_is_torchvisions_size(short_side: int, max_long_side: int) -> None:
    """Against torchvision itself: 427 x 640 and the like, where a double product falls just below an integer."""
    peer = GeneralizedRCNNTransform(short_side, max_long_side, [0.0] * 3, [1.0] * 3)
    for height, width in [(427, 640), (333, 500), (480, 640), (500, 333), (1, 7), (1080, 1920), (612, 612), (97, 1201)]:
        expected = peer.resize(torch.zeros(1, height, width))[0].shape[-2:]
        size = resized_size(Size(height, width), short_side=short_side, max_long_side=max_long_side, rounding="floor")
        assert tuple(size) == tuple(expected)


def test_rounding_rules_differ_at_half_a_pixel() -> None:
    # 321 * 800 / 320 = 802.5
    sizes = {
        rounding: resized_size(Size(320, 321), short_side=800, max_long_side=1333, rounding=rounding).width
        for rounding in ("floor", "round", "round_half_up")
    }
    assert sizes == {"floor": 802, "round": 802, "round_half_up": 803}


def test_the_long_side_is_bounded() -> None:
    # min(600 / 400, 1000 / 900) = 1.111: 444.4 x 1000
    assert resized_size(Size(400, 900), short_side=600, max_long_side=1000, rounding="round") == (444, 1000)


def test_a_thin_picture_keeps_a_pixel() -> None:
    assert resized_size(Size(1, 5000), short_side=800, max_long_side=1333, rounding="floor") == (1, 1333)


def test_boxes_scale_per_axis() -> None:
    # 100 x 200 to 50 x 300: y is halved, x times 1.5
    scaled = scale_boxes(torch.tensor([[10.0, 20.0, 40.0, 60.0]]), Size(100, 200), Size(50, 300))
    torch.testing.assert_close(scaled, torch.tensor([[15.0, 10.0, 60.0, 30.0]]))
    assert scale_boxes(torch.zeros(0, 4), Size(1, 1), Size(2, 2)).shape == (0, 4)


def test_flip_is_its_own_inverse_and_has_no_off_by_one() -> None:
    boxes = torch.tensor([[0.0, 0.0, 10.0, 5.0], [3.5, 1.0, 4.0, 2.0]])
    # width 10: [0, 10] stays, [3.5, 4] becomes [6, 6.5]
    expected = torch.tensor([[0.0, 0.0, 10.0, 5.0], [6.0, 1.0, 6.5, 2.0]])
    torch.testing.assert_close(flip_boxes(boxes, 10), expected)
    torch.testing.assert_close(flip_boxes(flip_boxes(boxes, 10), 10), boxes)


def test_flip_moves_pixels_with_boxes() -> None:
    image = torch.zeros(3, 4, 6, dtype=torch.uint8)
    image[:, 1:3, 0:2] = 255
    flipped, target = HorizontalFlip(probability=1.0)(image, target_of([[0, 1, 2, 3]], [[4, 0, 6, 1]]), seeded())
    x1, y1, x2, y2 = target.boxes_xyxy[0].int().tolist()
    assert (flipped[:, y1:y2, x1:x2] == 255).all()
    assert flipped.sum() == image.sum()
    torch.testing.assert_close(target.ignore_xyxy, torch.tensor([[0.0, 0.0, 2.0, 1.0]]))


def test_flip_happens_as_often_as_asked() -> None:
    image, target = torch.arange(6).float().view(1, 1, 6).expand(3, 1, 6), target_of([])
    generator = seeded()
    flips = sum(
        not torch.equal(HorizontalFlip(probability=0.5)(image, target, generator)[0], image) for _ in range(1000)
    )
    assert 430 < flips < 570  # 500 +- 4.4 standard deviations of 15.8
    assert torch.equal(HorizontalFlip(probability=0.0)(image, target, generator)[0], image)


def test_resize_draws_every_short_side_and_only_those() -> None:
    resize = Resize(short_sides=(8, 10, 12), max_long_side=100)
    image, generator = torch.zeros(3, 10, 20), seeded()
    heights = {resize(image, target_of([]), generator)[0].shape[1] for _ in range(60)}
    assert heights == {8, 10, 12}
    assert EvalTransform(resize=resize)(image, no_target())[0].shape == (3, 12, 24)


def test_train_transform_is_decided_by_the_generator() -> None:
    transform = TrainTransform(flip=HorizontalFlip(), resize=Resize(short_sides=(8, 16), max_long_side=100))
    image = torch.randint(0, 256, (3, 10, 13), dtype=torch.uint8, generator=seeded())
    target = target_of([[1, 2, 5, 9]], [[0, 0, 3, 3]])
    results = [transform(image, target, seeded(seed)) for seed in (0, 0, 1, 2, 3)]
    torch.testing.assert_close(results[0], results[1])
    assert len({(tuple(image.shape), float(target.boxes_xyxy[0, 0])) for image, target in results}) > 1


@pytest.mark.parametrize("kernel", ["bilinear_float", "bilinear_float_mirror", "bilinear_uint8_antialias"])
def test_kernels_keep_a_flat_picture_flat(kernel: str) -> None:
    image = torch.full((3, 7, 9), 200, dtype=torch.uint8)
    for size in (Size(7, 9), Size(3, 4), Size(20, 31), Size(1, 5), Size(6, 1)):
        resized = resize_pixels(image, size, kernel)  # type: ignore[arg-type]
        assert resized.shape == (3, *size)
        assert resized.dtype == (torch.uint8 if "uint8" in kernel else torch.float32)
        torch.testing.assert_close(resized.float(), torch.full((3, *size), 200.0))


def test_float64_stays_float64() -> None:
    image = torch.rand(3, 4, 4, dtype=torch.float64)
    assert resize_pixels(image, Size(8, 8), "bilinear_float").dtype == torch.float64
    assert resize_pixels(image, Size(8, 8), "bilinear_float_mirror").dtype == torch.float64


def test_what_lies_beyond_the_first_pixel() -> None:
    # Twice as large: the first centre lies at -0.25. Clamped: 0. Mirrored: a quarter of the way to the second pixel.
    image = torch.tensor([0.0, 100.0, 100.0]).expand(3, 1, 3)
    clamped = resize_pixels(image, Size(1, 6), "bilinear_float")[0, 0]
    mirrored = resize_pixels(image, Size(1, 6), "bilinear_float_mirror")[0, 0]
    torch.testing.assert_close(clamped, torch.tensor([0.0, 25, 75, 100, 100, 100]))
    torch.testing.assert_close(mirrored, torch.tensor([25.0, 25, 75, 100, 100, 100]))
