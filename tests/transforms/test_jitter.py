"""Large-scale jitter: hand-worked boxes of a crop, and what every draw keeps true."""

from __future__ import annotations

import torch

from rcnn.records import Proposals, Size, Target
from rcnn.transforms.jitter import LargeScaleJitter, crop_target


def test_a_crop_cuts_boxes_and_leaves_out_those_outside() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [5, 5, 30, 30], [40, 40, 50, 50], [10, 12, 20, 22]])
    target = Target(
        boxes_xyxy=boxes,
        labels=torch.tensor([0, 1, 2, 3]),
        ignore_xyxy=torch.tensor([[0.0, 0, 60, 60], [0, 0, 9, 9]]),
        proposals=Proposals(boxes_xyxy=boxes, scores=torch.tensor([0.9, 0.8, 0.7, 0.6])),
    )
    # The part from (x 10, y 12), 20 wide and 10 high: the first box ends where it begins.
    found = crop_target(target, top=12, left=10, size=Size(10, 20))
    assert found.boxes_xyxy.tolist() == [[0, 0, 20, 10], [0, 0, 10, 10]]
    assert found.labels.tolist() == [1, 3]
    assert found.ignore_xyxy.tolist() == [[0, 0, 20, 10]]
    assert found.proposals is not None
    assert found.proposals.scores is not None
    assert found.proposals.boxes_xyxy.tolist() == found.boxes_xyxy.tolist()
    assert torch.equal(found.proposals.scores, torch.tensor([0.8, 0.6]))


def test_every_draw_fits_and_keeps_boxes_with_their_pixels() -> None:
    image = torch.zeros(3, 40, 60, dtype=torch.uint8)
    image[:, 10:30, 20:40] = 200
    target = Target(boxes_xyxy=torch.tensor([[20.0, 10, 40, 30]]), labels=torch.tensor([4]))
    jitter = LargeScaleJitter(short_side=64, max_long_side=64, factors=(0.5, 3.0), crop_px=48)
    generator = torch.Generator().manual_seed(0)
    sizes = set()
    for _ in range(50):
        pixels, found = jitter(image, target, generator)
        sizes.add(tuple(pixels.shape))
        assert max(pixels.shape) <= 48
        # 64 px wide at factor 1, and half of it at the least: 32 x 21.
        assert min(pixels.shape[1:]) >= 21
        bright = (pixels[0] > 100).nonzero()
        if len(found.boxes_xyxy):
            x1, y1, x2, y2 = found.boxes_xyxy[0].tolist()
            if len(bright) and min(x2 - x1, y2 - y1) > 2:
                assert abs(bright[:, 1].min() - x1) <= 2
                assert abs(bright[:, 0].max() + 1 - y2) <= 2
        else:
            assert len(bright) < 100
    assert len(sizes) > 10


def test_without_a_crop_all_is_kept() -> None:
    image = torch.zeros(3, 40, 60, dtype=torch.uint8)
    target = Target(boxes_xyxy=torch.tensor([[20.0, 10, 40, 30]]), labels=torch.tensor([4]))
    jitter = LargeScaleJitter(short_side=80, max_long_side=200, factors=(1.0, 1.0), crop_px=None)
    pixels, found = jitter(image, target, torch.Generator())
    assert pixels.shape == (3, 80, 120)  # twice its size
    assert found.boxes_xyxy.tolist() == [[40, 20, 80, 60]]
