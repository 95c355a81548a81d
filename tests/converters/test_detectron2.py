"""detectron2's state dicts: every key of each recorded one, both ways."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rcnn.converters.detectron2 import Architecture, recognise
from rcnn.errors import CheckpointError

Layout = Callable[[str], dict[str, Tensor]]

CASES: dict[str, tuple[Architecture, dict[str, str]]] = {
    "faster_rcnn_R_50_FPN_1x": (
        "faster_rcnn",
        {
            "backbone.bottom_up.stem.conv1.norm.running_mean": "backbone.bn1.running_mean",
            "backbone.bottom_up.stem.conv1.weight": "backbone.conv1.weight",
            "backbone.bottom_up.res2.0.shortcut.norm.bias": "backbone.layer1.0.downsample.1.bias",
            "backbone.bottom_up.res5.2.conv3.weight": "backbone.layer4.2.conv3.weight",
            "backbone.fpn_lateral2.weight": "neck.lateral.0.0.weight",
            "backbone.fpn_output5.bias": "neck.output.3.0.bias",
            "proposal_generator.rpn_head.objectness_logits.bias": "proposals.head.tower.classes.bias",
            "roi_heads.box_head.fc1.weight": "roi.box_head.fc6.weight",
            "roi_heads.box_predictor.bbox_pred.bias": "roi.predictor.deltas.bias",
        },
    ),
    "retinanet_R_50_FPN_1x": (
        "retinanet",
        {
            "backbone.fpn_lateral3.weight": "neck.lateral.0.0.weight",
            "backbone.top_block.p6.weight": "neck.p6.weight",
            # Convolutions have the even numbers.
            "head.cls_subnet.6.weight": "head.tower.class_tower.layers.3.0.weight",
            "head.bbox_subnet.2.bias": "head.tower.box_tower.layers.1.0.bias",
            "head.bbox_pred.weight": "head.tower.deltas.weight",
        },
    ),
}


@pytest.fixture(scope="module")
def layout(shared: Path) -> Layout:
    """A recorded state dict, numbered instead of filled."""

    def read(case: str) -> dict[str, Tensor]:
        manifest = json.loads((shared / "oracles" / "detectron2" / case / "manifest.json").read_text())
        return {
            key: torch.tensor(float(number)).expand(shape)
            for number, (key, shape, _) in enumerate(manifest["state_dict"])
        }

    return read


@pytest.mark.parametrize("case", CASES)
def test_every_key_there_and_back(case: str, layout: Layout) -> None:
    architecture, some = CASES[case]
    state = layout(case)
    model = recognise(state)
    assert model.architecture == architecture
    converted = model.key_map.to_ours(state)
    assert set(converted.names) == set(state)
    assert some.items() <= converted.names.items()
    assert set(converted.added) == ({"head.normalizer.mean"} if architecture == "retinanet" else set())
    back = model.key_map.to_theirs(converted.state)
    assert set(back) == set(state)
    assert all(torch.equal(value, state[key]) for key, value in back.items())


def test_anchors_change_places(layout: Layout) -> None:
    """Nine anchors of two classes: theirs are sizes a b c of the first ratio at 0, 3, 6, ours at 0, 1, 2."""
    state = layout("retinanet_R_50_FPN_1x")
    state["head.cls_score.bias"] = torch.arange(18.0)  # anchor n has 2n and 2n + 1
    state["head.bbox_pred.weight"] = torch.arange(9.0).repeat_interleave(4)[:, None].expand(36, 5)
    key_map = recognise(state | {"head.cls_score.weight": torch.ones(18, 1)}).key_map
    found = key_map.to_ours(state).state
    order = [0, 3, 6, 1, 4, 7, 2, 5, 8]
    assert found["head.tower.classes.bias"].reshape(9, 2)[:, 0].tolist() == [2.0 * n for n in order]
    assert found["head.tower.classes.bias"].reshape(9, 2)[:, 1].tolist() == [2.0 * n + 1 for n in order]
    assert found["head.tower.deltas.weight"][::4, 4].tolist() == order
    back = key_map.to_theirs(found)
    for name in ("head.cls_score.bias", "head.bbox_pred.weight"):
        assert torch.equal(back[name], state[name])


def test_constants_of_older_files(layout: Layout) -> None:
    constants = {
        "pixel_mean": torch.ones(3),
        "proposal_generator.anchor_generator.cell_anchors.4": torch.ones(3, 4),
        "backbone.bottom_up.stem.conv1.norm.num_batches_tracked": torch.ones(()),
    }
    state = layout("faster_rcnn_R_50_FPN_1x")
    converted = recognise(state).key_map.to_ours(state | constants)
    assert set(converted.dropped) == set(constants)


def test_several_convolutions_of_an_rpn(layout: Layout) -> None:
    state = layout("faster_rcnn_R_50_FPN_1x")
    for kind in ("weight", "bias"):
        value = state.pop(f"proposal_generator.rpn_head.conv.{kind}")
        state |= {f"proposal_generator.rpn_head.conv.conv{number}.{kind}": value for number in (0, 1)}
    names = recognise(state).key_map.to_ours(state).names
    assert names["proposal_generator.rpn_head.conv.conv1.bias"] == "proposals.head.tower.convs.1.bias"


def test_keys_that_are_none_of_these(layout: Layout) -> None:
    with pytest.raises(CheckpointError, match=r"head\.cls_score\.weight"):
        recognise({"model.0.weight": torch.ones(1)})
    with pytest.raises(CheckpointError, match="no pyramid"):
        recognise(layout("faster_rcnn_R_50_C4_1x"))
    state = layout("retinanet_R_50_FPN_1x") | {"head.ctrness.weight": torch.ones(1)}
    with pytest.raises(CheckpointError, match=r"head\.ctrness\.weight: no rule"):
        recognise(state).key_map.to_ours(state)
