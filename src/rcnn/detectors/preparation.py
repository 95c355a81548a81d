"""A detector for inference: the same detector with its trunk, heads and predictors prepared."""

from __future__ import annotations

import copy
import gc
from itertools import chain
from typing import TypeVar

import torch
from torch import nn

from rcnn.dense.interface import AbstractDenseHead
from rcnn.detectors.pyramid import AbstractPyramidDetector
from rcnn.errors import Problem, SetupError
from rcnn.necks.interface import AbstractNeck
from rcnn.ops.preparation import prepare_for_inference
from rcnn.roi.stage import RoIStage

Detector = TypeVar("Detector", bound=AbstractPyramidDetector)


def prepared_detector(detector: Detector, dtype: torch.dtype = torch.float32) -> Detector:
    """A copy for inference alone. The original is untouched; if it is trained, prepare it anew.

    In float32 and float64 it gives the original's boxes up to rounding. With bfloat16 the trunk, the dense head and the
    box heads run in bfloat16; boxes, scores and the predictors stay in float32. It cannot be trained, moved or saved.
    """
    prepared = _copy_sharing_tensors(detector).eval()
    # Where nobody else holds the original, each of its weights goes as soon as it is packed.
    del detector
    if not isinstance(prepared.neck, AbstractNeck):
        raise SetupError(Problem(where="prepared_detector", given="a detector that is prepared already"))
    channels = prepared.neck.channels
    # From the last part to the first: packing the large layers of the box heads takes the most memory, and traces of
    # the others should not be there yet.
    parts = list(prepared.modules())
    while parts:
        match parts.pop():
            case AbstractDenseHead() as head:
                _prepare_children(head, dtype)
            case RoIStage() as stage:
                _prepare_stage(stage, dtype, channels)
    # Backbone and neck as one: sums and sizes that reach over the border between them can be fused.
    prepared.backbone = prepare_for_inference(nn.Sequential(prepared.backbone, prepared.neck), dtype=dtype)
    prepared.neck = nn.Identity()
    gc.collect()
    return prepared


def _prepare_children(parent: nn.Module, dtype: torch.dtype) -> None:
    """Each child in its place. A list of modules stays one: it is not called, its members are."""
    for name, part in list(parent.named_children()):
        if isinstance(part, nn.ModuleList | nn.ModuleDict):
            _prepare_children(part, dtype)
        else:
            setattr(parent, name, prepare_for_inference(part, dtype=dtype))


def _prepare_stage(stage: RoIStage, dtype: torch.dtype, channels: int) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    stage.box_head = prepare_for_inference(stage.box_head, dtype=dtype, channels=channels)
    # Traces refer to themselves: without this they would keep the weights of a detector that its owner lets go.
    gc.collect()
    stage.predictor = prepare_for_inference(stage.predictor, dtype=wide)  # type: ignore[assignment]


def _copy_sharing_tensors(module: Detector) -> Detector:
    tensors = chain(module.parameters(), module.buffers())
    return copy.deepcopy(module, memo={id(tensor): tensor for tensor in tensors})
