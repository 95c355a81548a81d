"""The random states of Python, NumPy and torch: set from a seed, taken, and put back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

# Tensors and plain values only, so that a file of it can be read without running a pickle.
RandomState = dict[str, Any]


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seeds all three generators (and those of every CUDA device); processes of one run draw different numbers."""
    value = (seed * 1_000_003 + rank) % 2**32
    random.seed(value)
    np.random.seed(value)  # noqa: NPY002 - the global generator is what foreign transforms draw from
    torch.manual_seed(value)


def capture_random_state() -> RandomState:
    """What `restore_random_state` needs to go on with the very next random number."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002
    state: RandomState = {
        "python": [version, torch.tensor(words, dtype=torch.int64), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys, np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: RandomState) -> None:
    """The inverse of `capture_random_state`, for the current process and its current CUDA device."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def random_state_kept() -> Iterator[None]:
    """What is drawn inside is not missing outside: afterwards the generators go on as if nothing had happened."""
    state = capture_random_state()
    try:
        yield
    finally:
        restore_random_state(state)
