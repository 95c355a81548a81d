"""The proposal's score in the final one."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from rcnn.errors import SetupError
from rcnn.roi.fusion import fuse

SCORES = torch.tensor([[0.5, 0.25], [1.0, 0.0], [0.04, 0.16]])
# Of two pictures.
PROPOSALS = [torch.tensor([0.5, 0.25]), torch.tensor([1.0])]


def test_each_kind_by_hand() -> None:
    assert fuse(SCORES, PROPOSALS, "none") is SCORES
    assert_close(fuse(SCORES, PROPOSALS, "product"), torch.tensor([[0.25, 0.125], [0.25, 0.0], [0.04, 0.16]]))
    # The roots of these; of 1/8 it is 0.353553.
    assert_close(fuse(SCORES, PROPOSALS, "sqrt"), torch.tensor([[0.5, 0.353553], [0.5, 0.0], [0.2, 0.4]]))


@pytest.mark.parametrize("given", [[torch.ones(2), None], [None, None], []], ids=["some", "none", "nothing"])
def test_scores_that_are_not_there(given: list[torch.Tensor | None]) -> None:
    assert fuse(SCORES, given, "none") is SCORES
    with pytest.raises(SetupError, match=r"detector.roi.fusion: sqrt, and proposals without scores; allowed: none"):
        fuse(SCORES, given, "sqrt")
