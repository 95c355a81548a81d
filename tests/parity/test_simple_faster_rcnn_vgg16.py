"""simple-faster-rcnn-pytorch's VGG16 detector, converted: stage by stage, and from the picture to its detections.

Recorded in float64 but for the pixels, anchors and constants, which it keeps in float32; the training stage as it runs
natively, in float32, because ties of float32 decide which anchors are positive.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import Oracle
from PIL import Image
from torch import Tensor

from rcnn.config.edit import edit
from rcnn.converters.interface import ForeignFile, ForeignModel, Wanted
from rcnn.converters.simple_faster_rcnn import SimpleFasterRCNNSystem
from rcnn.detectors.two_stage import TwoStageDetector
from rcnn.engine.checkpoint import load_into
from rcnn.recipes.models import build_detector, build_normalizer
from rcnn.recipes.recipe import Recipe
from rcnn.records import Detections, ImageBatch, LevelShape, Size, Target
from rcnn.transforms.batching import Sample, collate
from rcnn.transforms.geometry import EvalTransform, Resize

NUM_CLASSES = 20
PX = 1e-3


def swapped(values: Tensor) -> Tensor:
    """xyxy to yxyx, dx dy dw dh to dy dx dh dw, and back."""
    return values[..., [1, 0, 3, 2]]


@pytest.fixture(scope="module")
def recorded(oracle: Callable[[str], Oracle]) -> Oracle:
    return oracle("simple_faster_rcnn/vgg16_voc20")


@pytest.fixture(scope="module")
def peers_weights(recorded: Oracle) -> dict[str, Tensor]:
    return {key: value.float() for key, value in recorded.state_dict().items()}


@pytest.fixture(scope="module")
def model(peers_weights: dict[str, Tensor]) -> ForeignModel:
    """As the peer's `save` writes it."""
    meta = {"config": {"caffe_pretrain": True, "min_size": 600, "max_size": 1000, "use_drop": False}}
    file = ForeignFile(path=Path("fasterrcnn.pth"), tensors=peers_weights, meta=meta)
    system = SimpleFasterRCNNSystem()
    assert system.signs(file)
    model = system.recognise(file, Wanted())
    assert model.assumptions == ("the 20 classes of VOC; for others: --classes",)
    assert len(model.classes) == NUM_CLASSES
    return model


@pytest.fixture(scope="module")
def recipe(model: ForeignModel) -> Recipe:
    """All samples, and few proposals, as the training stage was recorded; else as it was converted."""
    return edit(
        model.recipe,
        {
            "detector.proposals.train.post_nms": 300,
            "detector.proposals.head.sampler": {"type": "every"},
            "detector.roi.sampler": {"type": "every"},
        },
    )


@pytest.fixture(scope="module")
def detector(model: ForeignModel, recipe: Recipe) -> TwoStageDetector:
    converted = model.key_map(recipe).to_ours(model.tensors)
    assert set(converted.names) == set(model.tensors)
    detector = build_detector(recipe.detector, num_classes=NUM_CLASSES, pretrained=False)
    load_into(detector, converted.state)
    assert isinstance(detector, TwoStageDetector)
    return detector.eval()


def read(recorded: Oracle, recipe: Recipe, name: str, short_side: int, long_side: int) -> tuple[ImageBatch, Target]:
    image = recipe.detector.image
    resize = Resize(short_sides=(short_side,), max_long_side=long_side, rounding=image.rounding, kernel=image.kernel)
    truth = json.loads((recorded.inputs / "ground_truth.json").read_text())[name]
    pixels = torch.from_numpy(np.array(Image.open(recorded.inputs / truth["file"]).convert("RGB"))).permute(2, 0, 1)
    target = Target(boxes_xyxy=torch.tensor(truth["boxes"]), labels=torch.tensor(truth["voc20"]))
    resized, target = EvalTransform(resize=resize)(pixels, target)
    sample = Sample(image=resized, target=target, original_size=Size(*pixels.shape[-2:]), image_id=0)
    batch, _ = collate([sample], divisor=image.divisor)
    return batch, target


def test_every_stage_of_inference_agrees(
    recorded: Oracle, recipe: Recipe, detector: TwoStageDetector, peers_weights: dict[str, Tensor]
) -> None:
    """In float64, on the smaller picture. Anchors are rounded to float32 there: 3e-5 px of 720."""
    stage = "eval/1"
    image = recipe.detector.image
    batch, _ = read(recorded, recipe, "astronaut", image.short_side, image.max_long_side)
    pixels = detector.normalizer(batch)
    recorded.check(f"{stage}/pre/tensor", pixels[0])
    with torch.no_grad():
        detector = copy.deepcopy(detector).double()
        levels = detector.levels(detector.neck(detector.backbone(pixels.double())), batch)
        recorded.check(f"{stage}/feature", levels.maps[0])
        prediction = detector.proposals.head(levels)
        anchors = detector.proposals.head.make_anchors(prediction)
        recorded.check(f"{stage}/rpn/anchors_yxyx", swapped(anchors[0]))
        deltas = prediction.boxes[0].permute(0, 2, 3, 1).reshape(1, -1, 4)
        recorded.check(f"{stage}/rpn/locs", swapped(deltas))
        hidden = detector.proposals.head.tower.convs[0](levels.maps[0]).relu()
        weight, bias = (peers_weights[f"rpn.score.{kind}"].double() for kind in ("weight", "bias"))
        scores = F.conv2d(hidden, weight, bias)
        recorded.check(f"{stage}/rpn/scores", scores.permute(0, 2, 3, 1).reshape(1, -1, 2))
        # The peer has two logits for an anchor: their difference is ours.
        torch.testing.assert_close(prediction.classes[0], scores[:, 1::2] - scores[:, 0::2], rtol=1e-5, atol=1e-5)
        (proposals,) = detector.proposals.select(prediction, detector.proposals.test_filter)
        recorded.check(f"{stage}/rpn/proposals_yxyx", swapped(proposals.boxes_xyxy))
        pooled = detector.roi.pooling(levels, [proposals.boxes_xyxy])
        recorded.check(f"{stage}/roi/pooled", pooled)
        features = detector.roi.box_head(pooled)
        recorded.check(f"{stage}/roi/fc7", features)
        logits, box_deltas = detector.roi.predictor(features)
        recorded.check(f"{stage}/roi/scores", logits.roll(1, dims=1))
        first = recorded.full(f"{stage}/roi/cls_locs_first50").reshape(50, -1, 4)[:, 1:]
        torch.testing.assert_close(swapped(box_deltas[:50]), first, rtol=1e-6, atol=1e-6)
        (found,) = detector.roi.detect(logits, box_deltas, [proposals.boxes_xyxy], batch.sizes)
    check_detections(recorded, f"{stage}/detections", found, scale=2.0)


def check_detections(recorded: Oracle, name: str, found: Detections, *, scale: float) -> None:
    """The peer lists them class by class, in pixels of the picture as it was; float32."""
    scores = recorded.full(f"{name}/scores")
    order = scores.argsort(descending=True)
    assert len(found) == len(scores)
    torch.testing.assert_close(found.scores.float(), scores[order], rtol=1e-5, atol=1e-6)
    assert found.labels.tolist() == recorded.full(f"{name}/labels")[order].tolist()
    boxes = (found.boxes_xyxy / scale).float()
    # From the picture, through a resize that is skimage's to the last bit of float32.
    torch.testing.assert_close(swapped(boxes), recorded.full(f"{name}/boxes_yxyx")[order], rtol=0, atol=PX)


def test_pixels_of_torchvisions_weights(recorded: Oracle, peers_weights: dict[str, Tensor]) -> None:
    file = ForeignFile(path=Path("a.pth"), tensors=peers_weights, meta={"config": {"caffe_pretrain": False}})
    recipe = SimpleFasterRCNNSystem().recognise(file, Wanted()).recipe
    image = recipe.detector.image
    batch, _ = read(recorded, recipe, "coffee", image.short_side, image.max_long_side)
    recorded.check("pre_torchvision_normalisation/coffee", build_normalizer(image)(batch)[0])


def test_positive_anchors_are_those_of_float32(recorded: Oracle, recipe: Recipe, detector: TwoStageDetector) -> None:
    """110 in float32, 62 in float64: IoUs that are equal but for rounding."""
    batch, target = read(recorded, recipe, "coffee", 400, 667)
    recorded.check("train/pre/gt_boxes_yxyx", swapped(target.boxes_xyxy))
    head = detector.proposals.head
    grid = LevelShape(height=25, width=37, stride_px=16)
    anchors = head.anchors([grid], batch.padded_size, dtype=torch.float32, device=torch.device("cpu"))[0]
    matches = head.match(anchors, target, batch.sizes[0])
    positive = matches.positive.nonzero().flatten()
    assert positive.tolist() == recorded.full("float32_run/train/rpn/positive_anchor_index").tolist()
    counts = [len(positive), int(matches.negative.sum())]
    counts.append(len(anchors) - sum(counts))
    assert counts == recorded.full("float32_run/train/rpn/num_pos_neg_ignored").tolist()
    deltas = head.coder.encode(target.boxes_xyxy[matches.gt_index[positive]], anchors[positive])
    expected = recorded.full("float32_run/train/rpn/positive_anchor_loc")
    torch.testing.assert_close(swapped(deltas), expected, rtol=1e-5, atol=1e-6)


def test_losses_are_those_of_float32(recorded: Oracle, recipe: Recipe, detector: TwoStageDetector) -> None:
    batch, target = read(recorded, recipe, "coffee", 400, 667)
    with torch.no_grad():
        losses = detector.loss(batch, [target])
    for ours, theirs in LOSSES.items():
        expected = float(recorded.full(f"float32_run/train/loss/{theirs}"))
        assert losses[ours].item() == pytest.approx(expected, rel=1e-4), ours


# Ours and theirs.
LOSSES = {
    "rpn_box": "rpn_loc_loss",
    "rpn_classification": "rpn_cls_loss",
    "roi_box": "roi_loc_loss",
    "roi_classification": "roi_cls_loss",
}
