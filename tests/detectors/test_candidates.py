"""What a one-stage detector proposes: a first stage's proposals where it has one class, their union where several."""

from __future__ import annotations

import pytest
import torch

from rcnn.config.edit import edit
from rcnn.dense.rpn import RPNHead
from rcnn.detectors.candidates import OneStageProposer
from rcnn.detectors.one_stage import OneStageDetector
from rcnn.detectors.two_stage import TwoStageDetector
from rcnn.priors import AnchorGenerator
from rcnn.proposals import ProposalFilter, ProposalStage
from rcnn.recipes.catalogue import faster_rcnn_resnet18_fpn
from rcnn.recipes.models import build_detector
from rcnn.recipes.proposing import proposer_of
from rcnn.records import ImageBatch, Size

SIZES = (Size(64, 64), Size(40, 56))
ANCHORS = AnchorGenerator(sizes_px=((16.0,), (32.0,), (64.0,), (64.0,), (64.0,)))
FILTER = ProposalFilter(pre_nms=50, post_nms=30, scope="joint")


@pytest.fixture(scope="module")
def two_stage() -> TwoStageDetector:
    torch.manual_seed(0)
    detector = build_detector(
        edit(faster_rcnn_resnet18_fpn(), {"detector.neck.channels": 8}).detector, num_classes=3, pretrained=False
    )
    assert isinstance(detector, TwoStageDetector)
    return detector.eval()


def one_stage(two_stage: TwoStageDetector, head: RPNHead) -> OneStageDetector:
    neck, backbone = two_stage.neck, two_stage.backbone
    return OneStageDetector(normalizer=two_stage.normalizer, backbone=backbone, neck=neck, head=head).eval()  # type: ignore[arg-type]


def batch() -> ImageBatch:
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageBatch(pixels=pixels, sizes=SIZES, original_sizes=SIZES, image_ids=(0, 1))


@torch.no_grad()
def test_one_class_proposes_as_a_first_stage_with_that_head(two_stage: TwoStageDetector) -> None:
    head = RPNHead(in_channels=8, num_classes=1, anchors=ANCHORS)
    detector = one_stage(two_stage, head)
    expected = ProposalStage(head=head, train_filter=FILTER, test_filter=FILTER).propose(detector.features(batch()))
    found = OneStageProposer(detector, proposal_filter=FILTER)(batch())
    assert [len(one) for one in found] == [len(one) for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert len(one) > 5
        torch.testing.assert_close(one.boxes_xyxy, other.boxes_xyxy, rtol=0, atol=0)
        torch.testing.assert_close(one.scores, other.scores, rtol=0, atol=0)


@torch.no_grad()
def test_classes_that_share_a_box_propose_it_once(two_stage: TwoStageDetector) -> None:
    """Three classes with one set of boxes: whichever class scores a box highest, it comes once, with that score."""
    head = RPNHead(in_channels=8, num_classes=3, anchors=ANCHORS)
    detector = one_stage(two_stage, head)
    every = ProposalFilter(pre_nms=10**6, post_nms=10**6, nms_iou=0.7, scope="joint")
    candidates = head.decode(head(detector.features(batch())), per_level=None, score_threshold=0.0)
    for one, found in zip(OneStageProposer(detector, proposal_filter=every)(batch()), candidates, strict=True):
        assert one.scores is not None
        assert len(one.boxes_xyxy.unique(dim=0)) == len(one)
        same = (found.boxes_xyxy[:, None] == one.boxes_xyxy).all(dim=2)  # [candidates, proposals]
        best = torch.where(same, found.scores[:, None], -1.0).amax(dim=0)
        torch.testing.assert_close(one.scores, best, rtol=0, atol=0)
        assert bool((same.sum(dim=0) >= 3).all()), "each box was a candidate of every class"


def test_which_part_proposes(two_stage: TwoStageDetector) -> None:
    assert proposer_of(two_stage) == two_stage.propose
    detector = one_stage(two_stage, RPNHead(in_channels=8, num_classes=3, anchors=ANCHORS))
    proposer = proposer_of(detector)
    assert isinstance(proposer, OneStageProposer)
    assert proposer.proposal_filter.post_nms == 1000
