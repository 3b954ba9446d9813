"""Uploaded images: what is wrong with a file is found before it is decoded, where that is possible."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, UnidentifiedImageError

from app.state.context import Limits, shortened
from datamodules.loading.decode import TooLargeError, UndecidedRangeError, ValueRange, decoded, reason_of
from vitrail.errors import UserError

if TYPE_CHECKING:
    import torch

    from app.state.runs import ServedRun

_HINT = "save it as JPEG or PNG and try again"
_SHOWN = 512
"""Longest side in pixels of an upload on the page."""

one_at_a_time = threading.Lock()
"""To be held while an upload is decoded and scaled down: this bounds the memory of all requests together."""


@dataclass(frozen=True)
class Upload:
    """An uploaded file.

    Attributes:
        name: of the file.
        image: RGB and upright, scaled down to what a page shows; None where it cannot be read.
        problem: why not, in one line; empty where it can.
        inputs: by name of a run uint8 ``(3, size, size)``, the image as that run's model takes it. The whole image is
            not kept: sixteen of them would fill the memory.
    """

    name: str
    image: Image.Image | None
    problem: str = ""
    inputs: Mapping[str, torch.Tensor] = field(default_factory=dict)


def read_uploads(paths: Sequence[str | Path], limits: Limits, runs: Sequence[ServedRun]) -> list[Upload]:
    """Read uploaded files for the models of some runs; unreadable ones do not affect the others.

    Raises:
        UserError: there are none, or more than are allowed at once.
    """
    if not paths:
        raise UserError("there is no image yet; upload, paste or take one")
    if len(paths) > limits.images:
        raise UserError(f"{len(paths)} images are too many at once; leave {limits.images} or fewer")
    return [_read(Path(path), limits, runs) for path in paths]


def _read(path: Path, limits: Limits, runs: Sequence[ServedRun]) -> Upload:
    inputs: dict[str, torch.Tensor] = {}
    image: Image.Image | None = None
    try:
        for value_range in {str(run.value_range): run.value_range for run in runs}.values():
            with one_at_a_time:
                pixels = read_pixels(path, limits, value_range)
                inputs |= {run.name: run.prepared(pixels) for run in runs if run.value_range == value_range}
                image = image or _small(pixels)
                del pixels
    except UserError as error:
        return Upload(path.name, None, str(error))
    return Upload(path.name, image, inputs=inputs)


def _small(pixels: torch.Tensor) -> Image.Image:
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    image.thumbnail((_SHOWN, _SHOWN), Image.Resampling.LANCZOS)
    return image


def read_upload(path: str | Path, limits: Limits | None = None, value_range: ValueRange = "auto") -> Image.Image:
    """Read an upload as ``read_pixels``, as an RGB image."""
    return Image.fromarray(read_pixels(path, limits, value_range).permute(1, 2, 0).contiguous().numpy())


class UploadError(UserError):
    """A file that is refused.

    Attributes:
        status: of HTTP that says why.
    """

    def __init__(self, line: str, status: HTTPStatus = HTTPStatus.UNPROCESSABLE_ENTITY) -> None:
        super().__init__(line)
        self.status = status


def read_pixels(
    source: str | Path | bytes, limits: Limits | None = None, value_range: ValueRange = "auto", name: str = ""
) -> torch.Tensor:
    """Read an upload in its upright orientation, by the rules and formats of data sets.

    Args:
        source: the uploaded file or its content; neither its name nor its content is trusted.
        limits: of size; the usual ones by default.
        value_range: as of ``datamodules.loading.decode.read_image``.
        name: of the file, where its content is given.

    Returns:
        uint8 ``(3, H, W)``, RGB.

    Raises:
        UploadError: the file is too large, has too many pixels, is not an image of a known format, is cut short or
            damaged.
    """
    limits = limits or Limits()
    name = name if isinstance(source, bytes) else Path(source).name
    with upload_errors(name, limits):
        _check_size(source, limits)
        return decoded(source, value_range, limits.upload_pixels)


@contextmanager
def upload_errors(name: str, limits: Limits) -> Iterator[None]:
    """Turn what decoders raise into an ``UploadError`` that names the upload, the reason and the fix."""
    label = f"image {shortened(name, 60)!r}"
    try:
        yield
    except UploadError as error:
        raise UploadError(f"{label}: {error}", error.status) from None
    except UndecidedRangeError:
        raise UploadError(f"{label}: has more than 8 bits a channel, of unknown range; {_HINT}") from None
    except UnidentifiedImageError as error:
        reason = reason_of(error) if "HEIC" in str(error) else "not an image in a supported format"
        raise UploadError(f"{label}: {reason}; {_HINT}", HTTPStatus.UNSUPPORTED_MEDIA_TYPE) from None
    except TooLargeError as error:
        most = f"at most {limits.upload_pixels / 1e6:g} million are decoded"
        line = f"{label}: has {error}, {most}; scale it down, or start the server with --max-pixels N"
        raise UploadError(line, HTTPStatus.REQUEST_ENTITY_TOO_LARGE) from None
    # Decoders of broken files raise whatever they stumble over; here each of these means the same.
    except Exception as error:
        raise UploadError(f"{label}: is damaged or cut short ({_reason(error)}); {_HINT}") from error


def _check_size(source: str | Path | bytes, limits: Limits) -> None:
    if isinstance(source, bytes):
        size = len(source)
    else:
        try:
            size = Path(source).stat().st_size if Path(source).is_file() else -1
        except (OSError, ValueError):
            size = -1
    if size < 0:
        raise UploadError("the upload is no longer there; upload it again")
    if size == 0:
        raise UploadError("is empty; upload it again")
    if size > limits.upload_bytes:
        most = f"{limits.upload_bytes / 2**20:g} MiB"
        line = f"has {size / 2**20:.1f} MiB, at most {most} are read; scale it down"
        raise UploadError(line, HTTPStatus.REQUEST_ENTITY_TOO_LARGE)


def _reason(error: Exception) -> str:
    """In one short line without paths."""
    line = " ".join(str(error).split())
    return shortened(line, 60) if line and "/" not in line else type(error).__name__
