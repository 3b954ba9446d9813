"""Sections and the summary of a page that compares runs: paired differences, images on which they differ, cost."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from evaluation.report.charts import Chart, Span, pareto_chart
from evaluation.report.images import ReadImage, images_of
from evaluation.report.page import Headline, ImageGrid, Section, Summary
from evaluation.report.sections import score_span
from evaluation.statistics.scores import LOWER_IS_BETTER, heading
from evaluation.tables.comparison import ComparedRow, Cost, Side, difference_text
from evaluation.tables.per_class import NO_PREDICTION
from evaluation.tables.summary import number_text
from vitrail.predictions import Predictions, target_texts
from vitrail.trust import file_name
from vitrail.types import UNKNOWN

COSTS = {"parameters": "parameters", "minutes": "minutes of training", "latency": "ms an image, CPU, one by one"}
"""Labels of the fields of ``Cost``."""

_HEADLINES = 8
_IMAGES = 96
_OWN_COLUMNS = ("name", "target", "right", "closest")
_SIDES = 6  # of which a grid shows the predictions


def comparison_summary(
    rows: Sequence[ComparedRow], split: str, reference: str, caveats: Sequence[str], steps: Sequence[str]
) -> Summary:
    """Summarise a comparison by the main score of the first task on the runs' own data.

    Args:
        rows: of ``compare_sides``.
        split: that was predicted.
        reference: ``first`` or ``best``.
        caveats: what a reader must know.
        steps: what to do next.
    """
    task = rows[0].joined.task
    own = [row for row in rows if row.joined.task == task and not row.data]
    name = own[0].joined.main
    base = next((row.side for row in own if row.reference), own[0].side)
    chosen = ", the best here" if reference == "best" else ""
    subject = [
        f"Compared on {own[0].joined.n:,} {split} images of {own[0].joined.groups:,} groups, each with {base}{chosen}; "
        "intervals are 95 %.",
        *_verdicts(own),
    ]
    return Summary(subject, [_headline(row, name) for row in own][:_HEADLINES], [*caveats], [*steps])


def _verdicts(rows: Sequence[ComparedRow]) -> list[str]:
    """The result in a sentence or two."""
    made = [row for row in rows if row.comparison is not None]
    if len(made) == 1 and made[0].comparison is not None:
        return [made[0].comparison.verdict(made[0].p_value)]
    by_verdict: dict[str, list[str]] = {}
    for row in made:
        by_verdict.setdefault(row.verdict, []).append(row.side)
    return ["; ".join(f"{verdict}: {', '.join(sides)}" for verdict, sides in by_verdict.items()) + "."] if made else []


def _headline(row: ComparedRow, name: str) -> Headline:
    score = row.joined.main_score.pooled
    tone = _tone(row)
    span = score_span(name, score, {})
    span.tone = tone
    low, high = (number_text(name, end) for end in score.interval)
    span.text = "no interval" if math.isnan(score.interval.low) else f"{low} to {high}"
    difference = "" if row.comparison is None else f" ({difference_text(name, row.comparison.difference)})"
    return Headline(
        f"{row.side}: {heading(name)}", number_text(name, score.value), span, f"{row.verdict}{difference}", tone
    )


def _tone(row: ComparedRow) -> str:
    return {"better": "good", "worse": "bad"}.get(row.verdict.partition(" ")[0], "")


def forest_section(rows: Sequence[ComparedRow]) -> Section:
    """Paired differences of the main scores with their intervals, on an axis for each kind of task."""
    section = Section("Differences", paragraphs=["The line in the middle is no difference."])
    made = [row for row in rows if row.comparison is not None]
    for kind in dict.fromkeys(row.joined.task_kind for row in made):
        own = [row for row in made if row.joined.task_kind == kind]
        name = own[0].joined.main
        found = [row.comparison.difference for row in own if row.comparison is not None]
        ends = [abs(end) for one in found for end in (one.value, *one.interval) if not math.isnan(end)]
        most = 1.05 * max(ends, default=1.0) or 1.0
        table = pd.DataFrame(
            {
                "run": row.side,
                **({"data": row.data or "own"} if any(one.data for one in rows) else {}),
                "task": row.joined.task,
                f"difference of {heading(name)} [95 %]": Span(
                    one, difference_text(name, one), (-most, most), 0.0, _tone(row)
                ),
                "verdict": row.verdict,
                "p": "–" if math.isnan(row.p_value) else f"{row.p_value:.3g}",
            }
            for row, one in zip(own, found, strict=True)
        )
        section.tables["differences" if len(section.tables) == 0 else f"differences_{kind}"] = table
    return section


def disagreements_section(
    sides: Sequence[Side], tasks: Sequence[str], split: str, read: ReadImage | None, why_not: str
) -> Section:
    """Images that the sides predict differently, of single runs those of the run, of several those of the first.

    Args:
        sides: at least two, with the same samples.
        tasks: that all predict.
        split: that was predicted.
        read: of the images; None where the data are not there.
        why_not: why they are not.
    """
    section = Section("Images on which they differ", missing=[why_not] if why_not else [])
    shown = sides[:_SIDES]
    if len(sides) > len(shown):
        section.paragraphs.append(f"Of the first {len(shown)} only.")
    if any(len(side.runs) > 1 for side in shown):
        section.paragraphs.append("Of several runs the predictions of the first are shown.")
    for task in tasks:
        table = disagreements(shown, task)
        if not len(table):
            section.paragraphs.append(f"{task}: no image is predicted differently.")
            continue
        name, right = f"differing_{split}_{file_name(task)}", "closest" if "closest" in table else "right"
        section.files[name] = table
        images = {} if read is None else images_of(table, ["target", right], _IMAGES, read)
        is_labels = shown[0].predictions[0].kind(task) == "multi_label"
        facets = {right: f"Who is {right}"} | ({} if right == "closest" or is_labels else {"target": "True class"})
        if read is None:
            section.tables[name] = table
        else:
            section.grids.append(ImageGrid(name, f"{task}: {len(table):,} images", table, facets, "", images))
    return section


def disagreements(sides: Sequence[Side], task: str) -> pd.DataFrame:
    """Return the samples with a known target that not all sides predict alike.

    Columns are ``name``, ``target``, one for each side, and ``right``, the sides that are. Of numbers those with the
    largest spread come first, and ``closest`` is the side with the smallest error.
    """
    first = sides[0].predictions[0]
    names = first.names[first.known(task)]
    parts = [_of_samples(side.predictions[0], names) for side in sides]
    titles = [f"run {side.name}" if side.name in _OWN_COLUMNS else side.name for side in sides]
    if first.kind(task) == "regression":
        values = np.stack([part.values(task) for part in parts], axis=1)
        truth = parts[0].targets[task].astype(np.float64)
        order = np.argsort(-np.ptp(values, axis=1), kind="stable")[: 5 * _IMAGES]
        closest = np.abs(values - truth[:, None]).argmin(axis=1)
        columns = {title: values[order, place] for place, title in enumerate(titles)}
        who = [titles[place] for place in closest[order].tolist()]
        return pd.DataFrame({"name": names[order], "target": truth[order], **columns, "closest": who})
    targets = target_texts(parts[0].targets[task], parts[0].tasks[task])
    answers = [_answers(part, task) for part in parts]
    rows = []
    for name, target, *given in zip(names, targets, *answers, strict=True):
        if len(set(given)) > 1:
            right = [title for title, one in zip(titles, given, strict=True) if one == target]
            rows.append([name, target, *given, ", ".join(right) or "none"])
    # First the images that only some are right about.
    rows.sort(key=lambda row: row[-1] == "none")
    return pd.DataFrame(rows, columns=["name", "target", *titles, "right"])


def _of_samples(predictions: Predictions, names: NDArray[np.object_]) -> Predictions:
    rows = {name: row for row, name in enumerate(predictions.names)}
    return predictions.take(np.array([rows[name] for name in names], np.int64))


def _answers(predictions: Predictions, task: str) -> list[str]:
    """Predictions as texts; labels only where the target is known, so that right ones equal it."""
    if predictions.kind(task) == "multi_label":
        marked = predictions.predicted_labels(task) & (predictions.targets[task] != UNKNOWN)
        codes = marked.astype(np.int64)
    else:
        codes = predictions.predicted(task)
    return [NO_PREDICTION if text is None else text for text in target_texts(codes, predictions.tasks[task])]


def cost_charts(rows: Sequence[ComparedRow], costs: dict[str, Cost]) -> dict[str, Chart]:
    """Draw the main score on the first task against every cost that is known of at least two sides."""
    task, main = rows[0].joined.task, rows[0].joined.main
    shown = [row for row in rows if row.joined.task == task and not row.data]
    scores = [row.joined.main_score.pooled for row in shown]
    charts = {}
    for name, label in COSTS.items():
        values = [float(getattr(costs[row.side], name)) for row in shown]
        if sum(not math.isnan(value) for value in values) > 1:
            labels = (label, f"{heading(main)}, {task}")
            charts[f"pareto_{name}"] = pareto_chart(
                label, [row.side for row in shown], scores, values, labels, lower_is_better=main in LOWER_IS_BETTER
            )
    return charts


def runs_section(sides: Sequence[Side]) -> Section:
    """Where the runs are."""
    runs = pd.DataFrame([{"experiment": side.name, "run": str(run.path)} for side in sides for run in side.runs])
    return Section("Runs", tables={"runs": runs}, is_detail=True)
