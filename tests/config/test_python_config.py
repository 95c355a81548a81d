"""Python configs read as data: the idioms, the rules of merging, and what is refused.

The rules are mmengine's: of the 135 configs that `tests/recipes/test_mmdetection_configs.py` reads, mmengine 0.10.7
gave the same values, each of them (run once; it is no dependency).
"""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from rcnn.config.python_config import PythonConfig, read_python_config
from rcnn.config.refusal import MAX_BYTES
from rcnn.errors import RecipeError


def read(folder: Path, **files: str) -> PythonConfig:
    """Writes `NAME.py` for each text, and reads `main.py`."""
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    return read_python_config(folder / "main.py")


def value(folder: Path, expression: str) -> object:
    return read(folder, main=f"x = 3\nitems = [1, 2, 3]\ntable = dict(a=dict(b=5))\nresult = {expression}\n").root[
        "result"
    ]


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("None", None),
        ("-1.5e-3", -0.0015),
        ("1.0 / 4", 0.25),
        ("0.02 * 4", 0.08),
        ("2 ** 3 // 5 % 2", 1),
        ("x + 1", 4),
        ("'a/' + 'b'", "a/b"),
        ("f'{x}/b'", "3/b"),
        ("items + [4]", [1, 2, 3, 4]),
        ("[*items, *items]", [1, 2, 3, 1, 2, 3]),
        ("[0] * x", [0, 0, 0]),
        ("items[-1]", 3),
        ("items[1:]", [2, 3]),
        ("table['a']['b']", 5),
        ("table.a.b", 5),
        ("dict(**table, c=1)", {"a": {"b": 5}, "c": 1}),
        ("{'a': 1, **table}", {"a": {"b": 5}}),
        ("dict({'a': 1}, b=2)", {"a": 1, "b": 2}),
        ("list((1, 2))", [1, 2]),
        ("tuple()", []),
        ("[dict(scale=i) for i in items]", [{"scale": 1}, {"scale": 2}, {"scale": 3}]),
        ("not True", False),
        ("'{{ fileBasenameNoExtension }}/x'", "main/x"),
        ("{{ fileBasename }}", "main.py"),
    ],
)
def test_a_value_is_what_python_makes_of_it(tmp_path: Path, expression: str, expected: object) -> None:
    assert value(tmp_path, expression) == expected


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("open('x')", "a call of open"),
        ("__import__('os').system('true')", "a call of"),
        ("lambda: 1", "a function"),
        ("1 if x else 2", "a condition"),
        ("x > 2", "a comparison"),
        ("{1, 2}", "a set"),
        ("b'x'", "a literal of type bytes"),
        ("1j", "a literal of type complex"),
        ("unknown", 'the name "unknown" is not assigned'),
        ("table.c", 'there is no "c"'),
        ("items[7]", "there is no 7"),
        ("items.append(1)", "a call of items.append"),
        ("x.real", '"real" of 3'),
        ("1 / 0", "division by zero"),
        ("9 ** 999999", "arithmetic that is not done here"),
        ("2 ** 63", "more than 63 bits"),
        ("'a' * 1000000000", "arithmetic with 'a'"),
        ("[0] * 1000000000", "makes more than"),
        ("'{{ $HOME:x }}'", "environment"),
        ("_base_.x", "the file has none"),
        ("[i for i in items if i]", "a comprehension"),
        ("[f(i) for i in items]", "a call of f,"),
        ("items.x" + ".x" * 900 + "()", "a call of items.x.x"),
        ("[] * 2 ** 62", "makes more than"),
        ("'a {{ items }}'", "a list within a text"),
        ("f'{table}'", "a dict within a text"),
        ("-" * 150 + "1", "nested deeper"),
    ],
)
def test_what_is_not_data_is_refused_with_its_line(tmp_path: Path, expression: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        value(tmp_path, expression)
    (problem,) = caught.value.problems
    assert said in problem.given
    assert problem.where == f"{tmp_path / 'main.py'}:4"


def test_all_problems_are_told_at_once_and_none_twice(tmp_path: Path) -> None:
    text = (
        "import os\ndef f(): pass\nfor i in []: pass\nbad = f()\nuses_it = dict(a=bad)\nclass A: pass\nn = 1\nn.x = 2\n"
    )
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, main=text)
    lines = [int(problem.where.rsplit(":", 1)[1]) for problem in caught.value.problems]
    assert lines == [1, 2, 3, 4, 6, 8]  # line 5 only repeats line 4


def test_dicts_merge_lists_are_replaced_and_delete_replaces_whole(tmp_path: Path) -> None:
    base = "a = dict(x=1, y=dict(z=2, w=[1, 2]))\nb = dict(type='A', p=1)\nc = 5\n"
    main = (
        "_base_ = 'base.py'\na = dict(y=dict(w=[3]))\nb = dict(_delete_=True, q=2)\nd = dict(e=dict(_delete_=True))\n"
    )
    config = read(tmp_path, base=base, main=main)
    assert config.root == {
        "a": {"x": 1, "y": {"z": 2, "w": [3]}},
        "b": {"q": 2},
        "c": 5,
        "d": {"e": {}},
    }
    y = config.root["a"]["y"]
    assert str(y.places["z"]) == f"{tmp_path / 'base.py'}:1"
    assert str(y.places["w"]) == f"{tmp_path / 'main.py'}:2"


def test_bases_are_read_in_their_folders_and_can_be_referred_to_and_changed(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "one.py").write_text("_base_ = '../two.py'\nlr = 0.1\n")
    (tmp_path / "three.py").write_text("steps = [dict(milestones=[8, 11]), dict()]\n")
    config = read(
        tmp_path,
        two="root = 'data/'\n",
        main=(
            "_base_ = ['deep/one.py', './three.py']\n"
            "file = _base_.root + 'x.json'\n"
            "same = {{ _base_.lr }}\n"
            "text = 'at {{_base_.lr}}'\n"
            "_base_.steps[0].milestones = [16, 22]\n"
        ),
    )
    assert config.root["file"] == "data/x.json"
    assert config.root["same"] == 0.1
    assert config.root["text"] == "at 0.1"
    assert config.root["steps"] == [{"milestones": [16, 22]}, {}]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"main": "_base_ = 'main.py'"}, "main.py -> main.py"),
        ({"main": "_base_ = 'a.py'", "a": "_base_ = 'b.py'", "b": "_base_ = 'a.py'"}, "a.py -> b.py -> a.py"),
        ({"main": "_base_ = 'nowhere.py'"}, "cannot be read"),
        ({"main": "_base_ = 'mmdet::x.py'"}, "mmdet::x.py"),
        ({"main": "_base_ = 3"}, "3"),
        ({"main": "_base_ = ['a.py', 'b.py']", "a": "x = 1", "b": "x = 2"}, "x in several bases"),
        ({"main": "_base_ = 'a.py'\nx = dict(y=1)", "a": "x = [1]"}, "a dict, where the base has a list"),
        ({"main": "x = (1,"}, "this is not Python"),
        ({"main": "x = dict()\nx.y = x"}, "a value that holds itself"),
        ({"main": "a = [1]\n" + "".join("a = [a, a, a, a, a, a, a, a]\n" for _ in range(12))}, "more values"),
        # Texts that double: ten letters, forty times; a long text, in parts.
        ({"main": "x = 'aaaaaaaaaa'\n" + "x = f'{x}{x}'\n" * 40}, "more than 1,000,000 values"),
        ({"main": "x = 'aaaaaaaaaa'\n" + "x = '{{ x }}{{ x }}'\n" * 40}, "more than 1,000,000 values"),
        ({"main": f"x = '{'a' * 99_000}'\ny = [{'x[1:],' * 9_000}]"}, "more than 1,000,000 values"),
        # Each value is 60 floors deep, the last of them the one before.
        ({"main": "a = 1\n" + f"a = {'[' * 60}a{']' * 60}\n" * 99}, "nested deeper"),
        ({"main": "_base_ = '~nobody-of-that-name/x.py'"}, "cannot be read"),
        ({"main": "a = 1\0"}, "null bytes"),
        ({"main": "#" * (MAX_BYTES + 1)}, "bytes"),
        ({"main": "x = " + "(" * 5000}, "this is not Python"),
        ({"main": "x = " + "[" * 90 + "]" * 90 + "\n" + "y = [" * 1}, "this is not Python"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, files: dict[str, str], said: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(said)):
        read(tmp_path, **files)


def test_a_chain_of_bases_without_end_is_refused(tmp_path: Path) -> None:
    texts = {f"f{i}": f"_base_ = ['f{i + 1}.py']" for i in range(40)}
    with pytest.raises(RecipeError, match="files above each other"):
        read(tmp_path, **texts, main="_base_ = 'f0.py'")


def test_bases_that_double_on_each_floor_are_refused(tmp_path: Path) -> None:
    texts = {f"f{i}": f"_base_ = ['f{i + 1}.py', './f{i + 1}.py']" for i in range(18)}
    with pytest.raises(RecipeError):
        read(tmp_path, **texts, f18="", main="_base_ = 'f0.py'")


SEED_TEXT = """
_base_ = ['base.py']
model = dict(type='FasterRCNN', backbone=dict(depth=50, strides=(1, 2), norm_cfg=dict(type='BN', requires_grad=True)),
    head=dict(_delete_=True, losses=[dict(a=1.0 / 9), dict(b=-1)], scale=[8] * 3))
lr = 0.02 * 4
scales = [(1333, 640), (1333, 800)]
pipe = [dict(type='Resize', scale=s) for s in scales]
text = f'{lr}' + 'x' + '{{ fileBasename }}'
other = {{ _base_.lr0 }}
_base_.table.x = pipe[0]
"""
PIECES = (
    *(
        "_base_",
        "dict(",
        "**",
        "*",
        "(",
        ")",
        "[",
        "]",
        "{{",
        "}}",
        "lambda: ",
        "import os\n",
        "9**9**9",
        "\0",
        "'",
        "\\",
    ),
    *("exec('1/0')", "__import__('os').abort()", "\n", "   ", "...", "@", ":=", "10**", "\u2028", "\ud7ff", "#"),
    *("if 1:\n ", "await ", "-", "not "),
)


def test_damaged_configs_end_in_a_config_or_in_our_error(tmp_path: Path) -> None:
    """200 seeded mutations: cut, doubled, swapped, with foreign pieces. A call of `abort` would end this process."""
    (tmp_path / "base.py").write_text("lr0 = 1\ntable = dict(x=1)\n")
    generator = random.Random(0)
    refused = 0
    for _ in range(200):
        text = SEED_TEXT
        for _ in range(generator.randint(1, 4)):
            start, end = sorted(generator.randrange(len(text) + 1) for _ in range(2))
            match generator.randrange(4):
                case 0:
                    text = text[:start] + text[min(end, start + 30) :]
                case 1:
                    text = text[:start] + generator.choice(PIECES) + text[start:]
                case 2:
                    text = text[:end] + text[start:end] + text[end:]
                case _:
                    text = text[:start] + generator.choice(PIECES) * generator.randint(1, 300) + text[end:]
        (tmp_path / "main.py").write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            read_python_config(tmp_path / "main.py")
        except RecipeError as error:
            refused += 1
            assert all(problem.where for problem in error.problems)
    assert refused > 100
