"""The summary of a run on one screen: what was trained on what, how good it is, how sure that is, what to do next."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from evaluation.report.charts import Span
from evaluation.report.page import Headline, Section, Summary
from evaluation.report.sections import score_span, stage_minutes
from evaluation.retrieval import BOTH, MEAN_RECALL, Row
from evaluation.statistics.intervals import FEW_GROUPS, Estimate, Interval
from evaluation.statistics.scores import heading
from evaluation.tables.summary import TaskSummary, number_text
from vitrail.types import CLASS_KINDS

if TYPE_CHECKING:
    from vitrail.runs import Run

HEADLINES = 6
"""Numbers of a summary at most."""

_ITEMS = 4  # of each list: the rest is in the sections
_WRONG_CONFIDENCE = 0.05  # distance of mean confidence from accuracy that is worth a sentence


def run_summary(
    files: Run, split: str, summaries: Sequence[TaskSummary], retrieval: Sequence[Row], sections: Sequence[Section]
) -> Summary:
    """Summarise a run.

    Args:
        files: the run.
        split: that was predicted.
        summaries: of its tasks on the split; empty where there are no predictions.
        retrieval: scores of the split's retrieval; empty where there are none.
        sections: of the report, for what they found and lack.
    """
    headlines = [*_retrieval(retrieval), *(_headline(one) for one in summaries if one.n)]
    return Summary(
        [_subject(files), _evaluated(files, split, summaries)],
        headlines[:HEADLINES],
        [*_caveats(files, split, summaries), *_found(sections)][: _ITEMS + 1],
        _steps(files, split, summaries, sections)[:_ITEMS],
    )


def model_text(files: Run) -> str:
    """Return what a run's model is, such as ``ImageClassifier with resnet18, 11.2 M parameters``."""
    model = files.record.get("model")
    recorded: Mapping[str, Any] = model if isinstance(model, dict) else {}
    configured = files.config.get("model")
    arguments = configured.get("init_args") if isinstance(configured, dict) else None
    arguments = arguments if isinstance(arguments, dict) else {}
    backbone = next(
        (arguments[key] for key in ("backbone", "image_backbone", "model") if isinstance(arguments.get(key), str)), ""
    )
    name = str(recorded.get("class") or (configured or {}).get("class_path", "") or "A model").rpartition(".")[2]
    count = recorded.get("parameters")
    size = ""
    if isinstance(count, int):
        size = f", {count / 1e6:.3g} M parameters" if count >= 1e6 else f", {count / 1e3:.3g} k parameters"
    return f"{name}{f' with {backbone}' if backbone else ''}{size}"


def _subject(files: Run) -> str:
    data = files.record.get("data")
    facts: Mapping[str, Any] = data if isinstance(data, dict) else {}
    samples = facts.get("samples")
    count = samples.get("train") if isinstance(samples, dict) else None
    fits = [stage for stage in files.stages if stage.get("stage") == "fit"]
    minutes = sum(stage_minutes(stage) for stage in fits)
    text = model_text(files)
    if facts.get("data"):
        what = "trained on" if fits else "evaluated on"
        images = f" ({count:,} training images)" if isinstance(count, int) and fits else ""
        text += f", {what} {facts['data']}{images}"
    if fits and not math.isnan(minutes):
        text += f" in {minutes:.0f} minutes" if minutes >= 1.5 else f" in {60 * minutes:.0f} seconds"
    if files.record.get("seed") is not None:
        text += f", seed {files.record['seed']}"
    begun = str(files.stages[0].get("started", ""))[:16].replace("T", " ") if files.stages else ""
    return f"{text}{f'; started {begun}' if begun else ''}."


def _evaluated(files: Run, split: str, summaries: Sequence[TaskSummary]) -> str:
    if not summaries:
        return f"How good it is on {split} is not known: {files.problem_of(split)}."
    most = max(summaries, key=lambda one: one.n)
    groups = f" of {most.groups:,} groups" if most.groups != most.n else ""
    return f"Evaluated on {most.n:,} {split} images{groups}; intervals are 95 %, dashed lines the baseline."


def _headline(summary: TaskSummary) -> Headline:
    name = summary.main
    baseline = number_text(name, summary.majority)
    what = f"always predicting {summary.majority_label!r}" if summary.kind in CLASS_KINDS else "a constant prediction"
    if math.isnan(summary.majority):
        verdict, tone = "", ""
    elif summary.above_majority:
        verdict, tone = f"Better than {what}: {baseline}.", "good"
    else:
        verdict, tone = f"Not shown to be better than {what}: {baseline}.", "bad"
    span = score_span(name, summary.main_score, summary.constant)
    span.tone = tone
    interval = summary.main_score.interval
    low, high = (number_text(name, end) for end in interval)
    span.text = "no interval" if math.isnan(interval.low) else f"{low} to {high}"
    return Headline(
        f"{summary.task}: {heading(name)}", number_text(name, summary.main_score.value), span, verdict, tone
    )


def _retrieval(rows: Sequence[Row]) -> list[Headline]:
    found = []
    for row in rows:
        if (row.metric, row.direction) == (MEAN_RECALL, BOTH) or row.metric == "R@1":
            way = "image and text retrieval" if row.direction == BOTH else row.direction.replace("_", " ")
            span = Span(
                Estimate(row.value, Interval(row.low, row.high)),
                f"{row.low:.3f} to {row.high:.3f}",
                (0.0, 1.0),
                tone="",
            )
            name = "mean recall" if row.metric == MEAN_RECALL else row.metric
            found.append(Headline(f"{way}: {name}", f"{row.value:.3f}", span, f"Of {row.n:,} queries."))
    return sorted(found, key=lambda one: "mean recall" not in one.label)


def _caveats(files: Run, split: str, summaries: Sequence[TaskSummary]) -> list[str]:
    found = []
    if files.interrupted:
        found.append("Training was interrupted: these are the numbers of an unfinished run.")
    if other := files.other_checkpoint(split):
        found.append(f"The predictions are of checkpoint {other}, not of the best one.")
    known = [one for one in summaries if one.n]
    if known and (least := min(one.groups for one in known)) < 4 * FEW_GROUPS:
        found.append(f"The intervals rest on {least} groups only.")
    found += [f"{one.task}: {one.note}." for one in known if one.note]
    if known and len({one.n for one in known}) >= 1 and files.stages:
        found.append("One training: another seed may end elsewhere; the intervals are of this model.")
    git = files.record.get("git")
    if isinstance(git, dict) and git.get("changed_files"):
        found.append(
            f"The source had {git['changed_files']} changed files, so its revision alone does not reproduce it."
        )
    return found


def _found(sections: Sequence[Section]) -> list[str]:
    """What calibration tables and others show."""
    found = []
    for section in sections:
        for name, table in section.tables.items():
            if name == "findings" and len(grave := table[table["severity"] == "high"]):
                counts = ", ".join(f"{row['images']:,} {row['finding']}" for row in grave.to_dict("records"))
                found.append(f"The audit found what makes results wrong: {counts}.")
            if name.startswith("calibration_") and {"mean confidence", "accuracy", "T"} <= set(table):
                row = table[table["task"] == table["task"].iloc[0]].iloc[-1]
                excess = row["mean confidence"] - row["accuracy"]
                if abs(excess) > _WRONG_CONFIDENCE:
                    found.append(
                        f"{row['task']}: confidences are too {'high' if excess > 0 else 'low'}, on average "
                        f"{row['mean confidence']:.2f} with an accuracy of {row['accuracy']:.2f}."
                    )
    return found


def _steps(files: Run, split: str, summaries: Sequence[TaskSummary], sections: Sequence[Section]) -> list[str]:
    """What to do next: what is not better than nothing, the commonest mistake, and what is not measured yet."""
    steps = []
    if bad := [one.task for one in summaries if one.n and not one.above_majority]:
        steps.append(
            f"Find out why {', '.join(bad[:3])} cannot be predicted: look at labels and images with "
            f"`vitrail explore --config {files.path / files.CONFIG} --to explored`."
        )
    for section in sections:
        for name, table in section.tables.items():
            if name.startswith("confused_") and len(table):
                row = table.iloc[0]
                steps.append(
                    f"Look at the commonest mistake: {row['target']} taken for {row['predicted']} ({row['samples']} of "
                    f"{row['task']}, {row['share of the target']:.0%} of its images)."
                )
                break
        else:
            continue
        break
    wanted = [text for section in sections for text in section.missing if re.search("`(?!pip)[^`]+`", text)]
    return [*steps, *dict.fromkeys(wanted)]
