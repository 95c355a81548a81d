"""A first stage that starts from a trained one-stage detector: what is taken, collapsed, left and refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rcnn.config.edit import edit
from rcnn.config.text import to_yaml
from rcnn.dense.fcos import FCOSHead
from rcnn.detectors.one_stage import OneStageDetector
from rcnn.detectors.pyramid import AbstractPyramidDetector
from rcnn.detectors.two_stage import TwoStageDetector
from rcnn.engine.checkpoint import CheckpointMeta, save_weights
from rcnn.errors import CheckpointError
from rcnn.proposals import ProposalStage
from rcnn.recipes.catalogue import quickstart
from rcnn.recipes.models import build_detector
from rcnn.recipes.recipe import Recipe
from rcnn.recipes.starts import read_own_start
from rcnn.recipes.warm_start import first_stage_start, start_first_stage
from rcnn.records import ClassTable

HEADS = ("rpn", "retinanet", "fcos", "atss", "gfl", "tood", "centernet", "yolox")
CLASSES = ClassTable(names=("circle", "square", "star"))
SMALL = {"fcos", "retinanet", "atss", "gfl", "tood", "centernet", "yolox"}


def head(kind: str) -> dict[str, object]:
    values: dict[str, object] = {"type": kind}
    if kind in SMALL:
        values |= {"num_convs": 1, "channels": 32}
    if kind == "rpn":
        values["anchors"] = {"sizes_px": [[16.0]]}
    if kind == "centernet":
        # With several classes the heat has a tower of its own; a first stage that shall start from it needs one too.
        values["heat_tower"] = "own"
    return values


def one_stage(kind: str) -> Recipe:
    base = quickstart()
    return edit(
        base,
        {
            "detector": {
                "type": "one_stage",
                "head": head(kind),
                "backbone": base.detector.backbone,
                "neck": {"type": "fpn", "channels": 32, "extra": "none", "first_map": 0},
            }
        },
    )


def two_stage(kind: str, path: Path | None = None) -> Recipe:
    changes: dict[str, object] = {"detector.neck.channels": 32, "detector.proposals.head": head(kind)}
    if path is not None:
        changes["detector.proposals.init_from"] = str(path)
    return edit(quickstart(), changes)


def trained(recipe: Recipe, path: Path, classes: ClassTable = CLASSES) -> AbstractPyramidDetector:
    torch.manual_seed(1)
    detector = build_detector(recipe.detector, num_classes=len(classes))
    with torch.no_grad():  # no tensor as it started
        for parameter in detector.parameters():
            parameter.add_(torch.randn_like(parameter))
    save_weights(path, detector.state_dict(), CheckpointMeta(recipe=to_yaml(recipe), classes=classes))
    return detector


@pytest.mark.parametrize("kind", HEADS)
def test_everything_of_the_first_stage_is_taken_or_collapsed(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "one_stage.safetensors"
    source = trained(one_stage(kind), path)
    recipe = two_stage(kind, path)
    detector = build_detector(recipe.detector, num_classes=2)
    before = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    found = first_stage_start(recipe.detector)
    assert found == str(path)
    lines = start_first_stage(detector, recipe, read_own_start(path))

    given = source.state_dict()
    after = detector.state_dict()
    collapsed = []
    for name, tensor in after.items():
        if name.startswith("roi."):
            torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
            continue
        theirs = given[name.replace("proposals.head.", "head.")]
        if theirs.shape != tensor.shape:
            # One prior per cell or several: classes of a prior lie side by side.
            by_hand = torch.stack([theirs[start : start + 3].mean(dim=0) for start in range(0, len(theirs), 3)])
            torch.testing.assert_close(tensor, by_hand)
            collapsed.append(name)
        else:
            torch.testing.assert_close(tensor, theirs, rtol=0, atol=0)
    assert collapsed, "the class scores became one objectness"
    assert all(name in "\n".join(lines) for name in collapsed)
    assert "3 classes collapsed" in lines[1]


def test_the_objectness_is_the_mean_of_the_logits(tmp_path: Path) -> None:
    path = tmp_path / "one_stage.safetensors"
    source = trained(one_stage("fcos"), path)
    recipe = two_stage("fcos", path)
    detector = build_detector(recipe.detector, num_classes=2)
    start_first_stage(detector, recipe, read_own_start(path))
    assert isinstance(source, OneStageDetector) and isinstance(detector, TwoStageDetector)
    assert isinstance(detector.proposals, ProposalStage)
    of_source, of_first_stage = source.head, detector.proposals.head
    assert isinstance(of_source, FCOSHead) and isinstance(of_first_stage, FCOSHead)
    x = torch.randn(1, 32, 8, 8, generator=torch.Generator().manual_seed(0))
    theirs, ours = of_source.tower(x, 0), of_first_stage.tower(x, 0)
    torch.testing.assert_close(ours[0], theirs[0].mean(dim=1, keepdim=True), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(ours[1], theirs[1])


def test_a_first_stage_of_the_same_kind_is_taken_whole(tmp_path: Path) -> None:
    path = tmp_path / "two_stage.safetensors"
    source = trained(two_stage("fcos"), path)
    recipe = two_stage("fcos", path)
    detector = build_detector(recipe.detector, num_classes=2)
    lines = start_first_stage(detector, recipe, read_own_start(path))
    given = source.state_dict()
    for name, tensor in detector.state_dict().items():
        if not name.startswith("roi."):
            torch.testing.assert_close(tensor, given[name], rtol=0, atol=0)
    assert "collapsed" not in "\n".join(lines)
    assert "roi.box_head" in lines[-1]


def test_another_head_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "one_stage.safetensors"
    trained(one_stage("fcos"), path)
    recipe = two_stage("atss", path)
    detector = build_detector(recipe.detector, num_classes=2)
    with pytest.raises(CheckpointError) as caught:
        start_first_stage(detector, recipe, read_own_start(path))
    assert "head fcos" in str(caught.value) and "head atss" in str(caught.value)


def test_other_channels_are_refused_tensor_by_tensor_and_nothing_is_changed(tmp_path: Path) -> None:
    path = tmp_path / "one_stage.safetensors"
    trained(one_stage("fcos"), path)
    recipe = edit(two_stage("fcos", path), {"detector.neck.channels": 64})
    detector = build_detector(recipe.detector, num_classes=2)
    before = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        start_first_stage(detector, recipe, read_own_start(path))
    assert "detector.proposals.init_from" in str(caught.value)
    assert "neck.lateral.0.0.weight" in str(caught.value)
    for name, tensor in detector.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_a_tower_that_our_head_lacks_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "one_stage.safetensors"
    trained(one_stage("centernet"), path)
    recipe = edit(two_stage("centernet", path), {"detector.proposals.head.heat_tower": "shared"})
    detector = build_detector(recipe.detector, num_classes=2)
    with pytest.raises(CheckpointError, match="heat_tower"):
        start_first_stage(detector, recipe, read_own_start(path))
