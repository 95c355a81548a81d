"""Arithmetic of a config: + - * / // % ** of numbers, + of texts and lists, * of a list and a number, each bounded."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from typing import Any

from rcnn.config.placed_values import Items
from rcnn.config.refusal import Budget, Refused, kind_of

_MAX_INT = 2**63
_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


def combine(node: ast.BinOp, left: Any, right: Any, budget: Budget) -> Any:
    """What the operator of `node` makes of two values. Raises `Refused`."""
    op = node.op
    if isinstance(op, ast.Add) and isinstance(left, str) and isinstance(right, str):
        budget.spend(node, (len(left) + len(right)) // 8)
        return left + right
    if isinstance(op, ast.Add) and isinstance(left, Items) and isinstance(right, Items):
        items = Items()
        extend(node, items, left, budget)
        extend(node, items, right, budget)
        return items
    if isinstance(op, ast.Mult) and isinstance(left, int) and isinstance(right, Items):
        left, right = right, left
    if isinstance(op, ast.Mult) and isinstance(left, Items) and type(right) is int:
        return _repeated(node, left, right, budget)
    return _compute(node, number(node.left, left), number(node.right, right))


def extend(node: ast.expr, items: Items, more: Any, budget: Budget) -> None:
    """Put the values of `more` behind `items`. Raises `Refused` where it is no list."""
    if not isinstance(more, Items):
        raise Refused(node, f"* of {kind_of(more)}", "* of a list")
    budget.spend(node, len(more))
    items.extend(more)
    items.places.extend(more.places)


def number(node: ast.expr, value: Any) -> float:
    if not isinstance(value, int | float):
        raise Refused(node, f"arithmetic with {kind_of(value)}", "numbers")
    return value


def bounded(node: ast.AST, value: float) -> float:
    if isinstance(value, int) and abs(value) >= _MAX_INT:
        raise Refused(node, "a number of more than 63 bits")
    return value


def _repeated(node: ast.BinOp, items: Items, times: int, budget: Budget) -> Items:
    budget.spend(node, max(len(items), 1) * max(times, 0))
    repeated = Items()
    for _ in range(times):
        extend(node, repeated, items, budget)
    return repeated


def _compute(node: ast.BinOp, left: float, right: float) -> float:
    op = node.op
    compute = _OPERATORS.get(type(op))
    if compute is None or (isinstance(op, ast.Pow) and not (abs(left) <= 1e6 and -64 <= right <= 64)):
        raise Refused(node, f"arithmetic that is not done here ({type(op).__name__})", "+ - * / // % and small **")
    try:
        result = compute(left, right)
    except (ArithmeticError, ValueError) as error:
        raise Refused(node, f"this cannot be computed ({error})") from None
    if isinstance(result, complex):
        raise Refused(node, "this is not a real number")
    return bounded(node, result)
