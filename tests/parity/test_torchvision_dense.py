"""torchvision's FCOS and RetinaNet, stage by stage in float64, from checkpoints rebuilt under its key names.

Inference is compared on one of the two pictures, padded as in the batch; RCNN_PARITY=full takes both. Training is
compared on both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import pytest
import torch
from oracle import Oracle
from recorded import TRAIN_STAGES, MapMemory, Maps, Preprocessing, check_gradients, only, pictures_of
from torch import Tensor

from rcnn.backbones.norm import norm_factory
from rcnn.backbones.resnet import ResNetBackbone
from rcnn.boxes.coding import DeltaCoder
from rcnn.boxes.filtering import DetectionFilter
from rcnn.converters.key_map import KeyMap
from rcnn.converters.torchvision_dense import coco_classes, recognise
from rcnn.dense.fcos import FCOSHead
from rcnn.dense.interface import DensePrediction
from rcnn.dense.normalizers import by_picture
from rcnn.dense.retinanet import RetinaNetHead
from rcnn.dense.selection import per_prior
from rcnn.detectors.one_stage import OneStageDetector
from rcnn.engine.checkpoint import load_into
from rcnn.matching.centre import CentreMatcher
from rcnn.matching.iou import IoUMatcher
from rcnn.necks.fpn import FPN
from rcnn.priors import AnchorGenerator, PointGenerator
from rcnn.records import ImageBatch, Target
from rcnn.transforms.batching import ImageNormalizer
from rcnn.transforms.geometry import scale_boxes

# In one process, where a case finds the maps of the one before.
pytestmark = pytest.mark.xdist_group("parity with detectron2 and torchvision")
PREPROCESSING = Preprocessing(rounding="floor", kernel="bilinear_float", labels="coco91", pixels=torch.float64)
Head = FCOSHead | RetinaNetHead


def detector_of(
    make_head: Callable[[FPN], Head], *, norm_eps: float, score_threshold: float, nms_iou: float, max_detections: int
) -> OneStageDetector:
    backbone = ResNetBackbone(depth=50, make_norm=norm_factory("frozen", norm_eps), frozen_stages=2)
    neck = FPN(in_channels=backbone.channels, in_strides_px=backbone.strides_px, extra="convs_on_p5", first_map=1)
    return OneStageDetector(
        normalizer=ImageNormalizer(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375)),
        backbone=backbone,
        neck=neck,
        head=make_head(neck),
        score_threshold=score_threshold,
        detection_filter=DetectionFilter(
            score_threshold=0.0, nms_iou=nms_iou, max_detections=max_detections, min_side_px=0.0
        ),
    )


def fcos_head(neck: FPN) -> FCOSHead:
    return FCOSHead(
        in_channels=neck.channels,
        num_classes=len(coco_classes()),
        strides_px=neck.strides_px,
        conv_bias=True,
        scaled=False,
        centerness_branch="boxes",
        distances="relu",
        points=PointGenerator(offset=0.0, stride_rule="image_over_grid"),
        matcher=CentreMatcher(radius_strides=1.5, range_ends="excluded"),
        box_loss="giou",
        box_weights="equal",
        score_fusion="sqrt",
    )


def retinanet_head(neck: FPN) -> RetinaNetHead:
    sizes = ((32, 40, 50), (64, 80, 101), (128, 161, 203), (256, 322, 406), (512, 645, 812))
    return RetinaNetHead(
        in_channels=neck.channels,
        num_classes=len(coco_classes()),
        strides_px=neck.strides_px,
        anchors=AnchorGenerator(
            sizes_px=tuple(tuple(map(float, some)) for some in sizes), rounded=True, stride_rule="image_over_grid"
        ),
        matcher=IoUMatcher(positive_iou=0.5, negative_iou=0.4, low_quality_iou=0.0),
        coder=DeltaCoder(),
        normalizer=by_picture,
        size_divisor_px=None,
    )


def fcos() -> OneStageDetector:
    return detector_of(fcos_head, norm_eps=1e-5, score_threshold=0.2, nms_iou=0.6, max_detections=100)


def retinanet() -> OneStageDetector:
    return detector_of(retinanet_head, norm_eps=0.0, score_threshold=0.05, nms_iou=0.5, max_detections=300)


CASES: Mapping[str, Callable[[], OneStageDetector]] = {
    "fcos_resnet50_fpn": fcos,
    "retinanet_resnet50_fpn": retinanet,
}
OUTPUTS = {"fcos_resnet50_fpn": "bbox_ctrness", "retinanet_resnet50_fpn": None}
# Ours and theirs.
TERMS = {"classification": "classification", "box": "bbox_regression", "centerness": "bbox_ctrness"}
FEATURES = ("0", "1", "2", "p6", "p7")


@dataclass
class Case:
    """A detector with the recorded weights, and the maps of its trunk."""

    oracle: Oracle
    detector: OneStageDetector
    key_map: KeyMap
    names: Mapping[str, str]
    memory: MapMemory
    pictures: Sequence[int]

    @property
    def head(self) -> Head:
        head = self.detector.head
        assert isinstance(head, Head)
        return head

    @cached_property
    def training(self) -> tuple[Maps, DensePrediction]:
        """Maps and predictions of both pictures, with a graph. The truth does not matter to them."""
        batch, _ = self.train_batch("train")
        maps = self.memory.maps(self.detector, batch, gradient=True)
        return maps, self.head(self.detector.levels(maps.pyramid, batch))

    def train_batch(self, stage: str) -> tuple[ImageBatch, list[Target]]:
        overrides = self.oracle.manifest["train_overrides"]
        return PREPROCESSING.batch(
            self.oracle,
            short_side=overrides["min_size"],
            max_long_side=overrides["max_size"],
            boxes=TRAIN_STAGES[stage],
        )

    def priors(self, prediction: DensePrediction) -> list[Tensor]:
        return (
            self.head.make_points(prediction) if isinstance(self.head, FCOSHead) else self.head.make_anchors(prediction)
        )


@pytest.fixture(scope="module", params=list(CASES))
def case(request: pytest.FixtureRequest, oracle: Callable[[str], Oracle], memory: MapMemory) -> Case:
    recorded = oracle(f"torchvision/{request.param}")
    detector = CASES[request.param]().double().eval()
    state = recorded.state_dict()
    key_map = recognise(state).key_map
    converted = key_map.to_ours(state)
    assert set(converted.names) == set(state)
    load_into(detector, converted.state)
    number = list(CASES).index(request.param)
    return Case(recorded, detector, key_map, converted.names, memory, pictures_of(number))


@torch.no_grad()
def test_inference(case: Case) -> None:
    oracle, detector = case.oracle, case.detector
    both, _ = PREPROCESSING.batch(oracle, short_side=800, max_long_side=1333)
    oracle.check("eval/pre/tensor", detector.normalizer(both))
    oracle.check("eval/pre/image_sizes_hw", torch.tensor(both.sizes), rtol=0)
    for picture in case.pictures:
        batch = only(both, picture)
        maps = case.memory.maps(detector, batch, gradient=False)
        for level, x in enumerate(maps.body[1:]):
            oracle.check_rows(f"eval/body/{level}", x, picture)
        for name, x in zip(FEATURES, maps.pyramid, strict=True):
            oracle.check_rows(f"eval/feature/{name}", x, picture)
        prediction = case.head(detector.levels(maps.pyramid, batch))
        check_head(case, prediction, picture)
        (found,) = detector.detect(prediction)
        boxes = scale_boxes(found.boxes_xyxy, batch.sizes[0], batch.original_sizes[0])
        oracle.check(f"eval/detections/{picture}/boxes", boxes)
        oracle.check(f"eval/detections/{picture}/scores", found.scores)
        oracle.check(f"eval/detections/{picture}/labels", found.labels)


def check_head(case: Case, prediction: DensePrediction, picture: int) -> None:
    case.oracle.check_rows("eval/head/cls_logits", per_prior(prediction.classes, len(coco_classes())), picture)
    raw = prediction.boxes
    if isinstance(case.head, FCOSHead):
        # Recorded after the ReLU, in strides.
        raw = [x.relu() for x in raw]
        case.oracle.check_rows("eval/head/bbox_ctrness", per_prior(prediction.quality, 1), picture)
    case.oracle.check_rows("eval/head/bbox_regression", per_prior(raw, 4), picture)
    for level, priors in enumerate(case.priors(prediction)):
        if isinstance(case.head, FCOSHead):
            # An anchor of one stride, whose corners it rounds, around each point.
            half = torch.full_like(priors, prediction.levels.shapes[level].stride_px / 2)
            priors = torch.cat((priors - half, priors + half), dim=1)
        case.oracle.check(f"eval/anchors/{level}", priors)


@pytest.mark.parametrize("stage", TRAIN_STAGES)
def test_training(case: Case, stage: str) -> None:
    oracle = case.oracle
    maps, prediction = case.training
    _, targets = case.train_batch(stage)
    oracle.check(f"{stage}/pre/tensor", maps.pixels)
    for picture, target in enumerate(targets):
        oracle.check(f"{stage}/pre/gt_boxes/{picture}", target.boxes_xyxy)
        check_assignment(case, stage, prediction, target, picture)
    losses = case.head.loss(prediction, targets)
    for ours, value in losses.items():
        recorded = float(oracle.full(f"{stage}/loss/{TERMS[ours]}"))
        assert float(value.detach()) == pytest.approx(recorded, rel=1e-6), ours
    assert len(losses) == sum(name.startswith(f"{stage}/loss/") for name in oracle.manifest["arrays"])
    if stage == "train":
        check_gradients(oracle, case.detector, case.key_map, case.names, maps, losses)


def check_assignment(case: Case, stage: str, prediction: DensePrediction, target: Target, picture: int) -> None:
    priors, levels, head = case.priors(prediction), prediction.levels, case.head
    if isinstance(head, FCOSHead):
        matches = head.match(priors, levels.shapes, target)
    else:
        matches = head.match(torch.cat(priors), target, levels.image_sizes[picture], levels.shapes)
    positive = matches.positive.nonzero().flatten()
    counts = [len(positive), int(matches.negative.sum())]
    counts.append(sum(map(len, priors)) - sum(counts))
    name = f"{stage}/assign/{{}}/{picture}".format
    case.oracle.check(name("num_pos_neg_ignored"), torch.tensor(counts), rtol=0)
    case.oracle.check(name("positive_anchor_index"), positive, rtol=0)
    case.oracle.check(name("positive_matched_gt"), matches.gt_index[positive], rtol=0)
