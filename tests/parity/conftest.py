from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# Huge pages for large tensors, as the command has them: the system then takes half the time for its part.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
sys.path.insert(0, str(Path(__file__).parent))
from oracle import Oracle
from recorded import MapMemory


@pytest.fixture(scope="session")
def oracle(shared: Path) -> Callable[[str], Oracle]:
    """The recorded case `system/name`."""
    return lambda name: Oracle(shared / "oracles" / name)


@pytest.fixture(scope="session")
def memory() -> MapMemory:
    """The maps of the last trunk, for the next case that has the same."""
    return MapMemory()
