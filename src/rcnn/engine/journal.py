"""What a run leaves behind while it goes: rows of metrics.jsonl, TensorBoard curves, pictures of predictions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from PIL import Image
from torch.utils.tensorboard.writer import SummaryWriter

from rcnn.engine.progress import StepReport
from rcnn.engine.run_folder import RunFolder
from rcnn.errors import Problem, RunError

# Pictures as H x W x 3 uint8, by the name of their file.
Pictures = Mapping[str, np.ndarray]


class Journal:
    """Writes for one process, the first; events of steps after `step` (from before a kill) are hidden."""

    def __init__(self, run: RunFolder, *, step: int) -> None:
        self._run = run
        self._events = SummaryWriter(log_dir=str(run.events), purge_step=step + 1 if step else None)
        self._window: list[StepReport] = []

    def stepped(self, report: StepReport, *, write: bool) -> None:
        """Collects a step; `write` closes the window and writes its means."""
        self._window.append(report)
        if not write:
            return
        row = _mean_row(self._window)
        self._window = []
        self._run.log({"kind": "train", **row})
        with _disk_errors(self._run):
            for name, value in row.items():
                if name not in ("step", "epoch"):
                    self._events.add_scalar(f"train/{name}", value, report.step)

    def evaluated(self, metrics: Mapping[str, float], *, step: int, epoch: int) -> None:
        self._run.log({"kind": "evaluation", "step": step, "epoch": epoch, **metrics})
        with _disk_errors(self._run):
            for name, value in metrics.items():
                self._events.add_scalar(f"evaluation/{name}", value, step)
            self._events.flush()

    def pictured(self, pictures: Pictures, *, step: int) -> None:
        """Saves pictures as predictions/step-N/NAME.png and shows them in TensorBoard."""
        folder = self._run.predictions / f"step-{step:06}"
        with _disk_errors(self._run):
            folder.mkdir(parents=True, exist_ok=True)
            for name, pixels in pictures.items():
                Image.fromarray(pixels).save(folder / f"{name}.png")
                self._events.add_image(f"predictions/{name}", pixels, step, dataformats="HWC")

    def close(self) -> None:
        # Of a disk that is full another write has told already; the end of a run must not hide why it ended.
        with contextlib.suppress(OSError):
            self._events.close()


@contextlib.contextmanager
def _disk_errors(run: RunFolder) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        given = f"curves and pictures cannot be written: {error.strerror or error}"
        remedy = f"go on from the last checkpoint: rcnn train --resume {run.path}"
        raise RunError(Problem(where=str(run.path), given=given, remedy=remedy)) from error


def _mean_row(window: Sequence[StepReport]) -> dict[str, float]:
    """Means over the window; rates over its whole time."""
    last, seconds = window[-1], sum(report.seconds for report in window)
    names = last.losses
    return {
        "step": last.step,
        "epoch": last.epoch,
        "lr": last.lr,
        "loss": float(np.mean([report.loss for report in window])),
        **{f"loss/{name}": float(np.mean([report.losses[name] for report in window])) for name in names},
        "gradient_norm": last.gradient_norm,
        "images_per_second": sum(report.images for report in window) / max(seconds, 1e-9),
        "wait_share": sum(report.wait_seconds for report in window) / max(seconds, 1e-9),
        "memory_mb": last.memory_bytes / 1e6,
    }
