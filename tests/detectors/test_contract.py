"""Every combination of parts that a recipe can name keeps the contract of detectors."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from rcnn.config.edit import edit
from rcnn.detectors.contract import assert_is_detector
from rcnn.detectors.interface import AbstractDetector
from rcnn.recipes.catalogue import RECIPES, faster_rcnn_resnet18_fpn
from rcnn.recipes.models import build_detector
from rcnn.records import Detections, ImageBatch, Losses, Size, Target

NUM_CLASSES = 3
# Narrow heads: what is tested does not depend on their width.
SMALL = {
    "detector.neck.channels": 16,
    "detector.roi.box_head.features": 16,
    "detector.roi.pooling.output_size": 3,
    "detector.proposals.train": {"pre_nms": 100, "post_nms": 50},
    "detector.proposals.test": {"pre_nms": 50, "post_nms": 20},
    "detector.roi.sampler.total": 64,
}


def build(edits: Mapping[str, object]) -> AbstractDetector:
    torch.manual_seed(0)
    spec = edit(edit(faster_rcnn_resnet18_fpn(), SMALL), edits).detector
    return build_detector(spec, num_classes=NUM_CLASSES, pretrained=False)


def backbone(**spec: object) -> dict[str, object]:
    return {"detector.backbone": spec}


ANY_LEVELS = {"detector.proposals.head.anchors.sizes_px": ((16.0, 32.0),)}
RESNETS = {
    f"resnet{depth} {style} {norm}": backbone(type="resnet", depth=depth, style=style, norm=norm, frozen_stages=2)
    for depth, style, norm in [
        (18, "pytorch", "frozen"),
        (18, "pytorch", "batch"),
        (18, "pytorch", "sync"),
        (18, "pytorch", "fixed_statistics"),
        (34, "pytorch", "frozen"),
        (50, "pytorch", "batch"),
        (50, "caffe", "frozen"),
        (101, "caffe", "batch"),
    ]
}
BACKBONES = {
    **RESNETS,
    "resnet18 all frozen": backbone(type="resnet", depth=18, frozen_stages=5),
    "mobilenet v2": backbone(type="mobilenet", version="v2", frozen_stages=0),
    "mobilenet v3": backbone(type="mobilenet", version="v3_large", norm="batch"),
    "mobilenet v2 last two": backbone(type="mobilenet", version="v2", maps="last_two") | ANY_LEVELS,
    "mobilenet v3 last two, all frozen": backbone(type="mobilenet", maps="last_two", frozen_stages=6) | ANY_LEVELS,
    "efficientnet": backbone(type="efficientnet_lite0", norm="sync"),
    "timm resnet10t": backbone(type="timm", name="resnet10t", norm="frozen", frozen_stages=1),
    "timm mobilenetv3": backbone(type="timm", name="mobilenetv3_small_050", norm="batch", frozen_stages=2),
}
ROI_POOL = {"detector.roi.pooling": {"type": "roi_pool", "output_size": 1}}
VGG = {**backbone(type="vgg16"), "detector.neck": {"type": "none"}}
ONE_MAP = {
    "detector.neck": {"type": "none"},
    "detector.proposals.head.channels": 16,
    "detector.proposals.head.anchors.sizes_px": ((16.0, 32.0, 64.0),),
}
HEADS = {
    "vgg16": {**VGG, **ONE_MAP, "detector.roi.box_head": {"type": "vgg_fc", "dropout": 0.5}, **ROI_POOL},
    "C4": {**ONE_MAP, "detector.neck.index": -2},
    "C5": ONE_MAP,
    "C4 of mobilenet": {**backbone(type="mobilenet", version="v2"), **ONE_MAP, "detector.neck.index": 2},
    "C4 of timm": {**backbone(type="timm", name="resnet10t"), **ONE_MAP, "detector.neck.index": 2},
    "P6 and P7 on P5": {"detector.neck.extra": "convs_on_p5", **ANY_LEVELS},
    "P3 to P7": {
        "detector.neck.extra": "convs_on_c5",
        "detector.neck.first_map": 1,
        **ANY_LEVELS,
    },
    "no P6": {"detector.neck.extra": "none", **ANY_LEVELS},
    "FPN with norm": {"detector.neck.norm": "sync"},
    "two RPN convolutions, joint NMS": {"detector.proposals.head.num_convs": 2, "detector.proposals.scope": "joint"},
    "anchors inside": {"detector.proposals.head.border_px": 0.0},
    "every sample": {
        "detector.proposals.head.sampler": {"type": "every"},
        "detector.roi.sampler": {"type": "every"},
    },
    "agnostic": {"detector.roi.regression": "agnostic"},
    "agnostic, L1, RoIPool": {
        "detector.roi.regression": "agnostic",
        "detector.roi.box_loss": {"type": "l1"},
        **ROI_POOL,
    },
    "adaptive aligned RoIAlign": {"detector.roi.pooling.sampling_ratio": 0, "detector.roi.pooling.aligned": True},
    "convolutions with norm": {"detector.roi.box_head": {"type": "conv_fc", "channels": 16, "features": 16}},
    "convolutions without": {
        "detector.roi.box_head": {"type": "conv_fc", "norm": "none", "num_convs": 1, "channels": 16, "features": 16}
    },
}


@pytest.mark.parametrize("name", BACKBONES)
def test_backbones(name: str) -> None:
    assert_is_detector(build(BACKBONES[name]), num_classes=NUM_CLASSES)


@pytest.mark.parametrize("name", HEADS)
def test_necks_and_heads(name: str) -> None:
    assert_is_detector(build(HEADS[name]), num_classes=NUM_CLASSES)


@pytest.mark.parametrize("name", ["faster_rcnn_resnet50_fpn_v2", "faster_rcnn_mobilenet_v3_large_320_fpn"])
def test_named_recipes(name: str) -> None:
    spec = edit(RECIPES[name](), {key: value for key, value in SMALL.items() if "channels" not in key}).detector
    assert_is_detector(build_detector(spec, num_classes=NUM_CLASSES, pretrained=False), num_classes=NUM_CLASSES)


class Faulty(AbstractDetector):
    """A detector of one parameter, which breaks the contract where it is told to."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.unused = torch.nn.Parameter(torch.ones(()), requires_grad=fault == "unused")

    def loss(self, batch: ImageBatch, targets: list[Target]) -> Losses:
        factor = float("nan") if self.fault == "nan" else 1.0
        count = sum(len(target.labels) for target in targets)
        loss: Tensor = self.weight * factor
        if self.fault == "empty" and count == 0:
            loss = loss.detach().requires_grad_()
        return {"loss": loss.reshape(1) if self.fault == "shape" else loss}

    def predict(self, batch: ImageBatch) -> list[Detections]:
        size: Size = batch.sizes[0]
        scores = torch.tensor([0.5, 0.9] if self.fault == "order" else [0.9, 0.5])
        far = 1000.0 if self.fault == "outside" else float(size.height // 2)
        found = Detections(
            boxes_xyxy=torch.tensor([[0.0, 0.0, far, 10.0]] * 2),
            scores=scores * (2 if self.fault == "probability" else 1),
            labels=torch.tensor([0, NUM_CLASSES if self.fault == "label" else 1]),
        )
        if self.fault == "kind" and self.training:
            return {}  # type: ignore[return-value]
        return [found] * len(batch)


def test_a_detector_without_fault_passes() -> None:
    assert_is_detector(Faulty("none"), num_classes=NUM_CLASSES)


@pytest.mark.parametrize(
    "fault", ["nan", "unused", "empty", "shape", "order", "outside", "probability", "label", "kind"]
)
def test_the_contract_finds_each_fault(fault: str) -> None:
    with pytest.raises(AssertionError):
        assert_is_detector(Faulty(fault), num_classes=NUM_CLASSES)
