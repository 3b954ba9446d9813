"""Sections of a report that are read from a run's files: stages, data, scores, calibration, retrieval, cost.

What cannot be shown is reported as missing, with the command that makes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluation.efficiency import ratio_text, read_efficiency
from evaluation.report.charts import Span, reliability_chart
from evaluation.report.images import ReadImage, mistakes_name, rows_of, small_image, split_text
from evaluation.report.page import MATRIX_CLASSES, Card, Matrix, Section
from evaluation.statistics.calibration import calibration_of, reliability_bins
from evaluation.statistics.intervals import Estimate, Interval, known, share_interval
from evaluation.statistics.scores import LOWER_IS_BETTER, heading
from evaluation.tables.per_class import class_report, confusion_matrix
from evaluation.tables.summary import TaskSummary, flattened, number_text, score_text, share, with_interval
from vitrail.files import read_csv
from vitrail.predictions import Predictions
from vitrail.runs import Run
from vitrail.trust import file_name
from vitrail.types import CLASS_KINDS

if TYPE_CHECKING:
    import pandas as pd

    from evaluation.efficiency import Costs
    from retrieval.gallery import Gallery
    from retrieval.schema import Hit


SETTINGS = ("seed_everything", "model", "data", "trainer.max_epochs", "trainer.callbacks", "checkpoint.monitor")
"""Keys of the configuration that the table has; the folded text has all."""


def run_section(files: Run) -> Section:
    """Stages and commands, and everything that is missing or went wrong."""
    import pandas as pd

    rows = [
        {
            "stage": stage.get("stage", ""),
            "started": str(stage.get("started", ""))[:19],
            "minutes": stage_minutes(stage),
            "ended": stage.get("exit", ""),
            "epochs done": "" if stage.get("epochs") is None else str(stage["epochs"]),
            "best on validation": _best(stage),
        }
        for stage in files.stages
    ]
    commands = dict.fromkeys(str(stage.get("command", "")) for stage in files.stages)
    paragraphs = [f"`{command}`" for command in commands if command]
    tables = {"stages": pd.DataFrame(rows)} if rows else {}
    return Section("Run", paragraphs=paragraphs, tables=tables, missing=list(files.missing), is_detail=True)


def configuration_section(files: Run) -> Section:
    """The settings that matter as a table, and the whole file folded away."""
    import pandas as pd

    flat = flattened(files.config)
    chosen = {
        key.replace(".init_args", "").replace(".class_path", ""): value
        for start in SETTINGS
        for key, value in flat.items()
        if value not in (None, "") and (key == start or key.startswith(f"{start}."))
    }
    if not flat:
        return Section("Configuration", missing=[f"There is no usable {Run.CONFIG} in the run directory."])
    table = pd.DataFrame({"setting": list(chosen), "value": [str(value) for value in chosen.values()]})
    text = (files.path / Run.CONFIG).read_text(encoding="utf-8", errors="replace")
    return Section(
        "Configuration",
        tables={"settings": table} if len(table) else {},
        folded={f"all of {Run.CONFIG}": text},
        is_detail=True,
    )


def environment_section(files: Run) -> Section:
    """Revision, versions, seed and hardware."""
    import pandas as pd

    record = files.record
    if not record:
        return Section("Environment", missing=["Without run.json revision, versions and hardware are unknown."])
    git = record.get("git")
    facts: dict[str, Any] = {"seed": record.get("seed")}
    missing = []
    if isinstance(git, dict):
        facts |= {"git revision": git.get("revision"), "files changed since": git.get("changed_files")}
        if git.get("changed_files"):
            missing.append(
                f"The source had {git['changed_files']} changed files: the revision alone does not reproduce this run."
            )
    else:
        missing.append("The revision of the source is not known: the run was not made in a checkout.")
    facts |= {"python": record.get("python"), **_mapping(record.get("packages"))}
    facts |= {"processes": record.get("processes"), **flattened(_mapping(record.get("hardware")))}
    facts |= {f"model {key}": value for key, value in _mapping(record.get("model")).items()}
    texts = {key: _text(value) for key, value in facts.items() if value is not None}
    table = pd.DataFrame({"what": list(texts), "value": list(texts.values())})
    return Section("Environment", tables={"environment": table} if texts else {}, missing=missing, is_detail=True)


def data_section(files: Run) -> Section:
    """Splits, doubts and skipped images of the data, as the run recorded them."""
    import pandas as pd

    data = _mapping(files.record.get("data"))
    if not data:
        return Section("Data", missing=["The run record has no data (run.json, key data)."])
    samples, groups = _mapping(data.get("samples")), _mapping(data.get("groups"))
    splits = pd.DataFrame(
        [{"split": split, "samples": count, "groups": groups.get(split, "")} for split, count in samples.items()],
        columns=["split", "samples", "groups"],
    )
    missing: list[str] = []
    fingerprint = str(data.get("fingerprint") or "")[:12] or "not recorded"
    names = dict.fromkeys(str(name) for name in (data.get("data"), data.get("origin")) if name)
    paragraphs = [f"{', '.join([*names, f'fingerprint {fingerprint}'])}."]
    if isinstance(data.get("unseen"), dict):
        paragraphs.append(_unseen(_mapping(data["unseen"])))
    else:
        missing.append("The run record does not list values that are missing in training.")
    paragraphs += _doubts(data)
    skipped = data.get("skipped")
    if isinstance(skipped, list):
        paragraphs.append(f"Images left out because they cannot be read: {len(skipped)}.")
    else:
        missing.append("The run record does not list images that were left out.")
    tables = {"data_splits": splits}
    if skipped:
        tables["skipped_images"] = pd.DataFrame(skipped)
    return Section("Data", paragraphs=paragraphs, tables=tables, missing=missing)


def stage_minutes(stage: Mapping[str, Any]) -> float:
    """Return how long a stage took, in minutes; NaN where its end is not known."""
    try:
        started, ended = (datetime.fromisoformat(str(stage[key])) for key in ("started", "ended"))
    except (KeyError, ValueError):
        return float("nan")
    return (ended - started).total_seconds() / 60


def _unseen(unseen: Mapping[str, Any]) -> str:
    found = [
        f"{task} {value!r} ({count} samples)"
        for task, values in unseen.items()
        for value, count in _mapping(values).items()
    ]
    if not found:
        return "Every value of every label that is tested occurs in training."
    return f"Values that are missing in training, left out as unknown: {', '.join(found)}."


def _doubts(data: Mapping[str, Any]) -> list[str]:
    """Missing values, contradicting images and what was left out; old runs recorded nothing."""
    notes = data.get("notes")
    paragraphs = [str(note) for note in notes] if isinstance(notes, list) else []
    texts = [
        f"{column} {text!r} ({count} samples)"
        for column, counts in _mapping(data.get("missing")).items()
        for text, count in _mapping(counts).items()
    ]
    if texts:
        paragraphs.append(f"Counted as unknown (checks.missing): {', '.join(texts)}.")
    identical = _mapping(data.get("identical"))
    repeated = [f"{split} {count}" for split, count in _mapping(identical.get("repeated")).items() if count]
    if repeated:
        paragraphs.append(f"Images that repeat another one of their split: {', '.join(repeated)}.")
    conflicts = [f"{column} {count}" for column, count in _mapping(identical.get("conflicts")).items()]
    if conflicts:
        paragraphs.append(f"Identical images that the data contradict themselves about: {', '.join(conflicts)}.")
    return paragraphs


def _best(stage: Mapping[str, Any]) -> str:
    best = _mapping(stage.get("best"))
    if not isinstance(best.get("score"), (int, float)):
        return ""
    return f"{best.get('monitor', '')} {best['score']:.4f}"


def _text(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        return ", ".join(str(item) for item in value) or "none"
    return str(value)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


FEW = 5
"""Classes with fewer samples are named: their numbers rest on next to nothing."""

_TOP_CONFUSIONS = 10
_TOP_OF_MANY = 200  # where the matrix does not show all classes
_ALWAYS_IN_TOP = 3  # with this many classes every target is among the three largest logits


def scores_section(predictions: Predictions, summaries: Sequence[TaskSummary], split: str) -> Section:
    """Scores of every task with intervals by group, next to those of always predicting the same.

    Args:
        predictions: of the split.
        summaries: of their tasks, as ``summarise`` makes them.
        split: that was predicted.
    """
    import pandas as pd

    kinds = dict.fromkeys(summary.kind for summary in summaries)
    lead = "Intervals are 95 % and hold over other groups (physical objects) where there are any."
    if CLASS_KINDS[0] in kinds:
        lead += " Majority is the accuracy of always predicting the class that is most frequent in training."
    if any(kind != CLASS_KINDS[0] for kind in kinds):
        lead += (
            " Constant is the score of the best prediction that is the same for every image, chosen on the training "
            "data."
        )
    paragraphs = [
        f"{lead} Dashed lines are these baselines.",
        *(sentence for task in predictions.tasks for sentence in _degenerate(predictions, task)),
    ]
    if below := [summary.task for summary in summaries if summary.n and not summary.above_majority]:
        what = "answering the majority class" if set(kinds) <= set(CLASS_KINDS) else "predicting the same"
        paragraphs.append(f"Not shown to be better than always {what}: {', '.join(below)}.")
    tables = {}
    for kind in kinds:
        rows = [_score_row(one, len(predictions.tasks[one.task])) for one in summaries if one.kind == kind]
        table = pd.DataFrame(rows)
        tables[f"scores_{split}{f'_{kind}' if len(kinds) > 1 else ''}"] = (
            table if table["note"].any() else table.drop(columns="note")
        )
    return Section(f"Scores on {split}", paragraphs=paragraphs, tables=tables)


def classes_section(predictions: Predictions, class_counts: Mapping[str, Sequence[int]], split: str) -> Section:
    """Precision, recall and F1 of every class of every task, and which classes have next to no samples."""
    tables: dict[str, pd.DataFrame] = {}
    paragraphs, missing = [], []
    for task, names in predictions.tasks.items():
        rows = known(predictions.targets[task])
        if not len(rows):
            missing.append(f"Of {task!r} no target is known.")
            continue
        tables[f"classes_{split}_{file_name(task)}"] = class_table(predictions, task, class_counts.get(task))
        support = np.bincount(predictions.targets[task][rows], minlength=len(names))
        few = [f"{name} ({count})" for name, count in zip(names, support, strict=True) if 0 < count < FEW]
        absent = [str(name) for name, count in zip(names, support, strict=True) if not count]
        if few:
            paragraphs.append(f"{task}: fewer than {FEW} samples, so their scores mean little: {', '.join(few)}.")
        if absent:
            paragraphs.append(f"{task}: without any sample in {split}, so without recall and F1: {', '.join(absent)}.")
    lead = "The interval of recall is Wilson's with the effective number of samples, which takes groups into account."
    return Section("Classes", paragraphs=[lead, *paragraphs] if tables else paragraphs, tables=tables, missing=missing)


def class_table(predictions: Predictions, task: str, train: Sequence[int] | None = None) -> pd.DataFrame:
    """Return one row a class; NaN where there is nothing to compute a number from, unlike ``class_report``.

    Columns are ``class``, ``recall``, its interval as text, ``precision``, ``f1``, ``samples``, ``groups``,
    ``predicted`` (how often), and ``train`` where known.
    """
    import pandas as pd

    rows = known(predictions.targets[task])
    targets, predicted = predictions.targets[task][rows], predictions.predicted(task)[rows]
    groups = predictions.groups[rows]
    names = [str(name) for name in predictions.tasks[task]]
    confusion = confusion_matrix(targets, predicted, names)
    report = class_report(confusion).iloc[: len(names)]
    times = confusion.to_numpy()[:, : len(names)].sum(axis=0)
    support = report["support"].to_numpy()
    own, right = [targets == label for label in range(len(names))], predicted == targets
    return pd.DataFrame(
        {
            "class": names,
            # On a phone the first columns are seen.
            "recall": np.where(support > 0, report["recall"], np.nan),
            "recall [95 %]": [_bounds(share_interval(right[mask].astype(np.float64), groups[mask])) for mask in own],
            "precision": np.where(times > 0, report["precision"], np.nan),
            "f1": np.where(support > 0, report["f1"], np.nan),
            "samples": support.tolist(),
            "groups": [len(set(groups[mask].tolist())) for mask in own],
            "predicted": times.tolist(),
            **({} if train is None else {"train": list(train)}),
        }
    )


def confusion_section(predictions: Predictions, split: str) -> Section:
    """Confusion matrices, and which classes are taken for which most often."""
    import pandas as pd

    section = Section(
        "Confusions",
        paragraphs=[
            "Rows are targets, columns predictions; the numbers are samples, darker is a larger share of the row. "
            "Choose a mistake to see its images."
        ],
    )
    for task, names in predictions.tasks.items():
        rows = known(predictions.targets[task])
        if not len(rows):
            section.missing.append(f"Of {task!r} no target is known.")
            continue
        counts = confusion_matrix(
            predictions.targets[task][rows], predictions.predicted(task)[rows], [*map(str, names)]
        )
        section.matrices.append(Matrix(f"{task}, n = {len(rows):,}", counts, mistakes_name(task, split)))
        stem = f"confusion_{split}_{file_name(task)}"
        section.files[stem] = counts.rename_axis(columns=None).reset_index()
        wrong = counts.to_numpy() * (1 - np.eye(*counts.shape, dtype=np.int64))
        order = np.argsort(-wrong, axis=None, kind="stable")[
            : _TOP_CONFUSIONS if len(names) <= MATRIX_CLASSES else _TOP_OF_MANY
        ]
        pairs = [(int(row), int(column)) for row, column in zip(*np.unravel_index(order, wrong.shape), strict=True)]
        totals = counts.to_numpy().sum(axis=1)
        top = [
            {
                "target": names[row],
                "predicted": counts.columns[column],
                "samples": int(wrong[row, column]),
                "share of the target": float(wrong[row, column] / totals[row]),
                "task": task,
            }
            for row, column in pairs
            if wrong[row, column]
        ]
        if top:
            section.tables[f"confused_{split}_{file_name(task)}"] = pd.DataFrame(top)
    return section


def calibration_section(predictions: Predictions, temperatures: Mapping[str, float], split: str, run: str) -> Section:
    """How far confidences are from accuracy, before and after temperature scaling."""
    import pandas as pd

    section = Section(
        "Calibration",
        paragraphs=[
            "Confidence is the largest probability. ECE is the mean distance of accuracy from confidence in 15 bins of "
            "equal width; by chance is what a perfectly calibrated model would show with so few samples."
        ],
    )
    table = []
    for task in predictions.tasks:
        rows = known(predictions.targets[task])
        if not len(rows):
            section.missing.append(f"Of {task!r} no target is known.")
            continue
        # As it was trained, and with the temperature that was fitted on validation.
        values = {"T = 1": 1.0} | (
            {f"T = {temperatures[task]:.3g}": temperatures[task]} if task in temperatures else {}
        )
        for number, (name, temperature) in enumerate(values.items()):
            found = calibration_of(predictions, task, temperature)
            bins = reliability_bins(found.confidence, found.correct)
            stem = f"reliability_{split}_{file_name(task)}{'_calibrated' if number else ''}"
            section.charts[stem] = reliability_chart(f"{task}, {name}", bins)
            table.append(
                {
                    "task": task,
                    "T": temperature,
                    "n": len(rows),
                    "accuracy": float(found.correct.mean()),
                    "mean confidence": float(found.confidence.mean()),
                    "ECE [95 %]": with_interval(*found.ece),
                    "by chance": found.by_chance,
                    "ECE, bins of equal mass": found.ece_mass,
                    "NLL": found.nll,
                }
            )
    if table:
        section.tables[f"calibration_{split}"] = pd.DataFrame(table)
    if without := [task for task in predictions.tasks if task not in temperatures]:
        section.missing.append(
            f"Not calibrated: {', '.join(without)}. To fit on validation, run `python -m evaluation calibrate {run}`."
        )
    return section


def _score_row(summary: TaskSummary, num_classes: int) -> dict[str, Any]:
    scores = dict(summary.scores)
    if num_classes <= _ALWAYS_IN_TOP and "top3_accuracy" in scores:
        scores["top3_accuracy"] = Estimate(math.nan, Interval(math.nan, math.nan))
    one_class = summary.kind == "single_label"
    constant = {f"constant {heading(name)}": number_text(name, value) for name, value in summary.constant.items()}
    what = {"single_label": "classes", "ordinal": "classes", "multi_label": "labels", "regression": ""}[summary.kind]
    return {
        "task": summary.task,
        **{f"{heading(name)} [95 %]": score_span(name, one, summary.constant) for name, one in scores.items()},
        **({"majority": share(summary.majority)} if one_class else constant),
        "n": summary.n,
        "groups": summary.groups,
        **({what: num_classes} if what else {}),
        "note": summary.note,
    }


def score_span(name: str, score: Estimate, constant: Mapping[str, float]) -> Span:
    """Return a score as a cell, next to that of always predicting the same where it is known."""
    reference = constant.get(name, math.nan)
    ends = (0.0, 1.0)
    if name in LOWER_IS_BETTER or min(score.value, reference) < 0:
        known = [one for one in (score.value, *score.interval, reference, 0.0) if not math.isnan(one)]
        ends = (min(known), max(known) * 1.05 or 1.0)
    return Span(score, score_text(name, score), ends, reference)


def _degenerate(predictions: Predictions, task: str) -> list[str]:
    """What makes the scores of a task meaningless."""
    rows = known(predictions.targets[task])
    if predictions.kind(task) not in CLASS_KINDS:
        return []
    occur = np.unique(predictions.targets[task][rows])
    if len(occur) != 1:
        return []
    return [
        f"{task}: the only class in the targets is {str(predictions.tasks[task][occur[0]])!r}, so its scores do not "
        "show whether classes are distinguished."
    ]


def _bounds(interval: tuple[float, float]) -> str:
    low, high = interval
    return "–" if np.isnan(low) else f"[{low:.3f}, {high:.3f}]"


_QUERIES, _HITS, _TEXTS = 6, 5, 3


def retrieval_section(
    gallery: Gallery, split: str, task: str, read: ReadImage | None, scores: Path | None, seed: int = 0
) -> Section:
    """Images of different classes and what the run's gallery finds for them, and for their captions."""
    from retrieval.schema import Hit

    rows = rows_of(gallery, split)
    queries = _different(rows, f"label_{task}", seed)
    paragraphs = [
        f"Queries are sampled from {split_text(rows, split)} with seed {seed}, of different classes where there are; "
        f"found are the nearest of the gallery's {len(gallery):,} images by cosine, without the query itself."
    ]
    section = Section("Retrieval examples", paragraphs=paragraphs)
    if scores is not None and scores.is_file():
        section.tables[scores.stem] = read_csv(scores)
    known = gallery.table(["id", "group"]).to_pydict()
    groups = dict(zip(known["id"], known["group"], strict=True))
    vectors = gallery.vectors(queries)
    for number, (query, hits) in enumerate(zip(queries, gallery.nearest(vectors, _HITS + 1), strict=True), start=1):
        others = [hit for hit in hits if hit.id != query][:_HITS]
        same = {hit.id: "the same object" for hit in others if groups[hit.id] == groups[query]}
        cards = _cards(gallery, [Hit(query, 1.0), *others], task, f"retrieval_{number:02}", read, same)
        cards[0].lines[0] = "query"
        if gallery.n_captions():
            [texts] = gallery.nearest_captions(vectors[number - 1 : number], _TEXTS)
            cards[0].lines.extend(f"{hit.score:.3f} “{hit.caption}”" for hit in texts)
        section.cards[query] = cards
    _add_texts(section, gallery, queries, task, read)
    return section


def _add_texts(section: Section, gallery: Gallery, queries: Sequence[str], task: str, read: ReadImage | None) -> None:
    """The first caption of each query that has one, and the images that the gallery finds for it."""
    if not gallery.n_captions():
        return
    from retrieval.store import matrix_of

    captions = gallery.captions_of(queries)
    written = captions.column("image").to_pylist()
    places = [written.index(query) for query in queries if query in written]
    if not places:
        return
    texts = captions.take(places)
    asked = zip(*(texts.column(name).to_pylist() for name in ("image", "caption")), strict=True)
    found = gallery.nearest(matrix_of(texts.column("vector")), _HITS)
    for number, ((image, caption), hits) in enumerate(zip(asked, found, strict=True), start=1):
        if (title := f"“{caption}”") in section.cards:
            continue  # another query has the same caption
        its = {image: "the image that the text is of"}
        section.cards[title] = _cards(gallery, hits, task, f"retrieval_text_{number:02}", read, its)
    section.paragraphs.append(
        "Texts are the first captions of the same images; for them the nearest images are shown, their own one "
        "among all others."
    )


def _cards(
    gallery: Gallery, hits: Sequence[Hit], task: str, stem: str, read: ReadImage | None, notes: dict[str, str]
) -> list[Card]:
    """Images with score and class, and what is noted of some by id."""
    from retrieval.commands.output import look_up

    cards = []
    found = look_up(gallery, [hit.id for hit in hits], [hit.score for hit in hits])
    for place, one in enumerate(found):
        lines = [f"{task}: {one.labels[task]}"] if one.labels.get(task) else []
        if one.id in notes:
            lines.append(notes[one.id])
        image = small_image(one.id, read) or one.thumbnail
        cards.append(Card(f"{stem}_{place:02}", image, [f"{one.score:.3f}", *lines]))
    return cards


def _different(rows: pd.DataFrame, column: str, seed: int) -> list[str]:
    """Sample names of rows, of as many classes as there are."""
    sampled = rows.iloc[np.random.default_rng(seed).permutation(len(rows))]
    if column in sampled:
        firsts = sampled[~sampled[column].duplicated()]
        sampled = sampled.loc[[*firsts.index, *sampled.index.difference(firsts.index, sort=False)]]
    return [str(name) for name in sampled["id"].head(_QUERIES)]


def efficiency_section(files: Run) -> Section:
    """Counts and, for each batch size, latency, throughput and memory."""
    import pandas as pd

    section = Section("Efficiency")
    found = read_efficiency(files)
    if isinstance(found, str):
        section.missing.append(found)
        return section
    counts, costs = found
    counts = {name: value for name, value in counts.items() if value is not None}
    texts = [f"{value:,}" if isinstance(value, int) else str(value) for value in counts.values()]
    section.tables["efficiency_counts"] = pd.DataFrame(
        {"what": [name.replace("_", " ") for name in counts], "value": texts}
    )
    section.paragraphs.append("A multiplication and an addition count as two floating-point operations (flops).")
    if costs is None or costs.error or not costs.batches:
        why = costs.error if costs is not None else ""
        section.missing.append(f"Time and memory were not measured. {why}".strip())
        return section
    section.paragraphs.append(f"Measured on {costs.device}, {costs.threads} threads.")
    section.tables["efficiency_time"] = pd.DataFrame(_time_rows(costs))
    return section


def _time_rows(costs: Costs) -> list[dict[str, Any]]:
    return [
        {
            "batch size": size,
            "rounds": len(one.seconds),
            "p50 [ms]": 1e3 * one.p50,
            "p95 [ms]": 1e3 * one.p95 if len(one.seconds) > 1 else math.nan,
            "images/s": size / one.p50,
            f"time, ratio to {costs.first}": ratio_text(one),
            "peak memory [MB]": math.nan if one.peak_bytes is None else one.peak_bytes / 1e6,
        }
        for size, one in sorted(costs.batches.items())
    ]
