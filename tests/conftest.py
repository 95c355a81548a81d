"""Fixtures of all tests. `shared` is the only way to the files beside the project."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with oracles, data and weights: $RCNN_SHARED, or `shared` beside the checkout."""
    folder = Path(os.environ.get("RCNN_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not folder.is_dir():
        pytest.skip(f"the shared folder is absent ({folder}); set RCNN_SHARED to where it is")
    return folder
