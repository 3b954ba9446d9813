"""What is in shards besides pictures: keys, labels, captions and groups, and in tar files where each picture lies.

Parquet tells it without its pictures being read. Of tar files it is told by the index that
``python -m datamodules pack`` leaves beside them (``datamodules.tar_scan`` for those that have none).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from datamodules.shard_files import INDEX_FILE, open_shard, shard_error, size_of
from datamodules.tar_scan import OTHERS_KEY, scanned
from vitrail.console import tracked
from vitrail.errors import UserError
from vitrail.files import DamagedFileError, read_parquet

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

LAYOUT_KEY = b"vitrine"
"""Metadata of our own shards: which columns are what."""

_THREADS = 8


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """What is in one shard of n samples.

    Attributes:
        columns: those that are wanted, n rows; of a foreign tar file ``key`` and ``fields``.
        features: the ``datasets.Features`` of the columns.
        layout: which columns are what, where the shard says so itself.
        offsets: int64 ``(n,)``, where in a tar file the pictures begin; empty for Parquet.
        sizes: int64 ``(n,)``, bytes of the pictures there; empty for Parquet.
        checks: int64 ``(n,)``, CRC-32 of the pictures there, -1 where nobody has noted it; empty for Parquet.
        others: number of members of a foreign tar file that are no pictures, by ending (``datamodules.tar_scan``).
    """

    columns: pa.Table
    features: Any
    layout: dict[str, Any]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    checks: NDArray[np.int64]
    others: dict[str, int] = field(default_factory=dict)


def index_parquet(
    urls: Sequence[str], picture_column: str, wanted: Callable[[dict[str, Any]], set[str]]
) -> list[ShardIndex]:
    """Reads the wanted columns of Parquet shards, several shards at a time; the pictures are not touched.

    Args:
        urls: of the shards.
        picture_column: must be there.
        wanted: from what a shard says of its columns to the names of those to read; names that it lacks do no harm.

    Raises:
        UserError: where a shard cannot be read or has no column of pictures.
    """
    return _side_by_side(lambda url: _parquet_columns(url, picture_column, wanted), urls, "reading labels of shards")


def index_tars(urls: Sequence[str], picture_suffix: str) -> list[ShardIndex]:
    """What is in tar shards, from the index beside them, from the cache, or by reading them through.

    Args:
        urls: of the shards.
        picture_suffix: of the members that are pictures; empty for the first usual one.

    Raises:
        UserError: where a shard cannot be read, is truncated or not in the format.
    """
    beside = {folder: None if picture_suffix else _index_beside(folder) for folder in {_folder(url) for url in urls}}

    def index(url: str) -> ShardIndex:
        packed = beside[_folder(url)]
        return (packed and _packed(packed, url)) or _foreign(scanned(url, picture_suffix))

    return _side_by_side(index, urls, "reading what is in tar shards, once")


def _side_by_side(index: Callable[[str], ShardIndex], urls: Sequence[str], description: str) -> list[ShardIndex]:
    pool = ThreadPoolExecutor(_THREADS)
    try:
        return list(tracked(pool.map(index, urls), description, len(urls)))
    finally:
        # After an error there is no sense in reading the others.
        pool.shutdown(cancel_futures=True)


def _parquet_columns(url: str, picture_column: str, wanted: Callable[[dict[str, Any]], set[str]]) -> ShardIndex:
    import pyarrow.parquet as pq

    with open_shard(url) as file:
        try:
            opened = pq.ParquetFile(file, page_checksum_verification=True)
            schema = opened.schema_arrow
            if picture_column not in schema.names:
                raise UserError(
                    f"data columns.image: {url} has no column {picture_column!r}; it has {', '.join(schema.names)}"
                )
            layout = _layout(schema)
            names = [name for name in schema.names if name in wanted(layout) - {picture_column}]
            columns = opened.read(columns=names) if names else _rows_only(opened.metadata.num_rows)
        except UserError:
            raise
        except Exception as error:  # what broken files and connections raise depends on the libraries
            raise shard_error(url, error) from error
    nowhere = np.empty(0, dtype=np.int64)
    return ShardIndex(columns, _features(schema), layout, nowhere, nowhere, nowhere)


def _rows_only(count: int) -> pa.Table:
    """A table without columns of interest, which still knows its length."""
    import pyarrow as pa

    return pa.table({"": pa.nulls(count)})


@dataclass(frozen=True, eq=False)
class _Beside:
    """The index of a folder: its rows, those of one shard together, and where each shard's begin and how many."""

    rows: pa.Table
    layout: dict[str, Any]
    parts: dict[str, tuple[int, int]]


def _folder(url: str) -> str:
    return url.rpartition("/")[0]


def _index_beside(folder: str) -> _Beside | None:
    """The index of a folder; None where there is none."""
    url = f"{folder}/{INDEX_FILE}" if folder else INDEX_FILE
    try:
        with open_shard(url) as file:
            table = read_parquet(file, name=INDEX_FILE)
    except DamagedFileError as error:
        raise UserError(f"data shards: {url} cannot be read ({error}); get it anew, or make it anew") from error
    except UserError as error:
        # Some stores say "forbidden" of what is not there.
        if isinstance(error.__cause__, FileNotFoundError | PermissionError):
            return None
        raise
    except Exception as error:  # what broken files and connections raise depends on the libraries
        raise shard_error(url, error) from error
    layout = _layout(table.schema)
    if "shards" not in layout:
        return None
    table = table.sort_by("shard")  # a stable sort
    names, first, counts = np.unique(table["shard"].to_numpy(), return_index=True, return_counts=True)
    parts = zip(names.tolist(), zip(first.tolist(), counts.tolist(), strict=True), strict=True)
    return _Beside(table, layout, dict(parts))


def _packed(beside: _Beside, url: str) -> ShardIndex | None:
    """The part of a folder's index that is about one shard; None where it is about others only."""
    name, layout = url.rpartition("/")[2], beside.layout
    if name not in layout["shards"]:
        return None
    with open_shard(url) as file:
        size = size_of(file)
    if size is not None and size != layout["shards"][name]:
        raise UserError(
            f"data shards: {url} has {size} bytes, {INDEX_FILE} beside it says {layout['shards'][name]}: it is "
            "truncated or not the shard that was packed; get it anew"
        )
    rows = beside.rows.slice(*beside.parts[name])
    offsets, sizes = (rows[key].to_numpy().astype(np.int64) for key in ("offset", "size"))
    # Indexes of earlier versions note no checksums.
    noted = "crc32" in rows.column_names
    checks = rows["crc32"].to_numpy().astype(np.int64) if noted else np.full(len(rows), -1)
    columns = rows.drop_columns(["shard", "offset", "size", *(["crc32"] if noted else [])])
    return ShardIndex(columns, _features(rows.schema), layout, offsets, sizes, checks)


def _foreign(table: pa.Table) -> ShardIndex:
    import datasets

    features = datasets.Features({"key": datasets.Value("string"), "fields": datasets.Value("string")})
    offsets, sizes = (table[name].to_numpy().astype(np.int64) for name in ("offset", "size"))
    others = json.loads((table.schema.metadata or {})[OTHERS_KEY])
    return ShardIndex(table.select(["key", "fields"]), features, {}, offsets, sizes, np.full(len(table), -1), others)


def _features(schema: pa.Schema) -> Any:
    import datasets

    return datasets.Features.from_arrow_schema(schema)


def _layout(schema: pa.Schema) -> dict[str, Any]:
    text = (schema.metadata or {}).get(LAYOUT_KEY)
    layout: dict[str, Any] = json.loads(text) if text else {}
    return layout
