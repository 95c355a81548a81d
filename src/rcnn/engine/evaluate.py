"""A detector over a whole data set: detections of every picture, once each, in its original pixels.

The same table comes out whatever the number of processes and the size of the batches they share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from rcnn.detectors.interface import AbstractDetector
from rcnn.errors import DataError, Problem
from rcnn.evaluation.table import DetectionTable
from rcnn.records import Detections, ImageBatch, Size, Target

if TYPE_CHECKING:
    from accelerate import Accelerator


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
        for images, _ in loader:
            found.update(_predict_batch(detector, images, accelerator))
            if on_batch:
                on_batch(len(images))
    return merge(_gather(DetectionTable.from_detections(found.items()), accelerator))


def _predict_batch(
    detector: AbstractDetector, images: ImageBatch, accelerator: Accelerator
) -> Iterator[tuple[int, Detections]]:
    if len(images.image_ids) != len(images):
        given = f"{len(images.image_ids)} image ids for {len(images)} pictures"
        raise DataError(Problem(where="evaluation loader", given=given, allowed="one unique id per picture"))
    with accelerator.autocast():
        predictions = detector.predict(images.to(accelerator.device, non_blocking=True))
    for index, detections in enumerate(predictions):
        original = to_original(detections, size=images.sizes[index], original_size=images.original_sizes[index])
        yield images.image_ids[index], original.to("cpu")


def to_original(detections: Detections, *, size: Size, original_size: Size) -> Detections:
    """Moves boxes from the resized picture (`size`) to the original one, each axis by its own ratio, and clips them."""
    x_ratio, y_ratio = original_size.width / size.width, original_size.height / size.height
    boxes = detections.boxes_xyxy
    scaled = boxes * boxes.new_tensor([x_ratio, y_ratio, x_ratio, y_ratio])
    limits = boxes.new_tensor([original_size.width, original_size.height] * 2)
    inside = scaled.clamp(min=0).minimum(limits)
    return Detections(boxes_xyxy=inside, scores=detections.scores, labels=detections.labels)


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


def _gather(table: DetectionTable, accelerator: Accelerator) -> list[DetectionTable]:
    """What the processes found, by rank."""
    if accelerator.num_processes == 1:
        return [table]
    tables = [table] * accelerator.num_processes
    torch.distributed.all_gather_object(tables, table)
    return tables


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
