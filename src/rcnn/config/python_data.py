"""Python text as data: the values that the assignments of a config file give, worked out from its syntax tree.

Nothing is executed: only what is listed here has a meaning, everything else is refused with its line.

    literals            None, truth values, numbers, texts, f-strings of those, lists, tuples, {...} with texts as keys,
                        [... for name in list]
    calls               dict(...), list(...), tuple(...), with * and **
    names               those assigned above in the file, and `_base_`
    access              x.key, x['key'], x[0], x[1:], also as the target of an assignment
    arithmetic          + - * / // % ** of numbers, + of texts and lists, * of a list and a number
    templates           {{ _base_.key }}, {{ fileDirname }}, {{ fileBasename }}, {{ fileBasenameNoExtension }},
                        {{ fileExtname }}, also within texts
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rcnn.config.arithmetic import bounded, combine, extend, number
from rcnn.config.placed_values import Items, Place, Section
from rcnn.config.python_syntax import base_of, dotted, names_assigned, words_for
from rcnn.config.refusal import MAX_NESTING, Budget, Refused, kind_of, shortened
from rcnn.errors import Problem

BASE = "_base_"


class _Unreadable:
    """Stands for a value that was refused already, so that what is made of it is not reported again."""


_UNREADABLE = _Unreadable()


# --------------------------------------------------------------------------------------------------------- statements

_ALLOWED_STATEMENTS = (
    "assignments of literals, dict(...), file-level names and _base_ references: a config is data here"
)
_ENVIRONMENT = re.compile(r"\{\{\s*\$")
_TEMPLATE = re.compile(r"\{\{\s*([\w.]+)\s*\}\}")


@dataclass(kw_only=True)
class FileReader:
    """Works out the assignments of one file. `base` is what `_base_` means in it; problems are collected."""

    file: Path
    budget: Budget
    base: Section | None = None
    names: dict[str, Any] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def read(self, tree: ast.Module) -> Section:
        """All names of the file but `_base_`, and but those that were refused."""
        for statement in tree.body:
            if base_of(statement) is None:
                self._try(lambda statement=statement: self._statement(statement), statement)
        section = Section()
        for name, value in self.names.items():
            if value is not _UNREADABLE:
                section.put(name, value, self.places[name])
        return section

    def expression(self, node: ast.expr) -> Any:
        """The value of one expression; None where it is refused, which is then among the problems."""
        found: list[Any] = []
        self._try(lambda: found.append(self._value(node, 0)), node)
        return found[0] if found else None

    def _try(self, work: Callable[[], None], node: ast.stmt | ast.expr) -> None:
        try:
            work()
        except Refused as refused:
            if refused.given:
                where = f"{self.file}:{refused.line or node.lineno}"
                problem = Problem(where=where, given=refused.given, allowed=refused.allowed, remedy=refused.remedy)
                self.problems.append(problem)
            for name in names_assigned(node):
                self.names[name] = _UNREADABLE

    def _statement(self, statement: ast.stmt) -> None:
        match statement:
            case ast.Assign(targets=targets, value=value):
                found = self._value(value, 0)
                for target in targets:
                    self._assign(target, found)
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                self._assign(target, self._value(value, 0))
            case ast.AugAssign(target=ast.Name() as target, op=op, value=value):
                node = ast.copy_location(ast.BinOp(left=_loaded(target), op=op, right=value), statement)
                self._assign(target, self._value(node, 0))
            case ast.Expr(value=ast.Constant()) | ast.Pass():
                return  # a docstring
            case _:
                remedy = ""
                if isinstance(statement, ast.Import | ast.ImportFrom | ast.With):
                    remedy = "of a config that imports its bases, take the one with _base_ = [...] (in configs/)"
                given = f"{words_for(statement)}, which is never executed"
                raise Refused(statement, given, _ALLOWED_STATEMENTS, remedy)

    def _assign(self, target: ast.expr, value: Any) -> None:
        place = self._place(target)
        match target:
            case ast.Name(id=name):
                if name == BASE:
                    raise Refused(target, "_base_ is assigned in a chain", "_base_ = 'file.py', or a list of files")
                self.names[name] = value
                self.places[name] = place
            case ast.Attribute(value=holder, attr=key):
                self._put(target, self._value(holder, 0), key, value)
            case ast.Subscript(value=holder, slice=index):
                self._put(target, self._value(holder, 0), self._value(index, 0), value)
            case ast.Tuple(elts=targets) | ast.List(elts=targets):
                if not isinstance(value, Items) or len(value) != len(targets):
                    raise Refused(target, f"{len(targets)} names for a value of another length")
                for each, item in zip(targets, value, strict=True):
                    self._assign(each, item)
            case _:
                raise Refused(target, f"an assignment to {type(target).__name__}", _ALLOWED_STATEMENTS)

    def _put(self, target: ast.expr, holder: Any, key: Any, value: Any) -> None:
        if isinstance(holder, Section) and isinstance(key, str):
            holder.put(key, value, self._place(target))
        elif isinstance(holder, Items) and type(key) is int and -len(holder) <= key < len(holder):
            holder[key], holder.places[key] = value, self._place(target)
        else:
            given = f"there is no place {kind_of(key)} to assign to"
            raise Refused(target, given, "a key of a dict, an index of a list")

    def _place(self, node: ast.AST) -> Place:
        return Place(file=self.file, line=getattr(node, "lineno", 1))

    # ------------------------------------------------------------------------------------------------- expressions

    def _value(self, node: ast.expr, depth: int) -> Any:
        if depth > MAX_NESTING:
            raise Refused(node, f"nested deeper than {MAX_NESTING}")
        self.budget.spend(node, 1)
        deeper = depth + 1
        match node:
            case ast.Constant(value=value):
                return self._constant(node, value)
            case ast.Name(id=name):
                return self._named(node, name)
            case ast.List(elts=elements) | ast.Tuple(elts=elements):
                return self._items(elements, deeper)
            case ast.Dict():
                return self._mapping(node, deeper)
            case ast.Call():
                return self._call(node, deeper)
            case ast.Attribute(value=holder, attr=key):
                return self._key(node, self._value(holder, deeper), key)
            case ast.Subscript(value=holder, slice=ast.Slice() as part):
                return self._part(node, self._value(holder, deeper), part, deeper)
            case ast.Subscript(value=holder, slice=index):
                return self._at(node, self._value(holder, deeper), self._value(index, deeper))
            case ast.UnaryOp(op=ast.USub() | ast.UAdd() as op, operand=operand):
                value = number(operand, self._value(operand, deeper))
                return -value if isinstance(op, ast.USub) else value
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return not self._value(operand, deeper)
            case ast.BinOp(left=left, right=right):
                return combine(node, self._value(left, deeper), self._value(right, deeper), self.budget)
            case ast.JoinedStr(values=parts):
                return "".join(self._text_part(part, deeper) for part in parts)
            case ast.ListComp(
                elt=element, generators=[ast.comprehension(target=ast.Name(id=name), iter=source, ifs=[])]
            ):
                return self._for_each(node, element, name, self._value(source, deeper), deeper)
            case ast.Set(elts=[ast.Set(elts=[inner])]):
                if isinstance(inner, ast.Name) and inner.id in _predefined(self.file):
                    return _predefined(self.file)[inner.id]
                return self._value(inner, deeper)
        given = f"{words_for(node)}, which is never executed"
        raise Refused(node, given, "literals, dict(...), names of this file, _base_ references and arithmetic")

    def _constant(self, node: ast.expr, value: Any) -> Any:
        if isinstance(value, str):
            return self._filled(node, value)
        if value is None or isinstance(value, bool | float):
            return value
        if type(value) is int:
            return bounded(node, value)
        raise Refused(node, f"a literal of type {type(value).__name__}", "null, truth values, numbers and texts")

    def _filled(self, node: ast.expr, text: str) -> Any:
        """A text with its templates {{ ... }} put in; the value itself where the text is nothing else."""
        if "{{" not in text:
            return text
        if _ENVIRONMENT.search(text):
            raise Refused(node, "a variable of the environment", "the value itself")
        whole = _TEMPLATE.fullmatch(text.strip())
        if whole and whole[1].startswith(f"{BASE}."):
            return self._template(node, whole[1])
        return _TEMPLATE.sub(lambda match: self._as_text(node, self._template(node, match[1])), text)

    def _as_text(self, node: ast.expr, value: Any) -> str:
        """A plain value within a text."""
        if isinstance(value, Section | Items):
            raise Refused(node, f"{kind_of(value)} within a text", "plain values within texts")
        text = str(value)
        self.budget.spend(node, len(text) // 8)
        return text

    def _template(self, node: ast.expr, path: str) -> Any:
        predefined = _predefined(self.file)
        if path in predefined:
            return predefined[path]
        first, *keys = path.split(".")
        value = self._named(node, first)
        for key in keys:
            value = self._key(node, value, key)
        return value

    def _named(self, node: ast.expr, name: str) -> Any:
        if name == BASE:
            if self.base is None:
                raise Refused(node, "_base_ is used, but the file has none")
            return self.base
        if name not in self.names:
            raise Refused(node, f'the name "{name}" is not assigned above', "names that the file assigns, and _base_")
        value = self.names[name]
        if value is _UNREADABLE:
            raise Refused
        return value

    def _items(self, elements: list[ast.expr], depth: int) -> Items:
        items = Items()
        for element in elements:
            if isinstance(element, ast.Starred):
                extend(element, items, self._value(element.value, depth), self.budget)
            else:
                items.add(self._value(element, depth), self._place(element))
        return items

    def _for_each(self, node: ast.expr, element: ast.expr, name: str, source: Any, depth: int) -> Items:
        """`[element for name in source]`."""
        if not isinstance(source, Items):
            raise Refused(node, f"a loop over {kind_of(source)}", "a loop over a list")
        items = Items()
        outside = dict(self.names)
        try:
            for item in source:
                self.names = {**outside, name: item}
                self.budget.spend(node, len(outside) + 1)
                items.add(self._value(element, depth), self._place(element))
        finally:
            self.names = outside
        return items

    def _mapping(self, node: ast.Dict, depth: int) -> Section:
        section = Section()
        for key_node, value_node in zip(node.keys, node.values, strict=True):
            if key_node is None:
                self._merge_in(value_node, section, self._value(value_node, depth))
                continue
            key = self._value(key_node, depth)
            if not isinstance(key, str | int):
                raise Refused(key_node, f"the key {kind_of(key)}", "a text as key")
            section.put(str(key), self._value(value_node, depth), self._place(key_node))
        return section

    def _merge_in(self, node: ast.expr, section: Section, more: Any) -> None:
        if not isinstance(more, Section):
            raise Refused(node, f"** of {kind_of(more)}", "** of a dict")
        self.budget.spend(node, len(more))
        section.update(more)
        section.places.update(more.places)

    def _call(self, node: ast.Call, depth: int) -> Any:
        name = node.func.id if isinstance(node.func, ast.Name) else None
        if name == "dict" and len(node.args) <= 1:
            section = Section()
            for argument in node.args:
                self._merge_in(argument, section, self._value(argument, depth))
            for keyword in node.keywords:
                value = self._value(keyword.value, depth)
                if keyword.arg is None:
                    self._merge_in(keyword.value, section, value)
                else:
                    section.put(keyword.arg, value, self._place(keyword))
            return section
        if name in {"list", "tuple"} and len(node.args) <= 1 and not node.keywords:
            items = Items()
            for argument in node.args:
                extend(argument, items, self._value(argument, depth), self.budget)
            return items
        given = f"a call of {shortened(dotted(node.func))}, which is never executed"
        raise Refused(node, given, "dict(...), list(...), tuple(...)")

    def _key(self, node: ast.expr, holder: Any, key: str) -> Any:
        if isinstance(holder, Section) and key in holder:
            return holder[key]
        given = f'there is no "{shortened(key)}"' if isinstance(holder, Section) else f'"{key}" of {kind_of(holder)}'
        allowed = f"one of {shortened(', '.join(holder))}" if isinstance(holder, Section) else "a key of a dict"
        raise Refused(node, given, allowed)

    def _at(self, node: ast.expr, holder: Any, index: Any) -> Any:
        if isinstance(holder, Section) and isinstance(index, str):
            return self._key(node, holder, index)
        if isinstance(holder, Items | str) and type(index) is int and -len(holder) <= index < len(holder):
            return holder[index]
        raise Refused(node, f"there is no {kind_of(index)} in {kind_of(holder)}")

    def _part(self, node: ast.expr, holder: Any, part: ast.Slice, depth: int) -> Any:
        ends = [None if end is None else self._value(end, depth) for end in (part.lower, part.upper, part.step)]
        if not isinstance(holder, Items | str) or not all(end is None or type(end) is int for end in ends):
            raise Refused(node, f"a part of {kind_of(holder)}", "a part of a list, between whole numbers")
        if ends[2] == 0:
            raise Refused(node, "a part with step 0")
        if isinstance(holder, str):
            return self._as_text(node, holder[slice(*ends)])
        return self._selected(node, holder, range(len(holder))[slice(*ends)])

    def _selected(self, node: ast.expr, holder: Items, indices: range) -> Items:
        self.budget.spend(node, len(indices))
        items = Items()
        for index in indices:
            items.add(holder[index], holder.places[index])
        return items

    def _text_part(self, part: ast.expr, depth: int) -> str:
        if isinstance(part, ast.Constant):
            return str(part.value)
        if isinstance(part, ast.FormattedValue) and part.format_spec is None and part.conversion == -1:
            return self._as_text(part, self._value(part.value, depth))
        raise Refused(part, "a part of an f-string with a format", "plain values in f-strings")


def _loaded(target: ast.Name) -> ast.Name:
    return ast.copy_location(ast.Name(id=target.id, ctx=ast.Load()), target)


def _predefined(file: Path) -> dict[str, str]:
    """mmengine's names for the file itself."""
    return {
        "fileDirname": str(file.parent),
        "fileBasename": file.name,
        "fileBasenameNoExtension": file.stem,
        "fileExtname": file.suffix,
    }
