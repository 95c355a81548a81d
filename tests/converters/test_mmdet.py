"""MMDetection's state dicts: every key of each recorded one, both ways. The parity tests load them into detectors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rcnn.converters.mmdet import recognise
from rcnn.converters.mmdet_structure import HeadKind
from rcnn.converters.mmdet_versions import modern_names
from rcnn.errors import CheckpointError

Layout = Callable[[str], dict[str, Tensor]]

# What each is, its cascade's stages, and some names: the same file under theirs and ours.
CASES: dict[str, tuple[HeadKind, bool, int, dict[str, str]]] = {
    "rpn_r50_fpn_1x": ("rpn", False, 0, {"bbox_head.rpn_conv.weight": "head.tower.convs.0.weight"}),
    "faster-rcnn_r50_fpn_1x": (
        "rpn",
        True,
        0,
        {
            "rpn_head.rpn_cls.bias": "proposals.head.tower.classes.bias",
            "backbone.layer1.0.downsample.1.running_var": "backbone.layer1.0.downsample.1.running_var",
            "neck.lateral_convs.3.conv.weight": "neck.lateral.3.0.weight",
            "neck.fpn_convs.3.conv.weight": "neck.output.3.0.weight",
            "roi_head.bbox_head.shared_fcs.1.bias": "roi.box_head.fc7.bias",
            "roi_head.bbox_head.fc_reg.weight": "roi.predictor.deltas.weight",
        },
    ),
    "cascade-rcnn_r50_fpn_1x": (
        "rpn",
        True,
        3,
        {
            "roi_head.bbox_head.2.fc_cls.weight": "roi.stages.2.predictor.classes.weight",
            "roi_head.bbox_head.0.shared_fcs.0.weight": "roi.stages.0.box_head.fc6.weight",
        },
    ),
    "retinanet_r50_fpn_1x": (
        "retinanet",
        False,
        0,
        {
            # The fourth and fifth convolution stand for the two extra levels of a pyramid of three.
            "neck.fpn_convs.2.conv.bias": "neck.output.2.0.bias",
            "neck.fpn_convs.3.conv.bias": "neck.p6.bias",
            "neck.fpn_convs.4.conv.bias": "neck.p7.bias",
            "bbox_head.cls_convs.0.conv.bias": "head.tower.class_tower.layers.0.0.bias",
            "bbox_head.retina_reg.bias": "head.tower.deltas.bias",
        },
    ),
    "fcos_r50-caffe_fpn_gn-head_1x": (
        "fcos",
        False,
        0,
        {
            "bbox_head.reg_convs.3.gn.weight": "head.tower.box_tower.layers.3.1.weight",
            "bbox_head.conv_reg.weight": "head.tower.distances.weight",
            "bbox_head.scales.4.scale": "head.tower.scales.4.scale",
        },
    ),
    "faster-rcnn_r50_fpn_fcos-rpn_1x": (
        "fcos",
        True,
        0,
        {"rpn_head.conv_centerness.bias": "proposals.head.tower.centerness.bias"},
    ),
    "faster-rcnn_r50-caffe_fpn_fcos-rpn_1x": ("fcos", True, 0, {}),
    "atss_r50_fpn_1x": ("atss", False, 0, {"bbox_head.atss_reg.weight": "head.tower.deltas.weight"}),
    "gfl_r50_fpn_1x": (
        "gfl",
        False,
        0,
        {
            "bbox_head.gfl_reg.weight": "head.tower.sides.weight",
            "bbox_head.integral.project": "head.bin_distances",
        },
    ),
}


@pytest.fixture(scope="module")
def layout(shared: Path) -> Layout:
    """A recorded state dict, numbered instead of filled."""

    def read(case: str) -> dict[str, Tensor]:
        manifest = json.loads((shared / "oracles" / "mmdetection" / case / "manifest.json").read_text())
        return {
            key: torch.tensor(float(number)).expand(shape)
            for number, (key, shape, _) in enumerate(manifest["state_dict"])
        }

    return read


@pytest.mark.parametrize("case", CASES)
def test_every_key_there_and_back(case: str, layout: Layout) -> None:
    head, two_stage, cascade_stages, some = CASES[case]
    state = layout(case)
    model = recognise(state, norms="trained")
    prefix = "rpn_head" if two_stage else "bbox_head"
    assert (model.head, model.head_prefix, model.cascade_stages) == (head, prefix, cascade_stages)
    converted = model.key_map.to_ours(state)
    assert set(converted.names) == set(state)
    assert some.items() <= converted.names.items()
    back = model.key_map.to_theirs(converted.state)
    assert set(back) == set(state)
    assert all(value is state[key] for key, value in back.items())


@pytest.mark.parametrize("case", CASES)
def test_frozen_norms_count_no_batches(case: str, layout: Layout) -> None:
    state = layout(case)
    converted = recognise(state, norms="frozen").key_map.to_ours(state)
    assert set(converted.names) | set(converted.dropped) == set(state)
    # One for each of a ResNet-50's norms.
    assert sum(key.endswith("num_batches_tracked") for key in converted.dropped) == len(converted.dropped) == 53


def test_a_one_stage_head_as_a_first_stage(layout: Layout) -> None:
    """What MMDetection does when a one-stage checkpoint starts a two-stage detector: `bbox_head` becomes `rpn_head`."""
    one, two = (layout(case) for case in ("fcos_r50-caffe_fpn_gn-head_1x", "faster-rcnn_r50-caffe_fpn_fcos-rpn_1x"))
    found = recognise(one, norms="frozen", head_place="proposals.head").key_map.to_ours(one)
    wanted = recognise(two, norms="frozen").key_map.to_ours(two)
    assert set(found.state) == {name for name in wanted.state if not name.startswith("roi.")}
    # Of other shapes are the classes alone: 80 here, one there.
    other = [name for name, value in found.state.items() if value.shape != wanted.state[name].shape]
    assert other == ["proposals.head.tower.classes.weight", "proposals.head.tower.classes.bias"]


BRIDGES = {
    # source, target: the place of the source's head; the target's names that stay as they were.
    ("fcos_r50-caffe_fpn_gn-head_1x", "faster-rcnn_r50-caffe_fpn_fcos-rpn_1x"): "proposals.head",
    ("rpn_r50_fpn_1x", "faster-rcnn_r50_fpn_1x"): "proposals.head",
    ("faster-rcnn_r50_fpn_1x", "rpn_r50_fpn_1x"): "head",
    ("faster-rcnn_r50_fpn_fcos-rpn_1x", "fcos-rpn_r50_fpn_1x"): "head",
}


@pytest.mark.parametrize(("source", "target"), BRIDGES)
def test_bridges_between_detectors(shared: Path, layout: Layout, source: str, target: str) -> None:
    """As many tensors go from one kind of detector to the other as MMDetection loads, and the same are left."""
    manifest = json.loads((shared / "oracles/mmdetection/checkpoint_bridges/manifest.json").read_text())
    (recorded,) = [result for result in manifest["results"] if (result["source"], result["target"]) == (source, target)]
    states = layout(source), first_stage_alone(layout(source)) if target.startswith("fcos-rpn") else layout(target)
    place = BRIDGES[source, target]
    maps = [recognise(state, norms="trained", head_place=place).key_map for state in states]
    found, wanted = (key_map.to_ours(state) for key_map, state in zip(maps, states, strict=True))
    theirs = {ours: name for name, ours in wanted.names.items()}
    loaded = {
        name for name, value in wanted.state.items() if name in found.state and found.state[name].shape == value.shape
    }
    assert len(loaded) == recorded["loaded"]
    assert {theirs[name] for name in wanted.state.keys() - loaded} == set(recorded["left_at_initialisation"])


def first_stage_alone(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The layout of the RPN detector with that first stage."""
    own = {key: value for key, value in state.items() if not key.startswith("roi_head.")}
    return {key.replace("rpn_head.", "bbox_head."): value for key, value in own.items()}


def test_older_names_of_fcos(layout: Layout) -> None:
    state = layout("fcos_r50-caffe_fpn_gn-head_1x")
    old = {
        key.replace("conv_cls", "fcos_cls").replace("conv_reg", "fcos_reg").replace("conv_cent", "fcos_cent"): value
        for key, value in state.items()
    }
    assert "bbox_head.fcos_centerness.bias" in old
    assert modern_names(old).keys() == state.keys()
    assert modern_names(state).keys() == state.keys()


def test_several_convolutions_of_an_rpn() -> None:
    state = {
        "rpn_head.rpn_conv.0.conv.weight": torch.ones(1),
        "rpn_head.rpn_conv.1.conv.bias": torch.ones(1),
        "rpn_head.rpn_cls.weight": torch.ones(1),
    }
    converted = recognise(state, norms="frozen").key_map.to_ours(state)
    assert list(converted.state) == [
        "proposals.head.tower.convs.0.weight",
        "proposals.head.tower.convs.1.bias",
        "proposals.head.tower.classes.weight",
    ]


def test_a_box_head_of_convolutions() -> None:
    """MMDetection's Shared4Conv1FCBBoxHead."""
    state = {
        "rpn_head.rpn_cls.weight": torch.ones(1),
        "roi_head.bbox_head.shared_convs.2.conv.weight": torch.ones(1),
        "roi_head.bbox_head.shared_convs.2.gn.bias": torch.ones(1),
        "roi_head.bbox_head.shared_fcs.0.weight": torch.ones(1),
    }
    converted = recognise(state, norms="frozen").key_map.to_ours(state)
    assert list(converted.state)[1:] == [
        "roi.box_head.convs.2.0.weight",
        "roi.box_head.convs.2.1.bias",
        "roi.box_head.fc.weight",
    ]


def test_keys_that_are_none_of_these(layout: Layout) -> None:
    with pytest.raises(CheckpointError, match=r"bbox_head\.retina_cls\.weight"):
        recognise({"bbox_head.heatmap_head.0.weight": torch.ones(1)}, norms="frozen")
    state = layout("faster-rcnn_r50_fpn_1x") | {"roi_head.track_head.fc.weight": torch.ones(2, 3)}
    with pytest.raises(CheckpointError, match=r"roi_head\.track_head\.fc\.weight: no rule .* \(2, 3\)"):
        recognise(state, norms="frozen").key_map.to_ours(state)
