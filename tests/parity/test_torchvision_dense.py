"""torchvision's FCOS and RetinaNet, stage by stage in float64, from checkpoints rebuilt under its key names.

Inference is compared on one of the two pictures, padded as in the batch; RCNN_PARITY=full takes both. Training is
compared on both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
import torch
from oracle import Oracle
from recorded import (
    TRAIN_STAGES,
    MapMemory,
    Maps,
    Preprocessing,
    check_detections,
    check_gradients,
    check_losses,
    only,
    pictures_of,
)
from torch import Tensor

from rcnn.converters.interface import ForeignFile, Wanted
from rcnn.converters.key_map import KeyMap
from rcnn.converters.torchvision_dense import coco_classes
from rcnn.converters.torchvision_system import TorchvisionSystem
from rcnn.dense.fcos import FCOSHead
from rcnn.dense.interface import DensePrediction
from rcnn.dense.retinanet import RetinaNetHead
from rcnn.dense.selection import per_prior
from rcnn.detectors.one_stage import OneStageDetector
from rcnn.engine.checkpoint import load_into
from rcnn.recipes.models import build_detector
from rcnn.records import ImageBatch, Target

# In one process, where a case finds the maps of the one before.
pytestmark = pytest.mark.xdist_group("parity with detectron2 and torchvision")
PREPROCESSING = Preprocessing(rounding="floor", kernel="bilinear_float", labels="coco91", pixels=torch.float64)
Head = FCOSHead | RetinaNetHead


CASES = ("fcos_resnet50_fpn", "retinanet_resnet50_fpn")
OUTPUTS = {"fcos_resnet50_fpn": "bbox_ctrness", "retinanet_resnet50_fpn": None}
# Ours and theirs.
TERMS = {"classification": "classification", "box": "bbox_regression", "centerness": "bbox_ctrness"}
FEATURES = ("0", "1", "2", "p6", "p7")


@dataclass
class Case:
    """A detector with the recorded weights, and the maps of its trunk."""

    oracle: Oracle
    detector: OneStageDetector
    key_map: KeyMap
    names: Mapping[str, str]
    memory: MapMemory
    pictures: Sequence[int]

    @property
    def head(self) -> Head:
        head = self.detector.head
        assert isinstance(head, Head)
        return head

    @cached_property
    def training(self) -> tuple[Maps, DensePrediction]:
        """Maps and predictions of both pictures, with a graph. The truth does not matter to them."""
        batch, _ = self.train_batch("train")
        maps = self.memory.maps(self.detector, batch, gradient=True)
        return maps, self.head(self.detector.levels(maps.pyramid, batch))

    def train_batch(self, stage: str) -> tuple[ImageBatch, list[Target]]:
        return PREPROCESSING.train_batch(self.oracle, stage)

    def priors(self, prediction: DensePrediction) -> list[Tensor]:
        return (
            self.head.make_points(prediction) if isinstance(self.head, FCOSHead) else self.head.make_anchors(prediction)
        )


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, oracle: Callable[[str], Oracle], memory: MapMemory) -> Case:
    recorded = oracle(f"torchvision/{request.param}")
    file = ForeignFile(path=Path(f"{request.param}.pth"), tensors=recorded.state_dict())
    model = TorchvisionSystem().recognise(file, Wanted())
    assert model.classes == coco_classes()
    detector = build_detector(model.recipe.detector, num_classes=len(model.classes), pretrained=False).double().eval()
    assert isinstance(detector, OneStageDetector)
    key_map = model.key_map(model.recipe)
    converted = key_map.to_ours(model.tensors)
    assert set(converted.names) == set(file.tensors)
    load_into(detector, converted.state)
    number = CASES.index(request.param)
    return Case(recorded, detector, key_map, converted.names, memory, pictures_of(number))


@torch.no_grad()
def test_inference(case: Case) -> None:
    oracle, detector = case.oracle, case.detector
    both, _ = PREPROCESSING.batch(oracle, short_side=800, max_long_side=1333)
    oracle.check("eval/pre/tensor", detector.normalizer(both))
    oracle.check("eval/pre/image_sizes_hw", torch.tensor(both.sizes), rtol=0)
    for picture in case.pictures:
        batch = only(both, picture)
        maps = case.memory.maps(detector, batch, gradient=False)
        for level, x in enumerate(maps.body[1:]):
            oracle.check_rows(f"eval/body/{level}", x, picture)
        for name, x in zip(FEATURES, maps.pyramid, strict=True):
            oracle.check_rows(f"eval/feature/{name}", x, picture)
        prediction = case.head(detector.levels(maps.pyramid, batch))
        check_head(case, prediction, picture)
        (found,) = detector.detect(prediction)
        check_detections(oracle, found, batch, picture)


def check_head(case: Case, prediction: DensePrediction, picture: int) -> None:
    case.oracle.check_rows("eval/head/cls_logits", per_prior(prediction.classes, len(coco_classes())), picture)
    raw = prediction.boxes
    if isinstance(case.head, FCOSHead):
        # Recorded after the ReLU, in strides.
        raw = [x.relu() for x in raw]
        case.oracle.check_rows("eval/head/bbox_ctrness", per_prior(prediction.quality, 1), picture)
    case.oracle.check_rows("eval/head/bbox_regression", per_prior(raw, 4), picture)
    for level, priors in enumerate(case.priors(prediction)):
        if isinstance(case.head, FCOSHead):
            # An anchor of one stride, whose corners it rounds, around each point.
            half = torch.full_like(priors, prediction.levels.shapes[level].stride_px / 2)
            priors = torch.cat((priors - half, priors + half), dim=1)
        case.oracle.check(f"eval/anchors/{level}", priors)


@pytest.mark.parametrize("stage", TRAIN_STAGES)
def test_training(case: Case, stage: str) -> None:
    oracle = case.oracle
    maps, prediction = case.training
    _, targets = case.train_batch(stage)
    oracle.check(f"{stage}/pre/tensor", maps.pixels)
    for picture, target in enumerate(targets):
        oracle.check(f"{stage}/pre/gt_boxes/{picture}", target.boxes_xyxy)
        check_assignment(case, stage, prediction, target, picture)
    losses = case.head.loss(prediction, targets)
    check_losses(oracle, stage, losses, TERMS)
    if stage == "train":
        check_gradients(oracle, case.detector, case.key_map, case.names, maps, losses)


def check_assignment(case: Case, stage: str, prediction: DensePrediction, target: Target, picture: int) -> None:
    priors, levels, head = case.priors(prediction), prediction.levels, case.head
    if isinstance(head, FCOSHead):
        matches = head.match(priors, levels.shapes, target)
    else:
        matches = head.match(torch.cat(priors), target, levels.image_sizes[picture], levels.shapes)
    positive = matches.positive.nonzero().flatten()
    counts = [len(positive), int(matches.negative.sum())]
    counts.append(sum(map(len, priors)) - sum(counts))
    name = f"{stage}/assign/{{}}/{picture}".format
    case.oracle.check(name("num_pos_neg_ignored"), torch.tensor(counts), rtol=0)
    case.oracle.check(name("positive_anchor_index"), positive, rtol=0)
    case.oracle.check(name("positive_matched_gt"), matches.gt_index[positive], rtol=0)
