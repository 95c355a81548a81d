from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from oracle import Oracle


@pytest.fixture(scope="session")
def oracle(shared: Path) -> Callable[[str], Oracle]:
    """The recorded case `system/name`."""
    return lambda name: Oracle(shared / "oracles" / name)
