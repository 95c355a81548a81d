"""What a training starts from: a file or its address on the web, of ours or of another system.

Files of other systems are read by what the application gives (`ReadStart`): recipes stand below the converters.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rcnn.config.text import flatten
from rcnn.download import fetch_weights, is_url
from rcnn.engine.checkpoint import Checkpoint, read_weights
from rcnn.errors import CheckpointError, Problem
from rcnn.recipes.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class StartFile:
    """A checkpoint to start from. `recognised`: what a file of another system was taken for, a line for people."""

    path: Path
    checkpoint: Checkpoint
    recognised: str | None = None


ReadStart = Callable[[Path], StartFile]
"""Reads a file as a start. Raises `CheckpointError` for one that it cannot read."""


def read_own_start(path: Path) -> StartFile:
    """A checkpoint of ours. Raises `CheckpointError` for any other file."""
    return StartFile(path=path, checkpoint=read_weights(path))


def file_of_start(name: str, *, setting: str, say: Callable[[str], None]) -> Path:
    """The file that a setting names, fetched where it is an address. Raises `DownloadError`."""
    if not is_url(name):
        return Path(os.path.expanduser(name))
    return fetch_weights(name, otherwise=f"name a file: {setting}=FILE", say=say)


def read_start(name: str, path: Path, *, setting: str, read: ReadStart) -> StartFile:
    """The file of that name or address as a start. Raises `CheckpointError` that says which setting names it, and what
    may be done."""
    try:
        return read(path)
    except CheckpointError as error:
        remedy = "what it cannot tell, say to rcnn convert FILE -o OUT.safetensors, and start from OUT; null: none"
        problem = Problem(
            where=setting,
            given=name,
            allowed="a checkpoint of a detector: of rcnn, or one that rcnn convert reads",
            remedy=f"{remedy}; to fetch it again, delete {path}" if is_url(name) else remedy,
        )
        raise CheckpointError((problem, *error.problems)) from error


# Settings that change what the tensors compute, and that no shape shows.
_UNSEEN = ("image.mean", "image.std", "image.channel_order", "backbone.style", "backbone.stem_pool")


def unlike_start(source: Recipe, recipe: Recipe) -> Iterator[str]:
    """A line for people where a recipe computes otherwise than that of its start, and every tensor fits."""
    theirs, ours = flatten(source), flatten(recipe)
    paths = (f"detector.{name}" for name in _UNSEEN)
    differing = [f"{path}={theirs[path]}" for path in paths if path in theirs and theirs[path] != ours.get(path)]
    if differing:
        yield f"trained with {', '.join(differing)}; this recipe has others"
