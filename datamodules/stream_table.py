"""From what shards say besides pictures to the table of samples, and to the places of the pictures."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from datamodules.columns import Missing, attribute_column, composed, strings_of
from datamodules.label_columns import class_names_of, first_text, label_texts, numbers_in_order, plain_texts
from datamodules.shard_files import short_names
from datamodules.shard_index import ShardIndex, index_parquet, index_tars
from datamodules.shards import Shards
from datamodules.table import SampleTable, target_column
from vitrail.errors import UserError
from vitrail.types import LABEL_TASK

if TYPE_CHECKING:
    import pandas as pd

_SHOWN = 12


class StreamColumns(TypedDict, total=False):
    """Which columns of Parquet, or which members of a WebDataset sample, are what.

    In tar files a name is the ending of a member (``cls``, ``txt``) or a key of a member that holds JSON
    (``json.colour``). Shards that ``python -m datamodules pack`` wrote say all of it themselves.

    Attributes:
        image: pictures; default image, and in tar files the first member with a usual ending.
        label: class, as the library's ClassLabel, text or whole number; empty for none; default label, and in tar files
            cls where there is such a member.
        caption: a text or several; default none, and in tar files txt where there is such a member.
        group: the object or product that a picture shows; default none.
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
    """The table of all samples, shard by shard, and where their pictures are.

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
    picture = columns.get("image", "image" if is_parquet else "")
    if is_parquet:
        indices = index_parquet(every, picture, lambda layout: _names(_choose(columns, layout, _USUAL)))
    else:
        indices = index_tars(every, picture)
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
        column=picture if is_parquet else "",
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
        way_out = "name one of them, or '' for none"
        raise UserError(f"data columns.{option}: {url} has no column {name!r} but {known}; {way_out}")
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
