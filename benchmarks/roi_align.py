"""RoIAlign, forward and backward, against torchvision's operator: 1000 RoIs on four levels of an 800x1216 picture.

    python benchmarks/roi_align.py [--rois 1000] [--channels 256] [--threads 1] [--rounds 9] [--sampling-ratio 2]

The two run in turns; medians are printed. torchvision gets contiguous maps and ours channels-last ones: each the layout
its trunk leaves. Both are grouped by level and put back into the order of the RoIs, as their detectors do.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torchvision
from torch import Tensor

from rcnn.ops.roi_align import roi_align

STRIDES = (4, 8, 16, 32)
HEIGHT, WIDTH = 800, 1216
SIZE = 7


@dataclass(frozen=True, kw_only=True)
class Case:
    """RoIs with the sizes of real proposals (log-uniform sides, 12 to 540 pixels) on the level FPN gives them."""

    features: list[Tensor]
    boxes: Tensor
    image: Tensor
    level: Tensor
    sampling_ratio: int


def make_case(rois: int, channels: int, sampling_ratio: int, dtype: torch.dtype) -> Case:
    torch.manual_seed(0)
    features = [torch.randn(1, channels, HEIGHT // stride, WIDTH // stride, dtype=dtype) for stride in STRIDES]
    side = torch.exp(torch.empty(rois).uniform_(2.5, 6.3))
    aspect = torch.exp(torch.randn(rois) * 0.4)
    width, height = (side * aspect).clamp(max=1000), (side / aspect).clamp(max=780)
    x, y = torch.rand(rois) * (WIDTH - width), torch.rand(rois) * (HEIGHT - height)
    level = torch.floor(4 + torch.log2((width * height).sqrt() / 224) + 1e-6).clamp(2, 5).long() - 2
    boxes = torch.stack([x, y, x + width, y + height], 1)
    image = torch.zeros(rois, dtype=torch.int64)
    return Case(features=features, boxes=boxes, image=image, level=level, sampling_ratio=sampling_ratio)


def by_torchvision(case: Case, features: list[Tensor]) -> Tensor:
    rois = torch.cat([case.image[:, None].float(), case.boxes], 1)
    members = [(case.level == level).nonzero()[:, 0] for level in range(len(STRIDES))]
    parts = [
        torchvision.ops.roi_align(feature, rois[some], SIZE, 1 / stride, case.sampling_ratio)
        for feature, some, stride in zip(features, members, STRIDES, strict=True)
    ]
    pooled = parts[0].new_zeros(len(rois), *parts[0].shape[1:])
    for part, some in zip(parts, members, strict=True):
        pooled[some] = part
    return pooled


def by_rcnn(case: Case, features: list[Tensor]) -> Tensor:
    return roi_align(
        features,
        case.boxes,
        case.image,
        case.level,
        scales=[(1 / stride, 1 / stride) for stride in STRIDES],
        output_size=SIZE,
        sampling_ratio=case.sampling_ratio,
        aligned=False,
    )


def seconds_in_turns(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median time of each, run in turns after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def show(title: str, seconds: dict[str, float]) -> None:
    reference = seconds["torchvision"]
    for name, value in seconds.items():
        print(f"{title:10} {name:28} {value * 1e3:8.1f} ms  {reference / value:6.2f}x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rois", type=int, default=1000)
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--sampling-ratio", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    case = make_case(arguments.rois, arguments.channels, arguments.sampling_ratio, torch.float32)
    last = [feature.contiguous(memory_format=torch.channels_last) for feature in case.features]
    with torch.inference_mode():
        halves = [feature.bfloat16() for feature in last]
        print(
            f"largest difference {float((by_torchvision(case, case.features) - by_rcnn(case, last)).abs().max()):.1e}"
        )
        runs = {
            "torchvision": lambda: by_torchvision(case, case.features),
            "rcnn": lambda: by_rcnn(case, last),
            "rcnn bfloat16": lambda: by_rcnn(case, halves),
        }
        show("forward", seconds_in_turns(runs, arguments.rounds))
    show("backward", seconds_in_turns(backward_runs(case, last), arguments.rounds))


def backward_runs(case: Case, last: list[Tensor]) -> dict[str, Callable[[], object]]:
    theirs = [feature.requires_grad_() for feature in case.features]
    ours = [feature.requires_grad_() for feature in last]
    pooled_theirs, pooled_ours = by_torchvision(case, theirs), by_rcnn(case, ours)
    upstream = torch.randn(pooled_theirs.shape)
    upstream_last = upstream.contiguous(memory_format=torch.channels_last)
    return {
        "torchvision": lambda: torch.autograd.grad(pooled_theirs, theirs, upstream, retain_graph=True),
        "rcnn": lambda: torch.autograd.grad(pooled_ours, ours, upstream_last, retain_graph=True),
        "rcnn, contiguous gradient": lambda: torch.autograd.grad(pooled_ours, ours, upstream, retain_graph=True),
    }


if __name__ == "__main__":
    main()
