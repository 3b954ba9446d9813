"""Columns of labels and captions of Arrow tables, as the texts that a sample table is made of."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from datamodules.columns import composed
from vitrail.errors import UserError


def class_names_of(feature: Any) -> list[str]:
    """Names of the library's ``ClassLabel``, none for other features."""
    return [composed(name) for name in getattr(feature, "names", None) or []]


def label_texts(column: Any, names: Sequence[str], where: str) -> list[str]:
    """The values of a column of labels as texts, empty for unknown.

    Args:
        column: Arrow array of texts, whole numbers or truth values.
        names: what whole numbers stand for; none where they are the names themselves. Below 0 is unknown.
        where: YAML key and file, for the error.

    Raises:
        UserError: for a number that has no name, and for a column of another type.
    """
    import pyarrow as pa

    column = plain_column(column)
    kind = column.type
    values = column.to_pylist()
    if pa.types.is_null(kind):
        return [""] * len(values)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return ["" if value is None else value.strip() for value in values]
    if pa.types.is_integer(kind) and names:
        if values and max((value for value in values if value is not None), default=-1) >= len(names):
            row = next(row for row, value in enumerate(values) if value is not None and value >= len(names))
            raise UserError(
                f"{where}: row {row} has the label {values[row]}, but there are {len(names)} class names (0 to "
                f"{len(names) - 1}); correct the label or name all classes"
            )
        return ["" if value is None or value < 0 else names[value] for value in values]
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        return ["" if value is None else str(value) for value in values]
    raise UserError(f"{where}: holds {kind}, which is no class; give a column of names or whole numbers")


def plain_column(column: Any) -> Any:
    """An Arrow array of the values themselves: categories as texts, whole numbers among NaN as such."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_floating(column.type):
        known = pc.if_else(pc.is_nan(column), None, column)
        whole = pc.all(pc.equal(known, pc.floor(known))).as_py()
        column = known.cast(pa.int64()) if whole is not False else known
    return column


def plain_texts(column: Any) -> list[str]:
    """The values of a column of any single ones as texts on one line, empty for null and NaN."""
    return [first_text(value) for value in plain_column(column).to_pylist()]


def numbers_in_order(values: Iterable[str]) -> list[str]:
    """Distinct whole numbers by size, where alphabetical order would put 10 before 2; empty ones are left out."""
    return sorted(set(values) - {""}, key=int)


def first_text(value: object) -> str:
    """A caption, or the first of several, on one line; empty where there is none."""
    if isinstance(value, list):
        value = value[0] if value else None
    missing = value is None or (isinstance(value, float) and math.isnan(value))
    return "" if missing else composed(" ".join(str(value).split()))
