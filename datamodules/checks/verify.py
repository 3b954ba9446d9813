"""Read every image of a data set once: which are unreadable, and fingerprints of the others.

The result is cached under ``$VITRAIL_CACHE`` (``~/.cache/vitrail`` by default) as long as the table and the files'
sizes and dates of change are the same, so a second run and other processes of a run need not read the images again.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray

from datamodules.loading.decode import MAX_PIXELS, UndecidedRangeError, ValueRange, Values, bits_of, usual_range
from datamodules.table import SampleTable
from vitrail.console import tracked
from vitrail.errors import UserError
from vitrail.files import write_atomically

if TYPE_CHECKING:
    from PIL import Image

Arrays = dict[str, NDArray[np.generic]]

ReadImage = Callable[[int], torch.Tensor]
"""Returns uint8 ``(3, H, W)``, RGB, for a row of the table."""

_Read = str | Values | tuple[bytes, list[int]]

HASH_BOXES = ((0, 0, 100, 100), (4, 4, 96, 96), (0, 0, 94, 94), (6, 0, 100, 94), (0, 6, 94, 100), (6, 6, 100, 100))
"""Parts of an image that are hashed, in percent (left, top, right, bottom): the whole first, then small crops, so
that an image is also found where it was cropped a little."""

_FORMAT = 2  # Counts up when the meaning of the cached arrays changes.
_BLOCK = 4096
_THREADS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True, eq=False)
class Verification:
    """What is known of the images of a table of N rows.

    Attributes:
        bad: reason by row of each unreadable image.
        content: uint8 ``(N, 32)``, SHA-256 of the decoded pixels and their shape; 0 for unreadable images.
        perceptual: uint64 ``(N, 6)``, difference hash of each of ``HASH_BOXES``; 0 for unreadable images.
        key: hash of this state of the data, for cached results that are derived from it.
    """

    bad: dict[int, str]
    content: NDArray[np.uint8]
    perceptual: NDArray[np.uint64]
    key: str

    @property
    def readable(self) -> NDArray[np.bool_]:
        """Which images can be read, bool ``(N,)``."""
        mask = np.ones(len(self.content), dtype=bool)
        mask[list(self.bad)] = False
        return mask


def verify(
    table: SampleTable,
    read_image: ReadImage,
    decide_range: Callable[[list[float] | None, dict[str, Any]], None],
    *,
    asked_range: ValueRange = "auto",
    max_pixels: int = MAX_PIXELS,
    state: str = "",
    image_files: bool = True,
) -> Verification:
    """Read every image once, or take what an earlier run found.

    Args:
        table: of all samples.
        read_image: several threads call it. An image counts as bad where it raises a ``UserError``: it is missing,
            truncated, of an unknown format.
        decide_range: is called with what ``read_image`` is to take for black and white (None: not decided), and facts
            about the images that need it.
        asked_range: option ``image.value_range``.
        max_pixels: option ``image.max_pixels``; images are read again where it has changed.
        state: what changes with the images, where they are not files below the table's origin.
        image_files: whether each image is a file of its own.
    """
    reading = str(asked_range) if max_pixels == MAX_PIXELS else f"{asked_range} {max_pixels}"
    key = _state_key(table, f"{state}\n{reading}")

    def read_new() -> Arrays:
        def read(rows: NDArray[np.int64], known: Arrays) -> Arrays:
            return _read_all(table, read_image, decide_range, rows, known, decides=asked_range == "auto")

        if not image_files:
            return read(np.arange(len(table)), _nothing_known(len(table)))
        return _read_changed(table, reading, read)

    def check(arrays: Arrays) -> None:
        _check_shapes(arrays, len(table), content=(32,), perceptual=(len(HASH_BOXES),), deep=(3,))
        if arrays["bad_rows"].shape != arrays["bad_reasons"].shape:
            raise ValueError("not one reason for each bad image")

    arrays = cached(f"verification-{key}", read_new, check)
    decide_range(_plain(arrays["range"].tolist()), _range_facts(arrays))
    reasons = dict(zip(arrays["bad_rows"].tolist(), arrays["bad_reasons"].tolist(), strict=True))
    content, perceptual = arrays["content"].astype(np.uint8), arrays["perceptual"].astype(np.uint64)
    return Verification(reasons, content, perceptual, key)


def cached(name: str, compute: Callable[[], Arrays], check: Callable[[Arrays], None]) -> Arrays:
    """Return arrays from the cache, or compute and write them there.

    A file that cannot be read, or for which ``check`` raises KeyError or ValueError, is written again; a folder that
    cannot be written to is a warning.
    """
    if (known := _load(name, check)) is not None:
        return known
    arrays = compute()
    _keep(name, arrays)
    return arrays


def _load(name: str, check: Callable[[Arrays], None]) -> Arrays | None:
    try:
        with np.load(cache_directory() / f"{name}.npz", allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        check(arrays)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    return arrays


def _keep(name: str, arrays: Arrays) -> None:
    path = cache_directory() / f"{name}.npz"
    try:
        with write_atomically(path) as partial:
            np.savez(partial, allow_pickle=False, **arrays)
    except OSError as error:
        rank_zero_warn(f"{path.parent}: cannot keep what is known of the images ({error}); set $VITRAIL_CACHE")


def content_of(pixels: NDArray[np.uint8]) -> bytes:
    """Return the SHA-256 of a decoded image, uint8 ``(H, W, 3)``, and its shape, 32 bytes."""
    digest = hashlib.sha256(str(pixels.shape).encode())
    digest.update(pixels.tobytes())
    return digest.digest()


def cache_directory() -> Path:
    """Return ``$VITRAIL_CACHE``, or ``~/.cache/vitrail``."""
    return Path(os.environ.get("VITRAIL_CACHE") or "~/.cache/vitrail").expanduser()


def hash_boxes(image: Image.Image) -> list[int]:
    """Return the 64-bit difference hash of each of ``HASH_BOXES`` of an image.

    N. Krawetz, "Kind of Like That", 2013: the signs of the differences of neighbours in a 9×8 thumbnail.
    """
    import imagehash
    from PIL import Image

    grey = image.convert("L").resize((100, 100), Image.Resampling.BILINEAR, reducing_gap=2.0)
    bits = [imagehash.dhash(grey.crop(box)).hash for box in HASH_BOXES]
    return [int.from_bytes(np.packbits(part).tobytes(), "big") for part in bits]


def _state_key(table: SampleTable, state: str) -> str:
    """SHA-256 over the table, where its images are, and each file's size and date of change."""
    digest = hashlib.sha256(f"{_FORMAT}\n{table.fingerprint()}\n{table.root}\n{table.origin}\n{state}".encode())
    sources = table.sources
    is_file = False
    for start in range(0, len(sources), _BLOCK):
        stamps = np.array([_stamp(source) for source in sources[start : start + _BLOCK].to_pylist()], dtype=np.int64)
        is_file = is_file or bool((stamps >= 0).any())
        digest.update(stamps.tobytes())
    if not is_file and Path(table.origin).is_dir():
        # The images lie inside larger files.
        for path in sorted(Path(table.origin).rglob("*")):
            digest.update(f"{path}\n{_stamp(str(path))}\n".encode())
    return digest.hexdigest()


def _stamp(path: str) -> tuple[int, int]:
    """Size and date of change in nanoseconds; (-1, -1) where there is no such file."""
    try:
        status = os.stat(path)  # noqa: PTH116 -- a million Path objects would take their time
    except (OSError, ValueError):
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _read_changed(table: SampleTable, reading: str, read: Callable[[NDArray[np.int64], Arrays], Arrays]) -> Arrays:
    """Read the images whose files are new or have changed: a set that grows is not read all over again."""
    sources = table.sources.to_pylist()
    files = np.array([hashlib.sha256(source.encode()).digest()[:16] for source in sources], dtype="S16")
    stamps = np.array([_stamp(source) for source in sources], dtype=np.int64)
    # A file's size and date of change stand for its content here as they do in the key of all of them.
    state = f"{_FORMAT} {table.origin} {table.root} {reading}"
    name = f"images-{hashlib.sha256(state.encode()).hexdigest()}"
    arrays = _nothing_known(len(table))
    is_known = np.zeros(len(table), dtype=bool)
    if (known := _load(name, _check_known)) is not None and len(known["files"]):
        order = np.argsort(known["files"], kind="stable")
        place = order[np.searchsorted(known["files"], files, sorter=order).clip(max=len(order) - 1)]
        is_known = (known["files"][place] == files) & (known["stamps"][place] == stamps).all(axis=1)
        for key in ("content", "perceptual", "deep"):
            arrays[key][is_known] = known[key][place[is_known]]
        arrays["range"] = known["range"]
    arrays = read(np.flatnonzero(~is_known), arrays)
    good = np.ones(len(table), dtype=bool)
    good[arrays["bad_rows"].astype(np.int64)] = False
    kept = {"files": files, "stamps": stamps, **{key: arrays[key] for key in ("content", "perceptual", "deep")}}
    _keep(name, {**{key: values[good] for key, values in kept.items()}, "range": arrays["range"]})
    return arrays


def _nothing_known(count: int) -> Arrays:
    return {
        "content": np.zeros((count, 32), dtype=np.uint8),
        "perceptual": np.zeros((count, len(HASH_BOXES)), dtype=np.uint64),
        "deep": np.full((count, 3), np.nan),
        "range": np.full(2, np.nan),
    }


def _read_all(
    table: SampleTable,
    read_image: ReadImage,
    decide_range: Callable[[list[float] | None, dict[str, Any]], None],
    rows: NDArray[np.int64],
    known: Arrays,
    *,
    decides: bool,
) -> Arrays:
    """What is known of all images once these rows have been read.

    Where the data decide the value range, images that need one are read twice: for their values, then with the range.
    """
    decide_range(None, {})
    found = _read_rows(read_image, rows, known)
    is_deep = ~np.isnan(found["deep"][:, 0])
    if not decides or not is_deep.any():
        return {**found, "range": np.full(2, np.nan)}
    chosen = decided_range(found["deep"], table)
    decide_range(_plain(chosen), {})
    # Those that are known from before may have been read with another range.
    changed = not np.array_equal(found["range"], chosen)
    again = np.flatnonzero(is_deep) if changed else rows[is_deep[rows]]
    bad = dict(zip(found["bad_rows"].tolist(), found["bad_reasons"].tolist(), strict=True))
    second = _read_rows(read_image, again, found)
    bad |= dict(zip(second["bad_rows"].tolist(), second["bad_reasons"].tolist(), strict=True))
    return {**second, **_bad_arrays(bad), "range": np.array(chosen)}


def decided_range(deep: NDArray[np.generic], table: SampleTable) -> list[float]:
    """Return the smallest usual range that includes the values of all images.

    Args:
        deep: float64 ``(N, 3)``, smallest and largest value of each image with more than 8 bits a channel and whether
            they are floating point; NaN for all others.
        table: of the images, for the error.

    Raises:
        UserError: where there is none.
    """
    rows = np.flatnonzero(~np.isnan(deep[:, 0].astype(np.float64)))
    values = deep[rows].astype(np.float64)
    lowest, highest = int(rows[values[:, 0].argmin()]), int(rows[values[:, 1].argmax()])
    is_float = values[:, 2].astype(bool)
    found = Values(float(values[:, 0].min()), float(values[:, 1].max()), bool(is_float.any()))
    chosen = usual_range(found)
    shares_unit = chosen == (0.0, 1.0) and not is_float.all()
    if chosen is None or shares_unit or (is_float.any() and not is_float.all()):
        first, last = table.name(lowest), table.name(highest)
        raise UserError(
            f"{table.origin}: {len(rows)} images with more than 8 bits a channel have values from {found.low:g} "
            f"({first}) to {found.high:g} ({last}), {int(is_float.sum())} of them floating point, which no usual range "
            "holds; set data image.value_range: [lo, hi]"
        )
    return list(chosen)


def _plain(chosen: list[float]) -> list[float] | None:
    """Whole numbers where they are such; None for NaN."""
    if any(np.isnan(value) for value in chosen):
        return None
    return [int(value) if value == int(value) else value for value in chosen]


def _range_facts(arrays: Arrays) -> dict[str, Any]:
    """How many images have more than 8 bits a channel, by the bits that they use, where all were looked at."""
    deep = arrays["deep"].astype(np.float64)
    rows = deep[~np.isnan(deep[:, 0])]
    if not len(rows):
        return {}
    used = [
        "floating point" if is_float else str(bits_of(Values(low, high, False)) or "other") + " bits"
        for low, high, is_float in rows.tolist()
    ]
    return {"images": len(rows), "used": dict(sorted(Counter(used).items()))}


def _bad_arrays(bad: dict[int, str]) -> Arrays:
    reasons = np.array(list(bad.values()), dtype=np.str_)
    return {"bad_rows": np.array(list(bad), dtype=np.int64), "bad_reasons": reasons}


def _read_rows(read_image: Callable[[int], torch.Tensor], rows: NDArray[np.int64], known: Arrays) -> Arrays:
    content, perceptual, deep = known["content"], known["perceptual"], known["deep"]
    bad: dict[int, str] = {}
    results = _results(lambda index: _read_one(read_image, index), rows.tolist())
    read = tracked(results, "reading every image once", len(rows))
    for index, result in zip(rows.tolist(), read, strict=True):
        if isinstance(result, str):
            bad[index] = result
        elif isinstance(result, Values):
            deep[index] = result
        else:
            content[index] = np.frombuffer(result[0], dtype=np.uint8)
            perceptual[index] = result[1]
    return {**known, **_bad_arrays(bad)}


def _results(read: Callable[[int], _Read], rows: list[int]) -> Iterator[_Read]:
    # In blocks, so that a large data set does not queue millions of tasks.
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(rows), _BLOCK):
            yield from pool.map(read, rows[start : start + _BLOCK])


def _read_one(read_image: Callable[[int], torch.Tensor], index: int) -> _Read:
    """Why an image is bad, or its SHA-256 and difference hashes, or the values of one whose range is not decided."""
    from PIL import Image

    try:
        pixels = read_image(index).permute(1, 2, 0).contiguous().numpy()
    except UndecidedRangeError as undecided:
        return undecided.values or str(undecided)
    except UserError as error:
        return str(error)
    return content_of(pixels), hash_boxes(Image.fromarray(pixels))


def _check_known(arrays: Arrays) -> None:
    shapes = {"stamps": (2,), "content": (32,), "perceptual": (len(HASH_BOXES),), "deep": (3,)}
    _check_shapes(arrays, len(arrays["files"]), files=(), **shapes)


def _check_shapes(arrays: Arrays, count: int, **shapes: tuple[int, ...]) -> None:
    expected = {"range": (2,), **{key: (count, *shape) for key, shape in shapes.items()}}
    for key, shape in expected.items():
        if arrays[key].shape != shape:
            raise ValueError(f"{key} has the shape {arrays[key].shape}, must have {shape}")
