from __future__ import annotations

import io
import pickle
import struct
import zlib
from pathlib import Path
from typing import Literal
from warnings import catch_warnings

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.images import MAX_PIXELS, ImageError, read_image
from datamodules.schema import UserError

WIDTH, HEIGHT = 31, 17


def gradient() -> Image.Image:
    """Red grows to the right, green downwards; blue is constant."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    pixels[..., 0] = np.linspace(0, 255, WIDTH).astype(np.uint8)
    pixels[..., 1] = np.linspace(0, 255, HEIGHT).astype(np.uint8)[:, None]
    pixels[..., 2] = 90
    return Image.fromarray(pixels)


def encoded(image: Image.Image, file_format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format)
    return buffer.getvalue()


def as_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def test_files_paths_and_bytes_give_the_same_pixels(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    gradient().save(path)
    expected = as_tensor(gradient())
    for source in (path, str(path), path.read_bytes()):
        image = read_image(source)
        assert image.dtype == torch.uint8
        assert image.shape == (3, HEIGHT, WIDTH)
        assert image.equal(expected)


@pytest.mark.parametrize(
    ("mode", "file_format"),
    [("L", "PNG"), ("1", "PNG"), ("P", "PNG"), ("P", "GIF"), ("LA", "PNG"), ("RGBA", "PNG"), ("CMYK", "JPEG"),
     ("CMYK", "TIFF"), ("YCbCr", "JPEG"), ("L", "JPEG"), ("RGBA", "WEBP"), ("I;16", "PNG"), ("I;16", "TIFF"),
     ("I", "TIFF")],
)  # fmt: skip
def test_every_colour_mode_becomes_rgb(mode: str, file_format: str) -> None:
    if mode.startswith("I"):
        values = np.array(gradient().convert("L")).astype(np.uint16) * 257
        image = Image.fromarray(values) if mode == "I;16" else Image.fromarray(values.astype(np.int32))
        expected = as_tensor(gradient().convert("L"))
    else:
        image = gradient().convert(mode)
        expected = as_tensor(image)
    decoded = read_image(encoded(image, file_format))
    assert decoded.shape == (3, HEIGHT, WIDTH)
    assert decoded.dtype == torch.uint8
    # Lossy formats and conversions differ a little; a wrong conversion (clipped, inverted) differs by far more.
    assert (decoded.float() - expected.float()).abs().mean() < 6


def test_transparency_becomes_white() -> None:
    image = gradient().convert("RGBA")
    image.putalpha(0)
    assert (read_image(encoded(image)) == 255).all()
    palette = Image.new("P", (4, 2), 0)
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    buffer = io.BytesIO()
    palette.save(buffer, "PNG", transparency=0)
    decoded = read_image(buffer.getvalue())
    assert decoded[:, 0, 0].tolist() == [255, 255, 255]
    assert decoded[:, 0, 1].tolist() == [200, 100, 50]
    keyed = Image.new("RGB", (2, 1), (1, 2, 3))
    keyed.putpixel((1, 0), (9, 9, 9))
    buffer = io.BytesIO()
    keyed.save(buffer, "PNG", transparency=(1, 2, 3))
    assert read_image(buffer.getvalue())[:, 0].tolist() == [[255, 9], [255, 9], [255, 9]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_tags_are_followed(orientation: int) -> None:
    upright = np.array(gradient())
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    image = Image.fromarray(np.ascontiguousarray(stored))
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    assert read_image(buffer.getvalue()).equal(as_tensor(gradient()))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_broken_tag_is_no_broken_picture() -> None:
    buffer = io.BytesIO()
    gradient().save(buffer, "JPEG", exif=b"Exif\0\0MM\0*garbage that is no directory")
    assert read_image(buffer.getvalue()).shape == (3, HEIGHT, WIDTH)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"])
def test_truncated_files_are_named(tmp_path: Path, file_format: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    content = encoded(Image.fromarray(noise), file_format)
    path = tmp_path / f"cut.{file_format.lower()}"
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ImageError) as caught:
        read_image(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"no picture at all", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", bytes(1000)])
def test_other_files_are_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "letter.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"letter\.jpg"):
        read_image(path)


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"absent\.jpg: no such file"):
        read_image(tmp_path / "absent.jpg")
    with pytest.raises(ImageError, match="a folder, not a picture"):
        read_image(tmp_path)


def test_bytes_are_called_by_the_name_given() -> None:
    with pytest.raises(ImageError, match=r"^row 7 of train: not a picture"):
        read_image(b"nothing", name="row 7 of train")


def _declared_png(width: int, height: int) -> bytes:
    """A PNG whose header promises a size; its data would be needed only to decode it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("width", [MAX_PIXELS // 10_000 + 1, 30_000, 200_000])
@pytest.mark.parametrize("warnings", ["error", "ignore"])
def test_decompression_bombs_are_refused_undecoded(width: int, warnings: Literal["error", "ignore"]) -> None:
    with catch_warnings(action=warnings), pytest.raises(ImageError, match="bomb: too large to be decoded"):
        read_image(_declared_png(width, 10_000), name="bomb")


def test_ranges_that_nobody_knows_are_refused() -> None:
    for values in (np.full((4, 4), 0.5, dtype=np.float32), np.full((4, 4), 70_000, dtype=np.int32)):
        with pytest.raises(ImageError, match="save it with 8 or 16 bits"):
            read_image(encoded(Image.fromarray(values), "TIFF"))


def test_the_error_is_a_users_and_travels_between_processes() -> None:
    error = ImageError("a.jpg: truncated")
    assert isinstance(error, UserError)
    assert str(pickle.loads(pickle.dumps(error))) == "a.jpg: truncated"  # noqa: S301 -- our own bytes
