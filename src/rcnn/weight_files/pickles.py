"""Pickles of other systems, read as data by a machine of our own: no class of theirs is imported, no function called.

Python's own unpickler resolves names and calls what it finds, and its memory follows numbers in the file. torch's
`weights_only` calls a short list of functions, among them ones that allocate what a number in the file says, and
refuses MMDetection's files for what lies beside the weights. The machine here (`pickle_machine`) builds nothing but
plain values (`pickled_values`); the names that a file uses are looked up in tables (`pickled_names`), and a file that
wants more is refused with all the names that it wanted.

A file is bounded: by the number of its operations, by what is copied for it, and by lengths that end with the file.
"""

from __future__ import annotations

import io
from typing import IO, BinaryIO, cast

from rcnn.errors import CheckpointError, Problem
from rcnn.weight_files.pickle_machine import LoadPersistent, PickleMachine
from rcnn.weight_files.pickled_values import Budget, printable

STARTS = tuple(bytes((0x80, protocol)) for protocol in range(2, 6))
"""How a pickle of protocol 2 to 5 begins. Older ones cannot be told from text."""

_SAVE_AGAIN = (
    "where you trust it, load it where it was made and save the weights alone: torch.save(model.state_dict(), FILE)"
)


class BoundedReader:
    """A file up to `end`: a length beyond it reads what there is, and reserves no memory for the rest."""

    def __init__(self, file: BinaryIO, end: int) -> None:
        self._file = file
        self._end = end

    def read(self, size: int = -1) -> bytes:
        left = max(self._end - self._file.tell(), 0)
        return self._file.read(left if size < 0 else min(size, left))

    def readline(self) -> bytes:
        return self._file.readline(max(self._end - self._file.tell(), 0))

    def tell(self) -> int:
        return self._file.tell()

    def skip(self, size: int) -> None:
        self._file.seek(size, io.SEEK_CUR)


Source = BinaryIO | BoundedReader


def read_pickle(
    source: Source,
    *,
    where: str,
    budget: Budget,
    load_persistent: LoadPersistent | None = None,
) -> object:
    """The next pickle of `source`, which is left behind its end.

    `load_persistent` makes what the file keeps outside of the pickle: torch's storages. Raises `CheckpointError` for a
    file that wants what is not allowed, with every name, and for one that is damaged.
    """
    machine = PickleMachine(budget, load_persistent)
    try:
        value = machine.run(cast(IO[bytes], source))
    except Exception as error:  # the bytes of a damaged pickle are a program: it can end in any error
        if not machine.wanted:
            given = f"damaged, or not what it claims to be (at byte {machine.position}: {_reason(error)})"
            raise CheckpointError(Problem(where=where, given=given, remedy="take another copy of the file")) from error
    else:
        if not machine.wanted:
            return value
    raise CheckpointError(
        Problem(
            where=where,
            given=f"it wants {printable(name)}, which is no data and could run code; nothing in the file was run",
            allowed="tensors, arrays and plain values",
            remedy=_SAVE_AGAIN,
        )
        for name in machine.wanted
    )


def _reason(error: Exception) -> str:
    return printable(error) if type(error) is ValueError else f"{type(error).__name__} {printable(error)}".strip()
