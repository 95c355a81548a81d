"""Which references take part in a loss."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rcnn.matching.iou import Matches
from rcnn.matching.sampling import BalancedSampler, EverySampler, HardExampleSampler


def matches(num_positive: int, num_negative: int, num_neither: int = 3) -> Matches:
    total = num_positive + num_negative + num_neither
    index = torch.arange(total)
    return Matches(
        gt_index=torch.zeros(total, dtype=torch.int64),
        positive=index < num_positive,
        negative=(index >= num_positive) & (index < num_positive + num_negative),
    )


@pytest.mark.parametrize(
    ("num_positive", "num_negative", "expected"),
    [
        (100, 1000, (64, 192)),  # a quarter of 256, the rest negative
        (10, 1000, (10, 246)),  # few positives: their places go to negatives
        (100, 50, (64, 50)),  # few negatives: their places stay empty
        (0, 1000, (0, 256)),
        (5, 0, (5, 0)),
        (0, 0, (0, 0)),
    ],
)
def test_counts(num_positive: int, num_negative: int, expected: tuple[int, int]) -> None:
    sample = BalancedSampler(total=256, positive_fraction=0.25)(matches(num_positive, num_negative))
    assert (len(sample.positive), len(sample.negative)) == expected


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 30), st.floats(0, 1))
def test_a_sample_is_drawn_from_its_own_kind_without_repeats(
    num_positive: int, num_negative: int, total: int, fraction: float
) -> None:
    given_matches = matches(num_positive, num_negative)
    sample = BalancedSampler(total=total, positive_fraction=fraction)(given_matches)
    assert given_matches.positive[sample.positive].all()
    assert given_matches.negative[sample.negative].all()
    drawn = torch.cat((sample.positive, sample.negative)).tolist()
    assert len(set(drawn)) == len(drawn) <= total
    assert len(sample.positive) <= total * fraction


def test_the_draw_is_random_and_follows_the_seed() -> None:
    sampler = BalancedSampler(total=10, positive_fraction=0.5)

    def draw(seed: int) -> list[int]:
        torch.manual_seed(seed)
        return sampler(matches(50, 50)).positive.tolist()

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_an_injected_order() -> None:
    sampler = BalancedSampler(
        total=4, positive_fraction=0.5, order=lambda count, device: torch.arange(count).flip(0).to(device)
    )
    sample = sampler(matches(5, 5))
    # Positives 0..4 and negatives 5..9, from the last.
    assert sample.positive.tolist() == [4, 3]
    assert sample.negative.tolist() == [9, 8]


def test_every_sampler_leaves_out_neither() -> None:
    sample = EverySampler()(matches(2, 3, 4))
    assert sample.positive.tolist() == [0, 1]
    assert sample.negative.tolist() == [2, 3, 4]


def test_the_hardest_are_kept_within_the_quotas() -> None:
    sampler = HardExampleSampler(total=4, positive_fraction=0.5)
    # Positives 0 to 2, negatives 3 to 7, and one that is neither and the hardest of all.
    losses = torch.tensor([0.1, 0.9, 0.5, 0.2, 0.8, 0.3, 0.7, 0.0, 9.0])
    sample = sampler(matches(3, 5, 1), losses)
    assert sample.positive.tolist() == [1, 2]
    assert sample.negative.tolist() == [4, 6]


def test_places_that_positives_leave_go_to_negatives() -> None:
    sampler = HardExampleSampler(total=4, positive_fraction=0.5)
    sample = sampler(matches(1, 5, 0), torch.tensor([0.0, 0.5, 0.4, 0.3, 0.2, 0.1]))
    assert sample.positive.tolist() == [0]
    assert sample.negative.tolist() == [1, 2, 3]
    nothing = sampler(matches(0, 0, 0), torch.zeros(0))
    assert (len(nothing.positive), len(nothing.negative)) == (0, 0)
