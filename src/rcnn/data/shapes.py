"""The embedded data set: shapes over textured backgrounds, drawn on the spot, written as a COCO data set.

Letters: H W height and width of a picture, h w of the patch around one shape. Colours are [3], 0 to 255.
"""

from __future__ import annotations

import colorsys
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from rcnn.data.textures import background, octave_noise
from rcnn.errors import Problem, RunError

SHAPE_NAMES = ("circle", "square", "triangle", "star", "cross")
# Pixels are drawn this many times finer, then averaged: smooth edges.
_FINER = 4
_LEAST_VISIBLE = 0.6
_LEAST_CONTRAST = 90.0
# Shapes lean to either side by up to this much: enough to vary, little enough to be learned within minutes.
_TURN = np.pi / 7


@dataclass(frozen=True, kw_only=True)
class ShapesPicture:
    """One picture and its truth. A box is the tight extent of what is visible of a shape (half-covered pixels are)."""

    pixels: np.ndarray  # uint8 [H, W, 3]
    boxes_xyxy: np.ndarray  # float64 [G, 4]
    labels: np.ndarray  # int64 [G], of SHAPE_NAMES
    areas: np.ndarray  # float64 [G], visible pixels


@dataclass(frozen=True, kw_only=True)
class ShapesFolder:
    """What was written: `root` is a COCO data set with the splits train and val."""

    root: Path
    images: dict[str, int]  # by split
    boxes: dict[str, int]


def draw_shapes_dataset(
    folder: Path, *, train_images: int = 360, val_images: int = 80, seed: int = 0, quality: int = 92
) -> ShapesFolder:
    """Draws both splits into `folder`: `train/*.jpg`, `val/*.jpg`, `annotations/instances_{train,val}.json`.

    A picture depends on the seed, its split and its number alone: the same bytes each time, with the same versions of
    numpy and Pillow. Raises `RunError` where the folder cannot be written.
    """
    counts = {"train": train_images, "val": val_images}
    boxes = {}
    try:
        (folder / "annotations").mkdir(parents=True, exist_ok=True)
        for split_number, (split, count) in enumerate(counts.items()):
            (folder / split).mkdir(exist_ok=True)
            pictures = (draw_picture(np.random.default_rng([seed, split_number, number])) for number in range(count))
            content = _write_split(folder / split, pictures, quality)
            # The annotations last: a folder that was cut short is not taken for a data set.
            (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
            boxes[split] = len(content["annotations"])
    except OSError as error:
        given = f"cannot be written: {error.strerror or error}"
        raise RunError(Problem(where=str(folder), given=given, remedy="choose another folder or make room")) from error
    return ShapesFolder(root=folder, images=counts, boxes=boxes)


def _write_split(folder: Path, pictures: Iterable[ShapesPicture], quality: int) -> dict[str, list[dict[str, Any]]]:
    images, annotations = [], []
    for number, picture in enumerate(pictures, start=1):
        name = f"{number:06d}.jpg"
        Image.fromarray(picture.pixels).save(folder / name, quality=quality, subsampling=0)
        height, width = picture.pixels.shape[:2]
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        for (x1, y1, x2, y2), label, area in zip(picture.boxes_xyxy, picture.labels, picture.areas, strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": int(label) + 1,
                    "bbox": [float(x1), float(y1), float(x2 - x1), float(y2 - y1)],
                    "area": float(area),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(SHAPE_NAMES)]
    return {"images": images, "annotations": annotations, "categories": categories}


def draw_picture(rng: np.random.Generator) -> ShapesPicture:
    """One picture of 192 to 256 pixels a side with up to seven shapes, some partly behind others."""
    height, width = (int(side) for side in rng.integers(24, 33, 2) * 8)
    colours = _background_colours(rng)
    canvas = background(rng, height, width, colours)
    for _ in range(int(rng.integers(0, 5))):
        _draw_stroke(rng, canvas)
    shapes: list[_Shape] = []
    for _ in range(0 if rng.random() < 0.04 else int(rng.integers(1, 8))):
        for _attempt in range(12):
            shape = _random_shape(rng, height, width)
            if _all_stay_visible(shapes, shape):
                _paint(rng, canvas, shape)
                for other in shapes:
                    other.visible &= ~shape.visible
                shapes.append(shape)
                break
    boxes = np.array([_tight_box(shape.visible) for shape in shapes], np.float64).reshape(-1, 4)
    return ShapesPicture(
        pixels=np.clip(canvas + 0.5, 0, 255).astype(np.uint8),
        boxes_xyxy=boxes,
        labels=np.array([shape.label for shape in shapes], np.int64),
        areas=np.array([shape.visible.sum() for shape in shapes], np.float64),
    )


@dataclass(kw_only=True)
class _Shape:
    label: int
    cover: np.ndarray  # float32 [H, W], 0 to 1: how much of each pixel the whole shape covers
    visible: np.ndarray  # bool [H, W], updated while later shapes are laid over it
    full_area: int


def _random_shape(rng: np.random.Generator, height: int, width: int) -> _Shape:
    label = int(rng.integers(0, len(SHAPE_NAMES)))
    radius = float(np.exp(rng.uniform(np.log(11.0), np.log(52.0))))
    margin = 0.8 * radius
    centre = (rng.uniform(margin, width - margin), rng.uniform(margin, height - margin))
    cover = _cover(SHAPE_NAMES[label], radius, float(rng.uniform(-_TURN, _TURN)), centre, height, width)
    visible = cover >= 0.5
    return _Shape(label=label, cover=cover, visible=visible, full_area=int(visible.sum()))


def _cover(name: str, radius: float, angle: float, centre: tuple[float, float], height: int, width: int) -> np.ndarray:
    """[H, W]: the share of each pixel that the shape covers; beyond the picture it is cut off."""
    fine = Image.new("L", (width * _FINER, height * _FINER))
    corners = (_outline(name, angle) * radius + np.array(centre)) * _FINER - 0.5
    ImageDraw.Draw(fine).polygon([tuple(corner) for corner in corners.tolist()], fill=255)
    return np.asarray(fine.reduce(_FINER), np.float32) / 255


def _outline(name: str, angle: float) -> np.ndarray:
    """[corners, 2] (x, y) around the origin, upright at angle 0. Areas are alike: size tells no class."""
    if name == "circle":
        turns, radii = np.arange(48) / 48, np.full(48, 0.9)
    elif name == "square":
        turns, radii = np.arange(4) / 4 + 1 / 8, np.full(4, 1.12)
    elif name == "triangle":
        turns, radii = np.arange(3) / 3 - 1 / 4, np.full(3, 1.25)
    elif name == "star":
        turns, radii = np.arange(10) / 10 - 1 / 4, np.tile([1.3, 0.55], 5)
    else:  # cross: the corners of a plus sign with arms of half-width 0.36
        arm, tip = 0.36, 1.1
        quarter = np.array([[tip, -arm], [tip, arm], [arm, arm]])
        turned = [quarter @ np.linalg.matrix_power(np.array([[0, 1], [-1, 0]]), turn) for turn in range(4)]
        corners = np.concatenate(turned)
        turns, radii = np.arctan2(corners[:, 1], corners[:, 0]) / (2 * np.pi), np.linalg.norm(corners, axis=1)
    angles = 2 * np.pi * turns + angle
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * radii[:, None]


def _all_stay_visible(shapes: list[_Shape], new: _Shape) -> bool:
    """Whether, with `new` on top, no shape is mostly hidden: what is left of it could not be told."""
    return all((other.visible & ~new.visible).sum() >= _LEAST_VISIBLE * other.full_area for other in shapes)


def _tight_box(visible: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(visible.any(axis=1)), np.flatnonzero(visible.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _paint(rng: np.random.Generator, canvas: np.ndarray, shape: _Shape) -> None:
    """Lays the shape over the canvas: one colour that stands off, with a little texture of its own."""
    x1, y1, x2, y2 = _tight_box(shape.cover > 0)
    place = (slice(y1, y2), slice(x1, x2))
    cover = shape.cover[place][:, :, None]
    colour = _contrasting_colour(rng, canvas[place])
    shade = octave_noise(rng, y2 - y1, x2 - x1, coarsest_px=max(8.0, (x2 - x1) / 2), octaves=3)
    fill = colour * (0.86 + 0.28 * shade[:, :, None])
    canvas[place] = canvas[place] * (1 - cover) + np.clip(fill, 0, 255) * cover


def _colour(rng: np.random.Generator, saturation: tuple[float, float], value: tuple[float, float]) -> np.ndarray:
    rgb = colorsys.hsv_to_rgb(rng.random(), rng.uniform(*saturation), rng.uniform(*value))
    return np.array(rgb, np.float32) * 255


def _background_colours(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two muted colours that are not far from each other."""
    first = _colour(rng, (0.05, 0.45), (0.25, 0.85))
    second = np.clip(first + rng.uniform(-75, 75, 3), 10, 245).astype(np.float32)
    return first, second


def _contrasting_colour(rng: np.random.Generator, patch: np.ndarray) -> np.ndarray:
    """A colour that stands off from nearly all of what it will lie on: background and other shapes."""
    against = patch[:: max(1, len(patch) // 8), :: max(1, patch.shape[1] // 8)].reshape(-1, 3)
    best, best_distance = np.zeros(3, np.float32), -1.0
    for _ in range(10):
        colour = _colour(rng, (0.45, 1.0), (0.35, 1.0))
        distance = float(np.quantile(np.linalg.norm(against - colour, axis=1), 0.1))
        if distance > best_distance:
            best, best_distance = colour, distance
        if distance >= _LEAST_CONTRAST:
            break
    return best


def _draw_stroke(rng: np.random.Generator, canvas: np.ndarray) -> None:
    """A line or an arc that belongs to no class."""
    height, width = canvas.shape[:2]
    fine = Image.new("L", (width * 2, height * 2))
    ends = rng.uniform(0, 1, (2, 2)) * np.array([width * 2, height * 2])
    thickness = int(rng.integers(2, 7))
    if rng.random() < 0.5:
        ImageDraw.Draw(fine).line([tuple(end) for end in ends.tolist()], fill=255, width=thickness)
    else:
        first, second = np.sort(ends, axis=0).tolist()
        start = float(rng.uniform(0, 360))
        box = (*first, second[0] + 2, second[1] + 2)
        ImageDraw.Draw(fine).arc(box, start, start + float(rng.uniform(40, 150)), fill=255, width=thickness)
    cover = np.asarray(fine.reduce(2), np.float32)[:, :, None] / 255
    canvas[:] = canvas * (1 - cover) + _colour(rng, (0.1, 0.9), (0.2, 1.0)) * cover
