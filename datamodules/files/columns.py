"""From columns of tables, shards and the ``datasets`` library to targets, captions, groups and class names."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast, get_args

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from datamodules.files.label_csv import Problems
from datamodules.table import Missing, attribute_column, composed, table_error, target_column
from vitrail.errors import UserError
from vitrail.types import CLASS_KINDS, LABEL_TASK, TaskKind, kind_of

if TYPE_CHECKING:
    import pandas as pd


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


SEPARATORS = ("|", ";", ",")
"""Between the labels of a cell where none is given; the one that most cells have, of equal ones the first."""

_GUESSED_SEPARATORS = ("|", ";")
_LEAST_SHARE = 0.05
"""Of the cells that have a separator, for a column to be taken for lists of labels."""

_LEAST_NUMBERS = 20
"""Different numbers, some of them with fractions, for a column to be taken for regression."""

_YES, _NO = ("1", "true", "yes", "y", "x"), ("0", "false", "no", "n")

_LARGEST = float(np.finfo(np.float32).max)
"""Targets are float32."""

Labels = Mapping[str, bool | None]


class Guess(NamedTuple):
    """What a column of labels looks like.

    Attributes:
        kind: other than single-label.
        reason: what it has.
    """

    kind: TaskKind
    reason: str


def guessed_kind(column: Any, feature: Any) -> Guess | None:
    """Return the kind of a column whose values cannot be meant as classes; None for classes.

    Args:
        column: Arrow array.
        feature: type of the ``datasets`` library, or None.
    """
    if _is_list(column):
        return Guess("multi_label", "has lists")
    if class_names_of(feature):
        return None
    texts = [text for text in plain_texts(column) if text]
    distinct = set(texts)
    numbers = [number for text in distinct if (number := _number(text)) is not None]
    if len(numbers) == len(distinct) >= _LEAST_NUMBERS and any(not number.is_integer() for number in numbers):
        return Guess("regression", f"has {len(distinct)} different numbers, some with fractions")
    for separator in _GUESSED_SEPARATORS:
        parts = {part.strip() for text in distinct for part in text.split(separator)} - {""}
        listed = sum(separator in text for text in texts)
        if listed >= max(2, _LEAST_SHARE * len(texts)) and len(parts) < len(distinct):
            return Guess("multi_label", f"has {len(parts)} values in {len(distinct)} combinations with {separator!r}")
    return None


def other_targets(
    table: pa.Table,
    features: Mapping[str, Any],
    rows: Sequence[int],
    tasks: Mapping[str, str],
    kinds: Mapping[str, TaskKind],
    missing: Missing,
    where: str,
    *,
    label_sep: str = "",
    guess_sep: bool = False,
    one_hot: Mapping[str, Sequence[str]] | None = None,
    classes: Mapping[str, Sequence[str]] | None = None,
) -> tuple[dict[str, list[Any]], list[str]]:
    """Return the targets of multi-label and regression tasks by column, and a sentence about each guessed separator.

    Args:
        table: with their columns.
        features: types of the ``datasets`` library, or None, of all columns that may be named.
        rows: line of each row in the file.
        tasks: the column of each task; those of other kinds are left out.
        kinds: of the tasks that are not single-label.
        missing: what counts as missing.
        where: file or split, for errors.
        label_sep: text between the labels of a cell.
        guess_sep: whether the separator may be the one that most cells have.
        one_hot: columns of the labels of tasks that have one for each.
        classes: labels by column; with them others are refused.

    Raises:
        UserError: cells do not hold what they should.
    """
    values: dict[str, list[Any]] = {}
    problems: Problems = []
    notes = []
    for task, name in tasks.items():
        kind = kind_of(kinds, task)
        if kind in CLASS_KINDS:
            continue
        if name in (one_hot or {}):
            found, wrong = one_hot_labels(table, (one_hot or {})[name], rows, missing)
            values[target_column(task)], problems = found, [*problems, *wrong]
            continue
        require_column(name, features, "label" if task == LABEL_TASK else "attributes", where)
        column = table[name].combine_chunks()
        if kind == "regression":
            values[target_column(task)], wrong = numbers_of(column, rows, missing, name)
        else:
            if not (label_sep or guess_sep or _is_list(column)):
                raise _no_separator(name, where)
            labels, separator = label_lists(column, features.get(name), label_sep, missing, task)
            known = (classes or {}).get(name)
            wrong = _strange_labels(labels, known, rows, name) if known else []
            values[target_column(task)] = labels
            if separator and not label_sep:
                notes.append(f"{where}: labels of {name!r} are separated by {separator!r}.")
        problems += wrong
    if problems:
        raise table_error(where, problems, "correct these cells, or the options in data columns")
    return values, notes


def _no_separator(name: str, where: str) -> UserError:
    return UserError(
        f"data columns.label_sep: {where}: {name!r} holds texts; set what is between the labels of a cell, such as ';'"
    )


def _is_list(column: pa.Array) -> bool:
    return bool(pa.types.is_list(column.type) or pa.types.is_large_list(column.type))


def _strange_labels(found: Sequence[Labels | None], known: Sequence[str], rows: Sequence[int], name: str) -> Problems:
    return [
        (row, f"{name} has {label!r}, which columns.classes lacks")
        for row, labels in zip(rows, found, strict=True)
        for label in labels or ()
        if label not in known
    ]


def kinds_of_tasks(kinds: Mapping[str, str], tasks: Mapping[str, str], where: str) -> dict[str, TaskKind]:
    """Return the kinds of tasks, given by the columns of their labels.

    Raises:
        UserError: for a kind that there is not, and for a column that is no task.
    """
    for name, kind in kinds.items():
        if kind not in get_args(TaskKind):
            known = ", ".join(get_args(TaskKind))
            raise UserError(f"data columns.kinds: the kind of {name!r} must be one of {known}; got {kind!r}")
        if name not in tasks.values():
            raise UserError(
                f"data columns.kinds: {where}: {name!r} is no column of labels; name it as columns.label or among "
                "columns.attributes"
            )
    of_tasks = {task: cast("TaskKind", kinds[name]) for task, name in tasks.items() if name in kinds}
    return {task: kind for task, kind in of_tasks.items() if kind != "single_label"}


def of_class_kinds(tasks: Mapping[str, str], kinds: Mapping[str, TaskKind]) -> dict[str, str]:
    """Return the tasks that have one class for each sample, with their columns."""
    return {task: name for task, name in tasks.items() if kind_of(kinds, task) in CLASS_KINDS}


def label_vocabularies(
    tasks: Mapping[str, str],
    kinds: Mapping[str, TaskKind],
    features: Mapping[str, Any],
    given: Mapping[str, Sequence[str]],
) -> dict[str, list[str]]:
    """Return the labels of multi-label tasks that are given, or those of lists of the library's ``ClassLabel``."""
    known = {}
    for task, name in tasks.items():
        own = class_names_of(getattr(features.get(name), "feature", None))
        if kind_of(kinds, task) == "multi_label" and (names := list(given.get(task, own))):
            known[task] = names
    return known


def require_order(
    tasks: Mapping[str, str], kinds: Mapping[str, TaskKind], names: Mapping[str, Sequence[str]], where: str, option: str
) -> None:
    """Refuse ordinal tasks whose classes have no known order; ``option`` is where users give it."""
    for task, kind in kinds.items():
        if kind == "ordinal" and task not in names:
            raise UserError(
                f"data {option}: {where}: {tasks[task]!r} is ordinal, and its classes are no whole numbers; give them "
                f"in their order, as in {{{tasks[task]}: [poor, fair, good]}}"
            )


def label_lists(
    column: Any, feature: Any, separator: str, missing: Missing, task: str
) -> tuple[list[Labels | None], str]:
    """Return the labels of each row, None where unknown, and the separator that was found, empty for none.

    An empty cell is unknown, as everywhere; an empty list, or a cell with nothing but separators, has no label.

    Args:
        column: Arrow array of lists or texts.
        feature: type of the ``datasets`` library, or None.
        separator: between the labels of a text; empty for the one that most cells have.
        missing: what counts as missing.
        task: for the report of missing values.
    """
    if _is_list(column):
        names = class_names_of(getattr(feature, "feature", None))
        lists = column.to_pylist()
        return [None if cell is None else _of_list(cell, names) for cell in lists], ""
    texts = missing.known(attribute_column(task), plain_texts(column))
    if not separator:
        counts = {mark: sum(mark in text for text in texts) for mark in SEPARATORS}
        separator = max(SEPARATORS, key=lambda mark: counts[mark])
        separator = separator if counts[separator] else ""
    return [None if not text else _labels(text.split(separator) if separator else [text]) for text in texts], separator


def _of_list(cell: Sequence[Any], names: Sequence[str]) -> Labels:
    known = [value for value in cell if value is not None]
    return _labels([names[value] if names and isinstance(value, int) else str(value) for value in known])


def _labels(parts: Sequence[str]) -> Labels:
    return {label: True for part in parts if (label := composed(part).strip())}


def labels_of_entries(column: Any, names: Sequence[str]) -> list[Labels]:
    """Return the labels of rows of entries, an Arrow column of lists of 1, 0 and −1 (not known), one for each name."""
    return [
        {name: None if entry < 0 else bool(entry) for name, entry in zip(names, row, strict=True)}
        for row in column.to_pylist()
    ]


def one_hot_labels(
    table: pa.Table, columns: Sequence[str], rows: Sequence[int], missing: Missing
) -> tuple[list[Labels], Problems]:
    """Return whether the label of each column applies to each row (None where unknown), and cells that do not say so.

    Args:
        table: with these columns.
        columns: one for each label, which is called like it.
        rows: line of each row in the file.
        missing: what counts as missing.
    """
    labels: list[dict[str, bool | None]] = [{} for _ in rows]
    problems: Problems = []
    for column in columns:
        for row, text, found in zip(
            rows, missing.known(attribute_column(column), plain_texts(table[column])), labels, strict=True
        ):
            value = text.casefold().removesuffix(".0")
            if value and value not in (*_YES, *_NO):
                problems.append((row, f"{column} {text!r} must be 1, 0 or empty (not known)"))
            found[column] = None if not value else value in _YES
    return list(labels), problems


def numbers_of(column: Any, rows: Sequence[int], missing: Missing, task: str) -> tuple[list[float | None], Problems]:
    """Return the number of each row, None where unknown, and cells without a number.

    Args:
        column: Arrow array of numbers or texts.
        rows: line of each row in the file.
        missing: what counts as missing.
        task: for the report of missing values.
    """
    values: list[float | None] = []
    problems: Problems = []
    for row, text in zip(rows, missing.known(attribute_column(task), plain_texts(column)), strict=True):
        number = _number(text) if text else None
        if text and number is None:
            problems.append((row, f"{task} {text!r} must be a number, or empty (not known)"))
        values.append(number)
    return values, problems


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) and abs(number) <= _LARGEST else None


def strata(values: Sequence[Any], kind: TaskKind) -> NDArray[np.str_]:
    """Return what each sample counts as where splits are stratified; the arguments are as in ``stratum``."""
    quantiles = tenths(values) if kind == "regression" else {}
    return np.asarray([stratum(value, kind, quantiles) for value in values], dtype=str)


def stratum(value: Any, kind: TaskKind, quantiles: Mapping[float, int]) -> str:
    """Return what a sample counts as where splits are stratified: its class, its labels, or the tenth of its number.

    Args:
        value: target of the main task, as in ``SampleTable.from_frame``.
        kind: of the main task.
        quantiles: tenth of each number.
    """
    if kind == "multi_label":
        return "|".join(sorted(label for label, applies in (value or {}).items() if applies))
    if kind == "regression":
        return "" if value is None else str(quantiles[value])
    return str(value)


def tenths(values: Sequence[float | None]) -> dict[float, int]:
    """Return in which tenth of the known values each of them is, 0 to 9."""
    known = sorted(value for value in values if value is not None)
    return {value: place * 10 // len(known) for place, value in enumerate(known)}
