"""What a pickle of another system may become here: plain values, tensors that are not read yet, and stand-ins."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

_MAX_DIMENSIONS = 32
_MAX_ELEMENTS = 1 << 48
_SHOWN = 120


def printable(text: object) -> str:
    """A text of the file as a message may show it: one line, short, no control characters."""
    shown = ascii(str(text))[1:-1]
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."


class Budget:
    """How much a file may make us copy, so that a small one cannot have a large text copied a million times."""

    def __init__(self, amount: int) -> None:
        self._left = amount

    def spend(self, amount: int) -> None:
        """Raises ValueError where nothing is left."""
        self._left -= amount
        if self._left < 0:
            raise ValueError("it unfolds into far more than the file holds")


@dataclass(frozen=True, kw_only=True)
class Inert:
    """Stands for a class, a function or an object that was neither imported nor called; only its name is kept."""

    name: str


@dataclass(frozen=True, kw_only=True)
class Known:
    """A class or function that the tables of `pickled_names` replace by one of ours."""

    name: str
    call: Callable[[Budget, tuple[object, ...]], object]


class Attributed(dict[object, object]):
    """A mapping of the file and the attributes set on it: torch's state dicts carry `_metadata` that way."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # pyright: ignore[reportCallIssue, reportArgumentType]
        self.attributes: dict[object, object] = {}


class Attributes(dict[object, object]):
    """An object that is nothing but its attributes: argparse.Namespace."""


@dataclass(frozen=True, kw_only=True)
class StorageKind:
    """What a class of torch's storages holds; `dtype` is None for bytes whose type the tensor tells."""

    dtype: torch.dtype | None


@dataclass(frozen=True, kw_only=True)
class PickledStorage:
    """A run of elements in the file. `start` and `count` are those of a view, in elements, of `whole` in all."""

    key: str
    dtype: torch.dtype | None
    whole: int
    start: int
    count: int


@dataclass(frozen=True, kw_only=True)
class PickledTensor:
    """A tensor that the file describes; its elements are read by `to_tensor`. Bounds are checked when it is made."""

    storage: PickledStorage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def to_tensor(self, read_storage: Callable[[PickledStorage], Tensor]) -> Tensor:
        """`read_storage` gives the bytes of a whole storage, at least `whole` elements of them."""
        data = read_storage(self.storage).view(self.dtype)
        return data.as_strided(self.shape, self.stride, self.storage.start + self.offset)


def pickled_tensor(
    storage: object, offset: object, shape: object, stride: object, dtype: torch.dtype | None = None
) -> PickledTensor:
    """Raises ValueError where the tensor would reach beyond its storage."""
    if not isinstance(storage, PickledStorage):
        raise ValueError("a tensor without a storage")
    kind = dtype or storage.dtype
    if kind is None:
        raise ValueError("a tensor without a type")
    sizes, strides, (first,) = counts(shape), counts(stride), counts((offset,))
    if len(sizes) != len(strides):
        raise ValueError(f"a tensor of {len(sizes)} dimensions and {len(strides)} strides")
    last = first + sum((size - 1) * step for size, step in zip(sizes, strides, strict=True))
    # Of bytes without a type the number of elements is that of bytes.
    available = storage.count if storage.dtype is not None else storage.count // kind.itemsize
    if math.prod(sizes) and last >= available:
        raise ValueError(f"a tensor that ends at element {last + 1} of a storage of {available}")
    return PickledTensor(storage=storage, dtype=kind, offset=first, shape=sizes, stride=strides)


def counts(values: object) -> tuple[int, ...]:
    """Sizes, strides or offsets: whole numbers from 0 on, few and small enough to be a tensor's. Else ValueError."""
    if not isinstance(values, tuple | list) or len(values) > _MAX_DIMENSIONS:
        raise ValueError(f"a shape that is not a tuple of at most {_MAX_DIMENSIONS} numbers")
    if not all(type(value) is int and 0 <= value <= _MAX_ELEMENTS for value in values):
        raise ValueError("a shape, stride or offset that is negative, too large or no whole number")
    if math.prod(value for value in values if value) > _MAX_ELEMENTS:
        raise ValueError("a shape, stride or offset that is too large")
    return tuple(values)


@dataclass(kw_only=True)
class PickledDType:
    """A numeric type of numpy. `order` is < or > once the file has said so."""

    code: str
    order: str = "="


@dataclass(kw_only=True)
class PickledArray:
    """An array of numpy; the file makes it empty and fills it later. Without a `dtype` it holds what cannot be read."""

    dtype: PickledDType | None = None
    shape: tuple[int, ...] = ()
    fortran: bool = False
    data: bytes | bytearray | str = field(default=b"", repr=False)

    @property
    def num_bytes(self) -> int:
        return len(self.data)

    def fill(self, dtype: object, shape: object, fortran: bool, data: object) -> None:
        """`data` are bytes, or Python 2's as text in latin-1. Raises ValueError where they are not the shape's."""
        if not isinstance(dtype, PickledDType) or not isinstance(data, bytes | bytearray | str):
            return
        sizes = counts(shape)
        expected = math.prod(sizes) * np.dtype(dtype.code).itemsize
        if len(data) != expected:
            raise ValueError(f"an array of shape {sizes} with {len(data)} bytes where it needs {expected}")
        self.dtype, self.shape, self.fortran, self.data = dtype, sizes, fortran, data

    def to_tensor(self) -> Tensor:
        """A copy. The type must be one that torch has."""
        assert self.dtype is not None
        data = self.data.encode("latin-1") if isinstance(self.data, str) else self.data
        stored = np.frombuffer(data, np.dtype(self.dtype.code).newbyteorder(self.dtype.order))  # pyright: ignore[reportArgumentType]
        shaped = stored.reshape(self.shape, order="F" if self.fortran else "C")
        return torch.from_numpy(np.array(shaped, dtype=np.dtype(self.dtype.code), order="C"))
