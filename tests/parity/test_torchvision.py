"""torchvision's Faster R-CNN models, stage by stage in float64, from checkpoints rebuilt under its key names.

Inference at the full size is compared on one of the two pictures, padded as in the batch; RCNN_PARITY=full takes both.
Training is compared on both; the gradients of v2's backbone with RCNN_PARITY=full.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import pytest
import torch
from oracle import Oracle
from recorded import FULL, TRAIN_STAGES, Preprocessing, check_detections, only, pictures_of
from torch import Tensor

from rcnn.config.edit import edit
from rcnn.converters.torchvision import convert
from rcnn.dense.interface import DensePrediction
from rcnn.detectors.two_stage import TwoStageDetector
from rcnn.engine.checkpoint import load_into
from rcnn.matching.sampling import EverySampler
from rcnn.recipes.models import build_detector
from rcnn.recipes.recipe import Recipe
from rcnn.records import ImageBatch, Levels, Proposals, Target
from rcnn.roi.box_head import ConvFCHead

# What the keys of a file cannot tell.
CASES: Mapping[str, Mapping[str, object]] = {
    "fasterrcnn_resnet50_fpn": {"detector.backbone.norm_eps": 0.0},
    "fasterrcnn_resnet50_fpn_v2": {},
    "fasterrcnn_mobilenet_v3_large_320_fpn": {
        "detector.image.short_side": 320,
        "detector.image.max_long_side": 640,
        "detector.proposals.test": {"pre_nms": 150, "post_nms": 150},
    },
}


@dataclass
class Case:
    """A detector with the recorded weights, and the pyramid that both stages of the training begin at."""

    oracle: Oracle
    recipe: Recipe
    detector: TwoStageDetector
    pictures: Sequence[int]
    trains_backbone: bool
    """Whether the gradients of the backbone are compared."""

    def batch(
        self, short_side: int, max_long_side: int, *, boxes: Sequence[bool] = (True, True)
    ) -> tuple[ImageBatch, list[Target]]:
        """Both pictures in float64, resized as the recipe says, labels from 0."""
        image = self.recipe.detector.image
        as_torchvision = Preprocessing(
            rounding=image.rounding, kernel=image.kernel, labels="coco91", pixels=torch.float64
        )
        batch, targets = as_torchvision.batch(
            self.oracle, short_side=short_side, max_long_side=max_long_side, boxes=boxes
        )
        return batch, [replace(target, labels=target.labels - 1) for target in targets]

    def train_batch(self, stage: str) -> tuple[ImageBatch, list[Target]]:
        overrides = self.oracle.manifest["train_overrides"]
        return self.batch(overrides["min_size"], overrides["max_size"], boxes=TRAIN_STAGES[stage])

    @cached_property
    def training(self) -> tuple[TwoStageDetector, Levels]:
        """The detector in training mode and its pyramid of both pictures, with a graph. The truth does not matter."""
        overrides = self.oracle.manifest["train_overrides"]
        changes = {
            "detector.proposals.train.post_nms": overrides["rpn_post_nms_top_n_train"],
            "detector.proposals.head.sampler": {"type": "every"},
            "detector.roi.sampler": {"type": "every"},
        }
        spec = edit(self.recipe, changes).detector
        detector = build_detector(spec, num_classes=90, pretrained=False).double()
        assert isinstance(detector, TwoStageDetector)
        assert isinstance(detector.proposals.head.sampler, EverySampler)
        load_into(detector, self.detector.state_dict())
        batch, _ = self.train_batch("train")
        return detector, check_pyramid(
            self.oracle, detector.train(), "train", batch, (0, 1), trains_backbone=self.trains_backbone
        )


# A case's tests in one process: its training is shared.
@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.xdist_group(f"parity with {name}")) for name in CASES],
)
def case(request: pytest.FixtureRequest, oracle: Callable[[str], Oracle]) -> Case:
    recorded = oracle(f"torchvision/{request.param}")
    state = recorded.state_dict()
    recipe, classes, converted = convert(state, overrides=CASES[request.param])
    assert set(converted.names) | set(converted.dropped) == set(state)
    assert len(classes) == 90
    detector = build_detector(recipe.detector, num_classes=len(classes), pretrained=False).double()
    load_into(detector, converted.state)
    small = recipe.detector.image.short_side < 400
    pictures = (0, 1) if small else pictures_of(list(CASES).index(request.param))
    # One ResNet-50's are enough, and v2 takes long as it is.
    trains_backbone = FULL or not request.param.endswith("v2")
    return Case(recorded, recipe, detector.eval(), pictures, trains_backbone)


def check_pyramid(
    oracle: Oracle,
    detector: TwoStageDetector,
    stage: str,
    batch: ImageBatch,
    pictures: Sequence[int],
    *,
    trains_backbone: bool = True,
) -> Levels:
    """The pyramid of some of the recorded pictures, one after the other, each step checked where it was recorded."""

    def check(name: str, x: Tensor) -> None:
        if f"{stage}/{name}" in oracle.manifest["arrays"]:
            oracle.check_rows(f"{stage}/{name}", x, pictures[0])

    pixels = detector.normalizer(batch)
    check("pre/tensor", pixels)
    check("pre/image_sizes_hw", torch.tensor(batch.sizes))
    with torch.set_grad_enabled(trains_backbone and torch.is_grad_enabled()):
        body = detector.backbone(pixels)
    for index, x in enumerate(body):
        check(f"body/{index}", x)
    levels = detector.levels(detector.neck(body), batch)
    for name, x in zip((*map(str, range(len(levels.maps) - 1)), "pool"), levels.maps, strict=True):
        check(f"feature/{name}", x)
    return levels


def from_ours(logits: Tensor, deltas: Tensor) -> tuple[Tensor, Tensor]:
    """Our logits and deltas in torchvision's layout: background first, four unused numbers for it."""
    flat = deltas.flatten(1)
    return torch.cat((logits[:, -1:], logits[:, :-1]), dim=1), torch.cat((torch.zeros_like(flat[:, :4]), flat), dim=1)


@torch.no_grad()
def test_every_stage_of_inference_agrees(case: Case) -> None:
    image = case.recipe.detector.image
    both, _ = case.batch(image.short_side, image.max_long_side)
    for picture in case.pictures:
        check_inference(case, only(both, picture), picture)


def check_inference(case: Case, batch: ImageBatch, picture: int) -> None:
    oracle, detector = case.oracle, case.detector
    levels = check_pyramid(oracle, detector, "eval", batch, (picture,))
    prediction = detector.proposals.head(levels)
    anchors = detector.proposals.head.make_anchors(prediction)
    for level, (logits, deltas) in enumerate(zip(prediction.classes, prediction.boxes, strict=True)):
        oracle.check_rows(f"eval/rpn/objectness/{level}", logits, picture)
        oracle.check_rows(f"eval/rpn/deltas/{level}", deltas, picture)
        # Recorded for the whole batch: each picture has the same anchors.
        oracle.check(f"eval/anchors/{level}", anchors[level])
    (proposals,) = detector.proposals.select(prediction, detector.proposals.test_filter)
    oracle.check(f"eval/proposals/{picture}/boxes", proposals.boxes_xyxy)
    oracle.check(f"eval/proposals/{picture}/scores", proposals.scores)
    # Those of all pictures, one after the other.
    first = sum(oracle.manifest["arrays"][f"eval/proposals/{before}/scores"]["shape"][0] for before in range(picture))
    pooled = detector.roi.pooling(levels, [proposals.boxes_xyxy])
    oracle.check_rows("eval/roi/pooled", pooled, first)
    features = detector.roi.box_head(pooled)
    oracle.check_rows("eval/roi/box_head", features, first)
    logits, deltas = detector.roi.predictor(features)
    class_logits, box_deltas = from_ours(logits, deltas)
    oracle.check_rows("eval/roi/class_logits", class_logits, first)
    if first == 0:
        recorded = oracle.full("eval/roi/box_deltas_first50")[:, 4:]
        torch.testing.assert_close(box_deltas[:50, 4:], recorded, rtol=1e-6, atol=1e-6)
    (found,) = detector.roi.detect(logits, deltas, [proposals.boxes_xyxy], batch.sizes)
    check_detections(oracle, replace(found, labels=found.labels + 1), batch, picture)


# Ours and theirs.
TERMS = {
    "roi_classification": "loss_classifier",
    "roi_box": "loss_box_reg",
    "rpn_classification": "loss_objectness",
    "rpn_box": "loss_rpn_box_reg",
}


@pytest.mark.parametrize("stage", TRAIN_STAGES)
def test_every_loss_and_gradient_agrees(case: Case, stage: str) -> None:
    oracle = case.oracle
    detector, levels = case.training
    batch, targets = case.train_batch(stage)
    oracle.check(f"{stage}/pre/tensor", detector.normalizer(batch))
    # Without a graph where none is asked for.
    with torch.set_grad_enabled(stage == "train"):
        losses, proposals = detector.proposals.loss(levels, targets)
        # v2's convolutions take ten seconds, and what has no boxes comes to them as to any other head.
        if FULL or stage == "train" or not isinstance(detector.roi.box_head, ConvFCHead):
            losses |= check_second_stage(case, stage, proposals, targets)
    prediction = DensePrediction(classes=(), boxes=levels.maps, levels=levels)
    anchors = torch.cat(detector.proposals.head.make_anchors(prediction))
    for index, target in enumerate(targets):
        oracle.check(f"{stage}/pre/gt_boxes/{index}", target.boxes_xyxy)
        matches = detector.proposals.head.match(anchors, target, batch.sizes[index])
        positive = matches.positive.nonzero().flatten()
        counts = [len(positive), int(matches.negative.sum())]
        counts.append(len(anchors) - sum(counts))
        oracle.check(f"{stage}/rpn/num_pos_neg_ignored/{index}", torch.tensor(counts))
        oracle.check(f"{stage}/rpn/positive_anchor_index/{index}", positive)
    for ours, value in losses.items():
        recorded = float(oracle.full(f"{stage}/loss/{TERMS[ours]}"))
        assert float(value.detach()) == pytest.approx(recorded, rel=1e-6), ours
    if stage == "train":
        assert set(losses) == set(TERMS)
        sum(losses.values()).backward()
        check_gradients(case, detector)


def check_second_stage(
    case: Case, stage: str, proposals: Sequence[Proposals], targets: Sequence[Target]
) -> Mapping[str, Tensor]:
    detector, levels = case.training
    for index, (found, target) in enumerate(zip(proposals, targets, strict=True)):
        case.oracle.check(f"{stage}/proposals/{index}/boxes", found.boxes_xyxy)
        case.oracle.check(f"{stage}/proposals/{index}/scores", found.scores)
        regions = detector.roi.sample(found, target)
        case.oracle.check(f"{stage}/roi/sampled_boxes/{index}", regions.boxes_xyxy)
        case.oracle.check(f"{stage}/roi/labels/{index}", (regions.labels + 1) % 91)
    return detector.roi.loss(levels, proposals, targets)


def check_gradients(case: Case, detector: TwoStageDetector) -> None:
    """Every recorded gradient, its norm and its samples, under our names."""
    _, _, converted = convert(case.oracle.state_dict(), overrides={})
    parameters = dict(detector.named_parameters())
    recorded = [name for name in case.oracle.manifest["arrays"] if name.startswith("train/grad/")]
    assert recorded
    for name in recorded:
        theirs = name.removeprefix("train/grad/")
        ours = converted.names[theirs]
        if ours.startswith("backbone.") and not case.trains_backbone:
            continue
        gradient = parameters[ours].grad
        assert gradient is not None, name
        if theirs.startswith("roi_heads.box_predictor.bbox_pred"):
            gradient = torch.cat((torch.zeros_like(gradient[:4]), gradient))
        if theirs.startswith("roi_heads.box_predictor.cls_score"):
            gradient = torch.cat((gradient[-1:], gradient[:-1]))
        case.oracle.check(name, gradient)
        case.oracle.check(f"train/grad_norm/{theirs}", gradient.norm())
