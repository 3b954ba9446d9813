"""What is in a data set, and what leaks between its splits: groups, identical images, nearly identical images.

Every fit refuses leaks that its YAML does not allow; ``python -m datamodules audit`` shows the whole report.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape

from datamodules.checks.findings import Finding, counted, find
from datamodules.checks.near_duplicates import NEAR_FORMAT, RADII, Pairs, exact_pairs, identical_sets, near_pairs
from datamodules.checks.verify import Arrays, ReadImage, Verification, cached
from datamodules.files.label_csv import left_out_text
from datamodules.options import CheckOptions, LeakKind, Verify
from datamodules.table import SPLITS, SampleTable, attribute_column, table_error
from vitrail.console import Table
from vitrail.predictions import known_rows
from vitrail.types import kind_of

TITLES: dict[LeakKind, str] = {
    "groups": "groups in several splits",
    "exact": "identical images across splits",
    "near": "nearly identical images across splits",
}
"""What each kind of leak is called."""


VERIFY_NOTES: dict[Verify, str] = {
    "headers": "duplicates are found only where files are identical",
    "never": "duplicates are not looked for",
}
"""What is missing where ``checks.verify`` reads less than all."""


@dataclass(frozen=True)
class Sample:
    """One image of a report: name, file (or index), split and row in the table's file."""

    name: str
    source: str
    split: str
    row: int


@dataclass(frozen=True)
class CrossingGroup:
    """A group that is in several splits: how many of its images are in each, and its first image in each."""

    group: str
    counts: dict[str, int]
    examples: list[Sample]


@dataclass(frozen=True)
class DuplicatePair:
    """Two images in different splits that show the same."""

    first: Sample
    second: Sample


@dataclass(frozen=True)
class Conflict:
    """Identical images with different values in the table.

    Attributes:
        column: ``class``, ``attribute <name>``, ``group`` or ``caption``.
        samples: the first image with each value.
        values: of each of them; unknown values contradict nothing.
        images: number of identical images with a value.
    """

    column: str
    samples: list[Sample]
    values: list[str]
    images: int

    def __str__(self) -> str:
        """Such as: class: bag (a.jpg, train, row 3), cup (b.jpg, train, row 9)."""
        pairs = zip(self.values, self.samples, strict=True)
        found = ", ".join(f"{value} ({sample.source}, {sample.split}, row {sample.row})" for value, sample in pairs)
        return f"{self.column}: {found}"


@dataclass(frozen=True)
class Identical:
    """Images that are equal pixel by pixel, in one split or in several.

    Attributes:
        repeated: for each split the number of images that repeat another one of the same split.
        conflicts: identical images with different values in the table, by row.
    """

    repeated: dict[str, int]
    conflicts: list[Conflict]

    def conflict_counts(self) -> dict[str, int]:
        """Return the number of conflicts by column."""
        return dict(Counter(conflict.column for conflict in self.conflicts))


@dataclass(frozen=True)
class SkippedImage:
    """An image that cannot be read."""

    sample: Sample
    reason: str


@dataclass(frozen=True)
class Leaks:
    """What connects the splits.

    Attributes:
        groups: groups in several splits.
        exact: pairs of images that are equal pixel by pixel.
        near: pairs of images that differ in encoding, scale, brightness or a small crop only.
        near_radius: distance in bits up to which images' hashes were compared; None where they were not.
        not_checked: reason, for each kind that was not looked for.
        own_groups: whether each image is a group of its own.
    """

    groups: list[CrossingGroup]
    exact: list[DuplicatePair]
    near: list[DuplicatePair]
    near_radius: int | None
    not_checked: dict[LeakKind, str] = field(default_factory=dict)
    own_groups: bool = False

    def refuse(self, origin: str, allowed: Collection[LeakKind]) -> None:
        """Raise one error for all leaks that are not allowed."""
        problems: dict[LeakKind, list[tuple[int, str]]] = {"groups": [], "exact": [], "near": []}
        for group in self.groups:
            counts = " and ".join(f"{split} ({n})" for split, n in group.counts.items())
            row = min(sample.row for sample in group.examples)
            problems["groups"].append((row, f"group {group.group!r} is in {counts}"))
        for found, pairs, same in (
            (problems["exact"], self.exact, "the same"),
            (problems["near"], self.near, "nearly the same"),
        ):
            for pair in pairs:
                first, second = pair.first, pair.second
                files = f"{first.source} ({first.split}) and {second.source} ({second.split})"
                found.append((first.row, f"{same} image as in row {second.row}: {files}"))
        refused = [kind for kind in problems if problems[kind] and kind not in allowed]
        if refused:
            counted = " and ".join(f"{len(problems[kind])} {TITLES[kind]}" for kind in refused)
            hint = f"{counted}: split again, or allow it with data checks.allow_leaks: [{', '.join(refused)}]"
            raise table_error(origin, [problem for kind in refused for problem in problems[kind]], hint)


@dataclass(frozen=True)
class AuditReport:
    """All that the audit found; the JSON of the command.

    Attributes:
        data: class of the DataModule.
        origin: file that the table comes from.
        fingerprint: of the table.
        samples: number of samples of each split.
        group_counts: number of groups of each split.
        classes: number of samples by task, class and split; unreadable images count.
        unknown: number of samples without a known value, by task and split.
        unseen: number of samples by task and value that the vocabulary lacks.
        missing: number of samples by column and text that made them unknown (``checks.missing``).
        notes: what was left out of the table, and aliases that match no row.
        leaks: what connects the splits.
        identical: None where pixels were not compared, or fewer than two images can be read.
        skipped: unreadable images.
        allowed: kinds of leaks that the configuration allows.
        skips_bad_images: whether the configuration leaves unreadable images out.
        value_range: what is black and white in images with more than 8 bits a channel, and how many there are.
        files_left_out: number of files among the images that are not used, by the ending of their names.
        reads_images: False for generated images.
        counts_files: whether files that are left out were looked for: only where images are files.
        labels: of multi-label tasks, how many samples have both of two labels, the most frequent pair first.
        numbers: of regression tasks, by split, ``samples``, ``min``, ``median``, ``mean``, ``max`` and ``std`` of the
            known numbers, and ``histogram``, counts in equal parts of the range of all splits.
        findings: about single images, the gravest first; none for generated images.
    """

    data: str
    origin: str
    fingerprint: str
    samples: dict[str, int]
    group_counts: dict[str, int]
    classes: dict[str, dict[str, dict[str, int]]]
    unknown: dict[str, dict[str, int]]
    unseen: dict[str, dict[str, int]]
    missing: dict[str, dict[str, int]]
    notes: list[str]
    leaks: Leaks
    identical: Identical | None
    skipped: list[SkippedImage]
    allowed: list[LeakKind]
    skips_bad_images: bool
    value_range: dict[str, Any]
    files_left_out: dict[str, int]
    reads_images: bool = True
    counts_files: bool = True
    labels: dict[str, list[tuple[str, str, int]]] = field(default_factory=dict)
    numbers: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the report in types that JSON knows."""
        return asdict(self)

    def refuse(self) -> None:
        """Raise the error of a fit: for unreadable images that are not skipped, and for leaks that are not allowed."""
        if self.skipped and not self.skips_bad_images:
            problems = [(bad.sample.row, bad.reason) for bad in self.skipped]
            hint = "repair or remove these images, or set data checks.on_bad_image: skip"
            raise table_error(self.origin, problems, hint)
        self.leaks.refuse(self.origin, self.allowed)


def audit(
    table: SampleTable,
    verification: Verification | None,
    read_image: ReadImage,
    checks: CheckOptions,
    *,
    data: str,
    value_range: dict[str, Any],
    files_left_out: dict[str, int],
    image_files: bool,
) -> AuditReport:
    """Report on a data set; ``verification`` is None for generated images, which are not compared."""
    bad = verification.bad if verification else {}
    masks = {split: table.split_codes == code for code, split in enumerate(SPLITS)}
    classes, unknown = {}, {}
    for task, names in table.tasks.items():
        counts = {split: table.class_counts(split)[task] for split in SPLITS}
        classes[task] = {name: {split: counts[split][place] for split in SPLITS} for place, name in enumerate(names)}
        unknown[task] = {split: int((~known_rows(table.targets[task][masks[split]])).sum()) for split in SPLITS}
    findings = [] if verification is None else _findings(table, verification, read_image)
    identical = None
    if verification and verification.readable.sum() > 1:
        identical = find_identical(table, verification.content, verification.readable)
    return AuditReport(
        data=data,
        origin=table.origin,
        fingerprint=table.fingerprint(),
        samples={split: int(mask.sum()) for split, mask in masks.items()},
        group_counts={split: len(np.unique(table.group_ids[mask])) for split, mask in masks.items()},
        classes=classes,
        unknown=unknown,
        unseen=table.unseen,
        missing=table.missing,
        notes=table.notes,
        leaks=find_leaks(table, verification, read_image),
        identical=identical,
        skipped=[SkippedImage(_sample(table, row), reason) for row, reason in sorted(bad.items())],
        allowed=list(checks.allow_leaks),
        skips_bad_images=checks.on_bad_image == "skip",
        value_range=value_range,
        files_left_out=files_left_out,
        reads_images=verification is not None,
        counts_files=image_files,
        labels={task: label_pairs(table, task) for task in table.tasks if kind_of(table.kinds, task) == "multi_label"},
        numbers={task: numbers_of(table, task) for task in table.tasks if kind_of(table.kinds, task) == "regression"},
        findings=findings,
    )


def label_pairs(table: SampleTable, task: str) -> list[tuple[str, str, int]]:
    """Count the samples of all splits that have both of two labels; pairs that occur, the most frequent first."""
    has = (table.targets[task] == 1).astype(np.int64)
    together, names = np.triu(has.T @ has, k=1), table.tasks[task]
    order = np.argsort(-together, axis=None, kind="stable")
    pairs = zip(*(places.tolist() for places in np.unravel_index(order, together.shape)), strict=True)
    return [(names[one], names[other], int(together[one, other])) for one, other in pairs if together[one, other]]


BINS = 16
"""Parts of a histogram of numbers."""


def numbers_of(table: SampleTable, task: str) -> dict[str, dict[str, Any]]:
    """Describe the known numbers of a regression task by split; see ``AuditReport``."""
    values = table.targets[task].astype(np.float64)
    everything = values[~np.isnan(values)]
    found = {}
    for code, split in enumerate(SPLITS):
        own = values[(table.split_codes == code) & ~np.isnan(values)]
        facts: dict[str, Callable[..., Any]] = {
            "min": np.min,
            "median": np.median,
            "mean": np.mean,
            "max": np.max,
            "std": np.std,
        }
        counts = np.histogram(own, BINS, (everything.min(), everything.max()))[0] if len(own) else np.zeros(BINS)
        found[split] = {
            "samples": len(own),
            **{name: float(fact(own)) if len(own) else None for name, fact in facts.items()},
            "histogram": counts.astype(int).tolist(),
        }
    return found


def find_leaks(
    table: SampleTable, verification: Verification | None, read_image: ReadImage, ignored: Collection[LeakKind] = ()
) -> Leaks:
    """Find groups and images that are in several splits.

    Args:
        table: of all samples.
        verification: hashes of the images; without them only groups are looked for.
        read_image: confirms near duplicates.
        ignored: kinds that are not looked for.
    """
    readable = np.ones(len(table), dtype=bool) if verification is None else verification.readable
    groups = [] if "groups" in ignored else _crossing_groups(table, readable)
    exact = near = np.zeros((0, 2), dtype=np.int64)
    radius = None
    if verification is not None and "exact" not in ignored:
        exact = exact_pairs(verification.content, table.split_codes, readable)
    decoded = verification is not None and verification.mode == "full"
    if verification is not None and decoded and "near" not in ignored:
        near, radius = _near(table, verification, read_image, table.split_codes)
    not_checked: dict[LeakKind, str] = {}
    if len(np.unique(table.split_codes[readable])) < 2:
        not_checked = dict.fromkeys(TITLES, "fewer than two splits have images that can be compared")
    else:
        if verification is None:
            not_checked = {"exact": "images are generated", "near": "images are generated"}
        elif not decoded:
            why = f"checks.verify: {verification.mode}; {VERIFY_NOTES[verification.mode]}"
            not_checked = {"exact": why, "near": why}
        not_checked |= dict.fromkeys((kind for kind in TITLES if kind in ignored), "allowed, so not looked for")
    own_groups = len(np.unique(table.group_ids)) == len(table)
    exact_found, near_found = (
        [DuplicatePair(_sample(table, first), _sample(table, second)) for first, second in pairs.tolist()]
        for pairs in (exact, near)
    )
    return Leaks(groups, exact_found, near_found, radius, not_checked, own_groups)


def find_identical(table: SampleTable, content: NDArray[np.uint8], readable: NDArray[np.bool_]) -> Identical:
    """Find images with the same content hash (uint8 ``(N, 32)``) among the readable ones (bool ``(N,)``)."""
    repeated = dict.fromkeys(SPLITS, 0)
    conflicts: list[Conflict] = []
    for rows in identical_sets(content, readable):
        for split, count in zip(SPLITS, np.bincount(table.split_codes[rows], minlength=len(SPLITS)), strict=True):
            repeated[split] += max(int(count) - 1, 0)
        conflicts += _conflicts(table, rows)
    return Identical(repeated, sorted(conflicts, key=lambda conflict: conflict.samples[0].row))


def _conflicts(table: SampleTable, rows: NDArray[np.int64]) -> Iterator[Conflict]:
    named: dict[str, list[str]] = {}
    for task in table.tasks:
        texts = table.target_texts(task, rows)
        if kind_of(table.kinds, task) == "multi_label":
            # Known not to have any label is a value, unlike labels of which some are not known.
            without = (table.targets[task][rows] == 0).all(axis=1).tolist()
            texts = ["(none)" if is_without else text for text, is_without in zip(texts, without, strict=True)]
        named[attribute_column(task)] = [text or "" for text in texts]
    # A sample without a group is one of its own, by its own name.
    named["group"] = [group if (group := table.group(row)) != table.name(row) else "" for row in rows.tolist()]
    named["caption"] = [" | ".join(filter(None, texts)) for texts in table.caption_lists.of(rows.tolist())]
    for column, values in named.items():
        first: dict[str, int] = {}
        for row, value in zip(rows.tolist(), values, strict=True):
            if value:
                first.setdefault(value, row)
        if len(first) > 1:
            known = sum(bool(value) for value in values)
            yield Conflict(column, [_sample(table, row) for row in first.values()], list(first), known)


def warn_of_conflicts(table: SampleTable, verification: Verification) -> None:
    """Report in one line that identical images have different labels, which no model can satisfy."""
    conflicts = find_identical(table, verification.content, verification.readable).conflicts
    if labels := [conflict for conflict in conflicts if conflict.column not in ("group", "caption")]:
        rank_zero_info(
            f"{table.origin}: {len(labels)} identical images have different labels, first {labels[0]}; "
            "`python -m datamodules audit` lists them"
        )


def _findings(table: SampleTable, verification: Verification, read_image: ReadImage) -> list[Finding]:
    every = np.arange(len(table))
    return find(table, verification, *_near(table, verification, read_image, every))


def _near(
    table: SampleTable, verification: Verification, read_image: ReadImage, parts: NDArray[np.integer[Any]]
) -> tuple[Pairs, int]:
    """Near duplicates in different parts (``(N,)``) that are not identical; cached on disk."""

    def read_pixels(row: int) -> NDArray[np.uint8]:
        pixels: NDArray[np.uint8] = read_image(row).permute(1, 2, 0).contiguous().numpy()
        return pixels

    def compute() -> Arrays:
        pairs, radius = near_pairs(verification.perceptual, parts, verification.readable, read_pixels)
        # Equal images have equal content: a pair of them is not a near duplicate.
        equal = (verification.content[pairs[:, 0]] == verification.content[pairs[:, 1]]).all(axis=1)
        return {"pairs": pairs[~equal], "radius": np.array(radius)}

    def check(arrays: Arrays) -> None:
        if arrays["pairs"].ndim != 2 or arrays["radius"].ndim != 0:
            raise ValueError("not pairs and a radius")

    kind = "near" if parts is table.split_codes else "near-all"
    arrays = cached(f"{kind}-{NEAR_FORMAT}-{verification.key}", compute, check)
    return arrays["pairs"].astype(np.int64), int(arrays["radius"])


def _sample(table: SampleTable, row: int) -> Sample:
    return Sample(table.name(row), table.source(row), table.split(row), int(table.rows[row]))


def _crossing_groups(table: SampleTable, readable: NDArray[np.bool_]) -> list[CrossingGroup]:
    """Groups whose readable images are in several splits, in the order of their first row."""
    import pandas as pd

    columns = {"row": np.arange(len(table)), "group": table.group_ids, "split": table.split_codes}
    places = pd.DataFrame(columns)[readable].groupby(["group", "split"], as_index=False)["row"].agg(["first", "size"])
    crossing = []
    for group, found in places[places.duplicated("group", keep=False)].groupby("group"):
        examples = [_sample(table, row) for row in found["first"].tolist()]
        counts = dict(zip((sample.split for sample in examples), found["size"].tolist(), strict=True))
        crossing.append(CrossingGroup(str(table.group_values[group].as_py()), counts, examples))
    return sorted(crossing, key=lambda one: min(sample.row for sample in one.examples))


SHOWN = 20
"""Rows of a list that are printed; the JSON has all of them."""


def print_report(report: AuditReport, console: Console) -> None:
    """Print counts by split, the classes of each task, unseen values, leaks and skipped images."""
    console.print(f"[bold]{report.data}[/bold] {escape(report.origin)}  fingerprint {report.fingerprint[:12]}")
    sizes = [["samples", *_numbers(report.samples)], ["groups", *_numbers(report.group_counts)]]
    console.print(Table(["", *SPLITS], sizes, title="samples and groups"))
    for task, classes in report.classes.items():
        if task in report.numbers:
            _print_numbers(report, task, console)
            continue
        counts = [[name, *_numbers(by_split)] for name, by_split in classes.items()]
        counts.append(["unknown", *_numbers(report.unknown[task])])
        title = f"{task}: {len(classes)} {'labels' if task in report.labels else 'classes'}"
        console.print(Table([task, *SPLITS], counts, title=title, styles={len(classes): "dim"}))
        if unseen := report.unseen.get(task):
            texts = ", ".join(f"{value} ({count})" for value, count in unseen.items())
            console.print(f"  {escape(task)}, values that are not in the vocabulary: {escape(texts)}\n")
        if pairs := report.labels.get(task):
            shown = ", ".join(f"{one} + {other} ({count:,})" for one, other, count in pairs[:SHOWN])
            more = f" and {len(pairs) - SHOWN} more pairs" if len(pairs) > SHOWN else ""
            console.print(f"  {escape(task)}, labels of the same sample: {escape(shown)}{more}\n", highlight=False)
    _print_files(report, console)
    for column, rows in report.missing.items():
        unknown = ", ".join(f"{text!r} ({n} {'row' if n == 1 else 'rows'})" for text, n in rows.items())
        console.print(f"{escape(column)}, counted as unknown: {escape(unknown)}", highlight=False)
    for note in report.notes:
        console.print(escape(note), highlight=False, soft_wrap=True)
    _print_leaks(report, console)
    _print_identical(report, console)
    lines = [f"row {bad.sample.row} ({bad.sample.split}): {bad.reason}" for bad in report.skipped]
    reason = "" if report.reads_images else "images are generated"
    _print_list("unreadable images", lines, "skipped" if report.skips_bad_images else "not allowed", console, reason)
    _print_findings(report, console)


_WORST = 3


def _print_findings(report: AuditReport, console: Console) -> None:
    """How many images there are of each finding, and the worst of them by name."""
    if not report.reads_images:
        console.print("findings about single images: not looked for (images are generated)")
        return
    rows = []
    for name, found in counted(report.findings).items():
        severities = Counter(one.severity for one in found)
        severity = ", ".join(f"{severity} {count}" for severity, count in severities.items())
        worst = ", ".join(f"{one.image} ({one.value:g})" for one in found[:_WORST])
        rows.append([name, f"{len(found):,}", severity, f"{found[0].threshold:g}", worst])
    if not rows:
        console.print("findings about single images: none")
        return
    heading = "findings about single images (--findings FILE has all, --html FILE shows them)"
    console.print(
        Table(
            ["finding", "images", "severity", "threshold", "worst"],
            rows,
            left=("finding", "severity", "worst"),
            title=heading,
        )
    )


_BARS = " ▁▂▃▄▅▆▇█"


def _print_numbers(report: AuditReport, task: str, console: Console) -> None:
    found = report.numbers[task]
    names = ("min", "median", "mean", "max", "std")
    rows = [["samples", *_numbers({split: own["samples"] for split, own in found.items()})]]
    rows += [
        [name, *("–" if found[split][name] is None else f"{found[split][name]:.4g}" for split in SPLITS)]
        for name in names
    ]
    histograms = []
    for split in SPLITS:
        counts = found[split]["histogram"]
        highest = max(*counts, 1)
        # What occurs at all shows.
        histograms.append("".join(_BARS[-(-count * (len(_BARS) - 1) // highest)] for count in counts))
    rows += [["from min to max", *histograms], ["unknown", *_numbers(report.unknown[task])]]
    console.print(Table([task, *SPLITS], rows, title=f"{task}: numbers", styles={len(rows) - 1: "dim"}))


def _print_files(report: AuditReport, console: Console) -> None:
    found = "none" if report.counts_files else "not looked for (images are no files of their own)"
    if left_out := report.files_left_out:
        found = f"{sum(left_out.values())}, {left_out_text(left_out)}"
    console.print(f"files left out: {escape(found)}", soft_wrap=True)
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
    exact, near = (
        [
            f"{first.source} ({first.split}, row {first.row}) = {second.source} ({second.split}, row {second.row})"
            for first, second in ((pair.first, pair.second) for pair in pairs)
        ]
        for pairs in (leaks.exact, leaks.near)
    )
    found: dict[LeakKind, list[str]] = {"groups": groups, "exact": exact, "near": near}
    for kind, lines in found.items():
        allowed = "allowed" if kind in report.allowed else "not allowed"
        _print_list(TITLES[kind], lines, allowed, console, leaks.not_checked.get(kind, ""))
        if kind == "groups" and leaks.own_groups and kind not in leaks.not_checked:
            console.print("  (the data name no groups, or no group has two images: each image is one of its own)")
    if leaks.near_radius is not None and leaks.near_radius < RADII[0]:
        console.print(
            f"  (there are many similar images: only hashes within {leaks.near_radius} bits were compared)",
            soft_wrap=True,
        )


def _print_identical(report: AuditReport, console: Console) -> None:
    if report.identical is None:
        console.print("identical images within a split: not compared")
        return
    repeated = ", ".join(f"{split} {count}" for split, count in report.identical.repeated.items() if count)
    console.print(f"identical images within a split: {repeated or 'none'}")
    lines = [str(conflict) for conflict in report.identical.conflicts]
    counts = ", ".join(f"{column} {count}" for column, count in report.identical.conflict_counts().items())
    _print_list("identical images with different values in the table", lines, escape(counts), console)


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


def _numbers(by_split: dict[str, int]) -> list[str]:
    return [f"{by_split[split]:,}" for split in SPLITS]
