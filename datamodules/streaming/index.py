"""From what shards say besides images to the table of samples, and to the places of the images.

What is in shards besides images: keys, labels, captions and groups, and in tar files where each image lies.

Parquet tells it without its images being read. Of tar files it is told by the index that
``python -m datamodules pack`` leaves beside them (``datamodules.streaming.index`` for those that have none).

What is in a WebDataset shard that has no index of ours: it is read through once, and what was found is kept.

It is kept under ``$VITRAIL_CACHE`` for as long as the shard stays the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypedDict, cast

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from datamodules.checks.verify import cache_directory
from datamodules.files.label_csv import (
    class_names_of,
    first_text,
    is_left_alone,
    label_texts,
    numbers_in_order,
    plain_texts,
)
from datamodules.loading.decode import HEIF_SUFFIXES, SUFFIXES
from datamodules.streaming.shards import INDEX_FILE, Shards, open_shard, shard_error, short_names, size_of, unpacked
from datamodules.table import Missing, SampleTable, attribute_column, composed, strings_of, target_column
from vitrail.console import tracked
from vitrail.errors import UserError
from vitrail.files import DamagedFileError, current_keys, lock, read_parquet, write_atomically, write_parquet
from vitrail.types import LABEL_TASK

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    from numpy.typing import NDArray


IMAGE_SUFFIXES = tuple(suffix.removeprefix(".") for suffix in (*SUFFIXES, *HEIF_SUFFIXES))
"""Members of a tar file that are images, the first that a sample has."""

OTHERS_KEY = b"others"
"""Metadata of what is known of a tar file: its members that are no images of samples, counted by ending as JSON."""

_FORMAT = 3  # Counts up when the meaning of the cached columns changes.
_LARGEST_TEXT = 1 << 20
_MEMBER = re.compile(r"((?:.*/|)[^./][^.]*)\.([^/]+)")


def scanned(url: str, image_suffix: str) -> pa.Table:
    """What is in a tar file, from the cache as long as the file is the same.

    Args:
        url: of the shard.
        image_suffix: of the members that are images; empty for the first usual one.

    Returns:
        For each sample ``key``, ``offset`` and ``size`` of its image in the archive, and ``fields``, its short
        members by their endings as JSON. The schema's metadata count all other members: by what follows a sample's key
        (``json``, ``seg.png``), and files of no sample by their last ending with its dot.

    Raises:
        UserError: where the shard cannot be read, is truncated or not in the format.
    """
    folder = cache_directory() / "shards"
    stamp = stamp_of(url)
    key = hashlib.sha256(f"{_FORMAT}\n{url}\n{stamp}\n{image_suffix}".encode()).hexdigest()
    path = folder / f"{key}.parquet"
    with _one_scanner(folder, key):
        if stamp and path.exists():
            try:
                return read_parquet(path)
            except (DamagedFileError, OSError) as error:
                rank_zero_warn(f"{error}; {url} is read through again")
        table = _scan(url, image_suffix)
        if stamp:
            _keep(table, path, url)
        return table


@contextlib.contextmanager
def _one_scanner(folder: Path, key: str) -> Iterator[None]:
    """Where several processes begin together, one reads the file through and the others wait for what it finds."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # without such a folder each process does the work, see _keep
            stack.enter_context(lock(folder / f".{key}.lock"))
        yield


def _keep(table: pa.Table, path: Path, url: str) -> None:
    try:
        with write_atomically(path) as partial:
            write_parquet(table, partial)
    except OSError as error:
        rank_zero_warn(f"{path.parent}: cannot keep what is in {url} ({error}); set $VITRAIL_CACHE")


def stamp_of(url: str) -> str:
    """What changes with a shard's content; empty where its server says nothing."""
    with open_shard(url) as file:
        return _stamp(url, file)


def _stamp(url: str, file: IO[bytes]) -> str:
    if "://" not in url:
        status = os.fstat(file.fileno())
        return f"{status.st_size} {status.st_mtime_ns}"
    details: Any = getattr(file, "details", None)
    with contextlib.suppress(Exception):  # not every file system knows details; then there is no stamp
        details = details or file.info()  # type: ignore[attr-defined]
    known = {
        key.lower(): str(value)
        for key, value in (details if isinstance(details, dict) else {}).items()
        if value
        and key.lower() in ("size", "etag", "mtime", "lastmodified", "last_modified", "last-modified", "blob_id", "md5")
    }
    # A size alone says little: tar files are filled up to round ones.
    return json.dumps(known, sort_keys=True) if len(known) > 1 else ""


def _scan(url: str, image_suffix: str) -> pa.Table:
    """Goes through a tar file: key, place of the image and all short texts of each sample."""
    import pyarrow as pa

    columns: dict[str, list[Any]] = {"key": [], "offset": [], "size": [], "fields": []}
    others: Counter[str] = Counter()
    with open_shard(url, sequential=True) as file, _whole(url, file) as archive:
        for key, members in _samples(url, archive, others):
            suffixes = [image_suffix] if image_suffix else IMAGE_SUFFIXES
            place = next((members[suffix] for suffix in suffixes if suffix in members), None)
            if not isinstance(place, tuple):
                wanted = image_suffix or ", ".join(IMAGE_SUFFIXES)
                raise UserError(
                    f"data shards: {url}: sample {key!r} has no image ({wanted}) but {', '.join(sorted(members))}; "
                    "correct the shard, or name the ending with columns: {image: …}"
                )
            others.update(suffix for suffix, member in members.items() if member is not place)
            texts = {suffix: text for suffix, text in members.items() if isinstance(text, str)}
            for name, value in zip(columns, (key, *place, json.dumps(texts)), strict=True):
                columns[name].append(value)
    if not columns["key"]:
        raise UserError(f"data shards: {url} has no samples (files called key.jpg, key.cls …); name a WebDataset shard")
    return pa.table(columns).replace_schema_metadata({OTHERS_KEY: json.dumps(others)})


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


def _samples(url: str, archive: IO[bytes], others: Counter[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Keys, and by ending either (offset, size) of an image or the content of a short text; others are counted."""
    key, members = "", dict[str, Any]()
    watched = _LastBlock(archive)
    with tarfile.open(fileobj=cast("IO[bytes]", watched), mode="r|") as tar:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # else all members of the file gather there
            match = _MEMBER.fullmatch(member.name.removeprefix("./")) if member.isfile() else None
            if match is None:
                if member.isfile() and not any(map(is_left_alone, Path(member.name).parts)):
                    others[Path(member.name).suffix.lower() or "."] += 1
                continue
            if match[1] != key and members:
                yield key, members
                members = {}
            key, suffix = match[1], match[2].lower()
            if suffix in members:
                raise UserError(f"data shards: {url}: sample {key!r} has two files .{suffix}; remove one")
            members[suffix] = _content_of(tar, member, suffix)
    if watched.block.strip(b"\0"):
        # tarfile takes the end of a file for the end of the archive, which says so by blocks of zeros.
        raise UserError(f"data shards: {url} is truncated: the end of the archive is missing; get it anew")
    if members:
        yield key, members


class _LastBlock:
    """Hands a file on and knows the last block that was read."""

    def __init__(self, file: IO[bytes]) -> None:
        self.block = b""
        self._file = file

    def read(self, size: int) -> bytes:
        """Bytes of the file."""
        content = self._file.read(size)
        self.block = (self.block + content)[-tarfile.BLOCKSIZE :]
        return content


def _content_of(tar: tarfile.TarFile, member: tarfile.TarInfo, suffix: str) -> tuple[int, int] | str:
    if suffix.rsplit(".", 1)[-1] in IMAGE_SUFFIXES or member.size > _LARGEST_TEXT:
        return member.offset_data, member.size
    file = tar.extractfile(member)
    content = file.read() if file else b""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return member.offset_data, member.size


LAYOUT_KEY = b"vitrail"
"""Metadata of our own shards: which columns are what."""

_THREADS = 8


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """What is in one shard of n samples.

    Attributes:
        columns: those that are wanted, n rows; of a foreign tar file ``key`` and ``fields``.
        features: the ``datasets.Features`` of the columns.
        layout: which columns are what, where the shard says so itself.
        offsets: int64 ``(n,)``, where in a tar file the images begin; empty for Parquet.
        sizes: int64 ``(n,)``, bytes of the images there; empty for Parquet.
        checks: int64 ``(n,)``, CRC-32 of the images there, -1 where nobody has noted it; empty for Parquet.
        others: number of members of a foreign tar file that are no images, by ending.
    """

    columns: pa.Table
    features: Any
    layout: dict[str, Any]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    checks: NDArray[np.int64]
    others: dict[str, int] = field(default_factory=dict)


def index_parquet(
    urls: Sequence[str], image_column: str, wanted: Callable[[dict[str, Any]], set[str]]
) -> list[ShardIndex]:
    """Reads the wanted columns of Parquet shards, several shards at a time; the images are not touched.

    Args:
        urls: of the shards.
        image_column: must be there.
        wanted: from what a shard says of its columns to the names of those to read; names that it lacks do no harm.

    Raises:
        UserError: where a shard cannot be read or has no column of images.
    """
    return _side_by_side(lambda url: _parquet_columns(url, image_column, wanted), urls, "reading labels of shards")


def index_tars(urls: Sequence[str], image_suffix: str) -> list[ShardIndex]:
    """What is in tar shards, from the index beside them, from the cache, or by reading them through.

    Args:
        urls: of the shards.
        image_suffix: of the members that are images; empty for the first usual one.

    Raises:
        UserError: where a shard cannot be read, is truncated or not in the format.
    """
    beside = {folder: None if image_suffix else _index_beside(folder) for folder in {_folder(url) for url in urls}}

    def index(url: str) -> ShardIndex:
        packed = beside[_folder(url)]
        return (packed and _packed(packed, url)) or _foreign(scanned(url, image_suffix))

    return _side_by_side(index, urls, "reading what is in tar shards, once")


def _side_by_side(index: Callable[[str], ShardIndex], urls: Sequence[str], description: str) -> list[ShardIndex]:
    pool = ThreadPoolExecutor(_THREADS)
    try:
        return list(tracked(pool.map(index, urls), description, len(urls)))
    finally:
        # After an error there is no sense in reading the others.
        pool.shutdown(cancel_futures=True)


def _parquet_columns(url: str, image_column: str, wanted: Callable[[dict[str, Any]], set[str]]) -> ShardIndex:
    import pyarrow.parquet as pq

    with open_shard(url) as file:
        try:
            opened = pq.ParquetFile(file, page_checksum_verification=True)
            schema = opened.schema_arrow
            if image_column not in schema.names:
                raise UserError(
                    f"data columns.image: {url} has no column {image_column!r}; it has {', '.join(schema.names)}"
                )
            layout = _layout(schema)
            names = [name for name in schema.names if name in wanted(layout) - {image_column}]
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
    text = current_keys(schema.metadata).get(LAYOUT_KEY)
    layout: dict[str, Any] = json.loads(text) if text else {}
    return layout


_SHOWN = 12


class StreamColumns(TypedDict, total=False):
    """Which columns of Parquet, or which members of a WebDataset sample, are what.

    In tar files a name is the ending of a member (``cls``, ``txt``) or a key of a member that holds JSON
    (``json.colour``). Shards that ``python -m datamodules pack`` wrote say all of it themselves.

    Attributes:
        image: images; default image, and in tar files the first member with a usual ending.
        label: class, as the library's ClassLabel, text or whole number; empty for none; default label, and in tar files
            cls where there is such a member.
        caption: a text or several; default none, and in tar files txt where there is such a member.
        group: the object or product that an image shows; default none.
        key: stable name of a sample; default none, and in tar files the members' common name.
        attributes: further columns to learn, each a task of its own; default none. Of shards that
            ``python -m datamodules pack`` wrote, the names of the tasks.
    """

    image: str
    label: str
    caption: str
    group: str
    key: str
    attributes: list[str]


_USUAL: StreamColumns = {"label": "label"}


def read_streams(
    urls: Mapping[str, Sequence[str]],
    shard_format: str,
    columns: StreamColumns,
    vocabulary: Mapping[str, Sequence[str]],
    origin: str,
    missing: Missing | None = None,
) -> tuple[SampleTable, Shards]:
    """The table of all samples, shard by shard, and where their images are.

    Args:
        urls: of the shards of each split.
        shard_format: ``parquet`` or ``webdataset``.
        columns: which columns are what.
        vocabulary: class names by task; for whole numbers, which begin at 0, what they stand for.
        origin: what messages call the set.
        missing: what counts as missing; the empty text alone by default.

    Raises:
        UserError: for shards that cannot be read, missing columns, labels without a name and repeated keys.
    """
    import pandas as pd

    every = [url for part in urls.values() for url in part]
    splits = [split for split, part in urls.items() for _ in part]
    is_parquet = shard_format == "parquet"
    image = columns.get("image", "image" if is_parquet else "")
    if is_parquet:
        indices = index_parquet(every, image, lambda layout: _names(_choose(columns, layout, _USUAL)))
    else:
        indices = index_tars(every, image)
    chosen = _choose(columns, indices[0].layout, _USUAL if is_parquet else _usual_members(indices[0]))
    tasks = _tasks(chosen, indices[0].layout)
    missing = missing or Missing()
    names = short_names(every)
    parts = [
        _frame(index, chosen, tasks, vocabulary, missing, name, split, url)
        for index, name, split, url in zip(indices, names, splits, every, strict=True)
    ]
    frame = pd.concat(parts, ignore_index=True)
    _settle_names(frame, np.repeat(np.array(every), [len(part) for part in parts]), has_key=bool(chosen.get("key")))
    known = _vocabularies(frame, tasks, indices[0], vocabulary, missing)
    targets = {task: target_column(task) for task in tasks}
    table = SampleTable.from_frame(frame, targets, known, origin, missing=missing.counts)
    shards = Shards(
        urls=every,
        ends=np.cumsum([len(part) for part in parts]).astype(np.int64),
        keys=strings_of(frame["key"]),
        column=image if is_parquet else "",
        offsets=np.concatenate([index.offsets for index in indices]),
        sizes=np.concatenate([index.sizes for index in indices]),
        checks=np.concatenate([index.checks for index in indices]),
        members_left_out=_members_left_out(indices, chosen),
        value_range=indices[0].layout.get("value_range"),
    )
    return table, shards


def _choose(columns: StreamColumns, layout: Mapping[str, Any], usual: StreamColumns) -> StreamColumns:
    """The columns that are used: what the user says over what the shards say over what is usual."""
    said: Any = {key: value for key, value in layout.items() if key in StreamColumns.__annotations__}
    chosen: StreamColumns = {**usual, **said, **columns}
    packed = {task: column for column, task in layout.get("tasks", {}).items()}
    attributes = chosen["attributes"] = [packed.get(name, name) for name in chosen.get("attributes", [])]
    tasks = [_task(name, layout) for name in attributes]
    if taken := [task for place, task in enumerate(tasks) if task == LABEL_TASK or task in tasks[:place]]:
        raise UserError(
            f"data columns.attributes: the name {taken[0]!r} is taken by another task; rename or leave out a column"
        )
    if attributes and not chosen.get("label"):
        raise UserError(f"data columns.attributes: need a main task besides; name one of {attributes} as columns.label")
    return chosen


def _names(chosen: StreamColumns) -> set[str]:
    """The columns to read."""
    single = {str(value) for key, value in chosen.items() if key != "attributes"}
    return {*single, *chosen.get("attributes", [])} - {""}


def _members_left_out(indices: Sequence[ShardIndex], chosen: StreamColumns) -> dict[str, int]:
    """Members of tar files that nothing is read from, by the last ending of their names."""
    names = _names(chosen)
    used = names | {name.partition(".")[0] for name in names}
    left: Counter[str] = Counter()
    for index in indices:
        for member, count in index.others.items():
            if member not in used:
                left[Path(f"key.{member.lstrip('.')}").suffix] += count
    return dict(left)


def _usual_members(index: ShardIndex) -> StreamColumns:
    """Which of the usual members samples of a tar file have."""
    if index.layout:
        return _USUAL
    has = {name for text in index.columns["fields"].to_pylist() for name in json.loads(text)}
    return {"label": "cls" if "cls" in has else "", "caption": "txt" if "txt" in has else "", "key": "key"}


def _frame(
    index: ShardIndex,
    chosen: StreamColumns,
    tasks: Mapping[str, str],
    vocabulary: Mapping[str, Sequence[str]],
    missing: Missing,
    name: str,
    split: str,
    url: str,
) -> pd.DataFrame:
    """The rows of one shard."""
    import pandas as pd

    count = index.columns.num_rows
    frame = pd.DataFrame({"row": np.arange(count), "source": [f"{name}#{row}" for row in range(count)]})
    frame["split"], frame["shard"] = split, name
    key = chosen.get("key", "")
    frame["key"] = plain_texts(_column(index, key, "key", url)) if key else [str(row) for row in range(count)]
    for task, column in tasks.items():
        kind = "label" if task == LABEL_TASK else "attributes"
        given = vocabulary.get(task, [])
        names = given or class_names_of(index.features.get(column))
        texts = label_texts(_column(index, column, kind, url), names, f"data columns.{kind}: {url}")
        texts = missing.known(attribute_column(task), texts)
        frame[target_column(task)] = texts
        _check_vocabulary(texts, given, f"data vocabulary.{task}", url)
    if caption := chosen.get("caption", ""):
        lists = _captions(_column(index, caption, "caption", url).to_pylist())
        known = [missing.known("caption", texts) for texts in lists]
        frame["caption"] = [[text for text in texts if text] or [""] for texts in known]
    if group := chosen.get("group", ""):
        frame["group"] = missing.known("group", plain_texts(_column(index, group, "group", url)))
    return frame


def _tasks(chosen: StreamColumns, layout: Mapping[str, Any]) -> dict[str, str]:
    """The column of each task, the main one first; nothing for captions alone."""
    label = chosen.get("label", "")
    main = {LABEL_TASK: label} if label else {}
    return main | {_task(column, layout): column for column in chosen.get("attributes", [])}


def _task(column: str, layout: Mapping[str, Any]) -> str:
    """Name of the task that a column is learned as; shards of ours say it."""
    return str(layout.get("tasks", {}).get(column, composed(column.removeprefix("json."))))


def _column(index: ShardIndex, name: str, option: str, url: str) -> Any:
    """A column as an Arrow array."""
    import pyarrow as pa

    if name in index.columns.column_names and name != "fields":
        return index.columns[name].combine_chunks()
    if "fields" not in index.columns.column_names or index.layout:
        known = ", ".join(index.features)
        hint = "name one of them, or '' for none"
        raise UserError(f"data columns.{option}: {url} has no column {name!r} but {known}; {hint}")
    values = [_field(json.loads(text), name) for text in index.columns["fields"].to_pylist()]
    if values and all(value is None for value in values):
        members = ", ".join(sorted(json.loads(index.columns["fields"][0].as_py()))) or "none"
        raise UserError(
            f"data columns.{option}: no sample of {url} has {name!r} but {members}; name another member, or '' for none"
        )
    if option in ("label", "attributes"):
        return _numbers_or_texts(values)
    if any(isinstance(value, list) for value in values):
        lists = [value if isinstance(value, list) else [] if value is None else [value] for value in values]
        return pa.array([[first_text(text) for text in texts] for texts in lists], type=pa.list_(pa.string()))
    return pa.array([first_text(value) for value in values])


def _field(members: Mapping[str, str], name: str) -> Any:
    """A member's content, or a value of one that holds JSON."""
    if name in members:
        return members[name].strip()
    member, _, key = name.partition(".")
    if member not in members or not key:
        return None
    try:
        content = json.loads(members[member])
    except json.JSONDecodeError:
        return None
    return content.get(key) if isinstance(content, dict) else None


def _numbers_or_texts(values: Sequence[Any]) -> Any:
    import pyarrow as pa

    texts = [None if value is None or value == "" else str(value) for value in values]
    # 001 is a name and no number: 1 may be another.
    if all(text is None or (text.removeprefix("-").isdecimal() and str(int(text)) == text) for text in texts):
        return pa.array([None if text is None else int(text) for text in texts], type=pa.int64())
    return pa.array(texts, type=pa.string())


def _captions(values: Sequence[Any]) -> list[list[str]]:
    """The texts of each sample, on one line each."""
    return [
        [first_text(text) for text in value] if isinstance(value, list) else [first_text(value)] for value in values
    ]


def _check_vocabulary(texts: Sequence[str], given: Sequence[str], where: str, url: str) -> None:
    """Refuses values that a vocabulary lacks which the user gave."""
    strange = sorted(set(texts) - set(given) - {""}) if given else []
    if strange:
        row = next(row for row, text in enumerate(texts) if text == strange[0])
        shown = ", ".join(map(repr, strange[:_SHOWN]))
        raise UserError(f"{where}: {url} has {shown} (first in row {row}), which it lacks; add or correct the value")


def _settle_names(frame: pd.DataFrame, urls: Any, has_key: bool) -> None:
    """Names are the keys, with the shard before it where keys are repeated in others.

    Raises:
        UserError: for a key that one shard has twice.
    """
    again = frame.duplicated(["shard", "key"], keep="first")
    if again.any():
        place = int(np.flatnonzero(again)[0])
        key = frame["key"].iloc[place]
        raise UserError(
            f"data shards: {urls[place]} has {int(again.sum())} repeated keys, first {key!r} in row "
            f"{frame['row'].iloc[place]}; keys name samples: make the shard anew with different ones"
        )
    unique = has_key and not frame["key"].duplicated().any()
    frame["name"] = frame["key"] if unique else frame["shard"] + "/" + frame["key"]


def _vocabularies(
    frame: pd.DataFrame,
    tasks: Mapping[str, str],
    index: ShardIndex,
    given: Mapping[str, Sequence[str]],
    missing: Missing,
) -> dict[str, list[str]]:
    """Class names by task: those given, those of the shards, whole numbers by size; other texts sort themselves."""
    if strange := sorted(set(given) - set(tasks)):
        raise UserError(f"data vocabulary: {strange[0]!r} is no task; tasks are {', '.join(tasks) or 'none'}")
    known: dict[str, list[str]] = {}
    for task, column in tasks.items():
        learned = set(frame.loc[frame["split"] == "train", target_column(task)]) - {""}
        names = list(given.get(task, [])) or class_names_of(index.features.get(column))
        names = [name for name in names if not missing.means_unknown(name)]
        if names:
            known[task] = names
        elif learned and all(text.removeprefix("-").isdecimal() for text in learned):
            known[task] = numbers_in_order(learned)
    return known
