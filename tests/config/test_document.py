"""YAML as recipes use it; PyYAML itself is the second opinion on what is written."""

from __future__ import annotations

import math

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rcnn.config.document import Text, flow, load, opened, read_text, scalar
from rcnn.errors import RecipeError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        (".5", 0.5),
        ("1.", 1.0),
        ("-3", -3),
        ("010", 10),
        ("0x10", 16),
        ("0o17", 15),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        (".inf", math.inf),
        # what YAML 1.1 would turn into something else stays a text
        ("no", "no"),
        ("on", "on"),
        ("1:30", "1:30"),
        ("2020-01-01", "2020-01-01"),
        ("1_000", "1_000"),
        ("none", "none"),
        ("1e", "1e"),
    ],
)
def test_scalars_follow_the_core_rules(text, value) -> None:
    found = load(f"key: {text}", "f")["key"]
    assert found == value
    assert type(found) is type(value)
    assert scalar(text) == value


def test_quotes_make_a_text() -> None:
    assert load("a: '1'\nb: \"null\"", "f") == {"a": "1", "b": "null"}


def test_lines_are_kept() -> None:
    table = load("a: 1\n\nb:\n  c: 2\n", "f")
    assert table.lines == {"a": 1, "b": 3}
    assert table["b"].lines == {"c": 4}


def test_a_key_given_twice_is_an_error_with_both_lines() -> None:
    with pytest.raises(RecipeError, match=r'f:3: the key "a" was already given on line 1'):
        load("a: 1\nb: 2\na: 3\n", "f")


def test_a_syntax_error_has_its_line() -> None:
    with pytest.raises(RecipeError, match=r"f:3: this is not YAML: .*flow sequence that begins on line 2"):
        load("a: 1\nb: [1, 2\nc: 3\n", "f")


@pytest.mark.parametrize("text", ["a: !!python/object/apply:os.system [ls]", "a: \x00", "? [1]\n: 2", "a: *nobody"])
def test_other_bad_yaml_is_our_error(text) -> None:
    with pytest.raises(RecipeError, match="f"):
        load(text, "f")


def test_merge_keys_yield_to_own_keys() -> None:
    table = load("a: &a {x: 1, y: 2}\nb:\n  <<: *a\n  y: 3\n", "f")
    assert table["b"] == {"x": 1, "y": 3}


def test_unreadable_files(tmp_path) -> None:
    with pytest.raises(RecipeError, match=r"gone\.yaml: the file cannot be read \(No such file"):
        read_text(tmp_path / "gone.yaml")
    with pytest.raises(RecipeError, match="cannot be read"):
        read_text(tmp_path)
    (tmp_path / "latin").write_bytes(b"abc\xe9")
    with pytest.raises(RecipeError, match="byte 3 is not UTF-8"):
        read_text(tmp_path / "latin")


def test_command_line_text_opens_to_texts() -> None:
    assert opened(Text("[1, 'b']")) == ["1", "b"]
    assert isinstance(opened(Text("[1, 'b']"))[0], Text)
    assert not isinstance(opened(Text("[1, 'b']"))[1], Text)
    assert opened(Text("{a: 1}")) == {"a": "1"}
    assert opened(Text("none")) is None
    assert opened(Text("None")) is None
    assert opened(Text("'none'")) == "none"
    assert opened(Text("1e-4")) == 1e-4
    assert opened(Text("[1, 2")) == "[1, 2"
    assert opened(Text("a: b # c")) == "a: b # c"
    assert opened(Text("")) == ""


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(values)
def test_what_is_written_reads_back_under_yaml_1_1_and_1_2(value) -> None:
    line = flow(value)
    assert "\n" not in line
    assert load(f"key: {line}", "f")["key"] == value
    assert yaml.safe_load(f"key: {line}")["key"] == value


@settings(deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_stay_floats(value) -> None:
    for loaded in (load(flow(value), "f"), yaml.safe_load(flow(value)), opened(Text(flow(value)))):
        assert type(loaded) is float
        assert loaded == value
