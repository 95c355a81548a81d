"""Recall of proposals against what MMDetection and detectron2 recorded, COCO's class-agnostic rule, and by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rcnn.errors import DataError
from rcnn.evaluation.coco import Classes, Ignored, coco_metrics
from rcnn.evaluation.overlaps import PictureOverlaps
from rcnn.evaluation.recall import AREAS, Pairing, Unproposed, proposal_recall


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


def test_recorded_recall_by_the_rule_of_coco_without_keeping_detections(recorded, tables) -> None:
    result = proposal_recall(*tables, counts=(100, 300, 1000), pairing=Pairing.SCORE)
    theirs = recorded[2]["proposal"]
    assert [round(value, 3) for value in result.average] == [theirs[f"coco/AR@{count}"] for count in result.counts]
    sizes = {size: round(values[-1], 3) for size, values in result.average_by_size.items()}
    assert sizes == {size: theirs[f"coco/AR_{size[0]}@1000"] for size in AREAS}


DETECTRON2_AREAS = {
    "all": (0, 1e10), **AREAS, "96-128": (96**2, 128**2), "128-256": (128**2, 256**2), "256-512": (256**2, 512**2),
    "512-inf": (512**2, 1e10),
}  # fmt: skip
LIMITS = (10, 100, 1000, None)


@pytest.fixture(scope="module")
def detectron2(shared, read_coco):
    folder = shared / "oracles" / "detectron2" / "box_proposal_ar"
    return np.load(folder / "arrays.npz"), read_coco(folder, found_name="proposals.json")


def test_recorded_recall_of_detectron2(detectron2) -> None:
    """It leaves a picture without proposals out of the count: 74 boxes, not 78. Its numbers are float32."""
    arrays, tables = detectron2
    counts = [limit or 10**6 for limit in LIMITS]
    result = proposal_recall(*tables, counts=counts, unproposed=Unproposed.LEFT_OUT, areas=DETECTRON2_AREAS)
    assert result.boxes == 74
    for size in DETECTRON2_AREAS:
        recorded = [float(arrays[f"{size}/limit={limit}/ar"]) for limit in LIMITS]
        np.testing.assert_allclose(result.average_by_size[size], recorded, rtol=1e-6, err_msg=size)
        assert result.boxes_by_size[size] == arrays[f"{size}/limit=10/num_pos"]
    recalls = [arrays[f"all/limit={limit}/recalls"] for limit in LIMITS]
    np.testing.assert_allclose(result.recall, recalls, rtol=1e-6)


def test_recorded_overlaps_of_detectron2(detectron2) -> None:
    """Not only what passes 0.5: the overlap of every true box with its own proposal."""
    arrays, (truth, found) = detectron2
    for size, (least, largest) in DETECTRON2_AREAS.items():
        for limit in LIMITS:
            reached: list[float] = []
            for index, image_id in enumerate(truth.image_ids):
                rows = np.flatnonzero(found.image_ids == image_id)
                rows = rows[np.argsort(-found.scores[rows], kind="stable")]
                if len(rows):
                    picture = PictureOverlaps.of(truth, index, found.boxes_xyxy[rows])
                    chosen = (picture.areas >= least) & (picture.areas <= largest)
                    pairs = picture.pair_by_overlap(num_proposals=limit or 10**6, boxes=chosen)
                    reached += pairs.ious[chosen].tolist()
            expected = arrays[f"{size}/limit={limit}/gt_overlaps"]
            np.testing.assert_allclose(sorted(reached), expected, rtol=1e-5, atol=1e-7, err_msg=f"{size}, {limit}")


def test_the_rule_of_coco_on_crowded_pictures(make_truth, make_found) -> None:
    """hotcoco (pycocotools' numbers to the last bit) on boxes that many proposals share, some of them ignored."""
    rng = np.random.default_rng(5)

    def boxes(count: int) -> np.ndarray:
        corners = rng.uniform(0, 300, (count, 2)).round()
        return np.concatenate([corners, corners + rng.uniform(5, 160, (count, 2)).round()], axis=1)

    truth_rows, found_rows = [], []
    for image in (1, 2, 3):
        true = np.repeat(boxes(10), 3, axis=0) + rng.normal(0, 6, (30, 4)).round()
        true[:, 2:] = np.maximum(true[:, 2:], true[:, :2] + 1)
        truth_rows += [(image, box, int(rng.integers(2)), bool(rng.random() < 0.2)) for box in true]
        near = np.repeat(true, 8, axis=0) + rng.normal(0, 5, (240, 4)).round()
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        order = rng.permutation(240)
        found_rows += [
            (image, box, 0, score) for box, score in zip(near[order], rng.permutation(240) / 240, strict=True)
        ]
    truth, found = make_truth(truth_rows, image_ids=[1, 2, 3]), make_found(found_rows)
    counts = (10, 60, 200)
    expected = coco_metrics(truth, found, classes=Classes.TOGETHER, max_detections=counts, ignored=Ignored.CROWD)
    result = proposal_recall(truth, found, counts=counts, pairing=Pairing.SCORE)
    np.testing.assert_allclose(result.recall, expected.recall[:, 0, 0, :].T, rtol=1e-12)
    for place, size in enumerate(AREAS, start=1):
        expected_size = expected.recall[:, 0, place, :].mean(axis=0)
        np.testing.assert_allclose(result.average_by_size[size], expected_size, rtol=1e-12)
    by_overlap = proposal_recall(truth, found, counts=counts)
    assert (by_overlap.recall != result.recall).any(), "the data tell the two rules apart"


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


def test_classes_by_hand(make_truth, make_found) -> None:
    """Three boxes of class 0, of which one is ignored, and one of class 1. Proposals find the first exactly and the
    last with IoU 30 / 40 = 0.75: at 0.50 .. 0.75 (6 of 10 thresholds)."""
    rows = [
        (1, (0, 0, 10, 10), 0, False),
        (1, (50, 50, 60, 60), 0, False),
        (1, (80, 80, 90, 90), 0, True),
        (2, (0, 0, 40, 40), 1, False),
    ]
    found = [(1, (0, 0, 10, 10), 0, 0.9), (1, (80, 80, 90, 90), 0, 0.8), (2, (0, 0, 40, 30), 0, 0.1)]
    truth = make_truth(rows, image_ids=[1, 2], names=("cat", "dog", "eel"))
    result = proposal_recall(truth, make_found(found), counts=(1, 10))
    cat, dog, eel = result.per_class
    assert [one.boxes for one in result.per_class] == [2, 1, 0]
    np.testing.assert_allclose(cat.average, [0.5, 0.5])
    np.testing.assert_allclose(dog.average, [0.6, 0.6])
    assert np.isnan(eel.average).all()
    np.testing.assert_allclose(result.average, (2 * 0.5 + 0.6) / 3)
    np.testing.assert_allclose(result.at(0.5), 2 / 3)
    assert (result.pictures, result.proposals) == (2, 3)


def test_a_box_of_exactly_32_x_32_is_small_and_medium(make_truth, make_found) -> None:
    """As COCO and detectron2 count it."""
    truth = make_truth([(1, (0, 0, 32, 32), 0, False)], image_ids=[1])
    result = proposal_recall(truth, make_found([(1, (0, 0, 32, 32), 0, 0.5)]), counts=(1,))
    assert result.boxes_by_size == {"small": 1, "medium": 1, "large": 0}


def test_pictures_without_proposals(make_truth, make_found) -> None:
    truth = make_truth([(1, (0, 0, 9, 9), 0, False), (2, (0, 0, 9, 9), 0, False)], image_ids=[1, 2])
    found = make_found([(1, (0, 0, 9, 9), 0, 0.5)])
    assert proposal_recall(truth, found, counts=(1,)).average == [0.5]
    assert proposal_recall(truth, found, counts=(1,), unproposed=Unproposed.LEFT_OUT).average == [1]


def test_empty_sides(make_truth, make_found) -> None:
    some, none = make_truth([(1, (0, 0, 9, 9), 0, False)], image_ids=[1]), make_truth([], image_ids=[1])
    np.testing.assert_array_equal(proposal_recall(some, make_found([])).average, 0)
    assert np.isnan(proposal_recall(none, make_found([(1, (0, 0, 9, 9), 0, 0.5)])).average).all()
    assert np.isnan(proposal_recall(make_truth([], image_ids=[]), make_found([])).average).all()


def test_strange_proposals_are_refused(make_truth, make_found) -> None:
    with pytest.raises(DataError, match="id 4"):
        proposal_recall(make_truth([], image_ids=[1]), make_found([(4, (0, 0, 9, 9), 0, 0.5)]))
