"""Read an image, whatever its file format and color mode, as 8-bit RGB in its upright orientation.

A damaged image is an error that names it, never a blank or half an image: PNG files are compared with their checksums
and number of rows, and libjpeg's warnings of damaged JPEG data count. Other formats carry no checksums of their pixels:
there truncated files are noticed, and whatever their decoders refuse. This is the only place where image files are
opened, so that one list of formats and one set of bounds holds.
"""

from __future__ import annotations

import io
import os
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from vitrail.errors import UserError

if TYPE_CHECKING:
    import torch

MAX_PIXELS = 89_478_485
"""Larger images are refused before they are decoded, unless ``max_pixels`` allows more: a small file can hold one that
fills the memory. Pillow's own limit, at which it only warns."""

MAX_BYTES = 2**30
"""Larger files are refused: uncompressed, ``MAX_PIXELS`` with four channels of 16 bits fit."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
"""Decoders that are ever tried, whatever a file is called; HEIF comes in addition where pillow-heif is installed.
Pillow knows dozens more, some of which start other programs (EPS starts Ghostscript)."""

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".bmp", ".gif", ".webp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2", ".j2k", ".jpx"),
)
"""Endings of file names that are images, in upper or lower case."""

HEIF_SUFFIXES = (".heic", ".heif", ".hif")
"""Endings of images that need pillow-heif (the extra ``heic``)."""

ValueRange = Literal["dtype", "auto"] | Sequence[float]
"""Which values of images with more than 8 bits a channel become black and white (``ImageOptions.value_range``)."""

UNDECIDED: Any = "undecided"
"""Value range of a data set whose images have not all been read yet."""

# We refuse what Pillow would warn of, so its warning would come on top of our error. Set once, for all threads.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# The one decoder at hand of PNG files with 16 bits a channel of color; its successor would be one more package.
warnings.filterwarnings("ignore", message="The image decoding and encoding capabilities of TorchVision")

_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_BACKGROUND = (255, 255, 255)
_FULL = (0.0, 65535.0)
_INTERLACED = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""Adam7: first column and row, and steps across and down, of each pass of an interlaced PNG."""

_RAISE_LIMIT = (
    "raise max_pixels (data image.max_pixels of the experiment, --max-pixels of predict), or scale it down or remove it"
)

_BITS = (8, 10, 12, 14, 16)
_PIECE = 1 << 20
_LARGE = 1 << 24
_READ_AT_ONCE = 1 << 25  # Bytes of a file.
# Few stray bytes before a marker do no harm, and some cameras write them; a decoder that lost its place skips more.
_HARMLESS_BYTES = 15
# The decoders of large images need several copies; one at a time bounds what the threads of a process need together.
_one_large = threading.Lock()

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(UserError):
    """An image that cannot be read; the message names it and the reason."""


class UndecidedRangeError(ImageError):
    """An image with more than 8 bits a channel of which it is not known which values are black and white.

    Attributes:
        values: of the image; None for a copy of the error that came from another process.
    """

    def __init__(self, message: str, values: Values | None = None) -> None:
        super().__init__(message)
        self.values = values


class Values(NamedTuple):
    """Smallest and largest value of an image with more than 8 bits a channel; whether they are floating point."""

    low: float
    high: float
    is_float: bool


class Header(NamedTuple):
    """What a file is, of which no pixel has been decoded.

    Attributes:
        format: such as ``JPEG``.
        mode: Pillow's, such as ``RGB``, ``P``, ``CMYK``, ``I;16``.
        size: width and height in pixels, as stored.
        frames: images in the file.
        turned: whether an orientation tag turns or mirrors it.
        transparent: whether parts may be transparent.
        deep: whether a channel has more than 8 bits.
        content: the whole file.
    """

    format: str
    mode: str
    size: tuple[int, int]
    frames: int
    turned: bool
    transparent: bool
    deep: bool
    content: bytes


class TooLargeError(Exception):
    """An image or a file beyond the limits; the message is its size."""


def read_image(
    source: str | Path | bytes, name: str = "", value_range: ValueRange = "auto", max_pixels: int = MAX_PIXELS
) -> torch.Tensor:
    """Read an image from a file or from the bytes of one.

    Orientation tags are followed, palettes, grayscale and CMYK become RGB, transparent parts white; of an animation it
    is the first frame.

    Args:
        source: path of the file, or its content.
        name: what errors call the image; the path by default.
        value_range: what becomes black and white where a channel has more than 8 bits: ``[lo, hi]``; ``dtype`` for the
            full range of 16 bits; with ``auto`` an image that needs more than 14 bits is taken as one of 16, others
            are refused, because a single image may be dark or use fewer bits.
        max_pixels: width times height at most.

    Returns:
        uint8 ``(3, H, W)``, RGB, not contiguous.

    Raises:
        ImageError: for a missing, damaged or unknown file, for more than ``max_pixels``, and for images of unknown
            range.
    """
    label = name or ("image" if isinstance(source, bytes) else str(source))
    with _named(label, max_pixels):
        return decoded(source, value_range, max_pixels)


def read_array(source: str | Path | bytes, name: str, value_range: ValueRange = "auto") -> NDArray[np.uint8]:
    """Read an image as ``read_image`` does, where PyTorch may be missing: uint8 ``(H, W, 3)``, RGB."""
    with _named(name, MAX_PIXELS):
        return _decoded_array(source, value_range, MAX_PIXELS)


def read_header(source: str | Path | bytes, max_pixels: int = MAX_PIXELS) -> Header:
    """Read a file and its header, without decoding it.

    Raises:
        ImageError: for a missing or unknown file, or more than ``max_pixels``.
    """
    with _named("image" if isinstance(source, bytes) else str(source), max_pixels):
        content = source if isinstance(source, bytes) else Path(source).read_bytes()
        with io.BytesIO(content) as file, opened(file) as image:
            _refuse_too_large(image, file, max_pixels)
            deep = _is_deep_gray(image) or _is_deep_color(image)
            frames = int(getattr(image, "n_frames", 1))
            transparent = image.has_transparency_data
            # Last: for its tags Pillow decodes a PNG.
            turned = _turn(image) is not None
            return Header(str(image.format), image.mode, image.size, frames, turned, transparent, deep, content)


@contextmanager
def _named(label: str, max_pixels: int) -> Iterator[None]:
    """Turn whatever decoders raise into an error that names the image and the fix."""
    try:
        yield
    except UndecidedRangeError as error:
        raise UndecidedRangeError(f"{label}: {error}", error.values) from error
    except TooLargeError as error:
        limit = f"limit {max_pixels} pixels and {_max_bytes(max_pixels)} bytes"
        raise ImageError(f"{label}: too large to be decoded ({error}; {limit}); {_RAISE_LIMIT}") from error
    # Decoders raise all kinds of exceptions for broken files.
    except Exception as error:
        raise ImageError(f"{label}: {reason_of(error)}; replace or remove this image") from error


def decoded(source: str | Path | bytes, value_range: ValueRange = "auto", max_pixels: int = MAX_PIXELS) -> torch.Tensor:
    """Decode an image as ``read_image`` does, with whatever exceptions the decoders raise."""
    import torch

    # Channels stay interleaved in memory: torch resizes uint8 about three times as fast so, to the same values.
    return torch.from_numpy(_decoded_array(source, value_range, max_pixels)).permute(2, 0, 1)


def _decoded_array(source: str | Path | bytes, value_range: ValueRange, max_pixels: int) -> NDArray[np.uint8]:
    if max_pixels > MAX_PIXELS and Image.MAX_IMAGE_PIXELS is not None:
        # Pillow has one limit for a process, at twice which it refuses to open a file.
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)
    with _file_of(source) as file, opened(file) as image:
        _refuse_too_large(image, file, max_pixels)
        with _one_large if image.width * image.height > _LARGE else nullcontext():
            return _pixels(image, file, value_range)


def check_header(content: bytes, max_pixels: int = MAX_PIXELS) -> None:
    """Refuse what ``decoded`` refuses for its format or its size, by the header alone, with the same exceptions."""
    with io.BytesIO(content) as file, opened(file) as image:
        _refuse_too_large(image, file, max_pixels)


def image_pixels(image: Image.Image, value_range: ValueRange = "auto") -> torch.Tensor:
    """Return the pixels of a Pillow image as ``read_image`` returns those of a file.

    Raises:
        UndecidedRangeError: for an image of unknown range; Pillow raises others for broken files.
    """
    import torch

    return torch.from_numpy(_upright_rgb(image, value_range)).permute(2, 0, 1)


def _file_of(source: str | Path | bytes) -> IO[bytes]:
    """The file; of a small one its content, because Pillow and a decoder read it in many pieces."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    file = Path(source).open("rb", buffering=0)  # noqa: SIM115 -- closed here or by the caller
    if os.fstat(file.fileno()).st_size > _READ_AT_ONCE:
        return io.BufferedReader(file)
    with file:
        return io.BytesIO(file.readall())


@contextmanager
def opened(file: IO[bytes]) -> Iterator[Image.Image]:
    """Open an image, of which only the header is read, by one of the allowed decoders.

    Raises:
        UnidentifiedImageError: for a file of another format.
        TooLargeError: for far too many pixels.
    """
    try:
        image = Image.open(file, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooLargeError("far too many pixels") from error
    except UnidentifiedImageError:
        file.seek(4)
        kind = file.read(8)
        if kind[:4] != b"ftyp" or kind[4:] not in _HEIF_BRANDS:
            raise
        if not heif_formats():
            raise UnidentifiedImageError("HEIC, which needs pillow-heif: install the extra heic") from None
        file.seek(0)
        image = Image.open(file, formats=heif_formats())
    with image:
        yield image


@cache
def heif_formats() -> tuple[str, ...]:
    """Return ``HEIF`` where pillow-heif is installed (the extra ``heic``)."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return ()
    register_heif_opener(thumbnails=False)
    return ("HEIF",)


def image_suffixes() -> tuple[str, ...]:
    """Return the endings of readable files."""
    return SUFFIXES + (HEIF_SUFFIXES if heif_formats() else ())


def usual_range(values: Values) -> tuple[float, float] | None:
    """Return the smallest usual range that includes the values: 8, 10, 12, 14 or 16 bits, or 0 to 1, or None."""
    if values.is_float and values.low >= 0 and values.high <= 1:
        return 0.0, 1.0
    bits = bits_of(values)
    return None if bits is None else (0.0, float(2**bits - 1))


def bits_of(values: Values) -> int | None:
    """Return how many bits an image uses: 8, 10, 12, 14 or 16; None for negative and larger values."""
    return next((bits for bits in _BITS if values.low >= 0 and values.high < 2**bits), None)


def reason_of(error: Exception) -> str:
    """Return in one line what is wrong with a file that could not be read."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, IsADirectoryError):
        return "a folder, not an image"
    if isinstance(error, PermissionError):
        return "may not be read (permission denied)"
    if isinstance(error, UnidentifiedImageError):
        return str(error) if str(error).startswith("HEIC") else "not an image in a known format"
    return f"cannot be decoded ({' '.join(str(error).split()) or type(error).__name__})"


def _refuse_too_large(image: Image.Image, file: IO[bytes], max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        raise TooLargeError(f"{image.width} × {image.height} pixels")
    tags = getattr(image, "tag_v2", {})
    width, height = tags.get(322, 1), tags.get(323, 1)
    if isinstance(width, int) and isinstance(height, int) and width * height > 4 * max_pixels:
        raise TooLargeError(f"tiles of {width} × {height} pixels")
    place = file.seek(0, io.SEEK_CUR)
    size = file.seek(0, io.SEEK_END)
    file.seek(place)
    if size > _max_bytes(max_pixels):
        raise TooLargeError(f"{size} bytes")


def _max_bytes(max_pixels: int) -> int:
    """The largest file that is read: uncompressed, the pixels with four channels of 16 bits fit."""
    return max(MAX_BYTES, 8 * max_pixels)


def _pixels(image: Image.Image, file: IO[bytes], value_range: ValueRange) -> NDArray[np.uint8]:
    """uint8 ``(H, W, 3)``."""
    if image.format in ("JPEG", "MPO"):
        return _from_jpeg(image, file)
    if image.format == "PNG":
        _check_png(file)
    # Before the tags are read, for which Pillow decodes a PNG.
    if not _is_deep_gray(image) and _is_deep_color(image):
        upright = _turn(image)
        shallow = _from_deep_color(image, file, value_range)
        pixels = np.array(_to_rgb(shallow if upright is None else shallow.transpose(upright)))
    else:
        pixels = _upright_rgb(image, value_range)
    if image.format == "PNG":
        _check_png_rows(image, file)
    return pixels


def _upright_rgb(image: Image.Image, value_range: ValueRange) -> NDArray[np.uint8]:
    upright = _turn(image)
    if _is_deep_gray(image):
        image = _from_deep_gray(image, value_range)
    return np.array(_to_rgb(image if upright is None else image.transpose(upright)))


def _turn(image: Image.Image) -> Image.Transpose | None:
    """How an image is turned upright, by its orientation tag; a tag that cannot be read does not count."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except (OSError, SyntaxError, ValueError, KeyError, TypeError):
        orientation = 1
    return _UPRIGHT.get(orientation) if isinstance(orientation, int) else None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.has_transparency_data:
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        background = Image.new("RGBA", rgba.size, (*_BACKGROUND, 255))
        return Image.alpha_composite(background, rgba).convert("RGB")
    return image.convert("RGB")


def _from_jpeg(image: Image.Image, file: IO[bytes]) -> NDArray[np.uint8]:
    """Pixels by libjpeg-turbo itself: the same as Pillow's, sooner, and with its warnings of damaged data."""
    turn = _turn(image)
    file.seek(0)
    content = file.read()
    is_cmyk = image.mode == "CMYK"
    try:
        pixels = simplejpeg.decode_jpeg(content, "CMYK" if is_cmyk else "RGB")
    except ValueError as error:
        if _is_damage(str(error)):
            raise
        pixels = simplejpeg.decode_jpeg(content, "CMYK" if is_cmyk else "RGB", strict=False)
    if turn is None and not is_cmyk:
        found: NDArray[np.uint8] = pixels
        return found
    # Which way round the inks are is for Pillow to know.
    rgb = image.convert("RGB") if is_cmyk else Image.fromarray(pixels)
    return np.array(rgb if turn is None else rgb.transpose(turn))


def _is_damage(warning: str) -> bool:
    """Whether libjpeg's warning means that pixels are wrong or missing."""
    if stray := re.search(r"(\d+) extraneous bytes", warning):
        return int(stray[1]) > _HARMLESS_BYTES
    return not re.search(r"progression|Invalid SOS|JFIF revision|Adobe color|ICC profile", warning)


def _check_png(file: IO[bytes]) -> None:
    """Refuse a PNG whose checksums are wrong or whose end is missing; Pillow does not look at those of pixels."""
    place = file.seek(0, io.SEEK_CUR)
    file.seek(8)
    kind = b""
    while kind != b"IEND":
        head = file.read(8)
        length, kind = int.from_bytes(head[:4]), head[4:]
        checksum = zlib.crc32(kind)
        while length > 0 and (piece := file.read(min(length, _PIECE))):
            checksum = zlib.crc32(piece, checksum)
            length -= len(piece)
        end = file.read(4)
        if len(end) < 4:
            raise ValueError("the end of the file is missing")
        if int.from_bytes(end) != checksum:
            raise ValueError(f"damaged: wrong checksum of a chunk {kind.decode('ascii', 'replace')!r}")
    file.seek(place)


def _check_png_rows(image: Image.Image, file: IO[bytes]) -> None:
    """Refuse a PNG with right checksums and too few rows: Pillow leaves missing ones black."""
    image.load()
    is_interlaced = bool(image.info.get("interlace"))
    if not is_interlaced and np.asarray(image.crop((0, image.height - 1, image.width, image.height))).any():
        return  # the last row is there, and so are all others
    place = file.seek(0, io.SEEK_CUR)
    file.seek(16)
    width, height, depth, color = struct.unpack(">IIBB", file.read(10))
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color]
    passes = _INTERLACED if is_interlaced else ((0, 0, 1, 1),)
    sizes = [(-((left - width) // across), -((top - height) // down)) for left, top, across, down in passes]
    expected = sum(rows * (1 + -(-columns * bits // 8)) for columns, rows in sizes if columns > 0 and rows > 0)
    file.seek(33)
    inflate, found, kind = zlib.decompressobj(), 0, b""
    while kind != b"IEND":
        head = file.read(8)
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        data = file.read(length) if kind == b"IDAT" else b""
        while data:
            found += len(inflate.decompress(data, 1 << 20))
            data = inflate.unconsumed_tail
        file.seek(4 if kind == b"IDAT" else length + 4, os.SEEK_CUR)
    found += len(inflate.flush())
    file.seek(place)
    if found < expected:
        raise ValueError(f"damaged: has {found} of {expected} bytes of pixels")


def _is_deep_gray(image: Image.Image) -> bool:
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _from_deep_gray(image: Image.Image, value_range: ValueRange) -> Image.Image:
    """8-bit grayscale of a deeper one. Pillow's own conversion would clip everything above 255 to white."""
    values = np.array(image)
    if not np.isfinite(values).all():
        raise ValueError("has values that are not finite")
    found = Values(float(values.min()), float(values.max()), image.mode == "F")
    has_16_bits = image.mode.startswith("I;16") or image.format == "PPM"
    shallow = _scaled(values, _chosen(found, value_range, has_16_bits=has_16_bits))
    if getattr(image, "tag_v2", {}).get(262) == 0:  # "white is zero", which Pillow leaves as it is
        shallow = 255 - shallow
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        shallow[values == transparent] = _BACKGROUND[0]
    return Image.fromarray(shallow)


def _is_deep_color(image: Image.Image) -> bool:
    """Whether Pillow is about to keep only the upper 8 of 16 bits of each channel."""
    tiles = getattr(image, "tile", None)
    arguments = tiles[0].args if tiles else ""
    raw_mode = arguments if isinstance(arguments, str) else str(arguments[0]) if arguments else ""
    return image.format in ("PNG", "TIFF") and ";16" in raw_mode


def _from_deep_color(image: Image.Image, file: IO[bytes], value_range: ValueRange) -> Image.Image:
    """8 bits a channel of 16, of color or gray with or without transparency."""
    if "transparency" in image.info:
        raise ValueError("16 bits a channel with a transparent color; save it with 8 bits")
    if value_range == "dtype" or (not isinstance(value_range, str) and tuple(value_range) == _FULL):
        return image  # Pillow keeps the upper 8 bits
    if image.format == "TIFF":
        bands = image.convert("RGB") if image.mode == "RGBA" else image
        chosen = _chosen(Values(0.0, float(np.array(bands).max()) * 256 + 255, False), value_range, has_16_bits=True)
        if chosen != _FULL:
            raise ValueError("a TIFF with 16 bits a channel that uses fewer; save it with 8 bits, or as PNG")
        return image
    import torch
    import torchvision.io

    file.seek(0)
    content = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)
    values = torchvision.io.decode_png(content, torchvision.io.ImageReadMode.UNCHANGED).permute(1, 2, 0).numpy()
    has_alpha = values.shape[2] in (2, 4)
    colors = values[..., :-1] if has_alpha else values
    shallow = _scaled(
        colors, _chosen(Values(float(colors.min()), float(colors.max()), False), value_range, has_16_bits=True)
    )
    if has_alpha:
        shallow = np.concatenate([shallow, _scaled(values[..., -1:], _FULL)], axis=2)
    return Image.fromarray(shallow[..., 0] if shallow.shape[2] == 1 else shallow)


def _chosen(found: Values, value_range: ValueRange, *, has_16_bits: bool) -> tuple[float, float]:
    """What becomes black and white in an image; ``UndecidedRangeError`` where that is not known."""
    if not isinstance(value_range, str):
        return float(value_range[0]), float(value_range[1])
    if value_range == "dtype":
        if has_16_bits:
            return _FULL
        raise ValueError("32 bits a channel have no range of their own; set data image.value_range: [lo, hi] or auto")
    if value_range != UNDECIDED and not found.is_float and usual_range(found) == _FULL:
        return _FULL
    raise UndecidedRangeError(
        f"more than 8 bits a channel with values from {found.low:g} to {found.high:g}, and it is not known which are "
        "black and white; set data image.value_range: dtype or [lo, hi], or save it with 8 bits",
        found,
    )


def _scaled(values: NDArray[Any], chosen: tuple[float, float]) -> NDArray[np.uint8]:
    """uint8 of the same shape; what lies outside is clipped."""
    low, high = chosen
    if chosen == _FULL and values.dtype.kind == "u" and values.dtype.itemsize == 2:
        return (values >> 8).astype(np.uint8)
    if chosen == _FULL:
        return (values.clip(low, high).astype(np.int64) >> 8).astype(np.uint8)
    scaled = (values.astype(np.float64) - low) * (255 / (high - low))
    shallow: NDArray[np.uint8] = scaled.clip(0, 255).round().astype(np.uint8)
    return shallow
