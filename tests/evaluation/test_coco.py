"""COCO's numbers against recordings of pycocotools, against pycocotools itself, and by hand."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from rcnn.errors import DataError
from rcnn.evaluation.coco import Classes, CocoResult, Ignored, coco_metrics, error_kinds

SQUARE = (10, 10, 50, 50)  # 40 x 40: of medium size

VARIANTS = {
    "": {},
    "class_agnostic/": {"classes": Classes.TOGETHER},
    "proposal_100_300_1000/": {"classes": Classes.TOGETHER, "max_detections": (100, 300, 1000)},
    "max_dets_300/": {"max_detections": (1, 10, 300)},
    "first_5_images/": {},
}


@pytest.mark.parametrize("case", ["set1", "set2_edge"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_recorded_numbers_of_pycocotools(shared, read_coco, case, variant) -> None:
    folder = shared / "oracles" / "pycocotools" / case
    recorded = np.load(folder / "arrays.npz")
    if f"{variant}stats" not in recorded:
        assert case == "set2_edge", "every variant is recorded for set1"
        return
    truth, found = read_coco(folder, first_images=5 if variant == "first_5_images/" else None)
    result = coco_metrics(truth, found, **VARIANTS[variant])
    for name in ("stats", "precision", "recall", "scores"):
        if f"{variant}{name}" in recorded:
            np.testing.assert_array_equal(getattr(result, name), recorded[f"{variant}{name}"], err_msg=name)
    if not variant:
        np.testing.assert_array_equal([one.ap for one in result.per_class], recorded["per_class_AP"])


def test_first_number_needs_the_limit_of_100(shared, read_coco) -> None:
    truth, found = read_coco(shared / "oracles" / "pycocotools" / "set1")
    result = coco_metrics(truth, found, max_detections=(1, 10, 300))
    assert result["AP"] == -1
    assert result["AP50"] > 0


def peer_evaluation(truth, found, capsys, ignored=()) -> object:
    """pycocotools on the same tables; `ignored` rows of the truth get an area beyond every range."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    coco = COCO()
    owners = np.repeat(truth.image_ids, np.diff(truth.starts))
    coco.dataset = {
        "images": [{"id": int(image_id)} for image_id in truth.image_ids],
        "categories": [{"id": label + 1} for label in range(len(truth.classes))],
        "annotations": [
            {
                "id": row + 1,
                "image_id": int(owners[row]),
                "category_id": int(truth.labels[row]) + 1,
                "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                "area": 1e12 if row in ignored else truth.areas[row],
                "iscrowd": int(truth.ignored[row]) if not len(ignored) else 0,
            }
            for row, box in enumerate(truth.boxes_xyxy.tolist())
        ],
    }
    coco.createIndex()
    boxes = found.boxes_xyxy
    rows = np.column_stack([found.image_ids, boxes[:, :2], boxes[:, 2:] - boxes[:, :2], found.scores, found.labels + 1])
    evaluation = COCOeval(coco, coco.loadRes(rows), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    capsys.readouterr()
    return evaluation


def random_tables(seed, make_truth, make_found):
    """Boxes on a coarse grid, scores of few values: ties of IoU and of score, boxes without area, empty pictures."""
    rng = np.random.default_rng(seed)
    image_ids = rng.permutation(40)[: rng.integers(1, 9)]

    def boxes(count: int) -> np.ndarray:
        corners = rng.integers(0, 12, (count, 2)) * 8.0
        return np.concatenate([corners, corners + rng.integers(0, 14, (count, 2)) * 8.0], axis=1)

    count = rng.integers(0, 25)
    truth_rows = [
        (int(rng.choice(image_ids)), box, int(rng.integers(0, 3)), bool(rng.random() < 0.2)) for box in boxes(count)
    ]
    found_rows = [
        (int(rng.choice(image_ids)), box, int(rng.integers(0, 3)), float(rng.integers(0, 6)) / 5)
        for box in boxes(rng.integers(1, 120))
    ]
    found_rows += [(row[0], row[1], row[2], float(rng.integers(0, 6)) / 5) for row in truth_rows if rng.random() < 0.6]
    truth = make_truth(truth_rows, image_ids=image_ids.tolist(), names=("a", "b", "c"))
    return truth, make_found(found_rows)


@pytest.mark.parametrize("seed", range(40))
def test_equals_pycocotools_on_random_tables(seed, make_truth, make_found, capsys) -> None:
    truth, found = random_tables(seed, make_truth, make_found)
    peer, ours = peer_evaluation(truth, found, capsys), coco_metrics(truth, found)
    for name in ("precision", "recall", "scores"):
        np.testing.assert_array_equal(getattr(ours, name), peer.eval[name])
    np.testing.assert_array_equal(ours.stats, peer.stats)


@pytest.mark.parametrize("seed", range(5))
def test_ignored_objects_are_what_pycocotools_ignores_by_area(seed, make_truth, make_found, capsys) -> None:
    truth, found = random_tables(seed + 100, make_truth, make_found)
    peer = peer_evaluation(truth, found, capsys, ignored=np.flatnonzero(truth.ignored))
    ours = coco_metrics(truth, found, ignored=Ignored.OBJECT)
    np.testing.assert_array_equal(ours.stats, peer.stats)


def test_one_box_found_and_one_missed_by_hand(make_truth, make_found) -> None:
    """Two boxes, one found exactly: recall 0.5 at precision 1. Of the 101 recall levels 0, 0.01 .. 0.50 are reached:
    AP = 51 / 101 at every IoU."""
    truth = make_truth([(7, SQUARE, 0, False), (7, (60, 60, 100, 100), 0, False)], image_ids=[7])
    result = coco_metrics(truth, make_found([(7, SQUARE, 0, 0.9)]))
    for name in ("AP", "AP50", "AP75", "AP_medium"):
        assert result[name] == pytest.approx(51 / 101, abs=1e-12)
    assert result["AR@1"] == result["AR@100"] == 0.5
    assert result["AP_small"] == result["AP_large"] == -1
    cat, dog = result.per_class
    assert (cat.name, cat.boxes, cat.ar) == ("cat", 2, 0.5)
    assert dog.boxes == 0
    assert np.isnan(dog.ap)


def test_a_duplicate_below_costs_nothing_and_above_halves_the_precision(make_truth, make_found) -> None:
    """A wrong box of higher score stands before the right one: precision 1/2 at every recall level."""
    truth = make_truth([(1, SQUARE, 0, False)], image_ids=[1])
    below = coco_metrics(truth, make_found([(1, SQUARE, 0, 0.9), (1, SQUARE, 0, 0.8)]))
    above = coco_metrics(truth, make_found([(1, (60, 60, 100, 100), 0, 0.9), (1, SQUARE, 0, 0.8)]))
    assert below["AP"] == pytest.approx(1, abs=1e-12)
    assert above["AP"] == pytest.approx(0.5, abs=1e-12)


def test_crowd_forgives_what_lies_inside_and_object_only_what_is_alike(make_truth, make_found) -> None:
    """A small box inside the ignored one, scored above the right one. As a crowd region it forgives the small box
    (precision 1); as an object it does not, the IoU being 0.01 (precision 1/2)."""
    rows = [(1, (0, 0, 100, 100), 0, True), (1, (200, 200, 240, 240), 0, False)]
    found = make_found([(1, (0, 0, 10, 10), 0, 0.9), (1, (200, 200, 240, 240), 0, 0.8)])
    crowd, difficult = (make_truth(rows, image_ids=[1], format=name) for name in ("COCO", "VOC"))
    assert coco_metrics(crowd, found)["AP"] == pytest.approx(1, abs=1e-12)
    assert coco_metrics(difficult, found)["AP"] == pytest.approx(0.5, abs=1e-12)
    assert coco_metrics(difficult, found, ignored=Ignored.CROWD)["AP"] == pytest.approx(1, abs=1e-12)
    alike = make_found([(1, (0, 0, 100, 99), 0, 0.9), (1, (200, 200, 240, 240), 0, 0.8)])
    assert coco_metrics(difficult, alike)["AP"] == pytest.approx(1, abs=1e-12)
    twice = make_found([(1, (0, 0, 100, 99), 0, 0.9)] * 2 + [(1, (200, 200, 240, 240), 0, 0.8)])
    assert coco_metrics(difficult, twice)["AP"] == pytest.approx(0.5, abs=1e-12)


def defined(result: CocoResult) -> set[float]:
    return set(result.stats.tolist())


def test_nothing_found_and_nothing_there(make_truth, make_found) -> None:
    empty, some = make_truth([], image_ids=[1, 2]), make_truth([(1, SQUARE, 0, False)], image_ids=[1, 2])
    assert defined(coco_metrics(some, make_found([]))) == {0.0, -1.0}  # -1: there are no small and no large boxes
    assert defined(coco_metrics(empty, make_found([]))) == {-1.0}
    assert defined(coco_metrics(empty, make_found([(1, SQUARE, 0, 0.5)]))) == {-1.0}
    assert defined(coco_metrics(make_truth([], image_ids=[]), make_found([]))) == {-1.0}


def test_curve_is_the_mean_of_the_classes_that_are_there(make_truth, make_found) -> None:
    rows = [(1, SQUARE, 0, False), (1, (60, 60, 100, 100), 1, False)]
    result = coco_metrics(make_truth(rows, image_ids=[1], names="abc"), make_found([(1, SQUARE, 0, 0.9)]))
    np.testing.assert_allclose(result.curve(0), 1)
    np.testing.assert_allclose(result.curve(1), 0)
    assert np.isnan(result.curve(2)).all()
    np.testing.assert_allclose(result.curve(), 0.5)


def test_all_that_is_wrong_with_the_detections_is_said(make_truth, make_found) -> None:
    truth = make_truth([(1, SQUARE, 0, False)], image_ids=[1])
    found = make_found([(9, SQUARE, 0, 0.5), (1, SQUARE, 2, 0.5), (1, SQUARE, 0, float("nan"))])
    with pytest.raises(DataError) as caught:
        coco_metrics(truth, found)
    assert [problem.where for problem in caught.value.problems] == ["detections"] * 3
    text = str(caught.value)
    assert "id 9" in text
    assert "0 to 1" in text
    assert "row 2" in text


def test_kinds_of_error_by_hand(make_truth, make_found) -> None:
    """One right, one of another class, one too far off (IoU 1600 / 3600 = 0.44), one in the background, one box
    missed; a detection below the score that is asked for is not counted."""
    boxes = [(x, 0, x + 40, 40) for x in (0, 100, 200, 300)]
    truth = make_truth([(1, box, 0, False) for box in boxes], image_ids=[1])
    found = make_found(
        [
            (1, boxes[0], 0, 0.9),
            (1, boxes[1], 1, 0.9),
            (1, (200, 0, 260, 60), 0, 0.9),
            (1, (500, 300, 540, 340), 0, 0.9),
            (1, (500, 100, 540, 140), 0, 0.1),
        ]
    )
    errors = error_kinds(truth, found)
    assert errors.counts == {"Cls": 1, "Loc": 1, "Both": 0, "Dupe": 0, "Bkg": 1, "Miss": 1}
    assert errors.confusion.tolist() == [[1, 1, 2], [0, 0, 0], [2, 0, 0]]
    assert errors.ap_gains["Miss"] > 0


def test_evaluation_needs_no_torch() -> None:
    """Half a gigabyte and a second and a half: the limits of memory and time are kept by not importing it."""
    code = "import sys, rcnn.evaluation.coco, rcnn.evaluation.voc; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_nothing_is_printed(make_truth, make_found, capfd) -> None:
    truth = make_truth([(1, SQUARE, 0, False)], image_ids=[1])
    coco_metrics(truth, make_found([(1, SQUARE, 0, 0.9)]), max_detections=(1, 10, 300))
    error_kinds(truth, make_found([]))
    assert capfd.readouterr() == ("", "")


def test_result_is_plain_numbers(make_truth, make_found) -> None:
    result = coco_metrics(make_truth([(1, SQUARE, 0, False)], image_ids=[1]), make_found([(1, SQUARE, 0, 0.9)]))
    assert len(json.loads(json.dumps(dict(result.items())))) == 12
