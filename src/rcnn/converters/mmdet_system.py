"""MMDetection 1 to 3: which of its detectors a file holds, and a detector of ours as a file of version 3."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor

from rcnn.config.edit import edit
from rcnn.converters.coco_classes import coco_80_classes, with_coco_ids
from rcnn.converters.interface import AbstractSystem, ForeignBackbone, ForeignFile, ForeignModel, UnnamedClasses, Wanted
from rcnn.converters.key_map import Dropped, KeyMap, Rule
from rcnn.converters.mmdet import key_map_of
from rcnn.converters.mmdet_export import export
from rcnn.converters.mmdet_meta import FileMeta, conventions_of, read_meta, recipe_inside, style_inside
from rcnn.converters.mmdet_recipes import Style, recipe_of, title_of
from rcnn.converters.mmdet_structure import HeadKind, Structure, read_structure
from rcnn.converters.mmdet_versions import is_of_version_1, modern_tensors
from rcnn.engine.checkpoint import differences
from rcnn.errors import CheckpointError, Problem, RcnnError, RecipeError
from rcnn.recipes.datasets import OBJECT
from rcnn.recipes.mmdetection.config import Translation
from rcnn.recipes.models import build_detector
from rcnn.recipes.recipe import FirstStageSpec, OneStageSpec, Recipe
from rcnn.records import ClassTable

# Heads that the keys of a kind stand for. Others have the same keys and score their boxes otherwise.
_TYPES: dict[HeadKind, tuple[str, ...]] = {
    "rpn": ("RPNHead",),
    "retinanet": ("RetinaHead", "FreeAnchorRetinaHead", "PISARetinaHead"),
    "fcos": ("FCOSHead",),
    "atss": ("ATSSHead",),
    "gfl": ("GFLHead", "LDHead"),
}
_HEAD_SIGN = r"(rpn_head|bbox_head)\.(rpn_cls|retina_cls|conv_cls|fcos_cls|atss_cls|gfl_cls)\.weight"
_SECOND_STAGE_SIGN = r"(roi_head\.)?bbox_head\.(\d+\.)?fc_cls\.weight"
_CLASSIFIER_SIGN = "backbone.layer4.0.conv1.weight"
_CLASSIFIER = KeyMap(
    rules=(
        *(Rule(theirs=f"backbone.{part}.{{}}", ours=f"{part}.{{}}") for part in ("conv1", "bn1")),
        *(Rule(theirs=f"backbone.layer{i}.{{}}", ours=f"layer{i}.{{}}") for i in range(1, 5)),
    ),
    dropped=(Dropped(pattern=r"head\..*", reason="the classes of pictures, not of boxes"),),
)
_CLASSIFIER_SETTINGS = ("detector.backbone.style=pytorch", "detector.image.channel_order=rgb")


def _is_classifier(keys: Collection[str]) -> bool:
    """Of mmpretrain: a ResNet under `backbone.`, a linear `head.` or none, and nothing else."""
    return _CLASSIFIER_SIGN in keys and all(key.startswith(("backbone.", "head.")) for key in keys)


class MMDetectionSystem(AbstractSystem):
    """Faster, Fast and Cascade R-CNN, RPN, RetinaNet, FCOS, ATSS and GFL on a ResNet with FPN."""

    name = "mmdet"

    def signs(self, file: ForeignFile) -> str | None:
        keys = [key.removeprefix("module.") for key in file.tensors]
        neck = next((key for key in keys if key.startswith("neck.lateral_convs.")), None)
        head = next((key for key in keys if re.fullmatch(f"{_HEAD_SIGN}|{_SECOND_STAGE_SIGN}", key)), None)
        if _is_classifier(keys):
            return f"it has {_CLASSIFIER_SIGN} and no neck, as a classifier of mmpretrain"
        if neck or head:
            return f"it has {' and '.join(key for key in (neck, head) if key)}"
        meta = file.meta.get("meta")
        version = meta.get("mmdet_version") if isinstance(meta, Mapping) else None
        return f"its meta has mmdet_version {version}" if isinstance(version, str) else None

    def recognise_backbone(self, file: ForeignFile) -> ForeignBackbone | None:
        """ImageNet weights of a ResNet from mmpretrain (mmcls)."""
        if not _is_classifier(file.tensors):
            return None
        return ForeignBackbone(
            title="ImageNet weights of a ResNet",
            converted=_CLASSIFIER.to_ours(file.tensors),
            settings=_CLASSIFIER_SETTINGS,
        )

    def recognise(self, file: ForeignFile, wanted: Wanted) -> ForeignModel:
        meta = read_meta(file)
        version_1 = is_of_version_1(file.tensors) or (meta.version is not None and meta.version < (2, 0))
        # A second stage outside roi_head is older than the change of the RPN's classes, too.
        tensors = modern_tensors(file.tensors, (1, 0) if version_1 else meta.version)
        if wanted.recipe is not None:
            recipe, name, assumptions = wanted.recipe, wanted.recipe_name or "the config that was given", []
        else:
            recipe, name, assumptions = _recipe(file, tensors, meta, version_1)
        classes, of_classes = _classes(tensors, recipe, meta, wanted.class_names)
        if recipe.data.classes not in (None, classes.names) and classes != OBJECT:
            recipe = edit(recipe, {"data.classes": classes.names})  # what it goes on with are those of the weights
        return ForeignModel(
            recipe_name=name,
            recipe=recipe,
            classes=classes,
            tensors=tensors,
            key_map=lambda recipe: key_map_of(tensors, recipe),
            assumptions=(*assumptions, *of_classes),
        )

    def export(
        self, state: Mapping[str, Tensor], recipe: Recipe, classes: ClassTable | None = None
    ) -> dict[str, object]:
        return export(state, recipe, classes)


def _recipe(
    file: ForeignFile, tensors: Mapping[str, Tensor], meta: FileMeta, version_1: bool
) -> tuple[Recipe, str, list[str]]:
    """By the config inside, else by keys and shapes: the recipe, what it is called, and what was assumed for it."""
    structure = read_structure(tensors)
    _refuse_other_types(structure, meta)
    unread = []
    try:
        inside = None if version_1 else recipe_inside(meta)
    except RecipeError as error:
        inside = None
        unread = [f"the config inside is not used, for {error.problems[0]} ({len(error.problems)} problems in all)"]
    if inside is not None and not _fits(tensors, structure, inside.recipe):
        inside, unread = None, ["the config inside is not used, for it is of another structure than the tensors"]
    if inside is not None:
        return inside.recipe, f"{title_of(structure)}, by the config inside", _said_of(inside)
    style, why = _style(file, structure, meta)
    recipe = recipe_of(structure, conventions_of(meta, style=style, version_1=version_1))
    return recipe, title_of(structure), [*unread, *why, *_assumptions(structure, meta, recipe, version_1)]


def _fits(tensors: Mapping[str, Tensor], structure: Structure, recipe: Recipe) -> bool:
    """Whether the recipe builds what the tensors are of."""
    part = structure.regions or structure.head
    assert part is not None
    try:
        with torch.device("meta"):
            detector = build_detector(recipe.detector, num_classes=part.num_classes, pretrained=False)
        converted = key_map_of(tensors, recipe).to_ours(tensors)
    except RcnnError:
        return False
    return not any(differences(detector.state_dict(), converted.state))


_SHOWN = 3


def _said_of(inside: Translation) -> list[str]:
    """What of the config inside is otherwise here, the first of each."""
    said = []
    for what, findings in (("has no counterpart here", inside.unmapped), ("differs here", inside.differing)):
        if findings:
            more = f" (and {len(findings) - _SHOWN} more)" if len(findings) > _SHOWN else ""
            first = "; ".join(f"{each.path}={each.value} ({each.reason})" for each in findings[:_SHOWN])
            said.append(f"of the config inside {what}: {first}{more}")
    return said


def _refuse_other_types(structure: Structure, meta: FileMeta) -> None:
    """By the config inside: the keys of PAA are those of ATSS."""
    if structure.head is None:
        return
    given, known = meta.head.get("type"), _TYPES[structure.head.kind]
    if isinstance(given, str) and given.rpartition(".")[2] not in known:
        where = "meta, the config inside"
        raise CheckpointError(Problem(where=where, given=f"the head {given}", allowed=", ".join(known)))


def _style(file: ForeignFile, structure: Structure, meta: FileMeta) -> tuple[Style, list[str]]:
    """The style of the backbone, which decides the channels and means of pictures, and what was assumed for it."""
    inside = style_inside(meta)
    if inside is not None:
        return inside, []
    head = structure.head
    one_stage_fcos = structure.regions is None and head is not None and head.kind == "fcos" and head.norm == "group"
    if "caffe" in file.path.name.lower():
        return "caffe", ["a backbone of the style caffe (BGR, strides in the 1x1 convolutions), by the file's name"]
    if one_stage_fcos:
        return "caffe", [
            "a backbone of the style caffe (BGR, strides in the 1x1 convolutions), as MMDetection trains FCOS with "
            "group norm; for the other: detector.backbone.style=pytorch and detector.image, or --config CONFIG"
        ]
    return "pytorch", [
        "a backbone of the style pytorch (RGB, ImageNet's mean and deviation, strides in the 3x3 convolutions), which "
        "the keys cannot tell from caffe's; --config CONFIG says it"
    ]


def _assumptions(structure: Structure, meta: FileMeta, recipe: Recipe, version_1: bool) -> Iterator[str]:
    image, head = recipe.detector.image, structure.head
    has_config = bool(meta.model)
    inside = "of the config inside, style and pixels alone were read" if has_config else "there is no config inside"
    yield (
        f"pictures of up to {image.max_long_side} x {image.short_side}, thresholds and schedule of MMDetection's own "
        f"1x config ({inside}); --config CONFIG takes those of yours"
    )
    if head is not None and head.kind == "fcos" and not has_config:
        yield "FCOS without norm_on_bbox and centerness_on_reg, which its keys do not show"
    if isinstance(recipe.detector, OneStageSpec) and head is not None and head.num_classes == 1:
        yield "a one-stage detector of one class; a first stage alone has the same keys: --recipe fcos_rpn_resnet50_fpn"
    if head is not None and head.softmax and meta.version is None and not version_1:
        yield "the RPN's background is the second of two outputs, as since version 2.5 (the file has no version)"
    if version_1:
        yield (
            "MMDetection 1, where a box ends at its last pixel: anchors and regions are shifted so that boxes end as "
            "they do in versions 2 and 3"
            + (" (not FCOS's, ATSS's or GFL's own, which end up to a pixel early)" if _has_points(structure) else "")
        )


def _has_points(structure: Structure) -> bool:
    return structure.head is not None and structure.head.kind in ("fcos", "atss", "gfl")


def _classes(
    tensors: Mapping[str, Tensor], recipe: Recipe, meta: FileMeta, wanted: tuple[str, ...] | None
) -> tuple[ClassTable, list[str]]:
    """The class table and what was assumed for it. A first stage alone knows objects only."""
    if isinstance(recipe.detector, FirstStageSpec):
        return OBJECT, []
    structure = read_structure(tensors)
    part = structure.regions or structure.head
    assert part is not None
    count = part.num_classes
    sources = {"given": wanted, "in the file": meta.class_names, "in the config (classes)": recipe.data.classes}
    source, names = next(((source, names) for source, names in sources.items() if names), ("", ()))
    if not names and count == 80:
        return coco_80_classes(), ["COCO's 80 classes, since the file has no names"]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or len(names) != count:
        said = f"{len(names)} {source}" if names else "no names in the file"
        said += f", {', '.join(twice)} more than once" if twice else ""
        raise UnnamedClasses(
            Problem(
                where="the classes",
                given=f"{count} outputs, {said}",
                allowed=f"{count} names, in the order of the labels",
                remedy="give them with --classes NAME,NAME,... or --classes FILE",
            ),
            count=count,
        )
    spaced = with_coco_ids([name.replace("_", " ") for name in names])
    if spaced == coco_80_classes():
        changed = spaced.names != names
        return spaced, ["blanks in class names, where version 1 has underscores"] if changed else []
    return ClassTable(names=names), []
