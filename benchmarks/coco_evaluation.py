"""Time and memory of COCO evaluation: 5,000 pictures, 36,000 boxes, 500,000 detections of 80 classes, at random.

    python benchmarks/coco_evaluation.py [--peer] [--images N] [--detections D]

Each measurement runs in a fresh process. `--peer` runs pycocotools on the same tables and compares every number.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from rcnn.data.table import AnnotationTable, PackedStrings
from rcnn.evaluation.coco import coco_metrics
from rcnn.evaluation.table import DetectionTable
from rcnn.plain_records import ClassTable

NUM_CLASSES = 80
GOAL_SECONDS, GOAL_GB = 2.0, 0.6


def random_tables(images: int, detections: int, seed: int = 0) -> tuple[AnnotationTable, DetectionTable]:
    """Boxes of COCO's count and spread of sizes; a third of the detections lie near a true box."""
    rng = np.random.default_rng(seed)
    boxes = int(images * 7.2)
    owners = np.sort(rng.integers(0, images, boxes))
    truth_xyxy, truth_labels = _random_boxes(rng, boxes), rng.integers(0, NUM_CLASSES, boxes)
    truth = AnnotationTable(
        classes=ClassTable(names=tuple(f"class {label}" for label in range(NUM_CLASSES))),
        root=Path(),
        format="COCO",
        split="random",
        image_ids=np.arange(images) * 7 + 3,
        file_names=PackedStrings.pack([f"{image}.jpg" for image in range(images)]),
        sizes=np.tile(np.array([[480, 640]], np.int32), (images, 1)),
        starts=np.searchsorted(owners, np.arange(images + 1)),
        boxes_xyxy=truth_xyxy,
        labels=truth_labels,
        ignored=rng.random(boxes) < 0.01,
        areas=np.prod(truth_xyxy[:, 2:] - truth_xyxy[:, :2], axis=1),
    )
    near = rng.integers(0, boxes, detections // 3)
    jittered = truth_xyxy[near] + rng.normal(0, 4, (len(near), 4))
    jittered[:, 2:] = np.maximum(jittered[:, 2:], jittered[:, :2] + 1)
    far = detections - len(near)
    found = DetectionTable(
        image_ids=truth.image_ids[np.concatenate([owners[near], rng.integers(0, images, far)])],
        boxes_xyxy=np.concatenate([jittered, _random_boxes(rng, far)]),
        scores=np.concatenate([rng.beta(3, 2, len(near)), rng.beta(1, 4, far)]).round(4),
        labels=np.concatenate([truth_labels[near], rng.integers(0, NUM_CLASSES, far)]),
    )
    return truth, found


def _random_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    sides = np.exp(rng.uniform(np.log(8), np.log(300), (count, 2)))
    corners = rng.uniform(0, 1, (count, 2)) * np.maximum(np.array([640, 480]) - sides, 1)
    return np.concatenate([corners, corners + sides], axis=1)


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure_ours(images: int, detections: int) -> dict[str, Any]:
    truth, found = random_tables(images, detections)
    before, start = peak_gb(), time.perf_counter()
    result = coco_metrics(truth, found)
    return {
        "seconds": time.perf_counter() - start,
        "gb_before": before,
        "gb": peak_gb(),
        "stats": result.stats.tolist(),
    }


def measure_peer(images: int, detections: int) -> dict[str, Any]:
    """pycocotools from the dictionaries that it needs; making them is not counted, indexing them is."""
    from contextlib import redirect_stdout
    from io import StringIO

    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, found = random_tables(images, detections)
    owners = np.repeat(truth.image_ids, np.diff(truth.starts)).tolist()
    xywh = np.concatenate([truth.boxes_xyxy[:, :2], truth.boxes_xyxy[:, 2:] - truth.boxes_xyxy[:, :2]], axis=1)
    annotations = [
        {"id": row + 1, "image_id": owner, "category_id": label + 1, "bbox": box, "area": area, "iscrowd": int(crowd)}
        for row, (owner, label, box, area, crowd) in enumerate(
            zip(
                owners,
                truth.labels.tolist(),
                xywh.tolist(),
                truth.areas.tolist(),
                truth.ignored.tolist(),
                strict=True,
            )
        )
    ]
    sides = found.boxes_xyxy[:, 2:] - found.boxes_xyxy[:, :2]
    rows = np.column_stack([found.image_ids, found.boxes_xyxy[:, :2], sides, found.scores, found.labels + 1])
    before, start = peak_gb(), time.perf_counter()
    with redirect_stdout(StringIO()):
        coco = COCO()
        coco.dataset = {
            "images": [{"id": int(image)} for image in truth.image_ids],
            "annotations": annotations,
            "categories": [{"id": label + 1} for label in range(NUM_CLASSES)],
        }
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(rows), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {
        "seconds": time.perf_counter() - start,
        "gb_before": before,
        "gb": peak_gb(),
        "stats": evaluation.stats.tolist(),
    }


def in_fresh_process(who: str, images: int, detections: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", who, "--images", str(images), "--detections", str(detections)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--detections", type=int, default=500_000)
    parser.add_argument("--peer", action="store_true", help="also run pycocotools and print the ratios")
    parser.add_argument("--measure", choices=("ours", "peer"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure = measure_ours if options.measure == "ours" else measure_peer
        print(json.dumps(measure(options.images, options.detections)))
        return
    ours = in_fresh_process("ours", options.images, options.detections)
    print(f"{options.images} pictures, {options.detections} detections, {NUM_CLASSES} classes")
    print(
        f"rcnn         {ours['seconds']:6.2f} s   peak {ours['gb']:.2f} GB (the tables alone: {ours['gb_before']:.2f})"
    )
    print(f"             goal: {GOAL_SECONDS} s and {GOAL_GB} GB: {_met(ours)}")
    if options.peer:
        peer = in_fresh_process("peer", options.images, options.detections)
        ratio, equal = peer["seconds"] / ours["seconds"], peer["stats"] == ours["stats"]
        print(f"pycocotools  {peer['seconds']:6.2f} s   peak {peer['gb']:.2f} GB (the inputs: {peer['gb_before']:.2f})")
        print(f"             {ratio:.1f} times as long; all numbers equal: {equal}")


def _met(ours: dict[str, Any]) -> str:
    return "met" if ours["seconds"] <= GOAL_SECONDS and ours["gb"] <= GOAL_GB else "missed"


if __name__ == "__main__":
    main()
