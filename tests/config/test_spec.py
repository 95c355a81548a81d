"""What a spec accepts, and the words for what it would."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from pydantic import ValidationError

from rcnn.config.spec import Leaf, Node, Nodes, Spec, check, fields_of, plain
from rcnn.errors import RecipeError


def test_a_spec_is_frozen_and_hashable(toy) -> None:
    assert hash(toy.Rpn()) == hash(toy.Rpn())
    with pytest.raises(ValidationError, match="frozen"):
        toy.Rpn().channels = 3


def test_an_int_is_a_float_and_a_list_a_tuple(toy) -> None:
    assert toy.Train(lr=1, sides=[320, 480]).sides == (320, 480)
    assert isinstance(toy.Train(lr=1).lr, float)


@pytest.mark.parametrize(
    ("values", "where"),
    [
        ({"epochs": "12"}, "Train.epochs"),
        ({"epochs": 12.0}, "Train.epochs"),
        ({"epochs": True}, "Train.epochs"),
        ({"epochs": 0}, "Train.epochs"),
        ({"epochs": None}, "Train.epochs"),
        ({"lr": float("nan")}, "Train.lr"),
        ({"lr": float("inf")}, "Train.lr"),
        ({"lr": "1e-4"}, "Train.lr"),
        ({"shuffle": 1}, "Train.shuffle"),
        ({"sides": (1.5,)}, "Train.sides.0"),
        ({"epoch": 3}, "Train.epoch"),
    ],
)
def test_a_wrong_value_is_our_error(toy, values, where) -> None:
    with pytest.raises(RecipeError) as caught:
        toy.Train(**values)
    assert [problem.where for problem in caught.value.problems] == [where]


def test_all_wrong_values_are_reported_at_once(toy) -> None:
    with pytest.raises(RecipeError) as caught:
        toy.Train(epochs=0, lr="x", shuffle=2)
    assert len(caught.value.problems) == 3


def test_values_that_disagree_are_our_error(toy) -> None:
    with pytest.raises(RecipeError, match=r"warm_epochs \(4\) exceeds epochs \(3\)"):
        toy.Train(epochs=3, warm_epochs=4)


def test_slots(toy) -> None:
    slots = fields_of(toy.Train)
    assert isinstance(slots["epochs"], Leaf)
    assert not slots["epochs"].optional
    assert isinstance(slots["ema"], Node)
    assert slots["ema"].optional
    assert isinstance(slots["transforms"], Nodes)
    head = fields_of(toy.Detector)["head"]
    assert isinstance(head, Node)
    assert head.by_name == {"rpn": toy.Rpn, "fcos": toy.Fcos, "timm": toy.Timm}
    assert fields_of(toy.Fcos)["centre_radius"].description == "In strides."


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("epochs", "a whole number, at least 1"),
        ("lr", "a number"),
        ("sides", "a list of whole numbers or null"),
        ("names", "a list of texts"),
        ("tag", "a text or null"),
        ("start", "a path or null"),
        ("device", 'one of "cpu", "cuda"'),
        ("shuffle", "true or false"),
        ("size", "a whole number or a list of 2: a whole number, a whole number"),
        ("transforms", "a list, each item a mapping with type: one of flip, jitter"),
        ("ema", "a mapping of decay, warm or null"),
    ],
)
def test_allowed_in_words(toy, name, words) -> None:
    assert fields_of(toy.Train)[name].allowed == words


def test_bounds_in_words(toy) -> None:
    assert fields_of(toy.Ema)["decay"].allowed == "a number, at least 0, below 1"
    assert fields_of(toy.Fcos)["centre_radius"].allowed == "a number, above 0"
    assert fields_of(toy.Fcos)["norm"].allowed == 'one of "none", "group"'


def test_texts_stand_for_paths_and_enums(toy) -> None:
    slots = fields_of(toy.Train)
    assert check(slots["start"].annotation, "a/b") == Path("a/b")
    assert check(slots["device"].annotation, "cuda") is toy.Device.CUDA


def test_a_choice_of_numbers_is_strict_too() -> None:
    for wrong in (1.0, True, "1"):
        with pytest.raises(ValueError, match=r"not a whole number|Input should be"):
            check(Literal[1, 2], wrong)
    assert check(Literal[1, 2], 2) == 2


def test_plain_is_what_yaml_knows(toy) -> None:
    train = toy.Train(start=Path("a/b"), sides=(1, 2), transforms=(toy.Flip(),), device=toy.Device.CUDA)
    found = plain(train)
    assert found["start"] == "a/b"
    assert found["device"] == "cuda"
    assert found["sides"] == [1, 2]
    assert found["transforms"] == [{"type": "flip", "probability": 0.5}]


def test_a_field_that_no_recipe_can_hold_is_refused() -> None:
    class WithDict(Spec):
        options: dict[str, int]

    class WithMixture(Spec):
        part: int | WithDict = 3

    class One(Spec):
        type: Literal["one"] = "one"

    class Unnamed(Spec):
        part: One | WithDict = One()

    for spec_type in (WithDict, WithMixture, Unnamed):
        with pytest.raises(TypeError, match=spec_type.__name__):
            fields_of(spec_type)
