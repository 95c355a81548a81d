from __future__ import annotations

from collections import Counter
from itertools import chain

import numpy as np
import pytest

from rcnn.data.sampling import AspectRatioGroupedBatchSampler, EachOnceBatchSampler, aspect_ratio_groups


def images_of(sampler: AspectRatioGroupedBatchSampler | EachOnceBatchSampler) -> list[list[int]]:
    return [[key.image for key in batch] for batch in sampler]


def test_groups_by_hand() -> None:
    # factor 1: edges at 1/2, 1 and 2 (width over height); torchvision's bisect_right puts an edge into the upper bin
    sizes = np.array([[100, 49], [100, 50], [100, 99], [100, 100], [100, 199], [100, 200], [10, 90]])
    assert aspect_ratio_groups(sizes, factor=1).tolist() == [0, 1, 1, 2, 2, 3, 3]
    assert aspect_ratio_groups(sizes, factor=0).tolist() == [0] * 7
    # factor 3: edges at 2 ** (-1, -2/3, -1/3, 0, 1/3, 2/3, 1); 4:3 = 2 ** 0.415, 3:2 = 2 ** 0.585
    assert aspect_ratio_groups(np.array([[3, 4], [2, 3], [4, 3], [1, 1]]), factor=3).tolist() == [5, 5, 2, 4]


def test_batches_are_of_one_group_and_every_picture_is_used() -> None:
    groups = np.array([0] * 10 + [1] * 6)
    sampler = AspectRatioGroupedBatchSampler(groups, batch_size=2)
    batches = images_of(sampler)
    assert len(batches) == len(sampler) == 8
    assert all(len(batch) == 2 and len({int(groups[image]) for image in batch}) == 1 for batch in batches)
    assert sorted(chain(*batches)) == list(range(16))


@pytest.mark.parametrize(
    ("count", "batch_size", "num_groups"), [(17, 4, 3), (5, 2, 5), (3, 8, 2), (100, 7, 4), (1, 2, 1)]
)
def test_short_groups_are_filled_with_their_own(count: int, batch_size: int, num_groups: int) -> None:
    groups = np.arange(count) % num_groups
    sampler = AspectRatioGroupedBatchSampler(groups, batch_size=batch_size, seed=3)
    batches = images_of(sampler)
    assert len(batches) == len(sampler) == max(count // batch_size, 1)
    for batch in batches:
        assert len(batch) == batch_size
        assert len({int(groups[image]) for image in batch}) == 1


def test_epochs_and_seeds_give_other_orders_and_each_its_own_again() -> None:
    def order(seed: int, epoch: int) -> list:
        sampler = AspectRatioGroupedBatchSampler(np.zeros(50), batch_size=5, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 0) == order(0, 0)
    assert len({str(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1, 2)}) == 6
    seeds = [key.seed for epoch in range(3) for batch in order(0, epoch) for key in batch]
    assert len(set(seeds)) == 150


@pytest.mark.parametrize(("count", "world_size"), [(16, 2), (17, 4), (3, 8)])
def test_processes_share_the_pictures_and_get_as_many_batches(count: int, world_size: int) -> None:
    groups = np.arange(count) % 2
    samplers = [
        AspectRatioGroupedBatchSampler(groups, batch_size=1, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    batches = [images_of(sampler) for sampler in samplers]
    assert len({len(own) for own in batches}) == 1
    counts = Counter(chain(*chain(*batches)))
    assert set(counts) == set(range(count))
    # Dealt out evenly, with as few repeats as make the shares equal.
    assert sum(counts.values()) == -(-count // world_size) * world_size


def test_an_epoch_can_be_gone_on_with() -> None:
    sampler = AspectRatioGroupedBatchSampler(np.arange(40) % 3, batch_size=4, seed=5)
    sampler.set_epoch(2)
    whole = list(sampler)
    sampler.set_epoch(2, skip_batches=4)
    assert len(sampler) == len(whole) - 4
    assert list(sampler) == whole[4:]
    sampler.set_epoch(2)
    assert list(sampler) == whole


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_evaluation_sees_every_picture_once(world_size: int) -> None:
    samplers = [EachOnceBatchSampler(7, batch_size=2, rank=rank, world_size=world_size) for rank in range(world_size)]
    seen = list(chain(*chain(*map(images_of, samplers))))
    assert sorted(seen) == list(range(7))
    assert [len(images_of(sampler)) for sampler in samplers] == [len(sampler) for sampler in samplers]
