"""What the audit found about single images, one row each: repetitions, contradictory labels, odd images, special files.

Files that cannot be read, groups in several splits and what else concerns the whole set are in the report.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datamodules.checks.near_duplicates import identical_sets
from datamodules.checks.verify import Severity, Verification, outliers
from datamodules.table import SampleTable, attribute_column
from vitrail.types import kind_of

_SEVERITIES: tuple[Severity, ...] = ("high", "medium", "low")


@dataclass(frozen=True)
class Finding:
    """One row of the table of findings.

    Attributes:
        image: its name.
        split: where it is.
        row: in the table's file.
        source: its file, or index.
        finding: such as ``blurry`` or ``near-duplicate``.
        value: in the units of ``datamodules.checks.verify``; of repetitions the number of images that are the same, of
            near duplicates the bits that their hashes differ in.
        threshold: that the value is beyond.
        severity: ``high`` for what makes results wrong, ``medium`` for what is likely a mistake, ``low`` for what is
            good to know.
        suggestion: what to do.
        other: the other image, of findings on two.
    """

    image: str
    split: str
    row: int
    source: str
    finding: str
    value: float
    threshold: float
    severity: Severity
    suggestion: str
    other: str = ""


COLUMNS = tuple(field.name for field in fields(Finding))


def find(table: SampleTable, verification: Verification, near: NDArray[np.int64], radius: int) -> list[Finding]:
    """Return all findings, the gravest first.

    Args:
        table: of all samples.
        verification: with its quality facts.
        near: int64 ``(P, 2)``, pairs of rows that show nearly the same image, identical ones left out.
        radius: bits within which their hashes were compared.
    """
    found = [*_repetitions(table, verification), *_near(table, verification, near, radius)]
    if verification.quality is not None:
        for kind in outliers(verification.quality, np.flatnonzero(verification.readable)):
            for row, value, severity in zip(kind.rows.tolist(), kind.values.tolist(), kind.severity, strict=True):
                found.append(_finding(table, row, kind.finding, value, kind.threshold, severity, kind.suggestion))
    # Stable: within a kind the worst stay first.
    return sorted(found, key=lambda one: (_SEVERITIES.index(one.severity), one.finding))


def _finding(
    table: SampleTable,
    row: int,
    finding: str,
    value: float,
    threshold: float,
    severity: Severity,
    suggestion: str,
    other: int | None = None,
) -> Finding:
    return Finding(
        table.name(row),
        table.split(row),
        int(table.rows[row]),
        table.source(row),
        finding,
        round(float(value), 4),
        round(float(threshold), 4),
        severity,
        suggestion,
        "" if other is None else table.name(other),
    )


def _repetitions(table: SampleTable, verification: Verification) -> list[Finding]:
    """Each image that is pixel by pixel another one, and contradictions between them."""
    found = []
    for rows in identical_sets(verification.content, verification.readable):
        first, *others = rows.tolist()
        for row in others:
            crosses = table.split(row) != table.split(first)
            name, severity = ("duplicate-across-splits", "high") if crosses else ("duplicate", "medium")
            advice = "keep one of the identical images"
            found.append(_finding(table, row, name, len(rows), 1, severity, advice, first))  # type: ignore[arg-type]
        found += [one for row in others for one in _conflicts(table, first, row, len(rows))]
    return found


def _near(table: SampleTable, verification: Verification, near: NDArray[np.int64], radius: int) -> list[Finding]:
    found = []
    for first, row in near.tolist():
        hashes = verification.perceptual[[first, row]]
        bits = int(np.bitwise_count(hashes[:, None, :] ^ hashes[::-1, :1, None]).min())
        crosses = table.split(row) != table.split(first)
        if crosses:
            name, severity, advice = "near-duplicate-across-splits", "high", "move both into one split, or keep one"
        else:
            name, severity, advice = "near-duplicate", "medium", "keep one, or give both one group"
            if table.group_ids[first] == table.group_ids[row]:
                severity, advice = "low", "two images of one object that hardly differ"
        found.append(_finding(table, row, name, bits, radius, severity, advice, first))  # type: ignore[arg-type]
        found += _conflicts(table, first, row, 2)
    return found


def _conflicts(table: SampleTable, first: int, row: int, images: int) -> list[Finding]:
    """One finding for each task for which two images that show the same have different known values."""
    found = []
    pair = np.array([first, row])
    for task in table.tasks:
        one, other = table.target_texts(task, pair)
        known = one is not None and other is not None
        if kind_of(table.kinds, task) == "multi_label":
            known = bool((table.targets[task][pair] >= 0).all())
        if known and one != other:
            advice = f"{attribute_column(task)}: {other or '(none)'!r}, but {one or '(none)'!r} for the same image"
            found.append(_finding(table, row, "conflicting-labels", images, 1, "high", advice, first))
    return found


def counted(findings: Sequence[Finding]) -> dict[str, list[Finding]]:
    """Return the findings by kind, the gravest and most frequent kind first."""
    counts = Counter(one.finding for one in findings)
    gravest = {name: min(_SEVERITIES.index(f.severity) for f in findings if f.finding == name) for name in counts}
    kinds = sorted(counts, key=lambda name: (gravest[name], -counts[name], name))
    return {name: [one for one in findings if one.finding == name] for name in kinds}


def columns(findings: Sequence[Finding]) -> dict[str, list[Any]]:
    """Return the findings by column."""
    rows = [asdict(one) for one in findings]
    return {name: [row[name] for row in rows] for name in COLUMNS}
