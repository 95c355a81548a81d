"""Names that older files have for what detectron2 saves today: Caffe2's, and bare ones of ImageNet backbones.

Caffe2's Detectron has background as its first class, and batch norms of two numbers per channel, which stand for all
four. Backbones that were converted for detectron2 have no prefix: it finds their place by the end of the name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rcnn.converters.interface import ForeignFile
from rcnn.errors import CheckpointError, Problem

# Of the frozen batch norms of detectron2, by which versions below 3 had not yet shifted the variance.
NORM_EPS = 1e-5

_KINDS = {"w": "weight", "b": "bias"}
_NORMS = {"s": "weight", "b": "bias", "rm": "running_mean", "riv": "running_var"}
_BRANCHES = {"1": "shortcut", "2a": "conv1", "2b": "conv2", "2c": "conv3"}
_RPN = "proposal_generator.rpn_head"
_PLAIN = {
    "conv_rpn": f"{_RPN}.conv",
    "rpn_cls_logits": f"{_RPN}.objectness_logits",
    "rpn_bbox_pred": f"{_RPN}.anchor_deltas",
    "fc6": "roi_heads.box_head.fc1",
    "fc7": "roi_heads.box_head.fc2",
    "cls_score": "roi_heads.box_predictor.cls_score",
    "bbox_pred": "roi_heads.box_predictor.bbox_pred",
    "conv1": "stem.conv1",
    "pred": "classifier",
    "fc1000": "classifier",
}
_MASKS = r"(_\[mask\]_fcn\d|mask_fcn.*|conv5_mask|conv_fcn\d+|kps_score.*)_[wb]"
_CLASSIFIER = r"(stem\.fc|linear|classifier)\.(weight|bias)"


@dataclass(frozen=True, kw_only=True)
class ModernTensors:
    """The tensors of a file under the names of detectron2's newest release, and what was found on the way."""

    tensors: Mapping[str, Tensor]
    is_caffe2: bool
    is_backbone: bool
    """No detector: the keys are those of a ResNet alone, without a prefix."""


def is_caffe2(tensors: Mapping[str, Tensor]) -> bool:
    return "conv1_w" in tensors and "res2_0_branch2a_w" in tensors


def is_backbone(tensors: Mapping[str, Tensor]) -> bool:
    """ImageNet weights under the names that detectron2's own converter gives to torchvision's."""
    return "stem.conv1.weight" in tensors and "res2.0.conv1.weight" in tensors


def modern_tensors(file: ForeignFile) -> ModernTensors:
    """Raises `CheckpointError` that lists the names of Caffe2's that nothing is known of."""
    tensors, caffe2 = dict(file.tensors), is_caffe2(file.tensors)
    if caffe2:
        tensors = _from_caffe2(tensors)
    tensors = _with_whole_norms(_with_shifted_variance(tensors, file.meta))
    backbone = not any(key.startswith(("backbone.", "proposal_generator.", "roi_heads.", "head.")) for key in tensors)
    if caffe2 and not backbone:
        tensors = _with_prefixes(tensors)
    return ModernTensors(tensors=tensors, is_caffe2=caffe2, is_backbone=backbone)


# --------------------------------------------------------------------------------------------------------------- Caffe2


def _from_caffe2(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    problems = []
    for key, value in tensors.items():
        name = caffe2_name(key)
        if name is None or name in renamed:
            given = "no name of Caffe2's Detectron" if name is None else f"the second tensor that becomes {name}"
            problems.append(Problem(where=key, given=f"{given} (a tensor of shape {tuple(value.shape)})"))
            continue
        renamed[name] = _background_moved(name, value)
    if problems:
        raise CheckpointError(problems)
    return renamed


def _background_moved(name: str, value: Tensor) -> Tensor:
    """Background is the first class there, and has a box of its own that nothing reads."""
    if name.startswith("roi_heads.box_predictor.cls_score."):
        return torch.cat((value[1:], value[:1]))
    return value[4:] if name.startswith("roi_heads.box_predictor.bbox_pred.") else value


def caffe2_name(key: str) -> str | None:
    """The name of today, without what stands before a backbone's; None where there is none."""
    if key.endswith("_momentum"):
        return f"optimizer.{key}"
    if re.fullmatch(_MASKS, key):
        return f"roi_heads.mask_head.{key}"
    if match := re.fullmatch(r"res_conv1_bn_(s|b|rm|riv)", key):
        return f"stem.conv1.norm.{_NORMS[match[1]]}"
    if match := re.fullmatch(r"res(\d)_(\d+)_branch(1|2a|2b|2c)_(bn_)?(s|b|rm|riv|w)", key):
        stage, block, branch, norm, kind = match.groups()
        names = _NORMS if norm else _KINDS
        if kind not in names:
            return None
        return f"res{stage}.{block}.{_BRANCHES[branch]}.{'norm.' if norm else ''}{names[kind]}"
    if match := re.fullmatch(r"fpn_(inner_)?res(\d)_\d+_sum(?:_lateral)?_([wb])", key):
        inner, stage, kind = match.groups()
        return f"backbone.fpn_{'lateral' if inner else 'output'}{stage}.{_KINDS[kind]}"
    if match := re.fullmatch(r"(\w+?)(?:_fpn2)?_([wb])", key):
        place = _PLAIN.get(match[1])
        return f"{place}.{_KINDS[match[2]]}" if place else None
    return None


def _with_prefixes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A backbone's keys in their place in a detector: under a pyramid, or with the last stage as box head (C4)."""
    has_pyramid = any(key.startswith("backbone.fpn_") for key in tensors)
    has_fcs = "roi_heads.box_head.fc1.weight" in tensors

    def placed(key: str) -> str:
        if not re.match(r"(stem|res\d)\.", key):
            return key
        if has_pyramid:
            return f"backbone.bottom_up.{key}"
        return f"roi_heads.{key}" if key.startswith("res5.") and not has_fcs else f"backbone.{key}"

    return {placed(key): value for key, value in tensors.items()}


# ---------------------------------------------------------------------------------------------------------- batch norms


def _with_whole_norms(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Caffe2's two numbers are applied as they are: with a mean of 0, and a variance of 1 once epsilon is added."""
    whole = dict(tensors)
    for key, value in tensors.items():
        if re.fullmatch(r"(.+\.)?(stem|res\d)\..*norm\.weight", key):
            place = key.removesuffix("weight")
            whole.setdefault(f"{place}running_mean", torch.zeros_like(value))
            whole.setdefault(f"{place}running_var", torch.ones_like(value) - NORM_EPS)
    return whole


def _with_shifted_variance(tensors: Mapping[str, Tensor], meta: Mapping[str, object]) -> dict[str, Tensor]:
    """Frozen norms below version 3 divide by the root of the variance alone; those of today add epsilon first.

    Only files that say their versions (`_metadata` beside a state dict) can be older.
    """
    # torch's own batch norms have a version 2 too; they count batches.
    older = {name for name in _older_norms(meta) if f"{name}.num_batches_tracked" not in tensors}
    return {
        key: value - NORM_EPS if key.endswith(".running_var") and key.removesuffix(".running_var") in older else value
        for key, value in tensors.items()
    }


def _older_norms(meta: Mapping[str, object]) -> Iterator[str]:
    versions = meta.get("_metadata")
    if not isinstance(versions, Mapping):
        return
    for name, entry in versions.items():
        version = entry.get("version") if isinstance(entry, Mapping) else None
        if isinstance(name, str) and isinstance(version, int) and version < 3:
            yield name


# ------------------------------------------------------------------------------------------------------------ backbones


def backbone_name(key: str) -> str | None:
    """Ours, which is torchvision's, for a key of a bare backbone; empty for a classifier's, None: it has none."""
    if re.fullmatch(_CLASSIFIER, key) or key.startswith("optimizer."):
        return ""
    match = re.fullmatch(r"(?:stem|res(\d)\.(\d+))\.(conv\d|shortcut)(\.norm)?\.(\w+)", key)
    if match is None:
        return None
    stage, block, layer, norm, kind = match.groups()
    place = f"layer{int(stage) - 1}.{block}." if stage else ""
    if layer == "shortcut":
        return f"{place}downsample.{1 if norm else 0}.{kind}"
    return f"{place}{layer.replace('conv', 'bn') if norm else layer}.{kind}"
