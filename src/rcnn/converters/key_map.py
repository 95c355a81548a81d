"""Tables that say how a peer's checkpoint keys become ours, read both ways.

A table is a list of rules, each a peer's pattern, our template, and what happens to the tensor. Every key of a file
meets a rule (the first that fits), or a reason for which it is dropped; anything else is an error that shows the key.
What we keep in a state dict and the peer does not is added, for a reason too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from rcnn.errors import CheckpointError, Problem


def _unchanged(value: Tensor) -> Tensor:
    return value


@dataclass(frozen=True, kw_only=True)
class Change:
    """A change of layout and its inverse."""

    forward: Callable[[Tensor], Tensor] = _unchanged
    backward: Callable[[Tensor], Tensor] = _unchanged


@dataclass(frozen=True, kw_only=True)
class Rule:
    """`theirs` and `ours` are the same text in both systems but for their names; `{}` stands for any part of a key."""

    theirs: str
    ours: str
    change: Change = field(default_factory=Change)


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """Keys (a regular expression on the whole key) that are left out on purpose, and why."""

    pattern: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Added:
    """A tensor of ours that the peer's files do not have, and why it has that value."""

    ours: str
    value: Tensor
    reason: str


@dataclass(frozen=True, kw_only=True)
class KeyMap:
    """The rules of one structure of one system."""

    rules: Sequence[Rule]
    dropped: Sequence[Dropped] = ()
    added: Sequence[Added] = ()

    def to_ours(self, state: Mapping[str, Tensor]) -> Converted:
        """Every key converted, or dropped for a reason. Raises `CheckpointError` that lists all others."""
        converted: dict[str, Tensor] = {}
        names: dict[str, str] = {}
        dropped: dict[str, str] = {}
        problems = []
        for key, value in state.items():
            rule, parts = _first_match([(rule.theirs, rule) for rule in self.rules], key)
            reason = next((entry.reason for entry in self.dropped if re.fullmatch(entry.pattern, key)), None)
            if reason is not None:
                dropped[key] = reason
            elif rule is None:
                problems.append(Problem(where=key, given=f"no rule for a tensor of shape {tuple(value.shape)}"))
            else:
                names[key] = _fill(rule.ours, parts)
                if names[key] in converted:
                    problems.append(Problem(where=key, given=f"the second tensor that becomes {names[key]}"))
                try:
                    converted[names[key]] = rule.change.forward(value)
                except (RuntimeError, IndexError):
                    given = f"shape {tuple(value.shape)}, of which {names[key]} cannot be made"
                    problems.append(Problem(where=key, given=given))
        if problems:
            raise CheckpointError(problems)
        converted |= {entry.ours: entry.value for entry in self.added}
        added = {entry.ours: entry.reason for entry in self.added}
        return Converted(state=converted, names=names, dropped=dropped, added=added)

    def to_theirs(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same tables backward."""
        converted = {}
        problems = []
        added = {entry.ours for entry in self.added}
        for key, value in state.items():
            if key in added:
                continue
            rule, parts = _first_match([(rule.ours, rule) for rule in self.rules], key)
            if rule is None:
                problems.append(Problem(where=key, given="this system has no place for it"))
            else:
                converted[_fill(rule.theirs, parts)] = rule.change.backward(value)
        if problems:
            raise CheckpointError(problems)
        return converted


@dataclass(frozen=True, kw_only=True)
class Converted:
    """A converted state dict, and what became of each of the peer's keys: its name, or the reason why it has none.

    `added` are our names that the peer has nothing for, with the reason of their values.
    """

    state: dict[str, Tensor]
    names: dict[str, str]
    dropped: dict[str, str]
    added: dict[str, str] = field(default_factory=dict)


def _first_match(entries: Sequence[tuple[str, Rule]], key: str) -> tuple[Rule | None, tuple[str, ...]]:
    for template, rule in entries:
        match = re.fullmatch("(.+)".join(re.escape(part) for part in template.split("{}")), key)
        if match:
            return rule, match.groups()
    return None, ()


def _fill(template: str, parts: tuple[str, ...]) -> str:
    return template.format(*parts)
