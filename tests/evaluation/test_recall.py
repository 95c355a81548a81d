"""Recall of proposals against MMDetection's recorded numbers, COCO's class-agnostic rule, and by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rcnn.errors import DataError
from rcnn.evaluation.coco import Classes, coco_metrics
from rcnn.evaluation.recall import proposal_recall


@pytest.fixture(scope="module")
def recorded(shared):
    folder = shared / "oracles" / "mmdetection" / "proposal_metrics"
    return folder, np.load(folder / "arrays.npz"), json.loads((folder / "manifest.json").read_text())["results"]


@pytest.fixture(scope="module")
def tables(recorded, read_coco):
    return read_coco(recorded[0], found_name="proposals.json")


def test_recorded_recall_of_proposals(recorded, tables) -> None:
    result = proposal_recall(*tables, counts=(100, 300, 1000))
    np.testing.assert_allclose(result.recall, recorded[1]["eval_recalls/table_100_300_1000_by_iou"], rtol=1e-12)
    np.testing.assert_allclose(result.average, recorded[1]["proposal_fast/ar_100_300_1000"], rtol=1e-12)
    assert result.boxes == 78, "88 boxes, 10 of them crowd regions"


def test_recorded_recall_by_the_rule_of_coco(recorded, tables) -> None:
    """MMDetection's metric `proposal`, which prints three decimals."""
    result = coco_metrics(*tables, classes=Classes.TOGETHER, max_detections=(100, 300, 1000))
    for ours, theirs in {
        "AR@100": "AR@100",
        "AR@300": "AR@300",
        "AR@1000": "AR@1000",
        "AR_small": "AR_s@1000",
        "AR_medium": "AR_m@1000",
        "AR_large": "AR_l@1000",
    }.items():
        assert round(result[ours], 3) == recorded[2]["proposal"][f"coco/{theirs}"]


def test_recorded_precision_of_the_same_boxes(recorded, tables) -> None:
    """MMDetection's metric `bbox`: AP with 100 detections per picture, the five others with 1000."""
    result = coco_metrics(*tables, max_detections=(100, 300, 1000))
    suffixes = {"": "AP", "_50": "AP50", "_75": "AP75", "_s": "AP_small", "_m": "AP_medium", "_l": "AP_large"}
    for suffix, ours in suffixes.items():
        assert round(result[ours], 3) == recorded[2]["bbox"][f"coco/bbox_mAP{suffix}"]


def test_by_hand(make_truth, make_found) -> None:
    """Two boxes of 10 x 10 (small) and 40 x 40 (medium). With one proposal: the small one exactly (recall 1/2 at all
    IoU). With two: also the medium one, IoU 28 / 40 = 0.7: 1 at 0.50 .. 0.70 (5 of 10), 1/2 above: AR 0.75."""
    truth = make_truth([(1, (0, 0, 10, 10), 0, False), (1, (20, 20, 60, 60), 1, False)], image_ids=[1])
    found = make_found([(1, (20, 20, 60, 48), 0, 0.5), (1, (0, 0, 10, 10), 0, 0.9)])
    result = proposal_recall(truth, found, counts=(1, 2, 50))
    np.testing.assert_allclose(result.average, [0.5, 0.75, 0.75])
    np.testing.assert_allclose(result.recall[1], [1] * 5 + [0.5] * 5)
    np.testing.assert_allclose(result.average_by_size["small"], [1, 1, 1])
    np.testing.assert_allclose(result.average_by_size["medium"], [0, 0.5, 0.5])
    assert np.isnan(result.average_by_size["large"]).all()


def test_a_proposal_serves_one_box_and_ignored_boxes_none(make_truth, make_found) -> None:
    box = (0, 0, 10, 10)
    rows = [(1, box, 0, False), (1, box, 0, False), (1, box, 0, True), (2, box, 0, False)]
    result = proposal_recall(make_truth(rows, image_ids=[2, 1]), make_found([(1, box, 0, 0.9)]))
    np.testing.assert_allclose(result.average, 1 / 3)


def test_empty_sides(make_truth, make_found) -> None:
    some, none = make_truth([(1, (0, 0, 9, 9), 0, False)], image_ids=[1]), make_truth([], image_ids=[1])
    np.testing.assert_array_equal(proposal_recall(some, make_found([])).average, 0)
    assert np.isnan(proposal_recall(none, make_found([(1, (0, 0, 9, 9), 0, 0.5)])).average).all()
    assert np.isnan(proposal_recall(make_truth([], image_ids=[]), make_found([])).average).all()


def test_strange_proposals_are_refused(make_truth, make_found) -> None:
    with pytest.raises(DataError, match="id 4"):
        proposal_recall(make_truth([], image_ids=[1]), make_found([(4, (0, 0, 9, 9), 0, 0.5)]))
