"""Pictures fitted into a canvas, averaged where they shrink, and the padding that the network sees."""

from __future__ import annotations

import pytest
import torch

from rcnn.errors import RecipeError
from rcnn.recipes.loaders import build_resize
from rcnn.recipes.recipe import ImageSpec
from rcnn.records import Size, Target
from rcnn.transforms.batching import ImageNormalizer, Sample, collate
from rcnn.transforms.geometry import EvalTransform, Resize, resize_pixels, size_on

CANVAS = Size(height=8, width=12)


def test_a_picture_fills_one_side() -> None:
    # 4x8: min(8 / 4, 12 / 8) = 1.5; 8x4: min(8 / 8, 12 / 4) = 1.
    assert size_on(CANVAS, Size(4, 8), rounding="round") == (6, 12)
    assert size_on(CANVAS, Size(8, 4), rounding="round") == (8, 4)
    # 7x16: 12 / 16 = 0.75, and 7 * 0.75 = 5.25.
    assert size_on(CANVAS, Size(7, 16), rounding="round") == (5, 12)
    assert size_on(CANVAS, Size(1, 1000), rounding="round") == (1, 12)


def test_boxes_go_by_the_one_scale_and_end_with_the_picture() -> None:
    resize = Resize(short_sides=(800,), max_long_side=1333, rounding="round", kernel="area_uint8", canvas=CANVAS)
    boxes = torch.tensor([[0.0, 0.0, 16.0, 7.0], [4.0, 2.0, 8.0, 4.0]])
    target = Target(boxes_xyxy=boxes, labels=torch.zeros(2, dtype=torch.int64))
    image, moved = EvalTransform(resize=resize)(torch.zeros(3, 7, 16, dtype=torch.uint8), target)
    assert image.shape == (3, 5, 12)
    # By 0.75; 7 becomes 5.25, which is cut at the picture's 5.
    assert moved.boxes_xyxy.tolist() == [[0, 0, 12, 5], [3, 1.5, 6, 3]]


def test_the_batch_is_the_canvas_and_its_padding_is_black() -> None:
    pixels = torch.full((3, 6, 12), 100, dtype=torch.uint8)
    target = Target(boxes_xyxy=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
    batch, _ = collate([Sample(image=pixels, target=target, original_size=Size(4, 8), image_id=0)], divisor=CANVAS)
    assert (batch.padded_size, batch.sizes) == (CANVAS, (Size(6, 12),))
    assert batch.scales == (1.5,)
    numbers = {"mean": (10.0, 20.0, 30.0), "std": (2.0, 4.0, 5.0)}
    black = ImageNormalizer(**numbers, padding="black")(batch)[0]
    assert black[:, 0, 0].tolist() == [45, 20, 14]
    assert black[:, 7, 11].tolist() == [-5, -5, -6]  # (0 - mean) / std
    assert ImageNormalizer(**numbers)(batch)[0, :, 7, 11].tolist() == [0, 0, 0]


def test_a_smaller_picture_is_the_mean_of_what_its_pixels_cover() -> None:
    image = torch.tensor([[0, 10, 20, 30, 40, 50]], dtype=torch.uint8).expand(3, 4, 6)
    # Half the size: means of 0, 10 and 20, 30 and 40, 50.
    assert resize_pixels(image, Size(2, 3), "area_uint8")[0].tolist() == [[5, 25, 45]] * 2
    # 6 to 4: 1.5 old pixels each: (0 + 0.5 * 10) / 1.5 = 3.3, (0.5 * 10 + 20) / 1.5 = 16.7, 33.3, 46.7.
    assert resize_pixels(image, Size(3, 4), "area_uint8")[0].tolist() == [[3, 17, 33, 47]] * 3
    # A larger one is interpolated.
    large = resize_pixels(image, Size(8, 12), "area_uint8")
    assert torch.equal(large, resize_pixels(image, Size(8, 12), "bilinear_uint8"))


def test_pixels_are_placed_by_the_scale_that_was_given() -> None:
    """5 pixels at 0.7 are 3.5, thus 4: of 1 / 0.7 = 1.43 old ones each, where the last ends with the picture."""
    image = torch.tensor([[0, 70, 140, 210, 250]], dtype=torch.uint8).expand(3, 5, 5)
    row = resize_pixels(image, Size(4, 4), "area_uint8", scale=0.7)[0, 0].tolist()
    # (0 + 0.4286 * 70) / 1.4286 = 21; (0.5714 * 70 + 0.8571 * 140) / 1.4286 = 112;
    # (0.1429 * 140 + 210 + 0.2857 * 250) / 1.4286 = 211; 0.7143 of the last: 250.
    assert row == [21, 112, 211, 250]


def test_sides_beside_a_canvas() -> None:
    with pytest.raises(RecipeError, match="on a canvas a picture has one size"):
        build_resize(ImageSpec(canvas=(8, 12)), (4, 5))
