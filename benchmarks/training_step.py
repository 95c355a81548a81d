"""A training step of fasterrcnn_resnet50_fpn on a CPU against torchvision's: time and peak memory at batch 2, 480x640.

    python benchmarks/training_step.py [--threads 2] [--rounds 5] [--cpu-time] [--no-memory]

The same weights (norms frozen, the last three stages trained), pictures and boxes; forward, backward and SGD; runs in
turns; medians and ratios are printed. Ours in float32 and under bfloat16 autocast, torchvision's in float32, as its
reference script does on a CPU, and under autocast for comparison.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from inference import peak_bytes
from rcnn.records import ImageBatch, Target
from torchvision_models import (
    MODELS,
    batch_of,
    loaded_detector,
    loaded_torchvision_model,
    our_detector,
    picture,
    save_both,
    torchvision_model,
)

MODEL = MODELS["fasterrcnn_resnet50_fpn"]
HEIGHT, WIDTH, IMAGES, BOXES = 480, 640, 2, 8
LEARNING_RATE = 1e-4  # random weights: the numbers must stay finite, no more
VARIANTS = {
    "torchvision float32": False,
    "torchvision bfloat16": True,
    "rcnn float32": False,
    "rcnn bfloat16": True,
}
# Memory of the optimizer and of the first step's gradients belongs to the peak.
STEPS = 3

Step = Callable[[], dict[str, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpu-time", action="store_true", help="time of the process, for a machine that others load")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--child", nargs=2, metavar=("WHICH", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.child:
        step_in_child(*arguments.child)
        return
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    compare(arguments.rounds, clock)
    if not arguments.no_memory:
        show_memory(arguments.threads)


def truth(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(BOXES, 2, generator=generator) * torch.tensor([WIDTH - 180.0, HEIGHT - 180.0])
    side = 20 + torch.rand(BOXES, 2, generator=generator) * 150
    return torch.cat([corner, corner + side], 1), torch.randint(0, 90, (BOXES,), generator=generator)


def stepper(model: nn.Module, losses: Callable[[], dict[str, Tensor]], bfloat16: bool) -> Step:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], LEARNING_RATE, momentum=0.9)

    def step() -> dict[str, float]:
        torch.manual_seed(0)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            terms = losses()
        torch.stack(list(terms.values())).sum().backward()
        optimizer.step()
        return {name: float(term.detach()) for name, term in terms.items()}

    return step


def torchvision_step(model: nn.Module, bfloat16: bool) -> Step:
    train_last_three_stages(model, "backbone.body.")
    model.train()
    images = [picture(HEIGHT, WIDTH, seed) / 255 for seed in range(IMAGES)]

    def losses() -> dict[str, Tensor]:
        targets = [dict(zip(("boxes", "labels"), truth(seed), strict=True)) for seed in range(IMAGES)]
        return model(images, [{**target, "labels": target["labels"] + 1} for target in targets])

    return stepper(model, losses, bfloat16)


def rcnn_step(model: nn.Module, bfloat16: bool) -> Step:
    train_last_three_stages(model, "backbone.")
    model.train()
    model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    singles = [batch_of(picture(HEIGHT, WIDTH, seed)) for seed in range(IMAGES)]
    sizes = tuple(size for single in singles for size in single.sizes)
    batch = ImageBatch(pixels=torch.cat([single.pixels for single in singles]), sizes=sizes, original_sizes=sizes)

    def losses() -> dict[str, Tensor]:
        found = [truth(seed) for seed in range(IMAGES)]
        return model.loss(batch, [Target(boxes_xyxy=boxes, labels=labels) for boxes, labels in found])

    return stepper(model, losses, bfloat16)


def train_last_three_stages(model: nn.Module, prefix: str) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith((prefix + "conv1", prefix + "bn1", prefix + "layer1")))


def compare(rounds: int, clock: Callable[[], float]) -> None:
    theirs = [torchvision_model(MODEL) for _ in range(2)]
    ours = [our_detector(theirs[0], MODEL) for _ in range(2)]
    makers = [torchvision_step] * 2 + [rcnn_step] * 2
    steps = {
        name: make(model, bfloat16)
        for (name, bfloat16), make, model in zip(VARIANTS.items(), makers, [*theirs, *ours], strict=True)
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    print(f"{MODEL.name}, batch {IMAGES}, {HEIGHT}x{WIDTH}")
    for turn in range(rounds + 1):
        for name, step in steps.items():
            start = clock()
            terms = step()
            if turn:
                times[name].append(clock() - start)
            else:
                print(f"  {name:22} " + " ".join(f"{key} {value:.4f}" for key, value in terms.items()))
    reference = statistics.median(times["torchvision float32"])
    for name, values in times.items():
        median = statistics.median(values)
        print(f"  {name:22} {median:7.3f} s  {reference / median:5.2f}x  (fastest {min(values):.3f} s)")


def show_memory(threads: int) -> None:
    theirs = torchvision_model(MODEL)
    with tempfile.TemporaryDirectory() as folder:
        files = save_both(theirs, MODEL, Path(folder))
        del theirs
        for which in VARIANTS:
            file = files[which.split()[0]]
            command = [sys.executable, __file__, "--threads", str(threads), "--child", which, file]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            print(f"  {which:22} {done.stdout.strip()}")


def step_in_child(which: str, file: str) -> None:
    if which.startswith("torchvision"):
        step = torchvision_step(loaded_torchvision_model(MODEL, file), VARIANTS[which])
    else:
        step = rcnn_step(loaded_detector(file), VARIANTS[which])
    for _ in range(STEPS):
        step()
    print(f"peak memory {peak_bytes() / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
