"""``python -m datamodules relabel TABLE CORRECTIONS --to NEW``: apply corrected labels, as a new table."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vitrail.errors import UserError
from vitrail.files import write_atomically, write_csv

if TYPE_CHECKING:
    import pyarrow as pa

_EPILOG = """\
examples:
  vitrail label-issues RUN --to suspects.csv
  vitrail relabel birds.csv suspects.csv --to birds_2.csv
  vitrail relabel birds.csv fiftyone_export/ --tag corrected --to birds_2.csv
"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``relabel``."""
    command.epilog = _EPILOG
    command.description = (
        "Writes a table with corrected labels and a column of their history (old label, who, when, reason); the table "
        "itself is left alone. Corrections have the columns image and label, and optionally task, old, by, when, "
        "reason; a row whose old label is no longer that of the table is refused, as are unknown images and classes."
    )
    command.add_argument("table", type=Path, metavar="TABLE", help="CSV, TSV, Parquet or JSON Lines, as Table reads it")
    command.add_argument("corrections", type=Path, help="such a table, or the folder of a FiftyOne export")
    command.add_argument("--to", type=Path, required=True, metavar="NEW", help="the new table, of the same format")
    command.add_argument("--image", default="auto", metavar="COLUMN", help="of TABLE, with the images' paths")
    command.add_argument("--label", default="auto", metavar="COLUMN", help="of TABLE, with the main task, class")
    command.add_argument("--tag", default="corrected", help="of the samples of a FiftyOne export (default: corrected)")
    command.add_argument("--new-classes", action="store_true", help="allow classes that no row of TABLE has")


def run(options: argparse.Namespace, rest: Sequence[str] = ()) -> None:
    """Write the new table and report how many labels have changed.

    Raises:
        UserError: for everything that does not fit, with its rows; then nothing is written.
    """
    from datamodules.files.corrections import corrected, corrections_of, exported_corrections
    from datamodules.table_file import TableColumns, read_table

    if options.to.suffix.lower() != options.table.suffix.lower():
        raise UserError(f"--to {options.to}: must end in {options.table.suffix}, as {options.table} does")
    if options.to.exists() and options.to.samefile(options.table):
        raise UserError(f"--to {options.to}: is the table itself, which is never changed; name another file")
    table, _, _, notes = read_table(options.table, "")
    sys.stderr.writelines(f"{note}\n" for note in notes)
    columns = TableColumns(image=options.image, label=options.label).found_in(table.column_names, str(options.table))
    if options.corrections.is_dir():
        corrections = exported_corrections(options.corrections, options.tag)
    else:
        found, _, rows, _ = read_table(options.corrections, "")
        corrections = corrections_of(found, rows, str(options.corrections))
    tasks = {name: name for name in table.column_names if name not in (columns.image, columns.label)}
    own = {"image": columns.image, **({"class": columns.label} if columns.label else {}), **tasks}
    used = {"image", *(one.task for one in corrections)}
    new, changed = corrected(
        table, {task: name for task, name in own.items() if task in used}, corrections, str(options.corrections),
        new_classes=options.new_classes,
    )  # fmt: skip
    try:
        _write(options.to, new)
    except OSError as error:
        raise UserError(f"--to {options.to}: cannot be written ({error.strerror})") from error
    same = len(corrections) - changed
    unchanged = f"; {same:,} were so already" if same > 0 else ""
    sys.stdout.write(f"{options.to}: {changed:,} labels changed{unchanged}; runs on it record its new fingerprint\n")


def _write(path: Path, table: pa.Table) -> None:
    suffix = path.suffix.lower()
    if suffix == ".csv":
        write_csv(path, table.to_pandas())
        return
    with write_atomically(path) as partial:
        if suffix == ".parquet":
            import pyarrow.parquet as pq

            pq.write_table(table, partial)
        elif suffix in (".tsv", ".txt"):
            table.to_pandas().to_csv(partial, sep="\t", index=False)
        else:
            # Not by pandas, which makes 3.0 of whole numbers and milliseconds of dates.
            rows = (json.dumps(row, ensure_ascii=False, default=str) for row in table.to_pylist())
            partial.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
