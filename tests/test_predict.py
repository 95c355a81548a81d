"""The Python API of prediction: every form of a picture, and the numbers of the plain detector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import rcnn
from rcnn.data.image import read_image
from rcnn.engine.checkpoint import CheckpointMeta, read_weights, save_weights
from rcnn.errors import CheckpointError, DataError, ImageError, RecipeError, SetupError
from rcnn.predict import Predictor, evaluate_checkpoint
from rcnn.recipes.checkpoints import read_detector
from rcnn.records import Detections
from rcnn.transforms.batching import Sample, collate
from rcnn.transforms.geometry import image_size, no_target, resize_pixels, resized_size

pytestmark = pytest.mark.xdist_group("tiny")


@pytest.fixture(scope="module")
def predictor(tiny) -> Predictor:
    return rcnn.load(tiny.checkpoint)


@pytest.fixture(scope="module")
def picture(tiny) -> Path:
    return sorted((tiny.data / "val").glob("*.jpg"))[0]


def assert_same(found: Detections, expected: Detections) -> None:
    torch.testing.assert_close(vars(found), vars(expected), rtol=0, atol=0)


def test_what_a_checkpoint_brings(predictor: Predictor) -> None:
    assert predictor.classes.names == ("circle", "square", "triangle", "star", "cross")
    assert predictor.recipe.detector.image.short_side == 64
    assert predictor.dtype == torch.float32


def test_every_form_of_a_picture_gives_the_same(predictor: Predictor, picture: Path) -> None:
    pixels = read_image(picture)
    forms = [picture, str(picture), Image.open(picture), pixels.permute(1, 2, 0).numpy(), pixels]
    expected = predictor.predict(picture)[0]
    assert len(expected) > 5
    for found in predictor.predict(forms):
        assert_same(found, expected)


def test_boxes_are_in_the_pictures_own_pixels_best_first(predictor: Predictor, picture: Path) -> None:
    found = predictor.predict(picture)[0]
    with Image.open(picture) as image:
        width, height = image.size
    assert (found.boxes_xyxy >= 0).all()
    assert (found.boxes_xyxy <= torch.tensor([width, height, width, height])).all()
    assert found.boxes_xyxy[:, 2].max() > 96  # the network saw at most 96 pixels
    assert (found.scores.diff() <= 0).all()


def test_the_prepared_detector_gives_the_plain_ones_boxes(tiny, predictor: Predictor, picture: Path) -> None:
    """The picture resized and put into a batch by hand, through the detector as it was trained."""
    pixels = read_image(picture)
    original = image_size(pixels)
    image = predictor.recipe.detector.image
    size = resized_size(
        original, short_side=image.short_side, max_long_side=image.max_long_side, rounding=image.rounding
    )
    resized = resize_pixels(pixels, size, image.kernel)
    sample = Sample(image=resized, target=no_target(), original_size=original, image_id=0)
    batch, _ = collate([sample], divisor=image.divisor)
    with torch.no_grad():
        plain = read_detector(tiny.checkpoint).detector.eval().predict(batch)[0]
    ratio = torch.tensor([original.width / size.width, original.height / size.height] * 2)
    found = predictor.predict(picture)[0]
    torch.testing.assert_close(found.scores, plain.scores, rtol=0, atol=5e-4)
    torch.testing.assert_close(found.boxes_xyxy, plain.boxes_xyxy * ratio, rtol=0, atol=0.02)
    assert found.labels.tolist() == plain.labels.tolist()


def test_proposals_are_in_the_pictures_own_pixels(predictor: Predictor, picture: Path) -> None:
    proposals = predictor.propose([picture])[0]
    assert 0 < len(proposals.scores) <= 20
    assert proposals.boxes_xyxy[:, 2].max() > 96
    assert (proposals.scores.diff() <= 0).all()


@pytest.fixture
def plain() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)


def odd_pictures(plain: np.ndarray) -> dict[str, tuple[Image.Image, np.ndarray, dict[str, Any]]]:
    """By kind: the picture, the RGB pixels that it stands for, and how it is saved."""
    image = Image.fromarray(plain)
    grey = plain[:, :, 0]
    turned = Image.Exif()
    turned[0x0112] = 6  # the stored pixels are turned a quarter clockwise to be seen
    return {
        "alpha": (Image.merge("RGBA", (*image.split(), Image.fromarray(grey))), plain, {}),
        "grey": (Image.fromarray(grey), np.stack([grey] * 3, 2), {}),
        "sixteen bits": (Image.fromarray(grey.astype(np.uint16) * 257), np.stack([grey] * 3, 2), {}),
        "turned": (image, np.rot90(plain, -1), {"exif": turned}),
    }


@pytest.mark.parametrize("kind", ["alpha", "grey", "sixteen bits", "turned"])
def test_odd_pictures_are_seen_as_a_person_sees_them(
    predictor: Predictor, plain: np.ndarray, tmp_path: Path, kind: str
) -> None:
    image, seen, options = odd_pictures(plain)[kind]
    path = tmp_path / "odd.png"
    image.save(path, **options)
    expected = predictor.predict(seen)[0]
    assert_same(predictor.predict(path)[0], expected)
    assert_same(predictor.predict(Image.open(path))[0], expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, r"a int; allowed: a path, a PIL picture"),
        (np.zeros((5, 5), np.uint8), r"\(5, 5\) of uint8; allowed: RGB pixels"),
        (np.zeros((5, 5, 4), np.uint8), r"\(5, 5, 4\) of uint8"),
        (np.zeros((5, 5, 3)), r"\(5, 5, 3\) of float64"),
        (torch.zeros(5, 5, 3, dtype=torch.uint8), r"\(5, 5, 3\) of torch.uint8"),
        (np.zeros((0, 5, 3), np.uint8), r"\(0, 5, 3\) of uint8"),
        ("nowhere.jpg", r"nowhere.jpg: there is no such file"),
    ],
)
def test_what_is_no_picture(predictor: Predictor, given: Any, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        predictor.predict(given)


def test_bfloat16_stays_near(tiny, predictor: Predictor, picture: Path) -> None:
    found = rcnn.load(tiny.checkpoint, precision="bf16").predict(picture)[0]
    assert found.boxes_xyxy.dtype == found.scores.dtype == torch.float32
    torch.testing.assert_close(found.scores[:5], predictor.predict(picture)[0].scores[:5], rtol=0, atol=0.02)


def test_what_this_machine_cannot_do(tiny) -> None:
    with pytest.raises(SetupError, match="precision: int8; allowed: float32, bf16"):
        rcnn.load(tiny.checkpoint, precision="int8")  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        with pytest.raises(SetupError, match="cuda is not usable on this machine; allowed: auto, cpu"):
            rcnn.load(tiny.checkpoint, device="cuda")


def test_evaluation_takes_other_settings(tiny) -> None:
    all_of_them = rcnn.evaluate(tiny.checkpoint, data=tiny.data)
    few = evaluate_checkpoint(tiny.checkpoint, data=str(tiny.data), overrides=["detector.roi.max_detections=2"])
    assert len(few.found) == 2 * len(few.truth) < len(all_of_them.found)
    with pytest.raises(RecipeError, match=r"detector\.roi\.max_detection"):
        evaluate_checkpoint(tiny.checkpoint, data=str(tiny.data), overrides=["detector.roi.max_detection=2"])


def test_evaluation_of_a_split_that_is_not_there(tiny) -> None:
    with pytest.raises(DataError, match=r'no split "test"; allowed: train, val'):
        rcnn.evaluate(tiny.checkpoint, data=tiny.data, split="test")


def rewritten(tiny, path: Path, **changes: Any) -> Path:
    checkpoint = read_weights(tiny.checkpoint)
    save_weights(path, checkpoint.state_dict, CheckpointMeta(**{**vars(checkpoint.meta), **changes}))
    return path


def test_a_damaged_recipe_inside_is_told_with_its_file(tiny, tmp_path: Path) -> None:
    recipe = read_weights(tiny.checkpoint).meta.recipe.replace("features: 32", "features: many")
    with pytest.raises(CheckpointError) as caught:
        rcnn.load(rewritten(tiny, tmp_path / "a.safetensors", recipe=recipe))
    assert f"{tmp_path}/a.safetensors: the recipe inside cannot be read; take another copy" in str(caught.value)
    assert "detector.roi.box_head.features (the recipe inside:" in str(caught.value)
    with pytest.raises(CheckpointError, match=r"it was written by rcnn 99\.0, this is"):
        rcnn.load(rewritten(tiny, tmp_path / "b.safetensors", recipe="{ [", version="99.0"))


def test_tensors_that_are_not_those_of_the_recipe_inside(tiny, tmp_path: Path) -> None:
    recipe = read_weights(tiny.checkpoint).meta.recipe.replace("features: 32", "features: 64")
    with pytest.raises(CheckpointError) as caught:
        rcnn.load(rewritten(tiny, tmp_path / "a.safetensors", recipe=recipe))
    assert "a.safetensors: its tensors are not those that its own recipe and classes ask for" in str(caught.value)
    assert "roi.predictor.classes.weight: shape (6, 32); allowed: shape (6, 64)" in str(caught.value)
