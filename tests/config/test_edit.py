"""The rules of recipes: order, variants, merging, absence, types, and every problem at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rcnn.config.edit import edit
from rcnn.errors import RecipeError

# ------------------------------------------------------------------------------------------------------------- sources


def test_a_name_is_a_recipe(toy, resolved) -> None:
    assert resolved("large").spec == toy.large()


def test_a_spec_is_a_recipe(toy, resolved) -> None:
    assert resolved(toy.large()).spec == toy.large()


def test_order_is_base_file_command_line(resolved, write) -> None:
    path = write("my.yaml", "base: small\nset: {train.epochs: 5, train.lr: 0.1}\n")
    found = resolved(path, "train.lr=0.5").spec
    assert (found.train.epochs, found.train.lr) == (5, 0.5)
    assert found.train.ema is not None  # from the base


def test_the_last_of_the_command_line_wins(resolved) -> None:
    assert resolved("small", "train.epochs=4", "train.epochs=7").spec.train.epochs == 7


def test_bases_apply_in_order_and_relative_to_their_file(resolved, write) -> None:
    write("parts/a.yaml", "base: small\nset: {train.epochs: 5, train.lr: 0.1}\n")
    write("parts/b.yaml", "set: {train.lr: 0.2, train.note: from b}\n")
    path = write("my.yaml", "base: [parts/a.yaml, parts/b.yaml]\nset: {train.tag: mine}\n")
    train = resolved(path).spec.train
    assert (train.epochs, train.lr, train.note, train.tag) == (5, 0.2, "from b", "mine")


def test_two_bases_may_share_one(resolved, write) -> None:
    write("a.yaml", "base: small\nset: {train.lr: 0.1}\n")
    write("b.yaml", "base: small\nset: {train.note: b}\n")
    train = resolved(write("my.yaml", "base: [a.yaml, b.yaml]\n")).spec.train
    assert (train.lr, train.note, train.epochs) == (0.1, "b", 3)


def test_a_second_whole_recipe_is_an_error(resolved, write, problems_in) -> None:
    (problem,) = problems_in(resolved, write("my.yaml", "base: [small, large]\n"))
    assert '"large" is a whole recipe and would undo small' in problem
    assert "my.yaml:1: base" in problem


def test_a_whole_recipe_file_is_a_source_and_a_base(toy, resolved, write) -> None:
    write("recipe.yaml", "detector: {head: {type: fcos, centre_radius: 2.0}}\ntrain: {epochs: 4}\n")
    found = resolved(write("my.yaml", "base: recipe.yaml\nset: {train.lr: 0.1}\n")).spec
    assert found == toy.Toy(detector=toy.large().detector, train=toy.Train(epochs=4, lr=0.1))


def test_circles_are_found(resolved, write, problems_in) -> None:
    write("a.yaml", "base: b.yaml\n")
    write("b.yaml", "base: c.yaml\n")
    (problem,) = problems_in(resolved, write("c.yaml", "base: a.yaml\n"))
    assert "c.yaml -> a.yaml -> b.yaml -> c.yaml" in problem


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base: smal\n", ['there is no recipe "smal"', "one of small, large, default", 'did you mean "small"?', ":1:"]),
        ("base: gone.yaml\n", ["gone.yaml", "No such file"]),
        ("base: other.py\n", ["never executed"]),
        ("base: 3\n", ["base", "3 (a whole number)"]),
        ("base: []\n", ["does not say which recipe"]),
        ("set: {train.epochs: 3}\n", ["does not say which recipe", "small, large"]),
        ("", ["the file is empty"]),
        ("- a\n", ["[a] (a list)", "base, set, remove"]),
        ("bas: small\n", ['unknown key "bas"', 'did you mean "base"?']),
        ("base: small\nset: 3\n", [":2: set", "a mapping of path: value"]),
        ("base: small\nremove: [3]\n", [":2: remove", "a list of paths"]),
        ("base: small\ntrain: {epochs: 3}\n", [":2:", 'unknown key "train"', "put it under set"]),
        ("base: small\nset:\n  train.epochs: [1\n", ["not YAML"]),
        ("base: small\nset:\n  train.epochs: 1\n  train.epochs: 2\n", [":4:", "already given on line 3"]),
        ("base: small\nset:\n  train.epochs: x\n", ["train.epochs (", "my.yaml:3)", '"x" (a text)', "at least 1"]),
        ("base: small\nset: {train.ema.decay: 0.9}\nremove: [train.ema]\n", ['sets this and removes "train.ema"']),
    ],
)
def test_a_bad_file_is_explained(resolved, write, problems_in, text, words) -> None:
    (problem,) = problems_in(resolved, write("my.yaml", text))
    for word in words:
        assert word in problem


def test_an_unknown_name_is_explained(resolved, problems_in) -> None:
    (problem,) = problems_in(resolved, "smal")
    assert problem == (
        'smal: there is no recipe "smal"; allowed: a .yaml file or one of small, large, default; did you mean "small"?'
    )


# ------------------------------------------------------------------------------------------------- variants and merging


def test_naming_another_variant_replaces_the_node_whole(toy, resolved, write) -> None:
    path = write("my.yaml", "base: large\nset:\n  detector.head: {type: rpn}\n")
    assert resolved(path).spec.detector.head == toy.Rpn()  # of its own defaults: 256, not the field's 128
    back = resolved(path, "detector.head.type=fcos").spec.detector.head
    assert back == toy.Fcos()  # and the 2.0 of the base does not come back


def test_a_mapping_of_the_same_variant_or_without_type_merges(toy, resolved, write) -> None:
    path = write("my.yaml", "base: large\nset:\n  detector.head: {norm: none}\n")
    assert resolved(path).spec.detector.head == toy.Fcos(centre_radius=2.0, norm="none")
    found = resolved(path, "detector.head={type: fcos}", "detector.head.type=fcos").spec
    assert found.detector.head == toy.Fcos(centre_radius=2.0, norm="none")


def test_type_counts_wherever_it_stands_in_the_mapping(toy, resolved) -> None:
    found = resolved("default", "detector.head={centre_radius: 3, type: fcos}").spec
    assert found.detector.head == toy.Fcos(centre_radius=3.0)


def test_mappings_merge_all_the_way_down(toy, resolved, write) -> None:
    path = write("my.yaml", "base: large\nset:\n  detector:\n    head: {norm: none}\n  train: {epochs: 4}\n")
    found = resolved(path).spec
    assert found.detector.head == toy.Fcos(centre_radius=2.0, norm="none")
    assert found.train == toy.Train(epochs=4)


def test_an_absent_node_appears_when_something_in_it_is_set(toy, resolved) -> None:
    assert resolved("default", "train.ema.decay=0.9").spec.train.ema == toy.Ema(decay=0.9)
    assert resolved("default", "train.ema={}").spec.train.ema == toy.Ema()
    assert resolved("default", "detector.plain={}").spec.detector.plain == toy.Plain()


def test_remove_only_where_absence_is_allowed(resolved, write, problems_in) -> None:
    assert resolved(write("a.yaml", "base: small\nremove: [train.ema]\n")).spec.train.ema is None
    problems = problems_in(resolved, write("b.yaml", "base: small\nremove: [train.epochs, detector.head, train.x]\n"))
    assert len(problems) == 3
    assert problems[0].startswith("train.epochs")
    assert "cannot be removed" in problems[0]
    assert "cannot be removed" in problems[1]
    assert 'has no "x"' in problems[2]


def test_lists_of_specs(toy, resolved) -> None:
    two = ("train.transforms=[{type: flip}, {type: jitter, strengths: [0.5]}]",)
    found = resolved("default", *two).spec.train.transforms
    assert found == (toy.Flip(), toy.Jitter(strengths=(0.5,)))
    found = resolved("default", *two, "train.transforms.0.probability=1").spec.train.transforms
    assert found[0] == toy.Flip(probability=1.0)
    found = resolved("default", *two, "train.transforms.1.type=flip").spec.train.transforms
    assert found == (toy.Flip(), toy.Flip())
    found = resolved("default", *two, "train.transforms.2={type: flip, probability: 0.1}").spec.train.transforms
    assert found[2] == toy.Flip(probability=0.1)
    assert resolved("default", *two, "train.transforms=[]").spec.train.transforms == ()


# ------------------------------------------------------------------------------------------------------- types of text


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.epochs=12", 12),
        ("train.lr=1e-4", 1e-4),
        ("train.lr=1", 1.0),
        ("train.sides=[320,480]", (320, 480)),
        ("train.sides=[320, 480]", (320, 480)),
        ("train.sides=none", None),
        ("train.sides=null", None),
        ("train.names=[cat, 1, none, 1e-4, 'a b']", ("cat", "1", "none", "1e-4", "a b")),
        ("train.note=a: b, [c", "a: b, [c"),
        ("train.note=12", "12"),
        ("train.note=none", "none"),
        ("train.note=a=b", "a=b"),
        ("train.note=", ""),
        ("train.note='x'", "x"),
        ("train.tag=none", None),
        ("train.tag='none'", "none"),
        ("train.tag=true", "true"),
        ("train.start=runs/a", Path("runs/a")),
        ("train.start=12", Path("12")),
        ("train.shuffle=false", False),
        ("train.shuffle=True", True),
        ("train.size=3", 3),
        ("train.size=[3,4]", (3, 4)),
        ("detector.head={type: fcos, norm: none}", None),
    ],
)
def test_text_is_parsed_by_the_type_of_the_field(resolved, override, value) -> None:
    found = resolved("default", override).spec
    if override.startswith("detector"):
        assert found.detector.head.norm == "none"
    else:
        actual = getattr(found.train, override.partition("=")[0].removeprefix("train."))
        assert actual == value
        assert type(actual) is type(value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.epochs=12.0", ["train.epochs (command line)", '"12.0"', "a whole number, at least 1"]),
        ("train.epochs=0", ['"0"', "a whole number, at least 1"]),
        ("train.epochs=none", ["a whole number"]),
        ("train.epochs=", ["a whole number"]),
        ("train.shuffle=yes", ["true or false"]),
        ("train.lr=nan", ["a number"]),
        ("train.lr=.nan", ["a number"]),
        ("train.sides=320", ["a list of whole numbers", "write [320]"]),
        ("train.sides=[320,a]", ["a list of whole numbers"]),
        ("train.device=cdua", ['one of "cpu", "cuda"', 'did you mean "cuda"?']),
        ("detector.head=fcos", ["write detector.head.type=fcos"]),
        ("detector.head=none", ["a mapping with type: one of fcos, rpn, timm"]),
        ("detector.head.type=fcoss", ["detector.head.type", "one of fcos, rpn, timm", 'did you mean "fcos"?']),
        ("detector.head={type: fcoss, x: 3}", ["detector.head.type", 'did you mean "fcos"?']),
        ("detector.head={type: fcos, centre_raduis: 3}", ["detector.head.centre_raduis", 'mean "centre_radius"?']),
        ("detector.head.centre_radius=3", ["belongs to the variant fcos: give detector.head.type=fcos before it"]),
        ("detector.head.type=timm", ["detector.head.name", "missing", "a text"]),
        ("train.epoch=3", ["train.epoch (", 'has no "epoch"', "epochs, warm_epochs", 'did you mean "epochs"?']),
        ("epochs=3", ["a recipe has no", "did you mean train.epochs?"]),
        ("train.epochs.x=3", ['this is a value and has no "x"']),
        ("train..epochs=3", ['has no ""']),
        ("train.transforms.x.type=flip", ['"x" is not an index']),
        ("train.transforms.3.type=flip", ["an index from 0 to 0"]),
        ("train.transforms=[{probability: 1}]", ["train.transforms.0", "which variant"]),
        ("train.transforms.0.probability=1", ["name a variant first"]),
        ("train.transforms=3", ["a list, each item"]),
        ("train.ema=none", []),
        ("train.epochs", ["path=value"]),
        ("=3", ["the path before = is missing"]),
        ("train.warm_epochs=99", ["train: warm_epochs (99) exceeds epochs (12)"]),
        ("detector.nms_thr=0.5", ["nms_thr", "another system", "here it is detector.nms_iou"]),
        ("model.rpn.nms_thr=0.5", ["here it is detector.nms_iou"]),
        ("detector.head={type: fcos, nms_thr: 3}", ["here it is detector.nms_iou"]),
    ],
)
def test_a_bad_override_is_explained(resolved, problems_in, override, words) -> None:
    if not words:
        resolved("default", override)
        return
    (problem,) = problems_in(resolved, "default", override)
    for word in words:
        assert word in problem


def test_files_are_strict_about_types(resolved, write, problems_in) -> None:
    text = "base: small\nset:\n  train.epochs: '12'\n  train.lr: '1e-4'\n  train.names: [1]\n  train.tag: 3\n"
    problems = problems_in(resolved, write("my.yaml", text + "  train.ema: none\n"))
    assert [problem.partition(" ")[0] for problem in problems] == [
        "train.epochs", "train.lr", "train.names", "train.tag", "train.ema",
    ]  # fmt: skip
    assert "put it in quotes" in problems[3]
    assert resolved(write("ok.yaml", "base: small\nset: {train.lr: 1e-4}\n")).spec.train.lr == 1e-4


def test_all_problems_of_all_places_are_reported_together(resolved, write, problems_in) -> None:
    write("base.yaml", "base: small\nset: {train.epochs: x}\nremove: [train.lr]\n")
    path = write("my.yaml", "base: base.yaml\nsett: {}\nset:\n  detector.head: {type: fcos, centre: 2, norm: batch}\n")
    problems = problems_in(resolved, path, "train.shuffle=3", "nonsense", "train.epochs=2")
    wheres = [problem.partition(":")[0].partition(" ")[0] for problem in problems]
    assert sorted(wheres[1:]) == sorted(
        ["train.lr", "train.epochs", "detector.head.centre", "detector.head.norm", "train.shuffle", "nonsense"]
    )
    assert 'unknown key "sett"' in problems[0]


def test_missing_values_and_wrong_ones_are_reported_together(resolved, problems_in) -> None:
    assert len(problems_in(resolved, "default", "detector.head.type=timm", "train.epochs=x")) == 2


# ------------------------------------------------------------------------------------------------------------- origins


def test_origins(resolved, write) -> None:
    path = write("my.yaml", "base: large\nset:\n  train.epochs: 5\n  detector.head.norm: none\n")
    found = resolved(path, "train.lr=0.5", "train.ema={decay: 0.9}", "train.transforms=[{type: flip}]")
    assert found.changes == {
        "detector.head.type": "large",
        "detector.head.centre_radius": "large",
        "detector.head.norm": str(path),
        "train.epochs": str(path),
        "train.lr": "command line",
        "train.ema.decay": "command line",
        "train.ema.warm": "command line",  # it is there at all by the command line
        "train.transforms.0.type": "command line",
    }
    assert found.origins["train.note"] == "default"
    assert found.origins["train.transforms.0.probability"] == "default"


def test_a_value_of_a_recipe_that_equals_the_default_is_a_default(resolved) -> None:
    assert resolved("default").changes == {}
    assert resolved("small").changes == {
        "train.epochs": "small",
        "train.ema.decay": "small",
        "train.ema.warm": "small",
    }


def test_nothing_stays_of_the_origins_of_a_replaced_node(resolved) -> None:
    assert resolved("large", "detector.head.type=rpn").changes == {"detector.head.type": "command line"}


# -------------------------------------------------------------------------------------------------------------- Python


def test_edit_in_python(toy) -> None:
    before = toy.small()
    after = edit(
        before,
        {"train.epochs": 12, "detector.head": toy.Fcos(norm="none"), "train.start": Path("a"), "train.sides": [1, 2]},
        remove=["train.ema"],
    )
    assert after.train == toy.Train(epochs=12, start=Path("a"), sides=(1, 2))
    assert after.detector.head == toy.Fcos(norm="none")
    assert before == toy.small()


def test_edit_reports_all_problems(toy) -> None:
    with pytest.raises(RecipeError) as caught:
        edit(toy.small(), {"train.epochs": "12", "train.lr": object(), "detector.head": toy.Ema(), "x": 1})
    assert [problem.where for problem in caught.value.problems] == ["train.epochs", "train.lr", "detector.head", "x"]


EDITS = st.one_of(
    st.tuples(st.just("train.epochs"), st.integers(1, 99)),
    st.tuples(st.just("train.lr"), st.floats(0, 1)),
    st.tuples(st.just("train.note"), st.text(max_size=5)),
    st.tuples(st.just("train.sides"), st.none() | st.lists(st.integers(), max_size=3).map(tuple)),
)


@settings(deadline=None)
@given(st.lists(EDITS, max_size=12))
def test_the_last_writer_wins(toy, edits) -> None:
    one_by_one = toy.Toy()
    for path, value in edits:
        one_by_one = edit(one_by_one, {path: value})
    assert one_by_one.train == toy.Train(**{path.removeprefix("train."): value for path, value in edits})
    assert edit(toy.Toy(), dict(edits)) == one_by_one


PATHS = st.one_of(
    st.sampled_from(["detector", "detector.head", "detector.head.type", "detector.head.norm", "detector.plain"]),
    st.sampled_from(["train", "train.ema", "train.ema.decay", "train.sides", "train.size", "train.start", "train.x"]),
    st.sampled_from(["train.transforms", "train.transforms.0", "train.transforms.0.type", ".", "x"]),
)
PIECES = st.sampled_from([*"[]{}:,'\"#&*!|> ", "type", "fcos", "flip", "none", "1e-4", "3", "decay", ": ", "- "])
TEXTS = st.lists(PIECES, max_size=8).map("".join)
DATA = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "decay", "norm", ""]), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(deadline=None)
@given(st.lists(st.builds("{}={}".format, PATHS, TEXTS), max_size=4))
def test_whatever_is_typed_is_a_recipe_or_our_error(toy, resolved, overrides) -> None:
    try:
        assert isinstance(resolved("large", *overrides).spec, toy.Toy)
    except RecipeError as error:
        assert error.problems


@settings(deadline=None)
@given(st.dictionaries(PATHS, DATA, max_size=4), st.lists(PATHS, max_size=2))
def test_whatever_is_given_in_python_is_a_recipe_or_our_error(toy, changes, remove) -> None:
    try:
        assert isinstance(edit(toy.large(), changes, remove=remove), toy.Toy)
    except RecipeError as error:
        assert error.problems


@settings(deadline=None)
@given(TEXTS)
def test_whatever_is_in_a_file_is_a_recipe_or_our_error(toy, resolved, tmp_path_factory, text) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_text(f"base: small\nset:\n  train: {text}\n")
    try:
        assert isinstance(resolved(path).spec, toy.Toy)
    except RecipeError as error:
        assert error.problems
