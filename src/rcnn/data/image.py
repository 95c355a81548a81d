"""Picture files as RGB tensors: one reader for every format, so that all parts see the same pixels.

Pillow decodes (torchvision's decoders are no faster, and deprecated since 0.29): its JPEG pixels are libjpeg-turbo's,
those that torchvision, detectron2 and simple-faster-rcnn-pytorch see. An EXIF orientation is applied, as detectron2
and ultralytics do: a picture is what a person sees in a viewer. Nothing is repaired: a file that is cut short is an
error.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageOps, PngImagePlugin

from rcnn.errors import ImageError, Problem
from rcnn.plain_records import Size

if TYPE_CHECKING:
    from torch import Tensor

# What the picture files of a folder are recognised by.
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"})

_BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error, zlib.error)
_SIXTEEN_BITS = frozenset({"I;16", "I;16L", "I;16B", "I;16N"})
_QUARTER_TURNS = frozenset({5, 6, 7, 8})
# In the entropy-coded part of a JPEG a 255 is followed by 0 (a stuffed byte), a restart number, or ends the part.
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")


def read_image(path: Path | str) -> UInt8[Tensor, "3 height width"]:
    """The picture upright in RGB, 0 to 255.

    Alpha is dropped, grey is repeated, 16 bits keep their high byte (white stays white), CMYK and palettes are
    converted. Raises `ImageError` with the path for a file that is absent, empty, cut short, or no picture.
    """
    return _as_tensor(_decode(Path(path), _read_bytes(Path(path))))


def upright_rgb(image: Image.Image, where: str) -> UInt8[Tensor, "3 height width"]:
    """A picture that Pillow has opened, as `read_image` gives it: upright, RGB, 0 to 255. Raises `ImageError`."""
    try:
        image.load()
        upright = ImageOps.exif_transpose(image)
    except _BROKEN as error:
        raise _unreadable(Path(where), error, -1) from error
    return _as_tensor(_to_rgb(where, upright))


def _as_tensor(image: Image.Image) -> Tensor:
    import torch  # here, because the checks of a folder read the heads of pictures without it

    return torch.from_numpy(np.array(image)).permute(2, 0, 1)  # copied: the tensor may be written to


def read_image_size(path: Path | str) -> Size:
    """Height and width of the picture upright, from the head of the file: nothing is decoded."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.format != "TIFF" and _orientation(image) in _QUARTER_TURNS
    except (*_BROKEN, Image.DecompressionBombError) as error:
        raise _unreadable(Path(path), error) from error
    return Size(width, height) if turned else Size(height, width)


def is_turned_by_exif(path: Path | str) -> bool:
    """Whether a viewer turns or mirrors the stored pixels."""
    try:
        with Image.open(path) as image:
            return _orientation(image) not in (None, 1)
    except (*_BROKEN, Image.DecompressionBombError) as error:
        raise _unreadable(Path(path), error) from error


def _orientation(image: Image.Image) -> int | None:
    if isinstance(image, PngImagePlugin.PngImageFile) and not _png_may_have_exif(image):
        return None
    return image.getexif().get(ExifTags.Base.Orientation)


def _png_may_have_exif(image: PngImagePlugin.PngImageFile) -> bool:
    """Whether a PNG has EXIF data. Pillow decodes the whole picture to find out; the list of its chunks says it too."""
    file = image.fp
    if file is None:
        return True
    place = file.tell()
    file.seek(8)
    found = False
    while not found and len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        start = file.tell()
        old = kind in (b"tEXt", b"zTXt", b"iTXt") and file.read(21) == b"Raw profile type exif"
        found = old or kind == b"eXIf"
        file.seek(start + length + 4)  # the data and their checksum
    file.seek(place)
    return found


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def _decode(path: Path, data: bytes) -> Image.Image:
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.format in ("JPEG", "MPO") and not _jpeg_is_whole(data):
                raise OSError("the JPEG ends before its end marker")
            image.load()
            return _to_rgb(str(path), ImageOps.exif_transpose(image))
    except ImageError:
        raise
    except (*_BROKEN, Image.DecompressionBombError) as error:
        raise _unreadable(path, error, len(data)) from error


def _to_rgb(where: str, image: Image.Image) -> Image.Image:
    if image.mode in _SIXTEEN_BITS or (image.mode == "I" and image.format == "PNG"):
        return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ImageError(
            Problem(
                where=where,
                given="the picture has 32 bits per pixel, which says nothing about what is white",
                allowed="8 or 16 bits per channel",
                remedy="convert it to 8 or 16 bits with the range you want",
            )
        )
    if image.mode == "P" and "transparency" in image.info:
        # Pillow warns about the direct way, and gives the same colours.
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


def _jpeg_is_whole(data: bytes) -> bool:
    """Whether the file has its end marker. Pillow finds most cuts itself, but not one that was filled up with zeros."""
    if data.endswith(b"\xff\xd9"):
        return True
    position = 2
    while position + 4 <= len(data):
        marker = _JPEG_MARKER.search(data, position)
        if marker is None:
            return False
        code = data[marker.start() + 1]
        if code == 0xD9:
            return True
        position = marker.end()
        if code not in (0x01, 0xD8):
            position += int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return False


def _unreadable(path: Path, error: BaseException, num_bytes: int | None = None) -> ImageError:
    where = str(path)
    if isinstance(error, FileNotFoundError):
        return ImageError(Problem(where=where, given="there is no such file", remedy="check the path"))
    if isinstance(error, IsADirectoryError):
        return ImageError(Problem(where=where, given="this is a folder", allowed="a picture file"))
    if isinstance(error, PermissionError):
        return ImageError(Problem(where=where, given="the file may not be read", remedy="check its permissions"))
    if isinstance(error, Image.DecompressionBombError):
        return ImageError(Problem(where=where, given=f"{error}", remedy="cut the picture into tiles"))
    if num_bytes == 0 or (num_bytes is None and path.is_file() and path.stat().st_size == 0):
        return ImageError(Problem(where=where, given="the file is empty (0 bytes)", remedy="fetch or export it again"))
    if isinstance(error, Image.UnidentifiedImageError):
        return ImageError(
            Problem(where=where, given="this is no picture that can be read", allowed="JPEG, PNG, WebP, BMP, TIFF, GIF")
        )
    return ImageError(
        Problem(where=where, given=f"the file is cut short or damaged ({error})", remedy="fetch or export it again")
    )
