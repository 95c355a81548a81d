"""torchvision as a system: two-stage and one-stage models known by their keys, and written back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from rcnn.config.edit import edit
from rcnn.converters import torchvision, torchvision_dense
from rcnn.converters.conventions import refuse_other_conventions
from rcnn.converters.interface import AbstractSystem, ForeignFile, ForeignModel, Wanted
from rcnn.converters.key_map import KeyMap
from rcnn.recipes import catalogue
from rcnn.recipes.recipe import OneStageSpec, Recipe, ResNetSpec, TwoStageSpec
from rcnn.records import ClassTable

_SMALL = "faster_rcnn_mobilenet_v3_large_320_fpn"


# What the keys cannot tell of a frozen batch norm.
_EPSILON = (
    "the epsilon of the batch norms is 0, as torchvision sets it for its COCO_V1 weights; for a model that was trained "
    "from ImageNet weights alone add detector.backbone.norm_eps=1e-5"
)


class TorchvisionSystem(AbstractSystem):
    """torchvision's reference models: Faster R-CNN of COCO_V1 and v2, on ResNets and MobileNetV3; RetinaNet; FCOS."""

    name = "torchvision"

    def signs(self, file: ForeignFile) -> str | None:
        body = next((key for key in file.tensors if key.startswith("backbone.body.")), None)
        heads = ("roi_heads.box_predictor.cls_score.weight", torchvision_dense.SIGN)
        sign = next((key for key in heads if key in file.tensors), None)
        return f"it has {sign} and {body}" if body and sign else None

    def recognise(self, file: ForeignFile, wanted: Wanted) -> ForeignModel:
        if torchvision_dense.SIGN in file.tensors:
            return _recognise_dense(file, wanted)
        tensors = torchvision.modern_names(file.tensors)
        model = torchvision.recognise(tensors, wanted.class_names)
        name, recipe, assumptions = model.recipe_name, model.recipe, []
        if wanted.recipe is not None and wanted.recipe_name is not None:
            name, recipe = wanted.recipe_name, edit(wanted.recipe, _same_structure(recipe))
        elif name == "faster_rcnn_mobilenet_v3_large_fpn" and "_320_" in file.path.name:
            name, recipe = _SMALL, catalogue.faster_rcnn_mobilenet_v3_large_320_fpn()
            assumptions.append("the 320-pixel model, by the name of the file (the keys cannot tell)")
        elif name == "faster_rcnn_mobilenet_v3_large_fpn":
            assumptions.append(f"800 pixels; for the 320-pixel model: --recipe {_SMALL}")
        if model.published_on_coco:
            recipe = edit(recipe, {"detector.backbone.norm_eps": 0.0})
            assumptions.append(_EPSILON)
        return ForeignModel(
            recipe_name=name,
            recipe=recipe,
            classes=model.classes,
            tensors=tensors,
            key_map=lambda recipe: model.key_map,
            assumptions=tuple(assumptions),
        )

    def export(
        self, state: Mapping[str, Tensor], recipe: Recipe, classes: ClassTable | None = None
    ) -> dict[str, object]:
        """A flat state dict under the names of release 0.13 and later.

        Raises `CheckpointError` where torchvision's models cannot compute what the recipe says.
        """
        refuse_other_conventions(recipe, _models(), free=_FREE, system=self.name)
        return {**_key_map_of(recipe).to_theirs(state)}


def _recognise_dense(file: ForeignFile, wanted: Wanted) -> ForeignModel:
    tensors = torchvision_dense.modern_names(file.tensors)
    model = torchvision_dense.recognise(tensors)
    name, recipe, assumptions = f"torchvision's {model.model_name}", model.recipe, []
    classes = torchvision_dense.classes_of(model.num_outputs, wanted.class_names)
    if wanted.recipe is not None and wanted.recipe_name is not None:
        name, recipe = wanted.recipe_name, wanted.recipe
    elif model.model_name == "retinanet_resnet50_fpn" and classes == torchvision_dense.coco_classes():
        recipe = edit(recipe, {"detector.backbone.norm_eps": 0.0})
        assumptions.append(_EPSILON)
    return ForeignModel(
        recipe_name=name,
        recipe=recipe,
        classes=classes,
        tensors=tensors,
        key_map=lambda recipe: model.key_map,
        assumptions=tuple(assumptions),
    )


# What the constructors of torchvision's detectors take, and what only our training knows.
_FREE = (
    "detector.image.short_side", "detector.image.max_long_side", "detector.image.mean", "detector.image.std",
    "detector.backbone", "detector.neck.norm", "detector.proposals.train", "detector.proposals.test",
    "detector.proposals.nms_iou", "detector.proposals.score_threshold", "detector.proposals.init_from",
    "detector.proposals.head.matcher", "detector.proposals.head.sampler", "detector.roi.matcher",
    "detector.roi.sampler", "detector.roi.score_threshold", "detector.roi.nms_iou", "detector.roi.max_detections",
    "detector.roi.box_head.norm", "detector.pre_nms", "detector.score_threshold", "detector.nms_iou",
    "detector.max_detections",
)  # fmt: skip


def _models() -> Iterator[Recipe]:
    yield from (catalogue.faster_rcnn_resnet50_fpn(), catalogue.faster_rcnn_resnet50_fpn_v2())
    yield from (catalogue.faster_rcnn_mobilenet_v3_large_fpn(), *torchvision_dense.recipes())


def _key_map_of(recipe: Recipe) -> KeyMap:
    """The table of the model that the recipe is of."""
    match recipe.detector:
        case OneStageSpec():
            return torchvision_dense.key_map_of(recipe)
        case TwoStageSpec(backbone=ResNetSpec()):
            return torchvision.RESNET
    return torchvision.MOBILENET


def _same_structure(recipe: Recipe) -> dict[str, object]:
    """What the keys do tell, for a recipe that the user names."""
    backbone = recipe.detector.backbone
    return {"detector.backbone.depth": backbone.depth} if isinstance(backbone, ResNetSpec) else {}
