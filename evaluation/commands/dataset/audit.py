"""``python -m datamodules audit``: what is in a data set and what is wrong with it."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitrail.errors import UserError
from vitrail.files import write_atomically, write_csv, write_parquet, write_text_atomically
from vitrail.runs import Run

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from datamodules.base import ImageDataModule
    from datamodules.checks.audit import AuditReport
    from datamodules.checks.findings import Finding
    from evaluation.report.page import Page, Section

_SHOWN = 24
_SUFFIXES = (".parquet", ".json", ".csv")


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``audit``."""
    from datamodules.commands.data_arguments import add_data_arguments

    add_data_arguments(command)
    command.add_argument(
        "--run",
        type=Path,
        metavar="RUN",
        help="audit the data of a run, and leave the findings in it for its report",
    )
    command.add_argument("--json", type=Path, metavar="FILE", help="also write the whole report to this file")
    command.add_argument(
        "--findings", type=Path, metavar="FILE", help="also write the findings about images (.parquet, .json or .csv)"
    )
    command.add_argument("--html", type=Path, metavar="FILE", help="also write a page with the images of each finding")


def run(options: argparse.Namespace, rest: Sequence[str]) -> None:
    """Print the report, write what is asked for, and then refuse what a fit would refuse."""
    from rich.console import Console

    from datamodules.checks.audit import print_report
    from datamodules.cli import data_parser, parse_data
    from datamodules.commands.data_arguments import data_arguments

    if options.findings is not None and options.findings.suffix not in _SUFFIXES:
        raise UserError(f"--findings {options.findings}: must end in {', '.join(_SUFFIXES)}")
    if options.run is not None:
        if not (options.run / Run.CONFIG).is_file():
            raise UserError(f"--run {options.run}: has no {Run.CONFIG}; name the directory of a run")
        options.config = [str(options.run / Run.CONFIG), *options.config]
    datamodule, _ = parse_data(data_parser("audit"), data_arguments(options, rest))
    report = datamodule.audit()
    print_report(report, Console())
    if options.run is not None:
        leave_report(options.run, report)
    if options.json is not None:
        content = json.dumps(report.to_dict(), indent=2, ensure_ascii=False)
        _written("--json", options.json, lambda path: write_text_atomically(path, content + "\n"))
    if options.findings is not None:
        _written("--findings", options.findings, lambda path: write_findings(path, report.findings))
    if options.html is not None:
        page = findings_page(datamodule, report)
        _written("--html", options.html, lambda path: write_text_atomically(path, page.html()))
        # The page names it below its table.
        _written("--html", options.html.with_name("findings.csv"), lambda path: write_findings(path, report.findings))
    report.refuse()


def _written(option: str, path: Path, write: Callable[[Path], None]) -> None:
    try:
        write(path)
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be written ({error.strerror})") from error


def leave_report(run: Path, report: AuditReport) -> None:
    """Write what the report of a run shows into it: counts, findings, and when they were found."""
    content = {
        "measured": time.strftime("%Y-%m-%d %H:%M"),
        "fingerprint": report.fingerprint,
        "samples": report.samples,
        "unreadable": len(report.skipped),
        "generated": not report.reads_images,
        "findings": [asdict(one) for one in report.findings],
    }
    text = json.dumps(content, indent=1, ensure_ascii=False)
    write_text_atomically(run / Run.AUDIT, text + "\n")


def write_findings(path: Path, findings: Sequence[Finding]) -> None:
    """Write the table of findings as Parquet, JSON (a list of objects) or CSV, atomically."""
    import pandas as pd
    import pyarrow as pa

    from datamodules.checks.findings import columns

    values = columns(findings)
    if path.suffix == ".json":
        rows = [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]
        write_text_atomically(path, json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    elif path.suffix == ".csv":
        write_csv(path, pd.DataFrame(values))
    else:
        kinds: dict[str, Any] = {"row": pa.int64(), "value": pa.float64(), "threshold": pa.float64()}
        schema = pa.schema([(name, kinds.get(name, pa.string())) for name in values])
        with write_atomically(path) as partial:
            write_parquet(pa.table(values, schema=schema), partial)


def findings_page(datamodule: ImageDataModule, report: AuditReport) -> Page:
    """Return a page with the table of all findings, and the first images of each kind."""
    import pandas as pd

    from datamodules.checks.findings import counted
    from evaluation.report.page import Page, Section

    kinds = counted(report.findings)
    counts = pd.DataFrame(
        [(name, len(found), found[0].severity, found[0].threshold, _advice(found)) for name, found in kinds.items()],
        columns=["finding", "images", "severity", "threshold", "suggestion"],
    )
    skipped = [f"{bad.sample.name} ({bad.sample.split}): {bad.reason}" for bad in report.skipped]
    summary = Section(
        "Summary",
        tables={"findings": counts} if kinds else {},
        folded={"Unreadable images": "\n".join(skipped)} if skipped else {},
    )
    if not kinds:
        summary.paragraphs.append("Nothing was found about single images.")
    lead = [
        f"{report.origin}, fingerprint {report.fingerprint[:12]}: "
        + ", ".join(f"{split} {count:,}" for split, count in report.samples.items())
        + f"; {len(report.skipped):,} cannot be read, {len(report.findings):,} findings.",
        "Odd images are odd in comparison with the others of their set; look before removing any.",
    ]
    row_of = {name: row for row, name in enumerate(datamodule.sample_names())}

    def read(name: str) -> NDArray[np.uint8]:
        pixels: NDArray[np.uint8] = datamodule.read_image(row_of[name]).permute(1, 2, 0).contiguous().numpy()
        return pixels

    sections = [_sheet(number, name, found, read) for number, (name, found) in enumerate(kinds.items())]
    return Page(f"Findings in {report.data}", lead, [summary, *sections])


def _advice(found: Sequence[Finding]) -> str:
    several = len({one.suggestion for one in found if one.finding == "conflicting-labels"}) > 0
    return "correct one of the two values" if several else found[0].suggestion


def _sheet(number: int, name: str, found: Sequence[Finding], read: Callable[[str], NDArray[np.uint8]]) -> Section:
    from evaluation.report.page import Card, Section
    from retrieval.commands.output import small_jpeg

    def card(stem: str, image: str, lines: list[str]) -> Card:
        return Card(stem, small_jpeg(read(image)), lines)

    cards = []
    for place, one in enumerate(found[: _SHOWN // 2 if found[0].other else _SHOWN]):
        stem = f"f{number}_{place}"
        facts = [one.image, f"{one.split}, row {one.row}", f"{one.value:g} ({one.severity})"]
        cards.append(card(stem, one.image, [*facts, one.suggestion] if name == "conflicting-labels" else facts))
        if one.other:
            cards.append(card(f"{stem}_other", one.other, [one.other, "the other image"]))
    shown = "" if len(cards) >= len(found) else f" The first {len(cards)} are shown."
    advice = _advice(found)
    about = f"{len(found):,} images; threshold {found[0].threshold:g}. {advice[0].upper()}{advice[1:]}.{shown}"
    return Section(name, [about], cards={"": cards})
