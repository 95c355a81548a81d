"""Every dense head in both roles keeps the contract of dense heads, case by case; the result is a page of the docs.

`RCNN_UPDATE_GOLDEN=1 pytest tests/contracts` writes docs/dense-heads-contract.md anew.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from rcnn.dense.atss import ATSSHead
from rcnn.dense.centernet import CenterNetHead
from rcnn.dense.contract import CASES, examine_dense_head
from rcnn.dense.fcos import FCOSHead
from rcnn.dense.gfl import GFLHead
from rcnn.dense.interface import AbstractDenseHead
from rcnn.dense.retinanet import RetinaNetHead
from rcnn.dense.rpn import Objectness, RPNHead
from rcnn.dense.tood import TOODHead
from rcnn.dense.towers import group_norm
from rcnn.dense.yolox import YOLOXHead
from rcnn.matching.centre import CentreMatcher
from rcnn.priors import AnchorGenerator
from rcnn.proposals import ProposalFilter, ProposalStage
from rcnn.records import Levels, LevelShape, Size, Target

pytestmark = pytest.mark.xdist_group("dense_heads_contract")

PAGE = Path(__file__).resolve().parents[2] / "docs" / "dense-heads-contract.md"
STRIDES = (8, 16, 32, 64, 128)
CHANNELS = 8
ROLES = {"detector": 3, "first stage": 1}
# A narrow head: what is tested does not depend on its width.
SMALL: dict[str, object] = {"in_channels": CHANNELS, "channels": CHANNELS, "num_convs": 1, "strides_px": STRIDES}


def rpn(num_classes: int, num_convs: int = 1, objectness: Objectness = "sigmoid") -> AbstractDenseHead:
    return RPNHead(
        in_channels=CHANNELS,
        anchors=AnchorGenerator(sizes_px=tuple((4.0 * stride,) for stride in STRIDES)),
        num_classes=num_classes,
        num_convs=num_convs,
        objectness=objectness,
    )


def small(make: Callable[..., AbstractDenseHead], **choices: object) -> Callable[[int], AbstractDenseHead]:
    return lambda num_classes: make(num_classes=num_classes, **SMALL, **choices)


HEADS: dict[str, Callable[[int], AbstractDenseHead]] = {
    "RPN": rpn,
    "RPN, two convolutions": lambda num_classes: rpn(num_classes, num_convs=2),
    "RPN, softmax": lambda num_classes: rpn(num_classes, objectness="softmax"),
    "RetinaNet": small(RetinaNetHead),
    "FCOS": small(FCOSHead),
    "FCOS, improved": small(
        FCOSHead,
        matcher=CentreMatcher(radius_strides=1.5),
        centerness_branch="boxes",
        distances="relu",
        box_loss="giou",
    ),
    "ATSS": small(ATSSHead, make_norm=group_norm),
    "GFL": small(GFLHead, make_norm=group_norm),
    "TOOD": small(TOODHead, make_norm=group_norm),
    "CenterNet": small(CenterNetHead),
    "YOLOX": small(YOLOXHead),
}


def build(name: str, role: str) -> AbstractDenseHead:
    torch.manual_seed(0)
    return HEADS[name](ROLES[role])


@cache
def examined(name: str, role: str) -> dict[str, tuple[str, ...]]:
    return examine_dense_head(build(name, role), in_channels=CHANNELS, strides_px=STRIDES)


@pytest.mark.parametrize("role", list(ROLES))
@pytest.mark.parametrize("name", list(HEADS))
def test_a_head_keeps_the_contract(name: str, role: str) -> None:
    faults = [f"{case}: {fault}" for case, found in examined(name, role).items() for fault in found]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("name", list(HEADS))
def test_a_head_of_one_class_is_a_first_stage(name: str) -> None:
    """With nothing but its name: terms with a prefix, proposals without a gradient, no more than were asked for."""
    chosen = ProposalFilter(pre_nms=50, post_nms=20)
    stage = ProposalStage(head=build(name, "first stage"), train_filter=chosen, test_filter=chosen)
    size = Size(height=96, width=128)
    shapes = tuple(
        LevelShape(height=-(-size.height // stride), width=-(-size.width // stride), stride_px=stride)
        for stride in STRIDES
    )
    generator = torch.Generator().manual_seed(0)
    levels = Levels(
        maps=tuple(torch.randn(1, CHANNELS, shape.height, shape.width, generator=generator) for shape in shapes),
        shapes=shapes,
        padded_size=size,
        image_sizes=(size,),
        image_scales=(1.0,),
        num_roi_levels=len(shapes),
    )
    # Labels of a data set of many classes: a first stage has one.
    target = Target(boxes_xyxy=torch.tensor([[10.0, 10, 60, 70], [50.0, 20, 90, 40]]), labels=torch.tensor([7, 3]))
    losses, (proposals,) = stage.loss(levels, [target])
    assert all(name.startswith("rpn_") for name in losses)
    assert all(loss.isfinite() for loss in losses.values())
    assert 0 < len(proposals.boxes_xyxy) <= 20
    assert not proposals.boxes_xyxy.requires_grad
    assert len(stage.propose(levels)) == 1


def page() -> str:
    """The page as the examination gives it."""
    cases = [f"* **{case.name}**: {case.about}." for case in CASES]
    header = ["head", "role", *(case.name for case in CASES)]
    rows = [
        [name, f"{role}, {classes} class{'es' if classes > 1 else ''}"]
        + ["yes" if not examined(name, role)[case.name] else "**no**" for case in CASES]
        for name in HEADS
        for role, classes in ROLES.items()
    ]
    table = ["| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows]]
    return "\n".join([INTRODUCTION, *cases, "", RESULT, *table, ""])


INTRODUCTION = """\
# The contract of dense heads

<!-- Written by tests/contracts/test_dense_heads.py: RCNN_UPDATE_GOLDEN=1 pytest tests/contracts -->

A dense head is a one-stage detector's head and a first stage alike ([how to write one](how-to-write-a-head.md)).
`rcnn.dense.contract.assert_is_dense_head` puts a head, yours or ours, to these cases, with K classes as in a detector
and with one as in a first stage:

```python
from rcnn.dense.contract import assert_is_dense_head

assert_is_dense_head(lambda num_classes: MyHead(num_classes=num_classes, ...), in_channels=16, strides_px=(8, 16, 32))
```

Each case is run in float32, in float64 and under bfloat16 autocast. Asked is of all of them:

* every loss term is a finite scalar of the head's precision (float32 under autocast), and the targets are left alone;
* every parameter gets a finite gradient, also where there is nothing to learn;
* empty pictures teach that all is background, boxes teach boxes, and an ignore region without boxes teaches nothing;
* candidates lie inside their picture, have scores in 0 to 1 and labels in range, come level after level and best
  first, at most `per_level` of each level, fewer with a threshold;
* training and evaluation mode give the same records;
* maps that went astray (a thousandfold, or not a number) give neither boxes outside the picture nor scores that are
  not numbers.

The cases:
"""

RESULT = """\
What every head of this project makes of them, as the test found it:
"""


def test_the_page_is_what_was_found() -> None:
    if os.environ.get("RCNN_UPDATE_GOLDEN") == "1":
        PAGE.write_text(page(), encoding="utf-8")
    assert PAGE.is_file(), f"{PAGE.name} is missing: run RCNN_UPDATE_GOLDEN=1 pytest tests/contracts"
    assert PAGE.read_text(encoding="utf-8") == page()
