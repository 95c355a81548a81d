"""The folder of one training: runs/NAME with its recipe, metrics, checkpoints, TensorBoard events and pictures."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rcnn.atomic_file import write_atomically
from rcnn.errors import Problem, RunError


@dataclass(frozen=True)
class RunFolder:
    """The places of one run. `create` and `open` check that they can be used before anything slow begins."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def last(self) -> Path:
        return self.checkpoints / "last.safetensors"

    @property
    def best(self) -> Path:
        return self.checkpoints / "best.safetensors"

    @property
    def predictions(self) -> Path:
        return self.path / "predictions"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def events(self) -> Path:
        return self.path / "tensorboard"

    @classmethod
    def create(cls, path: Path, *, recipe: str) -> RunFolder:
        """A new run. Raises RunError where the folder cannot be written, or holds a run (nothing is overwritten).

        A run that ended before its first checkpoint left nothing to go on from: its folder may be used again.
        """
        run = cls(path)
        if run.last.exists() or run.best.exists():
            remedy = f"go on with it: rcnn train --resume {path}; or choose another name"
            raise RunError(Problem(where=str(path), given="holds a run already", remedy=remedy))
        run._make_folders()
        write_atomically(run.recipe, recipe)
        run.rewind(0)
        return run

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing run with a checkpoint to go on from. Raises RunError where there is none."""
        run = cls(path)
        if not run.last.exists():
            given = "has no checkpoint to go on from" if run.recipe.exists() else "is not the folder of a run"
            remedy = f"expected is {run.last}; start it without --resume"
            raise RunError(Problem(where=str(path), given=given, remedy=remedy))
        run._make_folders()
        return run

    def _make_folders(self) -> None:
        try:
            for folder in (self.checkpoints, self.predictions, self.events):
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder):
                    pass
        except OSError as error:
            given = f"cannot be written: {error.strerror or error}"
            remedy = "choose a folder that you may write to"
            raise RunError(Problem(where=str(self.path), given=given, remedy=remedy)) from error

    def log(self, row: Mapping[str, Any]) -> None:
        """Appends one row to metrics.jsonl, on the disk's side at once."""
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(_line(row))
        except OSError as error:
            given = f"cannot be written: {error.strerror or error}"
            raise RunError(Problem(where=str(self.metrics), given=given, remedy="make room and --resume")) from error

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows of metrics.jsonl. A last line that a kill cut off is left out; another broken one is an error."""
        if not self.metrics.exists():
            return
        lines = self.metrics.read_text(encoding="utf-8", errors="replace").split("\n")
        for number, line in enumerate(lines, start=1):
            try:
                if line:
                    yield json.loads(line)
            except ValueError as error:
                if number == len(lines):
                    return
                where = f"{self.metrics}, line {number}"
                raise RunError(
                    Problem(where=where, given=line[:80], allowed="JSON", remedy="remove the line")
                ) from error

    def rewind(self, step: int) -> None:
        """Drops the rows after `step`: a run that goes on from there writes them again."""
        kept = [row for row in self.rows() if row["step"] <= step]
        if self.metrics.exists():
            write_atomically(self.metrics, "".join(_line(row) for row in kept))


def _line(row: Mapping[str, Any]) -> str:
    """One JSON object; NaN and infinity, which JSON does not have, become null."""
    plain = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()
    }
    return json.dumps(plain) + "\n"
