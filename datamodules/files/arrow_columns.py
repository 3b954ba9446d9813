"""From the Arrow columns of shards and of the ``datasets`` library to targets, captions, groups and class names."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datamodules.table import Missing, attribute_column, composed, target_column
from vitrail.errors import UserError
from vitrail.types import LABEL_TASK

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

_SHOWN = 12

_LARGEST_WHOLE = float(1 << 53)
"""Floating-point numbers up to here are written as whole numbers; others are no labels."""

URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)


def require_column(name: str, known: Collection[str], option: str, where: str) -> None:
    """Refuse a column that does not exist, and name those that do."""
    if name not in known:
        none = "" if option == "image" else ", or '' for none"
        raise UserError(
            f"data columns.{option}: {where} has no column {name!r}; it has {', '.join(known)}: name one of them{none}"
        )


def sample_columns(
    table: pa.Table,
    features: Mapping[str, Any],
    tasks: Mapping[str, str],
    missing: Missing,
    where: str,
    *,
    caption: str = "",
    group: str = "",
    given: Mapping[str, Sequence[str]] | None = None,
    option: str = "vocabulary",
) -> dict[str, list[Any]]:
    """Return the columns of a sample table: the targets of each task, lists of captions, and groups.

    Args:
        table: N rows with the columns that are named below.
        features: the ``datasets.Features`` of all columns that may be named.
        tasks: the column of each task.
        missing: what counts as missing.
        where: file or split, for errors.
        caption: column of a text or several; empty for none.
        group: column of groups; empty for none.
        given: class names by task that the user gave; other values are refused.
        option: in which they were given, for errors.

    Raises:
        UserError: for a column that does not exist or has no classes, and for a value without a class name.
    """
    columns: dict[str, list[Any]] = {}
    for task, column in tasks.items():
        role = "label" if task == LABEL_TASK else "attributes"
        require_column(column, features, role, where)
        vocabulary = (given or {}).get(task, [])
        names = vocabulary or class_names_of(features.get(column))
        texts = label_texts(table[column], names, f"data columns.{role}: {where}")
        texts = missing.known(attribute_column(task), texts)
        if vocabulary and (strange := sorted(set(texts) - set(vocabulary) - {""})):
            shown, row = ", ".join(map(repr, strange[:_SHOWN])), texts.index(strange[0])
            raise UserError(
                f"data {option}.{task}: {where} has {shown} (first in row {row}), which it lacks; add or correct it"
            )
        columns[target_column(task)] = texts
    if caption:
        require_column(caption, features, "caption", where)
        lists = [value if isinstance(value, list) else [value] for value in table[caption].to_pylist()]
        known = [missing.known("caption", map(first_text, texts)) for texts in lists]
        columns["caption"] = [[text for text in texts if text] or [""] for texts in known]
    if group:
        require_column(group, features, "group", where)
        columns["group"] = missing.known("group", plain_texts(table[group]))
    return columns


def vocabularies(
    frame: pd.DataFrame,
    tasks: Mapping[str, str],
    features: Mapping[str, Any],
    missing: Missing,
    given: Mapping[str, Sequence[str]] | None = None,
    *,
    sort_digits: bool = True,
) -> dict[str, list[str]]:
    """Return class names by task: those given, those of the library's ``ClassLabel``, or whole numbers by size.

    Others are left to the table, which sorts them alphabetically; so are texts of digits without ``sort_digits``.
    """
    known: dict[str, list[str]] = {}
    for task, column in tasks.items():
        values = set(frame.loc[frame["split"] == "train", target_column(task)]) - {""}
        names = list((given or {}).get(task, [])) or class_names_of(features.get(column))
        is_number = sort_digits or str(getattr(features.get(column), "dtype", "")).startswith(("int", "uint"))
        if names := [name for name in names if not missing.means_unknown(name)]:
            known[task] = names
        elif values and is_number and all(text.removeprefix("-").isdecimal() for text in values):
            known[task] = sorted(values, key=int)  # alphabetical order would put 10 before 2
    return known


def class_names_of(feature: Any) -> list[str]:
    """Return the names of the library's ``ClassLabel``, none for other features."""
    return [composed(name) for name in getattr(feature, "names", None) or []]


def label_texts(column: Any, names: Sequence[str], where: str) -> list[str]:
    """Return the values of a column of labels as texts, empty for unknown.

    Args:
        column: Arrow array of texts, whole numbers or truth values.
        names: what whole numbers stand for; empty where they are the names themselves. Below 0 is unknown.
        where: YAML key and file, for the error.

    Raises:
        UserError: for a number that has no name, and for a column of another type.
    """
    import pyarrow as pa

    column = plain_column(column)
    kind = column.type
    values = column.to_pylist()
    if pa.types.is_null(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return ["" if value is None else value.strip() for value in values]
    if pa.types.is_integer(kind) and names:
        for row, value in enumerate(values):
            if value is not None and value >= len(names):
                raise UserError(
                    f"{where}: row {row} has the label {value}, but there are {len(names)} class names (0 to "
                    f"{len(names) - 1}); correct the label or name all classes"
                )
        return ["" if value is None or value < 0 else names[value] for value in values]
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        return ["" if value is None else str(value) for value in values]
    raise UserError(
        f"{where}: holds {kind}, which is not a class; give a column of names or whole numbers, or its kind "
        "(columns.kinds: multi_label or regression)"
    )


def plain_column(column: Any) -> Any:
    """Return an Arrow array of the values themselves: categories as texts, whole numbers among NaN as such."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_floating(column.type):
        known = pc.if_else(pc.is_nan(column), None, column)
        is_whole = pc.and_(pc.equal(known, pc.floor(known)), pc.less_equal(pc.abs(known), _LARGEST_WHOLE))
        whole = pc.all(is_whole).as_py()
        column = known.cast(pa.int64()) if whole is not False else known
    return column


def plain_texts(column: Any) -> list[str]:
    """Return the values of a column as texts on one line, empty for null and NaN."""
    return [first_text(value) for value in plain_column(column).to_pylist()]


def path_texts(column: Any) -> list[str]:
    """Return the values of a column as paths with ``/`` between their parts and no detours through ``.``.

    URLs stay as they are, as do blanks within a path; empty for null.
    """
    return [_spelled("" if value is None else str(value)) for value in plain_column(column).to_pylist()]


def _spelled(text: str) -> str:
    text = composed(text).strip()
    return text if not text or URL.match(text) else Path(text.replace("\\", "/")).as_posix()


def first_text(value: object) -> str:
    """Return a caption, or the first of several, on one line; empty where there is none."""
    if isinstance(value, list):
        value = value[0] if value else None
    missing = value is None or (isinstance(value, float) and math.isnan(value))
    return "" if missing else composed(" ".join(str(value).split()))
