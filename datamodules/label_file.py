"""Reading a CSV table of labels with everything that is wrong in it gathered by row, instead of stopping at the first.

The values come as they stand in the file; what they mean is the data set's business.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from datamodules.schema import UserError

Problems = list[tuple[int, str]]
"""Line of the file and what is wrong there."""


@dataclass(frozen=True)
class LabelFile:
    """The columns of a table; N is the number of rows that have all their fields.

    Attributes:
        columns: for each column name N values as they stand in the file.
        rows: N line numbers, counted from 1; where a value holds line breaks, the line that its row begins at.
        problems: what was wrong in the file.
    """

    columns: dict[str, list[str]]
    rows: list[int]
    problems: Problems


def read_text(path: Path, problems: Problems) -> str:
    """Reads a UTF-8 text file; a byte order mark is left out, bytes that are not UTF-8 are told and replaced.

    Args:
        path: the file.
        problems: gets a line for each line of the file that is not UTF-8.

    Raises:
        UserError: where there is no such file, with the names of its neighbours, or where it is UTF-16.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        beside = sorted(file.name for file in path.parent.glob(f"*{path.suffix}"))
        found = f"; {path.parent} has {', '.join(beside[:5])}" if beside else ""
        raise UserError(f"{path}: cannot be read ({error.strerror}){found}; give the name of the table") from error
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path}: is UTF-16; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        for row, line in enumerate(data.split(b"\n"), start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                problems.append(
                    (row, f"is not UTF-8 (byte {line[error.start]:#04x} at {error.start}); save it as UTF-8")
                )
        return data.decode("utf-8-sig", errors="replace")


def read_label_file(path: Path, required: Sequence[str]) -> LabelFile:
    """Reads a comma-separated file with a header.

    Args:
        path: the file, UTF-8.
        required: columns that must be there.

    Raises:
        UserError: for a file that cannot be read or lacks columns. What is wrong in single rows is gathered instead.
    """
    problems: Problems = []
    reader = csv.reader(io.StringIO(read_text(path, problems), newline=""), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        raise UserError(f"{path}:1: {error}; correct the header") from error
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
        if len(fields) == len(header):
            rows.append(row)
            for column, field in zip(values, fields, strict=True):
                column.append(shared.setdefault(field, field))
        elif fields:
            problems.append((row, f"{len(fields)} fields where the header has {len(header)}"))
    return LabelFile(dict(zip(header, values, strict=True)), rows, problems)


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
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise UserError(f"{path}: column {', '.join(twice)} occurs twice; remove one")
