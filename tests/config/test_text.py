"""Recipes as text and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rcnn.config.spec import plain
from rcnn.config.text import descriptions, diff, flatten, from_yaml, to_yaml
from rcnn.errors import RecipeError

NUMBERS = st.floats(allow_nan=False, allow_infinity=False)


def toys(toy) -> st.SearchStrategy:
    positive = st.floats(0, exclude_min=True, allow_infinity=False)
    head = st.one_of(
        st.builds(toy.Rpn, channels=st.integers(1), thresholds=st.tuples(NUMBERS, NUMBERS)),
        st.builds(toy.Fcos, centre_radius=positive, norm=st.sampled_from(["none", "group"])),
        st.builds(toy.Timm, name=st.text()),
    )
    transform = st.one_of(
        st.builds(toy.Flip, probability=NUMBERS),
        st.builds(toy.Jitter, strengths=st.lists(NUMBERS, max_size=3).map(tuple)),
    )
    train = st.builds(
        toy.Train,
        epochs=st.integers(1),
        lr=NUMBERS,
        ema=st.none() | st.builds(toy.Ema, decay=st.floats(0, 1, exclude_max=True), warm=st.booleans()),
        sides=st.none() | st.lists(st.integers(), max_size=3).map(tuple),
        names=st.lists(st.text(), max_size=3).map(tuple),
        transforms=st.lists(transform, max_size=3).map(tuple),
        note=st.text(),
        tag=st.none() | st.text(),
        start=st.none() | st.sampled_from(["a/b", "1e-4", "none", "with space", "[x"]).map(Path),
        device=st.sampled_from(toy.Device),
        size=st.integers() | st.tuples(st.integers(), st.integers()),
    )
    detector = st.builds(toy.Detector, head=head, plain=st.none() | st.builds(toy.Plain))
    return st.builds(toy.Toy, detector=detector, train=train)


@settings(deadline=None)
@given(st.data())
def test_yaml_reads_back_the_same(toy, data) -> None:
    spec = data.draw(toys(toy))
    text = to_yaml(spec)
    assert from_yaml(text, toy.Toy) == spec
    assert yaml.safe_load(text) == plain(spec)  # and PyYAML, which follows YAML 1.1, reads the same


@settings(deadline=None)
@given(st.data())
def test_flat_text_is_a_command_line(toy, resolved, data) -> None:
    spec = data.draw(toys(toy))
    overrides = [f"{path}={value}" for path, value in flatten(spec).items()]
    assert resolved("default", *overrides).spec == spec


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_the_difference_leads_from_one_to_the_other(toy, data) -> None:
    left, right = data.draw(toys(toy)), data.draw(toys(toy))
    assert diff(left, left) == []
    ours = flatten(left)
    for path, one, other in diff(left, right):
        assert ours.get(path) == one
        if other is None:
            del ours[path]
        else:
            ours[path] = other
    assert ours == flatten(right)


def test_the_yaml_of_a_toy(toy) -> None:
    train = toy.Train(lr=1e-5, transforms=(toy.Flip(), toy.Jitter()), ema=toy.Ema(), tag="none")
    assert to_yaml(toy.Toy(train=train), {"train.epochs": "why"}) == (
        "detector:\n"
        "  head:\n"
        "    type: rpn\n"
        "    channels: 128\n"
        "    thresholds: [0.3, 0.7]\n"
        "  plain: null\n"
        "train:\n"
        "  epochs: 12  # why\n"
        "  warm_epochs: 0\n"
        "  lr: 1.0e-05\n"
        "  ema:\n"
        "    decay: 0.999\n"
        "    warm: false\n"
        "  sides: null\n"
        "  names: []\n"
        "  transforms:\n"
        "    - type: flip\n"
        "      probability: 0.5\n"
        "    - type: jitter\n"
        "      strengths: [0.1, 0.1]\n"
        "  note: ''\n"
        "  tag: 'none'\n"
        "  start: null\n"
        "  device: cpu\n"
        "  shuffle: true\n"
        "  size: 640\n"
    )


def test_flat_lines(toy) -> None:
    flat = flatten(toy.Toy(train=toy.Train(transforms=(toy.Flip(),))))
    assert flat["detector.head.thresholds"] == "[0.3, 0.7]"
    assert flat["train.ema"] == "null"
    assert flat["train.transforms.0.type"] == "flip"
    assert "train.transforms" not in flat


def test_difference_of_variants(toy) -> None:
    found = diff(toy.Toy(), toy.large())
    assert [tuple(difference) for difference in found] == [
        ("detector.head.type", "rpn", "fcos"),
        ("detector.head.channels", "128", None),
        ("detector.head.thresholds", "[0.3, 0.7]", None),
        ("detector.head.centre_radius", None, "2.0"),
        ("detector.head.norm", None, "group"),
    ]


def test_descriptions(toy) -> None:
    assert descriptions(toy.large()) == {"detector.head.centre_radius": "In strides."}


def test_bad_texts_are_reported_whole(toy) -> None:
    with pytest.raises(RecipeError) as caught:
        from_yaml("detector: {head: {type: fcos, x: 1}}\ntrain: {epochs: 0, lr: x}\n", toy.Toy, name="recipe.yaml")
    assert [problem.where for problem in caught.value.problems] == [
        "detector.head.x (recipe.yaml:1)",
        "train.epochs (recipe.yaml:2)",
        "train.lr (recipe.yaml:2)",
    ]
    with pytest.raises(RecipeError, match="not a mapping"):
        from_yaml("3", toy.Toy)
