"""Proposals through a file and back: a Fast R-CNN on a detector's own proposals is that detector."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

import rcnn
from rcnn.config.edit import edit
from rcnn.data.folder import read_dataset
from rcnn.data.proposals import ProposalFile, write_proposals
from rcnn.engine.accelerator import build_accelerator
from rcnn.engine.checkpoint import load_into
from rcnn.engine.evaluate import predict_all
from rcnn.errors import DataError, RecipeError
from rcnn.recipes.checkpoints import read_detector
from rcnn.recipes.datasets import read_evaluation
from rcnn.recipes.loaders import build_loader_for_evaluation
from rcnn.recipes.models import build_detector
from rcnn.recipes.proposing import dump_proposals

pytestmark = pytest.mark.xdist_group("tiny")


@pytest.fixture(scope="module")
def dumped(tiny, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("proposals")
    for split in ("train", "val"):
        dump_proposals(tiny.checkpoint, folder / split, data=str(tiny.data), split=split, device="cpu")
    return folder


def test_the_second_stage_alone_finds_the_same(tiny, dumped) -> None:
    """The same weights, once on the first stage's proposals, once on the file's, which went to original pixels and
    back."""
    loaded = read_detector(tiny.checkpoint)
    fast_recipe = edit(loaded.recipe, {"detector.proposals": {"type": "given"}})
    fast_recipe = edit(fast_recipe, {"data.eval_proposals": str(dumped / "val")})
    fast = build_detector(fast_recipe.detector, num_classes=len(loaded.classes), pretrained=False)
    weights = loaded.detector.state_dict()
    load_into(fast, {name: weights[name] for name in weights if not name.startswith("proposals.")})
    truth = read_evaluation(str(tiny.data), split="val", classes=loaded.classes, recipe=loaded.recipe).truth
    accelerator = build_accelerator(device="cpu")
    expected = predict_all(loaded.detector, build_loader_for_evaluation(truth, loaded.recipe), accelerator=accelerator)
    found = predict_all(fast, build_loader_for_evaluation(truth, fast_recipe), accelerator=accelerator)
    assert len(expected) > 20
    np.testing.assert_array_equal(found.image_ids, expected.image_ids)
    np.testing.assert_array_equal(found.labels, expected.labels)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)
    np.testing.assert_allclose(found.boxes_xyxy, expected.boxes_xyxy, atol=1e-2)


def fast_recipe(tiny, dumped, **changes: str):
    overrides = [text for text in tiny.overrides if "proposals" not in text]
    files = {"data.train_proposals": dumped / "train", "data.eval_proposals": dumped / "val", **changes}
    overrides += ["detector.proposals.type=given", *(f"{name}={value}" for name, value in files.items())]
    return rcnn.recipe("quickstart", *overrides)


def test_fast_rcnn_trains_and_is_evaluated_on_files(tiny, dumped, tmp_path) -> None:
    recipe = fast_recipe(tiny, dumped)
    result = rcnn.train(recipe, run_folder=tmp_path / "run", data=tiny.data, device="cpu")
    rows = list(result.run.rows())
    losses = {name for row in rows for name in row if name.startswith("loss/")}
    assert losses == {"loss/roi_classification", "loss/roi_box"}
    again = rcnn.evaluate(result.run.best, data=tiny.data, device="cpu")
    assert result.evaluation is not None
    assert again.coco["AP50"] == result.evaluation.coco["AP50"]


def test_files_that_are_missing_are_named_together(tiny, tmp_path) -> None:
    recipe = edit(rcnn.recipe("quickstart"), {"detector.proposals": {"type": "given"}})
    with pytest.raises(RecipeError) as caught:
        rcnn.train(recipe, run_folder=tmp_path / "run", data=tiny.data, device="cpu")
    assert [problem.where for problem in caught.value.problems] == ["data.train_proposals", "data.eval_proposals"]


def test_where_nothing_is_evaluated_no_proposals_are_asked_for_it(tiny, dumped, tmp_path) -> None:
    shutil.copytree(tiny.data, tmp_path / "data")
    (tmp_path / "data/annotations/instances_val.json").unlink()
    recipe = edit(fast_recipe(tiny, dumped), {"data.eval_proposals": None, "train.max_steps": 1})
    with pytest.raises(RecipeError, match=r"data\.eval_proposals: null"):  # for the pictures that are held out
        rcnn.train(recipe, run_folder=tmp_path / "run", data=tmp_path / "data", device="cpu")
    recipe = edit(recipe, {"data.holdout": 0})
    result = rcnn.train(recipe, run_folder=tmp_path / "run", data=tmp_path / "data", device="cpu")
    assert result.evaluation is None


def test_a_damaged_file_is_found_before_the_training_begins(tiny, dumped, tmp_path) -> None:
    """Its last number, a score, became 7."""
    content = bytearray((dumped / "train").read_bytes())
    content[-4:] = np.float32(7).tobytes()
    (tmp_path / "spoiled").write_bytes(content)
    recipe = fast_recipe(tiny, dumped, **{"data.train_proposals": str(tmp_path / "spoiled")})
    with pytest.raises(DataError) as caught:
        rcnn.train(recipe, run_folder=tmp_path / "run", data=tiny.data, device="cpu")
    (problem,) = caught.value.problems
    assert problem.where.startswith(f"{tmp_path}/spoiled, picture ")
    assert problem.given == "1 scores are not from 0 to 1, the first 7"
    assert problem.remedy == "make it anew: rcnn proposals dump CHECKPOINT --data DIR"
    assert not (tmp_path / "run").exists()


def test_scores_that_a_fusion_would_miss_are_told_before_the_training_begins(tiny, dumped, tmp_path) -> None:
    file = ProposalFile(dumped / "val")
    table = read_dataset(str(tiny.data), split="val")
    with write_proposals(tmp_path / "boxes", table, origin=file.origin, scored=False) as writer:
        for index in range(len(table)):
            writer.add(file[index])
    recipe = edit(
        fast_recipe(tiny, dumped), {"detector.roi.fusion": "sqrt", "data.eval_proposals": str(tmp_path / "boxes")}
    )
    with pytest.raises(DataError, match=r"detector\.roi\.fusion: sqrt, and proposals without scores in .*boxes"):
        rcnn.train(recipe, run_folder=tmp_path / "run", data=tiny.data, device="cpu")
    assert not (tmp_path / "run").exists()


def test_a_file_for_other_pictures_ends_the_training_before_it_begins(tiny, dumped, tmp_path) -> None:
    recipe = fast_recipe(tiny, dumped, **{"data.train_proposals": str(dumped / "val")})
    with pytest.raises(DataError, match="12 of the 12 pictures of the data are not in it"):
        rcnn.train(recipe, run_folder=tmp_path / "run", data=tiny.data, device="cpu")
    assert not (tmp_path / "run").exists()
