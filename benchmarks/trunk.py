"""Backbone, neck and RPN tower for inference on a CPU: as built, and prepared (folded, fused, channels-last, bfloat16).

    python benchmarks/trunk.py [--recipes NAME ...] [--height 800] [--width 1216] [--threads 2] [--cpu-time]

Runs in turns; medians and ratios to the trunk as built, in float32, are printed, and how far the maps are apart.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from inference import seconds_in_turns
from rcnn.ops import fused
from rcnn.ops.preparation import prepare_for_inference
from rcnn.recipes.catalogue import RECIPES
from rcnn.recipes.models import build_detector

DEFAULTS = ["faster_rcnn_resnet50_fpn", "faster_rcnn_mobilenet_v3_large_fpn", "faster_rcnn_efficientnet_lite0_fpn"]


class Trunk(nn.Module):
    """All that runs on whole pictures."""

    def __init__(self, backbone: nn.Module, neck: nn.Module, tower: nn.Module) -> None:
        super().__init__()
        self.backbone, self.neck, self.tower = backbone, neck, tower

    def forward(self, pixels: Tensor) -> list[Tensor]:
        maps = self.neck(self.backbone(pixels))
        return [x for level in maps for x in (level, *self.tower(level))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=DEFAULTS)
    parser.add_argument("--height", type=int, default=800)
    parser.add_argument("--width", type=int, default=1216)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cpu-time", action="store_true", help="time of the process, for a machine that others load")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    for name in arguments.recipes:
        compare(name, arguments.height, arguments.width, arguments.rounds, clock)


def compare(name: str, height: int, width: int, rounds: int, clock: Callable[[], float]) -> None:
    torch.manual_seed(0)
    detector = build_detector(RECIPES[name]().detector, num_classes=80, pretrained=False).eval()
    trunk = Trunk(detector.backbone, detector.neck, detector.proposals.head.tower)
    x = torch.randn(1, 3, height, width)
    variants = {
        "as built": trunk,
        "prepared, plain operators": plainly_prepared(trunk),
        "prepared": prepare_for_inference(trunk),
        "prepared, bfloat16": prepare_for_inference(trunk, dtype=torch.bfloat16),
    }
    with torch.inference_mode():
        expected = trunk(x)
        times = seconds_in_turns(
            {key: lambda variant=variant: variant(x) for key, variant in variants.items()}, rounds, clock
        )
        print(f"\n{name} {height}x{width}")
        for key, values in times.items():
            median, first = statistics.median(values), statistics.median(times["as built"])
            error = max(
                float((given.float() - wanted).norm() / wanted.norm())
                for given, wanted in zip(variants[key](x), expected, strict=True)
            )
            print(f"  {key:26} {median * 1e3:8.1f} ms  {first / median:5.2f}x  relative error {error:.1e}")


def plainly_prepared(trunk: nn.Module) -> nn.Module:
    """As on a machine whose PyTorch has no oneDNN operators."""
    works = fused.onednn_works
    fused.onednn_works = lambda dtype: False  # type: ignore[assignment]
    try:
        return prepare_for_inference(trunk)
    finally:
        fused.onednn_works = works


if __name__ == "__main__":
    main()
