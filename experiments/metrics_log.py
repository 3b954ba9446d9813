"""``metrics.csv``: what was logged, row by row; a resumed run goes on with it as if it had never been interrupted.

Lightning's CSV logger empties the file that it finds, and rewrites it in place when a new column comes. Here the file
is kept until it is known from which row on to go on, and it is never there in part.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities import rank_zero_only
from lightning.pytorch.loggers import CSVLogger

from vitrail.runs import write_text_whole

METRICS_FILE = "metrics.csv"

Row = dict[str, Any]


class MetricsLog(CSVLogger):
    """Writes ``metrics.csv`` in a directory.

    Args:
        directory: where.
        continues: keep what is in the file until ``keep_rows`` says how much of it holds; else begin anew.
    """

    def __init__(self, directory: Path, *, continues: bool) -> None:
        # Name and version are parts of the path for Lightning's logger, so together they make the directory itself.
        super().__init__(directory.parent.parent, name=directory.parent.name, version=directory.name)
        self._rows = _Rows(directory / METRICS_FILE, continues=continues)

    @property
    def experiment(self) -> Any:
        """What Lightning writes to."""
        self._rows.path.parent.mkdir(parents=True, exist_ok=True)
        return self._rows

    @rank_zero_only
    def keep_rows(self, number: int) -> None:
        """Forget all rows but the first ones."""
        self._rows.keep(number)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is left."""
        self.save()

    @property
    def number_of_rows(self) -> int:
        """Rows that are in the file; what was logged since is written first."""
        self._rows.save()
        return self._rows.written


class _Rows:
    """The rows of a CSV file whose columns are found out as they come."""

    def __init__(self, path: Path, *, continues: bool) -> None:
        self.path = path
        self.written = 0
        self._pending: list[Row] = []
        self._columns: list[str] = []
        self._continues = continues
        self._opened = False

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Note a row."""
        values = {key: value.item() if isinstance(value, torch.Tensor) else value for key, value in metrics.items()}
        self._pending.append({**values, "step": step})

    def log_hparams(self, params: object) -> None:
        """Do nothing: ``config.yaml`` has them."""

    def save(self) -> None:
        """Write the rows that were noted."""
        if not self._pending:
            return
        self._open()
        columns = sorted({*self._columns, *(key for row in self._pending for key in row)})
        if columns == self._columns:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                file.write(_text(columns, self._pending, header=False))
        else:
            self._columns = columns
            write_text_whole(self.path, _text(columns, [*self._all(), *self._pending], header=True))
        self.written += len(self._pending)
        self._pending = []

    def keep(self, number: int) -> None:
        """Keep so many rows."""
        self._open()
        rows = self._all()[:number]
        self._pending = []
        self.written = len(rows)
        if rows:
            write_text_whole(self.path, _text(self._columns, rows, header=True))
        else:
            self._columns = []
            self.path.unlink(missing_ok=True)

    def _open(self) -> None:
        """Take over what is in the file, or empty it where it is not to be continued."""
        if self._opened:
            return
        self._opened = True
        if not self._continues:
            self.path.unlink(missing_ok=True)
        rows = self._all()
        self._columns = list(rows[0]) if rows else []
        self.written = len(rows)

    def _all(self) -> list[Row]:
        if not self.path.is_file():
            return []
        with self.path.open(newline="", encoding="utf-8") as file:
            # A row that a kill has cut short has fewer values.
            return [row for row in csv.DictReader(file) if None not in row.values()]


def _text(columns: list[str], rows: list[Row], *, header: bool) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, restval="", lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()
