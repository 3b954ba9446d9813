"""Decoded images on disk: each is decoded once, and later read as a slice of a memory-mapped file.

The cache is a folder of chunks: some hundred images as 8-bit RGB, scaled down to a short side, in a file that is named
after their content and that length. A chunk is written atomically and never changes, so runs can share a cache. Its
table and each of its images have a checksum; a damaged chunk is written again, with a warning. Ideas: FFCV (Leclerc et
al., 2023) for resized images behind a memory map, git for naming by content.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from datamodules.checks.verify import Sink
from datamodules.loading.transforms import scale_down, useful_short_side
from datamodules.options import AugmentOptions, LoaderOptions
from vitrail.console import tracked
from vitrail.errors import DISK_FULL, UserError
from vitrail.files import cache_directory, lock, rename
from vitrail.runtime import cores
from vitrail.types import InputOptions, Resampler, Resize, with_image_defaults

CHUNK = 256
"""Images of a chunk."""

_MAGIC = b"vitrail pixels 2"
_HEADER = 40
_ENTRY = 4
"""Numbers of an image in the table: where its pixels begin, height, width, CRC-32 of the pixels."""

_ESTIMATED_FROM = 16


@dataclass(eq=False)
class PixelCache:
    """Images of some rows of a table, decoded once.

    Args:
        read_image: returns uint8 ``(3, H, W)`` for a row of the table.
        rows: int64 ``(n,)``, ascending, the rows that can be read.
        content: uint8 ``(N, 32)``, hash of each row's image.
        short_side: longest short side that is kept, in pixels; a smaller image keeps its size.
        interpolation: of the scaling, ``bilinear`` or ``bicubic``.
        folder: of the chunks.
        resize: which sides are scaled: the short one (``crop``), both (``squash``) or the long one (``pad``).
        resampler: of the scaling.
        lossy: whether images are kept as JPEG files, which take less room and a decoder's time.
        kept: chunks that are on disk, the first ones; images of the others are decoded each time. None for all.
    """

    read_image: Callable[[int], torch.Tensor]
    rows: NDArray[np.int64]
    content: NDArray[np.uint8]
    short_side: int
    interpolation: str
    folder: Path
    resize: Resize = "crop"
    resampler: Resampler = "torch"
    lossy: bool = False
    kept: int | None = None
    _chunks: dict[int, _Chunk] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._names = [self._name(number) for number in range(-(-len(self.rows) // CHUNK))]

    def __getstate__(self) -> dict[str, object]:
        # Worker processes map the files themselves.
        return {**self.__dict__, "_chunks": {}}

    def read(self, row: int) -> torch.Tensor:
        """Return the image of one of ``rows``, uint8 ``(3, H, W)``, RGB, channels interleaved in memory.

        Changes of it do not reach the file.

        Raises:
            UserError: if a chunk that has been removed since cannot be written again.
        """
        number, place = divmod(int(np.searchsorted(self.rows, row)), CHUNK)
        chunk = self._chunks.get(number) or self._open(number)
        if chunk is None:
            image = self.scaled(self.read_image(row))
            # The same pixels as from the disk, so that results do not depend on what fits there.
            return torch.from_numpy(_decoded(self.packed(image))).permute(2, 0, 1) if self.lossy else image
        pixels = chunk.pixels(place)
        if pixels is None:
            path = self.folder / self._names[number]
            pixels = self._make_again(number, f"{path}: is damaged, a checksum does not match").pixels(place)
            if pixels is None:
                raise UserError(f"{path}: is damaged although it was just written; set $VITRAIL_CACHE to another disk")
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def missing(self) -> list[int]:
        """Return the numbers of the chunks that do not exist yet."""
        return [number for number, name in enumerate(self._names[: self.kept]) if not (self.folder / name).exists()]

    def fitting(self, room: int) -> PixelCache:
        """Return a cache of as many chunks as fit into ``room`` bytes, by the estimate."""
        needed = self.estimated_bytes(everything=True)
        return self if needed <= room else replace(self, kept=len(self._names) * room // needed)

    def estimated_bytes(self, *, everything: bool = False) -> int:
        """Estimate how much disk space the missing chunks need, or all."""
        missing = range(len(self._names)) if everything else self.missing()
        if not missing:
            return 0
        among = self.rows[np.linspace(0, len(self.rows) - 1, min(_ESTIMATED_FROM, len(self.rows))).astype(int)]
        sizes = [self.packed(self.scaled(self.read_image(int(row)))).size for row in among]
        return int(np.mean(sizes) * min(len(missing) * CHUNK, len(self.rows)))

    def build(self, limit: int, workers: int) -> None:
        """Write the missing chunks, or wait for another run that does.

        Args:
            limit: bytes that the folder may have; the least recently used chunks make room.
            workers: processes that decode; 0 for this one alone.

        Raises:
            UserError: if the disk is full or the folder cannot be written to.
        """
        if not self.missing():
            self._mark_used()
            return
        key = hashlib.blake2b("".join(self._names).encode(), digest_size=16).hexdigest()
        with _disk_full(self.folder), lock(self.folder / f".{key}.lock"):
            missing = self.missing()
            for number in missing:  # what killed processes have left of them
                for path in self.folder.glob(f".{self._names[number]}.*"):
                    path.unlink(missing_ok=True)
            _make_room(self.folder, limit - self.estimated_bytes(), keep=set(self._names))
            made = DataLoader(_Chunks(self, missing), batch_size=None, num_workers=min(workers, len(missing)))
            for problem in tracked(made, f"decoding images once, {CHUNK} at a time", len(missing)):
                if problem:
                    raise UserError(problem)
        self._mark_used()

    def make(self, number: int) -> None:
        """Write one chunk atomically."""
        rows = self.rows[number * CHUNK : (number + 1) * CHUNK].tolist()
        images = (self.scaled(self.read_image(row)) for row in rows)
        _write_chunk(self.folder / self._names[number], images, len(rows), self.packed)

    def packed(self, image: torch.Tensor) -> NDArray[np.uint8]:
        """Return the bytes that the cache keeps of a scaled image, uint8 ``(n,)``."""
        pixels: NDArray[np.uint8] = image.permute(1, 2, 0).contiguous().numpy()
        if not self.lossy:
            return pixels.reshape(-1)
        return np.frombuffer(simplejpeg.encode_jpeg(pixels, _QUALITY, colorsubsampling="444"), dtype=np.uint8)

    def scaled(self, image: torch.Tensor) -> torch.Tensor:
        """Return an image as the cache keeps it, uint8 ``(3, H, W)``."""
        return scale_down(image, self.short_side, self.interpolation, self.resize, self.resampler)

    def name(self, content: NDArray[np.uint8]) -> str:
        """Return the name of the chunk that has these images, hashes uint8 ``(n, 32)``."""
        made = f"{self.short_side} {self.interpolation}" + ("" if self.resize == "crop" else f" {self.resize}")
        made += "" if self.resampler == "torch" else f" {self.resampler}"
        made += f" jpeg {_QUALITY}" if self.lossy else ""
        digest = hashlib.blake2b(_MAGIC + made.encode(), digest_size=20)
        digest.update(np.ascontiguousarray(content).tobytes())
        return f"{digest.hexdigest()}.pixels"

    def _name(self, number: int) -> str:
        return self.name(self.content[self.rows[number * CHUNK : (number + 1) * CHUNK]])

    def _open(self, number: int) -> _Chunk | None:
        if self.kept is not None and number >= self.kept:
            return None
        path = self.folder / self._names[number]
        chunk = _mapped(path, lossy=self.lossy)
        if chunk is None and self.kept is not None and not path.exists():
            return None  # another cache needed the room, and it does not suffice for both
        if chunk is None:
            # Another run needed the room, or a user has emptied the folder.
            return self._make_again(number, f"{path}: is damaged or cut short" if path.exists() else "")
        self._chunks[number] = chunk
        return chunk

    def _make_again(self, number: int, damage: str) -> _Chunk:
        """Write a chunk again that was lost or damaged; warn of the damage."""
        path = self.folder / self._names[number]
        with _disk_full(self.folder), lock(self.folder / f".{path.stem}.lock"):
            chunk = _mapped(path, lossy=self.lossy)
            # Unless another process has made it by now.
            if chunk is None or (damage and not chunk.is_whole()):
                if damage:
                    warnings.warn(f"{damage}; its images are decoded again", stacklevel=3)
                self.make(number)
                chunk = _mapped(path, lossy=self.lossy)
        if chunk is None:
            raise UserError(f"{path}: cannot be read although it was just written; set $VITRAIL_CACHE to another disk")
        self._chunks[number] = chunk
        return chunk

    def _mark_used(self) -> None:
        """Set the time, by which chunks are removed when room is needed."""
        for name in self._names:
            with contextlib.suppress(OSError):
                os.utime(self.folder / name)


def _write_chunk(
    path: Path, images: Iterable[torch.Tensor], count: int, packed: Callable[[torch.Tensor], NDArray[np.uint8]]
) -> None:
    """Write scaled images, uint8 ``(3, H, W)``, as one chunk, atomically."""
    table = np.zeros((count, _ENTRY), dtype=np.int64)
    end = 0
    # No flush to the disk: a power cut costs the work, and is noticed.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.seek(_HEADER + table.nbytes)
            for place, one in enumerate(images):
                data = packed(one).data
                table[place] = end, *one.shape[-2:], zlib.crc32(data)
                end += file.write(data)
            file.seek(0)
            file.write(_header(count, end, table) + table.tobytes())
        rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class ChunkWriter:
    """Writes the chunks of a cache while its images are decoded for another purpose, which knows their hashes.

    It is a shortcut: where it cannot go on (no room, a full disk), it ends, and ``PixelCache.build`` does the rest.

    Args:
        cache: that they are for; its rows are not known yet.
        count: number of its images, at most.
        limit: bytes that the folder may have.
    """

    def __init__(self, cache: PixelCache, count: int, limit: int) -> None:
        self._cache, self._count, self._limit = cache, count, limit
        self._images: list[torch.Tensor] = []
        self._content: list[NDArray[np.uint8]] = []
        self._begun, self._open = False, True

    def prepare(self, image: torch.Tensor) -> torch.Tensor | None:
        """Return an image as it is kept; None where no more is."""
        return self._cache.scaled(image) if self._open else None

    def take(self, content: NDArray[np.uint8], image: torch.Tensor) -> None:
        """Add a prepared image with its hash, uint8 ``(32,)``."""
        if not self._open:
            return
        self._images.append(image)
        self._content.append(content.copy())
        if len(self._images) == CHUNK:
            self.close()

    def close(self) -> None:
        """Write what has come since the last full chunk."""
        images, self._images = self._images, []
        content, self._content = self._content, []
        if not self._open or not images:
            return
        path = self._cache.folder / self._cache.name(np.stack(content))
        try:
            if not self._begun:
                path.parent.mkdir(parents=True, exist_ok=True)
                needed = int(np.mean([image.numel() for image in images]) * self._count)
                self._begun, self._open = True, not _no_room(path.parent, needed, self._limit)
                if self._open:
                    _make_room(path.parent, self._limit - needed, keep=set())
            if self._open and not path.exists():
                _write_chunk(path, images, len(images), self._cache.packed)
        except OSError:
            self._open = False


class _Chunks(Dataset[str]):
    """Writes a chunk when asked for it, in the worker process, and returns what went wrong, or an empty text.

    An exception would come back from the worker with its whole traceback as the message.
    """

    def __init__(self, cache: PixelCache, numbers: list[int]) -> None:
        self._cache, self._numbers = cache, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, place: int) -> str:
        try:
            with _disk_full(self._cache.folder):
                self._cache.make(self._numbers[place])
        except UserError as error:
            return str(error)
        return ""


@dataclass(frozen=True, eq=False)
class _Chunk:
    """A mapped chunk: its table, int64 ``(n, 4)``, see ``_ENTRY``, and uint8 pixels of all images."""

    table: NDArray[np.int64]
    data: NDArray[np.uint8]
    lossy: bool
    _good: set[int] = field(default_factory=set, repr=False)

    def pixels(self, place: int) -> NDArray[np.uint8] | None:
        """Return an image, uint8 ``(H, W, 3)``, or None if it is damaged, which is checked when it is first read."""
        begin, height, width, check = self.table[place].tolist()
        end = int(self.table[place + 1, 0]) if place + 1 < len(self.table) else len(self.data)
        kept = self.data[begin:end]
        if place not in self._good:
            if zlib.crc32(kept.data) != check:
                return None
            self._good.add(place)
        return _decoded(kept) if self.lossy else kept.reshape(height, width, 3)

    def is_whole(self) -> bool:
        """Return whether no image is damaged."""
        return all(self.pixels(place) is not None for place in range(len(self.table)))


def _header(count: int, size: int, table: NDArray[np.int64]) -> bytes:
    """Magic, numbers of images and of their bytes, and CRC-32 of these and the table."""
    head = _MAGIC + np.array([count, size], dtype=np.int64).tobytes()
    return head + np.array([zlib.crc32(table.tobytes(), zlib.crc32(head))], dtype=np.int64).tobytes()


def _decoded(jpeg: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """uint8 ``(H, W, 3)``."""
    pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(jpeg.data, "RGB")
    return pixels


def _mapped(path: Path, *, lossy: bool) -> _Chunk | None:
    """A chunk; None for one that is missing, cut short, or whose table is damaged."""
    try:
        # Copy on write: a tensor on top of it may be changed, the file not.
        file = np.memmap(path, dtype=np.uint8, mode="c")
    except (OSError, ValueError):
        return None
    if len(file) < _HEADER or bytes(file[: len(_MAGIC)]) != _MAGIC:
        return None
    count, size = np.frombuffer(file, dtype=np.int64, count=2, offset=len(_MAGIC)).tolist()
    begin = _HEADER + count * _ENTRY * 8
    if count < 0 or len(file) != begin + size:
        return None
    table = np.frombuffer(file, dtype=np.int64, count=count * _ENTRY, offset=_HEADER).reshape(count, _ENTRY)
    if bytes(file[:_HEADER]) != _header(count, size, table):
        return None
    return _Chunk(table, np.asarray(file[begin:]), lossy)


_MOST_WORKERS = 16
_GB = 10**9
_QUALITY = 95
_PART = 0.8  # Of the room: what is kept of another split needs some as well.


class SplitReaders:
    """Reads images of several splits, each by its own reader, to find those that a split's evaluation has decoded.

    Args:
        split_codes: int8 ``(N,)``, of the whole table.
        make_reader: returns the reader of int64 ``(n,)`` rows of one split.
        rows: int64, ascending, those that are to be read.
    """

    def __init__(
        self,
        split_codes: NDArray[np.int8],
        make_reader: Callable[[NDArray[np.int64]], Callable[[int], torch.Tensor]],
        rows: NDArray[np.int64],
    ) -> None:
        self._split_codes = split_codes
        codes = split_codes[rows]
        self.readers = {int(code): make_reader(rows[codes == code]) for code in sorted(set(codes.tolist()))}

    def __call__(self, row: int) -> torch.Tensor:
        """Return an image, uint8 ``(3, H, W)``."""
        return self.readers[int(self._split_codes[row])](row)


def is_lossy(reader: Callable[[int], torch.Tensor]) -> bool:
    """Return whether images come as JPEG files out of the cache."""
    cache = getattr(reader, "__self__", None)
    return isinstance(cache, PixelCache) and cache.lossy


def decodes(reader: Callable[[int], torch.Tensor]) -> bool:
    """Return whether a reader decodes or computes images, instead of finding them in the cache."""
    if isinstance(reader, SplitReaders):
        return any(decodes(part) for part in reader.readers.values())
    cache = getattr(reader, "__self__", None)
    return not isinstance(cache, PixelCache) or cache.lossy or cache.kept is not None


def cached_reader(
    read_image: Callable[[int], torch.Tensor],
    rows: NDArray[np.int64],
    content: NDArray[np.uint8],
    image: InputOptions,
    augment: AugmentOptions,
    loader: LoaderOptions,
    origin: str,
) -> Callable[[int], torch.Tensor]:
    """Return a reader of some rows: the cache, which is built where it is missing, or ``read_image`` itself.

    Args:
        read_image: see ``PixelCache``, as for the next two.
        rows: ascending.
        content: hashes.
        image: how images are made.
        augment: of training images; none for evaluation, which gets bit by bit what it gets without a cache.
        loader: whether to use a cache, and how large it may be.
        origin: of the table, for messages.

    Raises:
        UserError: if the disk is full, or ``cache: always`` does not fit into its limit.
    """
    if loader.cache == "never" or not len(rows):
        return read_image
    cache = cache_of(read_image, rows, content, image, augment)
    limit = int(loader.cache_limit_gb * _GB)
    needed = cache.estimated_bytes()
    if refusal := needed and _no_room(cache.folder, needed, limit):
        if loader.cache == "always":
            raise UserError(f"data loader.cache: always, but {refusal}; or set loader.cache: auto")
        cache, how = _smaller(cache, limit, may_lose=bool(augment.filled().random_resized_crop))
        rank_zero_info(f"{origin}: {how}, because {refusal}.")
    if cache.kept != 0:
        cache.build(limit, min(cores(), _MOST_WORKERS))
    return cache.read


def _smaller(cache: PixelCache, limit: int, *, may_lose: bool) -> tuple[PixelCache, str]:
    """What fits of a cache that does not, and a note: JPEG files where random crops change pixels anyway, or a part."""
    existing = next(one for one in (cache.folder, *cache.folder.parents) if one.exists())
    # By the limit alone, so that a run has the same pixels whatever is on the disk.
    cache = replace(cache, lossy=may_lose and cache.estimated_bytes(everything=True) > limit)
    cache = cache.fitting(int(_PART * min(limit, shutil.disk_usage(existing).free)))
    how = f"training images are JPEG files of quality {_QUALITY} in the cache, not exact pixels" if cache.lossy else ""
    if cache.kept is not None:
        kept = f"{min(cache.kept * CHUNK, len(cache.rows)):,} of {len(cache.rows):,} images are cached"
        part = f"{kept}, the others are decoded again each time" if cache.kept else "images are decoded again each time"
        how = f"{how}; {part}" if how else part
    return cache, how


def cache_of(
    read_image: Callable[[int], torch.Tensor],
    rows: NDArray[np.int64],
    content: NDArray[np.uint8],
    image: InputOptions,
    augment: AugmentOptions,
) -> PixelCache:
    """Return the cache of some rows, built or not; arguments as of ``cached_reader``."""
    made = with_image_defaults(image)
    return PixelCache(
        read_image=read_image,
        rows=rows,
        content=content,
        short_side=useful_short_side(image, augment),
        interpolation=made["interpolation"],
        # Random crops come out of images of the original's shape.
        resize="crop" if augment.filled().random_resized_crop or augment.random_crop else made["resize"],
        resampler=made["resampler"],
        folder=cache_directory() / "pixels",
    )


def writing_sink(
    read_image: Callable[[int], torch.Tensor],
    parts: Sequence[tuple[NDArray[np.int64], AugmentOptions]],
    table_rows: int,
    image: InputOptions,
    loader: LoaderOptions,
) -> Sink | None:
    """Return what writes the caches of some parts of a table while all its images are read; None for no cache.

    Args:
        read_image: see ``cached_reader``.
        parts: rows, readable or not, ascending, and augmentation of each part; no row is in two.
        table_rows: number of rows of the table.
        image: see ``cached_reader``.
        loader: see ``cached_reader``.
    """
    if loader.cache == "never":
        return None
    owner = np.full(table_rows, -1, dtype=np.int64)
    writers = []
    for number, (rows, augment) in enumerate(parts):
        owner[rows] = number
        cache = cache_of(read_image, rows[:0], np.zeros((0, 32), np.uint8), image, augment)
        writers.append(ChunkWriter(cache, len(rows), int(loader.cache_limit_gb * _GB)))

    def prepare(row: int, pixels: torch.Tensor) -> torch.Tensor | None:
        return writers[owner[row]].prepare(pixels) if owner[row] >= 0 else None

    def take(row: int, content: NDArray[np.uint8], prepared: torch.Tensor | None) -> None:
        if prepared is not None:
            writers[owner[row]].take(content, prepared)

    def close() -> None:
        for writer in writers:
            writer.close()

    return Sink(prepare, take, close)


def _no_room(folder: Path, needed: int, limit: int) -> str:
    """Why ``needed`` bytes more do not fit, and how to fix it; empty if they do."""
    if needed > limit:
        return f"decoded they need about {needed / _GB:.1f} GB; raise data loader.cache_limit_gb ({limit / _GB:g})"
    existing = next(one for one in (folder, *folder.parents) if one.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        return f"decoded they need about {needed / _GB:.1f} GB and {existing} has {free / _GB:.1f} GB left; free some"
    return ""


_FREE_SPACE = "free some space, set $VITRAIL_CACHE to another disk, or set data loader.cache: never"


@contextmanager
def _disk_full(folder: Path) -> Iterator[None]:
    """Turn a full disk and missing permission into an error in one line."""
    try:
        yield
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise
        full = error.errno in DISK_FULL
        why = "the disk is full" if full else f"cannot be written to ({error.strerror})"
        raise UserError(f"{folder}: {why}; {_FREE_SPACE}") from error


def _make_room(folder: Path, allowed: int, keep: set[str]) -> None:
    """Remove the least recently used files until the folder has no more than ``allowed`` bytes.

    Files that a process has mapped stay readable for it.
    """
    found = []
    for path in folder.glob("*.pixels"):
        with suppress(OSError):  # another process may remove files as well
            status = path.stat()
            found.append((status.st_mtime_ns, status.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= allowed:
            return
        if path.name not in keep:
            path.unlink(missing_ok=True)
            total -= size
