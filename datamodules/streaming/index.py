"""The index of a set of shards: everything but the images, and where in tar files the images are.

Of Parquet shards the wanted columns are read. Tar shards that ``python -m datamodules pack`` wrote have an index next
to them; others are read through once, and the columns found are kept under ``$VITRAIL_CACHE`` until the shard changes.
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

from datamodules.files.columns import (
    kinds_of_tasks,
    label_vocabularies,
    labels_of_entries,
    of_class_kinds,
    other_targets,
    plain_texts,
    require_column,
    require_order,
    sample_columns,
    vocabularies,
)
from datamodules.files.label_csv import is_left_alone
from datamodules.loading.decode import HEIF_SUFFIXES, SUFFIXES
from datamodules.streaming.shards import (
    INDEX_FILE,
    Shards,
    open_shard,
    shard_error,
    shard_errors,
    short_names,
    size_of,
    unpacked,
)
from datamodules.table import Missing, SampleTable, composed, strings_of, target_column
from vitrail.console import tracked
from vitrail.errors import UserError
from vitrail.files import (
    DamagedFileError,
    cache_directory,
    current_keys,
    lock,
    read_parquet,
    write_atomically,
    write_parquet,
)
from vitrail.types import LABEL_TASK, TaskKind

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

IMAGE_SUFFIXES = tuple(suffix.removeprefix(".") for suffix in (*SUFFIXES, *HEIF_SUFFIXES))
"""Members of a tar file that are images; the first that a sample has is its image."""

OTHERS_KEY = b"others"
"""Metadata of a scanned tar file: number of members other than the samples' images, by ending, as JSON."""

LAYOUT_KEY = b"vitrail"
"""Metadata of our own shards: which columns are what."""

PLACE = ("/offset", "/size")
"""Columns of a scanned tar file: where its images are. No ending of a member has a slash."""

_FORMAT = 4  # Counts up when the meaning of the cached columns changes.
_LARGEST_TEXT = 1 << 20
_MEMBER = re.compile(r"((?:.*/|)[^./][^.]*)\.([^/]+)")
_THREADS = 8


def scanned(url: str, image_suffix: str) -> pa.Table:
    """Read a tar file through, or take what was found from the cache as long as the file is the same.

    Args:
        url: of the shard.
        image_suffix: of the members that are images; empty for the first usual one.

    Returns:
        For each sample ``key``, the columns ``PLACE``, and one column for each ending of short members (``cls``) and
        each top-level key of those that contain JSON (``json.colour``): whole numbers, texts or lists of texts. The
        schema's metadata count the other members by what follows a sample's key (``json``, ``seg.png``), files of no
        sample by their last ending with its dot.
    """
    folder = cache_directory() / "shards"
    with open_shard(url) as file:
        stamp = _stamp(url, file)
    key = hashlib.sha256(f"{_FORMAT}\n{url}\n{stamp}\n{image_suffix}".encode()).hexdigest()
    path = folder / f"{key}.parquet"
    with contextlib.ExitStack() as stack:
        # Of several processes that begin together one reads the file, the others wait for what it finds.
        with contextlib.suppress(OSError):  # without such a folder each process does the work
            stack.enter_context(lock(folder / f".{key}.lock"))
        if stamp and path.exists():
            try:
                return read_parquet(path)
            except (DamagedFileError, OSError) as error:
                rank_zero_warn(f"{error}; {url} is read through again")
        table = _scan(url, image_suffix)
        if stamp:
            try:
                with write_atomically(path) as partial:
                    write_parquet(table, partial)
            except OSError as error:
                rank_zero_warn(f"{folder}: cannot keep the index of {url} ({error}); set $VITRAIL_CACHE")
        return table


def stamp_of(url: str) -> str:
    """Return what changes with a shard's content; empty where its server reports nothing of the kind."""
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
    # The size alone is not enough: tar files are padded to round ones.
    return json.dumps(known, sort_keys=True) if len(known) > 1 else ""


def _scan(url: str, image_suffix: str) -> pa.Table:
    import pyarrow as pa

    rows: list[dict[str, Any]] = []
    others: Counter[str] = Counter()
    suffixes = [image_suffix] if image_suffix else IMAGE_SUFFIXES
    with (
        open_shard(url, sequential=True) as file,
        shard_errors(url),
        unpacked(url, file) as archive,
    ):
        for key, members in _samples(url, archive, others):
            place = next((members[suffix] for suffix in suffixes if suffix in members), None)
            if not isinstance(place, tuple):
                raise UserError(
                    f"data shards: {url}: sample {key!r} has no image ({', '.join(suffixes)}) but "
                    f"{', '.join(sorted(members))}; correct the shard, or name the ending with columns: {{image: …}}"
                )
            others.update(suffix for suffix, member in members.items() if member is not place)
            rows.append({**_values(members), "key": key, **dict(zip(PLACE, place, strict=True))})
    if not rows:
        raise UserError(f"data shards: {url} has no samples (files called key.jpg, key.cls …); name a WebDataset shard")
    columns = {name: _arrow([row.get(name) for row in rows]) for name in dict.fromkeys(n for row in rows for n in row)}
    return pa.table({**columns, "key": [row["key"] for row in rows]}, metadata={OTHERS_KEY: json.dumps(others)})


def _values(members: Mapping[str, Any]) -> dict[str, Any]:
    """The texts of a sample by ending, and the values of those that contain a JSON object by ``ending.key``."""
    values: dict[str, Any] = {}
    for suffix, text in members.items():
        if not isinstance(text, str):
            continue
        values[suffix] = text.strip()
        with contextlib.suppress(json.JSONDecodeError, RecursionError):
            content = json.loads(text, parse_constant=lambda _: None) if values[suffix].startswith("{") else None
            if isinstance(content, dict):
                del values[suffix]
                values.update({f"{suffix}.{key}": value for key, value in content.items()})
    return {name: value for name, value in values.items() if value is not None and not isinstance(value, dict)}


def _arrow(values: Sequence[Any]) -> pa.Array:
    """Values of JSON as whole numbers if all are, as lists of texts if there is a list, otherwise as texts."""
    import pyarrow as pa

    if any(isinstance(value, list) for value in values):
        lists = [value if value is None or isinstance(value, list) else [value] for value in values]
        return pa.array(
            [texts and [None if text is None else str(text) for text in texts] for texts in lists],
            pa.list_(pa.string()),
        )
    texts = [None if value is None else str(value) for value in values]
    if all(not text or _is_whole(text) for text in texts):
        return pa.array([int(text) if text else None for text in texts], pa.int64())
    return pa.array(texts, pa.string())


def _is_whole(text: str) -> bool:
    """Whether a text is the usual form of a number with 64 bits; 001 is a name, 1 may be another one."""
    return len(text) < 19 and text.removeprefix("-").isdecimal() and str(int(text)) == text


def _samples(url: str, archive: IO[bytes], others: Counter[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Keys, and by ending either (offset, size) of an image or the content of a short text; others go to ``others``."""
    key, members = "", dict[str, Any]()
    watched = _LastBlock(archive)
    with tarfile.open(fileobj=cast("IO[bytes]", watched), mode="r|") as tar:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # or all members of the file gather there
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
        # tarfile takes the end of a file for the end of the archive, which are blocks of zeros.
        raise UserError(f"data shards: {url} is truncated: the end of the archive is missing; get an intact copy")
    if members:
        yield key, members


class _LastBlock:
    """A file that remembers the last block that was read."""

    def __init__(self, file: IO[bytes]) -> None:
        self.block = b""
        self._file = file

    def read(self, size: int) -> bytes:
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


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """What is in one shard of n samples.

    Attributes:
        columns: the wanted ones, n rows.
        features: the ``datasets.Features`` of all columns of the shard but the images.
        layout: which columns are what, where the shard itself records it.
        places: ``offset``, ``size`` and ``crc32`` (null where unknown) of the images in a tar file, n rows.
        others: number of members of a foreign tar file other than the samples' images, by ending.
    """

    columns: pa.Table
    features: Any
    layout: dict[str, Any] = field(default_factory=dict)
    places: pa.Table | None = None
    others: dict[str, int] = field(default_factory=dict)


def index_parquet(
    urls: Sequence[str], image_column: str, wanted: Callable[[dict[str, Any]], set[str]]
) -> list[ShardIndex]:
    """Read columns of Parquet shards, several shards at a time, without the images.

    Args:
        urls: of the shards.
        image_column: must exist.
        wanted: from a shard's layout to the names of the columns to read; names that it lacks are ignored.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    def index(url: str) -> ShardIndex:
        with open_shard(url) as file, shard_errors(url):
            opened = pq.ParquetFile(file, page_checksum_verification=True)
            schema = opened.schema_arrow
            require_column(image_column, schema.names, "image", url)
            layout = _layout(schema)
            names = [name for name in schema.names if name in wanted(layout) - {image_column}]
            # Without any column the table would lose its length.
            rows = pa.table({"": pa.nulls(opened.metadata.num_rows)})
            columns = opened.read(columns=names) if names else rows
        features = _features(schema)
        del features[image_column]
        return ShardIndex(columns, features, layout)

    return _in_threads(index, urls, "reading labels of shards")


def index_tars(urls: Sequence[str], image_suffix: str) -> list[ShardIndex]:
    """Index tar shards: from the file next to them, from the cache, or by reading them through."""
    packed = {} if image_suffix else {folder: _packed(folder) for folder in {url.rpartition("/")[0] for url in urls}}

    def index(url: str) -> ShardIndex:
        folder, _, name = url.rpartition("/")
        found = packed.get(folder, {}).get(name)
        if found is None:
            return _foreign(scanned(url, image_suffix))
        with open_shard(url) as file:
            size = size_of(file)
        noted = found.layout["shards"][name]
        if size is not None and size != noted:
            raise UserError(
                f"data shards: {url} has {size} bytes, {INDEX_FILE} next to it records {noted}: it is truncated or not "
                "the shard that was packed; get an intact copy"
            )
        return found

    return _in_threads(index, urls, "reading what is in tar shards, once")


def _in_threads(index: Callable[[str], ShardIndex], urls: Sequence[str], description: str) -> list[ShardIndex]:
    pool = ThreadPoolExecutor(_THREADS)
    try:
        return list(tracked(pool.map(index, urls), description, len(urls)))
    finally:
        # After an error there is no sense in reading the others.
        pool.shutdown(cancel_futures=True)


def _packed(folder: str) -> dict[str, ShardIndex]:
    """The index of a folder by the shards' names; empty where there is none."""
    import pyarrow as pa
    import pyarrow.compute as pc

    url = f"{folder}/{INDEX_FILE}" if folder else INDEX_FILE
    try:
        with open_shard(url) as file:
            table = read_parquet(file, name=INDEX_FILE)
    except DamagedFileError as error:
        raise UserError(f"data shards: {url} cannot be read ({error}); get an intact copy") from error
    except UserError as error:
        # Some stores respond "forbidden" for what does not exist.
        if isinstance(error.__cause__, FileNotFoundError | PermissionError):
            return {}
        raise
    except Exception as error:  # what broken files and connections raise depends on the libraries
        raise shard_error(url, error) from error
    layout, features = _layout(table.schema), _features(table.schema)
    if "shards" not in layout:
        return {}
    if "crc32" not in table.column_names:  # indexes of earlier versions have no checksums
        table = table.append_column("crc32", pa.nulls(len(table), pa.int64()))
    table = table.sort_by("shard")  # a stable sort
    places = table.select(["offset", "size", "crc32"])
    columns = table.drop_columns(["shard", "offset", "size", "crc32"])
    found, first = {}, 0
    # Slices, because a filter for each of thousands of shards would go through all rows each time.
    for name, count in (tuple(run.values()) for run in pc.value_counts(table["shard"]).to_pylist()):
        found[name] = ShardIndex(columns.slice(first, count), features, layout, places.slice(first, count))
        first += count
    return found


def _foreign(table: pa.Table) -> ShardIndex:
    import pyarrow as pa

    places = pa.table([table[name] for name in PLACE], ["offset", "size"])
    places = places.append_column("crc32", pa.nulls(len(table), pa.int64()))
    columns = table.drop_columns(list(PLACE))
    others = json.loads((table.schema.metadata or {})[OTHERS_KEY])
    return ShardIndex(columns, _features(columns.schema), {}, places, others)


def _features(schema: pa.Schema) -> Any:
    import datasets

    return datasets.Features.from_arrow_schema(schema)


def _layout(schema: pa.Schema) -> dict[str, Any]:
    text = current_keys(schema.metadata).get(LAYOUT_KEY)
    layout: dict[str, Any] = json.loads(text) if text else {}
    return layout


class StreamColumns(TypedDict, total=False):
    """Which columns of Parquet, or which members of a WebDataset sample, are what.

    In tar files a name is the ending of a member (``cls``, ``txt``) or a top-level key of a JSON member
    (``json.colour``). Shards that ``python -m datamodules pack`` wrote record all of it themselves.

    Attributes:
        image: images; default image, and in tar files the first member with a usual ending.
        label: class, as the library's ClassLabel, text or whole number; empty for none; default label, and in tar files
            cls where there is such a member.
        caption: a text or several; default none, and in tar files txt where there is such a member.
        group: the object or product that an image shows; default none.
        key: stable name of a sample; default none, and in tar files the members' common name.
        attributes: further columns, each a task of its own; default none. Of shards that
            ``python -m datamodules pack`` wrote, the names of the tasks.
        kinds: of columns of labels that are not ``single_label``: ``multi_label`` (lists, or texts with ``label_sep``),
            ``ordinal`` (texts need a ``vocabulary`` in their order) or ``regression``.
        label_sep: text between the labels of a multi-label cell.
    """

    image: str
    label: str
    caption: str
    group: str
    key: str
    attributes: list[str]
    kinds: dict[str, str]
    label_sep: str


_USUAL: StreamColumns = {"label": "label"}


def read_streams(
    urls: Mapping[str, Sequence[str]],
    shard_format: str,
    columns: StreamColumns,
    vocabulary: Mapping[str, Sequence[str]],
    origin: str,
    missing: Missing | None = None,
) -> tuple[SampleTable, Shards]:
    """Return the table of all samples, shard by shard, and where their images are.

    Args:
        urls: of the shards of each split.
        shard_format: ``parquet`` or ``webdataset``.
        columns: which columns are what.
        vocabulary: class names by task; for whole numbers, which begin at 0, the names that they stand for.
        origin: name of the set in messages.
        missing: what counts as missing; the empty text alone by default.
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
    kinds = kinds_of_tasks(chosen.get("kinds", {}), tasks, every[0])
    missing = missing or Missing()
    names = short_names(every)
    parts = [
        _frame(index, chosen, tasks, kinds, vocabulary, missing, name, split, url)
        for index, name, split, url in zip(indices, names, splits, every, strict=True)
    ]
    frame = pd.concat(parts, ignore_index=True)
    _settle_names(frame, np.repeat(np.array(every), [len(part) for part in parts]), has_key=bool(chosen.get("key")))
    if strange := sorted(set(vocabulary) - set(tasks)):
        raise UserError(f"data vocabulary: {strange[0]!r} is not a task; tasks are {', '.join(tasks) or 'none'}")
    layout, features = indices[0].layout, indices[0].features
    known = vocabularies(frame, of_class_kinds(tasks, kinds), features, missing, vocabulary)
    packed = {task: layout["labels"][name] for task, name in tasks.items() if name in layout.get("labels", {})}
    known |= label_vocabularies(tasks, kinds, features, {**packed, **vocabulary})
    require_order(tasks, kinds, known, every[0], "vocabulary")
    targets = {task: target_column(task) for task in tasks}
    table = SampleTable.from_frame(frame, targets, known, origin, missing=missing.counts, kinds=kinds)
    shards = Shards(
        urls=every,
        ends=np.cumsum([len(part) for part in parts]).astype(np.int64),
        images=_images(frame, indices),
        column=image if is_parquet else "",
        members_left_out=_members_left_out(indices, chosen),
        value_range=indices[0].layout.get("value_range"),
    )
    return table, shards


def _images(frame: pd.DataFrame, indices: Sequence[ShardIndex]) -> pa.Table:
    import pyarrow as pa

    columns = {"key": strings_of(frame["key"])}
    if places := [index.places for index in indices if index.places is not None]:
        table = pa.concat_tables(places)
        columns |= {name: table[name] for name in table.column_names}
    return pa.table(columns).combine_chunks()


def _choose(columns: StreamColumns, layout: Mapping[str, Any], usual: StreamColumns) -> StreamColumns:
    """The columns in use: the user's over those that the shards record over the usual ones."""
    recorded: Any = {key: value for key, value in layout.items() if key in StreamColumns.__annotations__}
    chosen: StreamColumns = {**usual, **recorded, **columns}
    packed = {task: column for column, task in layout.get("tasks", {}).items()}
    attributes = chosen["attributes"] = [packed.get(name, name) for name in chosen.get("attributes", [])]
    given = {packed.get(name, name): kind for name, kind in columns.get("kinds", {}).items()}
    used = {chosen.get("label", ""), *attributes}
    # Of tasks that are left out the kinds are, too; a name of the user's that is no task is refused later.
    chosen["kinds"] = {name: kind for name, kind in layout.get("kinds", {}).items() if name in used} | given
    tasks = [_task(name, layout) for name in attributes]
    if taken := [task for place, task in enumerate(tasks) if task == LABEL_TASK or task in tasks[:place]]:
        raise UserError(
            f"data columns.attributes: the name {taken[0]!r} is taken by another task; rename or leave out a column"
        )
    if attributes and not chosen.get("label"):
        raise UserError(f"data columns.attributes: need a main task as well; name one of {attributes} as columns.label")
    return chosen


def _names(chosen: StreamColumns) -> set[str]:
    single = {str(value) for key, value in chosen.items() if key not in ("attributes", "kinds", "label_sep")}
    return {*single, *chosen.get("attributes", [])} - {""}


def _members_left_out(indices: Sequence[ShardIndex], chosen: StreamColumns) -> dict[str, int]:
    """Number of unused members of tar files, by the last ending of their names."""
    names = _names(chosen)
    used = names | {name.partition(".")[0] for name in names}
    left: Counter[str] = Counter()
    for index in indices:
        for member, count in index.others.items():
            if member not in used:
                left[Path(f"key.{member.lstrip('.')}").suffix] += count
    return dict(left)


def _usual_members(index: ShardIndex) -> StreamColumns:
    if index.layout:
        return _USUAL
    has = index.columns.column_names
    return {"label": "cls" if "cls" in has else "", "caption": "txt" if "txt" in has else "", "key": "key"}


def _frame(
    index: ShardIndex,
    chosen: StreamColumns,
    tasks: Mapping[str, str],
    kinds: Mapping[str, TaskKind],
    vocabulary: Mapping[str, Sequence[str]],
    missing: Missing,
    name: str,
    split: str,
    url: str,
) -> pd.DataFrame:
    import pandas as pd

    count = index.columns.num_rows
    frame = pd.DataFrame({"row": np.arange(count), "source": [f"{name}#{row}" for row in range(count)]})
    frame["split"], frame["shard"] = split, name
    key = chosen.get("key", "")
    if key:
        require_column(key, index.features, "key", url)
    frame["key"] = plain_texts(index.columns[key]) if key else [str(row) for row in range(count)]
    caption, group = chosen.get("caption", ""), chosen.get("group", "")
    columns = sample_columns(
        index.columns,
        index.features,
        of_class_kinds(tasks, kinds),
        missing,
        url,
        caption=caption,
        group=group,
        given=vocabulary,
    )
    entries = index.layout.get("labels", {})
    packed = {task: column for task, column in tasks.items() if column in entries}
    others, _ = other_targets(
        index.columns,
        index.features,
        range(count),
        {task: column for task, column in tasks.items() if task not in packed},
        kinds,
        missing,
        url,
        label_sep=chosen.get("label_sep", ""),
        classes={column: vocabulary[task] for task, column in tasks.items() if task in vocabulary},
    )
    for task, column in packed.items():
        others[target_column(task)] = labels_of_entries(index.columns[column], entries[column])
    return frame.assign(**columns, **others)


def _tasks(chosen: StreamColumns, layout: Mapping[str, Any]) -> dict[str, str]:
    label = chosen.get("label", "")
    main = {LABEL_TASK: label} if label else {}
    return main | {_task(column, layout): column for column in chosen.get("attributes", [])}


def _task(column: str, layout: Mapping[str, Any]) -> str:
    """Name of the task that a column is; our own shards record it."""
    return str(layout.get("tasks", {}).get(column, composed(column.removeprefix("json."))))


def _settle_names(frame: pd.DataFrame, urls: Any, has_key: bool) -> None:
    """Set the names: the keys, after the shard where shards repeat keys; refuse a key that one shard has twice."""
    again = frame.duplicated(["shard", "key"], keep="first")
    if again.any():
        place = int(np.flatnonzero(again)[0])
        key = frame["key"].iloc[place]
        raise UserError(
            f"data shards: {urls[place]} has {int(again.sum())} repeated keys, first {key!r} in row "
            f"{frame['row'].iloc[place]}; keys name samples: make the shard again with different ones"
        )
    unique = has_key and not frame["key"].duplicated().any()
    frame["name"] = frame["key"] if unique else frame["shard"] + "/" + frame["key"]
