"""torchvision's Faster R-CNN models with random weights that behave like trained ones, and the same as ours.

Norms get the statistics of a picture, so that activations keep their size; the heads are scaled so that scores spread
and as many proposals survive as the model keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from rcnn.config.text import to_yaml
from rcnn.converters.torchvision import convert
from rcnn.detectors.two_stage import TwoStageDetector
from rcnn.engine.checkpoint import CheckpointMeta, save_weights
from rcnn.recipes import catalogue
from rcnn.recipes.checkpoints import read_detector
from rcnn.recipes.models import build_detector
from rcnn.records import ClassTable, ImageBatch, Size

# The standard deviation that the heads' outputs get.
OBJECTNESS_SPREAD, CLASS_SPREAD, DELTA_SPREAD = 3.0, 1.5, 0.3


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model of torchvision and the size of the picture that it is measured on."""

    name: str
    builder: Callable[..., GeneralizedRCNN]
    height: int
    width: int


MODELS = {
    model.name: model
    for model in (
        Model(
            name="fasterrcnn_resnet50_fpn",
            builder=torchvision.models.detection.fasterrcnn_resnet50_fpn,
            height=800,
            width=1216,
        ),
        Model(
            name="fasterrcnn_mobilenet_v3_large_fpn",
            builder=torchvision.models.detection.fasterrcnn_mobilenet_v3_large_fpn,
            height=800,
            width=1216,
        ),
        Model(
            name="fasterrcnn_mobilenet_v3_large_320_fpn",
            builder=torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn,
            height=320,
            width=480,
        ),
    )
}


# As torchvision trained them: COCO's 90 ids.
NUM_CLASSES = 90
MODEL_RECIPES = {
    "fasterrcnn_resnet50_fpn": catalogue.faster_rcnn_resnet50_fpn,
    "fasterrcnn_mobilenet_v3_large_fpn": catalogue.faster_rcnn_mobilenet_v3_large_fpn,
    "fasterrcnn_mobilenet_v3_large_320_fpn": catalogue.faster_rcnn_mobilenet_v3_large_320_fpn,
}


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    """Smooth blobs with noise, uint8 [3, height, width]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, height // 32 + 1, width // 32 + 1, generator=generator)
    smooth = F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False)[0]
    noisy = smooth + 0.1 * torch.randn(3, height, width, generator=generator)
    return (noisy.clamp(0, 1) * 255).to(torch.uint8)


def torchvision_model(model: Model) -> GeneralizedRCNN:
    """In evaluation mode, as torchvision builds it (frozen norms), without its resize: pictures come in their size."""
    torch.manual_seed(0)
    built = _bare(model)
    with torch.no_grad():
        _calibrate(built, picture(model.height, model.width) / 255)
    return built


def loaded_torchvision_model(model: Model, file: str) -> GeneralizedRCNN:
    built = _bare(model)
    built.load_state_dict(torch.load(file, weights_only=True))
    return built


def loaded_detector(file: str) -> TwoStageDetector:
    detector = read_detector(Path(file)).detector
    assert isinstance(detector, TwoStageDetector)
    return detector.eval()


def save_both(theirs: GeneralizedRCNN, model: Model, folder: Path) -> dict[str, str]:
    """The same weights as a file of theirs and as a checkpoint of ours, by the name of the system."""
    files = {"torchvision": str(folder / "torchvision.pth"), "rcnn": str(folder / "rcnn.safetensors")}
    torch.save(theirs.state_dict(), files["torchvision"])
    names = tuple(f"class {number}" for number in range(1, NUM_CLASSES + 1))
    classes = ClassTable(names=names, category_ids=tuple(range(1, NUM_CLASSES + 1)))
    meta = CheckpointMeta(recipe=to_yaml(MODEL_RECIPES[model.name]()), classes=classes)
    save_weights(Path(files["rcnn"]), our_detector(theirs, model).state_dict(), meta)
    return files


def _bare(model: Model) -> GeneralizedRCNN:
    built = model.builder(weights=None, weights_backbone=None, _skip_resize=True)
    _freeze_norms(built)
    return built.eval()


def _freeze_norms(model: nn.Module) -> None:
    """torchvision builds plain batch norms where no weights are given; its detectors run on frozen ones."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, torchvision.ops.FrozenBatchNorm2d(child.num_features, eps=child.eps))


def _calibrate(model: GeneralizedRCNN, image: Tensor) -> None:
    hooks = [
        module.register_forward_pre_hook(_take_statistics)
        for module in model.modules()
        if isinstance(module, torchvision.ops.FrozenBatchNorm2d)
    ]
    images, _ = model.transform([image])
    features = list(model.backbone(images.tensors).values())
    for hook in hooks:
        hook.remove()
    head = model.rpn.head
    hidden = torch.cat([head.conv(level).flatten(2) for level in features], dim=2)
    _spread(head.cls_logits, hidden, OBJECTNESS_SPREAD)
    _spread(head.bbox_pred, hidden, DELTA_SPREAD)
    boxes = [torch.tensor([[50.0, 60.0, 200.0, 220.0], [10.0, 10.0, 60.0, 90.0], [0.0, 0.0, 300.0, 300.0]])]
    names = [str(index) for index in range(len(features) - 1)]
    levels = dict(zip(names, features, strict=False))
    pooled = model.roi_heads.box_head(model.roi_heads.box_roi_pool(levels, boxes, images.image_sizes))
    _spread(model.roi_heads.box_predictor.cls_score, pooled.t()[None], CLASS_SPREAD)
    _spread(model.roi_heads.box_predictor.bbox_pred, pooled.t()[None], DELTA_SPREAD * 5)


def _take_statistics(norm: nn.Module, arguments: tuple[Tensor]) -> None:
    (x,) = arguments
    norm.running_mean.copy_(x.mean((0, 2, 3)))
    norm.running_var.copy_(x.var((0, 2, 3)) + 1e-3)


def _spread(layer: nn.Module, inputs: Tensor, wanted: float) -> None:
    """Scales the layer so that its outputs on `inputs` [1, channels, places] have the wanted standard deviation."""
    weight = layer.weight.flatten(1)
    layer.weight.mul_(wanted / (weight @ inputs[0]).std())


def our_detector(theirs: GeneralizedRCNN, model: Model) -> TwoStageDetector:
    """The same weights in our detector, by our converter."""
    _, _, converted = convert(theirs.state_dict())
    detector = build_detector(MODEL_RECIPES[model.name]().detector, num_classes=NUM_CLASSES, pretrained=False)
    detector.load_state_dict(converted.state)
    return detector.eval()


def batch_of(image: Tensor) -> ImageBatch:
    size = Size(*image.shape[-2:])
    return ImageBatch(pixels=image[None], sizes=(size,), original_sizes=(size,))
