"""Targets that are not one class of a column: lists of labels, a column for each label, and numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from datamodules.files.arrow_columns import class_names_of, plain_texts
from datamodules.files.label_csv import Problems
from datamodules.table import Missing, attribute_column, composed
from vitrail.types import TaskKind

SEPARATORS = ("|", ";", ",")
"""Between the labels of a cell where none is given; the one that most cells have, of equal ones the first."""

_GUESSED_SEPARATORS = ("|", ";")
_LEAST_SHARE = 0.05
"""Of the cells that have a separator, for a column to be taken for lists of labels."""

_LEAST_NUMBERS = 20
"""Different numbers, some of them with fractions, for a column to be taken for regression."""

_YES, _NO = ("1", "true", "yes", "y", "x"), ("0", "false", "no", "n")

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
    kind = column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
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
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
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
    return number if math.isfinite(number) else None


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
