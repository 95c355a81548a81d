"""The syntax tree of a config in Python, and words for what is in one."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator
from pathlib import Path

from rcnn.errors import Problem


def parse(text: str, file: Path) -> ast.Module | Problem:
    """The syntax tree of a file's text, or what is wrong with it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that Python will refuse one day
            return ast.parse(text)
    except SyntaxError as error:
        given = f"this is not Python ({error.msg})"
        return Problem(where=f"{file}:{error.lineno or 1}", given=given)
    except (ValueError, RecursionError, MemoryError) as error:
        return Problem(where=str(file), given=f"this cannot be read as Python ({error or type(error).__name__})")


def base_of(statement: ast.stmt) -> ast.expr | None:
    """What a statement assigns to `_base_`; None where it does not."""
    match statement:
        case ast.Assign(targets=[ast.Name(id="_base_")], value=value):
            return value
    return None


def names_assigned(node: ast.AST) -> Iterator[str]:
    """Those that a statement gives a value."""
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    for target in targets:
        for each in target.elts if isinstance(target, ast.Tuple | ast.List) else [target]:
            if isinstance(each, ast.Name):
                yield each.id


def dotted(node: ast.expr) -> str:
    """What is called, as far as it is names."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    names.append(node.id if isinstance(node, ast.Name) else "(...)")
    return ".".join(reversed(names))


_STATEMENTS: dict[type[ast.stmt], str] = {
    ast.Import: "an import",
    ast.ImportFrom: "an import",
    ast.FunctionDef: "a function",
    ast.AsyncFunctionDef: "a function",
    ast.ClassDef: "a class",
    ast.For: "a loop",
    ast.AsyncFor: "a loop",
    ast.While: "a loop",
    ast.If: "a condition",
    ast.With: "a with block",
    ast.Try: "a try block",
    ast.Delete: "a deletion",
    ast.Assert: "an assertion",
    ast.Raise: "a raise",
}
_EXPRESSIONS: dict[type[ast.expr], str] = {
    ast.ListComp: "a comprehension",
    ast.DictComp: "a comprehension",
    ast.SetComp: "a comprehension",
    ast.GeneratorExp: "a comprehension",
    ast.Lambda: "a function",
    ast.IfExp: "a condition",
    ast.Compare: "a comparison",
    ast.BoolOp: "a condition",
    ast.Set: "a set",
    ast.Starred: "* outside a list",
}


def words_for(node: ast.stmt | ast.expr) -> str:
    """What a statement or an expression is called in a message."""
    if isinstance(node, ast.stmt):
        return _STATEMENTS.get(type(node), f"a statement ({type(node).__name__})")
    return _EXPRESSIONS.get(type(node), f"an expression ({type(node).__name__})")
