"""Recipes as text: YAML that reads back the same, flat lines, and the difference of two recipes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard, TypeVar, cast

from rcnn.config.document import flow, load, read_text
from rcnn.config.draft import Draft, Origin, grow
from rcnn.config.spec import Spec, fields_of, plain
from rcnn.errors import Problem, RecipeError

S = TypeVar("S", bound=Spec)


class Difference(NamedTuple):
    """The values of two recipes at one path, as text; None where one of them has no such path."""

    path: str
    left: str | None
    right: str | None


def to_yaml(spec: Spec, comments: Mapping[str, str] | None = None) -> str:
    """The whole recipe, defaults included. `comments` are put behind the values at their paths."""
    return "".join(line + "\n" for line in _block(spec, "", 0, comments or {}))


def from_yaml(text: str, spec_type: type[S], name: str = "recipe") -> S:
    """The recipe that `to_yaml` wrote. Errors: `RecipeError` with every mistake; `name` stands for the text in it."""
    draft = Draft(grow(spec_type), {})
    _fill(draft, load(text, name), name)
    return cast(S, draft.build())


def load_yaml(path: Path, spec_type: type[S]) -> S:
    """The recipe in a file that `to_yaml` wrote."""
    return from_yaml(read_text(path), spec_type, str(path))


def _fill(draft: Draft, data: Any, name: str) -> None:
    if not isinstance(data, Mapping):
        raise RecipeError(Problem(where=name, given="this is not a mapping", allowed="the fields of a recipe"))
    for key, value in data.items():
        line = getattr(data, "lines", {}).get(key)
        draft.set(str(key), value, Origin(name=name, line=line))


def flatten(spec: Spec) -> dict[str, str]:
    """Path and value of every leaf, as text that the command line takes: `train.epochs` -> `12`."""
    return dict(_leaves(spec, ""))


def descriptions(spec: Spec) -> dict[str, str]:
    """What each setting means, by its path, where its field says so."""
    return dict(_described(spec, ""))


def diff(left: Spec, right: Spec) -> list[Difference]:
    """Every path where two recipes differ."""
    ours, theirs = flatten(left), flatten(right)
    paths = [*ours, *(path for path in theirs if path not in ours)]
    differences = [Difference(path, ours.get(path), theirs.get(path)) for path in paths]
    return [difference for difference in differences if difference.left != difference.right]


def _leaves(spec: Spec, above: str) -> Iterator[tuple[str, str]]:
    if _is_empty(spec):
        yield above, "{}"
    for name in fields_of(type(spec)):
        value = getattr(spec, name)
        path = f"{above}.{name}" if above else name
        if isinstance(value, Spec):
            yield from _leaves(value, path)
        elif _is_list_of_specs(value):
            for index, item in enumerate(value):
                yield from _leaves(item, f"{path}.{index}")
        else:
            yield path, flow(plain(value))


def _described(spec: Spec, above: str) -> Iterator[tuple[str, str]]:
    for name, slot in fields_of(type(spec)).items():
        value = getattr(spec, name)
        path = f"{above}.{name}" if above else name
        if isinstance(value, Spec) and not _is_empty(value):
            yield from _described(value, path)
        elif _is_list_of_specs(value):
            for index, item in enumerate(value):
                yield from _described(item, f"{path}.{index}")
        elif slot.description:
            yield path, slot.description


def _is_empty(value: Any) -> bool:
    return isinstance(value, Spec) and not fields_of(type(value))


def _is_list_of_specs(value: Any) -> TypeGuard[tuple[Spec, ...]]:
    return isinstance(value, tuple) and bool(value) and isinstance(value[0], Spec)


def _block(spec: Spec, above: str, depth: int, comments: Mapping[str, str]) -> Iterator[str]:
    indent = "  " * depth
    for name in fields_of(type(spec)):
        value = getattr(spec, name)
        path = f"{above}.{name}" if above else name
        if isinstance(value, Spec) and not _is_empty(value):
            yield f"{indent}{name}:"
            yield from _block(value, path, depth + 1, comments)
        elif _is_list_of_specs(value):
            yield f"{indent}{name}:"
            for index, item in enumerate(value):
                yield from _item(item, f"{path}.{index}", depth + 1, comments)
        else:
            comment = f"  # {comments[path]}" if path in comments else ""
            yield f"{indent}{name}: {flow(plain(value))}{comment}"


def _item(spec: Spec, path: str, depth: int, comments: Mapping[str, str]) -> Iterator[str]:
    """A spec in a list: its first line starts with a dash."""
    indent = "  " * depth
    if _is_empty(spec):
        yield f"{indent}- {{}}"
        return
    first, *others = _block(spec, path, depth + 1, comments)
    yield f"{indent}- {first.lstrip()}"
    yield from others
