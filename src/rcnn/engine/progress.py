"""What a person sees of a training: a bar on a terminal, plain lines elsewhere, nothing where nobody looks."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

SMOOTHING = 0.9


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One optimizer step. `losses` are means over the step's pictures on all processes, `images` their number.

    `wait_seconds` of the `seconds` were spent waiting for the loader. `memory_bytes` is the peak so far.
    """

    step: int
    total_steps: int
    epoch: int
    epochs: int
    losses: Mapping[str, float]
    lr: float
    gradient_norm: float
    images: int
    seconds: float
    wait_seconds: float
    memory_bytes: int

    @property
    def loss(self) -> float:
        return sum(self.losses.values())

    @property
    def images_per_second(self) -> float:
        return self.images / max(self.seconds, 1e-9)

    @property
    def wait_share(self) -> float:
        return self.wait_seconds / max(self.seconds, 1e-9)


class AbstractProgress(Protocol):
    """Is told what happens; decides what to show."""

    def stepped(self, report: StepReport) -> None: ...

    def predicted(self, images: int, total_images: int) -> None: ...

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def noted(self, text: str) -> None: ...

    def finished(self) -> None: ...


class SilentProgress:
    """Shows nothing: the default of the library, and what every process but the first gets."""

    def stepped(self, report: StepReport) -> None:
        pass

    def predicted(self, images: int, total_images: int) -> None:
        pass

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def noted(self, text: str) -> None:
        pass

    def finished(self) -> None:
        pass


class PredictionCounter:
    """An `on_batch` for `predict_all` that tells a progress how far it is; `total_images` is this process's share."""

    def __init__(self, progress: AbstractProgress, *, total_images: int) -> None:
        self._progress = progress
        self._total_images = total_images
        self._images = 0

    def __call__(self, images: int) -> None:
        self._images += images
        self._progress.predicted(self._images, self._total_images)


class Smoothed:
    """Running means of the last steps: losses, pictures per second, waiting share, and the time that is left."""

    def __init__(self) -> None:
        self._means: dict[str, float] = {}

    def add(self, report: StepReport) -> None:
        values: dict[str, float] = {
            **report.losses,
            "/seconds": report.seconds,
            "/wait": report.wait_seconds,
            "/images": report.images,
        }
        for name, value in values.items():
            before = self._means.get(name)
            self._means[name] = value if before is None else SMOOTHING * before + (1 - SMOOTHING) * value

    def describe(self, report: StepReport) -> str:
        """One line: losses, learning rate, pictures per second, waiting, memory, time left."""
        means = self._means
        seconds = max(means["/seconds"], 1e-9)
        terms = {name: value for name, value in means.items() if not name.startswith("/")}
        losses = " ".join(f"{name} {value:.3f}" for name, value in terms.items())
        return (
            f"loss {sum(terms.values()):.3f} ({losses})  lr {report.lr:.2g}  {means['/images'] / seconds:.1f} img/s  "
            f"data {means['/wait'] / seconds:.0%}  {report.memory_bytes / 1e9:.1f} GB  "
            f"{clock((report.total_steps - report.step) * seconds)} left"
        )


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03, or 2:03 below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def metrics_line(step: int, metrics: Mapping[str, float]) -> str:
    """An evaluation in one line; a dash for what is not defined (NaN, or pycocotools' -1)."""
    texts = {name: f"{value:.4f}" if value >= 0 else "–" for name, value in metrics.items()}
    return f"step {step}: " + "  ".join(f"{name} {text}" for name, text in texts.items())


class LineProgress:
    """Plain lines at intervals of time, for logs and pipes."""

    def __init__(self, console: Console, *, every_seconds: float = 10.0) -> None:
        self._console = console
        self._every_seconds = every_seconds
        self._smoothed = Smoothed()
        self._shown_at = -every_seconds

    def stepped(self, report: StepReport) -> None:
        self._smoothed.add(report)
        self._show(f"{place(report)}  {self._smoothed.describe(report)}", always=report.step == report.total_steps)

    def predicted(self, images: int, total_images: int) -> None:
        self._show(f"evaluating {images}/{total_images}")

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        self.noted(metrics_line(step, metrics))

    def noted(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _show(self, text: str, *, always: bool = False) -> None:
        now = time.monotonic()
        if always or now - self._shown_at >= self._every_seconds:
            self._shown_at = now
            self.noted(text)

    def finished(self) -> None:
        pass


class BarProgress:
    """A bar between two lines of numbers, for a terminal; everything that is noted scrolls above it."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, transient=True, refresh_per_second=4, redirect_stdout=False)
        self._smoothed = Smoothed()

    def stepped(self, report: StepReport) -> None:
        self._smoothed.add(report)
        bar = ProgressBar(total=report.total_steps, completed=report.step)
        self._show(Text(place(report)), bar, Text(self._smoothed.describe(report)))

    def predicted(self, images: int, total_images: int) -> None:
        self._show(Text(f"evaluating {images}/{total_images}"), ProgressBar(total=total_images, completed=images))

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        self.noted(metrics_line(step, metrics))

    def noted(self, text: str) -> None:
        self._live.console.print(text, markup=False, highlight=False)

    def finished(self) -> None:
        self._live.stop()

    def _show(self, *lines: RenderableType) -> None:
        if not self._live.is_started:
            self._live.start()
        table = Table.grid(expand=True)
        for line in lines:
            table.add_row(line)
        self._live.update(table)


def place(report: StepReport) -> str:
    """Where the training is: epoch and step of how many."""
    return f"epoch {report.epoch}/{report.epochs}  step {report.step}/{report.total_steps}"


def progress_for(console: Console) -> AbstractProgress:
    """A bar where the console is a terminal, lines elsewhere."""
    return BarProgress(console) if console.is_terminal else LineProgress(console)
