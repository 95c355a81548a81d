"""What every detector owes to those who train it and predict with it, as a check that can be run on any of them."""

from __future__ import annotations

import copy

import torch

from rcnn.detectors.interface import AbstractDetector
from rcnn.records import Detections, ImageBatch, Size, Target

# Two pictures, the second smaller than the batch.
_SIZES = (Size(height=64, width=64), Size(height=40, width=56))
_MANY = ((4.0, 6.0, 40.0, 50.0), (10.0, 10.0, 20.0, 34.0), (30.0, 2.0, 62.0, 30.0), (0.0, 0.0, 64.0, 64.0))
_ONE = ((8.0, 8.0, 48.0, 36.0),)
_IGNORE = ((0.0, 0.0, 64.0, 64.0),)
Boxes = tuple[tuple[float, float, float, float], ...]
# Ground truth and ignore regions of the two pictures.
_TRUTHS: dict[str, tuple[tuple[Boxes, Boxes], tuple[Boxes, Boxes]]] = {
    "many boxes and one": ((_MANY, ()), (_ONE, ())),
    "one box and none": ((_ONE, ()), ((), ())),
    "no boxes": (((), ()), ((), ())),
    "nothing but ignore regions": (((), _IGNORE), ((), _IGNORE)),
}


def assert_is_detector(detector: AbstractDetector, *, num_classes: int) -> None:
    """Raise AssertionError unless the detector keeps the contract of `AbstractDetector`, in float32 and float64.

    Losses are finite scalars and every parameter that asks for a gradient gets a finite one, with many boxes, one or
    none; detections lie inside their pictures, best first, and are of the same kind in training and evaluation mode.
    The detector itself is left as it was: copies are worked on. It must take pictures of 64 x 64 pixels.
    """
    for dtype in (torch.float32, torch.float64):
        working = copy.deepcopy(detector).to(dtype)
        for training in (True, False):
            _assert_predicts(working.train(training), num_classes)
        for name, truth in list(_TRUTHS.items())[: None if dtype == torch.float32 else 2]:
            _assert_trains(working.train(), [_target(boxes, ignore, num_classes) for boxes, ignore in truth], name)


def _batch() -> ImageBatch:
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageBatch(pixels=pixels, sizes=_SIZES, original_sizes=_SIZES, image_ids=(0, 1))


def _target(boxes: Boxes, ignore: Boxes, num_classes: int) -> Target:
    return Target(
        boxes_xyxy=torch.tensor(boxes).reshape(-1, 4),
        labels=torch.arange(len(boxes)) % num_classes,
        ignore_xyxy=torch.tensor(ignore).reshape(-1, 4),
    )


def _assert_trains(detector: AbstractDetector, targets: list[Target], case: str) -> None:
    detector.zero_grad()
    losses = detector.loss(_batch(), targets)
    assert losses, f"{case}: no loss"
    for name, loss in losses.items():
        assert loss.ndim == 0, f"{case}: {name} has shape {tuple(loss.shape)}, not that of a scalar"
        assert bool(loss.isfinite()), f"{case}: {name} is {loss.item()}"
    torch.stack(list(losses.values())).sum().backward()
    gradients = {name: parameter.grad for name, parameter in detector.named_parameters() if parameter.requires_grad}
    without = [name for name, gradient in gradients.items() if gradient is None]
    assert not without, f"{case}: no gradient for {without}"
    spoilt = [name for name, gradient in gradients.items() if gradient is not None and not gradient.isfinite().all()]
    assert not spoilt, f"{case}: gradients that are not finite, of {spoilt}"


@torch.no_grad()
def _assert_predicts(detector: AbstractDetector, num_classes: int) -> None:
    found = detector.predict(_batch())
    assert isinstance(found, list), f"predict gives {type(found)}"
    assert len(found) == len(_SIZES), f"predict gives {len(found)} results for {len(_SIZES)} pictures"
    for detections, size in zip(found, _SIZES, strict=True):
        assert isinstance(detections, Detections), f"predict gives {type(detections)} for a picture"
        _assert_lies_inside(detections, size)
        scores, labels = detections.scores, detections.labels
        assert bool(((scores >= 0) & (scores <= 1)).all()), "scores are no probabilities"
        assert bool((scores[:-1] >= scores[1:]).all()), "detections are not best first"
        assert labels.dtype == torch.int64, f"labels are {labels.dtype}"
        assert bool(((labels >= 0) & (labels < num_classes)).all()), f"labels beyond 0..{num_classes - 1}"


def _assert_lies_inside(detections: Detections, size: Size) -> None:
    x1, y1, x2, y2 = detections.boxes_xyxy.unbind(-1)
    ordered = (x1 >= 0) & (y1 >= 0) & (x1 <= x2) & (y1 <= y2)
    inside = (x2 <= size.width) & (y2 <= size.height)
    assert bool((ordered & inside).all()), f"boxes reach over the edge of a picture of {size}"
    assert len({len(detections.boxes_xyxy), len(detections.scores), len(detections.labels)}) == 1
