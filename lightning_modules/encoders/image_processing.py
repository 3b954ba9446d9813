"""What the image processor of a ``transformers`` folder does, in the terms of our own evaluation transform."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple, cast

from vitrail.errors import UserError
from vitrail.types import CropRounding, Interpolation, Resize

FILES = ("processor_config.json", "preprocessor_config.json")
"""Where it may be described; ``transformers`` 5 writes the first, and prefers it."""

_FILTERS: dict[int, Interpolation] = {2: "bilinear", 3: "bicubic"}


class Statistics(NamedTuple):
    """Mean and standard deviation of each channel, for pixels in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class Preprocessing(NamedTuple):
    """How images are made, apart from their size; see ``datamodules.options.ImageOptions``."""

    resize: Resize
    crop_fraction: float
    interpolation: Interpolation
    crop_rounding: CropRounding


def image_processor(directory: str, key: str) -> Any:
    """The image processor of a model's folder; None where no file describes one.

    Args:
        directory: local folder of the model.
        key: of the option that names it, for messages.

    Raises:
        UserError: if it cannot be read, or only exists as code of its own.
    """
    folder = Path(directory)
    if not any(_describes(folder / name, key) for name in FILES):
        return None
    from transformers import AutoImageProcessor

    try:
        return cast("Any", AutoImageProcessor).from_pretrained(directory, local_files_only=True)
    except Exception as error:
        raise _unreadable(folder, key, error) from error


def statistics_of(processor: Any, directory: str, key: str) -> Statistics:
    """Mean and standard deviation that pixels in [0, 1] are normalised with, whatever range it scales them to.

    Raises:
        UserError: if they are no numbers for three channels.
    """
    try:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        if processor.do_normalize:
            mean, std = (_channels(values) for values in (processor.image_mean, processor.image_std))
        scale = 255 * float(processor.rescale_factor) if processor.do_rescale else 255.0
        found = Statistics(tuple(value / scale for value in mean), tuple(value / scale for value in std))
        if not all(math.isfinite(value) for value in (*found.mean, *found.std)) or min(found.std) <= 0:
            raise ValueError("std must be above 0")
    except (AttributeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise _unreadable(Path(directory), key, error) from error
    return found


def preprocessing_of(processor: Any, directory: str, key: str) -> Preprocessing:
    """How it brings images to the size of the network.

    Raises:
        UserError: if that is nothing that the evaluation transform can do.
    """

    def refused(what: str) -> UserError:
        return UserError(f"{key}: {directory} wants images {what}, which is not supported; give another model")

    interpolation = _FILTERS.get(int(getattr(processor, "resample", None) or 0))
    size, crop = (dict(getattr(processor, name, None) or {}) for name in ("size", "crop_size"))
    size, crop = ({name: value for name, value in one.items() if value is not None} for one in (size, crop))
    if not getattr(processor, "do_resize", False):
        raise refused("in their own size (do_resize: false)")
    if interpolation is None:
        raise refused(f"scaled by resample {getattr(processor, 'resample', None)} instead of bilinear or bicubic")
    if getattr(processor, "do_pad", False):
        raise refused("with borders (do_pad: true)")
    cropped = int(crop.get("height", 0)) if getattr(processor, "do_center_crop", False) else 0
    if cropped and crop.get("width") != cropped:
        raise refused(f"of {crop.get('width')} × {cropped} pixels")
    if set(size) == {"shortest_edge"} and cropped:
        resize: Resize = "crop"
        side = int(size["shortest_edge"])
    elif set(size) == {"height", "width"} and size["height"] == size["width"]:
        resize, side = "squash", int(size["height"])
    else:
        raise refused(f"of the size {size}" + ("" if cropped else " without a center crop"))
    if cropped > side:
        raise refused(f"of {side} pixels with borders up to {cropped}")
    return Preprocessing(resize, (cropped or side) / side, interpolation, "down")


def _describes(path: Path, key: str) -> bool:
    """Whether a file has an image processor; ``processor_config.json`` may be of the text alone."""
    if not path.is_file():
        return False
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(path, key, error) from error
    if not isinstance(values, dict):
        raise _unreadable(path, key, ValueError("no object"))
    return path.name != FILES[0] or "image_processor" in values


def _channels(values: Any) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def _unreadable(path: Path, key: str, error: BaseException) -> UserError:
    lines = str(error).strip().splitlines()
    reason = lines[0][:200] if lines else type(error).__name__
    return UserError(f"{key}: {path} has no image_mean and image_std that can be read ({reason}); mend its {FILES[1]}")
