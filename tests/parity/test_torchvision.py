"""torchvision's Faster R-CNN models, stage by stage in float64, from checkpoints rebuilt under its key names."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from oracle import Oracle
from PIL import Image
from torch import Tensor

from rcnn.config.edit import edit
from rcnn.converters.torchvision import convert
from rcnn.dense.interface import DensePrediction
from rcnn.detectors.two_stage import TwoStageDetector
from rcnn.engine.checkpoint import load_into
from rcnn.matching.sampling import EverySampler
from rcnn.recipes.models import build_detector
from rcnn.recipes.recipe import Recipe
from rcnn.records import ImageBatch, Levels, Size, Target
from rcnn.transforms.batching import Sample, collate
from rcnn.transforms.geometry import EvalTransform, Resize

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


@dataclass(frozen=True)
class Case:
    oracle: Oracle
    recipe: Recipe
    detector: TwoStageDetector

    def sample(self, name: str, boxes: bool, short_side: int, max_long_side: int) -> Sample:
        """A recorded picture in float64, resized as the recipe says."""
        file = {"coffee": "coffee_480x320.png", "astronaut": "astronaut_300x360.png"}[name]
        pixels = torch.from_numpy(np.array(Image.open(self.oracle.inputs / file).convert("RGB"))).permute(2, 0, 1)
        truth = json.loads((self.oracle.inputs / "ground_truth.json").read_text())[name]
        target = Target(
            boxes_xyxy=torch.tensor(truth["boxes"] if boxes else [], dtype=torch.float64).reshape(-1, 4),
            labels=torch.tensor(truth["coco91"] if boxes else [], dtype=torch.int64) - 1,
            ignore_xyxy=torch.zeros(0, 4, dtype=torch.float64),
        )
        image = self.recipe.detector.image
        resize = Resize(
            short_sides=(short_side,), max_long_side=max_long_side, rounding=image.rounding, kernel=image.kernel
        )
        resized, target = EvalTransform(resize=resize)(pixels.double(), target)
        return Sample(image=resized, target=target, original_size=Size(*pixels.shape[-2:]), image_id=0)

    def batch(
        self, short_side: int, max_long_side: int, *, boxes: tuple[bool, bool] = (True, True)
    ) -> tuple[ImageBatch, list[Target]]:
        samples = [
            self.sample(name, has_boxes, short_side, max_long_side)
            for name, has_boxes in zip(("coffee", "astronaut"), boxes, strict=True)
        ]
        return collate(samples, divisor=self.recipe.detector.image.divisor)


@pytest.fixture(scope="module", params=list(CASES))
def case(request: pytest.FixtureRequest, oracle: Callable[[str], Oracle]) -> Case:
    recorded = oracle(f"torchvision/{request.param}")
    recipe, classes, converted = convert(recorded.state_dict(), overrides=CASES[request.param])
    assert set(converted.names) | set(converted.dropped) == set(recorded.state_dict())
    assert len(classes) == 90
    detector = build_detector(recipe.detector, num_classes=len(classes), pretrained=False).double()
    load_into(detector, converted.state)
    return Case(oracle=recorded, recipe=recipe, detector=detector.eval())


def check_pyramid(case: Case, detector: TwoStageDetector, stage: str, batch: ImageBatch) -> Levels:
    """The pyramid, each step checked where it was recorded."""
    oracle = case.oracle
    pixels = detector.normalizer(batch)
    oracle.check(f"{stage}/pre/tensor", pixels)
    oracle.check(f"{stage}/pre/image_sizes_hw", torch.tensor(batch.sizes))
    body = detector.backbone(pixels)
    for index, x in enumerate(body):
        if f"{stage}/body/{index}" in oracle.manifest["arrays"]:
            oracle.check(f"{stage}/body/{index}", x)
    levels = detector.levels(detector.neck(body), batch)
    for name, x in zip((*map(str, range(len(levels.maps) - 1)), "pool"), levels.maps, strict=True):
        if f"{stage}/feature/{name}" in oracle.manifest["arrays"]:
            oracle.check(f"{stage}/feature/{name}", x)
    return levels


def from_ours(logits: Tensor, deltas: Tensor) -> tuple[Tensor, Tensor]:
    """Our logits and deltas in torchvision's layout: background first, four unused numbers for it."""
    flat = deltas.flatten(1)
    return torch.cat((logits[:, -1:], logits[:, :-1]), dim=1), torch.cat((torch.zeros_like(flat[:, :4]), flat), dim=1)


def test_every_stage_of_inference_agrees(case: Case) -> None:
    oracle, detector = case.oracle, case.detector
    image = case.recipe.detector.image
    with torch.no_grad():
        batch, _ = case.batch(image.short_side, image.max_long_side)
        levels = check_pyramid(case, detector, "eval", batch)
        prediction = detector.proposals.head(levels)
        anchors = detector.proposals.head.make_anchors(prediction)
        for level, (logits, deltas) in enumerate(zip(prediction.classes, prediction.boxes, strict=True)):
            oracle.check(f"eval/rpn/objectness/{level}", logits)
            oracle.check(f"eval/rpn/deltas/{level}", deltas)
            # Recorded for the whole batch: each picture has the same anchors.
            oracle.check(f"eval/anchors/{level}", anchors[level])
        proposals = detector.proposals.select(prediction, detector.proposals.test_filter)
        for index, found in enumerate(proposals):
            oracle.check(f"eval/proposals/{index}/boxes", found.boxes_xyxy)
            oracle.check(f"eval/proposals/{index}/scores", found.scores)
        boxes = [found.boxes_xyxy for found in proposals]
        pooled = detector.roi.pooling(levels, boxes)
        oracle.check("eval/roi/pooled", pooled)
        features = detector.roi.box_head(pooled)
        oracle.check("eval/roi/box_head", features)
        logits, deltas = detector.roi.predictor(features)
        class_logits, box_deltas = from_ours(logits, deltas)
        oracle.check("eval/roi/class_logits", class_logits)
        first = oracle.full("eval/roi/box_deltas_first50")[:, 4:]
        torch.testing.assert_close(box_deltas[:50, 4:], first, rtol=1e-6, atol=1e-6)
        detections = detector.roi.detect(logits, deltas, boxes, batch.sizes)
    for index, found in enumerate(detections):
        height, width = batch.original_sizes[index]
        ratio = torch.tensor([width, height] * 2) / torch.tensor(list(batch.sizes[index])[::-1] * 2)
        oracle.check(f"eval/detections/{index}/boxes", found.boxes_xyxy * ratio)
        oracle.check(f"eval/detections/{index}/scores", found.scores)
        oracle.check(f"eval/detections/{index}/labels", found.labels + 1)


TRAIN_STAGES = {"train": (True, True), "train_empty": (True, False)}
TERMS = {
    "loss_classifier": "roi_classification",
    "loss_box_reg": "roi_box",
    "loss_objectness": "rpn_classification",
    "loss_rpn_box_reg": "rpn_box",
}


@pytest.mark.parametrize("stage", TRAIN_STAGES)
def test_every_loss_and_gradient_agrees(case: Case, stage: str) -> None:
    oracle = case.oracle
    overrides = oracle.manifest["train_overrides"]
    detector = build_detector(
        edit(
            case.recipe,
            {
                "detector.proposals.train.post_nms": overrides["rpn_post_nms_top_n_train"],
                "detector.proposals.head.sampler": {"type": "every"},
                "detector.roi.sampler": {"type": "every"},
            },
        ).detector,
        num_classes=90,
        pretrained=False,
    ).double()
    load_into(detector, case.detector.state_dict())
    detector.train()
    assert isinstance(detector.proposals.head.sampler, EverySampler)
    batch, targets = case.batch(overrides["min_size"], overrides["max_size"], boxes=TRAIN_STAGES[stage])
    levels = check_pyramid(case, detector, stage, batch)
    losses, proposals = detector.proposals.loss(levels, targets)
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
        oracle.check(f"{stage}/proposals/{index}/boxes", proposals[index].boxes_xyxy)
        oracle.check(f"{stage}/proposals/{index}/scores", proposals[index].scores)
        regions = detector.roi.sample(proposals[index], target)
        oracle.check(f"{stage}/roi/sampled_boxes/{index}", regions.boxes_xyxy)
        oracle.check(f"{stage}/roi/labels/{index}", (regions.labels + 1) % 91)
    losses |= detector.roi.loss(levels, proposals, targets)
    for theirs, ours in TERMS.items():
        recorded = float(oracle.full(f"{stage}/loss/{theirs}"))
        assert float(losses[ours].detach()) == pytest.approx(recorded, rel=1e-6), ours
    if stage == "train":
        sum(losses.values()).backward()
        check_gradients(case, detector)


def check_gradients(case: Case, detector: TwoStageDetector) -> None:
    """Every recorded gradient, its norm and its samples, under our names."""
    _, _, converted = convert(case.oracle.state_dict(), overrides={})
    parameters = dict(detector.named_parameters())
    recorded = [name for name in case.oracle.manifest["arrays"] if name.startswith("train/grad/")]
    assert recorded
    for name in recorded:
        theirs = name.removeprefix("train/grad/")
        gradient = parameters[converted.names[theirs]].grad
        assert gradient is not None, name
        if theirs.startswith("roi_heads.box_predictor.bbox_pred"):
            gradient = torch.cat((torch.zeros_like(gradient[:4]), gradient))
        if theirs.startswith("roi_heads.box_predictor.cls_score"):
            gradient = torch.cat((gradient[-1:], gradient[:-1]))
        case.oracle.check(name, gradient)
        case.oracle.check(f"train/grad_norm/{theirs}", gradient.norm())
