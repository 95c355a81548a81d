"""The shapes that docs/walk-through.md states are those of the code."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from rcnn.detectors.two_stage import TwoStageDetector
from rcnn.recipes.catalogue import faster_rcnn_resnet50_fpn
from rcnn.recipes.models import build_detector
from rcnn.records import ImageBatch, Size
from rcnn.transforms.batching import Sample, collate
from rcnn.transforms.geometry import EvalTransform, Resize, no_target

PAGE = (Path(__file__).parents[1] / "docs" / "walk-through.md").read_text()


def stated(step: str) -> list[list[int]]:
    """The shapes in the row of a step."""
    row = next(line for line in PAGE.splitlines() if line.startswith(f"| {step} |"))
    return [[int(number) for number in shape.split(",")] for shape in re.findall(r"`\[([\d, ]+)\]", row)]


def test_every_stated_shape_is_the_codes() -> None:
    torch.manual_seed(0)  # with other weights NMS may leave fewer than 1000 proposals
    recipe = faster_rcnn_resnet50_fpn()
    image = recipe.detector.image
    resize = Resize(short_sides=(image.short_side,), max_long_side=image.max_long_side, rounding=image.rounding)
    picture, target = EvalTransform(resize=resize)(torch.zeros(3, 333, 500, dtype=torch.uint8), no_target())
    assert picture.shape[-2:] == (800, 1201)
    sample = Sample(image=picture, target=target, original_size=Size(333, 500), image_id=0)
    batch, _ = collate([sample], divisor=image.divisor)
    assert [list(batch.pixels.shape)] == stated("batch")
    detector = build_detector(recipe.detector, num_classes=20, pretrained=False).eval()
    with torch.no_grad():
        check_stages(detector, batch)


def check_stages(detector: TwoStageDetector, batch: ImageBatch) -> None:
    pixels = detector.normalizer(batch)
    assert [list(pixels.shape)] == stated("normalise")
    body = detector.backbone(pixels)
    assert [list(x.shape) for x in body] == stated("backbone")
    levels = detector.levels(detector.neck(body), batch)
    assert [list(x.shape) for x in levels.maps] == stated("neck")
    prediction = detector.proposals.head(levels)
    counts = [len(anchors) for anchors in detector.proposals.head.make_anchors(prediction)]
    row = next(line for line in PAGE.splitlines() if line.startswith("| anchors |"))
    assert " + ".join(f"{count:,}" for count in counts) in row
    candidates = detector.proposals.head.decode(prediction, per_level=1000, score_threshold=0.0)[0]
    assert [list(candidates.boxes_xyxy.shape)] == stated("candidates")
    proposals = detector.proposals.select(prediction, detector.proposals.test_filter)[0]
    assert [list(proposals.boxes_xyxy.shape)] == stated("proposals")
    pooled = detector.roi.pooling(levels, [proposals.boxes_xyxy])
    assert [list(pooled.shape)] == stated("pooling")
    features = detector.roi.box_head(pooled)
    assert [list(features.shape)] == stated("box head")
    logits, deltas = detector.roi.predictor(features)
    assert [list(logits.shape), list(deltas.shape)] == stated("predictor")
