"""Preprocessing against what torchvision and simple-faster-rcnn-pytorch were recorded to compute."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rcnn.records import Size, Target
from rcnn.transforms.batching import ImageNormalizer, Sample, collate, pad_images
from rcnn.transforms.geometry import EvalTransform, Resize, image_size, resize_pixels, resized_size

CASES = (
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
)
RGB_MEAN, RGB_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # 255 x (.485, .456, .406), (.229, .224, .225)


@dataclass(frozen=True)
class Case:
    manifest: dict[str, Any]
    arrays: dict[str, np.ndarray]

    def assert_equals(self, name: str, actual: Tensor, *, rtol: float, atol: float) -> None:
        """The whole where it was stored, else 64 samples of it and its statistics."""
        entry = self.manifest["arrays"][name]
        assert list(actual.shape) == entry["shape"]
        if entry["stored"] == "full":
            torch.testing.assert_close(
                actual, torch.from_numpy(self.arrays[name]).to(actual.dtype), rtol=rtol, atol=atol
            )
            return
        values = torch.from_numpy(self.arrays[f"{name}@val"]).to(actual.dtype)
        places = torch.from_numpy(self.arrays[f"{name}@idx"])
        torch.testing.assert_close(actual.reshape(-1)[places], values, rtol=rtol, atol=atol)
        statistics = torch.stack([actual.mean(), actual.std(correction=0), actual.abs().max()]).double()
        expected = torch.tensor([entry["mean"], entry["std"], entry["absmax"]], dtype=torch.float64)
        torch.testing.assert_close(statistics, expected, rtol=max(rtol, 1e-6), atol=10 * atol)


def load_case(shared: Path, name: str) -> Case:
    folder = shared / "oracles" / name
    with np.load(folder / "arrays.npz") as arrays:
        return Case(json.loads((folder / "manifest.json").read_text()), dict(arrays))


def load_image(shared: Path, file: str) -> Tensor:
    return torch.from_numpy(np.array(Image.open(shared / "oracles" / file))).permute(2, 0, 1)


def load_targets(shared: Path) -> list[Target]:
    truth = json.loads((shared / "oracles/inputs/ground_truth.json").read_text())
    return [
        Target(
            boxes_xyxy=torch.tensor(truth[name]["boxes"], dtype=torch.float64),
            labels=torch.tensor(truth[name]["coco80"]),
        )
        for name in ("coffee", "astronaut")
    ]


@pytest.mark.parametrize("stage", ["eval", "train", "train_empty"])
@pytest.mark.parametrize("name", CASES)
def test_torchvision(shared: Path, name: str, stage: str) -> None:
    case = load_case(shared, f"torchvision/{name}")
    config = case.manifest["config"]["transform"]
    overrides = case.manifest["train_overrides"]
    short_side = config["min_size"][-1] if stage == "eval" else overrides["min_size"]
    long_side = config["max_size"] if stage == "eval" else overrides["max_size"]
    transform = EvalTransform(resize=Resize(short_sides=(short_side,), max_long_side=long_side, rounding="floor"))
    targets = load_targets(shared)
    if stage == "train_empty":
        targets[1] = Target(boxes_xyxy=torch.zeros(0, 4, dtype=torch.float64), labels=torch.zeros(0, dtype=torch.int64))
    samples = []
    for file, target in zip(case.manifest["inputs"]["files"], targets, strict=True):
        image = load_image(shared, file).double()
        resized, scaled = transform(image, target)
        samples.append(Sample(image=resized, target=scaled, original_size=image_size(image), image_id=len(samples)))
    batch, scaled_targets = collate(samples, divisor=config["size_divisible"])
    normalizer = ImageNormalizer(mean=RGB_MEAN, std=RGB_STD).double()

    case.assert_equals(f"{stage}/pre/tensor", normalizer(batch), rtol=1e-6, atol=1e-9)
    case.assert_equals(f"{stage}/pre/image_sizes_hw", torch.tensor(batch.sizes), rtol=0, atol=0)
    if stage != "eval":
        for index, target in enumerate(scaled_targets):
            # The peer's ratios are float32 numbers: 4/3 is 1.33333337, relative 3e-8.
            case.assert_equals(f"{stage}/pre/gt_boxes/{index}", target.boxes_xyxy, rtol=1e-6, atol=0)


@pytest.mark.parametrize("index", [0, 1])
def test_simple_faster_rcnn(shared: Path, index: int) -> None:
    case = load_case(shared, "simple_faster_rcnn/vgg16_voc20")
    image = load_image(shared, case.manifest["inputs"]["files"][index])
    size = resized_size(image_size(image), short_side=600, max_long_side=1000, rounding="round")
    resized = resize_pixels(image, size, "bilinear_float_mirror")
    normalizer = ImageNormalizer(mean=(122.7717, 115.9465, 102.9801), std=(1, 1, 1), channel_order="bgr")
    batch, _ = collate([_sample(resized, image_size(image))], divisor=1)
    # float32 recordings of values up to 152: 1e-4 is six units in the last place.
    case.assert_equals(f"eval/{index}/pre/tensor", normalizer(batch)[0], rtol=1e-6, atol=1e-4)


def test_simple_faster_rcnn_with_torchvision_normalisation(shared: Path) -> None:
    case = load_case(shared, "simple_faster_rcnn/vgg16_voc20")
    image = load_image(shared, case.manifest["inputs"]["files"][0])
    resized = resize_pixels(image, Size(600, 900), "bilinear_float_mirror")
    batch, _ = collate([_sample(resized, image_size(image))], divisor=1)
    actual = ImageNormalizer(mean=RGB_MEAN, std=RGB_STD)(batch)[0]
    case.assert_equals("pre_torchvision_normalisation/coffee", actual, rtol=1e-6, atol=2e-6)


def test_simple_faster_rcnn_sizes(shared: Path) -> None:
    case = load_case(shared, "simple_faster_rcnn/vgg16_voc20")
    for height, width, out_height, out_width in case.arrays["resize_table_h_w_outh_outw"].tolist():
        size = resized_size(Size(height, width), short_side=600, max_long_side=1000, rounding="round")
        assert size == (out_height, out_width)


def _sample(image: Tensor, original: Size) -> Sample:
    target = Target(boxes_xyxy=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
    return Sample(image=image, target=target, original_size=original, image_id=0)


def test_detectron2_pixels_on_uint8(shared: Path) -> None:
    """detectron2 resizes with Pillow; torch's antialiased kernel on uint8 is within one grey level of it."""
    image = load_image(shared, "inputs/coffee_480x320.png")
    expected = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((301, 201), Image.Resampling.BILINEAR)
    actual = resize_pixels(image, Size(201, 301), "bilinear_uint8_antialias")
    assert actual.dtype == torch.uint8
    difference = (actual.int() - torch.from_numpy(np.array(expected)).permute(2, 0, 1).int()).abs()
    assert difference.max() <= 1
    assert difference.float().mean() < 0.05


@pytest.mark.parametrize("case", ["60x31", "20x9"])
def test_opencv_pixels_on_uint8(shared: Path, case: str) -> None:
    """MMDetection resizes with OpenCV: 17 x 23 pixels enlarged and reduced, to the bit."""
    maths = load_case(shared, "mmdetection/maths")
    given = torch.from_numpy(maths.arrays["resize/pixels_in"]).permute(2, 0, 1)
    expected = torch.from_numpy(maths.arrays[f"resize/pixels_out_{case}"]).permute(2, 0, 1)
    actual = resize_pixels(given, Size(*expected.shape[-2:]), "bilinear_uint8")
    assert actual.dtype == torch.uint8
    assert torch.equal(actual, expected)
    assert torch.equal(resize_pixels(given, Size(17, 23), "bilinear_uint8"), given)


@pytest.mark.parametrize("system", ["mmdetection", "detectron2"])
def test_sizes_rounded_half_up(shared: Path, system: str) -> None:
    """MMDetection names the longer side first, detectron2 the shorter."""
    maths = load_case(shared, f"{system}/maths")
    if system == "mmdetection":
        table, longer, shorter = maths.arrays["resize/long_short_h_w_outh_outw"], 0, 1
    else:
        table, longer, shorter = maths.arrays["resize/size_max_h_w_outh_outw"], 1, 0
    for row in table.tolist():
        height, width, out_height, out_width = row[2:]
        size = resized_size(
            Size(height, width), short_side=row[shorter], max_long_side=row[longer], rounding="round_half_up"
        )
        assert size == (out_height, out_width)


@pytest.mark.parametrize("case", [31, 9])
def test_detectron2_recorded_pixels(shared: Path, case: int) -> None:
    maths = load_case(shared, "detectron2/maths")
    given = torch.from_numpy(maths.arrays["resize/pixels_in"]).permute(2, 0, 1)
    expected = torch.from_numpy(maths.arrays[f"resize/pixels_out_{case}"]).permute(2, 0, 1)
    actual = resize_pixels(given, Size(*expected.shape[-2:]), "bilinear_uint8_antialias")
    assert (actual.int() - expected.int()).abs().max() <= 1


def test_padding_keeps_every_picture(shared: Path) -> None:
    images = [load_image(shared, f"inputs/{name}.png") for name in ("coffee_480x320", "astronaut_300x360")]
    padded = pad_images(images, divisor=32)
    assert padded.shape == (2, 3, 384, 480)  # 360 rounded up to 32; 480 is a multiple
    assert padded.dtype == torch.uint8
    assert torch.equal(padded[0, :, :320], images[0])
    assert padded[0, :, 320:].count_nonzero() == 0
