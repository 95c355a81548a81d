from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from rcnn.data.image import is_turned_by_exif, read_image, read_image_size
from rcnn.errors import ImageError


@pytest.fixture
def photograph(shared: Path) -> Image.Image:
    return Image.open(shared / "oracles/inputs/astronaut_300x360.png").convert("RGB")


def pixels_of(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


# torchvision's decoders are deprecated since 0.29; as a second opinion on pixels they still serve.
old_decoder = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")


@old_decoder
@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"subsampling": 2, "progressive": True}, {"quality": 20}])
def test_jpeg_is_what_torchvision_decodes(tmp_path: Path, photograph: Image.Image, options: dict) -> None:
    path = tmp_path / "a.jpg"
    photograph.save(path, **options)
    assert torch.equal(read_image(path), torchvision.io.decode_image(str(path), mode="RGB"))
    assert read_image_size(path) == (360, 300)


@old_decoder
def test_real_jpegs_are_what_torchvision_decodes(shared: Path) -> None:
    paths = sorted((shared / "data/coco_mini/val2017").glob("*.jpg"))[:20]
    assert len(paths) == 20
    for path in paths:
        expected = torchvision.io.decode_image(str(path), mode="RGB")
        assert torch.equal(read_image(path), expected)
        assert read_image_size(path) == expected.shape[1:]


def test_the_tensor_is_uint8_and_may_be_written_to(tmp_path: Path) -> None:
    Image.new("RGB", (4, 3), (1, 2, 3)).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    image += 1
    assert image.dtype == torch.uint8
    assert image.shape == (3, 3, 4)
    assert image[:, 0, 0].tolist() == [2, 3, 4]


def test_alpha_is_dropped(tmp_path: Path) -> None:
    Image.new("RGBA", (2, 2), (10, 20, 30, 0)).save(tmp_path / "rgba.png")
    Image.new("LA", (2, 2), (40, 0)).save(tmp_path / "la.png")
    assert read_image(tmp_path / "rgba.png")[:, 0, 0].tolist() == [10, 20, 30]
    assert read_image(tmp_path / "la.png")[:, 0, 0].tolist() == [40, 40, 40]


def test_palettes_with_and_without_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "plain.png")
    image.save(tmp_path / "bytes.png", transparency=b"\x00\x80")
    image.save(tmp_path / "index.gif", transparency=0)
    for name in ("plain.png", "bytes.png", "index.gif"):
        read = read_image(tmp_path / name)
        assert read[:, 0, 0].tolist() == [255, 0, 0]
        assert read[:, 0, 1].tolist() == [0, 0, 255]


def test_grey_and_black_and_white(tmp_path: Path) -> None:
    Image.new("L", (2, 2), 77).save(tmp_path / "grey.jpg", quality=100)
    Image.new("1", (2, 2), 1).save(tmp_path / "bits.png")
    assert read_image(tmp_path / "grey.jpg").flatten().tolist() == [77] * 12
    assert read_image(tmp_path / "bits.png").flatten().tolist() == [255] * 12


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_keep_their_high_byte(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 255, 256, 0x8000, 0xFFFF]], np.uint16)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    image = read_image(tmp_path / f"a.{suffix}")
    assert image[0].tolist() == [[0, 0, 1, 128, 255]]
    assert torch.equal(image[0], image[2])


def test_16_bit_colour_keeps_its_high_byte(tmp_path: Path) -> None:
    values = torch.tensor([[0, 0x1234, 0xFFFF]], dtype=torch.int32).to(torch.uint16)

    # A PNG of 16-bit RGB by hand: Pillow cannot write one.
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = b"\x00" + values.numpy().astype(">u2").tobytes()
    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    (tmp_path / "a.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    )
    assert read_image(tmp_path / "a.png").flatten().tolist() == [0, 0x12, 0xFF]


def test_32_bits_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ImageError, match="32 bits"):
        read_image(tmp_path / "a.tif")


def test_cmyk(tmp_path: Path) -> None:
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # red
    image.save(tmp_path / "a.jpg", quality=95)
    red, green, blue = read_image(tmp_path / "a.jpg")[:, 4, 4].tolist()
    assert red > 245
    assert green < 10
    assert blue < 10


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, suffix: str) -> None:
    # Upright: 4 wide, 2 high, with one bright corner at the upper left. EXIF's definition says where each
    # orientation stores that corner: the 0th row is at the top, top, bottom, bottom, left, right, right, left, and the
    # 0th column at the left, right, right, left, top, top, bottom, bottom.
    corners = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (-1, 0), 7: (-1, -1), 8: (0, -1)}
    turned = orientation >= 5
    stored = np.zeros((32, 16, 3) if turned else (16, 32, 3), np.uint8)
    y, x = corners[orientation]
    stored[(slice(0, 8) if y == 0 else slice(-8, None)), (slice(0, 8) if x == 0 else slice(-8, None))] = 255
    image = Image.fromarray(stored)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    image.save(path, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    upright = read_image(path).float().mean(0)
    assert upright.shape == (16, 32)
    assert read_image_size(path) == (16, 32)
    assert upright[:8, :8].mean() > 240
    assert upright.mean() == pytest.approx(255 / 8, abs=4)
    assert is_turned_by_exif(path) is (orientation != 1)


def test_the_head_of_a_png_is_read_without_decoding_it(tmp_path: Path, photograph: Image.Image) -> None:
    """Its EXIF data may stand behind the pixels."""
    exif = Image.Exif()
    exif[0x0112] = 6
    photograph.save(tmp_path / "a.png", exif=exif)
    data = (tmp_path / "a.png").read_bytes()
    start = data.index(b"eXIf") - 4
    end = start + 12 + struct.unpack(">I", data[start : start + 4])[0]
    moved = data[:start] + data[end:-12] + data[start:end] + data[-12:]  # the last chunk, IEND, has 12 bytes
    (tmp_path / "b.png").write_bytes(moved)
    assert read_image_size(tmp_path / "b.png") == read_image(tmp_path / "b.png").shape[1:] == (300, 360)
    photograph.save(tmp_path / "c.png")
    (tmp_path / "c.png").write_bytes((tmp_path / "c.png").read_bytes()[:2000])
    assert read_image_size(tmp_path / "c.png") == (360, 300)


def test_a_truncated_jpeg_is_an_error_at_every_length(tmp_path: Path, photograph: Image.Image) -> None:
    stream = io.BytesIO()
    photograph.save(stream, "JPEG")
    data = stream.getvalue()
    for length in (3, 100, 700, len(data) // 2, len(data) - 3, len(data) - 1):
        for padding in (b"", b"\0" * 20_000):  # a download that was given its length beforehand ends in zeros
            path = tmp_path / "cut.jpg"
            path.write_bytes(data[:length] + padding)
            with pytest.raises(ImageError, match=r"cut\.jpg"):
                read_image(path)


def test_bytes_behind_the_end_marker_do_no_harm(tmp_path: Path, photograph: Image.Image) -> None:
    path = tmp_path / "a.jpg"
    photograph.save(path, progressive=True)
    whole = read_image(path)
    path.write_bytes(path.read_bytes() + b"camera maker's notes")
    assert torch.equal(read_image(path), whole)


@pytest.mark.parametrize("suffix", ["png", "webp", "tif", "bmp", "gif"])
def test_other_truncated_files_are_errors(tmp_path: Path, photograph: Image.Image, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    photograph.save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ImageError, match=rf"a\.{suffix}"):
        read_image(path)


def test_errors_say_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("this is no picture")
    (tmp_path / "folder.jpg").mkdir()
    expected = {
        "empty.jpg": "0 bytes",
        "text.jpg": "no picture that can be read",
        "absent.jpg": "no such file",
        "folder.jpg": "a folder",
    }
    for read in (read_image, read_image_size):
        for name, message in expected.items():
            with pytest.raises(ImageError, match=message) as raised:
                read(tmp_path / name)
            assert raised.value.problems[0].where == str(tmp_path / name)
