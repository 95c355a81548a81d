"""All annotations of a data set as a few flat arrays: small, quick to make, and shared (not copied) by workers.

Letters: N images, M annotations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from rcnn.data.findings import Findings
from rcnn.errors import DataError, Problem
from rcnn.plain_records import ClassTable, Size


@dataclass(frozen=True, kw_only=True)
class PackedStrings:
    """Many strings as one buffer: forked workers share it, where a list of `str` is copied by reference counts.

    A name of a file need not be text: bytes that are not UTF-8 are surrogates in Python's strings, and are kept.
    """

    buffer: np.ndarray  # uint8, the UTF-8 bytes of all strings, surrogates among them
    starts: np.ndarray  # int64 [N + 1]

    @classmethod
    def pack(cls, strings: Sequence[str]) -> PackedStrings:
        encoded = [string.encode(errors="surrogatepass") for string in strings]
        starts = np.zeros(len(encoded) + 1, np.int64)
        np.cumsum([len(text) for text in encoded], out=starts[1:])
        return cls(buffer=np.frombuffer(b"".join(encoded), np.uint8), starts=starts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> str:
        return self.buffer[self.starts[index] : self.starts[index + 1]].tobytes().decode(errors="surrogatepass")


@dataclass(frozen=True, kw_only=True)
class AnnotationTable:
    """A data set: boxes are in original pixels, x1 y1 x2 y2, continuous coordinates (VOC's 1-based ones already moved).

    The annotations of image i are the rows `starts[i]:starts[i + 1]`. `ignored` rows (crowd, difficult) are neither
    right nor wrong. `areas` is what the source states (COCO: the segment's area) or the area of the box.
    """

    classes: ClassTable
    root: Path
    format: str  # "COCO", "VOC" or "YOLO"
    split: str
    image_ids: np.ndarray  # int64 [N], unique
    file_names: PackedStrings  # relative to root
    sizes: np.ndarray  # int32 [N, 2], height and width of the picture as stored in the annotations; 0 where not stated
    starts: np.ndarray  # int64 [N + 1]
    boxes_xyxy: np.ndarray  # float64 [M, 4]
    labels: np.ndarray  # int64 [M], 0..K-1
    ignored: np.ndarray  # bool [M]
    areas: np.ndarray  # float64 [M]
    findings: Findings = field(default_factory=Findings)  # what the reader left out or cut; empty where nothing

    def __len__(self) -> int:
        return len(self.image_ids)

    def path(self, index: int) -> Path:
        return self.root / self.file_names[index]

    def size(self, index: int) -> Size:
        return Size(int(self.sizes[index, 0]), int(self.sizes[index, 1]))

    def rows(self, index: int) -> slice:
        return slice(int(self.starts[index]), int(self.starts[index + 1]))

    def check_size(self, index: int, size: Size) -> None:
        """Raise `DataError` where a picture has not the size that its annotations state."""
        stated = self.size(index)
        if size == stated:
            return
        given = (
            f"the picture has {size.width} x {size.height} pixels, its annotations say {stated.width} x {stated.height}"
        )
        remedy = "annotate the picture anew, or correct the stated size"
        if size == (stated.width, stated.height):
            given += " (EXIF-rotated: the annotations were made on the unturned pixels)"
            remedy = "turn the stored pixels and delete the EXIF orientation, or turn the annotations"
        raise DataError(Problem(where=str(self.path(index)), given=given, remedy=remedy))

    def select(self, indices: Sequence[int] | np.ndarray) -> AnnotationTable:
        """The pictures at `indices`, in that order, with their annotations."""
        chosen = np.asarray(indices, np.int64)
        counts = self.starts[chosen + 1] - self.starts[chosen]
        starts = np.zeros(len(chosen) + 1, np.int64)
        np.cumsum(counts, out=starts[1:])
        rows = np.arange(starts[-1]) + np.repeat(self.starts[chosen] - starts[:-1], counts)
        return replace(
            self,
            image_ids=self.image_ids[chosen],
            file_names=PackedStrings.pack([self.file_names[int(index)] for index in chosen]),
            sizes=self.sizes[chosen],
            starts=starts,
            boxes_xyxy=self.boxes_xyxy[rows],
            labels=self.labels[rows],
            ignored=self.ignored[rows],
            areas=self.areas[rows],
        )
