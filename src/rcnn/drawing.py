"""Pictures with boxes for people to look at: detections with class and score, the truth beside them, contact sheets.

Letters: H W height and width of a picture. Boxes are in the pixels of the picture that is given.
"""

from __future__ import annotations

import colorsys
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from rcnn.atomic_file import write_atomically
from rcnn.records import ClassTable, Detections, Target

Colour = tuple[int, int, int]
Rectangle = tuple[int, int, int, int]  # x1 y1 x2 y2 in pixels, the far corner excluded

_PALETTE = (
    "ff453a", "14b8ff", "34c759", "ffc800", "bf5af2", "ff8a1f",
    "00d9c0", "ff5fa8", "a3e000", "6c83ff", "c9986b", "c7c7cc",
)  # fmt: skip
_DARK, _LIGHT, _GREY = (18, 18, 20), (255, 255, 255), (150, 150, 156)


def class_colour(label: int) -> Colour:
    """The colour of a class: by its index alone, so that it is the same in every picture."""
    if label < len(_PALETTE):
        code = _PALETTE[label]
        return int(code[0:2], 16), int(code[2:4], 16), int(code[4:6], 16)
    # Steps of the golden angle spread hues evenly however many there are; three strengths tell near ones apart.
    saturation, value = ((0.85, 1.0), (0.55, 1.0), (0.9, 0.75))[label % 3]
    red, green, blue = colorsys.hsv_to_rgb(label * 0.618034 % 1, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def draw_detections(
    pixels: UInt8[Tensor, "3 H W"],
    found: Detections,
    classes: ClassTable,
    *,
    threshold: float = 0.5,
    truth: Target | None = None,
    scale: float = 1.0,
) -> Image.Image:
    """The picture with every detection of at least `threshold`, the best on top; the truth, if given, in dashed white.

    `scale` enlarges the picture first, which small ones need for their tags to be read.
    """
    picture = _enlarged(pixels, scale)
    pen = _Pen.for_size(*picture.size)
    draw = ImageDraw.Draw(picture)
    if truth is not None:
        _draw_ignored(draw, truth, scale, pen)
        for box in _rectangles(truth.boxes_xyxy, scale, picture.size):
            _dashed_box(draw, box, _LIGHT, pen.line_px)
    marks = [
        _Mark(box=box, colour=class_colour(label), text=f"{_name(classes, label)} {score:.2f}")
        for box, label, score in zip(
            _rectangles(found.boxes_xyxy, scale, picture.size),
            found.labels.tolist(),
            found.scores.tolist(),
            strict=True,
        )
        if score >= threshold
    ]
    _draw_marks(draw, marks, pen)
    return picture


def draw_truth(
    pixels: UInt8[Tensor, "3 H W"], truth: Target, classes: ClassTable, *, scale: float = 1.0
) -> Image.Image:
    """The picture with the true boxes and their classes; ignore regions in dashed grey."""
    picture = _enlarged(pixels, scale)
    pen = _Pen.for_size(*picture.size)
    draw = ImageDraw.Draw(picture)
    _draw_ignored(draw, truth, scale, pen)
    boxes = _rectangles(truth.boxes_xyxy, scale, picture.size)
    _draw_marks(
        draw,
        [
            _Mark(box=box, colour=class_colour(label), text=_name(classes, label))
            for box, label in zip(boxes, truth.labels.tolist(), strict=True)
        ],
        pen,
    )
    return picture


def side_by_side(
    pixels: UInt8[Tensor, "3 H W"],
    found: Detections,
    truth: Target,
    classes: ClassTable,
    *,
    threshold: float = 0.5,
    scale: float | None = None,
) -> Image.Image:
    """What was found on the left, the truth on the right, each under its caption. Small pictures are enlarged, to 400
    pixels on the short side, unless `scale` says otherwise."""
    scale = readable_scale(*pixels.shape[-2:]) if scale is None else scale
    panels = [
        captioned(draw_detections(pixels, found, classes, threshold=threshold, scale=scale), "found"),
        captioned(draw_truth(pixels, truth, classes, scale=scale), "truth"),
    ]
    return contact_sheet(panels, columns=2)


def readable_scale(height: int, width: int) -> float:
    """How much to enlarge a picture so that tags in it can be read; 1 for all but small ones."""
    return max(1.0, 400 / max(1, min(height, width)))


def captioned(picture: Image.Image, text: str) -> Image.Image:
    """The picture under a light strip with a line of text, cut to the width of the picture."""
    font = _font(max(12, round(picture.width * 0.032)))
    ascent, descent = font.getmetrics()
    strip = ascent + descent + 8
    sheet = Image.new("RGB", (picture.width, picture.height + strip), _LIGHT)
    sheet.paste(picture, (0, strip))
    fitting = _fitting(text, font, picture.width - 4)
    ImageDraw.Draw(sheet).text((2, 4 + ascent), fitting, font=font, fill=_DARK, anchor="ls")
    return sheet


def contact_sheet(
    pictures: Sequence[Image.Image], *, columns: int | None = None, gap_px: int = 10, cell_width_px: int | None = None
) -> Image.Image:
    """The pictures in rows on white, each row as high as its highest; by default about as many columns as rows.

    With `cell_width_px` every picture is brought to that width first.
    """
    if not pictures:
        return Image.new("RGB", (1, 1), _LIGHT)
    if cell_width_px:
        pictures = [
            picture.resize((cell_width_px, max(1, round(picture.height * cell_width_px / picture.width))))
            for picture in pictures
        ]
    columns = min(columns or int(np.ceil(np.sqrt(len(pictures)))), len(pictures))
    rows = [pictures[first : first + columns] for first in range(0, len(pictures), columns)]
    widths = [max(row[column].width for row in rows if column < len(row)) for column in range(columns)]
    heights = [max(picture.height for picture in row) for row in rows]
    sheet = Image.new("RGB", (sum(widths) + gap_px * (columns - 1), sum(heights) + gap_px * (len(rows) - 1)), _LIGHT)
    for number, row in enumerate(rows):
        top = sum(heights[:number]) + gap_px * number
        for column, picture in enumerate(row):
            sheet.paste(picture, (sum(widths[:column]) + gap_px * column, top))
    return sheet


def save_picture(path: Path, picture: Image.Image) -> None:
    """As PNG, whole or not at all; makes the folder. Raises RunError."""
    content = io.BytesIO()
    picture.save(content, format="PNG")
    write_atomically(path, content.getvalue())


@dataclass(frozen=True, kw_only=True)
class _Pen:
    line_px: int
    font: ImageFont.FreeTypeFont
    padding_px: int

    @classmethod
    def for_size(cls, width: int, height: int) -> _Pen:
        """Lines and letters that grow with the picture, and letters that can be read in a small one."""
        side = (width * height) ** 0.5
        return cls(
            line_px=max(1, round(side / 260)),
            font=_font(int(min(max(11, side * 0.024), 48))),
            padding_px=max(2, round(side / 300)),
        )


@dataclass(frozen=True, kw_only=True)
class _Mark:
    box: Rectangle
    colour: Colour
    text: str


@cache
def _font(size_px: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size_px)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow is built without FreeType"
    return font


def _enlarged(pixels: Tensor, scale: float) -> Image.Image:
    picture = Image.fromarray(pixels.permute(1, 2, 0).cpu().contiguous().numpy(), "RGB")
    if scale == 1:
        return picture
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.BICUBIC)


def _rectangles(boxes_xyxy: Tensor, scale: float, size: tuple[int, int]) -> list[Rectangle]:
    """Whole pixels inside the picture, at least one wide and high."""
    limits = np.array(size)
    corners = np.rint(boxes_xyxy.detach().cpu().double().numpy() * scale)
    near = np.clip(corners[:, :2], 0, limits - 1).astype(int)
    far = np.maximum(np.clip(corners[:, 2:], 1, limits).astype(int), near + 1)
    return [(x1, y1, x2, y2) for (x1, y1), (x2, y2) in zip(near.tolist(), far.tolist(), strict=True)]


def _name(classes: ClassTable, label: int) -> str:
    return classes.names[label] if 0 <= label < len(classes) else f"class {label}"


def _draw_marks(draw: ImageDraw.ImageDraw, marks: Sequence[_Mark], pen: _Pen) -> None:
    """`marks` best first: its boxes are drawn last, so on top, and its tags find their place first."""
    for mark in reversed(marks):
        _box(draw, mark.box, mark.colour, pen.line_px)
    taken: list[Rectangle] = []
    for mark in marks:
        place = _tag_place(mark, pen, _picture_size(draw), taken)
        if place is not None:
            taken.append(place)
            _draw_tag(draw, mark, place, pen)


def _picture_size(draw: ImageDraw.ImageDraw) -> tuple[int, int]:
    return draw.im.size


def _box(draw: ImageDraw.ImageDraw, box: Rectangle, colour: Colour, line_px: int) -> None:
    """A line inside the edges of the box, with a thin dark one within it, so that it shows on any ground."""
    x1, y1, x2, y2 = box
    if min(x2 - x1, y2 - y1) > 2 * line_px + 4:
        inner = (x1 + line_px, y1 + line_px, x2 - 1 - line_px, y2 - 1 - line_px)
        draw.rectangle(inner, outline=tuple(channel // 3 for channel in colour), width=1)
    draw.rectangle((x1, y1, x2 - 1, y2 - 1), outline=colour, width=line_px)


def _dashed_box(draw: ImageDraw.ImageDraw, box: Rectangle, colour: Colour, line_px: int) -> None:
    """Dashes of `colour` on a dark line."""
    x1, y1, x2, y2 = box
    draw.rectangle((x1, y1, x2 - 1, y2 - 1), outline=_DARK, width=line_px)
    dash = 4 * line_px + 2
    for start in range(x1, x2, 2 * dash):
        end = min(start + dash, x2) - 1
        draw.rectangle((start, y1, end, min(y1 + line_px, y2) - 1), fill=colour)
        draw.rectangle((start, max(y2 - line_px, y1), end, y2 - 1), fill=colour)
    for start in range(y1, y2, 2 * dash):
        end = min(start + dash, y2) - 1
        draw.rectangle((x1, start, min(x1 + line_px, x2) - 1, end), fill=colour)
        draw.rectangle((max(x2 - line_px, x1), start, x2 - 1, end), fill=colour)


def _draw_ignored(draw: ImageDraw.ImageDraw, truth: Target, scale: float, pen: _Pen) -> None:
    for box in _rectangles(truth.ignore_xyxy, scale, _picture_size(draw)):
        _dashed_box(draw, box, _GREY, pen.line_px)


def _tag_place(mark: _Mark, pen: _Pen, size: tuple[int, int], taken: Sequence[Rectangle]) -> Rectangle | None:
    """Where the tag goes: the first place near the box that no other tag has; none where it cannot fit at all."""
    ascent, descent = pen.font.getmetrics()
    height = ascent + descent + pen.padding_px
    text = _fitting(mark.text, pen.font, size[0] - 2 * pen.padding_px)
    width = int(np.ceil(pen.font.getlength(text))) + 2 * pen.padding_px
    if not text or height > size[1] or width > size[0]:
        return None
    places = [
        (x, y, x + width, y + height)
        for x, y in _corners(mark.box, width, height)
        if 0 <= y <= size[1] - height
        for x in [min(max(x, 0), size[0] - width)]
    ]
    if not places:
        y = min(max(mark.box[1], 0), size[1] - height)
        x = min(max(mark.box[0], 0), size[0] - width)
        places = [(x, y, x + width, y + height)]
    return next((place for place in places if not any(_overlap(place, other) for other in taken)), places[0])


def _corners(box: Rectangle, width: int, height: int) -> Iterator[tuple[int, int]]:
    """Places of a tag, best first: above the box, inside its top where that leaves most of it free, below it."""
    x1, y1, x2, y2 = box
    inside = [(x1, y1), (x2 - width, y1), (x1, y2 - height)]
    roomy = y2 - y1 > 4 * height and x2 - x1 > width
    yield from [(x1, y1 - height), (x2 - width, y1 - height)]
    yield from inside if roomy else []
    yield from [(x1, y2), (x2 - width, y2)]
    yield from [] if roomy else inside


def _overlap(one: Rectangle, other: Rectangle) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _draw_tag(draw: ImageDraw.ImageDraw, mark: _Mark, place: Rectangle, pen: _Pen) -> None:
    x1, y1, x2, y2 = place
    draw.rectangle((x1, y1, x2 - 1, y2 - 1), fill=mark.colour)
    red, green, blue = mark.colour
    ink = _DARK if 0.299 * red + 0.587 * green + 0.114 * blue > 120 else _LIGHT
    text = _fitting(mark.text, pen.font, x2 - x1 - 2 * pen.padding_px)
    baseline = y1 + pen.padding_px // 2 + pen.font.getmetrics()[0]
    draw.text((x1 + pen.padding_px, baseline), text, font=pen.font, fill=ink, anchor="ls")


def _fitting(text: str, font: ImageFont.FreeTypeFont, width_px: int) -> str:
    """The text, shortened to `width_px`; nothing where not even one letter has room."""
    text = " ".join(text.split())
    if font.getlength(text) <= width_px:
        return text
    for length in range(len(text) - 1, 0, -1):
        shorter = text[:length].rstrip() + "…"
        if font.getlength(shorter) <= width_px:
            return shorter
    return ""
