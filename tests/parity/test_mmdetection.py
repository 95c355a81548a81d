"""MMDetection's detectors, stage by stage in float64: checkpoints rebuilt as it writes them, and the recipes that the
converter makes of them.

Inference is compared on one of the two pictures, padded as in the batch; RCNN_PARITY=full takes both. Training is
compared on both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
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
    only,
    pictures_of,
)
from torch import Tensor

from rcnn.config.edit import edit
from rcnn.converters.interface import ForeignFile, Wanted
from rcnn.converters.key_map import KeyMap
from rcnn.converters.mmdet_structure import head_prefix
from rcnn.converters.mmdet_system import MMDetectionSystem
from rcnn.dense.atss import ATSSHead, match_batch
from rcnn.dense.fcos import FCOSHead
from rcnn.dense.gfl import GFLHead
from rcnn.dense.interface import AbstractDenseHead, DensePrediction
from rcnn.dense.retinanet import RetinaNetHead
from rcnn.dense.rpn import RPNHead
from rcnn.detectors.first_stage import ProposalDetector
from rcnn.detectors.one_stage import OneStageDetector
from rcnn.detectors.two_stage import TwoStageDetector
from rcnn.engine.checkpoint import load_into
from rcnn.priors import priors_of as priors_on
from rcnn.proposals import ProposalStage
from rcnn.recipes.heads import RPNSpec
from rcnn.recipes.models import build_detector
from rcnn.recipes.recipe import OneStageSpec, ProposalsSpec, Recipe, TwoStageSpec
from rcnn.records import Detections, ImageBatch, Levels, Losses, Proposals, Target
from rcnn.roi.cascade import CascadeStage
from rcnn.roi.regions import SampledRegions
from rcnn.roi.stage import RoIStage

# In one process, where a case finds the maps of the one before.
pytestmark = pytest.mark.xdist_group("parity with MMDetection")
Detector = OneStageDetector | TwoStageDetector | ProposalDetector

# In an order in which a case has the pyramid, or at least the backbone, of the one before.
CASES = (
    "atss_r50_fpn_1x",
    "gfl_r50_fpn_1x",
    "retinanet_r50_fpn_1x",
    "faster-rcnn_r50_fpn_fcos-rpn_1x",
    "faster-rcnn_r50_fpn_1x",
    "rpn_r50_fpn_1x",
    "cascade-rcnn_r50_fpn_1x",
    "fcos_r50-caffe_fpn_gn-head_1x",
    "faster-rcnn_r50-caffe_fpn_fcos-rpn_1x",
)


def as_recorded(recipe: Recipe, train_overrides: Mapping[str, object]) -> Recipe:
    """What the recorded runs had otherwise than MMDetection's configs: samplers that draw all, fewer proposals."""
    assert train_overrides["samplers"] == "num = 10**9"
    changes: dict[str, object] = {}
    detector = recipe.detector
    if not isinstance(detector, OneStageSpec):
        assert isinstance(detector.proposals, ProposalsSpec)
        changes["detector.proposals.train.post_nms"] = train_overrides["rpn_proposal_max_per_img"]
        if isinstance(detector.proposals.head, RPNSpec):
            changes["detector.proposals.head.sampler"] = {"type": "every"}
    if isinstance(detector, TwoStageSpec):
        changes["detector.roi.sampler"] = {"type": "every"}
    return edit(recipe, changes)


@dataclass
class Case:
    """A detector with the recorded weights, and the maps of its trunk."""

    oracle: Oracle
    recipe: Recipe
    key_map: KeyMap
    head_prefix: str
    detector: Detector
    names: Mapping[str, str]
    memory: MapMemory
    pictures: Sequence[int]

    @property
    def head(self) -> AbstractDenseHead:
        if isinstance(self.detector, OneStageDetector):
            return self.detector.head
        assert isinstance(self.detector.proposals, ProposalStage)
        return self.detector.proposals.head

    def maps(self, batch: ImageBatch, *, gradient: bool) -> tuple[Maps, Levels]:
        maps = self.memory.maps(self.detector, batch, gradient=gradient)
        return maps, self.detector.levels(maps.pyramid, batch)

    @cached_property
    def training(self) -> tuple[Maps, DensePrediction]:
        """Maps and predictions of both pictures, with a graph. The truth does not matter to them."""
        maps, levels = self.maps(self.train_batch("train")[0], gradient=True)
        return maps, self.head(levels)

    def train_batch(self, stage: str) -> tuple[ImageBatch, list[Target]]:
        long_side, short_side = self.oracle.manifest["train_overrides"]["scale"]
        boxes = TRAIN_STAGES[stage]
        return self.preprocessing.batch(self.oracle, short_side=short_side, max_long_side=long_side, boxes=boxes)

    @property
    def preprocessing(self) -> Preprocessing:
        """That of the recipe."""
        image = self.recipe.detector.image
        return Preprocessing(rounding=image.rounding, kernel=image.kernel, labels="coco80")


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, oracle: Callable[[str], Oracle], memory: MapMemory) -> Case:
    """From the checkpoint alone: `recognise` makes the recipe, of which only what was recorded otherwise is changed."""
    recorded = oracle(f"mmdetection/{request.param}")
    state = recorded.state_dict()
    file = ForeignFile(path=Path(f"{request.param}_coco.pth"), tensors=state, meta={"meta": {}})
    assert MMDetectionSystem().signs(file) is not None
    model = MMDetectionSystem().recognise(file, Wanted())
    recipe = as_recorded(model.recipe, recorded.manifest["train_overrides"])
    detector = build_detector(recipe.detector, num_classes=len(model.classes), pretrained=False).double().eval()
    assert isinstance(detector, Detector)
    key_map = model.key_map(recipe)
    converted = key_map.to_ours(model.tensors)
    assert set(converted.names) | set(converted.dropped) == set(state)
    load_into(detector, converted.state)
    return Case(
        oracle=recorded,
        recipe=recipe,
        key_map=key_map,
        head_prefix=head_prefix(state),
        detector=detector,
        names=converted.names,
        memory=memory,
        pictures=pictures_of(CASES.index(request.param)),
    )


@torch.no_grad()
def test_inference(case: Case) -> None:
    image = case.recipe.detector.image
    both, _ = case.preprocessing.batch(case.oracle, short_side=image.short_side, max_long_side=image.max_long_side)
    check_preprocessing(case, both)
    for picture in case.pictures:
        batch = only(both, picture)
        maps, levels = case.maps(batch, gradient=False)
        check_maps(case, "eval", maps, picture)
        prediction = case.head(levels)
        check_head(case, prediction, picture)
        match case.detector:
            case OneStageDetector() as detector:
                (found,) = detector.detect(prediction)
            case ProposalDetector() as detector:
                (found,) = [
                    as_detections(some)
                    for some in detector.proposals.select(prediction, detector.proposals.test_filter)
                ]
            case TwoStageDetector() as detector:
                found = second_stage(case, detector, prediction, picture)
        check_detections(case.oracle, found, batch, picture)


def check_preprocessing(case: Case, batch: ImageBatch) -> None:
    for picture, size in enumerate(batch.sizes):
        pixels = batch.pixels[picture, :, : size.height, : size.width].flip(0)
        case.oracle.check(f"eval/pre/resized_uint8_bgr/{picture}", pixels, rtol=0)
    case.oracle.check("eval/pre/tensor", case.detector.normalizer(batch))
    padded = [[*size, *(-(-side // 32) * 32 for side in size)] for size in batch.sizes]
    case.oracle.check("eval/pre/img_shape_pad_shape_hw", torch.tensor(padded), rtol=0)
    factors = [
        [size.width / original.width, size.height / original.height]
        for size, original in zip(batch.sizes, batch.original_sizes, strict=True)
    ]
    case.oracle.check("eval/pre/scale_factor_wh", torch.tensor(factors, dtype=torch.float64))


def check_maps(case: Case, stage: str, maps: Maps, first: int) -> None:
    """Of the recorded pictures from `first` on."""
    for kind, found in (("body", maps.body), ("feature", maps.pyramid)):
        for level, x in enumerate(found):
            if f"{stage}/{kind}/{level}" in case.oracle.manifest["arrays"]:
                case.oracle.check_rows(f"{stage}/{kind}/{level}", x, first)


def check_head(case: Case, prediction: DensePrediction, picture: int) -> None:
    head = f"eval/{case.head_prefix}"
    for level in range(len(prediction.classes)):
        case.oracle.check_rows(f"{head}/cls/{level}", prediction.classes[level], picture)
        case.oracle.check_rows(f"{head}/reg/{level}", recorded_boxes(case.head, prediction, level), picture)
        if prediction.quality:
            case.oracle.check_rows(f"{head}/centerness/{level}", prediction.quality[level], picture)
    for level, priors in enumerate(priors_of(case.head, prediction)):
        case.oracle.check(f"eval/priors/{level}", priors)


def recorded_boxes(head: AbstractDenseHead, prediction: DensePrediction, level: int) -> Tensor:
    """FCOS's recorded maps are distances already."""
    raw = prediction.boxes[level]
    return head.to_pixels(raw, prediction.levels.shapes[level].stride_px) if isinstance(head, FCOSHead) else raw


def priors_of(head: AbstractDenseHead, prediction: DensePrediction) -> list[Tensor]:
    match head:
        case RPNHead() | RetinaNetHead():
            return head.make_anchors(prediction)
        case FCOSHead():
            return head.make_points(prediction)
        case ATSSHead() | GFLHead():
            return priors_on(head.anchors, prediction.levels, like=prediction.boxes[0])
    raise AssertionError(type(head))


def second_stage(case: Case, detector: TwoStageDetector, prediction: DensePrediction, picture: int) -> Detections:
    oracle, levels = case.oracle, prediction.levels
    assert isinstance(detector.proposals, ProposalStage)
    (found,) = detector.proposals.select(prediction, detector.proposals.test_filter)
    assert found.scores is not None
    oracle.check(f"eval/proposals/{picture}/boxes", found.boxes_xyxy)
    oracle.check(f"eval/proposals/{picture}/scores", found.scores)
    roi = detector.roi
    if isinstance(roi, RoIStage):
        logits, deltas = check_regions(case, "eval/roi", roi, levels, found.boxes_xyxy, picture)
        return roi.detect(logits, deltas, [found.boxes_xyxy], levels.image_sizes)[0]
    assert isinstance(roi, CascadeStage)
    boxes, all_logits, deltas = found.boxes_xyxy, [], torch.empty(0)
    for number, stage in enumerate(roi.chain):
        if number:
            (boxes,) = roi.chain[number - 1].refine(all_logits[-1], deltas, [boxes], levels.image_sizes)
        logits, deltas = check_regions(case, f"eval/roi/stage{number}", stage, levels, boxes, picture)
        all_logits.append(logits)
    return roi.chain[-1].detect_scored(roi.mean_scores(all_logits), deltas, [boxes], levels.image_sizes)[0]


def check_regions(
    case: Case, name: str, stage: RoIStage, levels: Levels, boxes: Tensor, picture: int
) -> tuple[Tensor, Tensor]:
    """Those of both pictures were recorded one after the other."""
    first = picture * len(boxes)
    pooled = stage.pooling(levels, [boxes])
    case.oracle.check_rows(f"{name}/pooled", pooled, first)
    logits, deltas = stage.predictor(stage.box_head(pooled))
    case.oracle.check_rows(f"{name}/class_logits", logits, first)
    case.oracle.check_rows(f"{name}/box_deltas", deltas.flatten(1), first)
    if picture == 0:
        case.oracle.check(f"{name}/box_deltas_first50", deltas[:50].flatten(1))
    return logits, deltas


def as_detections(found: Proposals) -> Detections:
    assert found.scores is not None
    labels = torch.zeros(len(found.scores), dtype=torch.int64)
    return Detections(boxes_xyxy=found.boxes_xyxy, scores=found.scores, labels=labels)


@pytest.mark.parametrize("stage", TRAIN_STAGES)
def test_training(case: Case, stage: str) -> None:
    oracle = case.oracle
    maps, prediction = case.training
    _, targets = case.train_batch(stage)
    oracle.check(f"{stage}/pre/tensor", maps.pixels)
    for picture, target in enumerate(targets):
        oracle.check(f"{stage}/pre/gt_boxes/{picture}", target.boxes_xyxy)
    check_assignment(case, stage, prediction, targets)
    losses = losses_of(case, stage, prediction, targets)
    check_losses(case, stage, losses)
    if stage == "train":
        check_gradients(case.oracle, case.detector, case.key_map, case.names, maps, losses)


def losses_of(case: Case, stage: str, prediction: DensePrediction, targets: Sequence[Target]) -> Losses:
    """As the detectors make them, but for what was computed before; regions checked on the way."""
    if isinstance(case.detector, OneStageDetector):
        return case.head.loss(prediction, targets)
    agnostic = [replace(target, labels=torch.zeros_like(target.labels)) for target in targets]
    losses = {f"rpn_{name}": value for name, value in case.head.loss(prediction, agnostic).items()}
    if isinstance(case.detector, ProposalDetector):
        return losses
    first, roi = case.detector.proposals, case.detector.roi
    assert isinstance(first, ProposalStage)
    found = first.select(prediction, first.train_filter)
    stage_0 = roi.chain[0] if isinstance(roi, CascadeStage) else roi
    assert isinstance(stage_0, RoIStage)
    for picture, target in enumerate(targets):
        check_sample(case, f"{stage}/roi/stage0/{picture}", stage_0.sample(found[picture], target))
    return losses | roi.loss(prediction.levels, found, targets)


def check_assignment(case: Case, stage: str, prediction: DensePrediction, targets: Sequence[Target]) -> None:
    head, levels = case.head, prediction.levels
    by_level = priors_of(head, prediction)
    priors = torch.cat(by_level)
    match head:
        case RPNHead() | RetinaNetHead():
            sizes = zip(targets, levels.image_sizes, strict=True)
            matches = [head.match(priors, target, size, levels.shapes) for target, size in sizes]
        case FCOSHead():
            matches = [head.match(by_level, levels.shapes, target) for target in targets]
        case ATSSHead() | GFLHead():
            matches = match_batch(head.matcher, by_level, levels, targets, head.size_divisor_px)
        case _:
            raise AssertionError(type(head))
    for picture, (found, target) in enumerate(zip(matches, targets, strict=True)):
        name = f"{stage}/assign/{{}}/{picture}".format
        positive = found.positive.nonzero().flatten()
        case.oracle.check(name("positive_index"), positive, rtol=0)
        counts = [len(positive), int(found.negative.sum())]
        truth = target.boxes_xyxy[found.gt_index[positive]]
        labels = target.labels[found.gt_index[positive]]
        if not isinstance(case.detector, OneStageDetector):
            labels = torch.zeros_like(labels)
        case.oracle.check(name("positive_labels"), labels, rtol=0)
        if isinstance(head, FCOSHead):
            case.oracle.check(name("num_pos_neg"), torch.tensor(counts), rtol=0)
            case.oracle.check(name("positive_ltrb_targets"), head.coder.encode(truth, priors[positive]))
            continue
        counts.append(len(priors) - sum(counts))
        case.oracle.check(name("num_pos_neg_ignored"), torch.tensor(counts), rtol=0)
        if isinstance(head, RPNHead | RetinaNetHead):
            truth = head.coder.encode(truth, priors[positive])
        case.oracle.check(name("positive_bbox_targets"), truth)


def check_sample(case: Case, name: str, regions: SampledRegions) -> None:
    """MMDetection lists positives, the truth first, then negatives; we keep the order of the proposals."""
    oracle = case.oracle
    positive = regions.labels < 80
    expected = oracle.full(f"{name}/pos_priors"), oracle.full(f"{name}/neg_priors")
    for found, recorded in zip((regions.boxes_xyxy[positive], regions.boxes_xyxy[~positive]), expected, strict=True):
        torch.testing.assert_close(in_order(found), in_order(recorded), rtol=1e-6, atol=1e-6)
    labels = regions.labels[positive].sort().values
    assert labels.tolist() == oracle.full(f"{name}/pos_gt_labels").sort().values.tolist()


def in_order(boxes: Tensor) -> Tensor:
    """Rows sorted by what they are, to the thousandth of a pixel."""
    return boxes[torch.from_numpy(np.lexsort(boxes.mul(1e3).round().numpy().T))]


# Ours and theirs; theirs are by level where `levelN` follows.
TERMS = {
    "rpn_classification": ("loss_rpn_cls", "rpn_loss_cls"),
    "rpn_box": ("loss_rpn_bbox", "rpn_loss_bbox"),
    "rpn_centerness": ("rpn_loss_centerness",),
    "roi_classification": ("loss_cls",),
    "roi_box": ("loss_bbox",),
    "classification": ("loss_cls",),
    "box": ("loss_bbox",),
    "centerness": ("loss_centerness",),
    "distribution": ("loss_dfl",),
    **{f"roi{number + 1}_classification": (f"s{number}.loss_cls",) for number in range(3)},
    **{f"roi{number + 1}_box": (f"s{number}.loss_bbox",) for number in range(3)},
}


def check_losses(case: Case, stage: str, losses: Losses) -> None:
    recorded = case.oracle.manifest["arrays"]
    used = set()
    for ours, value in losses.items():
        names = [
            name
            for theirs in TERMS[ours]
            for name in recorded
            if name == f"{stage}/loss/{theirs}" or name.startswith(f"{stage}/loss/{theirs}/level")
        ]
        used |= set(names)
        expected = sum(float(case.oracle.full(name)) for name in names)
        assert float(value.detach()) == pytest.approx(expected, rel=1e-6), ours
    rest = {name for name in recorded if name.startswith(f"{stage}/loss/")} - used
    assert not [name for name in rest if not name.endswith("acc")]
    assert float(sum(value.detach() for value in losses.values())) == pytest.approx(
        float(case.oracle.full(f"{stage}/loss_total")), rel=1e-6
    )
