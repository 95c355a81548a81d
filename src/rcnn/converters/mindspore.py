"""Checkpoints of MindSpore RCNN (`official/cv/RCNN`): Faster R-CNN on ResNets with FPN."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from rcnn.config.edit import edit
from rcnn.converters.coco_classes import coco_80_classes
from rcnn.converters.interface import AbstractSystem, ForeignFile, ForeignModel, UnnamedClasses, Wanted
from rcnn.converters.key_map import Added, Dropped, KeyMap, Rule
from rcnn.errors import CheckpointError, Problem
from rcnn.recipes.mindspore_catalogue import faster_rcnn_resnet50_fpn_mindspore
from rcnn.recipes.recipe import Recipe, ResNetSpec
from rcnn.records import ClassTable

_NORM = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
_TRUNK = "backbone.bottom_up."

# A stem, and blocks: what stands where in both. The kinds are told apart by name, so that the table reads both ways.
_NORMS = {
    "bn1": "bn1",
    "layer{}.bn{}": "layer{}.bn{}",
    "layer{}.down_sample.1": "layer{}.downsample.1",
}
_CONVS = {
    "conv1": "conv1",
    "layer{}.conv{}": "layer{}.conv{}",
    "layer{}.down_sample.0": "layer{}.downsample.0",
}
_RULES = (
    *(
        Rule(theirs=f"{_TRUNK}{their_norm}.{theirs}", ours=f"backbone.{our_norm}.{ours}")
        for their_norm, our_norm in _NORMS.items()
        for theirs, ours in _NORM.items()
    ),
    *(Rule(theirs=f"{_TRUNK}{theirs}.weight", ours=f"backbone.{ours}.weight") for theirs, ours in _CONVS.items()),
    Rule(theirs="backbone.lateral_convs.{}.conv.0.{}", ours="neck.lateral.{}.0.{}"),
    Rule(theirs="backbone.fpn_convs.{}.conv.0.{}", ours="neck.output.{}.0.{}"),
    Rule(theirs="rpn_head.rpn_feat.rpn_conv.{}", ours="proposals.head.tower.convs.0.{}"),
    Rule(theirs="rpn_head.rpn_feat.rpn_rois_score.{}", ours="proposals.head.tower.classes.{}"),
    Rule(theirs="rpn_head.rpn_feat.rpn_rois_delta.{}", ours="proposals.head.tower.deltas.{}"),
    Rule(theirs="bbox_head.head.{}", ours="roi.box_head.{}"),
    Rule(theirs="bbox_head.bbox_cls.{}", ours="roi.predictor.classes.{}"),
    Rule(theirs="bbox_head.bbox_delta.{}", ours="roi.predictor.deltas.{}"),
)
_DROPPED = (
    Dropped(pattern=r"(moments|accum|accumulation|moment1|moment2)\..*", reason="of the optimizer"),
    Dropped(
        pattern=r"learning_rate|momentum|weight_decay|global_step|epoch_num|step_num|current_iterator_step|scale_sense"
        r"|last_overflow_iterator_step",
        reason="of the training, not of the detector",
    ),
    Dropped(pattern=r"backbone\.bottom_up\.classifier\..*", reason="of the ImageNet classifier"),
)
_SIGNS = ("rpn_head.rpn_feat.rpn_rois_score.weight", "bbox_head.bbox_cls.weight")
_MASK = "mask_head."


class MindSporeSystem(AbstractSystem):
    """MindSpore RCNN's `.ckpt` files."""

    name = "mindspore"

    def signs(self, file: ForeignFile) -> str | None:
        found = all(key in file.tensors for key in _SIGNS)
        return f"it has {_SIGNS[0]} and {_SIGNS[1]}" if found else None

    def recognise(self, file: ForeignFile, wanted: Wanted) -> ForeignModel:
        _refuse_others(file.tensors)
        recipe = wanted.recipe or faster_rcnn_resnet50_fpn_mindspore()
        depth = _depth(file.tensors)
        changes: dict[str, object] = {"detector.backbone.depth": depth, "detector.backbone.weights": None}
        classes, assumptions = _classes(len(file.tensors[_SIGNS[1]]) - 1, wanted.class_names)
        if wanted.recipe is None:
            assumptions.append(
                "a canvas of 768x1280 and batch norms that are trained, as its configs have them; for others: --config"
            )
        return ForeignModel(
            recipe_name=wanted.recipe_name or faster_rcnn_resnet50_fpn_mindspore.__name__,
            recipe=edit(recipe, changes),
            classes=classes,
            tensors=file.tensors,
            key_map=lambda recipe: key_map_of(file.tensors, recipe),
            assumptions=tuple(assumptions),
        )


def key_map_of(names: Iterable[str], recipe: Recipe) -> KeyMap:
    """The table; where our norms count batches, a count of 0 for each, which MindSpore's do not have."""
    backbone = recipe.detector.backbone
    counted = isinstance(backbone, ResNetSpec) and backbone.norm != "frozen"
    norms = [name for name in names if name.startswith(_TRUNK) and name.endswith(".moving_mean")] if counted else []
    bare = KeyMap(rules=_RULES, dropped=_DROPPED)
    ours = bare.to_ours({name: torch.zeros(0) for name in norms}).names.values()
    added = tuple(
        Added(
            ours=name.replace("running_mean", "num_batches_tracked"),
            value=torch.zeros((), dtype=torch.int64),
            reason="MindSpore's norms do not count their batches",
        )
        for name in ours
    )
    return KeyMap(rules=_RULES, dropped=_DROPPED, added=added)


def _refuse_others(tensors: Mapping[str, Tensor]) -> None:
    problems = [Problem(where=key, given="missing in the file") for key in _SIGNS if key not in tensors]
    problems += [
        Problem(where=key, given=f"shape {tuple(tensors[key].shape)}", allowed="a layer's weights")
        for key in _SIGNS
        if key in tensors and (tensors[key].ndim < 2 or not len(tensors[key]))
    ]
    mask = next((key for key in tensors if key.startswith(_MASK)), None)
    if mask is not None:
        problems.append(Problem(where=mask, given="a Mask R-CNN", allowed="a Faster R-CNN: boxes without masks"))
    if problems:
        raise CheckpointError(problems)


_DEPTHS: dict[tuple[int, ...], int] = {(2, 2, 2, 2): 18, (3, 4, 6, 3): 50, (3, 4, 23, 3): 101}


def _depth(tensors: Mapping[str, Tensor]) -> int:
    counts = tuple(
        len({key.split(".")[3] for key in tensors if key.startswith(f"{_TRUNK}layer{stage}.")}) for stage in range(1, 5)
    )
    grouped = f"{_TRUNK}layer1.0.conv2.weight"
    wide = grouped in tensors and tensors[grouped].ndim == 4 and tensors[grouped].shape[1] not in (64,)
    if counts not in _DEPTHS or wide:
        kind = "a ResNeXt" if wide else f"layers of {counts} blocks"
        raise CheckpointError(
            Problem(where=_TRUNK.rstrip("."), given=kind, allowed="a ResNet of depth 18, 34, 50 or 101")
        )
    plain = f"{_TRUNK}layer1.0.conv3.weight" not in tensors
    return 34 if counts == (3, 4, 6, 3) and plain else _DEPTHS[counts]


def _classes(count: int, given: Sequence[str] | None) -> tuple[ClassTable, list[str]]:
    coco = coco_80_classes()
    if given is None and count == len(coco):
        return coco, ["the 80 classes of COCO in the order of their ids; for others: --classes"]
    if given is None or len(given) != count:
        raise UnnamedClasses(
            Problem(
                where=_SIGNS[1],
                given=f"{count} classes and background, and {'no' if given is None else len(given)} class names",
                allowed=f"{count} names, in the order of the labels 0..{count - 1}",
                remedy="give them with --classes NAME,NAME,... or --classes FILE",
            ),
            count=count,
        )
    return ClassTable(names=tuple(given)), []
