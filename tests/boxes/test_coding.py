"""Deltas worked by hand, and what limits them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rcnn.boxes.coding import MAX_LOG_RATIO, DeltaCoder

REFERENCE = torch.tensor([[10.0, 20.0, 30.0, 60.0]], dtype=torch.float64)  # 20 x 40, centred at (20, 40)


def test_encode_by_hand() -> None:
    # 40 x 20, centred at (30, 30): moved by 10 of 20 and -10 of 40; twice as wide, half as high.
    box = torch.tensor([[10.0, 20.0, 50.0, 40.0]], dtype=torch.float64)
    expected = torch.tensor([[0.5, -0.25, math.log(2), -math.log(2)]], dtype=torch.float64)
    torch.testing.assert_close(DeltaCoder().encode(box, REFERENCE), expected)
    weighted = DeltaCoder(weights=(10.0, 10.0, 5.0, 5.0)).encode(box, REFERENCE)
    torch.testing.assert_close(weighted, expected * torch.tensor([10.0, 10.0, 5.0, 5.0]).double())


def test_no_delta_is_the_reference() -> None:
    torch.testing.assert_close(DeltaCoder().decode(torch.zeros(1, 4).double(), REFERENCE), REFERENCE)
    torch.testing.assert_close(DeltaCoder().encode(REFERENCE, REFERENCE), torch.zeros(1, 4).double())


@pytest.mark.parametrize(
    ("coder", "given_log", "used"),
    [
        (DeltaCoder(), 9.0, MAX_LOG_RATIO),
        (DeltaCoder(), -9.0, -9.0),
        (DeltaCoder(symmetric_clamp=True), -9.0, -MAX_LOG_RATIO),
        (DeltaCoder(max_log_ratio=None), 9.0, 9.0),
        (DeltaCoder(max_log_ratio=4.0), 9.0, 4.0),
    ],
)
def test_limits_of_the_size(coder: DeltaCoder, given_log: float, used: float) -> None:
    box = coder.decode(torch.tensor([[0, 0, given_log, given_log]], dtype=torch.float64), REFERENCE)[0]
    assert (box[2] - box[0]).item() == pytest.approx(20 * math.exp(used))
    assert (box[3] - box[1]).item() == pytest.approx(40 * math.exp(used))
    # Around the reference's centre.
    assert ((box[0] + box[2]) / 2).item() == pytest.approx(20)


def test_the_published_limit() -> None:
    # 1000 / 16 = 62.5, ln 62.5 = 4.135166556742356.
    assert pytest.approx(4.135166556742356, abs=1e-15) == MAX_LOG_RATIO


def test_nothing_to_code() -> None:
    empty = torch.zeros(0, 4)
    assert DeltaCoder().encode(empty, empty).shape == (0, 4)
    assert DeltaCoder().decode(empty, empty).shape == (0, 4)


def test_references_broadcast_over_classes() -> None:
    deltas = torch.randn(5, 3, 4, dtype=torch.float64)
    references = REFERENCE.expand(5, 4)
    together = DeltaCoder().decode(deltas, references[:, None])
    for column in range(3):
        torch.testing.assert_close(together[:, column], DeltaCoder().decode(deltas[:, column], references))


def test_numbers_that_are_none_stay_so() -> None:
    """A box that is not a number is left out by the filters, and never becomes one here."""
    decoded = DeltaCoder().decode(torch.full((1, 4), math.nan, dtype=torch.float64), REFERENCE)
    assert decoded.isnan().all()


@given(
    centre=st.tuples(st.floats(0, 1000), st.floats(0, 1000)),
    size=st.tuples(st.floats(1, 500), st.floats(1, 500)),
    reference_size=st.tuples(st.floats(8, 512), st.floats(8, 512)),
)
def test_decode_undoes_encode(
    centre: tuple[float, float], size: tuple[float, float], reference_size: tuple[float, float]
) -> None:
    def box(centre: tuple[float, float], size: tuple[float, float]) -> torch.Tensor:
        (x, y), (width, height) = centre, size
        return torch.tensor([[x - width / 2, y - height / 2, x + width / 2, y + height / 2]], dtype=torch.float64)

    coder = DeltaCoder(weights=(10.0, 10.0, 5.0, 5.0), max_log_ratio=None)
    truth, reference = box(centre, size), box((500.0, 400.0), reference_size)
    torch.testing.assert_close(coder.decode(coder.encode(truth, reference), reference), truth, rtol=1e-9, atol=1e-9)
