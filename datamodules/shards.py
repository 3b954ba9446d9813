"""Reading encoded pictures out of Parquet and WebDataset shards, front to back, and no others than are asked for."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch

from datamodules.images import UNDECIDED, ValueRange, read_image
from datamodules.shard_files import lacks_ranges, open_shard, shard_error, unpacked
from vitrail.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ROWS = 32
"""Rows of Parquet that are taken out of a row group at a time."""

_CHUNK = 1 << 20


@dataclass(frozen=True, eq=False)
class Shards:
    """The shards of a set whose N rows stand shard by shard in its table.

    Attributes:
        urls: path or URL of each shard.
        ends: int64 ``(shards,)``, number of the table's rows in a shard and all before it.
        keys: what the picture of each row is called in messages, Arrow strings ``(N,)``.
        column: Parquet column of pictures; empty for tar files.
        offsets: int64 ``(N,)``, where in its tar file a picture begins; empty for Parquet.
        sizes: int64 ``(N,)``, bytes of the picture there; empty for Parquet.
        checks: int64 ``(N,)``, CRC-32 of the picture there, -1 where nobody has noted it; empty for Parquet,
            whose pages have checksums of their own.
        members_left_out: members of tar files that are neither pictures nor columns, by the ending of their names.
        value_range: what is black and white in images with more than 8 bits a channel, where the shards say so.
    """

    urls: list[str]
    ends: NDArray[np.int64]
    keys: Any
    column: str
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    checks: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    members_left_out: dict[str, int] = field(default_factory=dict)
    value_range: list[float] | None = None

    def shard_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """In which shard rows of the table are, int64 ``(n,)``."""
        return np.searchsorted(self.ends, rows, side="right")

    def first_row(self, shard: int) -> int:
        """The table's row that is a shard's first one."""
        return int(self.ends[shard - 1]) if shard else 0

    def label(self, row: int) -> str:
        """What errors call a picture: its shard and its key."""
        shard = int(np.searchsorted(self.ends, row, side="right"))
        return f"{self.urls[shard]}: {self.keys[row].as_py()}"

    def place_hashes(self, rows: NDArray[np.int64], stamp_of: Callable[[str], str]) -> list[str]:
        """What changes when a picture may have changed, without reading it, hexadecimal.

        It is the SHA-256 of the shard's size and date of change (or what its server says instead) and of the place in
        it. So all pictures of a shard that was written anew count as changed.

        Args:
            rows: int64 ``(n,)``, of the table.
            stamp_of: what is known of a shard, empty for nothing.

        Returns:
            n texts, empty where nothing is known of the shard.
        """
        which = self.shard_of(rows)
        stamps = {shard: stamp_of(self.urls[shard]) for shard in np.unique(which).tolist()}
        places = zip(rows.tolist(), which.tolist(), strict=True)
        return [
            hashlib.sha256(f"{stamps[shard]} {row - self.first_row(shard)}".encode()).hexdigest()
            if stamps[shard]
            else ""
            for row, shard in places
        ]

    def read(self, rows: NDArray[np.int64]) -> Generator[bytes, None, None]:
        """The encoded pictures of some rows of one shard, which is opened for it and closed after the last one.

        Args:
            rows: int64 ``(n,)``, ascending, all in the same shard.

        Yields:
            Content of a picture file, empty where the row has none.

        Raises:
            UserError: where the shard cannot be read, or ends before the pictures do.
        """
        if not len(rows):
            return
        shard = int(self.shard_of(rows[:1])[0])
        url = self.urls[shard]
        with open_shard(url) as file:
            if self.column:
                pictures = _from_parquet(file, self.column, rows - self.first_row(shard))
            else:
                pictures = _from_tar(url, file, self.offsets[rows], self.sizes[rows])
            try:
                for row in rows.tolist():
                    yield self._checked(row, next(pictures))
            except StopIteration:
                message = f"data shards: {url} has fewer rows than when it was indexed; do not change shards in use"
                raise UserError(message) from None
            except UserError:
                raise
            # What broken files and connections raise depends on the libraries; here each of these means the same.
            except Exception as error:
                raise shard_error(url, error) from error

    def _checked(self, row: int, picture: bytes) -> bytes:
        if len(self.checks) and self.checks[row] >= 0 and zlib.crc32(picture) != self.checks[row]:
            raise UserError(
                f"data shards: {self.label(row)} is damaged, it is not the picture that was packed; get the shard anew"
            )
        return picture

    def encoded(self, row: int) -> bytes:
        """One encoded picture, whose shard is opened for it alone."""
        return next(self.read(np.array([row], dtype=np.int64)))

    def picture(self, row: int, value_range: ValueRange = UNDECIDED) -> torch.Tensor:
        """One picture, uint8 ``(3, H, W)``, RGB, whose shard is opened for it alone.

        Raises:
            ImageError: where the picture cannot be read.
        """
        return read_image(self.encoded(row), self.label(row), value_range)


def _from_parquet(file: IO[bytes], column: str, places: NDArray[np.int64]) -> Iterator[bytes]:
    """The pictures at some rows of a file; row groups without any of them are not read."""
    import pyarrow.parquet as pq

    # Without buffering ahead, which would hold whole row groups of pictures.
    opened = pq.ParquetFile(file, pre_buffer=False, page_checksum_verification=True)
    begin = 0
    for group in range(opened.metadata.num_row_groups):
        end = begin + opened.metadata.row_group(group).num_rows
        wanted = places[(places >= begin) & (places < end)]
        if len(wanted):
            yield from _from_row_group(opened, group, column, wanted - begin)
        begin = end


def _from_row_group(opened: Any, group: int, column: str, wanted: NDArray[np.int64]) -> Iterator[bytes]:
    begin = 0
    for batch in opened.iter_batches(batch_size=_ROWS, row_groups=[group], columns=[column]):
        cells = batch.column(0)
        for place in wanted[(wanted >= begin) & (wanted < begin + len(cells))]:
            yield _content(cells[int(place) - begin].as_py())
        begin += len(cells)
        if begin > wanted[-1]:
            return


def _content(cell: Any) -> bytes:
    """The bytes of a cell, which holds them or the library's ``{bytes, path}``."""
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    return content if isinstance(content, bytes) else b""


def _from_tar(url: str, file: IO[bytes], offsets: NDArray[np.int64], sizes: NDArray[np.int64]) -> Iterator[bytes]:
    done = 0
    try:
        for content in _parts(url, file, offsets, sizes):
            done += 1
            yield content
    except ValueError as error:
        if not lacks_ranges(error):
            raise
        with open_shard(url, sequential=True) as whole:
            yield from _parts(url, whole, offsets[done:], sizes[done:])


def _parts(url: str, file: IO[bytes], offsets: NDArray[np.int64], sizes: NDArray[np.int64]) -> Iterator[bytes]:
    """Parts of an archive from front to back."""
    with unpacked(url, file) as archive:
        for offset, size in zip(offsets.tolist(), sizes.tolist(), strict=True):
            _go_to(archive, offset)
            content = _exactly(archive, size)
            if len(content) < size:
                raise UserError(f"data shards: {url} ends within a picture: it is truncated; get it anew")
            yield content


def _exactly(archive: IO[bytes], size: int) -> bytes:
    """As many bytes, or fewer at the end of the file; a connection may give them in pieces."""
    pieces = []
    while size > 0 and (piece := archive.read(size)):
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def _go_to(archive: IO[bytes], offset: int) -> None:
    """Goes forward to a place, by reading where the server does not let us jump."""
    try:
        archive.seek(offset)
    except (OSError, ValueError):
        while (left := offset - archive.tell()) > 0 and archive.read(min(left, _CHUNK)):
            pass
