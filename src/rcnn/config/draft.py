"""A recipe while it is being edited: a tree of values, each with its origin, and the problems met so far."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError
from pydantic_core import PydanticUndefined

from rcnn.config.document import Table, Text, opened
from rcnn.config.reading import given_text, read, remedy_for
from rcnn.config.spec import TYPE, Leaf, Node, Nodes, Slot, Spec, fields_of, names_of, problems_of
from rcnn.errors import Problem, RecipeError, nearest

DEFAULT = "default"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Who gives a value: a recipe, a file (with the line), the command line."""

    name: str
    line: int | None = None

    def at(self, path: str) -> str:
        place = f"{self.name}:{self.line}" if self.line else self.name
        return f"{path} ({place})" if place else path


@dataclass(kw_only=True)
class Branch:
    """A spec in the making. `values` holds leaves as they are, specs as branches; a required field may be absent.

    `origins` names who gave each leaf, each null, each empty list, and each variant (under `type`).
    """

    spec_type: type[Spec]
    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)


def branch_of(spec: Spec, origin: str) -> Branch:
    branch = Branch(spec_type=type(spec))
    for name, slot in fields_of(type(spec)).items():
        branch.values[name] = _held(slot, getattr(spec, name), origin)
        branch.origins[name] = origin
    return branch


def _held(slot: Slot, value: Any, origin: str) -> Any:
    if isinstance(slot, Leaf) or value is None:
        return value
    return branch_of(value, origin) if isinstance(slot, Node) else [branch_of(item, origin) for item in value]


def grow(spec_type: type[Spec]) -> Branch:
    """A branch with the defaults of its type."""
    branch = Branch(spec_type=spec_type)
    for name, slot in fields_of(spec_type).items():
        default = spec_type.model_fields[name].get_default(call_default_factory=True, validated_data={})
        if default is not PydanticUndefined:
            branch.values[name] = _held(slot, default, DEFAULT)
            branch.origins[name] = DEFAULT
    return branch


def mark_defaults(branch: Branch, reference: Branch) -> None:
    """Sets the origin of everything that equals the default to "default"."""
    for name, value in branch.values.items():
        default = reference.values.get(name, PydanticUndefined)
        if isinstance(value, Branch):
            _mark_branch(value, default)
        elif isinstance(value, list) and value:
            defaults = default if isinstance(default, list) else []
            for item, other in itertools.zip_longest(value, defaults[: len(value)]):
                _mark_branch(item, other)
        elif type(value) is type(default) and value == default:
            branch.origins[name] = DEFAULT


def _mark_branch(branch: Branch, default: Any) -> None:
    if isinstance(default, Branch) and default.spec_type is branch.spec_type:
        mark_defaults(branch, default)
    elif TYPE in branch.origins:  # another variant than the default one: that is said by its type
        named_by = branch.origins[TYPE]
        mark_defaults(branch, grow(branch.spec_type))
        branch.origins[TYPE] = named_by


def origins_of(branch: Branch, path: str = "") -> Iterator[tuple[str, str]]:
    """Path and origin of every leaf, null and empty list, in the order of the fields."""
    for name in fields_of(branch.spec_type):
        value = branch.values.get(name)
        here = f"{path}.{name}" if path else name
        if isinstance(value, Branch) and value.values:
            yield from origins_of(value, here)
        elif isinstance(value, list) and value:
            for index, item in enumerate(value):
                yield from origins_of(item, f"{here}.{index}")
        else:
            yield here, branch.origins.get(name, DEFAULT)


class Draft:
    """A tree that takes edits. Mistakes are collected in `problems`; `build` raises them together.

    `hints` names our key (or says what to do) for key names of other systems.
    """

    def __init__(self, root: Branch, hints: Mapping[str, str]) -> None:
        self.root = root
        self.hints = hints
        self.problems: list[Problem] = []

    def set(self, path: str, value: Any, origin: Origin) -> None:
        """Gives the value at a dotted path. A mapping merges into a node, or replaces it with the variant it names."""
        self._set(self.root, "", path.split("."), value, origin)

    def remove(self, path: str, origin: Origin) -> None:
        """Sets a path to null, where null is allowed."""
        slot = self._slot_at(path)
        if slot is None or slot.optional:
            self.set(path, None, origin)  # an unknown path is reported there
        else:
            self._report(path, origin, "this cannot be removed", slot.allowed, "set it to another value instead")

    def build(self) -> Spec:
        """The recipe. Errors: `RecipeError` with every wrong edit, missing value and pair of values that disagree."""
        spec = self._build(self.root, "")
        if self.problems or spec is None:
            raise RecipeError(self.problems)
        return spec

    # ------------------------------------------------------------------------------------------------------ setting

    def _set(self, branch: Branch, above: str, parts: list[str], value: Any, origin: Origin) -> None:
        name, rest = parts[0], parts[1:]
        path = f"{above}.{name}" if above else name
        slot = fields_of(branch.spec_type).get(name)
        if slot is None:
            self._report_unknown(branch, above, parts, value, origin)
        elif isinstance(slot, Leaf):
            if rest:
                self._report(path, origin, f'this is a value and has no "{rest[0]}"', slot.allowed)
            else:
                self._set_leaf(branch, name, slot, path, value, origin)
        elif isinstance(slot, Node):
            branch.values[name] = self._set_node(slot, branch.values.get(name), path, rest, value, origin)
            branch.origins[name] = origin.name
        elif rest:
            self._set_item(branch, name, slot, path, rest, value, origin)
        else:
            self._set_nodes(branch, name, slot, path, value, origin)

    def _set_leaf(self, branch: Branch, name: str, slot: Leaf, path: str, value: Any, origin: Origin) -> None:
        try:
            branch.values[name] = read(slot, value)
        except ValueError:
            self._report(path, origin, given_text(value), slot.allowed, remedy_for(slot, value))
        branch.origins[name] = origin.name

    def _set_node(
        self, slot: Node, current: Branch | None, path: str, rest: list[str], value: Any, origin: Origin
    ) -> Branch | None:
        if rest == [TYPE] and slot.by_name:
            return self._merge(slot, current, path, {TYPE: value}, origin)
        if not rest:
            return self._merge(slot, current, path, value, origin)
        first, *others = slot.variants
        if current is None and others:
            remedy = f"name a variant first: {path}.type=..."
            self._report(".".join([path, *rest]), origin, f"{path} is absent", slot.allowed, remedy)
            return None
        branch = current or _grown(first, origin)
        self._set(branch, path, rest, value, origin)
        return branch

    def _merge(self, slot: Node, current: Branch | None, path: str, value: Any, origin: Origin) -> Branch | None:
        if isinstance(value, Text):
            value = opened(value)
        if value is None and slot.optional:
            return None
        if isinstance(value, Spec) and type(value) in slot.variants:
            branch = branch_of(value, origin.name)
            _mark_branch(branch, None)
            return branch
        if not isinstance(value, Mapping):
            known = isinstance(value, str) and value in slot.by_name
            remedy = f"write {path}.type={value} or {path}={{type: {value}}}" if known else ""
            self._report(path, origin, given_text(value), slot.allowed, remedy)
            return current
        return self._merge_mapping(slot, current, path, value, origin)

    def _merge_mapping(
        self, slot: Node, current: Branch | None, path: str, values: Mapping[Any, Any], origin: Origin
    ) -> Branch | None:
        if TYPE in values and slot.by_name:
            variant = slot.by_name.get(str(values[TYPE]))
            if variant is None:
                self._report_variant(slot, path, values, origin)
                return current
        elif current is not None:
            variant = current.spec_type
        elif len(slot.variants) == 1:
            variant = slot.variants[0]
        else:
            self._report(path, origin, "the mapping does not say which variant it is", slot.allowed, "add type: ...")
            return None
        branch = current if current is not None and current.spec_type is variant else _grown(variant, origin)
        if TYPE in values and slot.by_name:
            branch.values[TYPE], branch.origins[TYPE] = str(values[TYPE]), origin.name
        for key, item in values.items():
            if key != TYPE or not slot.by_name:
                self._set(branch, path, str(key).split("."), item, _on_line(origin, values, key))
        return branch

    def _set_nodes(self, branch: Branch, name: str, slot: Nodes, path: str, value: Any, origin: Origin) -> None:
        value = opened(value) if isinstance(value, Text) else value
        branch.origins[name] = origin.name
        if value is None and slot.optional:
            branch.values[name] = None
        elif isinstance(value, (list, tuple)):
            items = [self._merge(slot.item, None, f"{path}.{index}", item, origin) for index, item in enumerate(value)]
            branch.values[name] = [item for item in items if item is not None]
        else:
            self._report(path, origin, given_text(value), slot.allowed)

    def _set_item(
        self, branch: Branch, name: str, slot: Nodes, path: str, rest: list[str], value: Any, origin: Origin
    ) -> None:
        items: list[Branch] = list(branch.values.get(name) or [])
        index, *below = rest
        here = f"{path}.{index}"
        if not (index.isascii() and index.isdigit() and int(index) <= len(items)):
            allowed = f"an index from 0 to {len(items)} ({len(items)} adds an item)"
            self._report(".".join([path, *rest]), origin, f'"{index}" is not an index here', allowed)
            return
        current = items[int(index)] if int(index) < len(items) else None
        item = self._set_node(slot.item, current, here, below, value, origin)
        if item is not None:
            items[int(index) : int(index) + 1] = [item]
        branch.values[name], branch.origins[name] = items, origin.name

    # ------------------------------------------------------------------------------------------------------- finding

    def _slot_at(self, path: str) -> Slot | None:
        branch: Any = self.root
        slot: Slot | None = None
        for part in path.split("."):
            if branch is None and isinstance(slot, Node) and len(slot.variants) == 1:
                branch = grow(slot.variants[0])
            if isinstance(branch, list):
                within = part.isascii() and part.isdigit() and int(part) < len(branch)
                slot, branch = (slot.item, branch[int(part)]) if within and isinstance(slot, Nodes) else (None, None)
            elif isinstance(branch, Branch):
                slot = fields_of(branch.spec_type).get(part)
                branch = branch.values.get(part)
            else:
                return None
            if slot is None:
                return None
        return slot

    # ----------------------------------------------------------------------------------------------------- reporting

    def _report(self, path: str, origin: Origin, given: str, allowed: str = "", remedy: str = "") -> None:
        self.problems.append(Problem(where=origin.at(path), given=given, allowed=allowed, remedy=remedy))

    def _report_variant(self, slot: Node, path: str, values: Mapping[Any, Any], origin: Origin) -> None:
        name, names = str(values[TYPE]), sorted(slot.by_name)
        origin = _on_line(origin, values, TYPE)
        allowed = "one of " + ", ".join(names)
        self._report(f"{path}.{TYPE}", origin, f'there is no variant "{name}"', allowed, nearest(name, names))

    def _report_unknown(self, branch: Branch, above: str, parts: list[str], value: Any, origin: Origin) -> None:
        name = parts[0]
        names = list(fields_of(branch.spec_type))
        variant = next(iter(names_of(branch.spec_type)), "")
        owner = f'"{above}" (type: {variant})' if variant else f'"{above}"' if above else "a recipe"
        path = ".".join([above, *parts] if above else parts)
        given = f'{owner} has no "{name}"' + (f" (given: {given_text(value)})" if len(parts) == 1 else "")
        allowed = ", ".join(names) or "nothing: it has no settings"
        self._report(path, origin, given, allowed, self._remedy(above, parts, names))

    def _remedy(self, above: str, parts: list[str], names: list[str]) -> str:
        last = parts[-1]
        if last in self.hints:
            return f'"{last}" is the name of another system; here it is {self.hints[last]}'
        others = [name for name, variant in self._siblings(above) if parts[0] in fields_of(variant)]
        if others:
            return f'"{parts[0]}" belongs to the variant {" or ".join(others)}: give {above}.type={others[0]} before it'
        near = nearest(parts[0], names)
        if near:
            return near
        elsewhere = [path for path, _ in origins_of(self.root) if path.split(".")[-1] == last]
        return f"did you mean {' or '.join(elsewhere[:3])}?" if elsewhere else ""

    def _siblings(self, path: str) -> Iterable[tuple[str, type[Spec]]]:
        slot = self._slot_at(path) if path else None
        node = slot.item if isinstance(slot, Nodes) else slot
        return node.by_name.items() if isinstance(node, Node) else ()

    # ------------------------------------------------------------------------------------------------------ building

    def _build(self, branch: Branch, path: str) -> Spec | None:
        before = len(self.problems)
        values: dict[str, Any] = {}
        for name, slot in fields_of(branch.spec_type).items():
            here = f"{path}.{name}" if path else name
            if name not in branch.values:
                origin = Origin(name=branch.origins.get(TYPE, ""))
                self._report(here, origin, "a value is missing", slot.allowed, f"set {here}")
            else:
                values[name] = self._built(branch.values[name], here)
        if len(self.problems) > before:
            return None
        try:
            return branch.spec_type.model_validate(values)
        except ValidationError as error:
            self.problems += problems_of(error, path)
        except RecipeError as error:
            self.problems += error.problems
        return None

    def _built(self, value: Any, path: str) -> Any:
        if isinstance(value, Branch):
            return self._build(value, path)
        if isinstance(value, list):
            return tuple(self._build(item, f"{path}.{index}") for index, item in enumerate(value))
        return value


def _grown(variant: type[Spec], origin: Origin) -> Branch:
    """A new branch of defaults. What says that it is there (its type; all of it where it has none) has the origin."""
    branch = grow(variant)
    for name in [TYPE] if TYPE in branch.values else list(branch.values):
        branch.origins[name] = origin.name
    return branch


def _on_line(origin: Origin, values: Mapping[Any, Any], key: Any) -> Origin:
    line = values.lines.get(key) if isinstance(values, Table) and origin.line else None
    return Origin(name=origin.name, line=line) if line else origin
