"""Reading a CSV table of labels with everything that is wrong in it gathered by row, instead of stopping at the first.

The values come as they stand in the file; what they mean is the data set's business.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.columns import composed
from vitrail.errors import UserError
from vitrail.trust import unguarded

_SEPARATORS = (",", ";", "\t", "|")
_HEAD = 1 << 16
"""Characters of a file in which its header is looked for."""

Problems = list[tuple[int, str]]
"""Line of the file and what is wrong there."""


@dataclass(frozen=True)
class LabelFile:
    """The columns of a table; N is the number of rows that have all their fields.

    Attributes:
        columns: for each column name N values as they stand in the file.
        rows: N line numbers, counted from 1; where a value holds line breaks, the line that its row begins at.
        problems: what was wrong in the file.
        notes: what was left out, one sentence each.
    """

    columns: dict[str, list[str]]
    rows: list[int]
    problems: Problems
    notes: list[str]


def read_text(path: Path, problems: Problems) -> str:
    """Reads a text file in UTF-8, or in UTF-16 as spreadsheets save "Unicode text", in the normal form NFC.

    A byte order mark is left out, bytes that are not UTF-8 are told and replaced.

    Args:
        path: the file.
        problems: gets a line for each line of the file that is not UTF-8.

    Raises:
        UserError: where there is no such file, with the names of its neighbours, or where it is broken UTF-16.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        beside = sorted(file.name for file in path.parent.glob(f"*{path.suffix}"))
        found = f"; {path.parent} has {', '.join(beside[:5])}" if beside else ""
        raise UserError(f"{path}: cannot be read ({error.strerror}){found}; give the name of the table") from error
    if (encoding := _utf16(data)) is not None:
        try:
            return composed(data.decode(encoding).lstrip("\ufeff"))
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: is broken UTF-16 ({error.reason}); save it as UTF-8") from error
    try:
        return composed(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        for row, line in enumerate(data.split(b"\n"), start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                problems.append(
                    (row, f"is not UTF-8 (byte {line[error.start]:#04x} at {error.start}); save it as UTF-8")
                )
        return composed(data.decode("utf-8-sig", errors="replace"))


def _utf16(data: bytes) -> str | None:
    """Which UTF-16 a file is in, by its mark, or by the zero in each of its first ASCII letters; None for others."""
    if data.startswith(b"\xff\xfe") or (data[1:8:2] == b"\0\0\0\0" and b"\0" not in data[0:8:2]):
        return "utf-16-le"
    if data.startswith(b"\xfe\xff") or (data[0:8:2] == b"\0\0\0\0" and b"\0" not in data[1:8:2]):
        return "utf-16-be"
    return None


def read_label_file(path: Path, required: Sequence[str]) -> LabelFile:
    """Reads a table with a header; fields are separated by commas, semicolons, tabs or bars, as the header shows.

    Blank rows and columns without a name are left out, the latter with a note where they hold something. So are
    apostrophes that guard a cell against being computed (``'=1``), with a note.

    Args:
        path: the file, in UTF-8 or UTF-16.
        required: columns that must be there.

    Raises:
        UserError: for a file that cannot be read or lacks columns. What is wrong in single rows is gathered instead.
    """
    problems: Problems = []
    text = read_text(path, problems)
    reader, header = _opened(path, text, required)
    _check_header(path, header, required)
    values: list[list[str]] = [[] for _ in header]
    # Labels and attributes repeat: one object for each distinct text keeps large tables small while they are read.
    shared: dict[str, str] = {}
    rows: list[int] = []
    while True:
        row = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            problems.append((row, f"{error}; look for a stray quote"))
            continue
        if not any(field.strip() for field in fields):
            continue
        if not any(field.strip() for field in fields[len(header) :]):
            fields = fields[: len(header)]
        if len(fields) == len(header):
            rows.append(row)
            for column, field in zip(values, fields, strict=True):
                column.append(shared[field] if field in shared else shared.setdefault(field, unguarded(field)))
        else:
            problems.append((row, f"{len(fields)} fields where the header has {len(header)}"))
    columns = dict(zip(header, values, strict=True))
    notes = [
        f"{path}: column {place} has no name and is left out"
        for place, (name, column) in enumerate(zip(header, values, strict=True), start=1)
        if not name and any(field.strip() for field in column)
    ]
    if guarded := [field for field, text in shared.items() if field != text]:
        notes.append(
            f"{path}: an apostrophe before = + - or @ guards against formulas and is no part of the text; left out of "
            f"{len(guarded)} texts, such as {guarded[0][:40]!r}"
        )
    columns.pop("", None)
    return LabelFile(columns, rows, problems, notes)


def _opened(path: Path, text: str, required: Sequence[str]) -> tuple[Any, list[str]]:
    """A reader of the rows below the header, and the header: its first row that is not blank.

    The separator is the one under which most of the required columns are there, and of those the one with most fields.
    """
    named = re.match(r"sep=(.)\s*\n", text)  # Excel's own line

    def opened(content: str, separator: str) -> tuple[Any, list[str]]:
        reader = csv.reader(io.StringIO(content, newline=""), strict=True, delimiter=separator)
        if named:
            next(reader)
        header = next((fields for fields in reader if any(field.strip() for field in fields)), [])
        return reader, [unguarded(name.strip()) for name in header]

    def fits(separator: str) -> tuple[int, int]:
        try:
            header = opened(text[:_HEAD], separator)[1]
        except csv.Error:
            return -1, 0
        return sum(name in header for name in required), len(header)

    separator = named[1] if named else max(_SEPARATORS, key=fits)
    try:
        return opened(text, separator)
    except csv.Error as error:
        raise UserError(f"{path}:1: {error}; correct the header") from error


def relative_path(text: str) -> str:
    """Brings a picture's path as a table has it, maybe with back-slashes, to the form ``folder/name.jpg``.

    Raises:
        ValueError: for no path, an absolute one, or one that leads out of its folder; the text says which.
    """
    whole = text.strip().replace("\\", "/")
    parts = [part for part in whole.split("/") if part not in ("", ".")]
    if not parts:
        raise ValueError("no picture path")
    if whole.startswith("/") or parts[0].endswith(":"):
        raise ValueError(f"picture path {text!r} is absolute; make it relative to the data set's folder")
    if ".." in parts:
        raise ValueError(f"picture path {text!r} leads out of the data set's folder")
    return "/".join(parts)


def _check_header(path: Path, header: list[str], required: Sequence[str]) -> None:
    if missing := [name for name in required if name not in header]:
        raise UserError(
            f"{path}: missing column {', '.join(missing)}; the header has {', '.join(header) or 'nothing'}: "
            "rename or add columns"
        )
    if twice := sorted({name for name in header if name and header.count(name) > 1}):
        raise UserError(f"{path}: column {', '.join(twice)} occurs twice; remove one")
