"""YAML as recipes use it: the core rules of YAML 1.2, no key twice, and the line of each key kept.

PyYAML follows YAML 1.1, where `1e-4` is a text, `no` is false, `010` is eight and `1:30` is ninety. Here `1e-4` is a
number and the others are what they look like. What is written here reads the same under either version.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml

from rcnn.errors import Problem, RecipeError

_RULES = (
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
)
# Longer ones are texts: Python itself refuses to write or read more than 4300.
_MOST_DIGITS = 1000
_PATTERNS = tuple((name, re.compile(f"^(?:{pattern})$")) for name, pattern, _ in _RULES)


# Far more than a recipe has: lines that refer to each other could stand for more than there is memory.
_MOST_VALUES = 100_000


class Table(dict[Any, Any]):
    """A mapping that knows the line of each of its keys (counted from 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: dict[Any, int] = {}


class Text(str):
    """A value as it was typed on the command line: what it means depends on the field it goes to."""

    __slots__ = ()


def scalar(text: str) -> Any:
    """What an unquoted text means by the core rules: null, a truth value, a number, or the text itself."""
    kind = next((name for name, pattern in _PATTERNS if pattern.match(text)), "str")
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int" and len(text) > _MOST_DIGITS:
        return text
    if kind == "int":
        return int(text, 0) if text[:2] in {"0o", "0x"} else int(text)
    if kind == "float":
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


class _Loader(yaml.SafeLoader):
    """Core rules, no key twice."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  (PyYAML's own name)

    def table(self, node: yaml.Node) -> Table:
        assert isinstance(node, yaml.MappingNode)
        merged = [pair for pair in node.value if pair[0].tag == "tag:yaml.org,2002:merge"]
        own = [pair for pair in node.value if pair not in merged]
        table = Table()
        for key_node, value_node in own:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (Table, list)):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a text", key_node.start_mark)
            if key in table:
                message = f'the key "{key}" was already given on line {table.lines[key]}'
                raise yaml.constructor.ConstructorError(None, None, message, key_node.start_mark)
            table.lines[key] = key_node.start_mark.line + 1
            table[key] = self.construct_object(value_node, deep=True)
        for _, value_node in merged:
            self._merge(table, value_node)
        return table

    def _merge(self, table: Table, node: yaml.Node) -> None:
        """`<<: *other`: the other's keys where the mapping has none of its own."""
        sources = node.value if isinstance(node, yaml.SequenceNode) else [node]
        for source in sources:
            other = self.construct_object(source, deep=True)
            if not isinstance(other, Table):
                raise yaml.constructor.ConstructorError(None, None, "only a mapping can be merged", source.start_mark)
            for key, value in other.items():
                if key not in table:
                    table[key], table.lines[key] = value, other.lines[key]

    def plain(self, node: yaml.Node) -> Any:
        return scalar(str(self.construct_scalar(node)))  # type: ignore[arg-type]


for _name, _pattern, _first in _RULES:
    for _letter in (*_first, "") if _name == "null" else _first:
        _Loader.yaml_implicit_resolvers.setdefault(_letter, []).append(
            (f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"))
        )
    _Loader.add_constructor(f"tag:yaml.org,2002:{_name}", _Loader.plain)
_Loader.yaml_implicit_resolvers["<"] = [("tag:yaml.org,2002:merge", re.compile("^<<$"))]
_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.table)


class _CommandLoader(_Loader):
    """Leaves every unquoted text as it was typed."""

    def plain(self, node: yaml.Node) -> Any:
        return Text(self.construct_scalar(node))  # type: ignore[arg-type]

    def text(self, node: yaml.Node) -> Any:
        assert isinstance(node, yaml.ScalarNode)
        return str(node.value) if node.style in {'"', "'"} else Text(node.value)


for _name in ("null", "bool", "int", "float"):
    _CommandLoader.add_constructor(f"tag:yaml.org,2002:{_name}", _CommandLoader.plain)
_CommandLoader.add_constructor("tag:yaml.org,2002:str", _CommandLoader.text)


def load(text: str, name: str) -> Any:
    """The plain data of a YAML text. Errors: `RecipeError` with `name` and the line of the mistake."""
    try:
        loader = _Loader(text)  # looks at the letters
        node = loader.get_single_node()
        if node is not None and _values_in(node, {}) > _MOST_VALUES:
            given = f"more than {_MOST_VALUES} values, counting each one as often as it is referred to"
            raise RecipeError(Problem(where=name, given=given))
        return None if node is None else loader.construct_document(node)
    except yaml.YAMLError as error:
        raise RecipeError(_syntax_problem(error, name)) from None
    except (RecursionError, ValueError) as error:
        raise RecipeError(Problem(where=name, given=f"this YAML cannot be read ({error})")) from None


def _values_in(node: yaml.Node, counted: dict[int, int]) -> int:
    """What is referred to several times counts as often; what holds itself once (it cannot be made a value)."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in counted:
        counted[id(node)] = 0
        inner = [each for pair in node.value for each in (pair if isinstance(pair, tuple) else (pair,))]
        counted[id(node)] = 1 + sum(_values_in(each, counted) for each in inner)
    return counted[id(node)]


def _syntax_problem(error: yaml.YAMLError, name: str) -> Problem:
    mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
    message = error.problem if isinstance(error, yaml.MarkedYAMLError) else None
    if mark is None:
        return Problem(where=name, given=f"this is not YAML ({' '.join(str(error).split())})")
    where = f"{name}:{mark.line + 1}"
    if isinstance(error, yaml.constructor.ConstructorError):
        return Problem(where=where, given=message or str(error))
    context = f" ({error.context}{_begun(error)})" if isinstance(error, yaml.MarkedYAMLError) and error.context else ""
    return Problem(where=where, given=f"this is not YAML: {message}{context}, at column {mark.column + 1}")


def _begun(error: yaml.MarkedYAMLError) -> str:
    return f" that begins on line {error.context_mark.line + 1}" if error.context_mark else ""


def opened(text: Text) -> Any:
    """What a command-line text looks like by itself: a list or mapping of texts, a quoted text, or a plain value."""
    stripped = text.strip()
    if stripped[:1] in {"[", "{", '"', "'"}:
        try:
            value = yaml.load(stripped, _CommandLoader)
        except yaml.YAMLError:
            return str(text)
        return str(text) if isinstance(value, Text) else value
    if not stripped:
        return str(text)
    return None if stripped.lower() == "none" else scalar(stripped)


def read_text(path: Path) -> str:
    """The text of a file. Errors: `RecipeError` that says why it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        reason = error.strerror or str(error)
        raise RecipeError(Problem(where=str(path), given=f"the file cannot be read ({reason})")) from None
    except UnicodeDecodeError as error:
        problem = Problem(where=str(path), given=f"byte {error.start} is not UTF-8", allowed="a text file in UTF-8")
        raise RecipeError(problem) from None
    except ValueError as error:  # a null or half a letter in its name
        given = f"no file can have the name {str(path)!a} ({type(error).__name__})"
        raise RecipeError(Problem(where=ascii(str(path)), given=given)) from None


def identity_of(path: Path) -> Path:
    """The file that a path leads to; the path itself where that cannot be found out, which reading it will tell."""
    try:
        return path.resolve()
    except (OSError, ValueError, RuntimeError):
        return path


# -------------------------------------------------------------------------------------------------------- writing


class _Dumper(yaml.SafeDumper):
    """Quotes whatever YAML 1.1 or 1.2 would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def float(self, value: float) -> yaml.Node:
        if not math.isfinite(value):
            return self.represent_float(value)
        text = repr(value)
        if "e" in text and "." not in text:
            text = text.replace("e", ".0e")  # YAML 1.1 wants the point
        return self.represent_scalar("tag:yaml.org,2002:float", text)

    def string(self, value: str) -> yaml.Node:
        broken = any(not letter.isprintable() for letter in value)
        if value.lower() == "none":  # the command line reads it as null
            return self.represent_scalar("tag:yaml.org,2002:str", value, style="'")
        return self.represent_scalar("tag:yaml.org,2002:str", value, style='"' if broken else None)


_Dumper.add_representer(float, _Dumper.float)
_Dumper.add_representer(str, _Dumper.string)
for _name, _pattern, _first in _RULES[2:]:
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), list(_first))


def flow(value: Any) -> str:
    """Plain data (None, bool, int, float, str, list, dict) as one line of YAML."""
    text = yaml.dump(
        [value], Dumper=_Dumper, default_flow_style=True, width=math.inf, allow_unicode=True, sort_keys=False
    )  # within a list, so that no document end mark follows a lone text
    return text.strip().removeprefix("[").removesuffix("]")
