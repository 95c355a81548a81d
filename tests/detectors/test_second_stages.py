"""Detectors with every kind of second stage, and Fast R-CNN on given proposals."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from rcnn.backbones.norm import norm_factory
from rcnn.backbones.resnet import ResNetBackbone
from rcnn.boxes.filtering import DetectionFilter, SoftNMS
from rcnn.dense.rpn import RPNHead
from rcnn.detectors.contract import assert_is_detector
from rcnn.detectors.preparation import prepared_detector
from rcnn.detectors.two_stage import TwoStageDetector
from rcnn.errors import SetupError
from rcnn.matching.iou import IoUMatcher
from rcnn.matching.sampling import BalancedSampler, HardExampleSampler
from rcnn.necks.fpn import FPN
from rcnn.ops.losses import sigmoid_focal_loss
from rcnn.priors import AnchorGenerator
from rcnn.proposals import AbstractProposalStage, GivenProposals, ProposalFilter, ProposalStage
from rcnn.records import ImageBatch, Proposals, Size, Target
from rcnn.roi.box_head import BoxPredictor, ConvFCHead, TwoFCHead
from rcnn.roi.box_loss import DecodedBoxLoss
from rcnn.roi.cascade import CascadeStage
from rcnn.roi.classification import Classification, SigmoidClassification
from rcnn.roi.interface import AbstractRoIStage
from rcnn.roi.pooling import RoIPooling, align
from rcnn.roi.stage import RoIStage
from rcnn.transforms.batching import ImageNormalizer

K = 3
CHANNELS = 16
SIZES = (Size(64, 64), Size(40, 56))


def stage(*, classification: Classification | None = None, iou: float = 0.5, convs: bool = False, **choices: object):
    box_head = (
        ConvFCHead(in_channels=CHANNELS, pooled_size=3, make_norm=None, num_convs=1, channels=8, features=16)
        if convs
        else TwoFCHead(in_channels=CHANNELS, pooled_size=3, features=16)
    )
    return RoIStage(
        pooling=RoIPooling(output_size=3, pool=align(sampling_ratio=2, aligned=True)),
        box_head=box_head,
        predictor=BoxPredictor(
            in_features=16, num_classes=K, regression="agnostic", classification=classification, class_std=1.0
        ),
        num_classes=K,
        classification=classification,
        matcher=IoUMatcher(positive_iou=iou, negative_iou=iou),
        **choices,  # type: ignore[arg-type]
    )


def cascade(**choices: object) -> CascadeStage:
    return CascadeStage(stages=[stage(iou=iou, **choices) for iou in (0.5, 0.6, 0.7)])  # type: ignore[arg-type]


def proposal_stage() -> ProposalStage:
    chosen = ProposalFilter(pre_nms=50, post_nms=20)
    anchors = AnchorGenerator(sizes_px=tuple((float(size),) for size in (16, 32, 64, 128, 256)))
    return ProposalStage(head=RPNHead(in_channels=CHANNELS, anchors=anchors), train_filter=chosen, test_filter=chosen)


def detector(roi: AbstractRoIStage, proposals: AbstractProposalStage | None = None) -> TwoStageDetector:
    backbone = ResNetBackbone(depth=18, make_norm=norm_factory("frozen", 1e-5), style="pytorch", frozen_stages=2)
    return TwoStageDetector(
        normalizer=ImageNormalizer(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375)),
        backbone=backbone,
        neck=FPN(in_channels=backbone.channels, in_strides_px=backbone.strides_px, channels=CHANNELS),
        proposals=proposals or proposal_stage(),
        roi=roi,
    )


SIGMOID = SigmoidClassification()
FOCAL = SigmoidClassification(element_loss=partial(sigmoid_focal_loss, alpha=0.25, gamma=2.0))
STAGES = {
    "sigmoid, GIoU": partial(stage, classification=SIGMOID, box_loss=DecodedBoxLoss()),
    "focal, IoU, soft NMS": partial(
        stage,
        classification=FOCAL,
        box_loss=DecodedBoxLoss(kind="iou"),
        detection_filter=DetectionFilter(score_threshold=0.01, soft_nms=SoftNMS()),
    ),
    "hard examples, fused": partial(stage, sampler=HardExampleSampler(total=8, positive_fraction=0.25), fusion="sqrt"),
    "cascade": cascade,
    "cascade of everything": partial(
        cascade,
        classification=SIGMOID,
        box_loss=DecodedBoxLoss(),
        sampler=HardExampleSampler(total=8, positive_fraction=0.25),
        fusion="product",
        join_truth=False,
    ),
}


@pytest.mark.parametrize("name", STAGES)
def test_it_keeps_the_contract(name: str) -> None:
    torch.manual_seed(0)
    assert_is_detector(detector(STAGES[name]()), num_classes=K)


def batch(*given: Proposals) -> ImageBatch:
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageBatch(pixels=pixels, sizes=SIZES, original_sizes=SIZES, proposals=given or None)


def test_a_cascade_is_prepared_for_inference() -> None:
    torch.manual_seed(0)
    original = detector(cascade(convs=True)).double().eval()
    prepared = prepared_detector(original, torch.float64)
    assert isinstance(prepared.roi, CascadeStage)
    for mine, theirs in zip(prepared.roi.chain, original.roi.chain, strict=True):  # type: ignore[union-attr]
        assert type(mine.box_head) is not type(theirs.box_head)
        assert type(mine.predictor) is not type(theirs.predictor)
    with torch.inference_mode():
        for found, expected in zip(prepared.predict(batch()), original.predict(batch()), strict=True):
            assert len(expected) > 0
            assert_close(found.boxes_xyxy, expected.boxes_xyxy)
            assert_close(found.scores, expected.scores)
    with pytest.raises(SetupError, match="prepared already"):
        prepared_detector(prepared)


# ----------------------------------------------------------------------------------------------------- given proposals

BOXES = torch.tensor([[4.0, 4, 40, 60], [10, 10, 30, 30], [0, 0, 9, 9]])
GIVEN = (
    Proposals(boxes_xyxy=BOXES, scores=torch.tensor([0.9, 0.5, 0.1])),
    Proposals(boxes_xyxy=BOXES[:1], scores=torch.tensor([0.7])),
)
TARGETS = [
    Target(boxes_xyxy=torch.tensor([[4.0, 6, 40, 56]]), labels=torch.tensor([1])),
    Target(boxes_xyxy=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64)),
]


@pytest.mark.parametrize("roi", [stage, cascade])
def test_fast_rcnn(roi) -> None:
    torch.manual_seed(0)
    fast = detector(roi(fusion="sqrt"), GivenProposals(train_limit=2)).train()
    losses = fast.loss(batch(*GIVEN), TARGETS)
    assert all(name.startswith("roi") for name in losses)
    torch.stack(list(losses.values())).sum().backward()
    assert all(parameter.grad is not None for parameter in fast.parameters() if parameter.requires_grad)
    with torch.no_grad():
        found = fast.eval().predict(batch(*GIVEN))
        assert len(found) == 2
        prepared = prepared_detector(fast).predict(batch(*GIVEN))
    for mine, expected in zip(prepared, found, strict=True):
        assert_close(mine.scores, expected.scores, rtol=1e-3, atol=1e-4)


def test_what_is_found_is_what_the_same_proposals_give_within_faster_rcnn() -> None:
    """A detector with a first stage, and one that is given what that stage proposes."""
    torch.manual_seed(0)
    faster = detector(stage()).double().eval()
    fast = detector(faster.roi, GivenProposals()).double().eval()
    fast.backbone, fast.neck = faster.backbone, faster.neck
    with torch.no_grad():
        given = faster.propose(batch())
        for found, expected in zip(fast.predict(batch(*given)), faster.predict(batch()), strict=True):
            assert len(expected) > 0
            assert_close(found.boxes_xyxy, expected.boxes_xyxy)
            assert_close(found.scores, expected.scores)


def test_limits() -> None:
    fast = detector(stage(sampler=BalancedSampler(total=64, positive_fraction=0.25)), GivenProposals(test_limit=2))
    with torch.no_grad():
        assert [len(some) for some in fast.propose(batch(*GIVEN))] == [2, 1]
        levels = fast.features(batch(*GIVEN))
        _, proposals = fast.proposals.loss(levels, TARGETS, GIVEN)
    assert [len(some) for some in proposals] == [3, 1]


def test_proposals_that_do_not_fit() -> None:
    fast, faster = detector(stage(fusion="sqrt"), GivenProposals()), detector(stage())
    with pytest.raises(SetupError, match="2 pictures and no proposals"):
        fast.predict(batch())
    with pytest.raises(SetupError, match="2 pictures and proposals for 1"):
        fast.loss(batch(GIVEN[0]), TARGETS)
    without = [replace(some, scores=None) for some in GIVEN]
    fast.loss(batch(*without), TARGETS)
    with pytest.raises(SetupError, match="proposals without scores"):
        fast.predict(batch(*without))
    with pytest.raises(SetupError, match="a first stage of its own, and proposals that came with the pictures"):
        faster.predict(batch(*GIVEN))
