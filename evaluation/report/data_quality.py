"""The section of a report on data quality: findings of ``audit --run``, and labels that ``label-issues`` suspects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.report.images import ReadImage, images_of
from evaluation.report.page import ImageGrid, Section
from vitrail.errors import first_line
from vitrail.runs import Run

if TYPE_CHECKING:
    import pandas as pd


def data_quality_section(files: Run, read: ReadImage | None, count: int) -> Section:
    """Findings about images and suspected labels, each with the time of its measurement.

    Args:
        files: the run.
        read: of an image by its name; None where the data are not there.
        count: images of each that are shown.
    """
    section = Section("Data quality")
    audit, issues = files.path / Run.AUDIT, files.path / Run.LABEL_ISSUES
    if not audit.is_file():
        section.missing.append(f"The data have not been audited: run `vitrail audit --run {files.path}`.")
    elif content := _content(audit, section):
        _add_findings(section, content, files, read, count)
    if not issues.is_file():
        section.missing.append(f"The labels have not been checked: run `vitrail label-issues {files.path}`.")
    elif content := _content(issues, section):
        _add_issues(section, content, read, count)
    return section


def _add_findings(section: Section, audit: dict[str, Any], files: Run, read: ReadImage | None, count: int) -> None:
    import pandas as pd

    table = pd.DataFrame(audit["findings"])
    samples = ", ".join(f"{number:,} {split}" for split, number in audit["samples"].items())
    found = (
        f"{audit['unreadable']:,} cannot be read, {len(table):,} finding{_plural(table)}; a finding is a reason to "
        "look, not to delete"
    )
    section.paragraphs.append(
        f"Audited on {audit['measured']}: {samples} images; "
        f"{'they are generated, so there is nothing to find' if audit['generated'] else found}."
    )
    data = files.record.get("data")
    if isinstance(data, dict) and data.get("fingerprint") not in (None, audit["fingerprint"]):
        section.paragraphs.append("The data are not those of the training any more: their fingerprints differ.")
    if not len(table):
        return
    kinds = table.groupby("finding", sort=False)
    counts = kinds.agg(images=("image", "size"), severity=("severity", "first"), suggestion=("suggestion", "first"))
    counts.loc[counts.index == "conflicting-labels", "suggestion"] = "correct one of the two values"
    section.tables["findings"] = counts.reset_index()
    shown = table.rename(columns={"image": "name"})
    shown["other"] = shown["other"].where(shown["other"] != "", None)
    kept = ["name", "finding", "severity", "split", "value", "other", "suggestion"]
    _add_images(section, "found_images", "finding", shown[kept], {"finding": "Finding", "split": "Split"}, read, count)


def _add_issues(section: Section, issues: dict[str, Any], read: ReadImage | None, count: int) -> None:
    import pandas as pd

    table = pd.DataFrame(issues["rows"])
    of_task = f" of {issues['task']!r}" if issues["task"] else ""
    section.paragraphs.append(
        f"Labels{of_task} in {' and '.join(issues['splits'])} were compared with the predictions on "
        f"{issues['measured']}: {len(table):,} are suspected."
        + (
            " The lower the score (the label's probability minus the largest of the others; of numbers minus the "
            "residual in robust standard deviations), the more suspicious."
            if len(table)
            else ""
        )
    )
    if len(table):
        shown = table.rename(columns={"image": "name", "old": "target", "label": "suggested"}).drop(columns="note")
        facets = {"task": "Task", "target": "Label", "suggested": "Suggested"}
        _add_images(section, "suspected_labels", "suspected label", shown, facets, read, count)


def _add_images(
    section: Section,
    name: str,
    what: str,
    table: pd.DataFrame,
    facets: dict[str, str],
    read: ReadImage | None,
    count: int,
) -> None:
    """Show rows with their images, or without them as a table."""
    if read is None:
        section.tables[name] = table
        return
    section.files[name] = table
    # What is the same of all is no caption and no filter.
    shown = table.drop(columns=[one for one in ("split", "task") if one in table and len(set(table[one])) == 1])
    facets = {one: title for one, title in facets.items() if one in shown}
    images = images_of(shown, [*facets][:1], count, read)
    section.grids.append(ImageGrid(name, f"{len(table):,} {what}{_plural(table)}", shown, facets, "", images))


def _plural(table: pd.DataFrame) -> str:
    return "" if len(table) == 1 else "s"


def _content(path: Path, section: Section) -> dict[str, Any]:
    """What a command left; empty where it is damaged, which is reported as missing."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if "measured" not in content:
            raise ValueError("the time of the measurement is missing")
    except (OSError, ValueError, TypeError) as error:
        section.missing.append(f"{path}: cannot be read ({first_line(error)}); run the command again.")
        return {}
    return content
