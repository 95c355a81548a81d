"""Detections of a whole data set: frames, order, once each, and a detector that is left as it was."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fake_training import FakeDetector, FakeLoader

from rcnn.engine.accelerator import build_accelerator
from rcnn.engine.evaluate import evaluation_mode, merge, predict_all, propose_all, to_original
from rcnn.errors import DataError
from rcnn.evaluation.table import DetectionTable
from rcnn.records import Detections, ImageBatch, Proposals, Size


def pictures(size: Size, original: Size, scale: float | None = None) -> ImageBatch:
    """A batch of one."""
    scales = None if scale is None else (scale,)
    return ImageBatch(pixels=torch.zeros(1, 3, *size), sizes=(size,), original_sizes=(original,), scales=scales)


def test_to_original_scales_each_axis_and_clips() -> None:
    found = Detections(
        boxes_xyxy=torch.tensor([[10.0, 20.0, 30.0, 40.0], [-5.0, -1.0, 200.0, 90.0]]),
        scores=torch.tensor([0.9, 0.8]),
        labels=torch.tensor([1, 0]),
    )
    moved = to_original(found, pictures(Size(height=50, width=100), Size(height=200, width=150)), 0)
    # x times 1.5, y times 4; the second box is cut at 0, 150 and 200
    torch.testing.assert_close(
        moved.boxes_xyxy, torch.tensor([[15.0, 80.0, 45.0, 160.0], [0.0, 0.0, 150.0, 200.0]]), rtol=0, atol=0
    )
    torch.testing.assert_close(moved.scores, found.scores)
    torch.testing.assert_close(moved.labels, found.labels)


def test_from_a_canvas_both_axes_go_by_the_one_scale() -> None:
    """427 x 640 on 768 x 1280: at 1280 / 640 it would be 854 high, so it is at 768 / 427: 1151.1 wide, 1151 pixels."""
    found = Detections(
        boxes_xyxy=torch.tensor([[100.0, 100.0, 1150.0, 768.0]], dtype=torch.float64),
        scores=torch.tensor([0.9]),
        labels=torch.tensor([1]),
    )
    moved = to_original(found, pictures(Size(768, 1151), Size(427, 640), 768 / 427), 0)
    # 100 * 427 / 768 = 55.599; 1150 * 427 / 768 = 639.388, which by the ratio 640 / 1151 of the sides were 639.444.
    expected = torch.tensor([[55.598958, 55.598958, 639.388021, 427.0]], dtype=torch.float64)
    torch.testing.assert_close(moved.boxes_xyxy, expected, rtol=0, atol=1e-6)


def test_to_original_of_nothing() -> None:
    nothing = Detections(
        boxes_xyxy=torch.zeros(0, 4, dtype=torch.float64),
        scores=torch.zeros(0),
        labels=torch.zeros(0, dtype=torch.int64),
    )
    moved = to_original(nothing, pictures(Size(1, 1), Size(2, 2)), 0)
    assert moved.boxes_xyxy.shape == (0, 4)
    assert moved.boxes_xyxy.dtype == torch.float64


def test_predict_all_equals_the_detector_by_hand() -> None:
    torch.manual_seed(1)
    detector = FakeDetector(dropout=0.5).train()
    table = predict_all(
        detector, FakeLoader(5, batch_size=2, shuffle=False), accelerator=build_accelerator(device="cpu")
    )
    assert table.image_ids.tolist() == [100, 100, 101, 101, 102, 102, 103, 103, 104, 104]
    # Picture 3 is 7 wide and 8 high in the batch, 21 wide and 16 high originally: boxes are fractions of that.
    colour = FakeLoader(5).pixels[3].flatten() / 255
    limits = torch.tensor([21.0, 16.0, 21.0, 16.0])
    fractions = (detector.box.weight @ colour + detector.box.bias).detach()
    expected = (fractions * limits).clamp(min=0).minimum(limits)
    np.testing.assert_allclose(table.boxes_xyxy[6], expected.double(), rtol=1e-5)
    assert table.scores[6] > table.scores[7]
    assert detector.training
    assert detector.dropout.training


def test_order_of_the_loader_and_size_of_batches_do_not_matter() -> None:
    detector = FakeDetector()
    accelerator = build_accelerator(device="cpu")
    one = predict_all(detector, FakeLoader(7, batch_size=1, shuffle=False), accelerator=accelerator)
    other = predict_all(detector, FakeLoader(7, batch_size=3), accelerator=accelerator)
    np.testing.assert_array_equal(one.image_ids, other.image_ids)
    np.testing.assert_allclose(one.boxes_xyxy, other.boxes_xyxy, rtol=1e-6)
    np.testing.assert_allclose(one.scores, other.scores, rtol=1e-6)


def test_progress_and_no_pictures() -> None:
    counts: list[int] = []
    accelerator = build_accelerator(device="cpu")
    predict_all(FakeDetector(), FakeLoader(5, batch_size=2), accelerator=accelerator, on_batch=counts.append)
    assert counts == [2, 2, 1]
    assert len(predict_all(FakeDetector(), FakeLoader(0), accelerator=accelerator)) == 0


def test_pictures_without_ids_are_refused() -> None:
    images, targets = FakeLoader(2).batch([0, 1])
    nameless = ImageBatch(pixels=images.pixels, sizes=images.sizes, original_sizes=images.original_sizes)
    with pytest.raises(DataError, match="0 image ids for 2 pictures"):
        predict_all(FakeDetector(), [(nameless, targets)], accelerator=build_accelerator(device="cpu"))


def test_evaluation_mode_restores_every_part_even_after_an_error() -> None:
    detector = FakeDetector()
    detector.dropout.eval()
    with pytest.raises(KeyError), evaluation_mode(detector):
        assert not any(part.training for part in detector.modules())
        raise KeyError
    assert detector.training
    assert not detector.dropout.training


def table(*rows: tuple[int, float]) -> DetectionTable:
    ids, scores = np.array([row[0] for row in rows], np.int64), np.array([row[1] for row in rows])
    return DetectionTable(
        image_ids=ids, boxes_xyxy=np.repeat(scores[:, None], 4, 1), scores=scores, labels=np.zeros(len(rows), np.int64)
    )


def test_merge_takes_a_picture_from_the_first_that_has_it() -> None:
    merged = merge([table((3, 0.9), (3, 0.5), (1, 0.4)), table((2, 0.8), (3, 0.9), (3, 0.5))])
    assert merged.image_ids.tolist() == [1, 2, 3, 3]
    assert merged.scores.tolist() == [0.4, 0.8, 0.9, 0.5]
    assert merged.boxes_xyxy[:, 0].tolist() == [0.4, 0.8, 0.9, 0.5]


class Proposer:
    """The boxes that the fake detector predicts, as proposals."""

    def __init__(self, detector: FakeDetector) -> None:
        self.detector = detector

    def __call__(self, images: ImageBatch) -> list[Proposals]:
        assert not self.detector.training
        assert not torch.is_grad_enabled()
        found = self.detector.predict(images)
        return [Proposals(boxes_xyxy=one.boxes_xyxy, scores=one.scores) for one in found]


@pytest.mark.parametrize("round", [1, 3, 64])
def test_proposals_are_the_predicted_boxes_in_the_order_of_the_loader(round: int) -> None:
    torch.manual_seed(1)
    detector, accelerator = FakeDetector(dropout=0.5).train(), build_accelerator(device="cpu")
    table = predict_all(detector, FakeLoader(5, batch_size=2, shuffle=False), accelerator=accelerator)
    received: list[tuple[int, Proposals]] = []
    counts: list[int] = []
    propose_all(
        detector,
        FakeLoader(5, batch_size=2, shuffle=False),
        propose=Proposer(detector),
        receive=lambda image_id, found: received.append((image_id, found)),
        accelerator=accelerator,
        on_batch=counts.append,
        pictures_per_round=round,
    )
    assert [image_id for image_id, _ in received] == [100, 101, 102, 103, 104]
    assert counts == [2, 2, 1]
    boxes = torch.cat([found.boxes_xyxy for _, found in received])
    np.testing.assert_allclose(boxes.double().numpy(), table.boxes_xyxy)
    assert detector.training
    assert torch.is_grad_enabled()


def test_several_processes_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three shares of seven pictures, as a gathering gives them: 0 3 6, 1 4, 2 5; then nothing from anybody."""
    from rcnn.engine import evaluate

    nothing = Proposals(boxes_xyxy=torch.zeros(0, 4), scores=None)
    rounds = [[[(0, nothing), (3, nothing)], [(1, nothing), (4, nothing)], [(2, nothing), (5, nothing)]]]
    rounds += [[[(6, nothing)], [], []], [[], [], []]]
    monkeypatch.setattr(evaluate, "gather_objects", lambda accelerator, own: rounds.pop(0))
    received: list[int] = []
    propose_all(
        FakeDetector(),
        FakeLoader(0),
        propose=lambda images: [],
        receive=lambda image_id, found: received.append(image_id),
        accelerator=SimpleNamespace(num_processes=3),  # type: ignore[arg-type]
    )
    assert received == [0, 1, 2, 3, 4, 5, 6]
    assert rounds == []
