"""Reading an image that somebody uploaded: what is wrong with it is found before it is decoded, where that can be."""

from __future__ import annotations

import threading
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError

from app.state.context import Limits
from datamodules.loading.decode import TooLargeError, UndecidedRangeError, ValueRange, decoded, reason_of
from vitrail.errors import UserError

_WAY_OUT = "save it as JPEG or PNG and try again"

one_at_a_time = threading.Lock()
"""To be held while an upload is decoded and made small: what all requests decode together is bounded by that."""


def read_upload(path: str | Path, limits: Limits | None = None, value_range: ValueRange = "auto") -> Image.Image:
    """An image as 8-bit RGB in its upright orientation, by the rules and formats that hold for those of data sets.

    Args:
        path: the uploaded file; nothing of its name or content is trusted.
        limits: of size; the usual ones by default.
        value_range: as of ``datamodules.loading.decode.read_image``.

    Raises:
        UserError: for a file that is too large, has too many pixels, is no image of a known format, is cut short or
            damaged.
    """
    return Image.fromarray(read_pixels(path, limits, value_range).permute(1, 2, 0).contiguous().numpy())


def read_pixels(path: str | Path, limits: Limits | None = None, value_range: ValueRange = "auto") -> torch.Tensor:
    """See ``read_upload``.

    Returns:
        uint8 ``(3, H, W)``, RGB.

    Raises:
        UserError: as ``read_upload``.
    """
    limits = limits or Limits()
    name = f"image {_shortened(Path(path).name)!r}"
    _check_size(Path(path), name, limits)
    try:
        return decoded(path, value_range, limits.upload_pixels)
    except UndecidedRangeError:
        raise UserError(f"{name}: has more than 8 bits a channel, of unknown range; {_WAY_OUT}") from None
    except UnidentifiedImageError as error:
        reason = reason_of(error) if "HEIC" in str(error) else "is no image in a format that is read here"
        raise UserError(f"{name}: {reason}; {_WAY_OUT}") from None
    except TooLargeError as error:
        raise UserError(_too_many(name, str(error), limits)) from None
    # Decoders of broken files raise whatever they stumble over; here each of these means the same.
    except Exception as error:
        raise UserError(f"{name}: is damaged or cut short ({_reason(error)}); {_WAY_OUT}") from error


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


def _too_many(name: str, size: str, limits: Limits) -> str:
    return f"{name}: has {size}, at most {limits.upload_pixels / 1e6:g} million are decoded; scale it down"


def _reason(error: Exception) -> str:
    """In one short line; not where the file lies."""
    said = " ".join(str(error).split())
    return _shortened(said) if said and "/" not in said else type(error).__name__


def _shortened(text: str, length: int = 60) -> str:
    return text if len(text) <= length else f"{text[:length]}…"
