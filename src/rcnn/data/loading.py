"""From the annotation table to batches: the data set, and the loaders of training and evaluation."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rcnn.data.image import read_image
from rcnn.data.proposals import StoredProposals, TableProposals
from rcnn.data.sampling import (
    AspectRatioGroupedBatchSampler,
    EachOnceBatchSampler,
    SampleKey,
    aspect_ratio_groups,
)
from rcnn.data.table import AnnotationTable
from rcnn.errors import DataError, ImageError, RcnnError
from rcnn.records import ImageBatch, Proposals, Target
from rcnn.transforms.batching import Divisor, Sample, collate
from rcnn.transforms.geometry import image_size


class Transform(Protocol):
    """What a picture and its truth go through together; every random choice is drawn from the generator."""

    def __call__(self, image: Tensor, target: Target, generator: torch.Generator) -> tuple[Tensor, Target]: ...


class DetectionDataset(Dataset[Sample]):
    """The pictures of a table with their truth, and the proposals that a file gives for them, after the transform.

    An item is asked for by its index or by a `SampleKey`, whose seed decides the random choices (for a plain index
    they are drawn from torch's global generator). Raises `ImageError` for a picture that cannot be read and
    `DataError` for one that has another size than its annotations say, and for proposals that do not lie in it.
    """

    def __init__(
        self, table: AnnotationTable, transform: Transform, *, proposals: TableProposals | None = None
    ) -> None:
        self.table = table
        self.transform = transform
        self.proposals = proposals

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, key: int | SampleKey) -> Sample:
        index, seed = key if isinstance(key, SampleKey) else (key, int(torch.randint(2**62, ())))
        image = read_image(self.table.path(index))
        size = image_size(image)
        self.table.check_size(index, size)
        target = self.target(index)
        if self.proposals is not None:
            target = replace(target, proposals=_as_tensors(self.proposals[index]))
        image, target = self.transform(image, target, torch.Generator().manual_seed(seed))
        return Sample(image=image, target=target, original_size=size, image_id=int(self.table.image_ids[index]))

    def target(self, index: int) -> Target:
        """The truth about a picture in its own pixels, inside the picture (sources round, see `ROUNDING_PX`)."""
        rows = self.table.rows(index)
        size = self.table.size(index)
        boxes = torch.from_numpy(self.table.boxes_xyxy[rows]).float()
        limits = boxes.new_tensor([size.width, size.height, size.width, size.height])
        boxes = torch.minimum(boxes.clamp(min=0), limits)
        ignored = torch.from_numpy(self.table.ignored[rows])
        labels = torch.from_numpy(self.table.labels[rows])
        return Target(boxes_xyxy=boxes[~ignored], labels=labels[~ignored], ignore_xyxy=boxes[ignored])


def _as_tensors(stored: StoredProposals) -> Proposals:
    """Copies, in memory of their own: what was read from a file cannot be written to."""
    scores = None if stored.scores is None else torch.from_numpy(stored.scores.copy())
    return Proposals(boxes_xyxy=torch.from_numpy(stored.boxes_xyxy.copy()), scores=scores)


@dataclass(frozen=True, kw_only=True)
class _Guarded:
    """The data set for worker processes: an error is handed over as it is, not as a text with a worker's traceback."""

    dataset: DetectionDataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: SampleKey) -> Sample | RcnnError:
        try:
            return self.dataset[key]
        except RcnnError as error:
            return error


@dataclass(frozen=True, kw_only=True)
class _Collate:
    divisor: Divisor

    def __call__(self, samples: Sequence[Sample | RcnnError]) -> tuple[ImageBatch, list[Target]] | RcnnError:
        errors = [sample for sample in samples if isinstance(sample, RcnnError)]
        if errors:
            kind = ImageError if all(isinstance(error, ImageError) for error in errors) else DataError
            return kind(problem for error in errors for problem in error.problems)
        return collate([sample for sample in samples if isinstance(sample, Sample)], divisor=self.divisor)


def _leave_process_group(worker: int) -> None:
    """Ctrl-C and `kill` of the whole group are meant for the trainer, which needs them to end its step."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)


class BatchLoader:
    """Batches with their truth, `(ImageBatch, list[Target])`, made by worker processes (or this one, with none).

    An error inside a worker is raised here as it is.
    """

    def __init__(
        self,
        dataset: DetectionDataset,
        batches: AspectRatioGroupedBatchSampler | EachOnceBatchSampler,
        *,
        divisor: Divisor,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.dataset = dataset
        self.batches = batches
        self._loader: DataLoader[Any] = DataLoader(
            _Guarded(dataset=dataset),  # pyright: ignore[reportArgumentType]
            batch_sampler=batches,  # pyright: ignore[reportArgumentType]
            collate_fn=_Collate(divisor=divisor),
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=pin_memory,
            worker_init_fn=_leave_process_group,
            # torch draws a seed for its workers, which nothing here uses: not from the generator of the training, whose
            # numbers would otherwise depend on how often an epoch was begun.
            generator=torch.Generator(),
            # A forked worker shares the table's pages with this process.
            multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
        )

    def __len__(self) -> int:
        return len(self.batches)

    def set_epoch(self, epoch: int, *, skip_batches: int = 0) -> None:
        """Choose the order of an epoch of training; `skip_batches` goes on inside it. Evaluation has one order."""
        if isinstance(self.batches, AspectRatioGroupedBatchSampler):
            self.batches.set_epoch(epoch, skip_batches=skip_batches)

    def __iter__(self) -> Iterator[tuple[ImageBatch, list[Target]]]:
        with warnings.catch_warnings():
            # Python warns of any fork beside threads; workers only use what is safe after it (one thread, no device).
            warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
            batches = iter(self._loader)
        for batch in batches:
            if isinstance(batch, RcnnError):
                raise batch
            yield batch


def build_train_loader(
    table: AnnotationTable,
    transform: Transform,
    *,
    batch_size: int,
    divisor: Divisor = 32,
    aspect_ratio_factor: int = 3,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
    proposals: TableProposals | None = None,
) -> BatchLoader:
    """Shuffled batches of `batch_size` pictures for this process; call `set_epoch` before each epoch."""
    groups = aspect_ratio_groups(table.sizes, factor=aspect_ratio_factor)
    batches = AspectRatioGroupedBatchSampler(groups, batch_size=batch_size, seed=seed, rank=rank, world_size=world_size)
    dataset = DetectionDataset(table, transform, proposals=proposals)
    return BatchLoader(dataset, batches, divisor=divisor, num_workers=num_workers, pin_memory=pin_memory)


def build_eval_loader(
    table: AnnotationTable,
    transform: Transform,
    *,
    batch_size: int = 1,
    divisor: Divisor = 32,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
    proposals: TableProposals | None = None,
) -> BatchLoader:
    """Every picture of the table once over all processes, in order."""
    batches = EachOnceBatchSampler(len(table), batch_size=batch_size, rank=rank, world_size=world_size)
    dataset = DetectionDataset(table, transform, proposals=proposals)
    return BatchLoader(dataset, batches, divisor=divisor, num_workers=num_workers, pin_memory=pin_memory)
