"""Makes `fake_training` importable by the tests beside it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

SPEC = importlib.util.spec_from_file_location("fake_training", Path(__file__).with_name("fake_training.py"))
assert SPEC is not None and SPEC.loader is not None
if SPEC.name not in sys.modules:
    module = importlib.util.module_from_spec(SPEC)
    sys.modules[SPEC.name] = module
    SPEC.loader.exec_module(module)
