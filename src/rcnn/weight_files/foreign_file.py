"""What a file of weights of another system holds, once it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ForeignFile:
    """A file of another system, read without running anything in it.

    `tensors` are named and laid out as in the file, on the CPU. `meta` holds the plain values (texts, numbers, lists,
    mappings) beside them, by their names at the top of the file: MMDetection's `meta`, detectron2's `__author__` and
    `matching_heuristics`; `_metadata` has what torch notes of each module (its version). `notes` are what was done to
    the names, a sentence each.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    meta: Mapping[str, object] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
