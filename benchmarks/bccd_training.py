"""CPU time of a training step on real pictures, against torchvision's detector of the same backbone and size.

    python benchmarks/bccd_training.py --data FOLDER/bccd --weights FOLDER/resnet18_backbone.pth [--steps 12]

Both are ResNet-18-FPN from the same ImageNet weights with frozen norms and the last three stages trained, short side
320, long side at most 480, batch 2, SGD: the setting of `faster_rcnn_resnet18_fpn` in the README. The same batches in
turns; a step is forward, backward and optimizer. Printed: seconds of the process (all threads), medians, their ratio.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torchvision
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.ops import FrozenBatchNorm2d

from rcnn.backbones.pretrained import read_tensors
from rcnn.config.edit import edit
from rcnn.engine.optimizer import parameter_groups, sgd
from rcnn.recipes.catalogue import faster_rcnn_resnet18_fpn
from rcnn.recipes.datasets import read_splits
from rcnn.recipes.loaders import build_loader_for_training
from rcnn.recipes.models import build_detector
from rcnn.records import ImageBatch, Target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipe = edit(
        faster_rcnn_resnet18_fpn(),
        {
            "data.path": arguments.data,
            "data.eval_split": "test",
            "data.workers": 0,
            "detector.image.short_side": 320,
            "detector.image.max_long_side": 480,
            "detector.backbone.weights": arguments.weights,
        },
    )
    splits = read_splits(recipe.data, seed=0)
    loader = build_loader_for_training(splits.train, recipe, rank=0, num_processes=1)
    loader.set_epoch(0)
    detector = build_detector(recipe.detector, num_classes=len(splits.train.classes))
    detector.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    peer = torchvision_detector(arguments.weights, len(splits.train.classes)).train()
    optimizer = sgd(parameter_groups(detector, lr=0.005, weight_decay=1e-4))
    peer_optimizer = torch.optim.SGD(
        [p for p in peer.parameters() if p.requires_grad], lr=0.005, momentum=0.9, weight_decay=1e-4
    )
    ours, theirs = [], []
    for number, (batch, targets) in zip(range(arguments.steps + 2), loader, strict=False):
        mine = seconds_of(partial(step, lambda b=batch, t=targets: detector.loss(b, t), optimizer))
        images, truth = as_torchvision(batch, targets)
        peers = seconds_of(partial(step, lambda i=images, t=truth: peer(i, t), peer_optimizer))
        if number >= 2:  # the first ones pay for what is set up once
            ours.append(mine)
            theirs.append(peers)
    print(f"{arguments.threads} threads, {len(ours)} steps of 2 pictures, CPU seconds a step, median")
    print(f"rcnn         {statistics.median(ours):.3f}")
    print(f"torchvision  {statistics.median(theirs):.3f}")
    ratios = [theirs_s / ours_s for ours_s, theirs_s in zip(ours, theirs, strict=True)]
    print(f"torchvision / rcnn  {statistics.median(ratios):.2f} (min {min(ratios):.2f}, max {max(ratios):.2f})")


def torchvision_detector(weights: str, num_classes: int) -> FasterRCNN:
    """The peer of the README's table: torchvision's FasterRCNN on its own ResNet-18-FPN."""
    body = torchvision.models.resnet18(weights=None, norm_layer=FrozenBatchNorm2d)
    body.load_state_dict(read_tensors(Path(weights)), strict=False)
    backbone = _resnet_fpn_extractor(body, trainable_layers=3)
    return FasterRCNN(backbone, num_classes=num_classes + 1, min_size=320, max_size=480)


def as_torchvision(batch: ImageBatch, targets: list[Target]) -> tuple[list[torch.Tensor], list[dict]]:
    """The same pictures, already resized, and truth with labels from 1."""
    images = [
        pixels[:, : size.height, : size.width] / 255 for pixels, size in zip(batch.pixels, batch.sizes, strict=True)
    ]
    return images, [{"boxes": target.boxes_xyxy, "labels": target.labels + 1} for target in targets]


def step(losses: Callable[[], dict[str, torch.Tensor]], optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    torch.stack(list(losses().values())).sum().backward()
    optimizer.step()


def seconds_of(action: Callable[[], None]) -> float:
    start = time.process_time()
    action()
    return time.process_time() - start


if __name__ == "__main__":
    main()
