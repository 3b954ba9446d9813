"""Reading a picture, whatever its file format and colour mode, as 8-bit RGB in its upright orientation.

A picture that cannot be read whole is an error that names it, never a blank or half a picture.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError

from datamodules.schema import UserError

MAX_PIXELS = 89_478_485
"""Larger pictures are refused before they are decoded: a small file can hold one that fills the memory. Pillow's own
limit, at which it only warns."""

# We refuse what Pillow would warn of, so its warning would come on top of our error. Set once, for all threads.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

_BACKGROUND = (255, 255, 255)

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
    """A picture that cannot be read; the message names it and says why."""


def read_image(source: str | Path | bytes, name: str = "") -> torch.Tensor:
    """Reads a picture from a file or from the bytes of one.

    Orientation tags are followed, palettes, greyscale and CMYK become RGB, transparent parts white, 16 bits a channel
    become 8; of a moving picture it is the first frame.

    Args:
        source: path of the file, or its content.
        name: what errors call the picture; the path by default.

    Returns:
        uint8 ``(3, H, W)``, RGB, not contiguous.

    Raises:
        ImageError: for a missing, truncated or unknown file, for more than ``MAX_PIXELS`` and for modes whose range is
            unknown (floating point, 32 bits).
    """
    label = name or ("picture" if isinstance(source, bytes) else str(source))
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ImageError(_too_large(label, f"{image.width} × {image.height} pixels"))
            return picture_pixels(image)
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(_too_large(label, str(error))) from error
    # Decoders of broken files raise whatever they stumble over; here each of these means the same.
    except Exception as error:
        raise ImageError(f"{label}: {_reason(error)}; replace or remove this picture") from error


def picture_pixels(image: Image.Image) -> torch.Tensor:
    """Pixels of an opened picture, made as ``read_image`` makes them.

    Returns:
        uint8 ``(3, H, W)``, RGB, not contiguous.

    Raises:
        ValueError: for modes whose range is unknown; Pillow raises others for broken files.
    """
    pixels = np.array(_to_rgb(_upright(image)))
    # Channels stay interleaved in memory: torch resizes uint8 about three times as fast so, to the same values.
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _too_large(label: str, size: str) -> str:
    return f"{label}: too large to be decoded ({size}, limit {MAX_PIXELS}); scale it down or remove it"


def _reason(error: Exception) -> str:
    """What is wrong with the file, in one line."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, IsADirectoryError):
        return "a folder, not a picture"
    if isinstance(error, PermissionError):
        return "may not be read (permission denied)"
    if isinstance(error, UnidentifiedImageError):
        return "not a picture in a known format"
    return f"cannot be decoded ({' '.join(str(error).split()) or type(error).__name__})"


def _upright(image: Image.Image) -> Image.Image:
    """The picture turned as its orientation tag says; a tag that cannot be read is none."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except (OSError, SyntaxError, ValueError, KeyError, TypeError):
        orientation = 1
    turn = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _from_deep_grey(image).convert("RGB")
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        background = Image.new("RGBA", picture.size, (*_BACKGROUND, 255))
        return Image.alpha_composite(background, picture).convert("RGB")
    return image.convert("RGB")


def _from_deep_grey(image: Image.Image) -> Image.Image:
    """8-bit greyscale of a deeper one. Pillow's own conversion would clip everything above 255 to white."""
    values = np.array(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"mode {image.mode} with values {values.min()} to {values.max()}; save it with 8 or 16 bits")
    return Image.fromarray((values >> 8).astype(np.uint8))
