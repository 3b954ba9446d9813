"""From the Arrow columns of shards and of the ``datasets`` library to targets, captions, groups and class names."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from datamodules.files.label_csv import class_names_of, first_text, label_texts, numbers_in_order, plain_texts
from datamodules.table import Missing, attribute_column, target_column
from vitrail.errors import UserError
from vitrail.types import LABEL_TASK

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

_SHOWN = 12


def require_column(name: str, known: Collection[str], option: str, where: str) -> None:
    """Refuse a column that does not exist, with those that do."""
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
) -> dict[str, list[Any]]:
    """Return the columns of a sample table: the targets of each task, lists of captions, and groups.

    Args:
        table: with the columns that are wanted, N rows.
        features: the ``datasets.Features`` of all columns that may be named.
        tasks: the column of each task.
        missing: what counts as missing.
        where: file or split, for errors.
        caption: column of a text or several; empty for none.
        group: column of groups; empty for none.
        given: class names by task that the user gave; others are refused.

    Raises:
        UserError: for a column that does not exist or has no classes, and for a value without a class name.
    """
    columns: dict[str, list[Any]] = {}
    for task, column in tasks.items():
        option = "label" if task == LABEL_TASK else "attributes"
        require_column(column, features, option, where)
        vocabulary = (given or {}).get(task, [])
        names = vocabulary or class_names_of(features.get(column))
        texts = label_texts(table[column], names, f"data columns.{option}: {where}")
        texts = missing.known(attribute_column(task), texts)
        if vocabulary and (strange := sorted(set(texts) - set(vocabulary) - {""})):
            shown, row = ", ".join(map(repr, strange[:_SHOWN])), texts.index(strange[0])
            raise UserError(
                f"data vocabulary.{task}: {where} has {shown} (first in row {row}), which it lacks; add or correct it"
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
            known[task] = numbers_in_order(values)
    return known
