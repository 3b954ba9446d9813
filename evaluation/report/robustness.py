"""Sections of a report on other images than the test split's: corrupted ones and other data sets."""

from __future__ import annotations

from typing import Any

import numpy as np

from evaluation.report.charts import Chart, line_chart
from evaluation.report.page import Section
from evaluation.report.sections import score_span
from evaluation.robustness import CLEAN, IMAGENET_C, Condition, Robustness
from evaluation.statistics.scores import heading
from evaluation.tables.summary import summarise_run
from vitrail.errors import UserError
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
            f"Nothing is measured on corrupted images yet: `vitrail evaluate {files.path} --corrupt imagenet-c` does."
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
