"""Why an expression of a config has no value here, and how much a config may make."""

from __future__ import annotations

import ast
from typing import Any

from rcnn.config.placed_values import Items, Section

# A config has some thousand values; these bounds keep a hostile one from exhausting time or memory.
MAX_BYTES = 1_000_000
MAX_NESTING = 100
MAX_WORK = 1_000_000


class Refused(Exception):
    """What was refused, with its line; without `given`, it was made of a value that was refused already."""

    def __init__(self, node: ast.AST | None = None, given: str = "", allowed: str = "", remedy: str = "") -> None:
        self.line = getattr(node, "lineno", 0)
        self.given, self.allowed, self.remedy = given, allowed, remedy


class Budget:
    """How many values may still be made while a config and its bases are read."""

    def __init__(self) -> None:
        self.left = MAX_WORK

    def spend(self, node: ast.AST, count: int) -> None:
        """Raises `Refused` where nothing is left."""
        self.left -= count
        if self.left < 0:
            raise Refused(node, f"the config makes more than {MAX_WORK:,} values", "a config of ordinary size")


def kind_of(value: Any) -> str:
    """What a value is, for a message."""
    if isinstance(value, Section):
        return "a dict"
    return "a list" if isinstance(value, Items) else shortened(repr(value))


def shortened(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."
