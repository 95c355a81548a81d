"""The one error tree: everything that a user can cause is raised from here.

    RcnnError
    ├── RecipeError        a recipe, patch or override that cannot be applied
    ├── DataError          annotations or a data folder that cannot be used
    ├── ImageError         a picture that cannot be read
    ├── CheckpointError    a file of weights that cannot be used
    ├── RunError           a run folder, a disk, a training that stopped
    │   └── Interrupted    a signal asked for the end, and what was done is saved
    ├── DownloadError      something that could not be fetched
    └── SetupError         parts or a machine that do not fit together

Every error carries a list of `Problem`s: all that was found, not the first.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One mistake: where it is, what was given, what is allowed, and what to do."""

    where: str
    given: str
    allowed: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        parts = [f"{self.where}: {self.given}"]
        if self.allowed:
            parts.append(f"allowed: {self.allowed}")
        if self.remedy:
            parts.append(self.remedy)
        return "; ".join(parts)


class RcnnError(Exception):
    """Base of the tree. `problems` holds everything that was found; `str(error)` lists it."""

    title = "rcnn cannot go on"
    exit_code = 1
    # A data set may have 100,000 mistakes: all are in `problems`, the message shows the first ones and their number.
    shown = 50

    def __init__(self, problems: Problem | Iterable[Problem] | str) -> None:
        if isinstance(problems, str):  # torch raises what a worker raised anew, from its text
            problems = Problem(where="a worker process", given=problems)
        self.problems: tuple[Problem, ...] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        count = len(self.problems)
        lines = [f"{self.title} ({count} problem{'s' if count != 1 else ''}):"]
        lines += [f"  - {problem}" for problem in self.problems[: self.shown]]
        if count > self.shown:
            lines.append(f"  ... and {count - self.shown} more")
        return "\n".join(lines)


class RecipeError(RcnnError):
    """A recipe, a patch file or a command-line override that cannot be applied."""

    title = "the recipe cannot be used"


class DataError(RcnnError):
    """Annotations or a data folder that cannot be used."""

    title = "the data cannot be used"


class ImageError(RcnnError):
    """A picture that cannot be read."""

    title = "the picture cannot be read"


class CheckpointError(RcnnError):
    """A file of weights that cannot be used."""

    title = "the checkpoint cannot be used"
    # Where a file is of another network, each of its hundreds of tensors is a mistake.
    shown = 12


class RunError(RcnnError):
    """A run folder, a disk or a training that stopped."""

    title = "the run cannot go on"


class Interrupted(RunError):
    """SIGINT or SIGTERM ended a training after it was saved. The exit code is the shell's: 128 plus the signal."""

    title = "the run was interrupted"

    def __init__(self, problems: Problem | Iterable[Problem], *, signal_number: int) -> None:
        super().__init__(problems)
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number


class DownloadError(RcnnError):
    """Something that could not be fetched."""

    title = "the download failed"


class SetupError(RcnnError):
    """Parts or a machine that do not fit together."""

    title = "the set-up does not fit"


def nearest(name: str, allowed: Sequence[str]) -> str:
    """A hint such as 'did you mean "lr"?', or an empty text where nothing is near."""
    matches = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.6)
    return f'did you mean "{matches[0]}"?' if matches else ""
