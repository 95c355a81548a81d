"""A part of a data set's classes: which are read, in what order, and under which labels.

Letters: K classes of the data set.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rcnn.errors import DataError, Problem, nearest
from rcnn.plain_records import ClassTable


@dataclass(frozen=True, kw_only=True)
class ChosenClasses:
    """The classes to read, by name. `table` are those that labels are of (a checkpoint's, the training split's); None:
    the chosen ones in their order, with the ids that the data have."""

    names: tuple[str, ...]
    table: ClassTable | None = None

    def among(self, own: ClassTable, source: Path) -> tuple[ClassTable, np.ndarray]:
        """The table, and the labels in it of a data set's own classes [K], -1 for those that are not read.

        Raises `DataError` for a name that the data or the table does not have.
        """
        problems = list(_missing(self.names, own, str(source), "the data have"))
        if self.table is not None:
            problems += _missing(self.names, self.table, str(source), "the checkpoint or training split has")
        if problems:
            raise DataError(problems)
        ids = dict(zip(own.names, own.category_ids, strict=True))
        table = self.table or ClassTable(names=self.names, category_ids=tuple(ids[name] for name in self.names))
        labels = [table.names.index(name) if name in self.names else -1 for name in own.names]
        return table, np.array(labels, np.int64)


def _missing(names: tuple[str, ...], table: ClassTable, where: str, whose: str) -> Iterator[Problem]:
    for name in names:
        if name not in table.names:
            given = f'the class "{name}" was chosen (data.classes), and {whose} none of that name'
            remedy = nearest(name, table.names) or "data.classes=null reads all that there are"
            yield Problem(where=where, given=given, allowed=", ".join(table.names), remedy=remedy)
