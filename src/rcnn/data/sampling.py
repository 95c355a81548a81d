"""Which pictures make up which batch, on every process, decided by seed and epoch alone.

Letters: N images.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Sampler


class SampleKey(NamedTuple):
    """A picture of the data set and the seed of its random choices, which therefore do not depend on the workers."""

    image: int  # its index in the table
    seed: int


def aspect_ratio_groups(sizes: np.ndarray, *, factor: int) -> np.ndarray:
    """The group of each picture [N] by its ratio of width to height, for sizes [N, 2] (height, width).

    `factor` bins an octave on both sides of the square: edges 2 ** linspace(-1, 1, 2 * factor + 1), as torchvision's
    training references (their factor is 3). Factor 0 makes one group.
    """
    if factor == 0:
        return np.zeros(len(sizes), np.int64)
    ratios = sizes[:, 1] / sizes[:, 0]
    edges = 2 ** np.linspace(-1, 1, 2 * factor + 1)
    return np.searchsorted(edges, ratios, side="right")


class AspectRatioGroupedBatchSampler(Sampler[list[SampleKey]]):
    """Batches of pictures of like shape, in a new order each epoch; every process gets the same number of batches.

    The order is that of torchvision's `GroupedBatchSampler` over a `DistributedSampler`: the shuffled pictures are
    dealt to the processes (some twice, so that all get as many), a batch is given out as soon as its group is full,
    and the last batches are made of what is left, filled with pictures of their group that were already used.
    """

    def __init__(
        self, groups: Sequence[int] | np.ndarray, *, batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        self.groups = np.asarray(groups, np.int64)
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.skipped_batches = 0

    def set_epoch(self, epoch: int, *, skip_batches: int = 0) -> None:
        """Choose the order; `skip_batches` leaves out the first ones, to go on inside an interrupted epoch."""
        self.epoch = epoch
        self.skipped_batches = skip_batches

    @property
    def num_batches(self) -> int:
        """Batches of a whole epoch on each process."""
        per_process = math.ceil(len(self.groups) / self.world_size)
        return max(per_process // self.batch_size, 1)

    def __len__(self) -> int:
        return max(self.num_batches - self.skipped_batches, 0)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        own = self._own_pictures()
        batches = self._batches(own)
        base = torch.Generator().manual_seed(_mix(self.seed, self.epoch, self.rank + 1))
        seeds = torch.randint(2**62, (self.num_batches, self.batch_size), generator=base).tolist()
        keys = [
            [SampleKey(index, seed) for index, seed in zip(batch, row, strict=True)]
            for batch, row in zip(batches, seeds, strict=True)
        ]
        yield from keys[self.skipped_batches :]

    def _own_pictures(self) -> list[int]:
        order = torch.randperm(
            len(self.groups), generator=torch.Generator().manual_seed(_mix(self.seed, self.epoch, 0))
        )
        total = math.ceil(len(order) / self.world_size) * self.world_size
        repeated = order.repeat(math.ceil(total / len(order)))[:total]
        return repeated[self.rank :: self.world_size].tolist()

    def _batches(self, pictures: list[int]) -> list[list[int]]:
        open_batches: dict[int, list[int]] = defaultdict(list)
        used: dict[int, list[int]] = defaultdict(list)
        batches = []
        for index in pictures:
            group = int(self.groups[index])
            open_batches[group].append(index)
            used[group].append(index)
            if len(open_batches[group]) == self.batch_size:
                batches.append(open_batches.pop(group))
        for group, batch in sorted(open_batches.items(), key=lambda item: len(item[1]), reverse=True):
            repeats = math.ceil(self.batch_size / len(used[group]))
            batches.append((batch + used[group] * repeats)[: self.batch_size])
        return batches[: self.num_batches]


class EachOnceBatchSampler(Sampler[list[SampleKey]]):
    """Every picture once over all processes, in order, without padding; shares differ by one at most."""

    def __init__(self, num_images: int, *, batch_size: int = 1, rank: int = 0, world_size: int = 1) -> None:
        self.indices = range(rank, num_images, world_size)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.indices) / self.batch_size)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for start in range(0, len(self.indices), self.batch_size):
            yield [SampleKey(index, index) for index in self.indices[start : start + self.batch_size]]


def _mix(seed: int, epoch: int, stream: int) -> int:
    """One seed for a seed, an epoch and a purpose; neighbouring inputs give unrelated orders."""
    state = np.random.SeedSequence([seed, epoch, stream]).generate_state(2, np.uint32)
    return (int(state[0]) << 31) ^ int(state[1])
