"""Drawn boxes are where they should be, tags stay inside the picture, and sheets hold every picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from rcnn.drawing import (
    _fitting,
    _font,
    _Mark,
    _Pen,
    _tag_place,
    captioned,
    class_colour,
    contact_sheet,
    draw_detections,
    draw_truth,
    readable_scale,
    side_by_side,
)
from rcnn.records import ClassTable, Detections, Target

CLASSES = ClassTable(names=("cat", "dog"))
GREY = torch.full((3, 120, 160), 90, dtype=torch.uint8)


def detections(*rows: tuple[list[float], int, float]) -> Detections:
    return Detections(
        boxes_xyxy=torch.tensor([row[0] for row in rows]).reshape(-1, 4),
        labels=torch.tensor([row[1] for row in rows], dtype=torch.int64),
        scores=torch.tensor([row[2] for row in rows]),
    )


def changed(picture: Image.Image) -> np.ndarray:
    """[H, W]: where the picture differs from plain grey."""
    return (np.asarray(picture) != 90).any(axis=2)


def test_box_edges_are_in_the_colour_of_the_class() -> None:
    """Box 40..80 by 50..90: its first column is pixel 40, its last 79; outside nothing but the tag above it."""
    picture = np.asarray(draw_detections(GREY, detections(([40, 50, 80, 90], 1, 0.9)), CLASSES))
    for x, y in ((40, 70), (79, 70), (60, 89), (79, 89)):
        assert tuple(picture[y, x]) == class_colour(1)
    mask = changed(Image.fromarray(picture))
    assert not mask[90:].any()
    assert not mask[50:90, :40].any()
    assert not mask[50:90, 80:].any()
    assert mask[30:50].any(), "the tag"


def test_nothing_below_the_threshold_and_nothing_found_leave_the_picture() -> None:
    for found in (detections(([40, 50, 80, 90], 1, 0.49)), detections()):
        assert not changed(draw_detections(GREY, found, CLASSES, threshold=0.5)).any()
    assert not changed(
        draw_truth(GREY, Target(boxes_xyxy=torch.zeros(0, 4), labels=torch.zeros(0).long()), CLASSES)
    ).any()


def test_the_best_detection_is_on_top() -> None:
    box = [40.0, 50, 80, 90]
    picture = draw_detections(GREY, detections((box, 0, 0.9), (box, 1, 0.6)), CLASSES)
    assert picture.getpixel((79, 70)) == class_colour(0)


@pytest.mark.parametrize("box", [[-30, -20, 400, 300], [159.9, 119.9, 160, 120], [0, 0, 0, 0], [200, 200, 220, 220]])
def test_boxes_at_and_beyond_the_border_are_drawn_inside(box) -> None:
    picture = draw_detections(GREY, detections((box, 0, 0.9)), CLASSES)
    assert picture.size == (160, 120)
    assert changed(picture).any()


def test_truth_is_dashed_and_ignored_regions_are_drawn() -> None:
    truth = Target(
        boxes_xyxy=torch.tensor([[20.0, 20, 100, 100]]),
        labels=torch.tensor([0]),
        ignore_xyxy=torch.tensor([[110.0, 20, 150, 60]]),
    )
    picture = draw_detections(GREY, detections(), CLASSES, truth=truth)
    colours = {picture.getpixel((x, 20)) for x in range(20, 100)}
    assert (255, 255, 255) in colours
    assert len(colours) == 2
    assert changed(picture)[20:60, 110:150].any()
    assert changed(draw_truth(GREY, truth, CLASSES))[20:60, 110:150].any()


def test_tags_stay_inside_the_picture() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        width, height = (int(side) for side in rng.integers(4, 300, 2))
        pen = _Pen.for_size(width, height)
        near = rng.integers(0, [width, height])
        far = np.minimum(near + rng.integers(1, 200, 2), [width, height])
        text = "a class of rather long name 0.99"[: rng.integers(1, 33)]
        mark = _Mark(box=(int(near[0]), int(near[1]), int(far[0]), int(far[1])), colour=(1, 2, 3), text=text)
        place = _tag_place(mark, pen, (width, height), [])
        if place is None:
            assert width < 40 or height < 40, "only a tiny picture has no room"
            continue
        assert 0 <= place[0] < place[2] <= width
        assert 0 <= place[1] < place[3] <= height


def test_tags_avoid_each_other() -> None:
    pen = _Pen.for_size(300, 300)
    mark = _Mark(box=(100, 100, 200, 200), colour=(1, 2, 3), text="cat 0.90")
    first = _tag_place(mark, pen, (300, 300), [])
    assert first is not None
    assert first[3] == 100, "above the box"
    second = _tag_place(mark, pen, (300, 300), [first])
    assert second is not None
    assert first[2] <= second[0] or first[3] <= second[1]


def test_text_is_shortened_to_its_room() -> None:
    font = _font(14)
    assert _fitting("short", font, 200) == "short"
    shorter = _fitting("a very long name of a class", font, 80)
    assert shorter.endswith("…")
    assert font.getlength(shorter) <= 80
    assert _fitting("word", font, 1) == ""
    assert _fitting("two\nlines", font, 200) == "two lines"


def test_colours_differ_and_are_stable() -> None:
    colours = [class_colour(label) for label in range(80)]
    assert len(set(colours)) == 80
    assert colours[:2] == [(255, 69, 58), (20, 184, 255)]


def test_side_by_side_has_both_panels_and_enlarges_small_pictures() -> None:
    truth = Target(boxes_xyxy=torch.tensor([[20.0, 20, 100, 100]]), labels=torch.tensor([0]))
    picture = side_by_side(GREY, detections(([20, 20, 100, 100], 0, 0.9)), truth, CLASSES)
    scale = readable_scale(120, 160)
    assert scale == pytest.approx(400 / 120)
    assert picture.width == 2 * round(160 * scale) + 10
    assert picture.height > 400
    assert readable_scale(800, 1200) == 1
    plain = side_by_side(GREY, detections(), truth, CLASSES, scale=1)
    assert plain.width == 330


def test_contact_sheet_holds_pictures_of_any_size() -> None:
    pictures = [Image.new("RGB", (30 + 10 * i, 20 + 5 * i), class_colour(i)) for i in range(5)]
    sheet = contact_sheet(pictures, columns=3, gap_px=2)
    assert sheet.size == (60 + 70 + 50 + 4, 30 + 40 + 2)
    assert sheet.getpixel((0, 0)) == class_colour(0)
    assert sheet.getpixel((62, 32)) == class_colour(4)
    assert contact_sheet(pictures, cell_width_px=40, columns=5).width == 5 * 40 + 4 * 10
    assert contact_sheet([]).size == (1, 1)


def test_caption_stands_above_the_picture() -> None:
    picture = captioned(Image.new("RGB", (60, 40), (1, 2, 3)), "a caption that is far too long for the picture")
    assert picture.width == 60
    assert picture.height > 50
    assert picture.getpixel((30, picture.height - 1)) == (1, 2, 3)
