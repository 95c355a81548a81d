"""detectron2's Faster R-CNN on C4, stage by stage in float64, through the converter, from the recorded picture.

The last stage of the ResNet runs on each region, 1.5 GFLOP each: it is compared on the first regions of the inference,
and the losses of the training are. RCNN_PARITY=full takes all 1000 regions, the detections, and the gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from oracle import Oracle
from recorded import FULL, MapMemory, check_detections, check_losses, give_memory_back, only
from test_detectron2 import (
    TERMS,
    Case,
    check_assignment,
    check_head,
    check_preprocessing,
    check_proposals,
    preprocessing_of,
    recorded_case,
    two_stage_losses,
)
from torch import Tensor

from rcnn.detectors.two_stage import TwoStageDetector
from rcnn.recipes.detectron2_catalogue import faster_rcnn_resnet50_c4
from rcnn.records import ImageBatch, Levels, Target
from rcnn.roi.res5_head import Res5Head
from rcnn.roi.stage import RoIStage

pytestmark = pytest.mark.xdist_group("parity with detectron2 and torchvision")
# So many regions at a time: a batch of all would take 4 GB. Of fewer than 50, numbers may not have been recorded.
REGIONS = 50 if FULL else 16


@pytest.fixture(scope="module")
def case(oracle: Callable[[str], Oracle], memory: MapMemory) -> Iterator[Case]:
    give_memory_back()
    found = recorded_case(oracle("detectron2/faster_rcnn_R_50_C4_1x"), memory, (0,))
    assert found.recipe == faster_rcnn_resnet50_c4()
    yield found
    give_memory_back()


def batch_of(case: Case, short_side: int, max_long_side: int) -> tuple[ImageBatch, list[Target]]:
    """The first picture, which is the one that was recorded; without padding."""
    both, targets = preprocessing_of(case.recipe).batch(case.oracle, short_side=short_side, max_long_side=max_long_side)
    batch, size = only(both, 0), both.sizes[0]
    return replace(batch, pixels=batch.pixels[..., : size.height, : size.width]), targets[:1]


@torch.no_grad()
def test_inference(case: Case) -> None:
    oracle, detector, image = case.oracle, case.detector, case.recipe.detector.image
    assert isinstance(detector, TwoStageDetector)
    batch, _ = batch_of(case, image.short_side, image.max_long_side)
    check_preprocessing(case, batch)
    levels = detector.features(batch)
    oracle.check("eval/feature/res4", levels.maps[0])
    prediction = case.head(levels)
    check_head(case, prediction, 0, ("rpn/objectness", "rpn/deltas"))
    boxes = check_proposals(oracle, detector, prediction, 0)
    logits, deltas = check_regions(case, detector.roi, levels, boxes if FULL else boxes[:REGIONS])
    if FULL:
        assert isinstance(detector.roi, RoIStage)
        check_detections(oracle, detector.roi.detect(logits, deltas, [boxes], levels.image_sizes)[0], batch, 0)


def check_regions(case: Case, roi: object, levels: Levels, boxes: Tensor) -> tuple[Tensor, Tensor]:
    assert isinstance(roi, RoIStage)
    assert isinstance(roi.box_head, Res5Head)
    all_logits, all_deltas = [], []
    for first in range(0, len(boxes), REGIONS):
        pooled = roi.pooling(levels, [boxes[first : first + REGIONS]])
        case.oracle.check_rows("eval/roi/pooled", pooled, first)
        maps = roi.box_head.layer4(pooled)
        case.oracle.check_rows("eval/roi/box_head", maps, first)
        logits, deltas = roi.predictor(maps.mean((2, 3)))
        all_logits.append(logits)
        all_deltas.append(deltas)
    logits, deltas = torch.cat(all_logits), torch.cat(all_deltas)
    case.oracle.check_rows("eval/roi/class_logits", logits, 0)
    case.oracle.check_rows("eval/roi/box_deltas", deltas.flatten(1), 0)
    case.oracle.check_rows("eval/roi/box_deltas_first50", deltas[:50].flatten(1), 0)
    return logits, deltas


def test_training(case: Case) -> None:
    oracle, detector = case.oracle, case.detector
    assert isinstance(detector, TwoStageDetector)
    assert isinstance(detector.roi, RoIStage)
    overrides = oracle.manifest["train_overrides"]
    batch, targets = batch_of(case, overrides["min_size"], overrides["max_size"])
    oracle.check("train/pre/tensor", detector.normalizer(batch))
    oracle.check("train/pre/image_sizes_hw", torch.tensor(batch.sizes), rtol=0)
    # The recording has 100 proposals where the other cases have 500.
    detector.proposals.train_filter = replace(detector.proposals.train_filter, post_nms=100)  # type: ignore[union-attr]
    with torch.set_grad_enabled(FULL):
        prediction = case.head(detector.features(batch))
        check_assignment(case, "train", batch, targets, prediction)
        losses = two_stage_losses(case, "train", case.head, prediction, targets)
    check_losses(oracle, "train", losses, TERMS)
    if FULL:
        check_all_gradients(case, torch.stack(list(losses.values())).sum())


def check_all_gradients(case: Case, total: Tensor) -> None:
    recorded = [name.removeprefix("train/grad/") for name in case.oracle.manifest["arrays"] if "/grad/" in name]
    parameters, names = dict(case.detector.named_parameters()), case.converted.names
    found = torch.autograd.grad(total, [parameters[names[name]] for name in recorded])
    ours = {names[name]: value for name, value in zip(recorded, found, strict=True)}
    for name, gradient in case.key_map.to_theirs(ours).items():
        case.oracle.check(f"train/grad/{name}", gradient)
        case.oracle.check(f"train/grad_norm/{name}", gradient.norm())
