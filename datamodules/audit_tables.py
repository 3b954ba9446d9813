"""Prints an audit's report as tables on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from datamodules.audit import TITLES, AuditReport, DuplicatePair, conflict_text
from datamodules.duplicates import RADII
from datamodules.location import left_out_text
from datamodules.options import LeakKind
from datamodules.table import SPLITS

SHOWN = 20
"""Rows of a list that are printed; the JSON has all of them."""


def print_report(report: AuditReport, console: Console) -> None:
    """Prints counts by split, the classes of each task, unseen values, leaks and skipped pictures."""
    console.print(f"[bold]{report.data}[/bold] {escape(report.origin)}  fingerprint {report.fingerprint[:12]}")
    sizes = _table("samples and groups", ("", *SPLITS))
    sizes.add_row("samples", *_numbers(report.samples))
    sizes.add_row("groups", *_numbers(report.group_counts))
    console.print(sizes)
    for task, classes in report.classes.items():
        counts = _table(f"{task}: {len(classes)} classes", (task, *SPLITS))
        for name, by_split in classes.items():
            counts.add_row(escape(name), *_numbers(by_split))
        counts.add_row("[dim]unknown[/dim]", *_numbers(report.unknown[task]))
        console.print(counts)
        if unseen := report.unseen.get(task):
            texts = ", ".join(f"{value} ({count})" for value, count in unseen.items())
            console.print(f"  {escape(task)}, values that are not in the vocabulary: {escape(texts)}\n")
    _print_files(report, console)
    for column, rows in report.missing.items():
        unknown = ", ".join(f"{text!r} ({n} {'row' if n == 1 else 'rows'})" for text, n in rows.items())
        console.print(f"{escape(column)}, counted as unknown: {escape(unknown)}", highlight=False)
    for note in report.notes:
        console.print(escape(note), highlight=False, soft_wrap=True)
    _print_leaks(report, console)
    _print_identical(report, console)
    lines = [f"row {bad.sample.row} ({bad.sample.split}): {bad.reason}" for bad in report.skipped]
    why = "" if report.reads_images else "images are generated"
    _print_list("unreadable pictures", lines, "skipped" if report.skips_bad_images else "not allowed", console, why)


def _print_files(report: AuditReport, console: Console) -> None:
    """Files that are left out, and how images with more than 8 bits a channel are read."""
    left_out = report.files_left_out
    none = "none" if report.counts_files else "not looked for (images are no files of their own)"
    told = f"{sum(left_out.values())}, {left_out_text(left_out)}" if left_out else none
    console.print(f"files left out: {escape(told)}", soft_wrap=True)
    if report.value_range["option"] != "auto":
        console.print(f"image.value_range: {report.value_range['option']}", markup=False)
    elif images := report.value_range.get("images"):
        low, high = report.value_range["range"]
        used = ", ".join(f"{text} {count}" for text, count in report.value_range["used"].items())
        console.print(
            f"images with more than 8 bits a channel: {images} (used: {used}); {low:g} is black and {high:g} white "
            f"(image.value_range: {report.value_range['option']})",
            soft_wrap=True,
            markup=False,
        )


def _print_leaks(report: AuditReport, console: Console) -> None:
    leaks = report.leaks
    groups = [
        f"{group.group}: " + ", ".join(f"{split} {count}" for split, count in group.counts.items())
        for group in leaks.groups
    ]
    found: dict[LeakKind, list[str]] = {"groups": groups, "exact": _pairs(leaks.exact), "near": _pairs(leaks.near)}
    for kind, lines in found.items():
        allowed = "allowed" if kind in report.allowed else "not allowed"
        _print_list(TITLES[kind], lines, allowed, console, leaks.not_checked.get(kind, ""))
        if kind == "groups" and leaks.own_groups and kind not in leaks.not_checked:
            console.print("  (the data name no groups, or no group has two images: each image is one of its own)")
    if leaks.near_radius is not None and leaks.near_radius < RADII[0]:
        console.print(f"  (so many pictures are alike that only hashes within {leaks.near_radius} bits were compared)")


def _print_identical(report: AuditReport, console: Console) -> None:
    """How often images are repeated within a split, and what the table says differently of identical ones."""
    if report.identical is None:
        console.print("identical images within a split: not compared")
        return
    repeated = {split: count for split, count in report.identical.repeated.items() if count}
    told = ", ".join(f"{split} {count}" for split, count in repeated.items())
    console.print(f"identical images within a split: {told or 'none'}")
    lines = [conflict_text(conflict) for conflict in report.identical.conflicts]
    counts = ", ".join(f"{column} {count}" for column, count in report.identical.conflict_counts().items())
    _print_list("identical images that the table contradicts itself about", lines, escape(counts), console)


def _pairs(pairs: Iterable[DuplicatePair]) -> list[str]:
    return [
        f"{pair.first.source} ({pair.first.split}, row {pair.first.row}) = "
        f"{pair.second.source} ({pair.second.split}, row {pair.second.row})"
        for pair in pairs
    ]


def _print_list(title: str, lines: Sequence[str], remark: str, console: Console, not_checked: str = "") -> None:
    """A list with its length, the first twenty lines of it, and what the configuration makes of it."""
    if not lines:
        console.print(f"{title}: not checked ({escape(not_checked)})" if not_checked else f"{title}: none")
        return
    console.print(f"[bold]{title}: {len(lines)}[/bold] ({remark})")
    for line in lines[:SHOWN]:
        console.print(f"  {escape(line)}", soft_wrap=True)
    if len(lines) > SHOWN:
        console.print(f"  and {len(lines) - SHOWN} more")


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=escape(title), title_justify="left")
    for place, column in enumerate(columns):
        table.add_column(escape(column), justify="right" if place else "left")
    return table


def _numbers(by_split: dict[str, int]) -> list[str]:
    return [f"{by_split[split]:,}" for split in SPLITS]
