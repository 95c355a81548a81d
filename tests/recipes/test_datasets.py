"""Which pictures are trained on and judged by; every mistake of both splits at once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rcnn.data.table import AnnotationTable
from rcnn.errors import DataError, RecipeError
from rcnn.plain_records import ClassTable
from rcnn.recipes.catalogue import quickstart
from rcnn.recipes.datasets import read_evaluation, read_splits
from rcnn.recipes.recipe import DataSpec, Recipe

CLASSES = ClassTable(names=("cell",))


@pytest.fixture
def data(tmp_path: Path):
    """`data("train", "val")`: a COCO folder with ten pictures per split, each with one box; the last has none."""

    def make(*splits: str, **changes: Any) -> Path:
        root = tmp_path / "data"
        (root / "annotations").mkdir(parents=True, exist_ok=True)
        for split in splits:
            (root / split).mkdir(exist_ok=True)
            images = [{"id": i, "file_name": f"{i}.png", "width": 32, "height": 24} for i in range(10)]
            for image in images:
                Image.new("RGB", (32, 24)).save(root / split / image["file_name"])
            content = {
                "images": images,
                "categories": [{"id": 1, "name": "cell"}],
                "annotations": [{"id": i, "image_id": i, "category_id": 1, "bbox": [1, 2, 10, 12]} for i in range(9)],
            }
            (root / f"annotations/instances_{split}.json").write_text(json.dumps({**content, **changes}))
        return root

    return make


def spec(path: Path, **changes: Any) -> DataSpec:
    return DataSpec(path=str(path), **changes)


def names(table: AnnotationTable) -> set[str]:
    return {table.file_names[index] for index in range(len(table))}


@pytest.mark.parametrize(
    ("there", "train", "evaluation"),
    [
        (("train", "val", "test"), "train", "val"),
        (("train", "test"), "train", "test"),
        (("train2017", "val2017"), "train2017", "val2017"),
        (("train", "valid"), "train", "valid"),
    ],
)
def test_splits_by_their_usual_names(data, there, train: str, evaluation: str) -> None:
    splits = read_splits(spec(data(*there)), seed=0)
    assert splits.evaluation is not None
    assert (splits.train.split, splits.evaluation.split) == (train, evaluation)
    assert splits.notes == ()


def test_a_training_on_trainval_is_not_judged_by_val(data) -> None:
    """VOC's trainval holds val: its numbers would be those of the training."""
    splits = read_splits(spec(data("trainval", "train", "val", "test"), train_split="trainval"), seed=0)
    assert splits.evaluation is not None
    assert splits.evaluation.split == "test"


def test_pictures_in_both_splits_are_told(data) -> None:
    splits = read_splits(spec(data("train", "val"), eval_split="train"), seed=0)
    assert splits.notes == ("10 of the 10 pictures evaluated on are trained on: mind the numbers",)


def test_pictures_are_held_out_where_there_is_no_other_split(data) -> None:
    root = data("pictures")
    splits = read_splits(spec(root), seed=3)
    assert splits.evaluation is not None
    assert (len(splits.train), len(splits.evaluation)) == (8, 2)  # a fifth of ten
    assert not names(splits.train) & names(splits.evaluation)
    assert '2 pictures of "pictures" are held out' in splits.notes[0]
    again = read_splits(spec(root), seed=3)
    other = read_splits(spec(root), seed=4)
    assert again.evaluation is not None and other.evaluation is not None
    assert names(again.evaluation) == names(splits.evaluation) != names(other.evaluation)


def test_nothing_is_held_out_where_nothing_shall_be(data) -> None:
    splits = read_splits(spec(data("train"), holdout=0.0), seed=0)
    assert splits.evaluation is None
    assert len(splits.train) == 10
    assert splits.notes == ("no evaluation: there is no split for it, and data.holdout is 0",)


@pytest.mark.parametrize("splits", [("train",), ("train", "val")])
def test_without_an_evaluation_the_same_pictures_are_trained_on(data, splits: tuple[str, ...]) -> None:
    """The held-out ones stay unseen: `rcnn eval` judges by them later."""
    root = data(*splits)
    whole, blind = (read_splits(spec(root), seed=3, judged=judged) for judged in (True, False))
    assert whole.evaluation is not None and blind.evaluation is None
    assert names(blind.train) == names(whole.train)
    assert [note for note in blind.notes if note not in whole.notes] == [
        "no evaluation: evaluate.every_epochs is 0; the last checkpoint is kept, and none is the best"
    ]


def test_one_picture_cannot_be_shared_out(data) -> None:
    root = data("train", images=[{"id": 0, "file_name": "0.png"}], annotations=[])
    with pytest.raises(DataError, match="one picture; allowed: at least two, to train and to evaluate"):
        read_splits(spec(root), seed=0)


def test_pictures_without_boxes_are_trained_on_unless_they_shall_not(data) -> None:
    root = data("train", "val")
    assert len(read_splits(spec(root), seed=0).train) == 10
    splits = read_splits(spec(root, skip_empty=True), seed=0)
    assert (len(splits.train), splits.evaluation and len(splits.evaluation)) == (9, 10)
    assert splits.notes == ("1 pictures without boxes are not trained on (data.skip_empty)",)


def test_a_training_split_without_any_box(data) -> None:
    with pytest.raises(DataError, match=r'no picture of the training split "train" has a box; check that'):
        read_splits(spec(data("train", "val", annotations=[])), seed=0)


def test_mistakes_of_both_splits_are_told_together(data) -> None:
    root = data("train", "val")
    (root / "train/3.png").unlink()
    (root / "val/4.png").unlink()
    (root / "val/5.png").unlink()
    with pytest.raises(DataError) as caught:
        read_splits(spec(root), seed=0)
    assert [problem.where for problem in caught.value.problems] == [
        str(root / "train/3.png"), str(root / "val/4.png"), str(root / "val/5.png")
    ]  # fmt: skip


@pytest.mark.parametrize("setting", ["train_split", "eval_split"])
def test_a_split_that_is_not_there_names_the_setting(data, setting: str) -> None:
    with pytest.raises(DataError, match=rf'no split "trainvall"; allowed: train, val; .*set data\.{setting}=NAME'):
        read_splits(spec(data("train", "val"), **{setting: "trainvall"}), seed=0)


def test_no_training_split_among_several(data) -> None:
    with pytest.raises(DataError, match=r"allowed: east, west; choose one: data\.train_split=NAME"):
        read_splits(spec(data("east", "west")), seed=0)


def test_no_data_set() -> None:
    with pytest.raises(RecipeError, match="--data DIR"):
        read_splits(DataSpec(), seed=0)


def trained_on(path: Path, **changes: Any) -> Recipe:
    return quickstart().model_copy(update={"data": spec(path, **changes)})


def test_an_evaluation_judges_by_what_the_training_held_out(data) -> None:
    """The same pictures as in the training, not those that it has seen."""
    root = data("pictures")
    recipe = trained_on(root)
    held_out = read_splits(recipe.data, seed=recipe.train.seed).evaluation
    judged = read_evaluation(str(root), split=None, classes=CLASSES, recipe=recipe)
    assert held_out is not None
    assert names(judged.truth) == names(held_out)
    assert judged.notes == ("the 2 pictures that the training held out; all of them: --split pictures",)


def test_an_evaluation_of_other_data_takes_them_whole(data, tmp_path: Path) -> None:
    root = data("pictures")
    shutil.copytree(root, tmp_path / "other")
    judged = read_evaluation(str(tmp_path / "other"), split=None, classes=CLASSES, recipe=trained_on(root))
    assert (len(judged.truth), judged.notes) == (10, ())


def test_an_evaluation_on_the_training_split_is_told(data) -> None:
    root = data("train", "val")
    judged = read_evaluation(str(root), split="train", classes=CLASSES, recipe=trained_on(root))
    assert judged.notes == ('"train" is the split that was trained on: mind the numbers',)
    assert read_evaluation(str(root), split=None, classes=CLASSES, recipe=trained_on(root)).truth.split == "val"


def test_the_recipes_own_split_where_the_data_have_it(data) -> None:
    root = data("train", "val", "test")
    recipe = trained_on(root, eval_split="test")
    assert read_evaluation(str(root), split=None, classes=CLASSES, recipe=recipe).truth.split == "test"
    shutil.rmtree(root)
    root = data("train", "val")
    assert read_evaluation(str(root), split=None, classes=CLASSES, recipe=recipe).truth.split == "val"


def test_a_class_that_the_checkpoint_does_not_know(data) -> None:
    root = data("val")
    with pytest.raises(DataError, match=r'the class "cell" is not one .*allowed: dog'):
        read_evaluation(str(root), split=None, classes=ClassTable(names=("dog",)), recipe=trained_on(root))


# ------------------------------------------------------------------------------------------- a part of the classes

_PETS = {
    "categories": [{"id": 4, "name": "cell"}, {"id": 7, "name": "dust"}, {"id": 9, "name": "fibre"}],
    "annotations": [
        {"id": i, "image_id": i % 3, "category_id": (4, 7, 9)[i % 3], "bbox": [1, 2, 10, 12]} for i in range(6)
    ],
}


def test_chosen_classes_in_training_and_evaluation(data) -> None:
    """Of two boxes of each class on three pictures, those of two classes, in the order of the recipe."""
    root = data("train", "val", **_PETS)
    splits = read_splits(spec(root, classes=("fibre", "cell"), skip_empty=True), seed=0)
    assert splits.evaluation is not None
    assert splits.train.classes == splits.evaluation.classes == ClassTable(names=("fibre", "cell"), category_ids=(9, 4))
    assert sorted(splits.train.labels.tolist()) == [0, 0, 1, 1]
    assert names(splits.train) == {"0.png", "2.png"}  # the picture of dust is one without a box
    assert len(splits.evaluation) == 10
    assert splits.notes[:2] == ("2 boxes of other classes are not read (data.classes)",) * 2


def test_a_checkpoint_of_chosen_classes_is_judged_by_them(data) -> None:
    root = data("train", "val", **_PETS)
    classes = ClassTable(names=("fibre", "cell"), category_ids=(9, 4))
    judged = read_evaluation(str(root), split=None, classes=classes, recipe=trained_on(root, classes=("fibre", "cell")))
    assert (judged.truth.classes, sorted(judged.truth.labels.tolist())) == (classes, [0, 0, 1, 1])
    assert judged.notes == ("2 boxes of other classes are not read (data.classes)",)


def test_a_class_chosen_twice_or_not_there(data) -> None:
    root = data("train", "val", **_PETS)
    with pytest.raises(RecipeError, match=r"data\.classes: cell more than once; allowed: a name of its own"):
        read_splits(spec(root, classes=("cell", "dust", "cell")), seed=0)
    with pytest.raises(DataError, match=r'the class "cells" was chosen .*allowed: cell, dust, fibre; did you mean'):
        read_splits(spec(root, classes=("cells",)), seed=0)
