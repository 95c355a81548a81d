"""What another system's code computes, held against a recipe of ours that is to be written for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rcnn.config.text import flatten
from rcnn.errors import CheckpointError, Problem
from rcnn.recipes.recipe import Recipe


def refuse_other_conventions(recipe: Recipe, models: Iterable[Recipe], *, free: tuple[str, ...], system: str) -> None:
    """Raises `CheckpointError` that lists each setting of the detector that the nearest of `models` does not have.

    Settings at `free`, or below, the other system has too, or only a training knows.
    """
    ours = flatten(recipe)
    nearest = min((flatten(model) for model in models), key=lambda theirs: _distance(ours, theirs, free))
    problems = [
        Problem(where=name, given=given, allowed=allowed, remedy=f"{system} has no setting for it")
        for name, given, allowed in differences(ours, nearest, free)
    ]
    if problems:
        raise CheckpointError(problems)


def _distance(ours: Mapping[str, str], theirs: Mapping[str, str], free: tuple[str, ...]) -> tuple[int, int]:
    """Parts of another type count most."""
    different = _different(ours, theirs, free)
    return len([name for name in different if name.endswith(".type")]), len(different)


def _different(ours: Mapping[str, str], theirs: Mapping[str, str], free: tuple[str, ...]) -> list[str]:
    return [
        name
        for name in sorted({*ours, *theirs})
        if name.startswith("detector.") and not _is_below(name, free) and ours.get(name) != theirs.get(name)
    ]


def differences(
    ours: Mapping[str, str], theirs: Mapping[str, str], free: tuple[str, ...]
) -> list[tuple[str, str, str]]:
    """Paths of the detector with both values, where they differ; of a part of another type, its type alone."""
    different = _different(ours, theirs, free)
    other_parts = tuple(name.removesuffix(".type") for name in different if name.endswith(".type"))
    return [
        (name, ours.get(name, "nothing"), theirs.get(name, "nothing"))
        for name in different
        if name.endswith(".type") or not _is_below(name, other_parts)
    ]


def _is_below(name: str, places: tuple[str, ...]) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)
