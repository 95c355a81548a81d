"""What a person sees."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from rcnn.engine.progress import BarProgress, LineProgress, PredictionCounter, Smoothed, StepReport, clock, progress_for

REPORT = StepReport(
    step=10, total_steps=110, epoch=1, epochs=11, losses={"rpn": 0.5, "roi": 1.0}, lr=0.02, gradient_norm=3.0, images=4,
    seconds=2.0, wait_seconds=0.5, memory_bytes=1_500_000_000,
)  # fmt: skip


def terminal() -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, force_terminal=True, width=200, legacy_windows=False), text


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3723, "1:02:03")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_numbers_of_a_step() -> None:
    smoothed = Smoothed()
    smoothed.add(REPORT)
    # 4 pictures in 2 s; 0.5 of 2 s waiting; 100 steps of 2 s left
    assert smoothed.describe(REPORT) == (
        "loss 1.500 (rpn 0.500 roi 1.000)  lr 0.02  2.0 img/s  data 25%  1.5 GB  3:20 left"
    )


def test_smoothing() -> None:
    smoothed = Smoothed()
    smoothed.add(REPORT)
    smoothed.add(replace(REPORT, losses={"rpn": 1.5, "roi": 1.0}))
    # 0.9 * 0.5 + 0.1 * 1.5
    assert "rpn 0.600" in smoothed.describe(REPORT)


def test_lines_come_at_intervals_and_at_the_end() -> None:
    text = io.StringIO()
    progress = LineProgress(Console(file=text, width=40), every_seconds=3600)
    for step in (1, 2, 3, 110):
        progress.stepped(replace(REPORT, step=step))
    progress.evaluated(110, {"AP": 0.123456})
    progress.finished()
    lines = text.getvalue().splitlines()
    assert [line.split("  ")[1] for line in lines[:2]] == ["step 1/110", "step 110/110"]
    assert lines[2:] == ["step 110: AP 0.1235"]


def test_an_evaluation_counts_pictures() -> None:
    text = io.StringIO()
    counter = PredictionCounter(LineProgress(Console(file=text), every_seconds=0), total_images=5)
    for images in (2, 2, 1):
        counter(images)
    assert text.getvalue().splitlines() == ["evaluating 2/5", "evaluating 4/5", "evaluating 5/5"]


def test_a_terminal_gets_a_bar_and_a_pipe_gets_lines() -> None:
    console, text = terminal()
    progress = progress_for(console)
    assert isinstance(progress, BarProgress)
    progress.stepped(REPORT)
    progress.evaluated(10, {"AP": 0.5})
    progress.finished()
    for part in ("step 10: AP 0.5000", "epoch 1/11  step 10/110", "━━━", "loss 1.500 (rpn 0.500 roi 1.000)"):
        assert part in text.getvalue()
    evaluating = progress_for(console)
    evaluating.predicted(1, 2)
    evaluating.finished()
    assert "evaluating 1/2" in text.getvalue()
    assert isinstance(progress_for(Console(file=io.StringIO())), LineProgress)
