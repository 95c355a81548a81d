"""The code of docs/how-to-write-a-head.md runs as it stands: its head keeps the contract and is a first stage."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from rcnn.boxes.geometry import iou

PAGE = Path(__file__).parents[1] / "docs" / "how-to-write-a-head.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
NAME = "how_to_write_a_head"


@pytest.fixture(scope="module")
def written() -> Iterator[dict[str, Any]]:
    """What the page's code leaves, its blocks run one after the other. The second is the contract itself."""
    module = ModuleType(NAME)
    sys.modules[NAME] = module
    torch.manual_seed(0)
    for number, block in enumerate(BLOCKS):
        exec(compile(block, f"{PAGE.name}, block {number + 1}", "exec"), module.__dict__)
    yield module.__dict__
    del sys.modules[NAME]


def test_the_head_takes_about_a_hundred_lines() -> None:
    head = [line for line in BLOCKS[0].splitlines() if line.strip()]
    assert [line for line in head if line.startswith("class ")] == ["class FoveaHead(AbstractDenseHead):"]
    assert len(head) <= 105


def test_the_contract_is_run_on_it() -> None:
    assert "assert_is_dense_head(make_head" in BLOCKS[1]


def test_it_trains_as_a_first_stage(written: dict[str, Any]) -> None:
    history = written["history"]
    assert set(history[0]) == {"rpn_classification", "rpn_box", "roi_classification", "roi_box"}
    assert all(math.isfinite(loss) for losses in history for loss in losses.values())
    for name in ("rpn_classification", "rpn_box"):
        before, after = (sum(losses[name] for losses in some) / 5 for some in (history[:5], history[-5:]))
        assert after < 0.8 * before, name


def test_its_proposals_find_the_boxes_it_was_shown(written: dict[str, Any]) -> None:
    truth, found = written["target"].boxes_xyxy, written["proposals"].boxes_xyxy
    assert 0 < len(found) <= 100
    assert len(truth) > 0
    best = iou(truth, found).amax(dim=1)
    assert (best > 0.5).float().mean() >= 0.5
