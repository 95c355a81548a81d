"""Proposals as a file: class-agnostic boxes by picture, in original pixels, written and read a piece at a time.

A safetensors file (see `tensor_file`), because it is the one format of the project: readable by any of its readers,
nothing in it can run, and a picture's proposals are one range of bytes. Its tensors, for N pictures and R proposals:

    image_ids [N], sizes [N, 2]      as in the annotation table they were made from
    name_bytes, name_starts [N + 1]  the file names (UTF-8), relative to the data set's root
    starts [N + 1]                   the proposals of picture i are the rows starts[i]:starts[i + 1]
    proposals [R, 5]                 float32 x1, y1, x2, y2, score, best first; [R, 4] where there are no scores

The header says what made them. 100,000 pictures of 1,000 proposals are 2 GB, of which a reader holds a few MB.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import rcnn
from rcnn.atomic_file import open_atomically
from rcnn.data.table import AnnotationTable, PackedStrings
from rcnn.data.tensor_file import TensorFile, TensorFileWriter, unusable
from rcnn.errors import DataError, Problem
from rcnn.plain_records import Size

KIND = "proposals"
LAYOUT = "1"
_TENSORS = ("image_ids", "sizes", "name_bytes", "name_starts", "starts", "proposals")
_DUMP = "make it anew: rcnn proposals dump CHECKPOINT --data DIR"
_ALLOWED = "0 <= x1 <= x2 <= width, 0 <= y1 <= y2 <= height, scores from 0 to 1, best first"
_FIRST_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class StoredProposals:
    """The proposals of one picture in its own pixels, best first. `scores` are probabilities; None: there are none."""

    boxes_xyxy: np.ndarray  # float32 [R, 4]
    scores: np.ndarray | None  # float32 [R]

    def __len__(self) -> int:
        return len(self.boxes_xyxy)


@dataclass(frozen=True, kw_only=True)
class ProposalOrigin:
    """What made the proposals: a checkpoint's file name and its resolved recipe as YAML, or any other name."""

    detector: str
    recipe: str = ""


class ProposalWriter:
    """Takes the proposals of a table's pictures in the table's order; made by `write_proposals`."""

    def __init__(self, writer: TensorFileWriter, path: Path, table: AnnotationTable, *, scored: bool) -> None:
        self._writer, self._path, self._table, self._scored = writer, path, table, scored
        self._counts = np.zeros(len(table), np.int64)
        self.num_pictures = 0

    @property
    def num_proposals(self) -> int:
        return self._writer.num_rows

    def add(self, proposals: StoredProposals) -> None:
        """The next picture's. Raises `DataError` for boxes that do not lie in it, and for what is no score."""
        name, size = self._table.file_names[self.num_pictures], self._table.size(self.num_pictures)
        columns = [np.asarray(proposals.boxes_xyxy, np.float32).reshape(-1, 4)]
        if self._scored:
            if proposals.scores is None:
                raise unusable(self._path, f"proposals without scores for {name}", allowed="all pictures with, or none")
            columns.append(np.asarray(proposals.scores, np.float32).reshape(-1, 1))
        rows = np.concatenate(columns, axis=1)
        if given := _mistakes(rows, size):
            raise DataError(Problem(where=f"proposals of {name}", given=given, allowed=_ALLOWED))
        self._writer.append(rows)
        self._counts[self.num_pictures] = len(rows)
        self.num_pictures += 1

    def finish(self) -> None:
        """Raises `DataError` where pictures were left out: one without proposals is added as empty."""
        if self.num_pictures != len(self._table):
            given = f"proposals of {self.num_pictures:,} pictures were written"
            raise unusable(self._path, given, allowed=f"one entry for each of the {len(self._table):,} pictures")
        self._writer.finish(starts=_starts(self._counts))


@contextmanager
def write_proposals(
    path: Path | str, table: AnnotationTable, *, origin: ProposalOrigin, scored: bool = True
) -> Iterator[ProposalWriter]:
    """A new file for the pictures of a table; it is there, whole, when the block has ended without an error.

    Memory does not grow with the number of proposals. Raises `RunError` where it cannot be written.
    """
    path = Path(path)
    with open_atomically(path) as file:
        writer = TensorFileWriter(
            file,
            metadata={
                "system": "rcnn",
                "kind": KIND,
                "layout": LAYOUT,
                "version": rcnn.__version__,
                "detector": origin.detector,
                "recipe": origin.recipe,
                "format": table.format,
                "split": table.split,
            },
            fixed={
                "image_ids": table.image_ids.astype(np.int64),
                "name_starts": table.file_names.starts.astype(np.int64),
                "starts": np.zeros(len(table) + 1, np.int64),
                "sizes": table.sizes.astype(np.int32),
                "name_bytes": _to_whole_words(table.file_names.buffer),
            },
            growing="proposals",
            dtype=np.dtype(np.float32),
            row_shape=(5 if scored else 4,),
        )
        proposals = ProposalWriter(writer, path, table, scored=scored)
        yield proposals
        proposals.finish()


class ProposalFile:
    """A file of proposals, open for reading: what is about pictures is in memory, proposals are read when asked for.

    Raises `DataError` for a file that is none, is cut short or does not fit together.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._tensors = TensorFile(self.path)
        _refuse_other_kinds(self._tensors)
        self.image_ids = self._tensors.read("image_ids")
        self.sizes = self._tensors.read("sizes")
        self.starts = self._tensors.read("starts")
        self.file_names = PackedStrings(
            buffer=self._tensors.read("name_bytes"), starts=self._tensors.read("name_starts")
        )
        self._refuse_disorder()

    def __len__(self) -> int:
        """Pictures."""
        return len(self.image_ids)

    @property
    def num_proposals(self) -> int:
        return int(self.starts[-1])

    @property
    def has_scores(self) -> bool:
        return self._tensors.shape("proposals") == (self.num_proposals, 5)

    @property
    def origin(self) -> ProposalOrigin:
        metadata = self._tensors.metadata
        return ProposalOrigin(detector=metadata.get("detector", ""), recipe=metadata.get("recipe", ""))

    @property
    def version(self) -> str:
        """Of the package that wrote it."""
        return self._tensors.metadata.get("version", "")

    @property
    def format(self) -> str:
        """Of the data set that it was made from."""
        return self._tensors.metadata.get("format", "")

    @property
    def split(self) -> str:
        return self._tensors.metadata.get("split", "")

    def size(self, index: int) -> Size:
        return Size(int(self.sizes[index, 0]), int(self.sizes[index, 1]))

    def __getitem__(self, index: int) -> StoredProposals:
        """Those of one picture. Raises `DataError` where they cannot be what they should be."""
        return self.read(index, index + 1)[0]

    def read(self, first: int, last: int) -> list[StoredProposals]:
        """Those of the pictures `first:last`, in one go. Raises `DataError` that names every picture of trouble."""
        rows = self._tensors.rows("proposals", int(self.starts[first]), int(self.starts[last]))
        ends = (self.starts[first + 1 : last + 1] - self.starts[first]).tolist()
        pieces = np.split(rows, ends[:-1]) if ends else []
        problems = [
            Problem(where=f"{self.path}, picture {self.file_names[index]}", given=given, allowed=_ALLOWED, remedy=_DUMP)
            for index, piece in enumerate(pieces, start=first)
            if (given := _mistakes(piece, self.size(index)))
        ]
        if problems:
            raise DataError(problems)
        return [_stored(piece) for piece in pieces]

    def verify(self, *, most_pictures: int | None = None, pictures_at_once: int = 256) -> None:
        """Reads all of it, or of a larger file `most_pictures` in pieces from its beginning to its end; raises
        `DataError` that names every picture with a box or score that cannot be."""
        problems: list[Problem] = []
        for first in _spread(len(self), most_pictures, pictures_at_once):
            try:
                self.read(first, min(first + pictures_at_once, len(self)))
            except DataError as error:
                problems += error.problems
        if problems:
            raise DataError(problems)

    def _refuse_disorder(self) -> None:
        count, shape = len(self), self._tensors.shape("proposals") or ()
        names = self.file_names
        fits = (
            self.sizes.shape == (count, 2)
            and self.starts.shape == names.starts.shape == (count + 1,)
            and len(shape) == 2
            and shape[1] in (4, 5)
            and _rises(self.starts, shape[0])
            and _rises(names.starts, int(names.starts[-1]))
            and names.starts[-1] <= len(names.buffer)
        )
        if not fits:
            raise unusable(self.path, "damaged: the numbers of its pictures, names and rows do not agree", _DUMP)


class TableProposals:
    """The proposals of a table's pictures from a file; `limit`: only the best so many of each picture.

    The file may hold more pictures. Raises `DataError` where pictures are missing in it or have another size.
    """

    def __init__(self, file: ProposalFile, table: AnnotationTable, *, limit: int | None = None) -> None:
        self.file = file
        self.limit = limit
        self._rows = _rows_of(file, table)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> StoredProposals:
        """Those of the table's picture `index`. Raises `DataError`, as `ProposalFile`."""
        found = self.file[int(self._rows[index])]
        if self.limit is None or len(found) <= self.limit:
            return found
        scores = None if found.scores is None else found.scores[: self.limit]
        return StoredProposals(boxes_xyxy=found.boxes_xyxy[: self.limit], scores=scores)


def open_proposals(path: Path | str, table: AnnotationTable, *, limit: int | None = None) -> TableProposals:
    """The file at `path` for the pictures of a table. Raises `DataError`."""
    return TableProposals(ProposalFile(path), table, limit=limit)


def pictures_of_file(file: ProposalFile, table: AnnotationTable) -> AnnotationTable:
    """The table's pictures that the file is about. Raises `DataError` where the table lacks some of them."""
    places = {identity: index for index, identity in enumerate(_identities_of_table(table, file))}
    chosen = [places.get(identity) for identity in _identities_of_file(file, table)]
    missing = [file.file_names[row] for row, index in enumerate(chosen) if index is None]
    if missing:
        given = f"{len(missing):,} of its {len(file):,} pictures are not in the data, the first {_first(missing)}"
        raise DataError(Problem(where=str(file.path), given=given, allowed=_described(table), remedy=_OTHER_DATA))
    return table.select(sorted(index for index in chosen if index is not None))


_OTHER_DATA = "give the data that it was made from, or make it anew: rcnn proposals dump CHECKPOINT --data DIR"


def _rows_of(file: ProposalFile, table: AnnotationTable) -> np.ndarray:
    """int64 [N]: where the file has each picture of the table."""
    places = {identity: row for row, identity in enumerate(_identities_of_file(file, table))}
    rows = [places.get(identity) for identity in _identities_of_table(table, file)]
    missing = [table.file_names[index] for index, row in enumerate(rows) if row is None]
    if missing:
        raise DataError(_missing_problem(file, table, missing))
    found = np.array(rows, np.int64)
    other = np.flatnonzero((file.sizes[found] != table.sizes).any(axis=1))
    if len(other):
        first = int(other[0])
        there, here = file.size(int(found[first])), table.size(first)
        given = (
            f"{len(other):,} pictures had another size when it was made, the first {table.file_names[first]}: "
            f"{there.width} x {there.height}, now {here.width} x {here.height}"
        )
        raise DataError(Problem(where=str(file.path), given=given, remedy=_OTHER_DATA))
    return found


def _missing_problem(file: ProposalFile, table: AnnotationTable, missing: list[str]) -> Problem:
    extra = len(file) - (len(table) - len(missing))
    given = (
        f"{len(missing):,} of the {len(table):,} pictures of the data are not in it, the first {_first(missing)}; "
        f"it has {extra:,} others"
    )
    names = {file.file_names[row] for row in range(len(file))}
    if missing[0] in names:
        given += " (some have the same name, in another split or with another id)"
    elif extra:
        given += f", such as {file.file_names[0]}"
    allowed = f'proposals for {_described(table)}; these are for split "{file.split}" of {file.format} data'
    return Problem(where=str(file.path), given=given, allowed=allowed, remedy=_OTHER_DATA)


def _described(table: AnnotationTable) -> str:
    return f'split "{table.split}" ({len(table):,} pictures) in {table.root}'


def _first(names: list[str]) -> str:
    return ", ".join(names[:_FIRST_NAMED]) + (", ..." if len(names) > _FIRST_NAMED else "")


# A picture's file name, and what else it takes to tell it from others.
Identity = tuple[str | int, ...]


def _identities_of_file(file: ProposalFile, table: AnnotationTable) -> Iterator[Identity]:
    return _identities(file.file_names, file.image_ids, file.split, (file.format, table.format))


def _identities_of_table(table: AnnotationTable, file: ProposalFile) -> Iterator[Identity]:
    return _identities(table.file_names, table.image_ids, table.split, (file.format, table.format))


def _identities(names: PackedStrings, ids: np.ndarray, split: str, formats: tuple[str, str]) -> Iterator[Identity]:
    """VOC's names are those of the whole data set. Others are relative to the folder of their split, where pictures are
    often numbered from 1: train/1.jpg and val/1.jpg are both 1.jpg. Ids are of the source in COCO data alone."""
    for index, image_id in enumerate(ids.tolist()):
        match formats:
            case ("VOC", "VOC"):
                yield (names[index],)
            case ("COCO", "COCO"):
                yield names[index], split, image_id
            case _:
                yield names[index], split


def _refuse_other_kinds(tensors: TensorFile) -> None:
    metadata, path = tensors.metadata, tensors.path
    if metadata.get("kind") != KIND:
        kind = "a checkpoint" if metadata.get("kind") == "detector" else "another safetensors file"
        raise unusable(path, f"{kind}, not proposals", _DUMP)
    if metadata.get("layout") != LAYOUT:
        given = f"layout {metadata.get('layout')}, written by rcnn {metadata.get('version')}"
        raise unusable(path, given, _DUMP, allowed=f"layout {LAYOUT}: this is rcnn {rcnn.__version__}")
    missing = [name for name in _TENSORS if tensors.shape(name) is None]
    if missing:
        raise unusable(path, f"damaged: it has no {', '.join(missing)}", _DUMP)


def _mistakes(rows: np.ndarray, size: Size) -> str:
    """What is wrong with a picture's rows; empty where nothing is. The file is float32, and so are these bounds."""
    boxes, scores = rows[:, :4], rows[:, 4:]
    x1, y1, x2, y2 = boxes.T
    finite = np.isfinite(boxes).all(axis=1)
    outside = finite & ((boxes[:, :2] < 0).any(axis=1) | (x2 > size.width) | (y2 > size.height))
    kinds = {
        "not a number": ~finite,
        f"outside the picture of {size.width} x {size.height}": outside,
        "reversed": finite & ~outside & ((x1 > x2) | (y1 > y2)),
    }
    found = [
        f"{int(wrong.sum()):,} of {len(rows):,} boxes are {kind}, the first {_corners(boxes[wrong][0])}"
        for kind, wrong in kinds.items()
        if wrong.any()
    ]
    no_scores = ~((scores >= 0) & (scores <= 1))
    if no_scores.any():
        found.append(f"{int(no_scores.sum()):,} scores are not from 0 to 1, the first {scores[no_scores][0]:g}")
    elif (scores[1:] > scores[:-1]).any():
        found.append("scores are not best first")
    return ", ".join(found)


def _corners(box: np.ndarray) -> str:
    return f"({', '.join(f'{value:g}' for value in box.tolist())})"


def _stored(rows: np.ndarray) -> StoredProposals:
    return StoredProposals(boxes_xyxy=rows[:, :4], scores=rows[:, 4] if rows.shape[1] == 5 else None)


def _starts(counts: np.ndarray) -> np.ndarray:
    starts = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=starts[1:])
    return starts


def _spread(count: int, most: int | None, step: int) -> list[int]:
    """Where pieces of `step` begin: all of them, or so many that they hold `most`, evenly apart with both ends."""
    if most is None or count <= most:
        return list(range(0, count, step))
    return np.unique(np.linspace(0, count - step, -(-most // step), dtype=np.int64)).tolist()


def _rises(starts: np.ndarray, last: int) -> bool:
    return bool(starts[0] == 0 and starts[-1] == last and (np.diff(starts) >= 0).all())


def _to_whole_words(buffer: np.ndarray) -> np.ndarray:
    """Zeros at the end, so that the tensor behind begins at a multiple of 8 bytes."""
    return np.concatenate([buffer, np.zeros(-len(buffer) % 8, np.uint8)])
