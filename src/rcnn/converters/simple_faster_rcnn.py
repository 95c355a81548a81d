"""Checkpoints of simple-faster-rcnn-pytorch: VGG16 with RoIPool, trained on VOC or on classes of one's own.

Its boxes are y before x, its first class is background, its RPN has two logits for an anchor, and with Caffe's weights
the network sees blue first, less a mean in the order red, green, blue. Here all that is turned into our conventions
or set down in the recipe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rcnn.config.edit import edit
from rcnn.converters.interface import AbstractSystem, ForeignFile, ForeignModel, UnnamedClasses, Wanted
from rcnn.converters.key_map import Change, KeyMap, Rule
from rcnn.errors import CheckpointError, Problem
from rcnn.recipes import catalogue
from rcnn.recipes.recipe import Recipe
from rcnn.records import ClassTable

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


def _x_first(rows: Tensor) -> Tensor:
    """Rows of deltas, four to a box, with y and x exchanged; the same again turns them back."""
    return rows.reshape(-1, 4, *rows.shape[1:])[:, [1, 0, 3, 2]].reshape(rows.shape)


def _one_logit(rows: Tensor) -> Tensor:
    """Foreground less background: the sigmoid of it is the softmax of the two."""
    return rows[1::2] - rows[0::2]


def _two_logits(rows: Tensor) -> Tensor:
    # Any pair with that difference gives the same scores.
    return torch.stack((torch.zeros_like(rows), rows), dim=1).flatten(0, 1)


def _background_last(rows: Tensor) -> Tensor:
    return torch.cat((rows[1:], rows[:1]))


def _background_first(rows: Tensor) -> Tensor:
    return torch.cat((rows[-1:], rows[:-1]))


def _without_background_box(rows: Tensor) -> Tensor:
    return _x_first(rows[4:])


def _with_background_box(rows: Tensor) -> Tensor:
    # The peer never reads these four rows.
    return torch.cat((torch.zeros_like(rows[:4]), _x_first(rows)))


_SWAP = Change(forward=_x_first, backward=_x_first)


def _key_map(fc7: str) -> KeyMap:
    return KeyMap(
        rules=(
            Rule(theirs="extractor.{}", ours="backbone.features.{}"),
            Rule(theirs="rpn.conv1.{}", ours="proposals.head.tower.convs.0.{}"),
            Rule(
                theirs="rpn.score.{}",
                ours="proposals.head.tower.classes.{}",
                change=Change(forward=_one_logit, backward=_two_logits),
            ),
            Rule(theirs="rpn.loc.{}", ours="proposals.head.tower.deltas.{}", change=_SWAP),
            Rule(theirs="head.classifier.0.{}", ours="roi.box_head.fc6.{}"),
            Rule(theirs=f"{fc7}.{{}}", ours="roi.box_head.fc7.{}"),
            Rule(
                theirs="head.score.{}",
                ours="roi.predictor.classes.{}",
                change=Change(forward=_background_last, backward=_background_first),
            ),
            Rule(
                theirs="head.cls_loc.{}",
                ours="roi.predictor.deltas.{}",
                change=Change(forward=_without_background_box, backward=_with_background_box),
            ),
        )
    )


# fc7 without and with dropout, which takes a place of its own in the peer's `Sequential`.
_PLAIN, _DROPOUT = "head.classifier.2", "head.classifier.3"
_SIGNS = ("extractor.0.weight", "rpn.score.weight", "head.cls_loc.weight", "head.score.weight")

# What the network sees. The mean of Caffe's weights is in the order of RGB, on planes in that of BGR.
_CAFFE = {
    "detector.image.channel_order": "bgr",
    "detector.image.mean": (122.7717, 115.9465, 102.9801),
    "detector.image.std": (1.0, 1.0, 1.0),
}
# The first biases of torchvision's VGG16 (IMAGENET1K_V1). The peer never trains this layer.
_TORCHVISION_BIASES = (0.4034, 0.3778, 0.4644, -0.3228, 0.3940)


class SimpleFasterRCNNSystem(AbstractSystem):
    """simple-faster-rcnn-pytorch: `{'model', 'config', 'other_info', 'vis_info', 'optimizer'}` or bare weights."""

    name = "simple-faster-rcnn"

    def signs(self, file: ForeignFile) -> str | None:
        found = all(key in file.tensors for key in _SIGNS)
        return f"it has {', '.join(_SIGNS[:-1])} and {_SIGNS[-1]}" if found else None

    def recognise(self, file: ForeignFile, wanted: Wanted) -> ForeignModel:
        _refuse_misfits(file.tensors)
        config = _config(file.meta)
        dropout = f"{_DROPOUT}.weight" in file.tensors
        caffe, assumed = _is_caffe(file.tensors, config)
        base = wanted.recipe or catalogue.faster_rcnn_vgg16()
        classes, more = _classes(len(file.tensors["head.score.weight"]) - 1, wanted.class_names)
        changes = {"detector.backbone.weights": None, "detector.roi.box_head.dropout": 0.5 if dropout else 0.0}
        if caffe:
            changes |= _CAFFE
        return ForeignModel(
            recipe_name=wanted.recipe_name or catalogue.faster_rcnn_vgg16.__name__,
            recipe=_as_configured(edit(base, changes), config),
            classes=classes,
            tensors=file.tensors,
            key_map=lambda recipe: _key_map(_DROPOUT if dropout else _PLAIN),
            assumptions=(*assumed, *more),
        )


def _refuse_misfits(tensors: Mapping[str, Tensor]) -> None:
    """Raises `CheckpointError` where a tensor that says what the file holds is missing or is no layer's."""
    problems = [Problem(where=key, given="missing in the file") for key in _SIGNS if key not in tensors]
    problems += [
        Problem(where=key, given=f"shape {tuple(tensors[key].shape)}", allowed="a layer's weights")
        for key in _SIGNS
        if key in tensors and (tensors[key].ndim < 2 or not len(tensors[key]))
    ]
    if problems:
        raise CheckpointError(problems)


def _config(meta: Mapping[str, object]) -> Mapping[str, object]:
    """The options of the training, where the file has them."""
    config = meta.get("config")
    return config if isinstance(config, Mapping) else {}


def _is_caffe(tensors: Mapping[str, Tensor], config: Mapping[str, object]) -> tuple[bool, tuple[str, ...]]:
    """Whether the weights began as Caffe's, and what was assumed of it."""
    told = config.get("caffe_pretrain")
    if isinstance(told, bool):
        return told, ()
    biases = tensors.get("extractor.0.bias", torch.zeros(0)).flatten()[: len(_TORCHVISION_BIASES)].float()
    if len(biases) == len(_TORCHVISION_BIASES) and torch.allclose(biases, torch.tensor(_TORCHVISION_BIASES), atol=1e-3):
        return False, (
            "pixels as torchvision's VGG16 has them: the first layer, which this system never trains, is its own",
        )
    return True, (
        "pixels as Caffe's VGG16 has them (blue first, 0 to 255), since the first layer, which this system never "
        "trains, is not torchvision's; else add detector.image.channel_order=rgb "
        "detector.image.mean=[123.675,116.28,103.53] detector.image.std=[58.395,57.12,57.375]",
    )


def _classes(count: int, given: Sequence[str] | None) -> tuple[ClassTable, tuple[str, ...]]:
    if given is None and count == len(VOC_CLASSES):
        return ClassTable(names=VOC_CLASSES), ("the 20 classes of VOC; for others: --classes",)
    if given is None or len(given) != count:
        raise UnnamedClasses(
            Problem(
                where="head.score.weight",
                given=f"{count} classes and background, and {'no' if given is None else len(given)} class names",
                allowed=f"{count} names, in the order of the labels 1..{count}",
                remedy="give them with --classes NAME,NAME,... or --classes FILE",
            ),
            count=count,
        )
    return ClassTable(names=tuple(given)), ()


def _as_configured(recipe: Recipe, config: Mapping[str, object]) -> Recipe:
    """The recipe with what the training's own options say. Those of no number are left as the system has them."""
    numbers = {
        name: value
        for name, value in config.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and 1e-9 < value < 1e9
    }
    changes: dict[str, object] = {}
    if config.get("use_adam") is True:
        changes["train.optimizer"] = {"type": "adam", "bias_weight_decay": 0.0, "bias_lr_factor": 2.0}
    for option, path in _OPTIONS.items():
        if option in numbers:
            changes[path] = numbers[option]
    for option, path in _SIGMAS.items():
        if option in numbers:
            changes[path] = numbers[option] ** -2
    if "epoch" in numbers:
        # The peer lowers the rate once, after its ninth epoch.
        changes["train.schedule.milestones"] = (9 / numbers["epoch"],) if numbers["epoch"] > 9 else (1.0,)
    return edit(recipe, changes)


_OPTIONS = {
    "min_size": "detector.image.short_side",
    "max_size": "detector.image.max_long_side",
    "epoch": "train.epochs",
    "lr": "train.optimizer.lr",
    "weight_decay": "train.optimizer.weight_decay",
    "lr_decay": "train.schedule.gamma",
}
_SIGMAS = {
    "rpn_sigma": "detector.proposals.head.box_loss.beta",
    "roi_sigma": "detector.roi.box_loss.beta",
}
