from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rcnn.records import ImageBatch, Size, Target
from rcnn.transforms.batching import ImageNormalizer, Sample, collate

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def sample(image: Tensor, image_id: int = 0) -> Sample:
    target = Target(boxes_xyxy=torch.zeros(image_id, 4), labels=torch.zeros(image_id, dtype=torch.int64))
    return Sample(image=image, target=target, original_size=Size(5, 6), image_id=image_id)


def random_uint8(height: int, width: int) -> Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("divisor", "padded"), [(32, (64, 96)), (1, (40, 65)), (7, (42, 70))])
def test_collate_pads_to_the_divisor(divisor: int, padded: tuple[int, int]) -> None:
    images = [random_uint8(40, 30), random_uint8(33, 65)]
    batch, targets = collate([sample(images[0], 3), sample(images[1], 9)], divisor=divisor)
    assert batch.padded_size == padded
    assert batch.sizes == (Size(40, 30), Size(33, 65))
    assert batch.original_sizes == (Size(5, 6), Size(5, 6))
    assert batch.image_ids == (3, 9)
    assert [len(target.labels) for target in targets] == [3, 9]
    assert batch.pixels.dtype == torch.uint8
    for row, image in zip(batch.pixels, images, strict=True):
        height, width = image.shape[1:]
        assert torch.equal(row[:, :height, :width], image)
        assert row.long().sum() == image.long().sum()  # the rest is zero


def test_mixed_pixels_become_floating_point() -> None:
    batch, _ = collate([sample(random_uint8(4, 4)), sample(random_uint8(4, 4).float())], divisor=1)
    assert batch.pixels.dtype == torch.float32
    torch.testing.assert_close(batch.pixels[0], random_uint8(4, 4).float())


def test_normalizer_by_hand() -> None:
    # (255 - 123.675) / 58.395 = 2.24890829...; (0 - 116.28) / 57.12 = -2.03571429; (103.53 - 103.53) / ... = 0
    pixels = torch.tensor([255.0, 0.0, 103.53], dtype=torch.float64).view(1, 3, 1, 1)
    normalizer = ImageNormalizer(mean=MEAN, std=STD).double()
    expected = torch.tensor([2.248908296943231, -2.0357142857142856, 0.0], dtype=torch.float64).view(1, 3, 1, 1)
    torch.testing.assert_close(normalizer(batch_of(pixels)), expected, rtol=1e-14, atol=1e-14)


def batch_of(pixels: Tensor, sizes: tuple[Size, ...] = ()) -> ImageBatch:
    sizes = sizes or (Size(*pixels.shape[-2:]),) * len(pixels)
    return ImageBatch(pixels=pixels, sizes=sizes, original_sizes=sizes)


def test_bgr_constants_are_in_the_order_of_the_network() -> None:
    rgb = ImageNormalizer(mean=(1, 2, 3), std=(4, 5, 6))
    bgr = ImageNormalizer(mean=(3, 2, 1), std=(6, 5, 4), channel_order="bgr")
    batch = batch_of(random_uint8(5, 5)[None])
    torch.testing.assert_close(bgr(batch), rgb(batch).flip(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_padding_is_exactly_zero_in_every_dtype(dtype: torch.dtype) -> None:
    pixels = random_uint8(6, 8)[None].repeat(2, 1, 1, 1)
    normalizer = ImageNormalizer(mean=MEAN, std=STD).to(dtype)
    result = normalizer(batch_of(pixels, (Size(6, 8), Size(4, 5))))
    assert result.dtype == dtype
    assert result[1, :, 4:].count_nonzero() == 0
    assert result[1, :, :, 5:].count_nonzero() == 0
    torch.testing.assert_close(result[1, :, :4, :5], result[0, :, :4, :5])
    exact = (pixels[:1].double() - torch.tensor(MEAN, dtype=torch.float64).view(3, 1, 1)) / torch.tensor(
        STD, dtype=torch.float64
    ).view(3, 1, 1)
    # One rounding to the dtype: constants rounded to bfloat16 would be off by 0.2 grey levels.
    torch.testing.assert_close(result[:1].double(), exact, rtol=torch.finfo(dtype).eps, atol=2e-6)


def test_a_change_of_dtype_does_not_round_the_constants() -> None:
    normalizer = ImageNormalizer(mean=MEAN, std=STD).to(torch.bfloat16).float()
    batch = batch_of(random_uint8(4, 4)[None])
    assert torch.equal(normalizer(batch), ImageNormalizer(mean=MEAN, std=STD)(batch))
    assert ImageNormalizer(mean=MEAN, std=STD).double().mean.flatten().tolist() == list(MEAN)


def test_the_normalizer_has_no_state_in_a_checkpoint() -> None:
    assert ImageNormalizer(mean=MEAN, std=STD).state_dict() == {}
