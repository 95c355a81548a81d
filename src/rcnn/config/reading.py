"""What a given value means to a field, and words for a value that means nothing to it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import yaml

from rcnn.config.document import Text, flow, opened
from rcnn.config.spec import Leaf, check, members, plain
from rcnn.errors import nearest

_LONGEST_SHOWN = 80
_KINDS = {
    bool: "a truth value",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "a mapping",
}


def read(leaf: Leaf, value: Any) -> Any:
    """The value as the field holds it; text of the command line is parsed by the field's type.

    Raises `ValueError` where it does not fit.
    """
    typed = opened(value) if isinstance(value, Text) else value
    try:
        return check(leaf.annotation, _meant(typed, leaf.annotation))
    except ValueError:
        if not isinstance(value, Text):
            raise
        return check(leaf.annotation, str(value))  # a text that looks like something else, as in name=12


def _meant(value: Any, annotation: Any) -> Any:
    """The texts inside a list as what their place wants: `[a, 1]` is two texts for `tuple[str, ...]`."""
    if isinstance(value, list):
        wanted = list(_item_annotations(annotation, len(value)))
        return [_meant(item, kind) for item, kind in zip(value, wanted, strict=True)]
    if not isinstance(value, Text):
        return value
    for candidate in (opened(value), str(value)):
        try:
            check(annotation, candidate)
        except ValueError:
            continue
        return candidate
    return opened(value)


def _item_annotations(annotation: Any, count: int) -> Iterator[Any]:
    tuples = [member for member in members(annotation) if get_origin(member) is tuple]
    kinds: tuple[Any, ...] = get_args(tuples[0]) if tuples else ()
    for index in range(count):
        repeated = kinds[1:] == (Ellipsis,)
        yield kinds[0] if repeated else kinds[index] if index < len(kinds) else Any


def given_text(value: Any) -> str:
    """A given value in one short line, with its kind."""
    if isinstance(value, Text):
        return f'"{_shortened(value)}"'
    value = _by_itself(plain(value))
    try:
        text = _shortened(flow(value))
    except yaml.YAMLError:
        return f"{_shortened(repr(value))} (a {type(value).__name__})"
    kind = next((words for kind, words in _KINDS.items() if isinstance(value, kind)), "")
    quoted = f'"{text}"' if isinstance(value, str) and not text.startswith(('"', "'")) else text
    return f"{quoted} ({kind})" if kind else quoted


def _by_itself(value: Any) -> Any:
    """A value whose texts of the command line are read without knowing the field."""
    if isinstance(value, list):
        return [_by_itself(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _by_itself(item) for key, item in value.items()}
    return opened(value) if isinstance(value, Text) else value


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_SHOWN else text[: _LONGEST_SHOWN - 3] + "..."


def remedy_for(leaf: Leaf, value: Any) -> str:
    """The nearest choice, or the way to write what was probably meant."""
    typed = opened(value) if isinstance(value, Text) else value
    for candidate, words in ((str(typed), "put it in quotes to make it a text"), ([typed], f"write [{value}]")):
        if isinstance(typed, (bool, int, float, str)) and typed != candidate and _fits(leaf.annotation, candidate):
            return words
    if not isinstance(value, str):
        return ""
    if leaf.optional and value.lower() in {"none", "null", "~"}:
        return "for no value write null, without quotes"
    return nearest(value, [choice for choice in _choices(leaf.annotation) if isinstance(choice, str)])


def _fits(annotation: Any, value: Any) -> bool:
    try:
        check(annotation, value)
    except ValueError:
        return False
    return True


def _choices(annotation: Any) -> Iterator[Any]:
    for member in members(annotation):
        if get_origin(member) is Literal:
            yield from get_args(member)
        elif isinstance(member, type) and hasattr(member, "__members__"):
            yield from (choice.value for choice in member)  # type: ignore[attr-defined]
