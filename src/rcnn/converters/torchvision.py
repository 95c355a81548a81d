"""Checkpoints of torchvision's Faster R-CNN models, before and after release 0.13.

The structure (which model, which depth, how many classes) is read from the keys and shapes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rcnn.config.edit import edit
from rcnn.converters.interface import UnnamedClasses
from rcnn.converters.key_map import Change, Converted, Dropped, KeyMap, Rule
from rcnn.errors import CheckpointError, Problem
from rcnn.recipes import catalogue
from rcnn.recipes.recipe import Recipe, ResNetSpec
from rcnn.records import ClassTable


def _background_last(value: Tensor) -> Tensor:
    return torch.cat((value[1:], value[:1]))


def _background_first(value: Tensor) -> Tensor:
    return torch.cat((value[-1:], value[:-1]))


def _without_background_box(value: Tensor) -> Tensor:
    return value[4:]


def _with_background_box(value: Tensor) -> Tensor:
    # torchvision never reads these four rows.
    return torch.cat((torch.zeros_like(value[:4]), value))


_CLASSES = Change(forward=_background_last, backward=_background_first)
_DELTAS = Change(forward=_without_background_box, backward=_with_background_box)

_COMMON = (
    Rule(theirs="rpn.head.conv.{}.0.{}", ours="proposals.head.tower.convs.{}.{}"),
    Rule(theirs="rpn.head.cls_logits.{}", ours="proposals.head.tower.classes.{}"),
    Rule(theirs="rpn.head.bbox_pred.{}", ours="proposals.head.tower.deltas.{}"),
    Rule(theirs="roi_heads.box_head.fc6.{}", ours="roi.box_head.fc6.{}"),
    Rule(theirs="roi_heads.box_head.fc7.{}", ours="roi.box_head.fc7.{}"),
    Rule(theirs="roi_heads.box_head.5.{}", ours="roi.box_head.fc.{}"),
    Rule(theirs="roi_heads.box_head.{}.{}.{}", ours="roi.box_head.convs.{}.{}.{}"),
    Rule(theirs="roi_heads.box_predictor.cls_score.{}", ours="roi.predictor.classes.{}", change=_CLASSES),
    Rule(theirs="roi_heads.box_predictor.bbox_pred.{}", ours="roi.predictor.deltas.{}", change=_DELTAS),
    Rule(theirs="backbone.fpn.inner_blocks.{}.{}.{}", ours="neck.lateral.{}.{}.{}"),
    Rule(theirs="backbone.fpn.layer_blocks.{}.{}.{}", ours="neck.output.{}.{}.{}"),
)
RESNET = KeyMap(
    rules=(*_COMMON, Rule(theirs="backbone.body.{}", ours="backbone.{}")),
)
_RESNET_FROZEN = KeyMap(
    rules=RESNET.rules,
    dropped=(
        Dropped(pattern=r"backbone\.body\..*num_batches_tracked", reason="a frozen batch norm counts no batches"),
    ),
)
MOBILENET = KeyMap(
    rules=(*_COMMON, Rule(theirs="backbone.body.{}", ours="backbone.features.{}")),
    dropped=_RESNET_FROZEN.dropped,
)

# Names of the same tensors in files written before 0.13.
_OLD_NAMES = (
    (r"rpn\.head\.conv\.(weight|bias)", r"rpn.head.conv.0.0.\1"),
    (r"backbone\.fpn\.(inner_blocks|layer_blocks)\.(\d+)\.(weight|bias)", r"backbone.fpn.\1.\2.0.\3"),
)


def modern_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict under the names of release 0.13 and later."""
    renamed: dict[str, Tensor] = {}
    problems = []
    for key, value in state.items():
        name = key
        for old, new in _OLD_NAMES:
            name = re.sub(rf"^{old}$", new, name)
        if name in renamed:
            problems.append(Problem(where=key, given=f"{name} is there under its old and its new name"))
        renamed[name] = value
    if problems:
        raise CheckpointError(problems)
    return renamed


@dataclass(frozen=True, kw_only=True)
class TorchvisionModel:
    """What a file holds: the recipe that builds it, its classes, and the table of its keys."""

    recipe_name: str
    recipe: Recipe
    classes: ClassTable
    key_map: KeyMap

    @property
    def published_on_coco(self) -> bool:
        """A ResNet-50 with frozen norms and COCO's 90 outputs: most likely torchvision's own COCO_V1 file."""
        backbone = self.recipe.detector.backbone
        frozen = isinstance(backbone, ResNetSpec) and backbone.norm == "frozen" and backbone.depth == 50
        return frozen and self.classes == coco_91_classes()


def recognise(state: Mapping[str, Tensor], class_names: tuple[str, ...] | None = None) -> TorchvisionModel:
    """Which model the (modern) keys are of. `class_names` for a file that was not trained on COCO's 90 ids.

    Raises `CheckpointError` where it is none of torchvision's Faster R-CNN models.
    """
    if "roi_heads.box_predictor.cls_score.weight" not in state:
        raise CheckpointError(
            Problem(
                where="the keys",
                given=f"no roi_heads.box_predictor.cls_score.weight among {len(state)} keys, first {sorted(state)[:3]}",
                allowed="a state dict of torchvision.models.detection.FasterRCNN",
            )
        )
    num_classes = len(state["roi_heads.box_predictor.cls_score.weight"]) - 1
    classes = _classes(num_classes, class_names)
    if "backbone.body.0.0.weight" in state:
        named, changes, key_map = catalogue.faster_rcnn_mobilenet_v3_large_fpn, {}, MOBILENET
    elif "roi_heads.box_head.5.weight" in state:
        named, changes, key_map = catalogue.faster_rcnn_resnet50_fpn_v2, _BATCH_NORM, RESNET
    else:
        changes = {"detector.backbone.depth": resnet_depth(state)}
        named, key_map = catalogue.faster_rcnn_resnet50_fpn, _RESNET_FROZEN
    return TorchvisionModel(recipe_name=named.__name__, recipe=edit(named(), changes), classes=classes, key_map=key_map)


def resnet_depth(state: Mapping[str, Tensor]) -> int:
    """Of `backbone.body`. Raises `CheckpointError` where its layers are of none that is known."""
    counts = tuple(
        len({key.split(".")[3] for key in state if key.startswith(f"backbone.body.layer{i}.")}) for i in range(1, 5)
    )
    bottleneck = "backbone.body.layer1.0.conv3.weight" in state
    depths: dict[tuple[int, ...], int] = {(2, 2, 2, 2): 18, (3, 4, 6, 3): 50 if bottleneck else 34, (3, 4, 23, 3): 101}
    if counts not in depths:
        raise CheckpointError(
            Problem(
                where="backbone.body",
                given=f"layers of {counts} blocks",
                allowed="MobileNetV3-Large, or a ResNet of depth 18, 34, 50 or 101",
            )
        )
    return depths[counts]


# torchvision trains these with plain batch norm on one process and with synchronised on several: the numbers are one.
_BATCH_NORM = {
    "detector.backbone.norm": "batch",
    "detector.neck.norm": "batch",
    "detector.roi.box_head.norm": "batch",
}

# Ids of COCO's 2014 list that its detection data never uses. torchvision's models have an output for each, which a
# softmax over all of them cannot do without.
_COCO_UNUSED = frozenset({12, 26, 29, 30, 45, 66, 68, 69, 71, 83})


def coco_91_classes() -> ClassTable:
    """Ids 1 to 90 with COCO's names; an id that COCO does not use is called `unused 12`."""
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"][1:]
    return ClassTable(
        names=tuple(f"unused {index}" if index in _COCO_UNUSED else name for index, name in enumerate(names, 1)),
        category_ids=tuple(range(1, len(names) + 1)),
    )


def _classes(num_classes: int, given: tuple[str, ...] | None) -> ClassTable:
    coco = coco_91_classes()
    if given is None and num_classes == len(coco):
        return coco
    if given is None or len(given) != num_classes:
        raise UnnamedClasses(
            Problem(
                where="roi_heads.box_predictor.cls_score.weight",
                given=f"{num_classes} classes and background, and {'no' if given is None else len(given)} class names",
                allowed=f"{num_classes} names, in the order of the labels 1..{num_classes}",
                remedy="give them with --classes NAME,NAME,... or --classes FILE",
            ),
            count=num_classes,
        )
    return ClassTable(names=given)


def convert(
    state: Mapping[str, Tensor],
    *,
    class_names: tuple[str, ...] | None = None,
    overrides: Mapping[str, object] | None = None,
) -> tuple[Recipe, ClassTable, Converted]:
    """A torchvision state dict as ours: recipe, classes, tensors. `overrides` change the recipe where the keys cannot
    tell (the 320-pixel model and the zero epsilon of COCO_V1 have the same keys as their siblings)."""
    modern = modern_names(state)
    model = recognise(modern, class_names)
    recipe = edit(model.recipe, dict(overrides)) if overrides else model.recipe
    return recipe, model.classes, model.key_map.to_ours(modern)
