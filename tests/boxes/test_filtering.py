"""Scored boxes to detections."""

from __future__ import annotations

import math

import torch

from rcnn.boxes.filtering import DetectionFilter, SoftNMS

SQUARE = (0.0, 0.0, 10.0, 10.0)
# Nine tenths of the square: IoU 0.9.
NEARLY = (0.0, 0.0, 10.0, 9.0)


def run(chosen: DetectionFilter, *rows: tuple[tuple[float, float, float, float], float, int]):
    boxes = torch.tensor([row[0] for row in rows]).reshape(-1, 4)
    scores = torch.tensor([row[1] for row in rows], dtype=torch.float32)
    found = chosen(boxes, scores, torch.tensor([row[2] for row in rows], dtype=torch.int64))
    return list(
        zip(map(tuple, found.boxes_xyxy.tolist()), found.scores.double().tolist(), found.labels.tolist(), strict=True)
    )


def test_nothing_gives_nothing() -> None:
    assert run(DetectionFilter()) == []


def test_one_class_suppresses_and_another_does_not() -> None:
    found = run(DetectionFilter(), (NEARLY, 0.5, 0), (SQUARE, 0.75, 0), (NEARLY, 0.25, 1))
    assert found == [(SQUARE, 0.75, 0), (NEARLY, 0.25, 1)]


def test_a_score_must_be_above_the_threshold() -> None:
    # torchvision: scores > 0.05, not >=. 0.25 is exact in binary.
    found = run(DetectionFilter(score_threshold=0.25), (SQUARE, 0.25, 0), ((20.0, 20.0, 30.0, 30.0), 0.5, 0))
    assert [score for _, score, _ in found] == [0.5]


def test_the_best_are_kept_best_first() -> None:
    rows = [((20.0 * i, 0.0, 20.0 * i + 10, 10.0), 0.125 * (i + 1), i % 2) for i in range(6)]
    assert [score for _, score, _ in run(DetectionFilter(max_detections=3), *rows)] == [0.75, 0.625, 0.5]
    assert len(run(DetectionFilter(max_detections=None), *rows)) == 6


def test_boxes_without_area_and_without_numbers_are_left_out() -> None:
    rows = [((5.0, 5.0, 5.0, 9.0), 0.75, 0), ((math.nan, 0.0, 5.0, 5.0), 0.75, 0), (SQUARE, math.nan, 0)]
    assert run(DetectionFilter(), *rows, (SQUARE, 0.5, 0)) == [(SQUARE, 0.5, 0)]


def test_soft_nms_takes_the_place_of_the_hard_one() -> None:
    rows = ((NEARLY, 0.5, 0), (SQUARE, 0.75, 0), (NEARLY, 0.25, 1))
    # An IoU of 0.9: 0.5 becomes 0.05, and the other class is as it was.
    found = run(DetectionFilter(soft_nms=SoftNMS()), *rows)
    assert [(box, label) for box, _, label in found] == [(SQUARE, 0), (NEARLY, 1), (NEARLY, 0)]
    torch.testing.assert_close(torch.tensor([score for _, score, _ in found]), torch.tensor([0.75, 0.25, 0.05]))
    # The linear decay begins at `nms_iou`.
    assert [score for _, score, _ in run(DetectionFilter(nms_iou=0.95, soft_nms=SoftNMS()), *rows)] == [0.75, 0.5, 0.25]
    few = DetectionFilter(max_detections=1, soft_nms=SoftNMS(decay="gaussian"))
    assert run(few, *rows) == [(SQUARE, 0.75, 0)]
    assert run(DetectionFilter(soft_nms=SoftNMS())) == []
