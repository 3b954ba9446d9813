"""Read every image of a data set once: which are unreadable, and fingerprints of the others.

Each image is decoded once: the cache of decoded images and the audit's quality facts take the pixels from here.
``checks.verify`` allows less: headers and the bytes of the files, or nothing.

The result is cached under ``$VITRAIL_CACHE`` (``~/.cache/vitrail`` by default) as long as the table and the files'
sizes and dates of change are the same, so a second run and other processes of a run need not read the images again.

Images that are unlike the others of their set: blurred, dark, bright, empty, of odd size or shape, gray, or special.

A set is its own measure: what is dark among photos of products is usual among photos of the night. A value is a finding
where it is far from the median by robust standards (``FAR`` times the median absolute deviation, scaled to a standard
deviation; B. Iglewicz and D. Hoaglin, "How to Detect and Handle Outliers", 1993) and also beyond a bound of its own, so
that nothing is odd in a set where all are fine. Values are taken from the image scaled down to ``SIDE`` pixels.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import xxhash
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from numpy.typing import NDArray
from PIL import Image

from datamodules.loading.decode import (
    MAX_PIXELS,
    UndecidedRangeError,
    ValueRange,
    Values,
    bits_of,
    read_header,
    usual_range,
)
from datamodules.options import Verify
from datamodules.table import SampleTable
from vitrail.console import tracked
from vitrail.errors import UserError
from vitrail.files import cache_directory, write_atomically

SIDE = 256
"""Long side in pixels of the image of which facts are taken; a smaller one stays as it is."""

FAR = 3.5

FACTS = ("width", "height", "brightness", "contrast", "entropy", "sharpness", "chroma", "kind", "frames")
"""What is known of each image: width and height in pixels as shown; mean and standard deviation of its gray levels,
0 to 255; their entropy, 0 to 8 bits; the variance of their Laplacian (J. Pech-Pacheco et al., ICPR 2000); the mean
difference of the largest and smallest of a pixel's channels; the sum of what it is of ``KINDS``; images in the file."""

KINDS = {
    "animated": 1,
    "cmyk": 2,
    "16-bit": 4,
    "rotated": 8,
    "transparent-palette": 16,
    "transparent": 32,
    "gray-file": 64,
}
"""Kinds of files that are read otherwise than a plain RGB image."""

Severity = Literal["high", "medium", "low"]


def measured(pixels: NDArray[np.uint8], source: str) -> NDArray[np.float32]:
    """Return the ``FACTS`` of a decoded image, uint8 ``(H, W, 3)``, and of its file, if ``source`` is one."""
    height, width = pixels.shape[:2]
    image = Image.fromarray(pixels)
    image.thumbnail((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=1.0)
    red, green, blue = (np.asarray(channel) for channel in image.split())
    gray = image.convert("L")
    levels = np.arange(256)
    shares: NDArray[np.float64] = np.array(gray.histogram(), dtype=np.float64) / (gray.width * gray.height)
    present = shares[shares > 0]
    mean = float(shares @ levels)
    wide = np.asarray(gray).astype(np.int16)
    laplacian = wide[:-2, 1:-1] + wide[2:, 1:-1] + wide[1:-1, :-2] + wide[1:-1, 2:] - 4 * wide[1:-1, 1:-1]
    chroma = np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)
    facts = (
        mean,
        math.sqrt(max(float(shares @ (levels - mean) ** 2), 0.0)),
        -float(present @ np.log2(present)),
        float(laplacian.var(dtype=np.float32)) if laplacian.size else 0.0,
        float(chroma.mean()),
    )
    return np.array((width, height, *facts, *_file_facts(source)), dtype=np.float32)


def _file_facts(source: str) -> tuple[int, int]:
    """What of ``KINDS`` a file is, and its number of images; 0 and 1 where the image is no file of its own."""
    try:
        header = read_header(source)
    except UserError:
        return 0, 1
    is_kind = {
        "animated": header.frames > 1,
        "cmyk": header.mode == "CMYK",
        "16-bit": header.deep,
        "rotated": header.turned,
        "transparent-palette": header.mode == "P" and header.transparent,
        "transparent": header.mode != "P" and header.transparent,
        "gray-file": header.mode in ("1", "L", "LA"),
    }
    return sum(KINDS[kind] for kind, holds in is_kind.items() if holds), header.frames


@dataclass(frozen=True)
class Outliers:
    """What one kind of finding found among the images of a set.

    Attributes:
        finding: such as ``blurry``.
        rows: int64 ``(n,)``, the worst first.
        values: float64 ``(n,)``, of each.
        threshold: which the values are beyond.
        severity: of each.
        suggestion: what to do.
    """

    finding: str
    rows: NDArray[np.int64]
    values: NDArray[np.float64]
    threshold: float
    severity: list[Severity]
    suggestion: str


@dataclass(frozen=True)
class _Rule:
    """A value of each image, and from where on it is a finding.

    Attributes:
        value: takes the facts, float64 by name.
        bound: beyond which a value must be, whatever the set.
        severe: beyond which it is a grave finding; always one, whatever the set.
        below: whether small values are the odd ones; otherwise large ones.
    """

    value: Callable[[dict[str, NDArray[np.float64]]], NDArray[np.float64]]
    bound: float
    severe: float
    below: bool
    suggestion: str


def _octaves(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """How many times a value is twice or half the median."""
    logs = np.log2(np.maximum(values, 1e-9))
    away: NDArray[np.float64] = np.abs(logs - np.median(logs))
    return away


_FLAT = 8.0  # Contrast in levels below which there are no edges that could be sharp.


def _sharpness(facts: dict[str, NDArray[np.float64]]) -> NDArray[np.float64]:
    """Sharpness, of flat images the median, because they are found to be dark, bright or empty instead."""
    sharpness: NDArray[np.float64] = np.where(
        facts["contrast"] < _FLAT, np.median(facts["sharpness"]), facts["sharpness"]
    )
    return sharpness


RULES: dict[str, _Rule] = {
    "low-information": _Rule(lambda facts: facts["entropy"], 3.0, 0.3, True, "nearly one color: remove or replace it"),
    "dark": _Rule(
        lambda facts: facts["brightness"], 50.0, 20.0, True, "underexposed: replace it, or check that it is meant"
    ),
    "bright": _Rule(
        lambda facts: facts["brightness"], 225.0, 254.0, False, "overexposed or empty: replace it, or check it"
    ),
    "blurry": _Rule(_sharpness, 100.0, 2.0, True, "replace it by a sharp one, or check that it is meant"),
    "odd-size": _Rule(
        lambda facts: _octaves(facts["width"] * facts["height"]),
        3.0,
        8.0,
        False,
        "8 times more or fewer pixels than usual: is it a thumbnail, or another kind of image?",
    ),
    "odd-aspect": _Rule(
        lambda facts: _octaves(facts["width"] / facts["height"]),
        1.0,
        3.0,
        False,
        "another shape than usual: the center crop cuts most of it away; crop it, or set image.resize: pad",
    ),
}
"""Bounds, in the units of ``FACTS``; of sizes and shapes in powers of two away from the median."""

GRAY, COLORED, FEW = 3.0, 6.0, 0.1
"""Chroma below which an image is gray and from which it is colored (JPEG leaves traces), and the share of images up to
which the other kind is the exception."""

_KIND_NOTES: dict[str, tuple[Severity, str]] = {
    "animated": ("medium", "only the first frame is read; save the frame that is meant"),
    "cmyk": ("low", "converted to RGB without its color profile; save it as RGB if colors matter"),
    "16-bit": ("low", "scaled to 8 bits by image.value_range"),
    "rotated": ("low", "turned upright by its orientation tag; other programs may not do that"),
    "transparent-palette": ("low", "transparent parts become white"),
    "transparent": ("low", "transparent parts become white"),
}


def outliers(facts: NDArray[np.float32], rows: NDArray[np.int64]) -> list[Outliers]:
    """Find what is odd among some images.

    Args:
        facts: float32 ``(N, F)``, see ``FACTS``.
        rows: int64 ``(n,)``, of those that can be read.
    """
    named = {name: facts[rows, place].astype(np.float64) for place, name in enumerate(FACTS)}
    found = [_beyond(name, rule, rule.value(named), rows) for name, rule in RULES.items()] if len(rows) else []
    found += _odd_colors(named["chroma"], rows) if len(rows) else []
    kinds = named["kind"].astype(np.int64)
    for name, (severity, note) in _KIND_NOTES.items():
        own = np.flatnonzero(kinds & KINDS[name])
        values = named["frames"][own] if name == "animated" else np.ones(len(own))
        found.append(Outliers(name, rows[own], values, 1.0, [severity] * len(own), note))
    return [one for one in found if len(one.rows)]


def _beyond(name: str, rule: _Rule, values: NDArray[np.float64], rows: NDArray[np.int64]) -> Outliers:
    sign = -1.0 if rule.below else 1.0
    # Of a variance the usual spread is that of its logarithm.
    scaled = np.log(np.maximum(values, 1e-3)) if name == "blurry" else values
    middle = np.median(scaled)
    spread = 1.4826 * float(np.median(np.abs(scaled - middle)))
    usual = float(middle + sign * FAR * spread)
    usual = float(np.exp(usual)) if name == "blurry" else usual
    # What is beyond all doubt is a finding also where most images are so.
    threshold = min(max(sign * usual, sign * rule.bound), sign * rule.severe)
    is_severe = sign * values >= sign * rule.severe
    places = np.flatnonzero((sign * values > threshold) | is_severe)
    places = places[np.argsort(-sign * values[places], kind="stable")]
    severity: list[Severity] = ["high" if is_severe[place] else "medium" for place in places.tolist()]
    return Outliers(name, rows[places], values[places], sign * threshold, severity, rule.suggestion)


def _odd_colors(chroma: NDArray[np.float64], rows: NDArray[np.int64]) -> list[Outliers]:
    """Gray images where nearly all are colored, and colored ones where nearly all are gray."""
    found = []
    for name, is_odd, threshold, note in (
        (
            "gray-in-color",
            chroma < GRAY,
            GRAY,
            "the only gray images may give their class away: color them all or none",
        ),
        (
            "color-in-gray",
            chroma >= COLORED,
            COLORED,
            "the only colored images: convert them to gray if color has no meaning",
        ),
    ):
        if 0 < is_odd.sum() <= FEW * len(rows):
            places = np.flatnonzero(is_odd)
            found.append(Outliers(name, rows[places], chroma[places], threshold, ["medium"] * len(places), note))
    return found


Arrays = dict[str, NDArray[np.generic]]

ReadImage = Callable[[int], torch.Tensor]
"""Returns uint8 ``(3, H, W)``, RGB, for a row of the table."""


@dataclass(frozen=True)
class Sink:
    """Takes the images that are decoded here, so that they are not decoded once more.

    Attributes:
        prepare: is called with row and image, uint8 ``(3, H, W)``, by several threads.
        take: is called with row, content hash, uint8 ``(32,)``, and what ``prepare`` returned, in the order of rows.
        close: is called at the end.
    """

    prepare: Callable[[int, torch.Tensor], Any]
    take: Callable[[int, NDArray[np.uint8], Any], None]
    close: Callable[[], None]


@dataclass(frozen=True)
class _Found:
    """What one read image brings: 32 bytes, a thumbnail to be hashed, quality facts, and what the sink prepared."""

    content: bytes
    small: NDArray[np.uint8] | None = None
    quality: NDArray[np.float32] | None = None
    prepared: Any = None


_Read = str | Values | _Found

HASH_BOXES = ((0, 0, 100, 100), (4, 4, 96, 96), (0, 0, 94, 94), (6, 0, 100, 94), (0, 6, 94, 100), (6, 6, 100, 100))
"""Parts of an image that are hashed, in percent (left, top, right, bottom): the whole first, then small crops, so
that an image is also found where it was cropped a little."""

_FORMAT = 4  # Counts up when the meaning of the cached arrays changes.
_BLOCK = 4096
_QUEUED, _TASK = 512, 16
"""Images in flight, and of a thread's task: its hashes are computed at once, which costs a tenth of one by one."""

_ANNOUNCED, _SAMPLED = 10.0, 256  # Seconds from which the expected time is reported, and the images after which it is.
_THREADS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True, eq=False)
class Verification:
    """What is known of the images of a table of N rows.

    Attributes:
        bad: reason by row of each unreadable image.
        content: uint8 ``(N, 32)``, what distinguishes images, see ``mode``; 0 for unreadable images.
        perceptual: uint64 ``(N, 6)``, difference hash of each of ``HASH_BOXES``; 0 for unreadable images and where no
            image was decoded.
        key: hash of this state of the data, for cached results that are derived from it.
        mode: how far images were read, ``checks.verify``. With ``full`` the content is a hash of the decoded pixels,
            with ``headers`` of the file, with ``never`` of its path, size and date of change.
        quality: float32 ``(N, F)``, see ``datamodules.checks.verify``; NaN where it was not asked for.
    """

    bad: dict[int, str]
    content: NDArray[np.uint8]
    perceptual: NDArray[np.uint64]
    key: str
    mode: Verify = "full"
    quality: NDArray[np.float32] | None = None

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
    mode: Verify = "full",
    quality: bool = False,
    sink: Sink | None = None,
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
        mode: how far images are read; ``headers`` needs files.
        quality: whether the facts of the audit are wanted; images without them are read again.
        sink: also gets the images that are decoded.

    Raises:
        UserError: ``headers`` of images that are no files.
    """
    reading = str(asked_range) if max_pixels == MAX_PIXELS else f"{asked_range} {max_pixels}"
    reading += "" if mode == "full" else f" {mode}"
    key = _state_key(table, f"{state}\n{reading}")
    if mode == "never":
        return Verification({}, _stamped(table, reading, key), _no_hashes(len(table)), key, mode)
    if mode == "headers" and not image_files:
        raise UserError(
            f"data checks.verify: headers, but the images of {table.origin} are no files; set full or never"
        )
    reader = _Reader(table, read_image, max_pixels, reading, mode, quality, sink)

    def read_new() -> Arrays:
        def read(rows: NDArray[np.int64], known: Arrays) -> Arrays:
            return _read_all(reader, decide_range, rows, known, decides=asked_range == "auto")

        if not image_files:
            return read(np.arange(len(table)), _nothing_known(len(table)))
        return _read_changed(table, reading, read, quality=quality)

    arrays = cached(f"verification-{key}", read_new, lambda found: _check(found, len(table), quality=quality))
    decide_range(_plain(arrays["range"].tolist()), _range_facts(arrays))
    reasons = dict(zip(arrays["bad_rows"].tolist(), arrays["bad_reasons"].tolist(), strict=True))
    content, perceptual = arrays["content"].astype(np.uint8), arrays["perceptual"].astype(np.uint64)
    return Verification(reasons, content, perceptual, key, mode, arrays["quality"].astype(np.float32))


def _check(arrays: Arrays, count: int, *, quality: bool) -> None:
    """Refuse what is not the result of a verification of ``count`` images."""
    _check_shapes(arrays, count, **_SHAPES)
    if arrays["bad_rows"].shape != arrays["bad_reasons"].shape:
        raise ValueError("not one reason for each bad image")
    good = np.delete(arrays["quality"], arrays["bad_rows"].astype(np.int64), axis=0)
    if quality and np.isnan(good.astype(np.float64)).any():
        raise ValueError("quality facts are missing")


def _no_hashes(count: int) -> NDArray[np.uint64]:
    return np.zeros((count, len(HASH_BOXES)), dtype=np.uint64)


def _stamped(table: SampleTable, reading: str, key: str) -> NDArray[np.uint8]:
    """Hash of how images are read and of each one's path, size and date of change, or place where it is no file."""
    states = [f"{reading}\n{source}\n{_stamp(source)}" for source in table.sources.to_pylist()]
    if len(table) and _stamp(table.source(0))[0] < 0:
        states = [f"{key}\n{row}" for row in range(len(table))]
    digests = b"".join(hashlib.sha256(state.encode()).digest() for state in states)
    return np.frombuffer(digests, dtype=np.uint8).reshape(-1, 32).copy()


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
    """Return a hash of a decoded image, uint8 ``(H, W, 3)``, and its shape, 32 bytes: SHA-256 over its XXH3-128.

    XXH3 reads memory about as fast as it can be read; SHA-256 of all pixels takes a third of the time of decoding.
    """
    inner = xxhash.xxh3_128(np.ascontiguousarray(pixels).data).digest()
    return hashlib.sha256(str(pixels.shape).encode() + inner).digest()


_SIDE, _COLUMNS, _ROWS = 64, 9, 8
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
_MIN_ROWS = 64  # Of taller images rows are left out, which hardly shows in eight rows.


def hash_boxes(image: Image.Image) -> list[int]:
    """Return the 64-bit difference hash of each of ``HASH_BOXES`` of an RGB image.

    N. Krawetz, "Kind of Like That", 2013: the signs of the differences of neighbours in a 9×8 thumbnail.
    """
    hashes: list[int] = _difference_hashes(_small(np.array(image))[None])[0].tolist()
    return hashes


def _small(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Scale an image, uint8 ``(H, W, 3)``, to ``(64, 64, 3)``."""
    image = torch.from_numpy(pixels[:: max(1, len(pixels) // _MIN_ROWS)]).permute(2, 0, 1)[None]
    small = torch.nn.functional.interpolate(image, size=(_SIDE, _SIDE), mode="bilinear", antialias=True)[0]
    scaled: NDArray[np.uint8] = small.permute(1, 2, 0).numpy()
    return scaled


def _difference_hashes(small: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Hash small images, uint8 ``(n, 64, 64, 3)``, to ``(n, 6)``; two products of matrices cut all boxes from each."""
    gray = (small.astype(np.float32) @ _LUMA).round()
    across, down = _box_filters()
    # Rounded to levels as Pillow does: on a plain background neighbours are equal, not nearly equal.
    cells = (down @ (gray @ across).round().clip(0, 255)).round().clip(0, 255)
    count, boxes = len(cells), len(HASH_BOXES)
    own = cells.reshape(count, boxes, _ROWS, boxes, _COLUMNS)[:, range(boxes), :, range(boxes)]
    bits = np.packbits((own[..., 1:] > own[..., :-1]).reshape(boxes, count, -1), axis=-1)
    return np.ascontiguousarray(bits.view(">u8")[..., 0].T.astype(np.uint64))


@cache
def _box_filters() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Lanczos filters of all boxes, ``(64, 6 · 9)`` across and ``(6 · 8, 64)`` down."""

    def weights(low: float, high: float, cells: int) -> NDArray[np.float64]:
        place, scale = np.arange(_SIDE) + 0.5, (high - low) * _SIDE / 100 / cells
        centres = low * _SIDE / 100 + (np.arange(cells) + 0.5) * scale
        away = np.abs(place - centres[:, None]) / scale
        kernel = np.where(away < 3, np.sinc(away) * np.sinc(away / 3), 0)
        kernel *= (place > low * _SIDE / 100) & (place < high * _SIDE / 100)
        normalised: NDArray[np.float64] = kernel / kernel.sum(axis=1, keepdims=True)
        return normalised

    across = np.concatenate([weights(left, right, _COLUMNS) for left, _, right, _ in HASH_BOXES])
    down = np.concatenate([weights(top, bottom, _ROWS) for _, top, _, bottom in HASH_BOXES])
    return np.ascontiguousarray(across.T, dtype=np.float32), down.astype(np.float32)


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


def _read_changed(
    table: SampleTable, reading: str, read: Callable[[NDArray[np.int64], Arrays], Arrays], *, quality: bool
) -> Arrays:
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
        if quality:
            is_known &= ~np.isnan(known["quality"][place].astype(np.float64)).any(axis=1)
        for key in _SHAPES:
            arrays[key][is_known] = known[key][place[is_known]]
        arrays["range"] = known["range"]
    arrays = read(np.flatnonzero(~is_known), arrays)
    good = np.ones(len(table), dtype=bool)
    good[arrays["bad_rows"].astype(np.int64)] = False
    kept = {"files": files, "stamps": stamps, **{key: arrays[key] for key in _SHAPES}}
    _keep(name, {**{key: values[good] for key, values in kept.items()}, "range": arrays["range"]})
    return arrays


_SHAPES: dict[str, tuple[int, ...]] = {
    "content": (32,),
    "perceptual": (len(HASH_BOXES),),
    "deep": (3,),
    "quality": (len(FACTS),),
}
"""What is kept of each image."""


def _nothing_known(count: int) -> Arrays:
    return {
        "content": np.zeros((count, 32), dtype=np.uint8),
        "perceptual": _no_hashes(count),
        "deep": np.full((count, 3), np.nan),
        "quality": np.full((count, len(FACTS)), np.nan, dtype=np.float32),
        "range": np.full(2, np.nan),
    }


def _read_all(
    reader: _Reader,
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
    found = _read_rows(reader, rows, known)
    is_deep = ~np.isnan(found["deep"][:, 0])
    if not decides or not is_deep.any():
        return {**found, "range": np.full(2, np.nan)}
    chosen = decided_range(found["deep"], reader.table)
    decide_range(_plain(chosen), {})
    # Those that are known from before may have been read with another range.
    changed = not np.array_equal(found["range"], chosen)
    again = np.flatnonzero(is_deep) if changed else rows[is_deep[rows]]
    bad = dict(zip(found["bad_rows"].tolist(), found["bad_reasons"].tolist(), strict=True))
    second = _read_rows(replace(reader, sink=None), again, found)
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


def _read_rows(reader: _Reader, rows: NDArray[np.int64], known: Arrays) -> Arrays:
    bad: dict[int, str] = {}
    # Of a part of the images a cache cannot be made.
    sink = reader.sink if len(rows) == len(known["content"]) else None
    results = _results(replace(reader, sink=sink), rows.tolist(), known["perceptual"])
    results = _announced(results, len(rows), reader.table.origin)
    read = tracked(results, "reading every image once", len(rows))
    for index, result in zip(rows.tolist(), read, strict=True):
        if isinstance(result, str):
            bad[index] = result
        elif isinstance(result, Values):
            known["deep"][index] = result
            sink = None  # the image is read again later, out of its order
        else:
            known["content"][index] = np.frombuffer(result.content, dtype=np.uint8)
            if result.quality is not None:
                known["quality"][index] = result.quality
            if sink is not None:
                sink.take(index, known["content"][index], result.prepared)
    if sink is not None:
        sink.close()
    return {**known, **_bad_arrays(bad)}


def _announced(results: Iterator[_Read], count: int, origin: str) -> Iterator[_Read]:
    """Report once how long it is going to take, where that is some seconds; a bar shows only on a terminal."""
    begin = time.monotonic()
    for number, result in enumerate(results):
        if number == _SAMPLED and (expected := (time.monotonic() - begin) / _SAMPLED * count) > _ANNOUNCED:
            rank_zero_info(
                f"{origin}: {count:,} images are read once, which takes about {_duration(expected)}; later runs find "
                "what was found (data checks.verify: headers reads less)"
            )
        yield result


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )


def _results(reader: _Reader, rows: list[int], perceptual: NDArray[np.generic]) -> Iterator[_Read]:
    """Read images in several threads, in the order of rows; their hashes go into ``perceptual``, uint64 ``(N, 6)``."""

    def read_several(some: list[int]) -> list[_Read]:
        results = [reader.read(row) for row in some]
        small = {row: one.small for row, one in zip(some, results, strict=True) if isinstance(one, _Found)}
        if hashed := {row: pixels for row, pixels in small.items() if pixels is not None}:
            perceptual[list(hashed)] = _difference_hashes(np.stack(list(hashed.values())))
        return results

    # In blocks, so that neither tasks nor results, which may hold pixels for the sink, queue up.
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(rows), _QUEUED):
            block = rows[start : start + _QUEUED]
            for results in pool.map(read_several, (block[at : at + _TASK] for at in range(0, len(block), _TASK))):
                yield from results


@dataclass(frozen=True)
class _Reader:
    """Reads one image after the other, as far as the mode has it."""

    table: SampleTable
    read_image: ReadImage
    max_pixels: int
    reading: str
    mode: Verify
    quality: bool
    sink: Sink | None

    def read(self, index: int) -> _Read:
        """Why an image is bad, or what is known of it, or the values of one whose range is not decided."""
        try:
            if self.mode == "headers":
                content = read_header(self.table.source(index), self.max_pixels).content
                return _Found(hashlib.sha256(self.reading.encode() + xxhash.xxh3_128(content).digest()).digest())
            image = self.read_image(index)
        except UndecidedRangeError as undecided:
            return undecided.values or str(undecided)
        except UserError as error:
            return str(error)
        pixels: NDArray[np.uint8] = image.permute(1, 2, 0).contiguous().numpy()
        quality = None
        if self.quality:
            quality = measured(pixels, self.table.source(index))
        prepared = None if self.sink is None else self.sink.prepare(index, image)
        return _Found(content_of(pixels), _small(pixels), quality, prepared)


def _check_known(arrays: Arrays) -> None:
    _check_shapes(arrays, len(arrays["files"]), files=(), stamps=(2,), **_SHAPES)


def _check_shapes(arrays: Arrays, count: int, **shapes: tuple[int, ...]) -> None:
    expected = {"range": (2,), **{key: (count, *shape) for key, shape in shapes.items()}}
    for key, shape in expected.items():
        if arrays[key].shape != shape:
            raise ValueError(f"{key} has the shape {arrays[key].shape}, must have {shape}")
