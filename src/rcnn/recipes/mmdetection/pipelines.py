"""MMDetection's pipelines of transforms (3.x and 2.x) as our preprocessing and augmentation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rcnn.config.placed_values import Items
from rcnn.recipes.mmdetection.ledger import Part
from rcnn.recipes.mmdetection.parts import FIXED
from rcnn.recipes.mmdetection.trunk import colours
from rcnn.recipes.recipe import ImageSpec, JitterSpec

# OpenCV's arithmetic on bytes, or Pillow's.
_BASE = ImageSpec(rounding="round_half_up", kernel="bilinear_uint8")
_PACKING = {"PackDetInputs", "DefaultFormatBundle", "ImageToTensor", "Collect", "ToTensor", "Transpose"}
_NOT_RESIZED = "a picture is resized once, by its scale with keep_ratio=True"


@dataclass(kw_only=True)
class Pipeline:
    """What a list of transforms comes to."""

    image: ImageSpec = _BASE
    short_sides: tuple[int, ...] | None = None
    drawn_between: bool = False
    factors: tuple[float, float] | None = None
    crop_px: int | None = None
    flip: float = 0.0
    num_proposals: int | None = None
    resized: bool = False
    colours_given: bool = False
    parts: list[Part] = field(default_factory=list)

    @property
    def jitter(self) -> JitterSpec | None:
        if self.factors is None and self.crop_px is None:
            return None
        return JitterSpec(
            short_side=self.image.short_side,
            max_long_side=self.image.max_long_side,
            factors=self.factors or (1.0, 1.0),
            crop_px=self.crop_px,
        )


def pipeline(parts: list[Part]) -> Pipeline:
    """The transforms in their order; wrappers of others are opened."""
    found = Pipeline(parts=parts)
    for part in parts:
        _step(found, part)
        part.close()
    return found


def _step(found: Pipeline, part: Part) -> None:
    kind = part.kind()
    match kind:
        case "LoadImageFromFile":
            part.ignore(FIXED, "backend_args", "file_client_args", "to_float32", "color_type")
            part.only("imdecode_backend", "cv2", "pillow")
        case "LoadAnnotations":
            part.only("with_bbox", True)
            part.only("with_mask", False, why="masks: detectors here find boxes")
            part.ignore("there are no masks here", "poly2mask")
            part.ignore(FIXED, "with_label", "box_type", "backend_args")
        case "LoadProposals":
            part.take("num_max_proposals")
            limit = part.section.get("num_max_proposals")
            found.num_proposals = limit if type(limit) is int and limit > 0 else None
        case "ProposalBroadcaster" | "MultiScaleFlipAug":
            _opened(found, part, kind)
        case "Resize":
            _resize(found, part)
        case "RandomResize" | "RandomChoiceResize":
            _random_resize(found, part, kind)
        case "RandomCrop":
            _crop(found, part)
        case "RandomFlip":
            part.only("direction", "horizontal")
            found.flip = float(part.number("prob", part.number("flip_ratio", 1.0 if "direction" in part else 0.0)))
        case "Normalize":
            found.image = colours(part, found.image, rgb=part.truth("to_rgb", True))
            found.colours_given = True
        case "Pad":
            found.image = found.image.model_copy(update={"divisor": part.count("size_divisor", 1)})
        case "FilterAnnotations":
            part.differs("min_gt_bbox_wh", "a picture without a box after its crop is trained on, not drawn anew")
            part.ignore(FIXED, "keep_empty", "by_box", "by_mask", "min_gt_mask_area")
        case _ if kind in _PACKING:
            part.ignore("how samples are packed is fixed here", *part.section)
        case _:
            part.refuse_whole("there is no such transform here")


def _opened(found: Pipeline, part: Part, kind: str) -> None:
    """A transform of transforms. In 2.x's test pipeline it holds the scale."""
    inner = part.parts("transforms")
    if kind == "MultiScaleFlipAug":
        part.only("flip", False, why="pictures are seen once in evaluation")
        scale = part.take("img_scale")
        _set_scale(found, part, "img_scale", _scales(scale))
    for each in inner:
        if kind == "MultiScaleFlipAug" and each.peek("type") in ("Resize", "RandomFlip"):
            each.ignore("the scale is that of MultiScaleFlipAug, without a flip", *each.section)
        else:
            _step(found, each)
        each.close()


def _scales(value: Any) -> list[tuple[int, int]]:
    """(long, short) pairs; MMDetection takes them in either order."""
    if isinstance(value, Items) and len(value) == 2 and all(type(side) is int for side in value):
        value = [value]
    pairs = value if isinstance(value, list) else []
    fits = [isinstance(pair, list) and len(pair) == 2 and all(type(s) is int and s > 0 for s in pair) for pair in pairs]
    return [(max(pair), min(pair)) for pair in pairs] if all(fits) else []


def _set_scale(found: Pipeline, part: Part, key: str, scales: list[tuple[int, int]]) -> bool:
    """The size of one scale, or of the last of several with the same long side."""
    longs = {long for long, _ in scales}
    if len(longs) != 1 or found.resized:
        part.refuse(key, "pairs of whole numbers, of which the larger is the same in all" if scales else _NOT_RESIZED)
        return False
    found.resized = True
    found.image = found.image.model_copy(update={"max_long_side": longs.pop(), "short_side": scales[-1][1]})
    return True


def _kernel(found: Pipeline, part: Part) -> None:
    part.only("keep_ratio", True)
    part.only("interpolation", "bilinear")
    part.only("clip_object_border", True)
    part.ignore(FIXED, "bbox_clip_border")
    backend = part.text("backend", "cv2")
    if backend not in {"cv2", "pillow"}:
        part.refuse("backend", "cv2 or pillow")
    kernel = "bilinear_uint8_antialias" if backend == "pillow" else "bilinear_uint8"
    found.image = found.image.model_copy(update={"kernel": kernel})


def _resize(found: Pipeline, part: Part) -> None:
    """3.x: one scale. 2.x: one or several, drawn by `multiscale_mode` or times a factor of `ratio_range`."""
    key = "img_scale" if "img_scale" in part else "scale"
    if part.peek("keep_ratio") is not True:
        part.refuse("keep_ratio", "pictures keep their shape: keep_ratio=True")
    scales = _scales(part.take(key))
    part.only("multiscale_mode", "range", "value")
    if _set_scale(found, part, key, scales):
        _factors(found, part)
        if len(scales) > 1:
            _draw(found, part, scales, between=part.peek("multiscale_mode", "range") == "range")
    _kernel(found, part)


def _random_resize(found: Pipeline, part: Part, kind: str) -> None:
    part.ignore(FIXED, "resize_type")
    key = "scales" if kind == "RandomChoiceResize" else "scale"
    if part.peek("keep_ratio") is not True:
        part.refuse("keep_ratio", "pictures keep their shape: keep_ratio=True")
    scales = _scales(part.take(key))
    if _set_scale(found, part, key, scales):
        _factors(found, part)
        if len(scales) > 1:
            _draw(found, part, scales, between=kind == "RandomResize")
    _kernel(found, part)


def _draw(found: Pipeline, part: Part, scales: list[tuple[int, int]], *, between: bool) -> None:
    sides = tuple(short for _, short in scales)
    found.short_sides, found.drawn_between = (sides if not between else (min(sides), max(sides))), between


def _factors(found: Pipeline, part: Part) -> None:
    factors = part.numbers("ratio_range", ())
    if len(factors) == 2 and 0 < factors[0] <= factors[1]:
        found.factors = (float(factors[0]), float(factors[1]))
    elif factors:
        part.refuse("ratio_range", "the smallest and the largest factor")


def _crop(found: Pipeline, part: Part) -> None:
    size = part.wholes("crop_size", (0, 0))
    if part.text("crop_type", "absolute") not in {"absolute", "absolute_range"} or len(set(size)) != 1 or size[0] < 1:
        part.refuse("crop_size", "a square of so many pixels (crop_type absolute)")
        return
    found.crop_px = size[0]
    part.only("allow_negative_crop", True, why="a part of a picture without a box is trained on")
    part.ignore("there are no masks here", "recompute_bbox")
    part.only("bbox_clip_border", True)


def fixed_padding_px(augments: list[Part]) -> int | None:
    """`batch_augments`: the size that BatchFixedSizePad pads to."""
    size = None
    for part in augments:
        if part.kind() != "BatchFixedSizePad":
            part.refuse_whole("batches are only padded here (BatchFixedSizePad)")
            continue
        sides = part.wholes("size", (1, 1))
        part.only("img_pad_value", 0)
        part.ignore("there are no masks here", "pad_mask", "mask_pad_value", "pad_seg", "seg_pad_value")
        if len(set(sides)) != 1:
            part.refuse("size", "a square")
        else:
            size = sides[0]
        part.close()
    return size
