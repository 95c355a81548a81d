"""Caffe2's names, and ImageNet backbones: what they are called today, and what becomes of their numbers."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor

from rcnn.config.edit import edit
from rcnn.converters.convert import convert_file
from rcnn.converters.detectron2_names import caffe2_name
from rcnn.converters.detectron2_system import Detectron2System
from rcnn.converters.interface import ForeignFile, Wanted
from rcnn.engine.checkpoint import load_into
from rcnn.errors import CheckpointError
from rcnn.recipes.detectron2_catalogue import faster_rcnn_resnet50_caffe_fpn
from rcnn.recipes.models import build_backbone, build_detector, load_imagenet
from rcnn.recipes.recipe import ResNetSpec, TwoStageSpec

SYSTEM = Detectron2System()

# Names of Detectron's files and of detectron2's models (its conversion script has them).
NAMES = {
    "conv1_w": "stem.conv1.weight",
    "res_conv1_bn_s": "stem.conv1.norm.weight",
    "res_conv1_bn_riv": "stem.conv1.norm.running_var",
    "res2_0_branch1_w": "res2.0.shortcut.weight",
    "res2_0_branch1_bn_b": "res2.0.shortcut.norm.bias",
    "res3_1_branch2a_w": "res3.1.conv1.weight",
    "res4_22_branch2b_bn_s": "res4.22.conv2.norm.weight",
    "res5_2_branch2c_bn_rm": "res5.2.conv3.norm.running_mean",
    "fpn_inner_res5_2_sum_w": "backbone.fpn_lateral5.weight",
    "fpn_inner_res2_2_sum_lateral_b": "backbone.fpn_lateral2.bias",
    "fpn_res3_3_sum_w": "backbone.fpn_output3.weight",
    "conv_rpn_fpn2_w": "proposal_generator.rpn_head.conv.weight",
    "conv_rpn_b": "proposal_generator.rpn_head.conv.bias",
    "rpn_cls_logits_fpn2_b": "proposal_generator.rpn_head.objectness_logits.bias",
    "rpn_bbox_pred_w": "proposal_generator.rpn_head.anchor_deltas.weight",
    "fc6_w": "roi_heads.box_head.fc1.weight",
    "fc7_b": "roi_heads.box_head.fc2.bias",
    "cls_score_w": "roi_heads.box_predictor.cls_score.weight",
    "bbox_pred_b": "roi_heads.box_predictor.bbox_pred.bias",
    "_[mask]_fcn1_w": "roi_heads.mask_head._[mask]_fcn1_w",
    "kps_score_lowres_b": "roi_heads.mask_head.kps_score_lowres_b",
    "fc1000_w": "classifier.weight",
    "conv1_w_momentum": "optimizer.conv1_w_momentum",
    "retnet_cls_conv_n0_fpn3_w": None,
    "lr": None,
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_caffe2(name: str) -> None:
    assert caffe2_name(name) == NAMES[name]


def caffe2_backbone(depth: int = 50) -> dict[str, Tensor]:
    """MSRA's R-50.pkl: torchvision's tensors under Caffe2's names, batch norms of two numbers, without their types."""
    named: dict[str, Tensor] = {}
    with torch.device("meta"):
        state = torchvision.models.get_model(f"resnet{depth}", weights=None).state_dict()
    layers = {"conv1": "branch2a", "conv2": "branch2b", "conv3": "branch2c", "bn1": "branch2a_bn", "bn2": "branch2b_bn"}
    layers |= {"bn3": "branch2c_bn", "downsample.0": "branch1", "downsample.1": "branch1_bn"}
    for number, (key, value) in enumerate(state.items()):
        parts = key.split(".")
        kind = {"weight": "w", "bias": "b"}.get(parts[-1])
        if kind is None or parts[0] == "fc":
            continue
        if parts[0].startswith("layer"):
            layer = layers[".".join(parts[2:-1])]
            place = f"res{int(parts[0][-1]) + 1}_{parts[1]}_{layer}"
        else:
            place = "res_conv1_bn" if parts[0] == "bn1" else "conv1"
        kind = "s" if kind == "w" and place.endswith("bn") else kind
        named[f"{place}_{kind}"] = torch.full(value.shape, float(number % 7 + 1))
    return named | {"fc1000_w": torch.ones(1000, 2048), "fc1000_b": torch.ones(1000)}


def caffe2_detector() -> dict[str, Tensor]:
    """Five classes on FPN, background first."""
    shapes: dict[str, tuple[int, ...]] = {
        "conv_rpn_fpn2_w": (256, 256, 3, 3),
        "conv_rpn_fpn2_b": (256,),
        "rpn_cls_logits_fpn2_w": (3, 256, 1, 1),
        "rpn_cls_logits_fpn2_b": (3,),
        "rpn_bbox_pred_fpn2_w": (12, 256, 1, 1),
        "rpn_bbox_pred_fpn2_b": (12,),
        "fc6_w": (1024, 12544),
        "fc6_b": (1024,),
        "fc7_w": (1024, 1024),
        "fc7_b": (1024,),
        "cls_score_w": (6, 1024),
        "bbox_pred_w": (24, 1024),
    }
    for (stage, block), channels in zip(((2, 2), (3, 3), (4, 5), (5, 2)), (256, 512, 1024, 2048), strict=True):
        lateral = f"fpn_inner_res{stage}_{block}_sum" + ("" if stage == 5 else "_lateral")
        shapes |= {f"{lateral}_w": (256, channels, 1, 1), f"{lateral}_b": (256,)}
        shapes |= {f"fpn_res{stage}_{block}_sum_w": (256, 256, 3, 3), f"fpn_res{stage}_{block}_sum_b": (256,)}
    state = caffe2_backbone() | {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}
    del state["fc1000_w"], state["fc1000_b"]
    return state | {"cls_score_b": torch.arange(6.0), "bbox_pred_b": torch.arange(24.0)}


def test_a_detector_of_caffe2() -> None:
    file = ForeignFile(path=Path("model_final.pkl"), tensors=caffe2_detector() | {"fc6_w_momentum": torch.zeros(1)})
    assert SYSTEM.signs(file) == "it has Caffe2's names, conv1_w and res2_0_branch2a_w"
    model = SYSTEM.recognise(file, Wanted(class_names=("a", "b", "c", "d", "e")))
    converted = model.key_map(model.recipe).to_ours(model.tensors)
    with torch.device("meta"):
        detector = build_detector(model.recipe.detector, num_classes=5, pretrained=False)
    load_into(detector, converted.state)
    # Background goes from the first place to the last, and its box of four numbers.
    assert converted.state["roi.predictor.classes.bias"].tolist() == [1, 2, 3, 4, 5, 0]
    assert converted.state["roi.predictor.deltas.bias"].tolist() == list(range(4, 24))
    # x * scale + bias: nothing is taken away, and 1 - eps + eps divides.
    assert not converted.state["backbone.bn1.running_mean"].any()
    assert torch.equal(converted.state["backbone.bn1.running_var"] + 1e-5, torch.ones(64))
    assert set(converted.dropped) == {"optimizer.fc6_w_momentum"}
    spec = model.recipe.detector
    assert isinstance(spec, TwoStageSpec)
    assert spec.image.mean == (102.9801, 115.9465, 122.7717)
    assert (spec.roi.pooling.aligned, spec.roi.pooling.sampling_ratio) == (False, 2)  # type: ignore[union-attr]
    assert any("a pixel wider" in text for text in model.assumptions)


def test_names_that_nothing_is_known_of_are_all_listed() -> None:
    file = ForeignFile(path=Path("x.pkl"), tensors=caffe2_detector() | {"retnet_w": torch.ones(1), "lr": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"retnet_w: no name of Caffe2(.|\n)*lr: no name of Caffe2"):
        SYSTEM.recognise(file, Wanted())


def write(path: Path, tensors: Mapping[str, Tensor], **beside: object) -> Path:
    """A pickle as detectron2's scripts write it: arrays of NumPy."""
    arrays = {name: np.asarray(value) for name, value in tensors.items()}
    path.write_bytes(pickle.dumps({"model": arrays, **beside} if beside else arrays))
    return path


def test_msras_backbone_becomes_a_file_that_a_recipe_starts_from(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("backbone")
    tensors = caffe2_backbone(18)
    report = convert_file(write(folder / "R-50.pkl", tensors), folder / "r50.safetensors")
    assert report.system == "detectron2"
    assert report.settings is not None
    changes = dict(setting.split("=") for setting in report.settings)
    # The settings are those of a recipe of detectron2's, but for the mean: MSRA's own.
    assert changes["detector.backbone.style"] == "caffe"
    assert changes["detector.image.channel_order"] == "bgr"
    assert changes["detector.image.mean"] == "[102.9801,115.9465,122.7717]"
    assert sorted(report.converted.dropped) == ["classifier.bias", "classifier.weight"]
    assert any("detector.backbone.weights=" in line for line in report.lines(keys=False))
    spec = ResNetSpec(depth=18, style="caffe", weights=str(report.out))
    backbone = build_backbone(spec)
    assert load_imagenet(backbone, spec) == {}
    state = backbone.state_dict()
    assert torch.equal(state["layer1.0.conv1.weight"], tensors["res2_0_branch2a_w"])
    assert torch.equal(state["layer4.1.bn2.weight"], tensors["res5_1_branch2b_bn_s"])


def test_a_backbone_of_torchvisions(tmp_path_factory: pytest.TempPathFactory) -> None:
    """detectron2's script calls torchvision's tensors so, the classifier's with the stem."""
    folder = tmp_path_factory.mktemp("backbone")
    theirs = {}
    state = torchvision.models.resnet18(weights=None).state_dict()
    for key, value in state.items():
        name = key if "layer" in key else f"stem.{key}"
        for number in (1, 2, 3, 4):
            name = name.replace(f"layer{number}", f"res{number + 1}")
        for number in (1, 2, 3):
            name = name.replace(f"bn{number}", f"conv{number}.norm")
        theirs[name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")] = value
    source = write(folder / "r18.pkl", theirs, __author__="torchvision", matching_heuristics=True)
    report = convert_file(source, folder / "r18.safetensors")
    assert report.settings is not None
    assert report.settings[0] == "detector.backbone.style=pytorch"
    assert {name for name in state if not name.startswith("fc.")} == set(report.converted.state)
    recipe = edit(
        faster_rcnn_resnet50_caffe_fpn(),
        {
            "detector.backbone.depth": 18,
            "detector.backbone.weights": str(report.out),
            "detector.backbone.style": "pytorch",
            "detector.image.mean": (123.675, 116.28, 103.53),
        },
    )
    detector = build_detector(recipe.detector, num_classes=2)
    assert torch.equal(detector.state_dict()["backbone.layer4.1.conv2.weight"], state["layer4.1.conv2.weight"])


def test_a_backbone_with_more_than_that_is_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("backbone")
    source = write(
        folder / "odd.pkl",
        {"stem.conv1.weight": torch.ones(1), "res2.0.conv1.weight": torch.ones(1)}
        | {"res2.0.se.weight": torch.ones(1)},
        __author__="someone",
        matching_heuristics=True,
    )
    with pytest.raises(CheckpointError, match=r"odd\.pkl: res2\.0\.se\.weight: no rule"):
        convert_file(source, folder / "out.safetensors")
