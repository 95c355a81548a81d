"""detectron2 as a system: which of its detectors a file holds, with its conventions, and ours as a file of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

from rcnn.config.edit import edit
from rcnn.converters.coco_classes import coco_80_classes
from rcnn.converters.detectron2 import key_map_of, with_counters
from rcnn.converters.detectron2_anchors import anchors_of, kept_anchors
from rcnn.converters.detectron2_export import export
from rcnn.converters.detectron2_names import backbone_name, is_backbone, is_caffe2, modern_tensors
from rcnn.converters.detectron2_structure import SIGNS, Structure, read_structure
from rcnn.converters.interface import AbstractSystem, ForeignBackbone, ForeignFile, ForeignModel, UnnamedClasses, Wanted
from rcnn.converters.key_map import Converted, KeyMap
from rcnn.errors import CheckpointError, Problem
from rcnn.recipes import detectron2_catalogue as catalogue
from rcnn.recipes.recipe import Recipe, ResNetSpec, TwoStageSpec
from rcnn.recipes.regions import ConvFCSpec
from rcnn.records import ClassTable

# torchvision's ImageNet weights ask for these pixels, in a model that detectron2 trained from them.
_TORCHVISION_PIXELS: dict[str, object] = {
    "detector.image.channel_order": "rgb",
    "detector.image.mean": (123.675, 116.28, 103.53),
    "detector.image.std": (58.395, 57.12, 57.375),
}
_MSRA = (
    "pixels and strides as MSRA's ImageNet weights want them, from which detectron2's baselines start; for a model "
    "that was trained from torchvision's: detector.backbone.style=pytorch detector.image.channel_order=rgb "
    "detector.image.mean=[123.675,116.28,103.53] detector.image.std=[58.395,57.12,57.375]"
)
_CAFFE2_PIXELS: dict[str, object] = {"detector.image.mean": (102.9801, 115.9465, 122.7717)}
_CAFFE2_POOLING: dict[str, object] = {"detector.roi.pooling.aligned": False, "detector.roi.pooling.sampling_ratio": 2}
_CAFFE2 = (
    "RoIAlign as Caffe2's Detectron had it (not aligned, two points a bin) and its mean; its boxes were a pixel wider "
    "by their own arithmetic, so theirs and ours differ by up to a pixel"
)


class Detectron2System(AbstractSystem):
    """Faster R-CNN on FPN, C4 and DC5, Cascade R-CNN and RetinaNet on ResNets; masks and key points are left out."""

    name = "detectron2"

    def signs(self, file: ForeignFile) -> str | None:
        keys = file.tensors
        if SIGNS[0] in keys:
            return f"it has {SIGNS[0]}"
        lateral = next((key for key in keys if key.startswith("backbone.fpn_lateral")), None)
        if SIGNS[1] in keys and lateral:
            return f"it has {SIGNS[1]} and {lateral}"
        if is_caffe2(keys):
            return "it has Caffe2's names, conv1_w and res2_0_branch2a_w"
        return "it has stem.conv1.weight and res2.0.conv1.weight" if is_backbone(keys) else None

    def recognise(self, file: ForeignFile, wanted: Wanted) -> ForeignModel:
        modern = modern_tensors(file)
        structure = read_structure(modern.tensors)
        if wanted.recipe is None:
            name, recipe = recipe_of(structure)
            pixels, assumptions = _pixels(modern.tensors, recipe, caffe2=modern.is_caffe2)
            recipe = edit(recipe, {**pixels, **_anchors(structure, recipe, modern.tensors)})
        else:
            name, assumptions = wanted.recipe_name or "the recipe that was given", []
            recipe = edit(wanted.recipe, _same_depth(wanted.recipe, structure))
        classes, of_classes = _classes(structure, wanted.class_names)
        return ForeignModel(
            recipe_name=name,
            recipe=recipe,
            classes=classes,
            tensors=modern.tensors,
            key_map=_key_maps(structure, modern.tensors),
            assumptions=(*assumptions, *of_classes),
        )

    def recognise_backbone(self, file: ForeignFile) -> ForeignBackbone | None:
        if not (is_caffe2(file.tensors) or is_backbone(file.tensors)):
            return None
        modern = modern_tensors(file)
        if not modern.is_backbone:
            return None
        return ForeignBackbone(
            title="ImageNet weights of a ResNet",
            converted=_converted_backbone(modern.tensors),
            settings=_settings(caffe2=modern.is_caffe2),
        )

    def export(
        self, state: Mapping[str, Tensor], recipe: Recipe, classes: ClassTable | None = None
    ) -> dict[str, object]:
        return export(state, recipe)


def _key_maps(structure: Structure, tensors: Mapping[str, Tensor]) -> Callable[[Recipe], KeyMap]:
    def make(recipe: Recipe) -> KeyMap:
        backbone = recipe.detector.backbone
        frozen = not isinstance(backbone, ResNetSpec) or backbone.norm == "frozen"
        ratios = len(anchors_of(recipe).heights_over_widths)
        key_map = key_map_of(structure, num_ratios=ratios, frozen_norms=frozen)
        return key_map if frozen else with_counters(key_map, tensors)

    return make


# -------------------------------------------------------------------------------------------------------------- recipes


def recipe_of(structure: Structure) -> tuple[str, Recipe]:
    """The baseline of that architecture, with the layers and widths of the keys."""
    recipe = _baseline(structure)
    changes: dict[str, object] = {"detector.backbone.depth": structure.depth}
    if structure.trained_norms:
        changes["detector.backbone.norm"] = "sync"
    if structure.levels:
        changes |= {
            "detector.neck.channels": structure.pyramid_channels,
            "detector.neck.first_map": structure.levels[0] - 2,
            "detector.neck.norm": "sync" if structure.pyramid_norm else "none",
            "detector.neck.extra": structure.extra,
        }
    if structure.architecture == "retinanet":
        changes["detector.head.num_convs"] = structure.tower_convs
        changes["detector.head.channels"] = structure.pyramid_channels
    else:
        changes |= dict(_two_stage_changes(structure))
    return recipe.__name__, edit(recipe(), changes)


def _baseline(structure: Structure) -> Callable[[], Recipe]:
    match structure.architecture:
        case "retinanet":
            return catalogue.retinanet_resnet50_caffe_fpn
        case "c4":
            return catalogue.faster_rcnn_resnet50_c4
        case "dc5":
            return catalogue.faster_rcnn_resnet50_dc5
    return (
        catalogue.cascade_rcnn_resnet50_caffe_fpn if structure.stages > 1 else catalogue.faster_rcnn_resnet50_caffe_fpn
    )


def _two_stage_changes(structure: Structure) -> Iterator[tuple[str, object]]:
    yield "detector.proposals.head.num_convs", structure.rpn_convs
    if structure.rpn_channels is not None:
        yield "detector.proposals.head.channels", structure.rpn_channels
    if structure.stages == 1:
        yield "detector.roi.regression", "agnostic" if structure.agnostic else "per_class"
    if structure.box_convs:
        yield (
            "detector.roi.box_head",
            ConvFCSpec(
                num_convs=structure.box_convs,
                channels=structure.box_conv_channels,
                features=structure.features,
                norm="sync" if structure.box_norm else "none",
            ),
        )
    elif structure.architecture != "c4":
        yield "detector.roi.box_head.features", structure.features


def _pixels(tensors: Mapping[str, Tensor], recipe: Recipe, *, caffe2: bool) -> tuple[dict[str, object], list[str]]:
    """How pictures become input: from the file where it keeps the numbers, else as MSRA's weights want them."""
    if caffe2:
        two_stage = isinstance(recipe.detector, TwoStageSpec)
        return {**_CAFFE2_PIXELS, **(_CAFFE2_POOLING if two_stage else {})}, [_CAFFE2]
    if "pixel_mean" not in tensors or "pixel_std" not in tensors:
        return {}, [_MSRA]
    mean = tuple(round(value, 4) for value in tensors["pixel_mean"].flatten().tolist())
    std = tuple(round(value, 4) for value in tensors["pixel_std"].flatten().tolist())
    if len(mean) != 3 or len(std) != 3:
        given = f"{len(mean)} and {len(std)} numbers"
        raise CheckpointError(Problem(where="pixel_mean, pixel_std", given=given, allowed="one for each of 3 channels"))
    order, style = ("bgr" if mean[0] < mean[2] else "rgb"), ("caffe" if set(std) == {1.0} else "pytorch")
    said = f"channels {order} and strides of style {style}, by the pixel_mean {mean} and pixel_std {std} of the file"
    changes: dict[str, object] = {
        "detector.image.mean": mean,
        "detector.image.std": std,
        "detector.image.channel_order": order,
        "detector.backbone.style": style,
    }
    return changes, [said]


def _anchors(structure: Structure, recipe: Recipe, tensors: Mapping[str, Tensor]) -> dict[str, object]:
    """Of the file where it keeps them; else there must be as many as in the baseline. Raises `CheckpointError`."""
    usual = anchors_of(recipe)
    kept = kept_anchors(tensors, usual)
    anchors = kept or usual
    numbers = {len(sizes) * len(anchors.heights_over_widths) for sizes in anchors.sizes_px}
    if numbers != {structure.num_anchors}:
        raise CheckpointError(
            Problem(
                where="the anchors",
                given=f"{structure.num_anchors} in a cell, which the file says nothing more of",
                allowed=f"{', '.join(map(str, sorted(numbers)))}, as in detectron2's configs",
                remedy="give a recipe with their sizes and shapes: --recipe FILE",
            )
        )
    if kept is None or kept == usual:
        return {}
    is_dense = structure.architecture == "retinanet"
    return {"detector.head.anchors" if is_dense else "detector.proposals.head.anchors": kept}


def _same_depth(recipe: Recipe, structure: Structure) -> dict[str, object]:
    """What the keys do tell, for a recipe that the user names."""
    is_resnet = isinstance(recipe.detector.backbone, ResNetSpec)
    return {"detector.backbone.depth": structure.depth} if is_resnet else {}


def _classes(structure: Structure, given: tuple[str, ...] | None) -> tuple[ClassTable, list[str]]:
    coco = coco_80_classes()
    if given is None and structure.num_classes == len(coco):
        return coco, ["the 80 classes are COCO's; others: --classes FILE"]
    if given is None or len(given) != structure.num_classes:
        raise UnnamedClasses(
            Problem(
                where="the keys",
                given=f"{structure.num_classes} classes, and {'no' if given is None else len(given)} class names",
                allowed=f"{structure.num_classes} names, in the order of MetadataCatalog's thing_classes",
                remedy="give them with --classes NAME,NAME,... or --classes FILE",
            ),
            count=structure.num_classes,
        )
    return ClassTable(names=given), []


# ------------------------------------------------------------------------------------------------------------ backbones


def _converted_backbone(tensors: Mapping[str, Tensor]) -> Converted:
    state, names, dropped, problems = {}, {}, {}, []
    for key, value in tensors.items():
        ours = backbone_name(key)
        if ours is None:
            problems.append(Problem(where=key, given=f"no rule for a tensor of shape {tuple(value.shape)}"))
        elif ours:
            state[ours], names[key] = value, ours
        else:
            dropped[key] = "the classifier, of which a detector has no use"
    if problems:
        raise CheckpointError(problems)
    return Converted(state=state, names=names, dropped=dropped)


def _settings(*, caffe2: bool) -> tuple[str, ...]:
    """What a recipe with these weights has."""
    if not caffe2:
        return ("detector.backbone.style=pytorch", *(f"{name}={_text(of)}" for name, of in _TORCHVISION_PIXELS.items()))
    image = edit(catalogue.faster_rcnn_resnet50_caffe_fpn(), _CAFFE2_PIXELS).detector.image
    return (
        "detector.backbone.style=caffe",
        f"detector.image.channel_order={image.channel_order}",
        f"detector.image.mean={_text(image.mean)}",
        f"detector.image.std={_text(image.std)}",
    )


def _text(value: object) -> str:
    return f"[{','.join(map(str, value))}]" if isinstance(value, tuple) else str(value)
