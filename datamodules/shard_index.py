"""What is in shards besides pictures: keys, labels, captions and groups, and in tar files where each picture lies.

Parquet tells it without its pictures being read. Of tar files it is told by the index that
``python -m datamodules pack`` leaves beside them; those of others are read through once, and what was found is kept
under ``$VITRINE_CACHE``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from datamodules.cache_folder import exclusively
from datamodules.progress import tracked
from datamodules.schema import UserError
from datamodules.shard_files import INDEX_FILE, open_shard, shard_error, size_of, unpacked
from datamodules.verification import cache_directory

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

PICTURE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
"""Members of a tar file that are pictures, the first that a sample has."""

LAYOUT_KEY = b"vitrine"
"""Metadata of our own shards: which columns are what."""

_FORMAT = 1  # Counts up when the meaning of the cached columns changes.
_THREADS = 8
_LARGEST_TEXT = 1 << 20
_MEMBER = re.compile(r"((?:.*/|)[^./][^.]*)\.([^/]+)")


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """What is in one shard of n samples.

    Attributes:
        columns: all but the pictures, n rows; of a foreign tar file ``key`` and ``fields``.
        features: the ``datasets.Features`` of the columns.
        layout: which columns are what, where the shard says so itself.
        offsets: int64 ``(n,)``, where in a tar file the pictures begin; empty for Parquet.
        sizes: int64 ``(n,)``, bytes of the pictures there; empty for Parquet.
    """

    columns: pa.Table
    features: Any
    layout: dict[str, Any]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]


def index_parquet(urls: Sequence[str], picture_column: str) -> list[ShardIndex]:
    """Reads all columns of Parquet shards but the pictures, several shards at a time.

    Raises:
        UserError: where a shard cannot be read or has no such column.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        indices = pool.map(lambda url: _parquet_columns(url, picture_column), urls)
        return list(tracked(indices, "reading labels of shards", len(urls)))


def index_tars(urls: Sequence[str], picture_suffix: str) -> list[ShardIndex]:
    """What is in tar shards, from the index beside them, from the cache, or by reading them through.

    Args:
        urls: of the shards.
        picture_suffix: of the members that are pictures; empty for the first usual one.

    Raises:
        UserError: where a shard cannot be read, is truncated or not in the format.
    """
    beside: dict[str, pa.Table | None] = {}
    found: list[ShardIndex] = []
    for url in tracked(urls, "reading what is in tar shards, once", len(urls)):
        folder, _, name = url.rpartition("/")
        if folder not in beside:
            beside[folder] = _index_beside(f"{folder}/{INDEX_FILE}" if folder else INDEX_FILE)
        table = beside[folder]
        packed = None if table is None or picture_suffix else _of_shard(table, url, name)
        found.append(packed or _scanned(url, picture_suffix))
    return found


def _parquet_columns(url: str, picture_column: str) -> ShardIndex:
    import pyarrow.parquet as pq

    with open_shard(url) as file:
        try:
            opened = pq.ParquetFile(file)
            schema = opened.schema_arrow
            if picture_column not in schema.names:
                raise UserError(
                    f"data columns.image: {url} has no column {picture_column!r}; it has {', '.join(schema.names)}"
                )
            names = [name for name in schema.names if name != picture_column]
            columns = opened.read(columns=names) if names else _rows_only(opened.metadata.num_rows)
        except UserError:
            raise
        except Exception as error:  # what broken files and connections raise depends on the libraries
            raise shard_error(url, error) from error
    nowhere = np.empty(0, dtype=np.int64)
    return ShardIndex(columns, _features(schema), _layout(schema), nowhere, nowhere)


def _rows_only(count: int) -> pa.Table:
    """A table without columns of interest, which still knows its length."""
    import pyarrow as pa

    return pa.table({"": pa.nulls(count)})


def _index_beside(url: str) -> pa.Table | None:
    """The index of a folder; None where there is none."""
    import pyarrow.parquet as pq

    try:
        with open_shard(url) as file:
            return pq.read_table(file)
    except UserError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise
    except Exception as error:
        raise shard_error(url, error) from error


def _of_shard(table: pa.Table, url: str, name: str) -> ShardIndex | None:
    """The part of a folder's index that is about one shard; None where it is about others only."""
    import pyarrow.compute as pc

    layout = _layout(table.schema)
    if name not in layout.get("shards", {}):
        return None
    with open_shard(url) as file:
        size = size_of(file)
    if size is not None and size != layout["shards"][name]:
        raise UserError(
            f"data shards: {url} has {size} bytes, {INDEX_FILE} beside it says {layout['shards'][name]}: it is "
            "truncated or not the shard that was packed; get it anew"
        )
    rows = table.filter(pc.equal(table["shard"], name))
    offsets, sizes = (rows[key].to_numpy().astype(np.int64) for key in ("offset", "size"))
    return ShardIndex(rows.drop_columns(["shard", "offset", "size"]), _features(table.schema), layout, offsets, sizes)


def _scanned(url: str, picture_suffix: str) -> ShardIndex:
    """What is in a tar file, from the cache as long as the file is the same."""
    import datasets
    import pyarrow.parquet as pq

    folder = cache_directory() / "shards"
    with open_shard(url) as file:
        stamp = _stamp(url, file)
    key = hashlib.sha256(f"{_FORMAT}\n{url}\n{stamp}\n{picture_suffix}".encode()).hexdigest()
    path = folder / f"{key}.parquet"
    features = datasets.Features({"key": datasets.Value("string"), "fields": datasets.Value("string")})
    if not (stamp and path.exists()):
        table = _scan(url, picture_suffix)
        if stamp:
            try:
                with exclusively(folder, key):
                    temporary = path.with_name(f".{path.name}.{os.getpid()}")
                    pq.write_table(table, temporary)
                    temporary.replace(path)
            except OSError as error:
                rank_zero_warn(f"{folder}: cannot keep what is in {url} ({error}); set $VITRINE_CACHE")
    else:
        table = pq.read_table(path)
    offsets, sizes = (table[name].to_numpy().astype(np.int64) for name in ("offset", "size"))
    return ShardIndex(table.select(["key", "fields"]), features, {}, offsets, sizes)


def _stamp(url: str, file: IO[bytes]) -> str:
    """What changes with the file's content; empty where nothing is known, so that nothing may be kept."""
    if "://" not in url:
        status = os.fstat(file.fileno())
        return f"{status.st_size} {status.st_mtime_ns}"
    details: Any = getattr(file, "details", None)
    with contextlib.suppress(Exception):  # not every file system knows details; then there is no stamp
        details = details or file.info()  # type: ignore[attr-defined]
    known = {
        key.lower(): str(value)
        for key, value in (details if isinstance(details, dict) else {}).items()
        if key.lower() in ("size", "etag", "mtime", "lastmodified", "last_modified", "last-modified", "blob_id", "md5")
    }
    return json.dumps(known, sort_keys=True) if known.get("size", "None") != "None" else ""


def _scan(url: str, picture_suffix: str) -> pa.Table:
    """Goes through a tar file: key, place of the picture and all short texts of each sample."""
    import pyarrow as pa

    columns: dict[str, list[Any]] = {"key": [], "offset": [], "size": [], "fields": []}
    with open_shard(url, sequential=True) as file, _whole(url, file) as archive:
        for key, members in _samples(url, archive):
            suffixes = [picture_suffix] if picture_suffix else PICTURE_SUFFIXES
            place = next((members[suffix] for suffix in suffixes if suffix in members), None)
            if not isinstance(place, tuple):
                wanted = picture_suffix or ", ".join(PICTURE_SUFFIXES)
                raise UserError(
                    f"data shards: {url}: sample {key!r} has no picture ({wanted}) but {', '.join(sorted(members))}; "
                    "correct the shard, or name the ending with columns: {image: …}"
                )
            texts = {suffix: text for suffix, text in members.items() if isinstance(text, str)}
            for name, value in zip(columns, (key, *place, json.dumps(texts)), strict=True):
                columns[name].append(value)
    if not columns["key"]:
        raise UserError(f"data shards: {url} has no samples (files called key.jpg, key.cls …); name a WebDataset shard")
    return pa.table(columns)


@contextlib.contextmanager
def _whole(url: str, file: IO[bytes]) -> Iterator[IO[bytes]]:
    """The archive, with an error in words where it is broken."""
    try:
        with unpacked(url, file) as archive:
            yield archive
    except UserError:
        raise
    except (tarfile.TarError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"data shards: {url} is truncated or no tar file ({reason}); get it anew") from error
    except Exception as error:  # what broken connections raise depends on the libraries
        raise shard_error(url, error) from error


def _samples(url: str, archive: IO[bytes]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Keys, and by ending either (offset, size) of a picture or the content of a short text."""
    key, members = "", dict[str, Any]()
    with tarfile.open(fileobj=archive, mode="r|") as tar:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # else all members of the file gather there
            match = _MEMBER.fullmatch(member.name.removeprefix("./")) if member.isfile() else None
            if match is None:
                continue
            if match[1] != key and members:
                yield key, members
                members = {}
            key, suffix = match[1], match[2].lower()
            if suffix in members:
                raise UserError(f"data shards: {url}: sample {key!r} has two files .{suffix}; remove one")
            members[suffix] = _content_of(tar, member, suffix)
    if members:
        yield key, members


def _content_of(tar: tarfile.TarFile, member: tarfile.TarInfo, suffix: str) -> tuple[int, int] | str:
    if suffix.rsplit(".", 1)[-1] in PICTURE_SUFFIXES or member.size > _LARGEST_TEXT:
        return member.offset_data, member.size
    file = tar.extractfile(member)
    content = file.read() if file else b""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return member.offset_data, member.size


def _features(schema: pa.Schema) -> Any:
    import datasets

    return datasets.Features.from_arrow_schema(schema)


def _layout(schema: pa.Schema) -> dict[str, Any]:
    text = (schema.metadata or {}).get(LAYOUT_KEY)
    layout: dict[str, Any] = json.loads(text) if text else {}
    return layout
