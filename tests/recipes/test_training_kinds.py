"""Trainings of every kind of detector: one stage, first stage alone, cascade, given proposals, warm start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import rcnn
from rcnn.engine.checkpoint import read_meta
from rcnn.engine.progress import SilentProgress
from rcnn.engine.run_folder import RunFolder
from rcnn.errors import CheckpointError, RecipeError
from rcnn.evaluation.recall import proposal_recall
from rcnn.recipes.proposing import evaluate_proposals
from rcnn.recipes.training import TrainResult, resume
from rcnn.recipes.training import train as run_training

pytestmark = pytest.mark.xdist_group("tiny")

FCOS = "{type: fcos, num_convs: 1, channels: 32}"
ONE_STAGE = (
    f"detector={{type: one_stage, head: {FCOS}, image: {{short_side: 64, max_long_side: 96}}, "
    "backbone: {type: timm, name: resnet10t, norm: batch, weights: null}, "
    "neck: {type: fpn, channels: 32, extra: none, first_map: 0}}"
)
FIRST_STAGE = (
    f"detector={{type: first_stage, proposals: {{head: {FCOS}}}, image: {{short_side: 64, max_long_side: 96}}, "
    "backbone: {type: timm, name: resnet10t, norm: batch, weights: null}, "
    "neck: {type: fpn, channels: 32, extra: none, first_map: 0}}"
)


@pytest.fixture
def train(tiny, tmp_path: Path):
    def call(*overrides: str, run: str = "run", **options: Any) -> TrainResult:
        recipe = rcnn.recipe("quickstart", *(o for o in tiny.overrides if not _is_replaced(o, overrides)), *overrides)
        return run_training(recipe, run_folder=tmp_path / run, data=str(tiny.data), device="cpu", **options)

    return call


def _is_replaced(override: str, overrides: tuple[str, ...]) -> bool:
    """Whether another detector takes the place of what the override is about."""
    return override.startswith("detector.") and any(other.startswith("detector=") for other in overrides)


def test_a_one_stage_detector(tiny, train, tmp_path: Path) -> None:
    result = train(ONE_STAGE)
    rows = list(RunFolder(tmp_path / "run").rows())
    assert {"loss/classification", "loss/box", "loss/centerness"} <= set(rows[0])
    assert result.evaluation is not None
    checkpoint = tmp_path / "run/checkpoints/last.safetensors"
    assert dict(rcnn.evaluate(checkpoint, data=tiny.data).coco.items()) == dict(result.evaluation.coco.items())
    assert rcnn.load(checkpoint).classes.names == read_meta(tiny.checkpoint).classes.names


def test_a_first_stage_alone_is_judged_by_recall_and_knows_no_class(tiny, train, tmp_path: Path) -> None:
    result = train(FIRST_STAGE, "evaluate.metric=proposals")
    rows = list(RunFolder(tmp_path / "run").rows())
    assert {"loss/rpn_classification", "loss/rpn_box", "loss/rpn_centerness"} <= set(rows[0])
    assert result.evaluation is not None
    checkpoint = tmp_path / "run/checkpoints/best.safetensors"
    assert read_meta(checkpoint).classes.names == ("object",)
    # The number that chose it, by another way: `rcnn proposals eval`, on the data's own classes.
    judged = evaluate_proposals(checkpoint, data=str(tiny.data))
    assert rows[-1]["AR@1000"] == pytest.approx(float(judged.recall.average[-1]), abs=1e-6)
    assert {one.name for one in judged.recall.per_class} == set(read_meta(tiny.checkpoint).classes.names)
    # And `rcnn eval`, where every box is an object.
    evaluation = rcnn.evaluate(checkpoint, data=tiny.data)
    assert evaluation.truth.classes.names == ("object",)
    again = proposal_recall(evaluation.truth, evaluation.found)
    assert float(again.average[-1]) == pytest.approx(rows[-1]["AR@1000"], abs=1e-6)
    resume(tmp_path / "run", overrides=["train.max_steps=4"], device="cpu")
    assert RunFolder(tmp_path / "run").path.exists()


def test_recall_cannot_choose_among_detectors_with_a_second_stage(train) -> None:
    with pytest.raises(RecipeError, match="rcnn proposals eval"):
        train("evaluate.metric=proposals")


def test_a_cascade_on_another_head_with_fused_scores(train, tmp_path: Path) -> None:
    train(
        "detector.proposals.head={type: centernet, num_convs: 1, channels: 32}",
        "detector.roi={type: cascade, fusion: sqrt, box_head: {type: two_fc, features: 32}}",
    )
    rows = list(RunFolder(tmp_path / "run").rows())
    expected = {"loss/rpn_peak", "loss/rpn_off_peak", "loss/rpn_box"}
    expected |= {f"loss/roi{stage}_{term}" for stage in (1, 2, 3) for term in ("classification", "box")}
    assert expected <= set(rows[0])


def test_proposals_for_a_detector_that_makes_its_own_are_refused(train, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="makes its own proposals"):
        train(f"data.train_proposals={tmp_path / 'any.safetensors'}")


def test_a_first_stage_starts_from_a_trained_one_stage_detector(train, tmp_path: Path) -> None:
    train(ONE_STAGE)
    notes: list[str] = []
    checkpoint = tmp_path / "run/checkpoints/last.safetensors"
    progress = _Notes(notes)
    warm = (
        f"detector.proposals.head={FCOS}",
        f"detector.proposals.init_from={checkpoint}",
        "detector.neck={type: fpn, channels: 32, extra: none, first_map: 0}",
        "detector.backbone={type: timm, name: resnet10t, norm: batch, weights: null}",
    )
    train(*warm, run="warm", progress=progress)
    text = "\n".join(notes)
    assert "5 classes collapsed to one objectness" in text
    assert "proposals.head.tower.classes.weight" in text
    with pytest.raises(CheckpointError, match="head fcos"):
        train("detector.proposals.head={type: atss, num_convs: 1}", *warm[1:], run="other")


class _Notes(SilentProgress):
    def __init__(self, notes: list[str]) -> None:
        self._notes = notes

    def noted(self, text: str) -> None:
        self._notes.append(text)
