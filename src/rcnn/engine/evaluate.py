"""A detector over a whole data set: detections or proposals of every picture, once each, in its original pixels.

The same table comes out whatever the number of processes and the size of the batches they share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from rcnn.detectors.interface import AbstractDetector
from rcnn.engine.processes import gather_objects
from rcnn.errors import DataError, Problem
from rcnn.evaluation.table import DetectionTable
from rcnn.records import Detections, ImageBatch, Proposals, Target

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")


def predict_all(
    detector: AbstractDetector,
    loader: Iterable[tuple[ImageBatch, Sequence[Target]]],
    *,
    accelerator: Accelerator,
    on_batch: Callable[[int], None] | None = None,
) -> DetectionTable:
    """Detections of all pictures, sorted by image id and best first within one; the same on every process.

    Each process gives its own share of the pictures through `loader`. A picture that several of them saw (samplers pad
    shares to one length) counts once. The detector predicts in evaluation mode and gets its mode back. `on_batch` is
    told the number of pictures of each batch.
    """
    found: dict[int, Detections] = {}
    # Not inference_mode: what a detector caches in it (anchors) could not be used by the next training step.
    with evaluation_mode(detector), torch.no_grad():
        for images, predictions in _results(detector.predict, loader, accelerator, on_batch):
            for index, detections in enumerate(predictions):
                original = to_original(detections, images, index)
                found[images.image_ids[index]] = original.to("cpu")
    return merge(gather_objects(accelerator, DetectionTable.from_detections(found.items())))


def propose_all(
    detector: nn.Module,
    loader: Iterable[tuple[ImageBatch, Sequence[Target]]],
    *,
    propose: Callable[[ImageBatch], list[Proposals]],
    receive: Callable[[int, Proposals], None],
    accelerator: Accelerator,
    on_batch: Callable[[int], None] | None = None,
    pictures_per_round: int = 64,
) -> None:
    """Proposals of all pictures, each given to `receive` with its image id, in original pixels and on the CPU.

    Processes exchange what they found after every `pictures_per_round` pictures, so that memory does not grow with the
    data set. `receive` is called on every process for every picture, in the order of the table where `loader` gives
    the shares of an `EachOnceBatchSampler`. `propose` is the detector's, or one made from its parts.
    """
    own: list[tuple[int, Proposals]] = []
    with evaluation_mode(detector), torch.no_grad():
        for images, proposals in _results(propose, loader, accelerator, on_batch):
            for index, found in enumerate(proposals):
                moved = boxes_to_original(found.boxes_xyxy, images, index)
                own.append((images.image_ids[index], replace(found, boxes_xyxy=moved).to("cpu")))
            if len(own) >= pictures_per_round:
                _exchange(own, receive, accelerator)
                own = []
    # Shares differ by a picture: whoever is ready goes on exchanging until nobody has anything left.
    while _exchange(own, receive, accelerator) and accelerator.num_processes > 1:
        own = []


def _exchange(
    own: list[tuple[int, Proposals]], receive: Callable[[int, Proposals], None], accelerator: Accelerator
) -> bool:
    """Whether any process had a picture. A share has every so many pictures of the table, so the shares take turns."""
    shares = gather_objects(accelerator, own)
    for place in range(max(map(len, shares))):
        for share in shares:
            if place < len(share):
                receive(*share[place])
    return any(shares)


def _results(
    verb: Callable[[ImageBatch], list[T]],
    loader: Iterable[tuple[ImageBatch, Sequence[Target]]],
    accelerator: Accelerator,
    on_batch: Callable[[int], None] | None,
) -> Iterator[tuple[ImageBatch, list[T]]]:
    """Each batch with what the verb of a detector makes of it."""
    for images, _ in loader:
        if len(images.image_ids) != len(images):
            given = f"{len(images.image_ids)} image ids for {len(images)} pictures"
            raise DataError(Problem(where="evaluation loader", given=given, allowed="one unique id per picture"))
        with accelerator.autocast():
            results = verb(images.to(accelerator.device, non_blocking=True))
        yield images, results
        if on_batch:
            on_batch(len(images))


def to_original(detections: Detections, batch: ImageBatch, picture: int) -> Detections:
    """Moves boxes from the resized picture to the original one and clips them: each axis by the ratio of its sides, or
    both by the one scale that fitted the picture into its canvas."""
    inside = boxes_to_original(detections.boxes_xyxy, batch, picture)
    return Detections(boxes_xyxy=inside, scores=detections.scores, labels=detections.labels)


def boxes_to_original(boxes_xyxy: Tensor, batch: ImageBatch, picture: int) -> Tensor:
    """`to_original` for boxes alone."""
    original, ratios = batch.original_sizes[picture], batch.ratio_xy(picture)
    scaled = boxes_xyxy * boxes_xyxy.new_tensor([*ratios, *ratios])
    limits = boxes_xyxy.new_tensor([original.width, original.height] * 2)
    return scaled.clamp(min=0).minimum(limits)


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """`module.eval()` inside; afterwards every part is as it was (a frozen part in a training module stays frozen)."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def merge(tables: Sequence[DetectionTable]) -> DetectionTable:
    """One table sorted by image id, the order within a picture kept; one in several tables counts in the first."""
    taken = np.zeros(0, np.int64)
    rows = []
    for table in tables:
        rows.append(~np.isin(table.image_ids, taken))
        taken = np.union1d(taken, table.image_ids)

    def column(name: str) -> np.ndarray:
        return np.concatenate([getattr(table, name)[kept] for table, kept in zip(tables, rows, strict=True)])

    image_ids = column("image_ids")
    order = np.argsort(image_ids, kind="stable")
    return DetectionTable(
        image_ids=image_ids[order],
        boxes_xyxy=column("boxes_xyxy")[order],
        scores=column("scores")[order],
        labels=column("labels")[order],
    )
