"""Write any data set as shards that can be streamed: Parquet, or WebDataset tar files with an index.

Images that are files keep their bytes; others are written as PNG, without loss. Both formats open with the ``datasets``
library, tar files with ``webdataset`` as well.
"""

from __future__ import annotations

import io
import json
import math
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from datamodules.base import ImageDataModule
from datamodules.loading.decode import opened
from datamodules.streaming.index import IMAGE_SUFFIXES, LAYOUT_KEY
from datamodules.streaming.shards import INDEX_FILE, SUFFIXES, open_shard
from datamodules.table import SPLITS
from vitrail.console import tracked
from vitrail.errors import UserError
from vitrail.files import (
    local_folder,
    remote_names,
    remove_remotely,
    write_atomically,
    write_parquet,
    write_remotely,
)
from vitrail.seeding import seeded_generator
from vitrail.types import CLASS_KINDS, LABEL_TASK, UNKNOWN, TaskKind, kind_of

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray


UNFINISHED = "packing.json"
"""File that shows that shards are being packed, and which."""

PackFormat = Literal["parquet", "webdataset"]

_ROW_GROUP = 64
"""Rows of Parquet that are read together; few, because images are large."""

_OWN_COLUMNS = ("image", "key", "label", "caption", "group", "shard", "offset", "size", "crc32")


def pack(
    datamodule: ImageDataModule, place: Path | str, pack_format: PackFormat = "parquet", shard_size: int = 1000
) -> dict[str, int]:
    """Write every split as shards of about equal size, train in random order.

    Shards of an earlier call that was interrupted are kept.

    Args:
        datamodule: of the samples; unreadable images are refused or left out according to its ``checks``.
        place: folder, or address at an object store (``s3://bucket/folder``), that must not contain shards yet.
        pack_format: of the shards.
        shard_size: most samples of a shard.

    Returns:
        Number of shards of each split.
    """
    if shard_size < 1:
        raise UserError(f"--shard-size: is {shard_size}, must be at least 1")
    datamodule.prepare_data()
    suffix = SUFFIXES[pack_format][0]
    plan = {f"{name}{suffix}": rows for split in SPLITS for name, rows in _plan(datamodule, split, shard_size)}
    try:
        packed = _begin(place, {"fingerprint": datamodule.table.fingerprint(), "shards": list(plan)})
        missing = {file: rows for file, rows in plan.items() if file not in packed}
        write = _write_parquet if pack_format == "parquet" else _write_tar
        all_rows = [row for rows in missing.values() for row in rows.tolist()]
        images = tracked(map(datamodule.encoded_image, all_rows), f"packing into {place}", len(all_rows))
        done: dict[str, tuple[pa.Table, int]] = {}
        for file, rows in missing.items():
            with _written(place, file) as temporary:
                done[file] = write(temporary, datamodule, rows, images), temporary.stat().st_size
        if pack_format == "webdataset":
            done |= {file: _read_tar(_address(place, file), _columns(datamodule, plan[file])) for file in packed}
            with _written(place, INDEX_FILE) as temporary:
                _write_index(temporary, datamodule, {file: done[file] for file in plan})
        _end(place)
    except OSError as error:
        raise UserError(
            f"--to {place}: cannot be written ({error.strerror}); free some space or choose another"
        ) from error
    return {split: sum(name.startswith(f"{split}-") for name in plan) for split in SPLITS}


def _begin(place: Path | str, contents: dict[str, Any]) -> list[str]:
    """Return the shards that an interrupted ``pack`` of the same data has written, and note that one is at work.

    Raises:
        UserError: there are shards of something else.
    """
    names = _names(place)
    shards = [name for name in names if name.endswith((".parquet", ".tar")) and name != INDEX_FILE]
    if UNFINISHED in names:
        with open_shard(_address(place, UNFINISHED)) as file:
            if json.loads(file.read()) != contents:
                raise UserError(f"--to {place}: an interrupted pack of other data left {UNFINISHED}; empty the folder")
        return shards
    if shards or INDEX_FILE in names:
        there = (shards or [INDEX_FILE])[0]
        raise UserError(f"--to {place}: contains {there} already; choose another folder, or empty this one")
    with _written(place, UNFINISHED) as temporary:
        temporary.write_text(json.dumps(contents), encoding="utf-8")
    return []


def _end(place: Path | str) -> None:
    """Remove the note of ``_begin``."""
    if (folder := local_folder(str(place))) is None:
        remove_remotely(_address(place, UNFINISHED))
    else:
        (folder / UNFINISHED).unlink()


def _names(place: Path | str) -> list[str]:
    """Names of the files in a folder, which is created, or at an address, sorted."""
    if (folder := local_folder(str(place))) is None:
        return remote_names(str(place))
    folder.mkdir(parents=True, exist_ok=True)
    return sorted(path.name for path in folder.iterdir())


def _written(place: Path | str, name: str) -> AbstractContextManager[Path]:
    folder = local_folder(str(place))
    return write_remotely(_address(place, name)) if folder is None else write_atomically(folder / name)


def _address(place: Path | str, name: str) -> str:
    return f"{str(place).rstrip('/')}/{name}"


def _plan(datamodule: ImageDataModule, split: str, shard_size: int) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """Names of the split's shards without ending, and their rows of the table."""
    rows = datamodule.split_indices(split)
    if split == "train":
        # Otherwise each shard of a sorted table would contain one class, and so would the batches.
        generator = seeded_generator("pack", datamodule.seed)
        rows = rows[torch.randperm(len(rows), generator=generator).numpy()]
    count = -(-len(rows) // shard_size)
    for number, part in enumerate(np.array_split(rows, count) if count else []):
        yield f"{split}-{number:05d}-of-{count:05d}", part


def _columns(datamodule: ImageDataModule, rows: NDArray[np.int64]) -> dict[str, list[Any]]:
    """All columns of some samples but the images; class codes are −1 where unknown, numbers NaN."""
    table = datamodule.table
    columns: dict[str, list[Any]] = {"key": table.names.take(rows).to_pylist()}
    for task, name in task_columns(table.tasks).items():
        columns[name] = table.targets[task][rows].tolist()
    columns["caption"] = [[text for text in texts if text] for texts in table.caption_lists.of(rows.tolist())]
    columns["group"] = [table.group(row) for row in rows.tolist()]
    return columns


def _schema(datamodule: ImageDataModule, *, images: bool, shards: dict[str, int] | None = None) -> pa.Schema:
    import datasets

    text = datasets.Value("string")
    features: dict[str, Any] = {"image": datasets.Image()} if images else {}
    features["key"] = text
    names, kinds = task_columns(datamodule.tasks), datamodule.task_kinds
    for task, classes in datamodule.tasks.items():
        match kind_of(kinds, task):
            case "multi_label":  # an entry for each label: 1, 0 or -1 for unknown, which a list of classes cannot have
                features[names[task]] = datasets.List(datasets.Value("int8"))
            case "regression":
                features[names[task]] = datasets.Value("float32")
            case _:
                features[names[task]] = datasets.ClassLabel(names=classes)
    features |= {"caption": datasets.List(text), "group": text}
    if shards is not None:
        number = datasets.Value("int64")
        features |= {"shard": text, "offset": number, "size": number, "crc32": number}
    layout = {
        "label": "label" if LABEL_TASK in datamodule.tasks else "",
        "attributes": [name for task, name in names.items() if task != LABEL_TASK],
        "tasks": {name: task for task, name in names.items()},
        "kinds": {names[task]: kind for task, kind in kinds.items()},
        "labels": {names[task]: list(datamodule.tasks[task]) for task, kind in kinds.items() if kind == "multi_label"},
        "caption": "caption",
        "group": "group",
        "key": "key",
        "shards": shards or {},
        "value_range": datamodule.range_record()["range"],
    }
    schema = datasets.Features(features).arrow_schema
    return schema.with_metadata({**(schema.metadata or {}), LAYOUT_KEY: json.dumps(layout).encode()})


def task_columns(tasks: Iterable[str]) -> dict[str, str]:
    """Return the column of each task: its name, with a prefix where a shard has another column of that name."""
    names: dict[str, str] = {}
    for task in tasks:
        name = "label" if task == LABEL_TASK else task
        while name in names.values() or (task != LABEL_TASK and name in _OWN_COLUMNS):
            name = f"attribute_{name}"
        names[task] = name
    return names


def _write_parquet(
    path: Path, datamodule: ImageDataModule, rows: NDArray[np.int64], images: Iterator[bytes]
) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _schema(datamodule, images=True)
    columns = _columns(datamodule, rows)
    with pq.ParquetWriter(path, schema, write_page_checksum=True) as writer:
        for start in range(0, len(rows), _ROW_GROUP):
            part = {key: values[start : start + _ROW_GROUP] for key, values in columns.items()}
            cells = [{"bytes": next(images), "path": None} for _ in part["key"]]
            writer.write_table(pa.table({"image": cells, **part}, schema=schema))
    return pa.table(columns)


def _write_tar(path: Path, datamodule: ImageDataModule, rows: NDArray[np.int64], images: Iterator[bytes]) -> pa.Table:
    import pyarrow as pa

    columns = _columns(datamodule, rows)
    offsets, sizes, checks = [], [], []
    # Plain names, because readers cut keys at the first dot; the sample's own name is in the JSON and the index.
    with path.open("wb") as stream, tarfile.open(fileobj=stream, mode="w|", format=tarfile.USTAR_FORMAT) as tar:
        for place, row in enumerate(rows.tolist()):
            content = next(images)
            for suffix, data in (
                (_ending(content), content),
                *_members(datamodule, {key: values[place] for key, values in columns.items()}),
            ):
                member = tarfile.TarInfo(f"{row:09d}.{suffix}")
                member.size = len(data)
                if data is content:
                    offsets.append(tar.offset + tarfile.BLOCKSIZE)
                    sizes.append(len(data))
                    checks.append(zlib.crc32(data))
                tar.addfile(member, io.BytesIO(data))
    return pa.table({**columns, "offset": offsets, "size": sizes, "crc32": checks})


def _read_tar(url: str, columns: dict[str, list[Any]]) -> tuple[pa.Table, int]:
    """What ``_write_tar`` returned for a shard, and its size in bytes."""
    import pyarrow as pa

    places = []
    with open_shard(url) as stream, tarfile.open(fileobj=stream) as tar:
        for member in tar:
            if member.name.endswith(IMAGE_SUFFIXES) and (content := tar.extractfile(member)):
                places.append({"offset": member.offset_data, "size": member.size, "crc32": zlib.crc32(content.read())})
        size = stream.seek(0, io.SEEK_END)
    found = {name: [place[name] for place in places] for name in ("offset", "size", "crc32")}
    return pa.table({**columns, **found}), size


def _members(datamodule: ImageDataModule, sample: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    """Further members of a sample: class number, first caption, and everything as JSON with class names."""
    described = {"key": sample["key"], "group": sample["group"], "caption": sample["caption"]}
    columns = task_columns(datamodule.tasks)
    kinds = datamodule.task_kinds
    for task, names in datamodule.tasks.items():
        described[columns[task]] = _described(kind_of(kinds, task), names, sample[columns[task]])
    if kind_of(kinds, LABEL_TASK) in CLASS_KINDS and sample.get("label", UNKNOWN) != UNKNOWN:
        yield "cls", str(sample["label"]).encode()
    if sample["caption"]:
        yield "txt", sample["caption"][0].encode()
    yield "json", json.dumps(described, ensure_ascii=False).encode()


def _described(kind: TaskKind, names: Sequence[str], target: Any) -> Any:
    """A target for other readers: a class, a list of labels, or a number; None where not known."""
    if kind == "multi_label":
        known = any(entry != UNKNOWN for entry in target)
        return [name for name, entry in zip(names, target, strict=True) if entry == 1] if known else None
    if kind == "regression":
        return None if math.isnan(target) else target
    return None if target == UNKNOWN else names[target]


def _ending(content: bytes) -> str:
    """The usual ending of a file's format."""
    from PIL import Image

    with opened(io.BytesIO(content)) as image:
        name = "JPEG" if image.format == "MPO" else image.format  # cameras' JPEG files with a preview
    formats = Image.registered_extensions()
    return next(suffix for suffix in IMAGE_SUFFIXES if formats.get(f".{suffix}") == name)


def _write_index(path: Path, datamodule: ImageDataModule, done: dict[str, tuple[pa.Table, int]]) -> None:
    import pyarrow as pa

    schema = _schema(datamodule, images=False, shards={name: size for name, (_, size) in done.items()})
    tables = [table.append_column("shard", [[name] * len(table)]) for name, (table, _) in done.items()]
    index = pa.concat_tables([table.select(schema.names) for table in tables]).cast(schema)
    write_parquet(index.replace_schema_metadata(schema.metadata), path)
