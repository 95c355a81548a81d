"""The recorded pictures as our batches, and the maps of trunks, which several recorded cases have in common."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pytest
import torch
from oracle import Oracle
from PIL import Image
from torch import Tensor, nn

from rcnn.converters.key_map import KeyMap
from rcnn.detectors.pyramid import AbstractPyramidDetector
from rcnn.necks.fpn import FPN
from rcnn.records import Detections, ImageBatch, Losses, Size, Target
from rcnn.transforms.batching import Sample, collate
from rcnn.transforms.geometry import EvalTransform, Kernel, Resize, Rounding, scale_boxes

PICTURES = ("coffee", "astronaut")
# RCNN_PARITY=full compares the inference on both pictures and the gradients of every backbone: twice the time.
FULL = os.environ.get("RCNN_PARITY") == "full"
# Which pictures have boxes in the recorded stages.
TRAIN_STAGES = {"train": (True, True), "train_empty": (True, False)}


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How a system reads pictures: its resize, and which of the recorded label spaces is its own."""

    rounding: Rounding
    kernel: Kernel
    labels: Literal["coco80", "coco91"]
    pixels: torch.dtype = torch.uint8

    def batch(
        self, oracle: Oracle, *, short_side: int, max_long_side: int, boxes: Sequence[bool] = (True, True)
    ) -> tuple[ImageBatch, list[Target]]:
        """Both pictures, in the order of the recording, truth in float64."""
        resize = Resize(
            short_sides=(short_side,), max_long_side=max_long_side, rounding=self.rounding, kernel=self.kernel
        )
        samples = []
        truths = json.loads((oracle.inputs / "ground_truth.json").read_text())
        for name, has_boxes in zip(PICTURES, boxes, strict=True):
            truth = truths[name]
            image = Image.open(oracle.inputs / truth["file"]).convert("RGB")
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
            target = Target(
                boxes_xyxy=torch.tensor(truth["boxes"] if has_boxes else [], dtype=torch.float64).reshape(-1, 4),
                labels=torch.tensor(truth[self.labels] if has_boxes else [], dtype=torch.int64),
                ignore_xyxy=torch.zeros(0, 4, dtype=torch.float64),
            )
            resized, target = EvalTransform(resize=resize)(pixels.to(self.pixels), target)
            original = Size(*pixels.shape[-2:])
            samples.append(Sample(image=resized, target=target, original_size=original, image_id=len(samples)))
        return collate(samples, divisor=32)

    def train_batch(self, oracle: Oracle, stage: str) -> tuple[ImageBatch, list[Target]]:
        """Both pictures as the recorded training had them."""
        sizes = oracle.manifest["train_overrides"]
        return self.batch(
            oracle, short_side=sizes["min_size"], max_long_side=sizes["max_size"], boxes=TRAIN_STAGES[stage]
        )


def only(batch: ImageBatch, picture: int) -> ImageBatch:
    """One picture, padded as it is in the batch."""
    return replace(
        batch,
        pixels=batch.pixels[picture : picture + 1],
        sizes=batch.sizes[picture : picture + 1],
        original_sizes=batch.original_sizes[picture : picture + 1],
        image_ids=batch.image_ids[picture : picture + 1],
    )


@dataclass(frozen=True, kw_only=True)
class Maps:
    """What a backbone and a neck made of a batch, and those two, to which the graph of the maps leads.

    The graph of the pyramid ends at `body`; that of the backbone begins at `body_of_graph`, where it is kept.
    """

    backbone: nn.Module
    neck: nn.Module
    pixels: Tensor
    body: tuple[Tensor, ...]
    pyramid: tuple[Tensor, ...]
    body_of_graph: tuple[Tensor, ...] = ()

    def trunk_parameters(self) -> dict[str, nn.Parameter]:
        parts = {"backbone": self.backbone, "neck": self.neck}
        return {f"{part}.{name}": value for part, module in parts.items() for name, value in module.named_parameters()}


@dataclass
class _Kept:
    """A module's maps of one batch, under the digest of what they were made from."""

    key: str
    module: nn.Module
    maps: tuple[Tensor, ...]


def give_memory_back() -> None:
    """To the system: the C library keeps a gigabyte of what a case has freed, and the next one asks for other sizes."""
    gc.collect()
    if sys.platform == "linux":
        with suppress(AttributeError):  # a C library without it
            ctypes.CDLL(None).malloc_trim(0)


class MapMemory:
    """The maps of the last backbone and of the last neck on it, for the case after that has the same weights.

    A float64 ResNet-50 takes ten seconds for the two pictures, and seven cases of MMDetection have one and the same.
    """

    def __init__(self) -> None:
        self._bodies: dict[bool, _Kept] = {}
        self._pyramids: dict[bool, _Kept] = {}

    def maps(self, detector: AbstractPyramidDetector, batch: ImageBatch, *, gradient: bool) -> Maps:
        """With a graph or without: one of each is kept, but for the graph of a backbone, which the first case has."""
        give_memory_back()
        pixels = detector.normalizer(batch)
        assert isinstance(detector.neck, FPN)
        body_key = digest(detector.backbone, "", pixels)
        neck_key = body_key + digest(detector.neck, f"{detector.neck.extra} {detector.neck.p7_activation}")
        with torch.set_grad_enabled(gradient):
            graph: tuple[Tensor, ...] = ()
            body = self._bodies.get(gradient)
            if body is None or body.key != body_key or (gradient and FULL):
                # The old ones first: there is not the memory for both.
                self._bodies.pop(gradient, None)
                self._pyramids.pop(gradient, None)
                graph = tuple(detector.backbone(pixels))
                leaves = tuple(x.detach().requires_grad_(x.requires_grad) for x in graph)
                body = self._bodies[gradient] = _Kept(body_key, detector.backbone, leaves)
            neck = self._pyramids.get(gradient)
            if neck is None or neck.key != neck_key:
                self._pyramids.pop(gradient, None)
                neck = _Kept(neck_key, detector.neck, tuple(detector.neck(body.maps)))
                self._pyramids[gradient] = neck
        return Maps(
            backbone=body.module,
            neck=neck.module,
            pixels=pixels,
            body=body.maps,
            pyramid=neck.maps,
            body_of_graph=graph if gradient else (),
        )


def digest(module: nn.Module, settings: str, *tensors: Tensor) -> str:
    """Equal where structure, weights, settings and tensors are."""
    seen = hashlib.sha1((repr(module) + settings).encode())
    for tensor in (*module.state_dict().values(), *tensors):
        seen.update(tensor.detach().contiguous().numpy().data)
    return seen.hexdigest()


def pictures_of(number: int) -> tuple[int, ...]:
    """Whose inference a case compares: one of the two, turn about. A float64 head takes five seconds for one."""
    return (0, 1) if FULL else (number % 2,)


def check_detections(oracle: Oracle, found: Detections, batch: ImageBatch, picture: int) -> None:
    """In pixels of the picture as it was."""
    boxes = scale_boxes(found.boxes_xyxy, batch.sizes[0], batch.original_sizes[0])
    oracle.check(f"eval/detections/{picture}/boxes", boxes)
    oracle.check(f"eval/detections/{picture}/scores", found.scores)
    oracle.check(f"eval/detections/{picture}/labels", found.labels)


def check_losses(oracle: Oracle, stage: str, losses: Losses, terms: Mapping[str, str]) -> None:
    """Every recorded loss, by our name and its own in `terms`."""
    names = {f"{stage}/loss/{terms[ours]}": value for ours, value in losses.items()}
    assert set(names) == {name for name in oracle.manifest["arrays"] if name.startswith(f"{stage}/loss/")}
    for name, value in names.items():
        assert float(value.detach()) == pytest.approx(float(oracle.full(name)), rel=1e-6), name


def check_gradients(
    oracle: Oracle, detector: nn.Module, key_map: KeyMap, names: Mapping[str, str], maps: Maps, losses: Losses
) -> None:
    """Every recorded gradient of the sum of the losses, its norm and its samples, under its own name and layout.

    The backbone's where its graph was kept: of the first case that has it.
    """
    parameters = dict(detector.named_parameters()) | maps.trunk_parameters()
    recorded = {name.removeprefix("train/grad/") for name in oracle.manifest["arrays"] if "/grad/" in name}
    ours = {names[name]: parameters[names[name]] for name in recorded}
    above = {name: value for name, value in ours.items() if not name.startswith("backbone.")}
    below = {name: value for name, value in ours.items() if name not in above}
    assert above and below
    total = torch.stack(list(losses.values())).sum()
    # Frozen maps have none.
    leaves = [x for x in maps.body if x.requires_grad]
    found = torch.autograd.grad(total, [*above.values(), *leaves], retain_graph=True)
    gradients = dict(zip(above, found, strict=False))
    if maps.body_of_graph:
        tops = [x for x in maps.body_of_graph if x.requires_grad]
        of_body = torch.autograd.grad(tops, list(below.values()), grad_outputs=found[len(above) :])
        gradients |= dict(zip(below, of_body, strict=True))
    for name, gradient in key_map.to_theirs(gradients).items():
        oracle.check(f"train/grad/{name}", gradient)
        oracle.check(f"train/grad_norm/{name}", gradient.norm())
