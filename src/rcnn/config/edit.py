"""The one way to change a recipe: patch files, the command line and Python all end here.

A patch file is YAML:

    base: faster_rcnn_resnet50_fpn            # a named recipe, another file, or a list of them applied in order
    set:
      detector.proposals.head: {type: fcos}   # naming another variant replaces the node whole
      train.optimizer.lr: 0.01                # a mapping of the same variant, or without type, merges
    remove: [train.ema]                       # only where absence (null) is allowed

A file that holds the fields of a recipe instead (what `to_yaml` writes) is a recipe too. The order is base, file,
command line; the last writer wins. Bases are applied once each, so that two files may share one; a second whole recipe
in a list would undo the first and is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from rcnn.config.document import Table, Text, identity_of, load, read_text
from rcnn.config.draft import Branch, Draft, Origin, branch_of, grow, mark_defaults, origins_of
from rcnn.config.reading import given_text
from rcnn.config.spec import Spec, fields_of
from rcnn.errors import Problem, RecipeError, nearest

S = TypeVar("S", bound=Spec)
COMMAND_LINE = "command line"
PYTHON = "Python"
_PATCH_KEYS = ("base", "set", "remove")


@dataclass(frozen=True, kw_only=True)
class Resolved(Generic[S]):
    """A recipe, and for the path of each of its values who gave it: "default", a recipe, a file, "command line"."""

    spec: S
    origins: Mapping[str, str]

    @property
    def changes(self) -> dict[str, str]:
        """The origins of everything that is not a default."""
        return {path: origin for path, origin in self.origins.items() if origin != "default"}


def resolve(
    source: str | Path | Spec,
    *,
    spec_type: type[S],
    named: Mapping[str, Callable[[], S]],
    overrides: Sequence[str] = (),
    hints: Mapping[str, str] | None = None,
    python: Callable[[Path], S] | None = None,
    foreign: Callable[[Path, Any], S | None] | None = None,
) -> Resolved[S]:
    """The recipe that a name, a file or a spec means, after the `path=value` texts of the command line.

    `hints` says what a key of another system is called here, `python` reads the config of one in a `.py`
    file as data, `foreign` that in a YAML file whose data it knows (None where it does not).
    Errors: `RecipeError` with every mistake.
    """
    chain = _Chain(spec_type=spec_type, named=named, python=python, foreign=foreign)
    chain.add(source, Path())
    root = chain.root
    if root is None:
        raise RecipeError([*chain.problems, *_override_problems(overrides)])
    draft = Draft(root, hints or {})
    draft.problems += chain.problems
    for patch in chain.patches:
        _apply(draft, patch)
    for override in overrides:
        path, equals, value = override.partition("=")
        if equals and path.strip():
            draft.set(path.strip(), Text(value), Origin(name=COMMAND_LINE))
    draft.problems += _override_problems(overrides)
    return _finished(draft)


def edit(
    spec: S, changes: Mapping[str, Any], *, remove: Sequence[str] = (), hints: Mapping[str, str] | None = None
) -> S:
    """A copy of a recipe with other values at some paths: `edit(recipe, {"train.epochs": 12})`.

    Errors: `RecipeError` with every mistake.
    """
    draft = Draft(branch_of(spec, PYTHON), hints or {})
    for path in remove:
        draft.remove(path, Origin(name=""))
    for path, value in changes.items():
        draft.set(path, value, Origin(name=""))
    return cast(S, draft.build())


def _finished(draft: Draft) -> Resolved[Any]:
    spec = draft.build()
    return Resolved(spec=spec, origins=dict(origins_of(draft.root)))


def _override_problems(overrides: Sequence[str]) -> Iterator[Problem]:
    for override in overrides:
        path, equals, _ = override.partition("=")
        if not equals or not path.strip():
            yield Problem(
                where=f"{override} ({COMMAND_LINE})",
                given="this is not a change to the recipe" if path.strip() else "the path before = is missing",
                allowed="path=value, for example train.epochs=12",
            )


# -------------------------------------------------------------------------------------------------------- patch files


@dataclass(frozen=True, kw_only=True)
class _Patch:
    """The `set` and `remove` of one file."""

    name: str
    changes: Mapping[Any, Any]
    removals: tuple[tuple[str, int | None], ...]


def _apply(draft: Draft, patch: _Patch) -> None:
    removed = [path for path, _ in patch.removals]
    for path, line in patch.removals:
        draft.remove(path, Origin(name=patch.name, line=line))
    for key, value in patch.changes.items():
        path, origin = str(key), Origin(name=patch.name, line=_line_of(patch.changes, key))
        both = next((other for other in removed if path == other or path.startswith(f"{other}.")), None)
        if both is not None:
            problem = Problem(
                where=origin.at(path), given=f'the file sets this and removes "{both}"', remedy="keep one"
            )
            draft.problems.append(problem)
        else:
            draft.set(path, value, origin)


def _line_of(values: Mapping[Any, Any], key: Any) -> int | None:
    return values.lines.get(key) if isinstance(values, Table) else None


@dataclass(kw_only=True)
class _Chain(Generic[S]):
    """The whole recipe at the bottom and the patches above it, in the order in which they apply."""

    spec_type: type[S]
    named: Mapping[str, Callable[[], S]]
    python: Callable[[Path], S] | None = None
    foreign: Callable[[Path, Any], S | None] | None = None
    root: Branch | None = None
    root_name: str = ""
    patches: list[_Patch] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    open_files: list[Path] = field(default_factory=list)
    done: set[str] = field(default_factory=set)

    def add(self, source: str | Path | Spec, folder: Path, where: str = "") -> None:
        """`folder` is what a relative file name is relative to, `where` who asks for the source."""
        if isinstance(source, Spec):
            self._add_whole(branch_of(source, "given recipe"), "given recipe", where)
        elif isinstance(source, str) and source in self.named:
            if source not in self.done:
                self.done.add(source)
                self._add_whole(branch_of(self.named[source](), source), source, where)
        elif isinstance(source, Path) or _looks_like_file(source, folder):
            self._add_file(folder / source, where)
        else:
            names = list(self.named)
            given = f'there is no recipe "{source}"'
            allowed = f"a .yaml{' or .py' if self.python else ''} file or one of " + ", ".join(names)
            self._report(where or str(source), given, allowed, nearest(source, names))

    def _add_whole(self, branch: Branch, name: str, where: str) -> None:
        if branch.spec_type is not self.spec_type:
            self._report(where or name, f"this is a {branch.spec_type.__name__}", f"a {self.spec_type.__name__}")
        elif self.root is not None or self.patches:
            undone = self.root_name or "the files before it"
            allowed = "one whole recipe, first in the list"
            self._report(where or name, f'"{name}" is a whole recipe and would undo {undone}', allowed)
        else:
            mark_defaults(branch, grow(self.spec_type))
            self.root, self.root_name = branch, name

    def _add_file(self, path: Path, where: str) -> None:
        identity = identity_of(path)
        if identity in self.open_files:
            circle = [*self.open_files[self.open_files.index(identity) :], identity]
            given = "the files are bases of each other: " + " -> ".join(file.name for file in circle)
            self._report(where or str(path), given)
            return
        if str(identity) in self.done:
            return
        self.done.add(str(identity))
        if path.suffix == ".py" and self.python is not None:
            self._add_python(self.python, path, where)
            return
        if path.suffix == ".py":
            self._report(where or str(path), f'"{path.name}" is Python, which is never executed', "a .yaml file")
            return
        self.open_files.append(identity)
        try:
            self._add_data(load(read_text(path), str(path)), path)
        except RecipeError as error:
            self.problems += error.problems
        self.open_files.pop()

    def _add_python(self, read: Callable[[Path], S], path: Path, where: str) -> None:
        try:
            self._add_whole(branch_of(read(path), str(path)), str(path), where)
        except RecipeError as error:
            self.problems += error.problems

    def _add_data(self, data: Any, path: Path) -> None:
        fields = list(fields_of(self.spec_type))
        whole = None if self.foreign is None else self.foreign(path, data)
        if whole is not None:
            self._add_whole(branch_of(whole, str(path)), str(path), "")
        elif not isinstance(data, Table) or not data:
            given = "the file is empty" if not data else f"this is {given_text(data)}"
            self._report(str(path), given, "a mapping of base, set, remove")
        elif set(data) & set(_PATCH_KEYS) or not set(map(str, data)) & set(fields):
            self._add_patch(data, path)
        else:
            self._add_recipe_text(data, path)

    def _add_recipe_text(self, data: Table, path: Path) -> None:
        draft = Draft(grow(self.spec_type), {})
        for key, value in data.items():
            draft.set(str(key), value, Origin(name=str(path), line=data.lines[key]))
        self._add_whole(branch_of(draft.build(), str(path)), str(path), "")

    def _add_patch(self, data: Table, path: Path) -> None:
        for key in data:
            if key not in _PATCH_KEYS:
                remedy = nearest(str(key), _PATCH_KEYS)
                if key in fields_of(self.spec_type):
                    remedy = f"put it under set, as {key}.name: value"
                self._report(f"{path}:{data.lines[key]}", f'unknown key "{key}"', ", ".join(_PATCH_KEYS), remedy)
        self._add_bases(data, path)
        self.patches.append(
            _Patch(name=str(path), changes=self._changes(data, path), removals=tuple(self._removals(data, path)))
        )

    def _add_bases(self, data: Table, path: Path) -> None:
        bases = data.get("base")
        where = f"{path}:{data.lines['base']}: base" if "base" in data else f"{path}: base"
        for base in bases if isinstance(bases, list) else [] if bases is None else [bases]:
            if isinstance(base, str):
                self.add(base, path.parent, where)
            else:
                self._report(where, given_text(base), "the name of a recipe, a file, or a list of them")
        if self.root is None and not self.problems:
            allowed = "a recipe, a file, or a list of them: " + ", ".join(self.named)
            self._report(where, "the file does not say which recipe it changes", allowed)

    def _changes(self, data: Table, path: Path) -> Mapping[Any, Any]:
        changes = data.get("set")
        if changes is None or isinstance(changes, Table):
            return changes or {}
        self._report(f"{path}:{data.lines['set']}: set", given_text(changes), "a mapping of path: value")
        return {}

    def _removals(self, data: Table, path: Path) -> Iterator[tuple[str, int | None]]:
        removals = data.get("remove") or []
        line = data.lines.get("remove")
        for removal in removals if isinstance(removals, list) else [removals]:
            if isinstance(removal, str):
                yield removal, line
            else:
                self._report(f"{path}:{line}: remove", given_text(removal), "a list of paths")

    def _report(self, where: str, given: str, allowed: str = "", remedy: str = "") -> None:
        self.problems.append(Problem(where=where, given=given, allowed=allowed, remedy=remedy))


def _looks_like_file(source: str, folder: Path) -> bool:
    if source.endswith((".yaml", ".yml", ".py")) or "/" in source or "\\" in source:
        return True
    try:
        return (folder / source).is_file()
    except OSError:  # too long for a name
        return False
