"""What a perfect second stage would reach: by hand, and against the recall that it is made from."""

from __future__ import annotations

import numpy as np

from rcnn.evaluation.overlaps import PictureOverlaps
from rcnn.evaluation.recall import RecallCounter
from rcnn.evaluation.second_stage import PerfectSecondStageCounter

# An id that a float64 cannot hold.
BIG = 2**53 + 1


def judged(truth, proposals: dict[int, list[tuple[float, ...]]], counts=(1, 10)):
    counter = PerfectSecondStageCounter(truth, counts=counts)
    for index, image_id in enumerate(truth.image_ids.tolist()):
        boxes = np.array(proposals.get(image_id, []), np.float64).reshape(-1, 4)
        counter.add(index, PictureOverlaps.of(truth, index, boxes))
    return counter.result()


def test_by_hand(make_truth) -> None:
    """A cat whose proposal is exact; a dog of 40 x 40 whose proposal has IoU 28 / 40 = 0.7: right at 0.50 .. 0.70, 5 of
    10 thresholds; a second dog whose proposal has IoU 16 / 40 = 0.4 and which no second stage is told to see.
    Cat: AP 1. Dogs: recall 1/2, 51 of the 101 recall levels: 5 / 10 * 51 / 101; with refined boxes 51 / 101.
    The exact copy of the cat's proposal is a duplicate and does no harm, nor does the crowd."""
    rows = [
        (BIG, (0, 0, 10, 10), 0, False),
        (BIG, (100, 100, 140, 140), 1, False),
        (3, (0, 0, 40, 40), 1, False),
        (3, (300, 300, 400, 400), 0, True),
    ]
    truth = make_truth(rows, image_ids=[BIG, 3])
    proposals = {
        BIG: [(0.0, 0, 10, 10), (100, 100, 140, 128), (0, 0, 10, 10), (200, 200, 220, 220)],
        3: [(0.0, 0, 40, 16), (310, 310, 330, 330)],
    }
    one, ten = judged(truth, proposals)
    assert (one.count, ten.count) == (1, 10)
    np.testing.assert_allclose([row.ap for row in one.classified.per_class], [1, 0])
    dog = 51 / 101
    np.testing.assert_allclose([row.ap for row in ten.classified.per_class], [1, dog / 2])
    np.testing.assert_allclose(ten.classified["AP"], (1 + dog / 2) / 2)
    np.testing.assert_allclose([row.ap for row in ten.refined.per_class], [1, dog])


def test_a_proposal_serves_one_box(make_truth) -> None:
    """Two dogs in the same place and one proposal: half of them can be found."""
    box = (10.0, 10.0, 50.0, 50.0)
    truth = make_truth([(1, box, 1, False), (1, box, 1, False)], image_ids=[1])
    (result,) = judged(truth, {1: [box]}, counts=(10,))
    np.testing.assert_allclose(result.refined.per_class[1].ar, 0.5)
    (result,) = judged(truth, {1: [box, box]}, counts=(10,))
    np.testing.assert_allclose(result.classified["AP"], 1)


def test_nothing(make_truth) -> None:
    (result,) = judged(make_truth([(1, (0, 0, 9, 9), 0, False)], image_ids=[1]), {}, counts=(10,))
    assert result.classified["AP"] == result.refined["AP"] == 0


def test_its_recall_is_that_of_the_proposals(shared, read_coco) -> None:
    """COCO's evaluation of the detections finds, class by class, what the counter of recall says could be found."""
    truth, found = read_coco(shared / "oracles" / "mmdetection" / "proposal_metrics", found_name="proposals.json")
    recall, second = RecallCounter(truth.classes.names), PerfectSecondStageCounter(truth)
    for index, image_id in enumerate(truth.image_ids):
        rows = np.flatnonzero(found.image_ids == image_id)
        picture = PictureOverlaps.of(truth, index, found.boxes_xyxy[rows[np.argsort(-found.scores[rows])]])
        recall.add(picture)
        second.add(index, picture)
    for place, result in enumerate(second.result()):
        expected = [one.average[place] for one in recall.result().per_class]
        np.testing.assert_allclose([row.ar for row in result.classified.per_class], expected)
        at_half = [one.recall[place, 0] for one in recall.result().per_class]
        np.testing.assert_allclose([row.ar for row in result.refined.per_class], at_half)
