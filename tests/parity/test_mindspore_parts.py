"""MindSpore RCNN's choices as options of the parts, by hand: what its parity test sees only as a whole."""

from __future__ import annotations

import torch

from rcnn.backbones.norm import norm_factory
from rcnn.backbones.resnet import ResNetBackbone
from rcnn.boxes.coding import DeltaCoder
from rcnn.boxes.filtering import DetectionFilter
from rcnn.dense.interface import Candidates
from rcnn.matching.iou import IoUMatcher, Matches
from rcnn.matching.sampling import BalancedSampler
from rcnn.necks.fpn import FPN
from rcnn.proposals import ProposalFilter
from rcnn.records import Size, Target
from rcnn.roi.decoding import find_detections


def test_negatives_have_their_share_and_no_more() -> None:
    positive = torch.zeros(100, dtype=torch.bool)
    positive[:3] = True
    matches = Matches(gt_index=torch.zeros(100, dtype=torch.int64), positive=positive, negative=~positive)
    sample = BalancedSampler(total=20, positive_fraction=0.25, negatives="share")(matches)
    assert (len(sample.positive), len(sample.negative)) == (3, 15)  # 20 less the 5 that positives may have
    sample = BalancedSampler(total=20, positive_fraction=0.25)(matches)
    assert (len(sample.positive), len(sample.negative)) == (3, 17)


def test_boxes_that_end_a_pixel_beyond() -> None:
    """10x10 and its left half: 50 / 100, or with the pixels of both ends 6 * 11 / 121 = 0.545."""
    target = Target(boxes_xyxy=torch.tensor([[0.0, 0.0, 10.0, 10.0]]), labels=torch.zeros(1, dtype=torch.int64))
    half = torch.tensor([[0.0, 0.0, 5.0, 10.0]])
    for sides, expected in (("continuous", False), ("pixels", True)):
        matcher = IoUMatcher(positive_iou=0.54, negative_iou=0.54, sides=sides)
        assert matcher(half, target).positive.tolist() == [expected]


def test_a_second_nms_after_the_best_were_chosen() -> None:
    """Two levels with the same box: within a level nothing overlaps, so both are among the best two; then one goes."""
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 60.0, 60.0]])
    candidates = Candidates(
        boxes_xyxy=boxes,
        scores=torch.tensor([0.9, 0.8, 0.7]),
        labels=torch.zeros(3, dtype=torch.int64),
        level=torch.tensor([0, 1, 1]),
    )
    kept = {}
    for scope in ("level", "joint", "level_then_joint"):
        chosen = ProposalFilter(pre_nms=10, post_nms=2, scope=scope)
        kept[scope] = chosen(candidates, num_levels=2, image_scale=1.0).scores
    torch.testing.assert_close(kept["level"], torch.tensor([0.9, 0.8]))
    torch.testing.assert_close(kept["joint"], torch.tensor([0.9, 0.7]))
    # What left is not replaced by the third.
    torch.testing.assert_close(kept["level_then_joint"], torch.tensor([0.9]))


def test_detections_cut_after_nms() -> None:
    """Two wide boxes that agree only where the picture is: cut before, one goes; after, both stay."""
    references = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 40.0, 10.0]])
    arguments = {
        "coder": DeltaCoder(),
        "detection_filter": DetectionFilter(score_threshold=0.1, min_side_px=0.0),
    }
    scores, deltas = torch.tensor([[0.9], [0.8]]), torch.zeros(2, 1, 4)
    size = Size(height=10, width=10)
    before = find_detections(scores, deltas, references, size, **arguments)
    after = find_detections(scores, deltas, references, size, **arguments, clip_order="after_nms")
    assert (len(before), len(after)) == (1, 2)
    assert after.boxes_xyxy.tolist() == [[0, 0, 10, 10]] * 2


def test_a_bilinear_pyramid() -> None:
    """2 cells to 4, between the centres: 0, 8 become 0, 2, 6, 8."""
    neck = FPN(in_channels=(1, 1), in_strides_px=(4, 8), channels=1, extra="none", upsampling="bilinear")
    with torch.no_grad():
        for convolution in (*neck.lateral, *neck.output):
            for parameter in convolution.parameters():
                parameter.zero_()
            next(convolution.parameters())[..., -1:, -1:] = 1.0
        for convolution in neck.output:
            weight = next(convolution.parameters())
            weight.zero_()
            weight[..., 1, 1] = 1.0  # the cell itself
        coarse = torch.tensor([0.0, 8.0]).expand(1, 1, 2, 2)
        fine, _ = neck((torch.zeros(1, 1, 4, 4), coarse))
    assert fine[0, 0].tolist() == [[0, 2, 6, 8]] * 4


def test_a_pool_that_is_padded_at_the_far_end() -> None:
    """Of 4 cells: windows 0..2 and 2..3, where padding on both sides has 0..1 and 1..3."""
    backbone = ResNetBackbone(depth=18, make_norm=norm_factory("frozen", 1e-5), stem_pool="far_end")
    seen = {}
    backbone.layer1.register_forward_pre_hook(lambda _, inputs: seen.update(pooled=inputs[0]))
    backbone.bn1.register_forward_hook(lambda _, inputs, output: torch.arange(4.0).expand(1, 64, 4, 4).clone())
    with torch.no_grad():
        backbone(torch.zeros(1, 3, 8, 8))
    assert seen["pooled"][0, 0].tolist() == [[2, 3]] * 2
