"""One dict of a config at a time, every key of which is accounted for: taken, ignored for a reason, or unmapped."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rcnn.config.placed_values import Items, Place
from rcnn.config.python_config import Section
from rcnn.errors import Problem, RecipeError, nearest


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A value of the config that does not become one of the recipe: where it is, what it says, and why."""

    path: str
    place: Place
    value: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.path}={self.value}: {self.reason}"

    def as_problem(self) -> Problem:
        return Problem(where=f"{self.place}: {self.path}", given=self.value, remedy=self.reason)


@dataclass(kw_only=True)
class Ledger:
    """What was found on the way: without meaning here, with another meaning here, and without a counterpart."""

    ignored: list[Finding] = field(default_factory=list)
    differing: list[Finding] = field(default_factory=list)
    unmapped: list[Finding] = field(default_factory=list)


# Why keys that stand for whole features have no counterpart.
_REASONS = {
    "mask_head": "masks: detectors here find boxes",
    "mask_roi_extractor": "masks: detectors here find boxes",
    "semantic_head": "segmentation: detectors here find boxes",
    "semantic_roi_extractor": "segmentation: detectors here find boxes",
    "with_mask": "masks: detectors here find boxes",
    "dcn": "deformable convolutions: there are none here",
    "stage_with_dcn": "deformable convolutions: there are none here",
    "dcn_on_last_conv": "deformable convolutions: there are none here",
    "plugins": "plugins of a backbone: there are none here",
    "gen_attention": "attention in a backbone: there is none here",
    "avg_down": "a ResNet with averages on its shortcuts (ResNet-D): there is none here",
    "deep_stem": "a ResNet with a stem of three convolutions: there is none here",
    "conv_cfg": "other convolutions than the ordinary ones: there are none here",
}


class Part:
    """A dict of a config. What is not taken, ignored or refused when it is closed is unmapped."""

    def __init__(self, section: Section, path: str, place: Place, ledger: Ledger) -> None:
        self.section, self.path, self.place, self.ledger = section, path, place, ledger
        self._open = dict.fromkeys(section)

    def __contains__(self, key: str) -> bool:
        return key in self.section

    def take(self, key: str, default: Any = None) -> Any:
        """The value as it stands, which is used up by this."""
        self._open.pop(key, None)
        return self.section.get(key, default)

    def peek(self, key: str, default: Any = None) -> Any:
        return self.section.get(key, default)

    def number(self, key: str, default: float) -> float:
        return self._typed(key, default, is_number, "a number")

    def whole(self, key: str, default: int) -> int:
        return self._typed(key, default, lambda value: type(value) is int, "a whole number")

    def count(self, key: str, default: int) -> int:
        return self._typed(key, default, lambda value: type(value) is int and value >= 1, "a whole number above 0")

    def truth(self, key: str, default: bool) -> bool:
        return self._typed(key, default, lambda value: isinstance(value, bool), "True or False")

    def text(self, key: str, default: str) -> str:
        return self._typed(key, default, lambda value: isinstance(value, str), "a text")

    def numbers(self, key: str, default: Sequence[float]) -> tuple[float, ...]:
        """A list of numbers; a number alone is a list of one."""
        value = self.take(key, None)
        if value is None:
            return tuple(default)
        values = value if isinstance(value, Items) else [value]
        if values and all(is_number(each) for each in values):
            return tuple(values)
        self.refuse(key, "a list of numbers is wanted")
        return tuple(default)

    def wholes(self, key: str, default: Sequence[int]) -> tuple[int, ...]:
        """A list of whole numbers; one alone is a list of one."""
        values = self.numbers(key, default)
        if all(type(each) is int for each in values):
            return tuple(map(int, values))
        self.refuse(key, "whole numbers are wanted")
        return tuple(default)

    def part(self, key: str) -> Part:
        """The dict under a key; an empty one where there is none."""
        value = self.take(key)
        if isinstance(value, Section):
            return self._below(value, key, self.place_of(key))
        if value is not None:
            self.refuse(key, "a dict is wanted")
        return self._below(Section(), key, self.place_of(key))

    def parts(self, key: str) -> list[Part]:
        """The dicts in the list under a key; a dict alone is a list of one."""
        value = self.take(key)
        if isinstance(value, Section):
            return [self._below(value, key, self.place_of(key))]
        if isinstance(value, Items) and all(isinstance(each, Section) for each in value):
            return [self._below(each, f"{key}[{i}]", value.places[i]) for i, each in enumerate(value)]
        if value is not None:
            self.refuse(key, "a list of dicts is wanted")
        return []

    def kind(self, default: str = "") -> str:
        """Its `type`."""
        return self.text("type", default)

    def only(self, key: str, *allowed: Any, why: str = "") -> None:
        """Takes a value that must be one of these, if it is there."""
        if key in self.section and self.take(key) not in allowed:
            self.refuse(key, why or _REASONS.get(key, f"here it is always {_plain(allowed[0])}"))

    def ignore(self, reason: str, *keys: str) -> None:
        for key in keys:
            if key in self._open:
                self._open.pop(key)
                self.ledger.ignored.append(self._finding(key, reason))

    def differs(self, key: str, reason: str) -> None:
        self._open.pop(key, None)
        self.ledger.differing.append(self._finding(key, reason))

    def refuse(self, key: str, reason: str) -> None:
        self._open.pop(key, None)
        self.ledger.unmapped.append(self._finding(key, reason))

    def refuse_whole(self, reason: str) -> None:
        """The dict as a whole has no counterpart."""
        self._open.clear()
        value = self.section.get("type", self.section)
        self.ledger.unmapped.append(
            Finding(path=self.path, place=self.place, value=_plain(value), reason=reason),
        )

    def close(self) -> None:
        for key in list(self._open):
            self.refuse(key, _REASONS.get(key, "there is no counterpart"))

    def fail(self, key: str, allowed: Sequence[str]) -> RecipeError:
        """The error of a choice without which nothing can be built."""
        value = str(self.section.get(key))
        where, given = self._finding(key, "").place, _plain(self.section.get(key))
        problem = Problem(
            where=f"{where}: {self._path(key)}",
            given=given if key in self.section else "it is missing",
            allowed=", ".join(allowed),
            remedy=nearest(value, list(allowed)),
        )
        return RecipeError([*(each.as_problem() for each in self.ledger.unmapped), problem])

    def place_of(self, key: str) -> Place:
        return self.section.places.get(key, self.place)

    def _path(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key

    def _below(self, section: Section, key: str, place: Place) -> Part:
        return Part(section, self._path(key), place, self.ledger)

    def _finding(self, key: str, reason: str) -> Finding:
        value = _plain(self.section.get(key))
        return Finding(path=self._path(key), place=self.place_of(key), value=value, reason=reason)

    def _typed(self, key: str, default: Any, fits: Callable[[Any], bool], wanted: str) -> Any:
        value = self.take(key, None)
        if value is None:
            return default
        if fits(value):
            return value
        self.refuse(key, f"{wanted} is wanted")
        return default


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _plain(value: Any) -> str:
    """In one short line."""
    if isinstance(value, Section):
        text = f"dict({', '.join(f'{key}={_plain(inner)}' for key, inner in list(value.items())[:4])})"
    elif isinstance(value, Items):
        text = f"[{', '.join(_plain(inner) for inner in value[:8])}{', ...' if len(value) > 8 else ''}]"
    else:
        text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
