"""State dicts of torchvision's one-stage detectors, FCOS and RetinaNet on a ResNet with FPN: how each key becomes ours.

Their class 0 stands for background, though a sigmoid needs none: an output that is trained to be never right. It stays,
as a class that no data has, because the losses count it; label l is output l in both systems.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from rcnn.config.edit import edit
from rcnn.converters.interface import UnnamedClasses
from rcnn.converters.key_map import Dropped, KeyMap, Rule
from rcnn.converters.torchvision import coco_91_classes, resnet_depth
from rcnn.converters.torchvision import modern_names as modern_pyramid_names
from rcnn.errors import CheckpointError, Problem
from rcnn.recipes.heads import CentreMatcherSpec, FCOSSpec, GIoUSpec, PointSpec, RetinaNetSpec
from rcnn.recipes.parts import AnchorSpec, DeltaCoderSpec, MatcherSpec
from rcnn.recipes.recipe import MultiStepSpec, OneStageSpec, Recipe, ResNetSpec, SGDSpec, TrainSpec, WarmUpSpec
from rcnn.records import ClassTable

Architecture = Literal["fcos", "retinanet"]
SIGN = "head.classification_head.cls_logits.weight"
_SOURCE = "torchvision's weight pages"

_COMMON = (
    Rule(theirs="backbone.fpn.inner_blocks.{}.{}.{}", ours="neck.lateral.{}.{}.{}"),
    Rule(theirs="backbone.fpn.layer_blocks.{}.{}.{}", ours="neck.output.{}.{}.{}"),
    Rule(theirs="backbone.fpn.extra_blocks.{}", ours="neck.{}"),
    Rule(theirs="backbone.body.{}", ours="backbone.{}"),
)
_DROPPED = (Dropped(pattern=r"backbone\.body\..*num_batches_tracked", reason="a frozen batch norm counts no batches"),)
# The second RetinaNet: batch norms that are trained, group norms in the head, P6 from C5,
# a loss of the boxes themselves.
_RETINANET_V2 = {
    "expected": "COCO val2017 box AP 41.5",
    "detector.backbone.norm": "batch",
    "detector.neck.extra": "convs_on_c5",
    "detector.head.norm": "group",
    "detector.head.box_loss": GIoUSpec(),
}
_TOWERS = {"classification_head": "class_tower", "regression_head": "box_tower"}
_OUTPUTS: dict[Architecture, dict[str, str]] = {
    "fcos": {
        "classification_head.cls_logits": "classes",
        "regression_head.bbox_reg": "distances",
        "regression_head.bbox_ctrness": "centerness",
    },
    "retinanet": {"classification_head.cls_logits": "classes", "regression_head.bbox_reg": "deltas"},
}


@dataclass(frozen=True, kw_only=True)
class TorchvisionDenseModel:
    """What a file holds: the name of its model there, the recipe that builds it, and the table of its keys."""

    architecture: Architecture
    model_name: str
    recipe: Recipe
    num_outputs: int
    key_map: KeyMap


def modern_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict under the names of release 0.13 and later: RetinaNet's convolutions stood in one list with their
    activations. Raises `CheckpointError` where a tensor is there under both names."""
    names = {key: _modern_name(key, state) for key in state}
    taken: dict[str, str] = {}
    problems = []
    for key, name in names.items():
        if name in taken:
            problems.append(Problem(where=key, given=f"{name} is there under its old and its new name"))
        taken[name] = key
    if problems:
        raise CheckpointError(problems)
    return modern_pyramid_names({name: state[key] for name, key in taken.items()})


def _modern_name(key: str, state: Mapping[str, Tensor]) -> str:
    old = re.fullmatch(r"(head\.(?:classification|regression)_head\.conv)\.(\d+)\.(weight|bias)", key)
    if old is None or _architecture(state) == "fcos":
        return key
    return f"{old[1]}.{int(old[2]) // 2}.0.{old[3]}"


def recognise(state: Mapping[str, Tensor], *, head_place: str = "head") -> TorchvisionDenseModel:
    """Which detector the (modern) keys are of, and their table. `head_place` is where its head goes.

    Raises `CheckpointError` where they are of neither.
    """
    architecture = _architecture(state)
    if architecture is None:
        raise CheckpointError(
            Problem(
                where="the keys",
                given=f"no {SIGN} among {len(state)}, first {sorted(state)[:3]}",
                allowed="a state dict of torchvision.models.detection.FCOS or RetinaNet",
            )
        )
    num_anchors = 9 if architecture == "retinanet" else 1
    structure = {"detector.backbone.depth": resnet_depth(state), "detector.head.num_convs": _num_convs(state)}
    recipe = edit(_fcos() if architecture == "fcos" else _retinanet(), structure)
    version_2 = architecture == "retinanet" and "head.classification_head.conv.0.1.weight" in state
    if version_2:
        recipe = edit(recipe, _RETINANET_V2)
    return TorchvisionDenseModel(
        architecture=architecture,
        model_name=f"{architecture}_resnet50_fpn" + ("_v2" if version_2 else ""),
        recipe=recipe,
        num_outputs=len(state[SIGN]) // num_anchors,
        key_map=key_map_of(recipe, head_place=head_place),
    )


def recipes() -> tuple[Recipe, ...]:
    """The recipes of all models that are known here."""
    return _fcos(), _retinanet(), edit(_retinanet(), _RETINANET_V2)


def _fcos() -> Recipe:
    """FCOS as `fcos_resnet50_fpn` of release 0.12 and later has it."""
    head = FCOSSpec(
        conv_bias=True,
        scaled=False,
        centerness_branch="boxes",
        distances="relu",
        points=PointSpec(offset=0.0, stride_rule="image_over_grid"),
        matcher=CentreMatcherSpec(radius_strides=1.5, range_ends="excluded"),
        box_loss="giou",
        box_weights="equal",
        score_fusion="sqrt",
    )
    detector = OneStageSpec(head=head, score_threshold=0.2, nms_iou=0.6)
    return Recipe(expected="COCO val2017 box AP 39.2", source=_SOURCE, detector=detector, train=_training(0.01))


def _retinanet() -> Recipe:
    """RetinaNet as `retinanet_resnet50_fpn` has it: anchors rounded to whole pixels."""
    sizes = tuple(tuple(float(int(side * 2 ** (step / 3))) for step in range(3)) for side in (32, 64, 128, 256, 512))
    head = RetinaNetSpec(
        anchors=AnchorSpec(sizes_px=sizes, rounded=True, stride_rule="image_over_grid"),
        matcher=MatcherSpec(positive_iou=0.5, negative_iou=0.4, low_quality_iou=0.0),
        coder=DeltaCoderSpec(),
        normalizer="picture",
        beyond_picture="negative",
    )
    detector = OneStageSpec(head=head, max_detections=300)
    return Recipe(expected="COCO val2017 box AP 36.4", source=_SOURCE, detector=detector, train=_training(0.01))


def _training(lr: float) -> TrainSpec:
    """The references' commands: 26 epochs of batches of 16, a tenth of the rate after 16 and 22."""
    schedule = MultiStepSpec(milestones=(16 / 26, 22 / 26))
    return TrainSpec(
        epochs=26, batch_size=16, optimizer=SGDSpec(lr=lr), schedule=schedule, warm_up=WarmUpSpec(steps=1000)
    )


def _num_convs(state: Mapping[str, Tensor]) -> int:
    """Convolutions are the tensors of four dimensions."""
    tower = "head.classification_head.conv."
    return sum(key.startswith(tower) and value.dim() == 4 for key, value in state.items())


def _architecture(state: Mapping[str, Tensor]) -> Architecture | None:
    if SIGN not in state:
        return None
    return "fcos" if "head.regression_head.bbox_ctrness.weight" in state else "retinanet"


def key_map_of(recipe: Recipe, *, head_place: str = "head") -> KeyMap:
    """The table of a detector with FCOS's or RetinaNet's head."""
    assert isinstance(recipe.detector, OneStageSpec)
    head = recipe.detector.head
    assert isinstance(head, FCOSSpec | RetinaNetSpec)
    norms_count = isinstance(recipe.detector.backbone, ResNetSpec) and recipe.detector.backbone.norm in (
        "batch",
        "sync",
    )
    rules = (*_COMMON, *_head_rules(head.type, head.num_convs, f"{head_place}.tower"))
    return KeyMap(rules=rules, dropped=() if norms_count else _DROPPED)


def _head_rules(architecture: Architecture, num_convs: int, tower: str) -> Iterable[Rule]:
    for theirs, ours in _TOWERS.items():
        if architecture == "retinanet":
            yield Rule(theirs=f"head.{theirs}.conv.{{}}.{{}}.{{}}", ours=f"{tower}.{ours}.layers.{{}}.{{}}.{{}}")
            continue
        # Convolution, norm and activation take turns in one list; an activation has no key.
        for number in range(num_convs):
            for part in (0, 1):
                place = f"{tower}.{ours}.layers.{number}.{part}"
                yield Rule(theirs=f"head.{theirs}.conv.{3 * number + part}.{{}}", ours=f"{place}.{{}}")
    for theirs, ours in _OUTPUTS[architecture].items():
        yield Rule(theirs=f"head.{theirs}.{{}}", ours=f"{tower}.{ours}.{{}}")


def coco_classes() -> ClassTable:
    """Outputs 0 to 90 of torchvision's COCO weights; an id that COCO does not use is called `unused 12`."""
    coco = coco_91_classes()
    return ClassTable(names=("unused 0", *coco.names), category_ids=(0, *coco.category_ids))


def classes_of(num_outputs: int, given: tuple[str, ...] | None) -> ClassTable:
    """The class of each output. `given` are the names of all, or of all but output 0, which stands for background.

    Raises `CheckpointError` where there are neither names nor COCO's 91 outputs.
    """
    if given is None and num_outputs == len(coco_classes()):
        return coco_classes()
    if given is not None and len(given) == num_outputs - 1:
        given = ("unused 0", *given)
    if given is None or len(given) != num_outputs:
        raise UnnamedClasses(
            Problem(
                where=SIGN,
                given=f"{num_outputs} outputs, and {'no' if given is None else len(given)} class names",
                allowed=f"{num_outputs - 1} names, in the order of the labels 1..{num_outputs - 1}",
                remedy="give them with --classes NAME,NAME,... or --classes FILE",
            ),
            count=num_outputs,
        )
    return ClassTable(names=given, category_ids=tuple(range(num_outputs)))
