"""detectron2's detectors, stage by stage in float64: recipe, preprocessing and weights from a checkpoint under its key
names, through the converter.

Its cell anchors and pixel means are float32 constants: anchors agree to 1e-8, not to the bit. Inference is compared on
one of the two pictures, padded as in the batch; RCNN_PARITY=full takes both. Training is compared on both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

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

from rcnn.config.edit import edit
from rcnn.converters.detectron2_anchors import anchors_of
from rcnn.converters.detectron2_system import Detectron2System
from rcnn.converters.interface import ForeignFile, Wanted
from rcnn.converters.key_map import Converted, KeyMap
from rcnn.dense.interface import AbstractDenseHead, DensePrediction
from rcnn.dense.normalizers import MovingNormalizer
from rcnn.dense.retinanet import RetinaNetHead
from rcnn.dense.rpn import RPNHead
from rcnn.detectors.one_stage import OneStageDetector
from rcnn.detectors.two_stage import TwoStageDetector
from rcnn.engine.checkpoint import load_into
from rcnn.proposals import ProposalStage
from rcnn.recipes.models import build_detector
from rcnn.recipes.recipe import Recipe
from rcnn.records import Detections, ImageBatch, Losses, Target
from rcnn.roi.stage import RoIStage

# In one process, where a case finds the maps of the one before.
pytestmark = pytest.mark.xdist_group("parity with detectron2 and torchvision")
# In an order in which a case has the backbone of the one before: their weights have the same names.
CASES = ("retinanet_R_50_FPN_1x", "faster_rcnn_R_50_FPN_1x")
Detector = OneStageDetector | TwoStageDetector
# What the recorded trainings had otherwise: all samples, fewer proposals.
TRAINING: Mapping[str, object] = {
    "detector.proposals.train.post_nms": 500,
    "detector.proposals.head.sampler": {"type": "every"},
    "detector.roi.sampler": {"type": "every"},
}


def preprocessing_of(recipe: Recipe) -> Preprocessing:
    image = recipe.detector.image
    return Preprocessing(rounding=image.rounding, kernel=image.kernel, labels="coco80")


@dataclass
class Case:
    """The detector that the converter makes of the recorded weights, and the maps of its trunk."""

    oracle: Oracle
    recipe: Recipe
    detector: Detector
    key_map: KeyMap
    converted: Converted
    memory: MapMemory
    pictures: Sequence[int]

    @property
    def head(self) -> RPNHead | RetinaNetHead:
        first = self.detector if isinstance(self.detector, OneStageDetector) else self.detector.proposals
        head = first.head  # type: ignore[union-attr]
        assert isinstance(head, RPNHead | RetinaNetHead)
        return head

    @cached_property
    def training(self) -> tuple[Maps, DensePrediction]:
        """Maps and predictions of both pictures, with a graph. The truth does not matter to them."""
        batch, _ = self.train_batch("train")
        maps = self.memory.maps(self.detector, batch, gradient=True)
        return maps, self.head(self.detector.levels(maps.pyramid, batch))

    def train_batch(self, stage: str) -> tuple[ImageBatch, list[Target]]:
        return preprocessing_of(self.recipe).train_batch(self.oracle, stage)

    def its_index(self, index: Tensor) -> Tensor:
        """The places of anchors in its order."""
        ratios, sizes = self.grid
        cell, anchor = index // (ratios * sizes), index % (ratios * sizes)
        return cell * (ratios * sizes) + anchor % sizes * ratios + anchor // sizes

    def size_by_size(self, maps: Tensor) -> Tensor:
        """Maps [N, A * width, H, W] in its order of the anchors of a cell; ours is ratio by ratio."""
        ratios, sizes = self.grid
        return maps.reshape(len(maps), ratios, sizes, -1, *maps.shape[2:]).transpose(1, 2).reshape(maps.shape)

    @property
    def grid(self) -> tuple[int, int]:
        anchors = anchors_of(self.recipe)
        return len(anchors.heights_over_widths), len(anchors.sizes_px[0])


def recorded_case(oracle: Oracle, memory: MapMemory, pictures: Sequence[int]) -> Case:
    """A checkpoint of detectron2 through the converter, every key accounted for."""
    state = oracle.state_dict()
    file = ForeignFile(path=oracle.folder, tensors=state)
    model = Detectron2System().recognise(file, Wanted())
    recipe = model.recipe
    key_map = model.key_map(recipe)
    converted = key_map.to_ours(model.tensors)
    assert set(converted.names) == set(state)
    one_stage = recipe.detector.type == "one_stage"
    spec = recipe.detector if one_stage else edit(recipe, TRAINING).detector
    detector = build_detector(spec, num_classes=len(model.classes), pretrained=False).double().eval()
    assert isinstance(detector, Detector)
    load_into(detector, converted.state)
    return Case(oracle, recipe, detector, key_map, converted, memory, pictures)


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, oracle: Callable[[str], Oracle], memory: MapMemory) -> Case:
    return recorded_case(oracle(f"detectron2/{request.param}"), memory, pictures_of(1))


@torch.no_grad()
def test_inference(case: Case) -> None:
    """From the recorded picture, through the recipe's own preprocessing, to its boxes."""
    oracle, detector, image = case.oracle, case.detector, case.recipe.detector.image
    both, _ = preprocessing_of(case.recipe).batch(
        oracle, short_side=image.short_side, max_long_side=image.max_long_side
    )
    check_preprocessing(case, both)
    for picture in case.pictures:
        batch = only(both, picture)
        maps = case.memory.maps(detector, batch, gradient=False)
        check_maps(oracle, maps, picture)
        prediction = case.head(detector.levels(maps.pyramid, batch))
        if isinstance(detector, OneStageDetector):
            check_head(case, prediction, picture, ("head/logits", "head/deltas"))
            (found,) = detector.detect(prediction)
        else:
            check_head(case, prediction, picture, ("rpn/objectness", "rpn/deltas"))
            found = second_stage(case, detector, prediction, picture)
        check_detections(oracle, found, batch, picture)


def check_preprocessing(case: Case, both: ImageBatch) -> None:
    for picture, size in enumerate(both.sizes):
        pixels = both.pixels[picture, :, : size.height, : size.width].flip(0)
        case.oracle.check(f"eval/pre/resized_uint8_bgr/{picture}", pixels, rtol=0)
    case.oracle.check("eval/pre/tensor", case.detector.normalizer(both))
    case.oracle.check("eval/pre/image_sizes_hw", torch.tensor(both.sizes), rtol=0)


def check_maps(oracle: Oracle, maps: Maps, picture: int) -> None:
    recorded = oracle.manifest["arrays"]
    for number, x in enumerate(maps.body, 2):
        if f"eval/body/res{number}" in recorded:
            oracle.check_rows(f"eval/body/res{number}", x, picture)
    first = next(number for number in (2, 3) if f"eval/feature/p{number}" in recorded)
    for number, x in enumerate(maps.pyramid, first):
        oracle.check_rows(f"eval/feature/p{number}", x, picture)


def check_head(case: Case, prediction: DensePrediction, picture: int, names: tuple[str, str]) -> None:
    ratios, sizes = case.grid
    for level, anchors in enumerate(case.head.make_anchors(prediction)):
        case.oracle.check_rows(f"eval/{names[0]}/{level}", case.size_by_size(prediction.classes[level]), picture)
        case.oracle.check_rows(f"eval/{names[1]}/{level}", case.size_by_size(prediction.boxes[level]), picture)
        theirs = anchors.reshape(-1, ratios, sizes, 4).transpose(1, 2).reshape(-1, 4)
        case.oracle.check(f"eval/anchors/{level}", theirs)


def second_stage(case: Case, detector: TwoStageDetector, prediction: DensePrediction, picture: int) -> Detections:
    boxes = check_proposals(case.oracle, detector, prediction, picture)
    roi, levels = detector.roi, prediction.levels
    assert isinstance(roi, RoIStage)
    first = picture * len(boxes)
    pooled = roi.pooling(levels, [boxes])
    case.oracle.check_rows("eval/roi/pooled", pooled, first)
    features = roi.box_head(pooled)
    case.oracle.check_rows("eval/roi/box_head", features, first)
    logits, deltas = roi.predictor(features)
    case.oracle.check_rows("eval/roi/class_logits", logits, first)
    case.oracle.check_rows("eval/roi/box_deltas", deltas.flatten(1), first)
    if picture == 0:
        case.oracle.check("eval/roi/box_deltas_first50", deltas[:50].flatten(1))
    return roi.detect(logits, deltas, [boxes], levels.image_sizes)[0]


def check_proposals(oracle: Oracle, detector: TwoStageDetector, prediction: DensePrediction, picture: int) -> Tensor:
    assert isinstance(detector.proposals, ProposalStage)
    (found,) = detector.proposals.select(prediction, detector.proposals.test_filter)
    assert found.scores is not None
    oracle.check(f"eval/proposals/{picture}/boxes", found.boxes_xyxy)
    oracle.check(f"eval/proposals/{picture}/logits", torch.logit(found.scores))
    return found.boxes_xyxy


@pytest.mark.parametrize("stage", TRAIN_STAGES)
def test_training(case: Case, stage: str) -> None:
    oracle = case.oracle
    maps, prediction = case.training
    batch, targets = case.train_batch(stage)
    oracle.check(f"{stage}/pre/tensor", maps.pixels)
    oracle.check(f"{stage}/pre/image_sizes_hw", torch.tensor(batch.sizes), rtol=0)
    check_assignment(case, stage, batch, targets, prediction)
    losses = losses_of(case, stage, prediction, targets)
    check_losses(oracle, stage, losses, TERMS)
    if stage == "train":
        check_gradients(oracle, case.detector, case.key_map, case.converted.names, maps, losses)


def check_assignment(
    case: Case, stage: str, batch: ImageBatch, targets: Sequence[Target], prediction: DensePrediction
) -> None:
    anchors = torch.cat(case.head.make_anchors(prediction))
    for picture, target in enumerate(targets):
        case.oracle.check(f"{stage}/pre/gt_boxes/{picture}", target.boxes_xyxy)
        matches = case.head.match(anchors, target, batch.sizes[picture], prediction.levels.shapes)
        positive = matches.positive.nonzero().flatten()
        order = case.its_index(positive).argsort()
        counts = [len(positive), int(matches.negative.sum())]
        counts.append(len(anchors) - sum(counts))
        name = f"{stage}/assign/{{}}/{picture}".format
        case.oracle.check(name("num_pos_neg_ignored"), torch.tensor(counts), rtol=0)
        case.oracle.check(name("positive_anchor_index"), case.its_index(positive)[order], rtol=0)
        case.oracle.check(name("positive_anchor_gt_box"), target.boxes_xyxy[matches.gt_index[positive[order]]])


def losses_of(case: Case, stage: str, prediction: DensePrediction, targets: Sequence[Target]) -> Losses:
    if isinstance(case.detector, OneStageDetector):
        normalizer = case.head.normalizer  # type: ignore[union-attr]
        assert isinstance(normalizer, MovingNormalizer)
        # In evaluation mode, where the moving mean begins at 100 each time.
        case.oracle.check(f"{stage}/loss_normalizer_initial", normalizer.get_buffer("mean"))
        return case.head.loss(prediction, targets)
    return two_stage_losses(case, stage, case.head, prediction, targets)


def two_stage_losses(
    case: Case, stage: str, head: AbstractDenseHead, prediction: DensePrediction, targets: Sequence[Target]
) -> Losses:
    """As the detector makes them, but for what was computed before; regions checked on the way."""
    assert isinstance(case.detector, TwoStageDetector)
    proposals, roi = case.detector.proposals, case.detector.roi
    assert isinstance(proposals, ProposalStage)
    assert isinstance(roi, RoIStage)
    agnostic = [replace(target, labels=torch.zeros_like(target.labels)) for target in targets]
    losses = {f"rpn_{name}": value for name, value in head.loss(prediction, agnostic).items()}
    found = proposals.select(prediction, proposals.train_filter)
    for picture, target in enumerate(targets):
        regions = roi.sample(found[picture], target)
        # It lists positives first.
        order = (regions.labels == roi.num_classes).int().argsort(stable=True)
        case.oracle.check(f"{stage}/roi/labels/{picture}", regions.labels[order], rtol=0)
        case.oracle.check(f"{stage}/roi/sampled_boxes/{picture}", regions.boxes_xyxy[order])
    return losses | roi.loss(prediction.levels, found, targets)


# Ours and theirs.
TERMS = {
    "rpn_classification": "loss_rpn_cls",
    "rpn_box": "loss_rpn_loc",
    "roi_classification": "loss_cls",
    "roi_box": "loss_box_reg",
    "classification": "loss_cls",
    "box": "loss_box_reg",
}
