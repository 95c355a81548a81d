"""Deltas worked by hand, and what limits them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rcnn.boxes.coding import MAX_LOG_RATIO, DeltaCoder, DistanceCoder
from rcnn.boxes.geometry import clip
from rcnn.records import Size

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


def test_distances_by_hand() -> None:
    # From (12, 30) to the sides of 10..30 x 20..60: 2 left, 10 up, 18 right, 30 down.
    point, distances = torch.tensor([[12.0, 30.0]]).double(), torch.tensor([[2.0, 10.0, 18.0, 30.0]]).double()
    assert DistanceCoder().encode(REFERENCE, point).tolist() == distances.tolist()
    assert DistanceCoder().decode(distances, point).tolist() == REFERENCE.tolist()
    # A point left of the box.
    assert DistanceCoder().encode(REFERENCE, torch.tensor([[4.0, 30.0]]).double()).tolist() == [[-6, 10, 26, 30]]


def test_distances_of_leading_dimensions_and_of_nothing() -> None:
    points = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert DistanceCoder().decode(torch.ones(5, 2, 4), points).shape == (5, 2, 4)
    assert DistanceCoder().encode(torch.zeros(0, 4), torch.zeros(0, 2)).shape == (0, 4)


def test_distances_as_mmdetection(shared: Path) -> None:
    with np.load(shared / "oracles" / "mmdetection" / "maths" / "arrays.npz") as arrays:
        recorded = {
            name: torch.from_numpy(arrays[name]) for name in arrays.files if name.startswith(("point/", "coder"))
        }
    coder, points = DistanceCoder(), recorded["point/points"]
    boxes = coder.decode(recorded["point/ltrb"], points)
    # Recorded in float32.
    torch.testing.assert_close(boxes.float(), recorded["point/decode"], rtol=1e-6, atol=1e-4)
    clipped = clip(boxes, Size(height=250, width=280)).float()
    torch.testing.assert_close(clipped, recorded["point/decode_clip_h250_w280"], rtol=1e-6, atol=1e-4)
    encoded = coder.encode(recorded["coder/gt"], points).float()
    torch.testing.assert_close(encoded, recorded["point/encode"], rtol=1e-6, atol=1e-4)
