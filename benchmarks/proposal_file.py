"""Time and memory of a file of proposals: written, read back picture by picture, and its recall counted.

    python benchmarks/proposal_file.py [--images 1000 3000 10000] [--proposals 1000] [--folder DIR]

Each size runs in a fresh process, whose peak memory is printed: it must not grow with the file. 100,000 pictures of
1,000 proposals (2 GB) are ten times the largest default.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rcnn.data.proposals import (
    ProposalFile,
    ProposalOrigin,
    StoredProposals,
    TableProposals,
    open_proposals,
    write_proposals,
)
from rcnn.data.table import AnnotationTable, PackedStrings
from rcnn.evaluation.overlaps import PictureOverlaps
from rcnn.evaluation.recall import Pairing, RecallCounter
from rcnn.plain_records import ClassTable

WIDTH, HEIGHT = 640, 480
BOXES_PER_PICTURE, NUM_CLASSES = 7, 80
# What the largest file may take more than the smallest, of what it is larger.
GOAL_GROWTH = 0.05


def random_table(images: int) -> AnnotationTable:
    """Pictures of COCO's number and sizes of boxes."""
    boxes = random_boxes(np.random.default_rng(0), images * BOXES_PER_PICTURE).astype(np.float64)
    return AnnotationTable(
        classes=ClassTable(names=tuple(f"class {label}" for label in range(NUM_CLASSES))),
        root=Path(),
        format="COCO",
        split="random",
        image_ids=np.arange(images) * 7 + 3,
        file_names=PackedStrings.pack([f"{image:012d}.jpg" for image in range(images)]),
        sizes=np.tile(np.array([[HEIGHT, WIDTH]], np.int32), (images, 1)),
        starts=np.arange(images + 1) * BOXES_PER_PICTURE,
        boxes_xyxy=boxes,
        labels=np.random.default_rng(1).integers(0, NUM_CLASSES, len(boxes)),
        ignored=np.zeros(len(boxes), bool),
        areas=np.prod(boxes[:, 2:] - boxes[:, :2], axis=1),
    )


def random_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    sides = np.exp(rng.uniform(np.log(8), np.log(300), (count, 2)))
    corners = rng.uniform(0, 1, (count, 2)) * (np.array([WIDTH, HEIGHT]) - sides)
    boxes = np.concatenate([corners, corners + sides], axis=1)
    return np.clip(boxes, 0, [WIDTH, HEIGHT, WIDTH, HEIGHT]).astype(np.float32)


def random_proposals(table: AnnotationTable, proposals: int) -> Iterator[StoredProposals]:
    """A third of them near a true box. Drawn from a store of a thousand pictures' worth, so that writing is timed."""
    rng = np.random.default_rng(2)
    store = random_boxes(rng, 1000 * proposals // 10)
    scores = np.sort(rng.random(proposals, np.float32))[::-1]
    far = proposals - proposals // 3
    for index in range(len(table)):
        true = table.boxes_xyxy[table.rows(index)]
        near = np.repeat(true, -(-(proposals // 3) // len(true)), axis=0)[: proposals // 3]
        near = np.clip(near + rng.normal(0, 6, near.shape), 0, [WIDTH, HEIGHT, WIDTH, HEIGHT])
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2])
        start = int(rng.integers(0, len(store) - far))
        boxes = np.concatenate([near.astype(np.float32), store[start : start + far]])
        yield StoredProposals(boxes_xyxy=boxes[rng.permutation(proposals)], scores=scores)


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_writing(path: Path, images: int, proposals: int) -> dict[str, Any]:
    table = random_table(images)
    before, start = peak_mb(), time.perf_counter()
    with write_proposals(path, table, origin=ProposalOrigin(detector="random")) as writer:
        for found in random_proposals(table, proposals):
            writer.add(found)
    return {"seconds": time.perf_counter() - start, "before": before, "peak": peak_mb(), "bytes": path.stat().st_size}


def measure_reading(path: Path, images: int, proposals: int) -> dict[str, Any]:
    """Every picture once, in a random order as a training does it, each checked."""
    table = random_table(images)
    before, start = peak_mb(), time.perf_counter()
    found = open_proposals(path, table)
    opened = time.perf_counter() - start
    total = sum(len(found[index]) for index in np.random.default_rng(3).permutation(images).tolist())
    assert total == images * proposals
    return {"seconds": time.perf_counter() - start, "opened": opened, "before": before, "peak": peak_mb()}


def measure_recall(path: Path, images: int, proposals: int) -> dict[str, Any]:
    table = random_table(images)
    before, start = peak_mb(), time.perf_counter()
    found = TableProposals(ProposalFile(path), table)
    counter = RecallCounter(table.classes.names, pairing=Pairing.OVERLAP)
    for index in range(images):
        counter.add(PictureOverlaps.of(table, index, found[index].boxes_xyxy))
    ar = float(counter.result().average[-1])
    return {"seconds": time.perf_counter() - start, "before": before, "peak": peak_mb(), "ar": ar}


MEASURES = {"writing": measure_writing, "reading": measure_reading, "recall": measure_recall}


def in_fresh_process(what: str, path: Path, images: int, proposals: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", what, "--file", str(path)]
    command += ["--images", str(images), "--proposals", str(proposals)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 3000, 10_000])
    parser.add_argument("--proposals", type=int, default=1000)
    parser.add_argument("--folder", type=Path, help="where the files go (default: a temporary folder)")
    parser.add_argument("--measure", choices=tuple(MEASURES), help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(MEASURES[options.measure](options.file, options.images[0], options.proposals)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        compare(Path(folder), options.images, options.proposals)


def compare(folder: Path, sizes: list[int], proposals: int) -> None:
    print(f"{proposals} proposals in a picture; memory in MB: peak of the process (before: its tables alone)")
    growth: dict[str, list[float]] = {what: [] for what in MEASURES}
    files = []
    for images in sizes:
        path = folder / "proposals.safetensors"
        results = {what: in_fresh_process(what, path, images, proposals) for what in MEASURES}
        files.append(results["writing"]["bytes"] / 1e6)
        print(f"{images:>7,} pictures, {files[-1]:,.0f} MB")
        for what, result in results.items():
            growth[what].append(result["peak"] - result["before"])
            per_second = images / result["seconds"]
            print(
                f"        {what:8} {result['seconds']:7.2f} s ({per_second:8,.0f} pictures/s)   "
                f"peak {result['peak']:6.1f} (before {result['before']:.1f})"
            )
    for what, values in growth.items():
        share = (values[-1] - values[0]) / max(files[-1] - files[0], 1e-9)
        verdict = "met" if share <= GOAL_GROWTH else "missed"
        print(
            f"{what}: {files[-1] - files[0]:,.0f} MB more of file took {values[-1] - values[0]:+.1f} MB more of memory "
            f"(goal: at most {GOAL_GROWTH:.0%}: {verdict})"
        )


if __name__ == "__main__":
    main()
