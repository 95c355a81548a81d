"""The records without tensors: reading and evaluating data needs only these, and so neither torch's time nor memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Size(NamedTuple):
    """Height and width in pixels."""

    height: int
    width: int


@dataclass(frozen=True, kw_only=True)
class ClassTable:
    """The classes of a data set or a checkpoint, in the order of the labels 0..K-1; the only truth about classes.

    `category_ids` are the ids of the source (COCO's 1..90 with gaps); 1..K where it has none.
    """

    names: tuple[str, ...]
    category_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.category_ids:
            object.__setattr__(self, "category_ids", tuple(range(1, len(self.names) + 1)))

    def __len__(self) -> int:
        return len(self.names)
