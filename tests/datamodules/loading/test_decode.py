from __future__ import annotations

import io
import re
import struct
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal
from warnings import catch_warnings

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from datamodules.loading import decode as images
from datamodules.loading.decode import (
    MAX_BYTES,
    MAX_PIXELS,
    ImageError,
    UndecidedRangeError,
    heif_formats,
    image_pixels,
    image_suffixes,
    read_image,
)

WIDTH, HEIGHT = 31, 17
PACKAGES = ("app", "callbacks", "datamodules", "evaluation", "experiments", "lightning_modules", "retrieval")


def gradient() -> Image.Image:
    """Red grows to the right, green downwards; blue is constant."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    pixels[..., 0] = np.linspace(0, 255, WIDTH).astype(np.uint8)
    pixels[..., 1] = np.linspace(0, 255, HEIGHT).astype(np.uint8)[:, None]
    pixels[..., 2] = 90
    return Image.fromarray(pixels)


def encoded(image: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def as_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def test_files_paths_and_bytes_give_the_same_pixels(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
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
    with Image.open(io.BytesIO(encoded(image, file_format))) as opened:
        assert image_pixels(opened).equal(decoded)


def test_transparency_becomes_white() -> None:
    image = gradient().convert("RGBA")
    image.putalpha(0)
    assert (read_image(encoded(image)) == 255).all()
    palette = Image.new("P", (4, 2), 0)
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    assert read_image(encoded(palette, transparency=0))[:, 0, :2].tolist() == [[255, 200], [255, 100], [255, 50]]
    keyed = Image.new("RGB", (2, 1), (1, 2, 3))
    keyed.putpixel((1, 0), (9, 9, 9))
    assert read_image(encoded(keyed, transparency=(1, 2, 3)))[:, 0].tolist() == [[255, 9], [255, 9], [255, 9]]


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
    assert read_image(encoded(image, exif=exif)).equal(as_tensor(gradient()))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_broken_tag_is_no_broken_image() -> None:
    image = encoded(gradient(), "JPEG", exif=b"Exif\0\0MM\0*garbage that is no directory")
    assert read_image(image).shape == (3, HEIGHT, WIDTH)


@pytest.mark.parametrize("content", [b"", b"no image at all", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", bytes(1000)])
def test_other_files_are_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "letter.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"letter\.jpg"):
        read_image(path)


def test_missing_files_folders_and_bytes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"absent\.jpg: no such file"):
        read_image(tmp_path / "absent.jpg")
    with pytest.raises(ImageError, match="a folder, not an image"):
        read_image(tmp_path)
    with pytest.raises(ImageError, match=r"^row 7 of train: not an image"):
        read_image(b"nothing", name="row 7 of train")


def png_of(header: tuple[int, ...], *data: bytes, others: Sequence[tuple[bytes, bytes]] = ()) -> bytes:
    """A PNG with right checksums: width, height, depth, color type …, other chunks, and parts of compressed data."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", *header)), *others, *((b"IDAT", part) for part in data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


@pytest.mark.parametrize("width", [MAX_PIXELS // 10_000 + 1, 30_000, 200_000])
@pytest.mark.parametrize("warnings", ["error", "ignore"])
def test_decompression_bombs_are_refused_undecoded(width: int, warnings: Literal["error", "ignore"]) -> None:
    bomb = png_of((width, 10_000, 8, 2, 0, 0, 0), zlib.compress(b"\0" * 100))
    with catch_warnings(action=warnings), pytest.raises(ImageError, match="bomb: too large to be decoded"):
        read_image(bomb, name="bomb")


def test_the_limit_of_pixels_can_be_raised_and_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Image, "MAX_IMAGE_PIXELS", 200
    )  # Pillow's own, as if it were that low: it refuses twice as much
    monkeypatch.setattr("datamodules.loading.decode.MAX_PIXELS", 200)
    content = encoded(gradient())
    with pytest.raises(
        ImageError, match=r"a\.png: too large to be decoded \(.*limit 100 pixels .*\); raise max_pixels"
    ):
        read_image(content, "a.png", max_pixels=100)
    assert read_image(content, max_pixels=HEIGHT * WIDTH).shape == (3, HEIGHT, WIDTH)
    with pytest.raises(ImageError, match="too large"):
        read_image(content, max_pixels=HEIGHT * WIDTH - 1)


def deep_png(values: NDArray[np.uint16]) -> bytes:
    """A PNG of 16 bits a channel, which Pillow cannot write in color: uint16 ``(H, W, C)``."""
    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png_of((width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0), zlib.compress(rows))


def ramp(highest: int, channels: int = 1) -> NDArray[np.uint16]:
    values = np.linspace(0, highest, 12 * 9 * channels).astype(np.uint16)
    return values.reshape(9, 12, channels)


DEEP: dict[str, Callable[[NDArray[np.uint16]], bytes]] = {
    "PNG": lambda values: encoded(Image.fromarray(values[..., 0])),
    "TIFF": lambda values: encoded(Image.fromarray(values[..., 0]), "TIFF"),
    "big-endian TIFF": lambda values: encoded(Image.fromarray(values[..., 0].astype(">u2")), "TIFF"),
    "32-bit TIFF": lambda values: encoded(Image.fromarray(values[..., 0].astype(np.int32)), "TIFF"),
    "float TIFF": lambda values: encoded(Image.fromarray(values[..., 0].astype(np.float32)), "TIFF"),
    "PGM": lambda values: encoded(Image.fromarray(values[..., 0].astype(np.int32)), "PPM"),
    "JPEG 2000": lambda values: encoded(Image.fromarray(values[..., 0]), "JPEG2000"),
    "color PNG": deep_png,
    "PNG with alpha": lambda values: deep_png(np.concatenate([values, np.full_like(values[..., :1], 65535)], axis=2)),
}


@pytest.mark.parametrize("kind", DEEP)
def test_a_range_maps_black_and_white(kind: str) -> None:
    values = ramp(4095, 3 if kind == "color PNG" else 1)
    content = DEEP[kind](values)
    expected = np.round(values / 4095 * 255).astype(np.uint8)
    read = read_image(content, value_range=[0, 4095]).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(read, np.broadcast_to(expected, read.shape))
    clipped = read_image(content, value_range=[1000, 2000]).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(clipped == 255, np.broadcast_to(values >= 1999, read.shape))
    np.testing.assert_array_equal(clipped == 0, np.broadcast_to(values <= 1001, read.shape))
    with pytest.raises(UndecidedRangeError, match=r"a\.x: more than 8 bits .* from 0 to 4095, .*value_range") as said:
        read_image(content, "a.x")
    assert "\n" not in str(said.value)
    assert said.value.values == (0, 4095, kind == "float TIFF")


@pytest.mark.parametrize("kind", [kind for kind in DEEP if kind not in ("float TIFF", "32-bit TIFF")])
def test_all_of_16_bits_is_the_upper_byte(kind: str) -> None:
    for highest in (65535, 4095):
        values = ramp(highest, 3 if kind == "color PNG" else 1)
        content = DEEP[kind](values)
        read = read_image(content, value_range="dtype").permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(read, np.broadcast_to((values >> 8).astype(np.uint8), read.shape))
    assert read_image(DEEP[kind](ramp(65535))).equal(read_image(DEEP[kind](ramp(65535)), value_range=[0, 65535]))


def test_unknown_ranges_are_refused() -> None:
    for values in (np.full((4, 4), 0.5, dtype=np.float32), np.full((4, 4), 70_000, dtype=np.int32)):
        content = encoded(Image.fromarray(values), "TIFF")
        with pytest.raises(ImageError, match="save it with 8 bits"):
            read_image(content)
        with pytest.raises(ImageError, match="no range of their own"):
            read_image(content, value_range="dtype")
    with pytest.raises(ImageError, match="not finite"):
        read_image(encoded(Image.fromarray(np.full((4, 4), np.nan, dtype=np.float32)), "TIFF"), value_range=[0, 1])
    assert (
        read_image(encoded(Image.fromarray(np.full((4, 4), 0.5, np.float32)), "TIFF"), value_range=[0, 1]) == 128
    ).all()


def test_a_deep_image_may_be_turned_transparent_or_inverted() -> None:
    values = ramp(4095)[..., 0]
    image = Image.fromarray(values)
    tags = Image.Exif()
    tags[0x0112] = 6
    upright = np.rot90(np.round(values / 4095 * 255).astype(np.uint8), -1)
    np.testing.assert_array_equal(read_image(encoded(image, exif=tags), value_range=[0, 4095])[0].numpy(), upright)
    assert read_image(encoded(image, transparency=0), value_range=[0, 4095])[0, 0, :2].tolist() == [255, 2]
    inverted = encoded(image, "TIFF", tiffinfo={262: 0})
    assert read_image(inverted, value_range=[0, 4095])[0, 0, 0] == 255, "white is zero"
    half = np.concatenate([ramp(65535, 3), np.zeros((9, 12, 1), np.uint16)], axis=2)
    assert (read_image(deep_png(half), value_range=[0, 65534]) == 255).all(), "transparent"


@pytest.mark.parametrize("suffix", [".avif", ".jfif", ".jpe", ".jp2", ".heic", ".HIF", ".pnm", ".APNG"])
def test_further_formats_are_read(suffix: str, tmp_path: Path) -> None:
    pytest.importorskip("pillow_heif")
    assert suffix.lower() in image_suffixes()
    kind = {".avif": "AVIF", ".jp2": "JPEG2000", ".heic": "HEIF", ".hif": "HEIF", ".pnm": "PPM", ".apng": "PNG"}
    heif_formats()
    path = tmp_path / f"a{suffix}"
    with path.open("wb") as file:
        gradient().resize((64, 48)).save(file, kind.get(suffix.lower(), "JPEG"))
    assert (read_image(path).float() - as_tensor(gradient().resize((64, 48))).float()).abs().mean() < 8


def test_without_its_extra_heic_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pillow_heif")
    heif_formats()
    content = encoded(gradient().resize((64, 48)), "HEIF")
    monkeypatch.setattr("datamodules.loading.decode.heif_formats", tuple)
    assert ".heic" not in image_suffixes()
    with pytest.raises(ImageError, match=r"^a: HEIC, which needs pillow-heif: install the extra heic; "):
        read_image(content, "a")


@pytest.mark.parametrize("suffix", [".jpg", ".eps", ".png"])
def test_no_other_decoder_is_started(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An EPS starts Ghostscript with a program inside the file."""
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a program was started"))
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("a program was started"))
    Image.init()
    path = tmp_path / f"a{suffix}"
    for kind in ("EPS", "ICO", "TGA", "PCX", "DDS", "SGI", "IM"):
        path.write_bytes(encoded(gradient(), kind))
        with pytest.raises(ImageError, match="not an image in a known format"):
            read_image(path)


def test_image_files_are_opened_in_one_place() -> None:
    """One list of formats and one set of bounds; an exported model's script stands alone, as does the cache."""
    root = Path(images.__file__).parents[2]
    product = [path for folder in PACKAGES for path in (root / folder).rglob("*.py")]
    assert len(product) > 100
    calls = re.compile(r"Image\.open\(|\.imread\(|decode_image\(|decode_jpeg\(|decode_png\(|read_file\(")
    found = {path.relative_to(root).as_posix() for path in product if calls.search(path.read_text(encoding="utf-8"))}
    own = {"datamodules/loading/cache.py", "experiments/export/predict_onnx.py"}
    assert found == {"datamodules/loading/decode.py", *own}
    opens = re.compile(r"Image\.open\((?!file, formats=)")
    assert not [name for name in found if opens.search((root / name).read_text(encoding="utf-8"))]


def noise_bytes(file_format: str, **options: Any) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return encoded(Image.fromarray(noise), file_format, **options)


@pytest.mark.parametrize("size", [1, 48, 1000])
def test_damaged_pixels_of_a_png_are_noticed(size: int) -> None:
    content = noise_bytes("PNG")
    place = content.index(b"IDAT") + 3000
    for middle in (bytes(size), bytes([255]) * size):
        with pytest.raises(ImageError, match=r"^a: .*wrong checksum of a chunk 'IDAT'"):
            read_image(content[:place] + middle + content[place + size :], "a")
    with pytest.raises(ImageError, match="the end of the file is missing"):
        read_image(content[:-12], "a")
    damaged = bytearray(encoded(Image.new("RGB", (64, 64), (9, 9, 9)), compress_level=0))
    damaged[damaged.index(b"IDAT") + 200] ^= 1
    with pytest.raises(ImageError, match="wrong checksum"):
        read_image(bytes(damaged))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}, {"optimize": True}])
def test_damaged_pixels_of_a_jpeg_are_noticed_where_its_decoder_does(options: dict[str, Any]) -> None:
    content = noise_bytes("JPEG", quality=90, **options)
    assert read_image(content).shape == (3, 64, 64)
    place = len(content) // 2
    with pytest.raises(ImageError, match=r"^a: cannot be decoded"):
        read_image(content[:place] + bytes(400) + content[place + 400 :], "a")


def test_few_stray_bytes_before_a_marker_do_no_harm() -> None:
    content = noise_bytes("JPEG")
    assert content.endswith(b"\xff\xd9")
    assert read_image(content[:-2] + bytes(3) + content[-2:]).equal(read_image(content))
    with pytest.raises(ImageError, match="extraneous"):
        read_image(content[:-2] + bytes(300) + content[-2:])


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_a_jpeg_has_the_pixels_of_pillows_decoder(mode: str, options: dict[str, Any]) -> None:
    content = encoded(gradient().convert(mode), "JPEG", **options)
    with Image.open(io.BytesIO(content)) as image:
        assert read_image(content).equal(as_tensor(image))


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000"])
def test_bytes_after_the_end_are_ignored(file_format: str) -> None:
    content = noise_bytes(file_format)
    assert read_image(content + b"PK\x03\x04 and more").equal(read_image(content))


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of what is wrong with a TIFF
@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "GIF", "BMP", "PPM", "AVIF", "JPEG2000", "WEBP", "TIFF"])
def test_truncated_files_are_refused_by_name(file_format: str, share: float, tmp_path: Path) -> None:
    content = noise_bytes(file_format)
    path = tmp_path / f"cut.{file_format.lower()}"
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ImageError, match=rf"^{path}: [^\n]*$"):
        read_image(path)


def test_huge_files_and_tiles_are_refused_undecoded(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    path.write_bytes(noise_bytes("TIFF"))
    with path.open("r+b") as file:
        file.truncate(MAX_BYTES + 1)  # sparse: takes no space
    with pytest.raises(ImageError, match=r"a\.tif: too large to be decoded \(1073741825 bytes"):
        read_image(path)
    tags = {256: 9, 257: 9, 258: 8, 259: 1, 262: 1, 277: 1, 322: 100_000, 323: 100_000, 324: 8, 325: 81}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    tiled = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + bytes(100)
    with pytest.raises(ImageError, match="tiles of 100000 × 100000 pixels"):
        read_image(tiled)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "I;16"])
@pytest.mark.parametrize("size", [(1, 1), (5, 9), (64, 33)])
def test_a_png_whose_last_rows_are_missing_is_refused_though_its_checksums_are_right(
    mode: str, size: tuple[int, int]
) -> None:
    pixels = np.random.default_rng(0).integers(1, 256, (size[1], size[0], 4), dtype=np.uint8)
    drawn = Image.fromarray(pixels[..., 0].astype(np.uint16) * 256) if mode == "I;16" else None
    for image in (drawn or Image.fromarray(pixels).convert(mode), Image.new(mode, size)):
        content = encoded(image)
        read_image(content, value_range="dtype")  # also where the last row is black
        chunks, place = [], 8
        while place < len(content):
            length = int.from_bytes(content[place : place + 4], "big")
            chunks.append((content[place + 4 : place + 8], content[place + 8 : place + 8 + length]))
            place += length + 12
        raw = zlib.decompress(b"".join(data for kind, data in chunks if kind == b"IDAT"))
        header = struct.unpack(">IIBBBBB", chunks[0][1])
        others = [chunk for chunk in chunks if chunk[0] not in (b"IHDR", b"IDAT", b"IEND")]
        missing = png_of(header, zlib.compress(raw[: len(raw) - len(raw) // size[1]]), others=others)
        with pytest.raises(ImageError, match=r"damaged: has .* bytes of pixels|cannot be decoded"):
            read_image(missing, value_range="dtype")
        split = zlib.compress(raw)
        several = png_of(header, split[:10], split[10:], others=others)
        assert read_image(several, value_range="dtype").equal(read_image(content, value_range="dtype"))


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (8, 8), (21, 13)])
def test_an_interlaced_png_that_lacks_passes_is_refused(size: tuple[int, int]) -> None:
    width, height = size
    steps = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    rows = [
        b"\0" + bytes(len(range(left, width, across)))
        for left, top, across, down in steps
        if left < width
        for _ in range(top, height, down)
    ]
    header = (width, height, 8, 0, 0, 0, 1)
    assert read_image(png_of(header, zlib.compress(b"".join(rows)))).shape == (3, height, width)
    with pytest.raises(ImageError, match=r"damaged: has|cannot be decoded"):
        read_image(png_of(header, zlib.compress(b"".join(rows[:-1]))))


@pytest.mark.parametrize("file_format", ["PNG", "JPEG"])
def test_an_image_is_read_where_torch_is_not_installed(file_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded(Image.new("RGB", (40, 30), (10, 200, 30)), file_format)
    expected = read_image(content).permute(1, 2, 0).numpy()
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError):
        images.decoded(content)
    np.testing.assert_array_equal(images.read_array(content, "an image"), expected)
    with pytest.raises(images.ImageError, match="an image: "):
        images.read_array(b"none", "an image")
