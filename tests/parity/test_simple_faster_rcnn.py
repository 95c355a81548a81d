"""simple-faster-rcnn-pytorch's target and proposal creators, in float32 as it has them, through our parts.

Its boxes are y1 x1 y2 x2 and its deltas dy dx dh dw: the same permutation of columns turns both into ours and back.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from oracle import Oracle
from torch import Tensor, nn

from rcnn.boxes.coding import DeltaCoder
from rcnn.boxes.geometry import clip, iou
from rcnn.dense.interface import Candidates
from rcnn.dense.rpn import RPNHead
from rcnn.matching.iou import Matches
from rcnn.matching.sampling import BalancedSampler, EverySampler
from rcnn.priors import AnchorGenerator
from rcnn.proposals import ProposalFilter
from rcnn.records import LevelShape, Proposals, Size, Target
from rcnn.roi.box_head import BoxPredictor
from rcnn.roi.pooling import RoIPooling, quantised
from rcnn.roi.stage import RoIStage, SampledRegions

IMAGE = Size(height=384, width=480)
GRID = LevelShape(height=24, width=30, stride_px=16)
ANCHORS = AnchorGenerator(sizes_px=((128.0, 256.0, 512.0),), centre_offset=0.5)
UNLIMITED = DeltaCoder(max_log_ratio=None)
NUM_CLASSES = 20


def swapped(values: Tensor) -> Tensor:
    """xyxy to yxyx, dx dy dw dh to dy dx dh dw, and back."""
    return values[..., [1, 0, 3, 2]]


@pytest.fixture(scope="module")
def creators(oracle: Callable[[str], Oracle]) -> Oracle:
    return oracle("simple_faster_rcnn/creators")


@pytest.fixture(scope="module")
def anchors() -> Tensor:
    return ANCHORS([GRID], IMAGE, dtype=torch.float32, device=torch.device("cpu"))[0]


@pytest.fixture(scope="module")
def target(creators: Oracle) -> Target:
    return Target(
        boxes_xyxy=swapped(creators.full("gt_boxes_yxyx")).contiguous(), labels=creators.full("gt_labels").long()
    )


def draw(random: np.random.RandomState, count: int, device: torch.device) -> Tensor:
    """The draw of numpy.random.choice without replacement: the first of a permutation."""
    return torch.from_numpy(random.permutation(count)).to(device)


def draw_of_the_rest(random: np.random.RandomState, count: int, device: torch.device) -> Tensor:
    """The peer draws the anchors that it drops; the others are the ones that we keep."""
    return draw(random, count, device).flip(0)


def half_of_256(seed: int) -> BalancedSampler:
    order = partial(draw_of_the_rest, np.random.RandomState(seed))
    return BalancedSampler(total=256, positive_fraction=0.5, order=order)


def quarter_of_128(seed: int) -> BalancedSampler:
    order = partial(draw, np.random.RandomState(seed))
    return BalancedSampler(total=128, positive_fraction=0.25, order=order)


def test_anchors_have_the_same_bits(creators: Oracle, anchors: Tensor) -> None:
    torch.testing.assert_close(swapped(anchors[:9]), creators.full("anchor_base_yxyx"), rtol=0, atol=0)
    creators.check("anchors_24x30_yxyx", swapped(anchors), rtol=0)


def test_boxes(creators: Oracle, target: Target) -> None:
    boxes = target.boxes_xyxy
    deltas = torch.tensor([[0.1, -0.2, 0.3, -0.4], [0, 0, 5, 0], [0, 0, 0, -5], [1, 1, 1, 1]])
    creators.check("loc2bbox", swapped(UNLIMITED.decode(swapped(deltas), boxes)), rtol=1e-7)
    creators.check("bbox2loc", swapped(UNLIMITED.encode(boxes.flip(0), boxes)), rtol=1e-7)
    creators.check("bbox_iou", iou(boxes, boxes + 7), rtol=1e-7)


def rpn_head(sampler: BalancedSampler | EverySampler) -> RPNHead:
    return RPNHead(in_channels=1, anchors=ANCHORS, coder=UNLIMITED, sampler=sampler, border_px=0.0)


@pytest.mark.parametrize(
    ("case", "sampler"),
    [
        ("all", EverySampler()),
        ("default256", half_of_256(seed=42)),
    ],
)
def test_anchor_targets(
    creators: Oracle, anchors: Tensor, target: Target, case: str, sampler: BalancedSampler | EverySampler
) -> None:
    head = rpn_head(sampler)
    matches: Matches = head.match(anchors, target, IMAGE)
    sample = head.sampler(matches)
    labels = torch.full((len(anchors),), -1)
    labels[sample.positive], labels[sample.negative] = 1, 0
    creators.check(f"anchor_target/{case}/label", labels)
    positive = sample.positive.sort().values
    creators.check(f"anchor_target/{case}/positive_index", positive)
    truth = target.boxes_xyxy[matches.gt_index[positive]]
    encoded = head.coder.encode(truth, anchors[positive])
    creators.check(f"anchor_target/{case}/positive_loc", swapped(encoded), rtol=1e-6)


def candidates(creators: Oracle, anchors: Tensor) -> Candidates:
    """The inputs that the manifest describes."""
    random = np.random.RandomState(5)
    deltas = torch.from_numpy((random.randn(len(anchors), 4) * 0.2).astype(np.float32))
    scores = torch.from_numpy(random.rand(len(anchors)).astype(np.float32))
    creators.check("proposal/loc", deltas, rtol=0)
    creators.check("proposal/score", scores, rtol=0)
    zeros = torch.zeros(len(anchors), dtype=torch.int64)
    boxes = clip(UNLIMITED.decode(swapped(deltas), anchors), IMAGE)
    return Candidates(boxes_xyxy=boxes, scores=scores, labels=zeros, level=zeros)


def propose(creators: Oracle, anchors: Tensor, *, pre_nms: int, post_nms: int, image_scale: float) -> Proposals:
    chosen = ProposalFilter(
        pre_nms=pre_nms, post_nms=post_nms, min_side_px=16.0, side_frame="original", side_test="before_pre_nms"
    )
    return chosen(candidates(creators, anchors), num_levels=1, image_scale=image_scale)


@pytest.mark.parametrize(
    ("case", "pre_nms", "post_nms", "scale"),
    [("test_pre1500_post300_scale1.25", 1500, 300, 1.25), ("train_pre3000_post2000_scale1", 3000, 2000, 1.0)],
)
def test_proposals(creators: Oracle, anchors: Tensor, case: str, pre_nms: int, post_nms: int, scale: float) -> None:
    found = propose(creators, anchors, pre_nms=pre_nms, post_nms=post_nms, image_scale=scale)
    creators.check(f"proposal/{case}", swapped(found.boxes_xyxy), rtol=1e-6)


def roi_stage(sampler: BalancedSampler | EverySampler) -> RoIStage:
    return RoIStage(
        pooling=RoIPooling(output_size=7, pool=quantised()),
        box_head=nn.Identity(),
        predictor=BoxPredictor(in_features=1, num_classes=NUM_CLASSES),
        num_classes=NUM_CLASSES,
        coder=DeltaCoder(weights=(10.0, 10.0, 5.0, 5.0), max_log_ratio=None),
        sampler=sampler,
    )


def sorted_rows(boxes: Tensor, labels: Tensor, deltas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The peer lists positives, then negatives, each as drawn; we keep the order of the proposals."""
    order = torch.from_numpy(np.lexsort(boxes.numpy().T))
    return boxes[order], labels[order], deltas[order]


@pytest.mark.parametrize(
    ("case", "sampler"),
    [("all", EverySampler()), ("default128", quarter_of_128(seed=7))],
)
def test_proposal_targets(
    creators: Oracle, anchors: Tensor, target: Target, case: str, sampler: BalancedSampler | EverySampler
) -> None:
    stage = roi_stage(sampler)
    proposals = propose(creators, anchors, pre_nms=3000, post_nms=2000, image_scale=1.0)
    regions: SampledRegions = stage.sample(proposals, target)
    deltas = stage.coder.encode(regions.gt_boxes_xyxy, regions.boxes_xyxy)
    # Background is their 0, our K.
    labels = (regions.labels + 1) % (NUM_CLASSES + 1)
    boxes, labels, deltas = sorted_rows(swapped(regions.boxes_xyxy), labels, swapped(deltas))
    recorded = [
        creators.full(f"proposal_target/{case}/{name}") for name in ("sample_roi", "gt_roi_label", "gt_roi_loc")
    ]
    their_boxes, their_labels, their_deltas = sorted_rows(*recorded)
    torch.testing.assert_close(boxes, their_boxes, rtol=1e-6, atol=1e-4)
    assert labels.tolist() == their_labels.tolist()
    # The background's deltas mean nothing and are not trained.
    foreground = labels > 0
    torch.testing.assert_close(deltas[foreground], their_deltas[foreground], rtol=1e-5, atol=1e-5)
