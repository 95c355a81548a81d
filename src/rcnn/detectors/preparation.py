"""A two-stage detector for inference: the same detector with its trunk, heads and predictor prepared."""

from __future__ import annotations

import copy
import gc
from itertools import chain

import torch
from torch import nn

from rcnn.detectors.two_stage import TwoStageDetector
from rcnn.necks.interface import AbstractNeck
from rcnn.ops.preparation import prepare_for_inference


def prepared_detector(detector: TwoStageDetector, dtype: torch.dtype = torch.float32) -> TwoStageDetector:
    """A copy for `predict` and `propose` alone. The original is untouched; if it is trained, prepare it anew.

    In float32 and float64 it gives the original's boxes up to rounding. With bfloat16 the trunk and the box head run in
    bfloat16; boxes, scores and the predictor stay in float32. It cannot be trained, moved or saved.
    """
    wide = torch.promote_types(dtype, torch.float32)
    prepared = _copy_sharing_tensors(detector).eval()
    assert isinstance(prepared.neck, AbstractNeck)
    channels = prepared.neck.channels
    # Backbone and neck as one: sums and sizes that reach over the border between them can be fused.
    prepared.backbone = prepare_for_inference(nn.Sequential(prepared.backbone, prepared.neck), dtype=dtype)
    prepared.neck = nn.Identity()
    head = prepared.proposals.head
    for name, part in list(head.named_children()):
        setattr(head, name, prepare_for_inference(part, dtype=dtype))
    prepared.roi.box_head = prepare_for_inference(prepared.roi.box_head, dtype=dtype, channels=channels)
    prepared.roi.predictor = prepare_for_inference(prepared.roi.predictor, dtype=wide)  # type: ignore[assignment]
    # Traces refer to themselves: without this they would keep the weights of a detector that its owner lets go.
    gc.collect()
    return prepared


def _copy_sharing_tensors(module: TwoStageDetector) -> TwoStageDetector:
    tensors = chain(module.parameters(), module.buffers())
    return copy.deepcopy(module, memo={id(tensor): tensor for tensor in tensors})
