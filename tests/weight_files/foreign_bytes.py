"""Files of other systems, written byte by byte: honest ones, and ones that no honest program would write."""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Mapping

NO_VIEW = "no view"


def value(content: object) -> bytes:
    """The operations of a pickle of protocol 2 that put a plain value on the stack."""
    return pickletools.optimize(pickle.dumps(content, protocol=2))[2:-1]


def name(module: str, attribute: str) -> bytes:
    return b"c" + f"{module}\n{attribute}\n".encode()


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


def mapping(**entries: bytes) -> bytes:
    return b"}(" + b"".join(value(key) + entry for key, entry in entries.items()) + b"u"


def pickled(operations: bytes, protocol: int = 2) -> bytes:
    return bytes((0x80, protocol)) + operations + b"."


def storage(kind: str = "FloatStorage", key: str = "0", elements: object = 6, view: object = NO_VIEW) -> bytes:
    parts = [value("storage"), name("torch", kind), value(key), value("cpu"), value(elements)]
    parts += [] if view is NO_VIEW else [value(view)]
    return b"(" + b"".join(parts) + b"tQ"


def tensor(
    of: bytes | None = None, offset: object = 0, shape: object = (2, 3), stride: object = (3, 1), version: str = "_v2"
) -> bytes:
    rebuild = name("torch._utils", f"_rebuild_tensor{version}")
    return call(
        rebuild, of or storage(), value(offset), value(shape), value(stride), value(False),
        call(name("collections", "OrderedDict")),
    )  # fmt: skip


def array(dtype: str = "f4", shape: object = (2,), data: bytes | str = bytes(8), order: str = "<") -> bytes:
    """An array of numpy as Python 2 wrote it, where `data` is a text."""
    made = call(name("numpy.core.multiarray", "_reconstruct"), name("numpy", "ndarray"), value((0,)), value("b"))
    kind = call(name("numpy", "dtype"), value(dtype), value(0), value(1))
    kind += value((3, order, None, None, None, -1, -1, 0)) + b"b"
    return made + b"(" + value(1) + value(shape) + kind + value(False) + short_bytes(data) + b"tb"


def short_bytes(data: bytes | str) -> bytes:
    content = data.encode("latin-1") if isinstance(data, str) else data
    return (b"U" if isinstance(data, str) else b"C") + bytes((len(content),)) + content


def torch_zip(operations: bytes, records: Mapping[str, bytes] | None = None, compression: int = 0) -> bytes:
    """An archive as torch.save writes it, of the operations and the records (six numbers from 0 on)."""
    records = {"data/0": struct.pack("<6f", *range(6))} if records is None else records
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression or zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickled(operations))
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
        for record, content in records.items():
            archive.writestr(f"archive/{record}", content)
    return buffer.getvalue()


def torch_legacy(
    operations: bytes, elements: Mapping[str, tuple[int, bytes]] | None = None, keys: object = None
) -> bytes:
    """Pickles in a row as torch.save wrote them before 1.6, then each storage: its number of elements and they."""
    elements = {"0": (6, struct.pack("<6f", *range(6)))} if elements is None else elements
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    heads = b"".join(pickle.dumps(head, protocol=2) for head in (0x1950A86A20F9469CFC6C, 1001, system))
    tail = pickle.dumps(list(elements) if keys is None else keys, protocol=2)
    data = b"".join(struct.pack("<q", count) + content for count, content in elements.values())
    return heads + pickled(operations) + tail + data


def safetensors_file(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data
