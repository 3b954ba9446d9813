"""Reading a picture that somebody uploaded: what is wrong with it is found before it is decoded, where that can be."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, UnidentifiedImageError

from app.context import Limits
from datamodules.schema import UserError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""Formats that are decoded at all: what cameras, phones and browsers write. Pillow knows dozens more, some of which
start other programs (EPS); each decoder less is one less to be fooled."""

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
"""What a browser offers to choose from; the content decides, not the name."""

_WAY_OUT = "save it as JPEG or PNG and try again"


def read_picture(path: str | Path, limits: Limits | None = None) -> Image.Image:
    """A picture as 8-bit RGB in its upright orientation; of a moving picture the first frame.

    Transparent parts become white, palettes, greyscale and CMYK become RGB, 16 bits a channel become 8.

    Args:
        path: the uploaded file; nothing of its name or content is trusted.
        limits: of size; the usual ones by default.

    Raises:
        UserError: for a file that is too large, has too many pixels, is no picture of the formats above, is cut short
            or damaged.
    """
    limits = limits or Limits()
    name = f"picture {_shortened(Path(path).name)!r}"
    _check_size(Path(path), name, limits)
    Image.init()  # else a decoder that was never used before is not known
    try:
        with Image.open(path, formats=FORMATS) as image:
            _check_pixels(image, name, limits)
            return _decoded(image)
    except UserError:
        raise
    except UnidentifiedImageError:
        raise UserError(f"{name}: is no picture in a format that is read here; {_WAY_OUT}") from None
    except Image.DecompressionBombError:
        raise UserError(_too_many(name, "far too many pixels", limits)) from None
    # Decoders of broken files raise whatever they stumble over; here each of these means the same.
    except Exception as error:
        raise UserError(f"{name}: is damaged or cut short ({_reason(error)}); {_WAY_OUT}") from error


def _decoded(image: Image.Image) -> Image.Image:
    """All pixels, by the rules that hold for every picture of a data set."""
    from datamodules.images import picture_pixels

    return Image.fromarray(picture_pixels(image).permute(1, 2, 0).contiguous().numpy())


def _check_size(path: Path, name: str, limits: Limits) -> None:
    try:
        size = path.stat().st_size if path.is_file() else -1
    except (OSError, ValueError):
        size = -1
    if size < 0:
        raise UserError(f"{name}: the upload is no longer there; upload it again")
    if size == 0:
        raise UserError(f"{name}: is empty; upload it again")
    if size > limits.upload_bytes:
        most = f"{limits.upload_bytes / 2**20:g} MiB"
        raise UserError(f"{name}: has {size / 2**20:.1f} MiB, at most {most} are read; scale it down")


def _check_pixels(image: Image.Image, name: str, limits: Limits) -> None:
    if image.width * image.height > limits.upload_pixels:
        raise UserError(_too_many(name, f"{image.width} × {image.height} pixels", limits))


def _too_many(name: str, size: str, limits: Limits) -> str:
    return f"{name}: has {size}, at most {limits.upload_pixels / 1e6:g} million are decoded; scale it down"


def _reason(error: Exception) -> str:
    """In one short line; not where the file lies."""
    said = " ".join(str(error).split())
    return _shortened(said) if said and "/" not in said else type(error).__name__


def _shortened(text: str, length: int = 60) -> str:
    return text if len(text) <= length else f"{text[:length]}…"
