"""VOC's numbers against the recordings of simple-faster-rcnn-pytorch (and chainercv), and by hand."""

from __future__ import annotations

import numpy as np
import pytest

from rcnn.errors import DataError
from rcnn.evaluation.voc import Corners, Difficult, Interpolation, pairwise_iou, voc_metrics

XYXY = [1, 0, 3, 2]  # of the recorded y, x, y, x


@pytest.fixture(scope="module")
def recorded(shared):
    return np.load(shared / "oracles" / "simple_faster_rcnn" / "voc_eval" / "arrays.npz")


@pytest.fixture(params=[Corners.INCLUSIVE_PIXELS, Corners.CONTINUOUS], ids=["as recorded", "as in our tables"])
def case(request, recorded, make_truth, make_found):
    """The recorded tables as they are (the far corner is the last pixel), and as our readers would give them."""
    corners = request.param
    far = np.array([0, 0, 1, 1]) if corners is Corners.CONTINUOUS else np.zeros(4)
    gt, pred = (
        {key: recorded[f"{side}/{key}"] for key in ("image", "boxes_yxyx", "labels")} for side in ("gt", "pred")
    )
    truth_boxes, boxes = (side["boxes_yxyx"][:, XYXY].astype(np.float64) + far for side in (gt, pred))
    truth = make_truth(
        [
            (int(image), box, int(label), bool(hard))
            for image, box, label, hard in zip(
                gt["image"], truth_boxes, gt["labels"], recorded["gt/difficult"], strict=True
            )
        ],
        image_ids=range(18),
        names="abcdef",
        format="VOC",
    )
    found = make_found(list(zip(pred["image"], boxes, pred["labels"], recorded["pred/scores"], strict=True)))
    return truth, found, corners


@pytest.mark.parametrize("iou", [0.5, 0.75])
@pytest.mark.parametrize(
    ("name", "interpolation"),
    [("voc07_11point", Interpolation.ELEVEN_POINTS), ("voc12_area", Interpolation.AREA)],
)
def test_recorded_average_precision(case, recorded, iou, name, interpolation) -> None:
    truth, found, corners = case
    result = voc_metrics(truth, found, iou=iou, interpolation=interpolation, corners=corners)
    np.testing.assert_array_equal([one.ap for one in result.per_class], recorded[f"{name}/iou{iou}/ap"])
    assert result.mean_ap == recorded[f"{name}/iou{iou}/map"]


def test_recorded_curves(case, recorded) -> None:
    truth, found, corners = case
    for label, one in enumerate(voc_metrics(truth, found, corners=corners).per_class):
        np.testing.assert_array_equal(one.precision, recorded[f"curve/{label}/precision"])
        np.testing.assert_array_equal(one.recall, recorded[f"curve/{label}/recall"])


def test_recorded_with_difficult_boxes_counted(case, recorded) -> None:
    truth, found, corners = case
    result = voc_metrics(truth, found, corners=corners, difficult=Difficult.COUNTED)
    expected = recorded["voc07_11point_difficult_counted/ap"]
    np.testing.assert_array_equal([one.ap for one in result.per_class], expected)


def test_recorded_by_mmdetection(shared, case, recorded) -> None:
    """The same boxes by MMDetection's float32 IoU; without its "legacy coordinate" it takes them as continuous."""
    mmdet = np.load(shared / "oracles" / "mmdetection" / "proposal_metrics" / "arrays.npz")
    truth, found, corners = case
    rules = [("voc07_11point", Interpolation.ELEVEN_POINTS), ("voc12_area_legacy_coordinate", Interpolation.AREA)]
    for name, interpolation in rules:
        result = voc_metrics(truth, found, interpolation=interpolation, corners=corners)
        np.testing.assert_allclose([one.ap for one in result.per_class], mmdet[f"voc/{name}/ap"], rtol=1e-6)
    if corners is Corners.INCLUSIVE_PIXELS:
        result = voc_metrics(truth, found, interpolation=Interpolation.AREA, corners=Corners.CONTINUOUS)
        np.testing.assert_allclose([one.ap for one in result.per_class], mmdet["voc/voc12_area/ap"], rtol=1e-6)


BOXES = [(x, 0, x + 10, 10) for x in (0, 20, 40, 60)]


def test_by_hand(make_truth, make_found) -> None:
    """Four boxes; found: right, wrong, right. Precision 1, 1/2, 2/3 at recall 1/4, 1/4, 1/2.
    Area: 1/4 * 1 + 1/4 * 2/3 = 5/12. Eleven points: 1 at 0, 0.1, 0.2; 2/3 at 0.3, 0.4, 0.5: (3 + 2) / 11."""
    truth = make_truth([(1, box, 0, False) for box in BOXES], image_ids=[1])
    found = make_found([(1, BOXES[2], 0, 0.7), (1, BOXES[0], 0, 0.9), (1, (100, 100, 110, 110), 0, 0.8)])
    area = voc_metrics(truth, found, interpolation=Interpolation.AREA)
    points = voc_metrics(truth, found, interpolation=Interpolation.ELEVEN_POINTS)
    assert area.mean_ap == pytest.approx(5 / 12)
    assert points.mean_ap == pytest.approx(5 / 11)
    np.testing.assert_allclose(area.per_class[0].precision, [1, 1 / 2, 2 / 3])
    np.testing.assert_allclose(area.per_class[0].recall, [1 / 4, 1 / 4, 1 / 2])
    assert np.isnan(area.per_class[1].ap), "no dog in the truth: not part of the mean"


def test_all_finds_of_a_difficult_box_are_left_out(make_truth, make_found) -> None:
    truth = make_truth([(1, BOXES[0], 0, True), (1, BOXES[1], 0, False)], image_ids=[1], format="VOC")
    found = make_found([(1, BOXES[0], 0, 0.9), (1, BOXES[0], 0, 0.8), (1, BOXES[1], 0, 0.7)])
    one = voc_metrics(truth, found, interpolation=Interpolation.AREA).per_class[0]
    assert one.ap == 1
    assert one.boxes == 1
    np.testing.assert_array_equal(one.precision, [np.nan, np.nan, 1])


def test_second_find_of_a_box_is_wrong_and_iou_may_equal_the_threshold(make_truth, make_found) -> None:
    truth = make_truth([(1, BOXES[0], 0, False)], image_ids=[1])
    half = (0, 0, 10, 5)  # IoU 1/2
    one = voc_metrics(truth, make_found([(1, half, 0, 0.9), (1, BOXES[0], 0, 0.8)])).per_class[0]
    np.testing.assert_array_equal(one.precision, [1, 0.5])


def test_empty_sides(make_truth, make_found) -> None:
    some, none = make_truth([(1, BOXES[0], 0, False)], image_ids=[1, 2]), make_truth([], image_ids=[1, 2])
    assert voc_metrics(some, make_found([])).mean_ap == 0
    assert np.isnan(voc_metrics(none, make_found([(2, BOXES[0], 0, 0.5)])).mean_ap)
    assert np.isnan(voc_metrics(none, make_found([])).mean_ap)


def test_strange_detections_are_refused(make_truth, make_found) -> None:
    with pytest.raises(DataError, match="id 5"):
        voc_metrics(make_truth([], image_ids=[1]), make_found([(5, BOXES[0], 0, 0.5)]))


def test_iou_of_empty_boxes_is_zero() -> None:
    point, box = np.array([[1.0, 1, 1, 1]]), np.array([[0.0, 0, 2, 2], [1, 1, 1, 1]])
    np.testing.assert_array_equal(pairwise_iou(point, box), [[0, 0]])
    np.testing.assert_allclose(pairwise_iou(np.array([[1.0, 0, 3, 2]]), box[:1]), [[1 / 3]])
