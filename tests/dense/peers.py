"""torchvision's one-stage detectors beside our heads: equal weights on one pyramid, losses and detections of both."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from rcnn.dense.interface import AbstractDenseHead
from rcnn.records import Detections, Levels, LevelShape, Losses, Size, Target

STRIDES = (8, 16, 32, 64, 128)
CHANNELS = 64
SIZES = (Size(height=160, width=200), Size(height=130, width=224))
PADDED = Size(height=160, width=224)
# The coarsest levels are rounded up: torchvision then spaces its cells by 53 x 56 and 80 x 112 px.
SHAPES = tuple(
    LevelShape(
        height=math.ceil(PADDED.height / stride),
        width=math.ceil(PADDED.width / stride),
        stride_px=stride,
    )
    for stride in STRIDES
)


class NoBackbone(nn.Module):
    """torchvision's detectors ask for one; here the maps are given."""

    out_channels = CHANNELS


def pyramid(num_images: int = 2) -> Levels:
    """Random maps in float64."""
    generator = torch.Generator().manual_seed(1)
    return Levels(
        maps=tuple(
            torch.randn(num_images, CHANNELS, shape.height, shape.width, generator=generator, dtype=torch.float64)
            for shape in SHAPES
        ),
        shapes=SHAPES,
        padded_size=PADDED,
        image_sizes=SIZES[:num_images],
        image_scales=(1.0,) * num_images,
        num_roi_levels=len(SHAPES),
    )


def truth(*boxes: tuple[float, float, float, float], labels: Sequence[int] = ()) -> Target:
    return Target(
        boxes_xyxy=torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4),
        labels=torch.tensor(labels or [0] * len(boxes), dtype=torch.int64),
    )


# Boxes for every level, one within another, and a second picture that may have none.
TARGETS = (
    truth((10, 12, 60, 50), (30, 20, 150, 140), (0, 0, 200, 160), (40, 30, 52, 47), labels=[1, 2, 0, 2]),
    truth((100, 20, 220, 125), labels=[1]),
)
CASES = {"boxes": TARGETS, "one without": (TARGETS[0], truth()), "none": (truth(), truth())}


def spread(model: nn.Module, seed: int = 0) -> None:
    """Random weights with which scores and boxes vary."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            if parameter.ndim > 1:
                parameter.copy_(noise * math.sqrt(2 / fan_in))
            elif name.endswith("bias"):
                parameter.copy_(noise * 0.2)


@dataclass(frozen=True)
class Peer:
    """A torchvision detector with `compute_loss` and `postprocess_detections`, in training mode."""

    model: nn.Module

    def outputs(self, levels: Levels) -> tuple[dict[str, Tensor], list[Tensor]]:
        images = ImageList(
            torch.zeros(len(levels.image_sizes), 3, *levels.padded_size),
            [(size.height, size.width) for size in levels.image_sizes],
        )
        maps = list(levels.maps)
        anchors = self.model.anchor_generator(images, maps)
        return self.model.head(maps), [of_image.double() for of_image in anchors]

    def losses(self, levels: Levels, targets: Sequence[Target], *counts: list[int]) -> Losses:
        outputs, anchors = self.outputs(levels)
        theirs = [{"boxes": target.boxes_xyxy, "labels": target.labels} for target in targets]
        return self.model.compute_loss(theirs, outputs, anchors, *counts)

    def detections(self, levels: Levels) -> list[dict[str, Tensor]]:
        outputs, anchors = self.outputs(levels)
        cells = torch.tensor([shape.height * shape.width for shape in levels.shapes])
        counts = (cells * (len(anchors[0]) // int(cells.sum()))).tolist()
        return self.model.postprocess_detections(
            {name: list(x.split(counts, dim=1)) for name, x in outputs.items()},
            [list(of_image.split(counts)) for of_image in anchors],
            [(size.height, size.width) for size in levels.image_sizes],
        )


def assert_equal_losses(
    head: AbstractDenseHead, ours: Losses, theirs: Losses, peer: nn.Module, names: Mapping[str, str]
) -> None:
    """The terms, as `names` pairs them, and the gradients of all parameters by the sum, in the order of both."""
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[names[name]], rtol=1e-6, atol=1e-12)
    torch.stack(list(ours.values())).sum().backward()
    sum(theirs.values()).backward()  # type: ignore[union-attr]
    norms = [parameter.grad.norm().item() for parameter in peer.head.parameters() if parameter.grad is not None]  # type: ignore[union-attr]
    found = [parameter.grad.norm().item() for parameter in head.parameters() if parameter.grad is not None]
    torch.testing.assert_close(sorted(found), sorted(norms), rtol=1e-6, atol=1e-10)


def assert_equal_detections(ours: Sequence[Detections], theirs: Sequence[dict[str, Tensor]]) -> None:
    for found, expected in zip(ours, theirs, strict=True):
        assert len(found) > 10
        torch.testing.assert_close(found.scores, expected["scores"])
        torch.testing.assert_close(found.boxes_xyxy, expected["boxes"])
        torch.testing.assert_close(found.labels, expected["labels"])
