"""detectron2's RetinaNet, stage by stage in float64, from a checkpoint rebuilt under its key names.

Its cell anchors and pixel means are float32 constants: anchors agree to 1e-8, not to the bit. Inference is compared on
one of the two pictures, padded as in the batch; RCNN_PARITY=full takes both. Training is compared on both.
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
from rcnn.converters.detectron2 import recognise
from rcnn.converters.key_map import KeyMap
from rcnn.dense.interface import DensePrediction
from rcnn.dense.normalizers import MovingNormalizer
from rcnn.dense.retinanet import RetinaNetHead
from rcnn.detectors.one_stage import OneStageDetector
from rcnn.engine.checkpoint import load_into
from rcnn.matching.iou import IoUMatcher
from rcnn.necks.fpn import FPN
from rcnn.records import ImageBatch, Target
from rcnn.transforms.batching import ImageNormalizer
from rcnn.transforms.geometry import scale_boxes

# In one process, where a case finds the maps of the one before.
pytestmark = pytest.mark.xdist_group("parity with detectron2 and torchvision")
PREPROCESSING = Preprocessing(rounding="round_half_up", kernel="bilinear_uint8_antialias", labels="coco80")
RATIOS, SIZES = 3, 3
LEVELS = ("p3", "p4", "p5", "p6", "p7")


def retinanet() -> OneStageDetector:
    backbone = ResNetBackbone(depth=50, make_norm=norm_factory("frozen", 1e-5), style="caffe", frozen_stages=2)
    neck = FPN(in_channels=backbone.channels, in_strides_px=backbone.strides_px, extra="convs_on_c5", first_map=1)
    return OneStageDetector(
        normalizer=ImageNormalizer(mean=(103.53, 116.28, 123.675), std=(1.0, 1.0, 1.0), channel_order="bgr"),
        backbone=backbone,
        neck=neck,
        head=RetinaNetHead(
            in_channels=neck.channels,
            num_classes=80,
            strides_px=neck.strides_px,
            matcher=IoUMatcher(positive_iou=0.5, negative_iou=0.4, low_quality_iou=0.0),
            coder=DeltaCoder(),
            normalizer=MovingNormalizer(),
            size_divisor_px=None,
            clips_candidates=False,
        ),
        detection_filter=DetectionFilter(score_threshold=0.0, nms_iou=0.5, min_side_px=0.0),
    )


@dataclass
class Case:
    """The detector with the recorded weights, and the maps of its trunk."""

    oracle: Oracle
    detector: OneStageDetector
    key_map: KeyMap
    names: Mapping[str, str]
    memory: MapMemory
    pictures: Sequence[int]

    @property
    def head(self) -> RetinaNetHead:
        head = self.detector.head
        assert isinstance(head, RetinaNetHead)
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


@pytest.fixture(scope="module")
def case(oracle: Callable[[str], Oracle], memory: MapMemory) -> Case:
    recorded = oracle("detectron2/retinanet_R_50_FPN_1x")
    detector = retinanet().double().eval()
    state = recorded.state_dict()
    key_map = recognise(state).key_map
    converted = key_map.to_ours(state)
    assert set(converted.names) == set(state)
    load_into(detector, converted.state)
    return Case(recorded, detector, key_map, converted.names, memory, pictures_of(1))


def size_by_size(maps: Tensor) -> Tensor:
    """Maps [N, A * width, H, W] in its order of the anchors of a cell; ours is ratio by ratio."""
    grouped = maps.reshape(len(maps), RATIOS, SIZES, -1, *maps.shape[2:])
    return grouped.transpose(1, 2).reshape(maps.shape)


def its_index(index: Tensor) -> Tensor:
    """The places of anchors in its order."""
    cell, anchor = index // (RATIOS * SIZES), index % (RATIOS * SIZES)
    return cell * (RATIOS * SIZES) + anchor % SIZES * RATIOS + anchor // SIZES


@torch.no_grad()
def test_inference(case: Case) -> None:
    oracle, detector = case.oracle, case.detector
    both, _ = PREPROCESSING.batch(oracle, short_side=800, max_long_side=1333)
    for picture, size in enumerate(both.sizes):
        pixels = both.pixels[picture, :, : size.height, : size.width].flip(0)
        oracle.check(f"eval/pre/resized_uint8_bgr/{picture}", pixels, rtol=0)
    oracle.check("eval/pre/tensor", detector.normalizer(both))
    oracle.check("eval/pre/image_sizes_hw", torch.tensor(both.sizes), rtol=0)
    for picture in case.pictures:
        batch = only(both, picture)
        maps = case.memory.maps(detector, batch, gradient=False)
        for name, x in zip(("res3", "res4", "res5"), maps.body[1:], strict=True):
            oracle.check_rows(f"eval/body/{name}", x, picture)
        for name, x in zip(LEVELS, maps.pyramid, strict=True):
            oracle.check_rows(f"eval/feature/{name}", x, picture)
        prediction = case.head(detector.levels(maps.pyramid, batch))
        check_head(case, prediction, picture)
        (found,) = detector.detect(prediction)
        boxes = scale_boxes(found.boxes_xyxy, batch.sizes[0], batch.original_sizes[0])
        oracle.check(f"eval/detections/{picture}/boxes", boxes)
        oracle.check(f"eval/detections/{picture}/scores", found.scores)
        oracle.check(f"eval/detections/{picture}/labels", found.labels)


def check_head(case: Case, prediction: DensePrediction, picture: int) -> None:
    for level, anchors in enumerate(case.head.make_anchors(prediction)):
        case.oracle.check_rows(f"eval/head/logits/{level}", size_by_size(prediction.classes[level]), picture)
        case.oracle.check_rows(f"eval/head/deltas/{level}", size_by_size(prediction.boxes[level]), picture)
        theirs = anchors.reshape(-1, RATIOS, SIZES, 4).transpose(1, 2).reshape(-1, 4)
        case.oracle.check(f"eval/anchors/{level}", theirs)


@pytest.mark.parametrize("stage", TRAIN_STAGES)
def test_training(case: Case, stage: str) -> None:
    oracle = case.oracle
    maps, prediction = case.training
    batch, targets = case.train_batch(stage)
    oracle.check(f"{stage}/pre/tensor", maps.pixels)
    oracle.check(f"{stage}/pre/image_sizes_hw", torch.tensor(batch.sizes), rtol=0)
    anchors = torch.cat(case.head.make_anchors(prediction))
    for picture, target in enumerate(targets):
        oracle.check(f"{stage}/pre/gt_boxes/{picture}", target.boxes_xyxy)
        matches = case.head.match(anchors, target, batch.sizes[picture], prediction.levels.shapes)
        positive = matches.positive.nonzero().flatten()
        order = its_index(positive).argsort()
        counts = [len(positive), int(matches.negative.sum())]
        counts.append(len(anchors) - sum(counts))
        name = f"{stage}/assign/{{}}/{picture}".format
        oracle.check(name("num_pos_neg_ignored"), torch.tensor(counts), rtol=0)
        oracle.check(name("positive_anchor_index"), its_index(positive)[order], rtol=0)
        oracle.check(name("positive_anchor_gt_box"), target.boxes_xyxy[matches.gt_index[positive[order]]])
    normalizer = case.head.normalizer
    assert isinstance(normalizer, MovingNormalizer)
    # In evaluation mode, where the moving mean begins at 100 each time.
    oracle.check(f"{stage}/loss_normalizer_initial", normalizer.get_buffer("mean"))
    losses = case.head.loss(prediction, targets)
    for ours, theirs in (("classification", "loss_cls"), ("box", "loss_box_reg")):
        recorded = float(oracle.full(f"{stage}/loss/{theirs}"))
        assert float(losses[ours].detach()) == pytest.approx(recorded, rel=1e-6), ours
    if stage == "train":
        check_gradients(oracle, case.detector, case.key_map, case.names, maps, losses)
