"""What a sweep writes: a table, ``sweep.csv``, ``importance.png``, and the best trial's configuration to fit again."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
import yaml
from optuna.trial import FrozenTrial, TrialState

from evaluation.statistics.base_to_novel import over_seeds
from evaluation.statistics.intervals import half_width
from evaluation.statistics.pooled import JoinedScore, join_runs
from experiments.launch.study import ERROR, NAME, RUN, VALUES
from experiments.launch.sweep_file import Metric
from vitrail.config import load_dumped
from vitrail.console import Table
from vitrail.files import write_csv, write_text_atomically
from vitrail.runs import Run, class_counts_of
from vitrail.types import LABEL_TASK

if TYPE_CHECKING:
    import pandas as pd

SEED = "seed_everything"
"""The parameter whose values are repetitions of the others'."""

EPOCHS, CONFIG, BEST_VALUE = "epochs", "config", "best"
"""Names under which a trial keeps what is known of it."""

_STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


def best_trial(trials: Sequence[FrozenTrial], metric: Metric) -> FrozenTrial | None:
    """Return the complete trial with the best metric, the earliest of equal ones; None where none is complete."""
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    return min(complete, key=lambda trial: (metric.sign * value_of(trial), trial.number), default=None)


def value_of(trial: FrozenTrial) -> float:
    """Return the best value of the metric over a trial's epochs; NaN where it never came to one."""
    value = trial.value if trial.state == TrialState.COMPLETE else trial.user_attrs.get(BEST_VALUE)
    return float("nan") if value is None else float(value)


def sweep_frame(trials: Sequence[FrozenTrial], metric: Metric) -> pd.DataFrame:
    """Return one row a trial, complete ones first, the best first.

    Columns are ``trial``, ``state``, the metric, ``epochs``, the parameters, ``run`` and ``error``.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    ranks = list(_STATES)
    for trial in sorted(trials, key=lambda t: (ranks.index(t.state), metric.sign * value_of(t), t.number)):
        known = trial.user_attrs
        rows.append(
            {
                "trial": known.get(NAME),
                "state": _STATES[trial.state],
                metric.name: value_of(trial),
                "epochs": known.get(EPOCHS),
                **known.get(VALUES, {}),
                "run": known.get(RUN),
                "error": known.get(ERROR),
            }
        )
    frame = pd.DataFrame(rows)
    last = ["run", "error"]
    return frame[[*(column for column in frame.columns if column not in last), *last]] if rows else frame


def trials_table(frame: pd.DataFrame, title: str) -> Table:
    """Return the trials, the best one in bold; a failed one has the reason in place of its directory."""
    columns = [str(column) for column in frame.columns if column != "error"]
    records = frame.to_dict("records")
    for row in records:
        row["run"] = row["error"] if row["state"] == "failed" else row["run"]
    rows = [[_cell(row[column]) for column in columns] for row in records]
    styles = {number: "dim" for number, row in enumerate(records) if row["state"] != "complete"}
    return Table(columns, rows, ("trial", "state", "run"), title, styles={0: "bold", **styles} if rows else {})


def over_seeds_frame(trials: Sequence[FrozenTrial], metric: Metric) -> pd.DataFrame | None:
    """Return one row for each combination of the other parameters, where ``seed_everything`` is one of several.

    Columns are the parameters, ``seeds``, and for each score its mean, ``± seeds`` (half of Student's 95 % interval
    over seeds) and, of the test split, ``low`` and ``high`` (the 95 % interval by group). Trials that were tested have
    ``test``, the main score of the main task; those without training images of the second half of the classes also have
    ``base``, ``novel`` and ``harmonic_mean``.
    """
    import pandas as pd

    groups: dict[str, list[FrozenTrial]] = {}
    for trial in trials:
        values = dict(trial.user_attrs.get(VALUES, {}))
        if trial.state == TrialState.COMPLETE and values.pop(SEED, None) is not None:
            groups.setdefault(json.dumps(values, sort_keys=True), []).append(trial)
    if not any(len(members) > 1 for members in groups.values()):
        return None
    rows = []
    for key, members in groups.items():
        row = {**json.loads(key), "seeds": len(members)}
        own = [value_of(trial) for trial in members]
        row |= {metric.name: float(np.mean(own)), f"{metric.name} ± seeds": half_width(own)}
        for name, score in _tested_scores(members).items():
            low, high = score.pooled.interval
            row |= {name: score.mean, f"{name} ± seeds": half_width(score.values)}
            row |= {f"{name} low": low, f"{name} high": high}
        rows.append(row)
    return pd.DataFrame(rows)


def _tested_scores(members: Sequence[FrozenTrial]) -> dict[str, JoinedScore]:
    """Scores of the test split over the seeds; none unless all trials were tested."""
    paths = [Path(trial.user_attrs[RUN]) for trial in members if trial.user_attrs.get(RUN)]
    runs = [Run(path) for path in paths if path.is_dir()]
    predictions = [found for run in runs if (found := run.predictions("test")) is not None]
    if not predictions or len(predictions) < len(members):
        return {}
    task = next(iter(predictions[0].tasks))
    scores = {"test": join_runs(predictions, task).main_score}
    classes = {task: list(predictions[0].tasks[task])}
    counts = (class_counts_of(runs[0].record, classes, str(runs[0].path)) or {}).get(task)
    base = (len(classes[task]) + 1) // 2
    if task == LABEL_TASK and counts and all(counts[:base]) and not any(counts[base:]):
        scores |= over_seeds(predictions, base)
    return scores


def write_reports(folder: Path, study: optuna.Study, trials: Sequence[FrozenTrial], metric: Metric, runs: Path) -> str:
    """Write ``sweep.csv``, ``best.yaml``, ``importance.csv`` and ``importance.png``, each atomically.

    Returns:
        Lines with their paths, or why one is missing.
    """
    write_csv(folder / "sweep.csv", sweep_frame(trials, metric))
    lines = [f"Table: {folder / 'sweep.csv'}"]
    if (seeds := over_seeds_frame(trials, metric)) is None:
        (folder / "seeds.csv").unlink(missing_ok=True)
    else:
        write_csv(folder / "seeds.csv", seeds)
        lines.append(f"Over seeds: {folder / 'seeds.csv'}")
    best = best_trial(trials, metric)
    path = folder / "best.yaml"
    if best is None:
        # Those of an earlier sweep may be there.
        for name in ("best.yaml", "importance.csv", "importance.png"):
            (folder / name).unlink(missing_ok=True)
        return "\n".join(lines)
    write_text_atomically(path, _best_config(best, folder.name, metric, runs))
    result = f"{best.user_attrs[NAME]}, {metric.name} {value_of(best):.4g}"
    lines.append(f"Best: {result}; python -m experiments fit --config {path}")
    why = _importance(folder, study, trials, metric)
    lines.append(f"Importance: {why or folder / 'importance.png'}")
    return "\n".join(lines)


def _best_config(best: FrozenTrial, name: str, metric: Metric, runs: Path) -> str:
    """The trial's whole configuration with a name of its own, so that its next run is not put among the trials."""
    config = load_dumped(best.user_attrs[CONFIG])
    config |= {"name": f"{name}_best", "runs": str(runs)}
    values = ", ".join(f"{key} {value}" for key, value in best.user_attrs[VALUES].items())
    head = f"# The best of the sweep {name}: {best.user_attrs[NAME]}, {metric.name} {value_of(best):.6g} with {values}."
    return f"{head}\n{yaml.safe_dump(config, sort_keys=False, allow_unicode=True)}"


def _importance(folder: Path, study: optuna.Study, trials: Sequence[FrozenTrial], metric: Metric) -> str | None:
    """Write how much of the metric's variance each parameter explains; or return why there is none."""
    import pandas as pd
    from matplotlib.figure import Figure

    from evaluation.report.figures import plain, save_figure

    # Those of an earlier sweep may be there.
    for name in ("importance.csv", "importance.png"):
        (folder / name).unlink(missing_ok=True)
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    if len(complete) < 2:
        return "one complete trial does not show what matters, so there is no plot"
    if len({trial.value for trial in complete}) == 1:
        return f"{metric.name} is the same in all complete trials, so there is no plot"
    varied = [name for name in complete[0].params if len({trial.params.get(name) for trial in complete}) > 1]
    if not varied:
        return "all complete trials had the same values, so there is no plot"
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    try:
        shares = optuna.importance.get_param_importances(study, evaluator=evaluator, params=varied)
    except RuntimeError as error:
        # Optuna's word for values that differ by rounding only.
        if "zero total variance" not in str(error):
            raise
        return f"{metric.name} is the same in all complete trials, so there is no plot"
    frame = pd.DataFrame({"parameter": list(shares), "importance": list(shares.values())})
    write_csv(folder / "importance.csv", frame)
    figure = Figure(figsize=(6, 1.4 + 0.4 * len(frame)), layout="constrained")
    axes = figure.add_subplot()
    bars = axes.barh([plain(name) for name in frame["parameter"][::-1]], frame["importance"][::-1])
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.set(
        xlim=(0, 1.1), xlabel="share of the variance (fANOVA)", title=plain(f"{metric.name}, {len(complete)} trials")
    )
    save_figure(figure, folder / "importance.png")
    return None


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
