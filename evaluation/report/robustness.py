"""Sections of a report beyond the score of a split: its slices, corrupted, other and unknown images."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.report.charts import Chart, line_chart
from evaluation.report.page import Section
from evaluation.report.sections import score_span
from evaluation.robustness import CLEAN, IMAGENET_C, Condition, Robustness
from evaluation.statistics.intervals import Estimate, Interval
from evaluation.statistics.scores import heading
from evaluation.tables.summary import score_text, summarise_run, with_interval
from vitrail.errors import UserError, first_line
from vitrail.runs import Run
from vitrail.trust import file_name

_FAMILIES = {"noise": IMAGENET_C[:3], "blur": IMAGENET_C[3:7], "weather": IMAGENET_C[7:11], "digital": IMAGENET_C[11:]}


def corruptions_section(files: Run) -> Section:
    """Scores on corrupted images by severity, as ``vitrail evaluate RUN --corrupt`` measured them."""
    import pandas as pd

    section = Section("Corrupted images")
    folders = sorted(path for path in (files.path / Run.ROBUSTNESS).glob("[!.]*") if path.is_dir())
    for folder in folders:
        try:
            found = Robustness(folder)
        except UserError as error:
            section.missing.append(str(error))
            continue
        section.paragraphs.extend(f"{folder.name}, {sentence}" for sentence in found.sentences())
        for task in found.tasks:
            stem = f"{file_name(folder.name)}_{file_name(task)}"
            own = [one for one in found.conditions if one.task == task]
            if any(one.severity > 1 for one in own):
                section.charts[f"corrupted_{stem}"] = _severities(f"{task} on corrupted {folder.name} images", own)
            table = found.table(task)
            section.tables[f"corrupted_{stem}"] = pd.DataFrame(table.rows, columns=list(table.columns))
    if not folders and files.checkpoints:
        section.missing.append(
            f"Not evaluated on corrupted images: run `vitrail evaluate {files.path} --corrupt imagenet-c`."
        )
    return section


def _severities(title: str, conditions: list[Condition]) -> Chart:
    """A line for each family of corruptions, the mean over its own, and one for each other corruption."""
    clean = next(one.value for one in conditions if one.corruption == CLEAN)
    family = {name: group for group, names in _FAMILIES.items() for name in names}
    values: dict[str, dict[int, list[float]]] = {}
    for one in conditions:
        if one.severity:
            by_severity = values.setdefault(family.get(one.corruption, one.corruption), {0: [clean]})
            by_severity.setdefault(one.severity, []).append(one.value)
    lines = {
        name: (np.array(sorted(own), np.float64), np.array([np.mean(own[severity]) for severity in sorted(own)]))
        for name, own in values.items()
    }
    return line_chart(title, lines, "severity (0: as they are)", heading(conditions[0].score))


def other_data_section(files: Run) -> Section:
    """The main scores on other data sets, as ``vitrail evaluate RUN --data …`` left them."""
    import pandas as pd

    section, rows = Section("Other data"), []
    for name, run in files.evaluations.items():
        try:
            summaries = summarise_run(run.path)
        except UserError as error:
            section.missing.append(f"{name}: {error}")
            continue
        for one in summaries:
            row: dict[str, Any] = {"data": name, "task": one.task, "score": heading(one.main)}
            span = score_span(one.main, one.main_score, one.constant)
            rows.append({**row, "value [95 %]": span, "n": one.n, "groups": one.groups, "note": one.note})
    if rows:
        section.tables["other_data"] = pd.DataFrame(rows)
        section.paragraphs.append("Dashed lines are those of always predicting the same.")
    return section


def unknown_images_section(files: Run) -> Section:
    """How well images unlike the training images are recognised, as ``vitrail ood`` measured it."""
    import pandas as pd

    section, path = Section("Unknown images"), files.path / Run.REPORTS / "ood.json"
    detector = files.detector
    if detector is not None:
        section.paragraphs.append(
            f"`predict` marks an image as unknown by {detector.method}, with a threshold that keeps "
            f"{detector.rate:.0%} of {detector.facts.get('val', 'the')} validation images."
        )
    elif files.checkpoints:
        section.missing.append(f"No image is marked as unknown: `vitrail ood {files.path} --ood FOLDER` fits that.")
    rows = _read_rows(path, section)
    table = [
        {
            "other images": row["ood"],
            "method": row["method"],
            **{
                title: with_interval(*_estimate(row[name]["value"], row[name]["low"], row[name]["high"]))
                for name, title in _SEPARATION.items()
            },
            "n": row["ood_images"],
        }
        for row in rows
    ]
    if table:
        section.tables["unknown_images"] = pd.DataFrame(table)
        section.paragraphs.append(
            "FPR@95 is the share of the other images that a threshold lets pass which keeps 95 % of the test images; "
            "test kept and unknown are by the threshold from validation."
        )
    return section


_SEPARATION = {
    "auroc": "AUROC [95 %]",
    "fpr": "FPR@95 [95 %]",
    "kept": "test kept [95 %]",
    "unknown": "unknown [95 %]",
}


def slices_section(files: Run, split: str) -> Section:
    """Scores of parts of a split, as ``vitrail slices`` last measured them."""
    import pandas as pd

    section = Section("Slices")
    paths = sorted((files.path / Run.REPORTS).glob(f"slices_{split}_*.json"))
    for path in paths:
        rows = _read_rows(path, section)
        if not rows:
            continue
        metric, task = rows[0]["metric"], rows[0]["task"]
        section.tables[path.stem] = pd.DataFrame(
            [
                {
                    "slice": row["slice"],
                    f"{heading(metric)} [95 %]": score_text(metric, _estimate(row["value"], *row["interval"])),
                    "rest": row["rest"],
                    "difference": row["difference"],
                    "p": row["p_value"],
                    "n": row["n"],
                    "groups": row["groups"],
                }
                for row in rows[:_MOST_SLICES]
            ]
        )
        shown = "" if len(rows) <= _MOST_SLICES else f"; the {_MOST_SLICES} worst of {len(rows)} are shown"
        section.paragraphs.append(
            f"{task}: the rest is all other images of the split; p is corrected for {len(rows)} slices{shown}."
        )
    if not paths and split in files.splits:
        section.missing.append(f"Slices have not been evaluated: run `vitrail slices {files.path} --split {split}`.")
    return section


_MOST_SLICES = 50


def _estimate(*numbers: float | None) -> Estimate:
    """A value and the ends of its interval; JSON has null for NaN."""
    value, low, high = (math.nan if number is None else number for number in numbers)
    return Estimate(value, Interval(low, high))


def _read_rows(path: Path, section: Section) -> list[dict[str, Any]]:
    """The rows of a JSON report; a damaged one is reported as missing."""
    if not path.is_file():
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return [{**row} for row in rows]
    except (OSError, ValueError, TypeError) as error:
        section.missing.append(f"{path}: cannot be read ({first_line(error)}).")
        return []
