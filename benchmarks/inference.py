"""Inference on a CPU against torchvision's eager float32: time, equality of boxes, peak memory.

    python benchmarks/inference.py [--models NAME ...] [--threads 2] [--rounds 7] [--cpu-time] [--no-memory]

The same weights in both, one picture at a time without resizing, runs in turns; medians and ratios are printed. float32
must give equal boxes (0.02 px, 5e-4 score), else the script fails. Peak memory is that of child processes that do
nothing but build one of the two and predict, three of each.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from rcnn.detectors.preparation import prepared_detector
from rcnn.detectors.two_stage import TwoStageDetector
from rcnn.records import Detections
from torchvision_models import (
    MODELS,
    Model,
    batch_of,
    loaded_detector,
    loaded_torchvision_model,
    our_detector,
    picture,
    save_both,
    torchvision_model,
)

MOST_PIXELS, MOST_SCORE = 0.02, 5e-4
DTYPES = {"rcnn float32": torch.float32, "rcnn bfloat16": torch.bfloat16}
# Peaks of both are taken over this many predictions.
PREDICTIONS = 4
# Processes of each side whose peaks are taken.
MEMORY_ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cpu-time", action="store_true", help="time of the process, for a machine that others load")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--child", nargs=3, metavar=("MODEL", "WHICH", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.child:
        predict_in_child(*arguments.child)
        return
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    for name in arguments.models:
        compare(MODELS[name], arguments.rounds, clock)
        if not arguments.no_memory:
            show_memory(name, arguments.threads)


def compare(model: Model, rounds: int, clock: Callable[[], float]) -> None:
    image = picture(model.height, model.width)
    theirs = torchvision_model(model)
    ours = our_detector(theirs, model)
    runs = {"torchvision": by_torchvision(theirs, image), "rcnn unprepared": by_rcnn(ours, image)}
    runs |= {name: by_rcnn(prepared_detector(ours, dtype), image) for name, dtype in DTYPES.items()}
    with torch.inference_mode():
        expected = runs["torchvision"]()
        proposals = len(ours.propose(batch_of(image))[0].scores)
        print(
            f"\n{model.name} {model.height}x{model.width}: {proposals} proposals, {len(expected['scores'])} detections"
        )
        for name, run in runs.items():
            if name != "torchvision":
                report_difference(name, run(), expected)
        show(seconds_in_turns(runs, rounds, clock))


def by_torchvision(model: torch.nn.Module, image: Tensor) -> Callable[[], dict[str, Tensor]]:
    pixels = image / 255
    return lambda: model([pixels])[0]


def by_rcnn(detector: TwoStageDetector, image: Tensor) -> Callable[[], Detections]:
    batch = batch_of(image)
    return lambda: detector.predict(batch)[0]


def report_difference(name: str, found: Detections, expected: dict[str, Tensor]) -> None:
    """Each expected box against the nearest found one of its label; float32 must be within the limits.

    bfloat16 on random weights is a worst case: their boxes and scores lie so close that rounding reorders them.
    """
    other_label = found.labels[None] + 1 != expected["labels"][:, None]
    distances = torch.cdist(expected["boxes"], found.boxes_xyxy, p=torch.inf)
    distance, nearest = distances.masked_fill(other_label, torch.inf).min(1)
    score = (found.scores[nearest] - expected["scores"]).abs()
    if "bfloat16" in name:
        near = int((distance < 1).sum())
        print(f"  {name:16} {len(found.scores)} detections; {near} of {len(distance)} boxes within 1 px")
        return
    print(
        f"  {name:16} {len(found.scores)} detections; boxes differ by up to {float(distance.max()):.4f} px, scores by "
        f"{float(score.max()):.1e}"
    )
    same_count = len(found.scores) == len(expected["scores"])
    if not (same_count and float(distance.max()) <= MOST_PIXELS and float(score.max()) <= MOST_SCORE):
        raise SystemExit(f"{name}: the boxes are not torchvision's")


def seconds_in_turns(
    runs: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            start = clock()
            run()
            if turn:
                times[name].append(clock() - start)
    return times


def show(times: dict[str, list[float]]) -> None:
    reference = statistics.median(times["torchvision"])
    for name, values in times.items():
        median = statistics.median(values)
        print(f"  {name:16} {median * 1e3:8.1f} ms  {reference / median:5.2f}x  (fastest {min(values) * 1e3:.1f} ms)")


def show_memory(name: str, threads: int) -> None:
    """Each side builds its model, loads a file of weights, as its users do, and predicts; nothing else.

    In turns, and the median of the peaks: by what the allocator keeps they differ by ten MiB between equal runs.
    """
    theirs = torchvision_model(MODELS[name])
    with tempfile.TemporaryDirectory() as folder:
        files = save_both(theirs, MODELS[name], Path(folder))
        peaks: dict[str, list[tuple[float, float]]] = {which: [] for which in ("torchvision", *DTYPES)}
        for _ in range(MEMORY_ROUNDS):
            for which, values in peaks.items():
                file = files[which.split()[0]]
                command = [sys.executable, __file__, "--threads", str(threads), "--child", name, which, file]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                peak, before = map(float, done.stdout.split())
                values.append((peak, before))
    for which, values in peaks.items():
        median, before = sorted(values)[len(values) // 2]
        every = " ".join(f"{peak:.0f}" for peak, _ in values)
        print(f"  {which:16} peak memory {median:.0f} MiB (of {every}; until the first prediction {before:.0f})")


def predict_in_child(name: str, which: str, file: str) -> None:
    model = MODELS[name]
    image = picture(model.height, model.width)
    run: Callable[[], object]
    if which == "torchvision":
        run = by_torchvision(loaded_torchvision_model(model, file), image)
    else:
        run = by_rcnn(prepared_detector(loaded_detector(file), DTYPES[which]), image)
    before = peak_bytes()
    with torch.inference_mode():
        for _ in range(PREDICTIONS):
            run()
    print(peak_bytes() / 2**20, before / 2**20)


def peak_bytes() -> int:
    """Of this process. Linux hands `ru_maxrss` on from the parent, hence its own record where there is one."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
