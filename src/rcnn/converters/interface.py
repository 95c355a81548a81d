"""What a system is to the converter: how its files are known, what they hold, and how ours become theirs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rcnn.converters.key_map import Converted, KeyMap
from rcnn.errors import CheckpointError, Problem
from rcnn.recipes.recipe import Recipe
from rcnn.records import ClassTable
from rcnn.weight_files.foreign_file import ForeignFile


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the user says of a file that its keys cannot tell."""

    recipe_name: str | None = None
    recipe: Recipe | None = None
    """The recipe of that name, or of a config of the system (`--config`)."""
    class_names: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class ForeignModel:
    """What a file holds: the recipe that builds it, with the conventions of its system, its classes and its tensors.

    `tensors` have the names of the system's newest release. `key_map` makes the table of their names for the recipe as
    the user changed it. `assumptions` are what neither keys nor user told, a sentence each.
    """

    recipe_name: str
    recipe: Recipe
    classes: ClassTable
    tensors: Mapping[str, Tensor]
    key_map: Callable[[Recipe], KeyMap]
    assumptions: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ForeignBackbone:
    """A backbone's weights alone, converted to what `detector.backbone.weights` takes.

    `settings` are what a recipe with these weights has: the pixels and strides that they were trained with.
    """

    title: str
    converted: Converted
    settings: tuple[str, ...] = ()


class UnnamedClasses(CheckpointError):
    """A detector of `count` classes whose names neither file nor user says."""

    def __init__(self, problems: Problem | Iterable[Problem], *, count: int) -> None:
        super().__init__(problems)
        self.count = count


class AbstractSystem(ABC):
    """A system whose checkpoints are read here, and written where the structure allows."""

    name: ClassVar[str]
    """As `--from` and `--to` have it."""

    @abstractmethod
    def signs(self, file: ForeignFile) -> str | None:
        """Why the file is of this system (the keys that only it has); None where it is not."""

    @abstractmethod
    def recognise(self, file: ForeignFile, wanted: Wanted) -> ForeignModel:
        """What the file holds. Raises `CheckpointError` where it is no detector that can be built here."""

    def recognise_backbone(self, file: ForeignFile) -> ForeignBackbone | None:
        """Weights that a backbone starts from, where the file holds these alone; None where it is a detector's."""
        return None

    def export(
        self, state: Mapping[str, Tensor], recipe: Recipe, classes: ClassTable | None = None
    ) -> dict[str, object]:
        """A state dict of ours as the object that this system loads, with the names of its classes where files of that
        system have them. Raises `CheckpointError` where it cannot be."""
        given = f"a detector that is to go to {self.name}"
        raise CheckpointError(Problem(where="--to", given=given, allowed="torchvision, mmdet or detectron2"))
