"""Where commands write what they make, and tables as CSV that a spreadsheet takes for nothing else."""

from __future__ import annotations

import csv
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datamodules.trust import FORMULA, unguarded
from datamodules.whole_files import written_whole

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["read_csv", "timed_directory", "write_csv", "written_whole"]

_NUMBERS = re.compile(r"[+-]?[\d.][\d.,eE+\-–±% \[\]()]*|[+-](inf|nan)")
"""Numbers, also with their intervals: nothing to compute, and no reason to turn them into text."""


def write_csv(path: Path, frame: pd.DataFrame, *, index: bool = False) -> None:
    """Write a table whole; text that a spreadsheet would take for a formula gets an apostrophe in front.

    ``read_csv`` and ``read_label_file`` take it away again.

    Args:
        path: of the file.
        frame: the table.
        index: whether its index is written, too.
    """
    safe = frame.map(_escaped)
    safe.columns = frame.columns.map(_escaped)
    safe.columns.names = [_escaped(name) for name in frame.columns.names]
    if index:
        safe.index = frame.index.map(_escaped)
        safe.index.names = [_escaped(name) for name in frame.index.names]
    # A carriage return ends a row for readers, but the csv module does not quote it by itself.
    texts = [*safe.to_numpy().ravel().tolist(), *safe.columns, *(safe.index if index else ())]
    ends_rows = any("\r" in text for text in texts if isinstance(text, str))
    with written_whole(path) as partial:
        safe.to_csv(partial, index=index, quoting=csv.QUOTE_NONNUMERIC if ends_rows else csv.QUOTE_MINIMAL)


def read_csv(path: Path) -> pd.DataFrame:
    """Read what ``write_csv`` wrote, cell for cell.

    Raises:
        OSError: where it cannot be read.
        ValueError: for a file that is no CSV.
    """
    import pandas as pd

    # A class called "None" or "NA" is a text; what write_csv has no value for is an empty cell.
    frame = pd.read_csv(path, keep_default_na=False, na_values=[""])
    frame.columns = frame.columns.map(_unescaped)
    return frame.map(_unescaped)


def _escaped(cell: Any) -> Any:
    if not isinstance(cell, str) or not FORMULA.match(cell) or _NUMBERS.fullmatch(cell):
        return cell
    return f"'{cell}"


def _unescaped(cell: Any) -> Any:
    return unguarded(cell) if isinstance(cell, str) else cell


def timed_directory(place: Path) -> Path:
    """A directory below ``place`` named by the time, for a run that is made now; it does not exist yet."""
    made = place / time.strftime("%Y%m%d-%H%M%S")
    directory, number = made, 1
    while directory.exists():
        number += 1
        directory = made.with_name(f"{made.name}-{number}")
    return directory
