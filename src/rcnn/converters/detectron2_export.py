"""A detector of ours as a file that detectron2 loads."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from torch import Tensor

from rcnn.config.edit import edit
from rcnn.converters.conventions import refuse_other_conventions
from rcnn.converters.detectron2 import key_map_of
from rcnn.converters.detectron2_anchors import anchors_of
from rcnn.converters.detectron2_structure import Structure
from rcnn.errors import CheckpointError, Problem
from rcnn.recipes import detectron2_catalogue as catalogue
from rcnn.recipes.heads import RetinaNetSpec
from rcnn.recipes.parts import AnchorSpec
from rcnn.recipes.recipe import FirstStageSpec, OneStageSpec, Recipe, ResNetSpec, SingleMapSpec
from rcnn.recipes.regions import CascadeSpec, ConvFCSpec, Res5Spec

# What a config of detectron2 can say, and what only our training knows.
_FREE = (
    "detector.image.short_side", "detector.image.max_long_side", "detector.image.channel_order",
    "detector.image.mean", "detector.image.std", "detector.backbone", "detector.neck.channels",
    "detector.neck.first_map", "detector.neck.norm", "detector.proposals.train", "detector.proposals.test",
    "detector.proposals.nms_iou", "detector.proposals.min_side_px", "detector.proposals.init_from",
    *(
        f"{head}.{name}"
        for head in ("detector.proposals.head", "detector.head")
        for name in (
            "anchors.sizes_px", "anchors.heights_over_widths", "matcher", "sampler", "num_convs", "channels",
            "loss_count", "box_loss", "coder.weights", "normalizer",
        )
    ),
    "detector.roi.min_side_px", "detector.roi.matcher", "detector.roi.sampler", "detector.roi.stages",
    "detector.roi.score_threshold", "detector.roi.nms_iou", "detector.roi.max_detections", "detector.roi.box_head",
    "detector.roi.box_loss", "detector.roi.pooling.sampling_ratio", "detector.roi.pooling.aligned",
    "detector.roi.pooling.output_size", "detector.roi.regression", "detector.roi.gradient_share",
    "detector.roi.coder.weights", "detector.pre_nms", "detector.score_threshold", "detector.nms_iou",
    "detector.max_detections", "detector.min_side_px",
)  # fmt: skip


def export(state: Mapping[str, Tensor], recipe: Recipe) -> dict[str, object]:
    """`{"model": ..., "__author__": ...}`, as its checkpointer loads a `.pth`.

    Raises `CheckpointError` where its models cannot compute what the recipe says, with each setting.
    """
    refuse_other_conventions(recipe, _models(recipe), free=_FREE, system="detectron2")
    structure = structure_of(state, recipe)
    key_map = key_map_of(structure, num_ratios=len(anchors_of(recipe).heights_over_widths))
    return {"model": key_map.to_theirs(state), "__author__": "rcnn"}


def _models(recipe: Recipe) -> Iterator[Recipe]:
    yield catalogue.faster_rcnn_resnet50_caffe_fpn()
    yield catalogue.faster_rcnn_resnet50_c4()
    yield catalogue.faster_rcnn_resnet50_dc5()
    yield catalogue.cascade_rcnn_resnet50_caffe_fpn()
    retinanet = catalogue.retinanet_resnet50_caffe_fpn()
    head = recipe.detector.head if isinstance(recipe.detector, OneStageSpec) else None
    is_explicit = isinstance(head, RetinaNetSpec) and head.anchors is not None
    yield edit(retinanet, {"detector.head.anchors": AnchorSpec()}) if is_explicit else retinanet


def structure_of(state: Mapping[str, Tensor], recipe: Recipe) -> Structure:
    """What detectron2's keys for a state dict of ours depend on. Raises `CheckpointError` for a first stage alone."""
    detector = recipe.detector
    backbone, neck = detector.backbone, detector.neck
    if not isinstance(backbone, ResNetSpec) or isinstance(detector, FirstStageSpec):
        given = f"a detector of type {detector.type} on a backbone of type {backbone.type}"
        problem = Problem(where="the recipe", given=given, allowed="a two-stage detector or RetinaNet on a ResNet")
        raise CheckpointError(problem)
    levels = () if isinstance(neck, SingleMapSpec) else tuple(range(neck.first_map + 2, 6))
    trained = backbone.norm != "frozen"
    if isinstance(detector, OneStageSpec):
        rows = len(state["head.tower.deltas.bias"])
        return Structure(
            architecture="retinanet",
            depth=backbone.depth,
            levels=levels,
            num_anchors=rows // 4,
            num_classes=4 * len(state["head.tower.classes.bias"]) // rows,
            tower_convs=len([key for key in state if re.fullmatch(r"head\.tower\.class_tower\..*\.bias", key)]),
            trained_norms=trained,
        )
    roi = detector.roi
    stages = len(roi.stages) if isinstance(roi, CascadeSpec) else 1
    predictor = "roi.stages.0.predictor" if isinstance(roi, CascadeSpec) else "roi.predictor"
    return Structure(
        architecture="fpn" if levels else "c4" if isinstance(roi.box_head, Res5Spec) else "dc5",
        depth=backbone.depth,
        levels=levels,
        num_anchors=len(state["proposals.head.tower.classes.bias"]),
        num_classes=len(state[f"{predictor}.classes.bias"]) - 1,
        rpn_convs=len([key for key in state if re.fullmatch(r"proposals\.head\.tower\.convs\.\d+\.bias", key)]),
        stages=stages,
        box_convs=roi.box_head.num_convs if isinstance(roi.box_head, ConvFCSpec) else 0,
        trained_norms=trained,
    )
