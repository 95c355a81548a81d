"""Specs: the frozen, typed nodes of a recipe, and what may stand in each of their fields.

A field of a spec is one of three things, and nothing else:

    Leaf    a value: bool, int, float, str, Path, an enum, a Literal, a tuple of those, a union of those
    Node    another spec, or one of several variants, told apart by their field `type: Literal["name"] = "name"`
    Nodes   a tuple of any length of the above

Each may be optional (`| None`). Lists and mappings are not fields: a spec is hashable and nobody can change it.
"""

from __future__ import annotations

import enum
import functools
import json
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Union, cast, get_args, get_origin

import annotated_types
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, model_validator
from pydantic.fields import FieldInfo

from rcnn.errors import Problem, RecipeError

# The field that names a variant.
TYPE = "type"


class _SpecType(type(BaseModel)):
    """Turns a mistake in `SomeSpec(...)` into the error that a patch file with the same mistake raises."""

    if not TYPE_CHECKING:  # type checkers shall see the fields, not this

        def __call__(cls, *args, **values):
            try:
                return super().__call__(*args, **values)
            except ValidationError as error:
                raise RecipeError(problems_of(error, cls.__name__)) from None


class Spec(BaseModel, metaclass=_SpecType):
    """A frozen record of choices. A wrong type or an unknown name is an error; an int is a float, a list a tuple.

    What can be derived is not a field. A string under a field documents it.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        validate_default=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    @model_validator(mode="before")
    @classmethod
    def _lists_are_tuples(cls, values: Any) -> Any:
        return {name: _tuples(value) for name, value in values.items()} if isinstance(values, dict) else values


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def problems_of(error: ValidationError, where: str) -> Iterator[Problem]:
    """Pydantic's findings as problems; `where` is the path of the spec."""
    for found in error.errors(include_url=False):
        path = ".".join([where, *(str(part) for part in found["loc"])]) if where else ".".join(map(str, found["loc"]))
        message = found["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
        given = "" if found["type"] in {"value_error", "assertion_error", "missing"} else f"{found['input']!r}: "
        yield Problem(where=path or "recipe", given=f"{given}{message}")


# ------------------------------------------------------------------------------------------- what stands in a field


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """A value. `annotation` carries the bounds as well (`Annotated[int, Ge(1)]`)."""

    annotation: Any
    optional: bool
    description: str

    @property
    def allowed(self) -> str:
        return allowed_by(self.annotation)


@dataclass(frozen=True, kw_only=True)
class Node:
    """One spec, or one of several variants."""

    variants: tuple[type[Spec], ...]
    optional: bool
    description: str

    @functools.cached_property
    def by_name(self) -> dict[str, type[Spec]]:
        """The variants by the text in their field `type`; empty for a single spec without that field."""
        return {name: variant for variant in self.variants for name in names_of(variant)}

    @property
    def allowed(self) -> str:
        names = ", ".join(sorted(self.by_name))
        text = (
            f"a mapping with type: one of {names}"
            if names
            else f"a mapping of {', '.join(fields_of(self.variants[0]))}"
        )
        return text + " or null" * self.optional


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """A tuple of specs of any length."""

    item: Node
    optional: bool
    description: str

    @property
    def allowed(self) -> str:
        return f"a list, each item {self.item.allowed}" + " or null" * self.optional


Slot = Leaf | Node | Nodes


def names_of(variant: type[Spec]) -> tuple[str, ...]:
    field = variant.model_fields.get(TYPE)
    return get_args(field.annotation) if field is not None and get_origin(field.annotation) is Literal else ()


def _fields_of(spec_type: type[Spec]) -> dict[str, Slot]:
    """What may stand in each field, `type` first. A field that no recipe can hold is a `TypeError`: a bug of ours."""
    names = sorted(spec_type.model_fields, key=lambda name: name != TYPE)
    return {name: _slot_of(spec_type.model_fields[name], f"{spec_type.__name__}.{name}") for name in names}


# Cast: a class is hashable, whatever pyright thinks of its instances.
fields_of = cast(Callable[[type[Spec]], dict[str, Slot]], functools.cache(_fields_of))


def _slot_of(field: FieldInfo, where: str) -> Slot:
    annotation = field.annotation
    alternatives = [_bare(member) for member in members(annotation)]
    optional = type(None) in alternatives
    present = [member for member in alternatives if member is not type(None)]
    description = " ".join((field.description or "").split())
    if present and all(_is_spec(member) for member in present):
        node = Node(variants=tuple(present), optional=optional, description=description)
        if len(present) > 1 and not all(names_of(variant) for variant in present):
            raise TypeError(f'{where}: each variant needs a field `type: Literal["name"] = "name"`')
        return node
    if len(present) == 1 and get_origin(present[0]) is tuple and _holds_spec(present[0]):
        item, *rest = get_args(present[0])
        variants = tuple(_bare(member) for member in members(item))
        if rest != [Ellipsis] or not all(_is_spec(variant) for variant in variants):
            raise TypeError(f"{where}: specs stand in a tuple of any length, `tuple[SomeSpec, ...]`")
        node = Node(variants=variants, optional=False, description=description)
        return Nodes(item=node, optional=optional, description=description)
    for member in present:
        _assert_is_value(member, where)
    bounded = Annotated[annotation, *field.metadata] if field.metadata else annotation
    return Leaf(annotation=bounded, optional=optional, description=description)


def _bare(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def members(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, however it is nested; the annotation itself where it is none."""
    bare = _bare(annotation)
    if get_origin(bare) not in {Union, types.UnionType}:
        return (annotation,)
    return tuple(inner for member in get_args(bare) for inner in members(member))


def _is_spec(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Spec)


def _holds_spec(annotation: Any) -> bool:
    bare = _bare(annotation)
    return _is_spec(bare) or any(_holds_spec(argument) for argument in get_args(bare) if argument is not Ellipsis)


def _assert_is_value(annotation: Any, where: str) -> None:
    bare = _bare(annotation)
    if get_origin(bare) is Literal or bare is Ellipsis:
        return
    if get_origin(bare) is tuple or len(members(bare)) > 1:
        for argument in get_args(bare):
            _assert_is_value(argument, where)
        return
    plain = isinstance(bare, type) and not _is_spec(bare) and issubclass(bare, (bool, int, float, str, Path, enum.Enum))
    if not plain and bare is not type(None):
        raise TypeError(f"{where}: {bare!r} cannot stand in a spec; see the top of rcnn/config/spec.py")


@functools.cache
def _adapter_of(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(annotation, config=ConfigDict(strict=True, allow_inf_nan=False))


def check(annotation: Any, value: Any) -> Any:
    """The value as a field of that annotation holds it. Raises `ValueError` where it does not fit."""
    adapter = _adapter_of(annotation)
    try:
        found = adapter.validate_python(_tuples(value), strict=True)
        if type(found) is int and type(value) is not int:  # pydantic takes 50.0 and true for Literal[50] and Literal[1]
            raise ValueError(f"{value!r} is not a whole number")
        return found
    except ValidationError:
        # JSON knows no tuples, paths or enums, so that pydantic's strict JSON rules take lists and texts for them.
        try:
            return adapter.validate_json(json.dumps(value), strict=True)
        except TypeError as error:
            raise ValueError(str(error)) from None


def plain(value: Any) -> Any:
    """A spec, or a value of one, as YAML knows it: mappings, lists, numbers, texts."""
    if isinstance(value, Spec):
        return {name: plain(getattr(value, name)) for name in fields_of(type(value))}
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    if isinstance(value, enum.Enum):
        return value.value
    return value.as_posix() if isinstance(value, Path) else value


# -------------------------------------------------------------------------------------------------- words for people

_WORDS: dict[Any, tuple[str, str]] = {
    bool: ("true or false", "true or false"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("a text", "texts"),
    Path: ("a path", "paths"),
    type(None): ("null", "null"),
}
_BOUNDS = (
    (annotated_types.Ge, "ge", "at least {}"),
    (annotated_types.Gt, "gt", "above {}"),
    (annotated_types.Le, "le", "at most {}"),
    (annotated_types.Lt, "lt", "below {}"),
    (annotated_types.MultipleOf, "multiple_of", "a multiple of {}"),
    (annotated_types.MinLen, "min_length", "at least {} long"),
    (annotated_types.MaxLen, "max_length", "at most {} long"),
)


def allowed_by(annotation: Any, plural: bool = False) -> str:
    """What fits an annotation, in words: `a whole number, at least 1, or null`."""
    bare, bounds = _bare(annotation), _bounds(annotation)
    present = [member for member in members(bare) if member is not type(None)]
    parts = [_either(present, plural), *bounds]
    if len(present) == len(members(bare)):
        return ", ".join(parts)
    bounded = bounds or any(_bounds(member) for member in present)
    return ", ".join([*parts, "or null"]) if bounded else f"{parts[0]} or null"


def _bounds(annotation: Any) -> list[str]:
    metadata = get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()
    flat = [item for entry in metadata for item in (entry.metadata if isinstance(entry, FieldInfo) else [entry])]
    found = [(words, getattr(item, name)) for kind, name, words in _BOUNDS for item in flat if isinstance(item, kind)]
    return [words.format(value) for words, value in found]


def _either(alternatives: list[Any], plural: bool) -> str:
    return " or ".join(_words(alternative, plural) for alternative in alternatives)


def _words(annotation: Any, plural: bool) -> str:
    arguments = get_args(annotation)
    if get_origin(annotation) is Annotated:
        return allowed_by(annotation, plural)
    if get_origin(annotation) is Literal:
        return _one_of([json.dumps(argument, ensure_ascii=False) for argument in arguments])
    if get_origin(annotation) is tuple:
        if arguments[1:] == (Ellipsis,):
            return f"{'lists' if plural else 'a list'} of {allowed_by(arguments[0], plural=True)}"
        return f"{'lists' if plural else 'a list'} of {len(arguments)}: " + ", ".join(map(allowed_by, arguments))
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return _one_of([json.dumps(member.value, ensure_ascii=False) for member in annotation])
    return _WORDS[annotation][plural] if annotation in _WORDS else str(annotation)


def _one_of(choices: list[str]) -> str:
    return choices[0] if len(choices) == 1 else "one of " + ", ".join(choices)
