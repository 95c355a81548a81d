"""torchvision's FCOS and RetinaNet: names old and new, both ways."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rcnn.converters.torchvision_dense import Architecture, coco_classes, modern_names, recognise
from rcnn.errors import CheckpointError

Layout = Callable[[str], tuple[dict[str, Tensor], dict[str, str]]]

CASES: dict[str, tuple[Architecture, dict[str, str]]] = {
    "fcos_resnet50_fpn": (
        "fcos",
        {
            "head.classification_head.conv.0.weight": "head.tower.class_tower.layers.0.0.weight",
            "head.classification_head.conv.1.weight": "head.tower.class_tower.layers.0.1.weight",
            "head.regression_head.conv.10.bias": "head.tower.box_tower.layers.3.1.bias",
            "head.regression_head.bbox_ctrness.bias": "head.tower.centerness.bias",
            "backbone.fpn.extra_blocks.p7.bias": "neck.p7.bias",
            "backbone.fpn.inner_blocks.2.0.weight": "neck.lateral.2.0.weight",
            "backbone.body.layer4.2.bn3.running_var": "backbone.layer4.2.bn3.running_var",
        },
    ),
    "retinanet_resnet50_fpn": (
        "retinanet",
        {
            "head.classification_head.conv.3.0.weight": "head.tower.class_tower.layers.3.0.weight",
            "head.regression_head.bbox_reg.weight": "head.tower.deltas.weight",
        },
    ),
}


@pytest.fixture(scope="module")
def layout(shared: Path) -> Layout:
    """A recorded state dict, numbered instead of filled, and its table of older names (new: old)."""

    def read(case: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        manifest = json.loads((shared / "oracles" / "torchvision" / case / "manifest.json").read_text())
        state = {
            key: torch.tensor(float(number)).expand(shape)
            for number, (key, shape, _) in enumerate(manifest["state_dict"])
        }
        return state, manifest["older_key_names"]["names"]

    return read


@pytest.mark.parametrize("case", CASES)
def test_every_key_there_and_back(case: str, layout: Layout) -> None:
    architecture, some = CASES[case]
    state, _ = layout(case)
    model = recognise(state)
    assert model.architecture == architecture
    converted = model.key_map.to_ours(state)
    assert set(converted.names) == set(state)
    assert some.items() <= converted.names.items()
    back = model.key_map.to_theirs(converted.state)
    assert set(back) == set(state)
    assert all(value is state[key] for key, value in back.items())


@pytest.mark.parametrize("case", CASES)
def test_older_names(case: str, layout: Layout) -> None:
    state, older = layout(case)
    assert older
    old = {older.get(key, key): value for key, value in state.items()}
    modern = modern_names(old)
    assert modern.keys() == state.keys()
    assert all(value is state[key] for key, value in modern.items())
    assert modern_names(state).keys() == state.keys()


def test_a_name_old_and_new(layout: Layout) -> None:
    state, _ = layout("retinanet_resnet50_fpn")
    with pytest.raises(CheckpointError, match="under its old and its new name"):
        modern_names({**state, "head.classification_head.conv.2.weight": torch.ones(1)})


def test_keys_that_are_none_of_these(layout: Layout) -> None:
    with pytest.raises(CheckpointError, match="FCOS or RetinaNet"):
        recognise({"roi_heads.box_head.fc6.weight": torch.ones(1)})
    state, _ = layout("fcos_resnet50_fpn")
    with pytest.raises(CheckpointError, match=r"head\.mask\.weight: no rule"):
        recognise(state).key_map.to_ours({**state, "head.mask.weight": torch.ones(1)})


def test_classes() -> None:
    """Output 0 is nobody's; then COCO's ids, with the gaps of its list of 2014."""
    classes = coco_classes()
    assert len(classes) == 91
    assert (classes.names[0], classes.names[1], classes.names[90]) == ("unused 0", "person", "toothbrush")
    assert classes.category_ids == tuple(range(91))
