"""Training curves of a run, its phases shaded, from what was logged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluation.figures import plain
from evaluation.html_page import Section
from vitrail.runs import RunFiles

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

SHOWN = ("loss", "accuracy", "f1_macro", "mAP", "mean_recall")
"""Last parts of the names of metrics that are drawn, and that of the monitored one; the table has all."""

_SINGLE = "loss of single tasks"
_COLOURS = ("#3b75af", "#c8553d", "#4f8a5b", "#8a63a8", "#b08a2e", "#3c8f98", "#a3506f", "#6b6b6b")


def curves_section(files: RunFiles) -> Section:
    """Loss, scores and learning rates over the epochs; which epoch was kept and where phases begin."""
    title = "Curves"
    epochs = epoch_table(files.metrics)
    if not len(epochs):
        why = [problem for problem in files.missing if problem.startswith("metrics.csv")]
        trained = any(stage.get("stage") == "fit" for stage in files.stages)
        return Section(
            title, missing=why or ["No epoch was logged." if trained else "Nothing was trained in this run."]
        )
    begins = phase_begins(files.config)
    monitor, best = _best_epoch(files, epochs)
    says = [f"Up to epoch {epochs['epoch'].max():.0f}, counted from 0."]
    says += [
        f"From epoch {begin} on (shaded) the backbone is trained as well ({who})." for begin, who in begins.items()
    ]
    if best is not None:
        says.append(f"The dotted line is the best epoch by {monitor}: {best}.")
    if files.interrupted:
        says.append("Training did not end regularly: the curves are those of what was done.")
    panels = _panels(epochs, monitor)
    rates = learning_rates(files.metrics, epochs)
    figures = {}
    if panels or len(rates.columns) > 1:
        figures["curves"] = curves_figure(epochs, rates, panels, list(begins), best)
    return Section(title, says=says, figures=figures, files={"curves": epochs})


def epoch_table(metrics: pd.DataFrame) -> pd.DataFrame:
    """One row an epoch with all that was logged once an epoch in training and validation.

    Args:
        metrics: of ``RunFiles``.

    Returns:
        float64; ``epoch`` counted from 0, ``step`` the last of the epoch, and columns ``train/…`` and ``val/…``.
    """
    import pandas as pd

    names = [
        name
        for name in metrics.columns
        if name.startswith(("train/", "val/")) and not name.endswith("_step") and metrics[name].notna().any()
    ]
    if "epoch" not in metrics or not names:
        return pd.DataFrame()
    rows = metrics[metrics["epoch"].notna() & metrics[names].notna().any(axis=1)]
    kept = [name for name in ("step", *names) if name in rows]
    # Of an epoch that was logged twice the later values hold.
    return rows.groupby("epoch")[kept].last().reset_index()


def learning_rates(metrics: pd.DataFrame, epochs: pd.DataFrame) -> pd.DataFrame:
    """Learning rates, over the number of epochs done (with fractions) in ``done``."""
    import pandas as pd

    names = [name for name in metrics.columns if name.startswith("lr-") and metrics[name].notna().any()]
    if not names or "step" not in metrics or "step" not in epochs:
        return pd.DataFrame({"done": []})
    rows = metrics.loc[metrics[names].notna().any(axis=1) & metrics["step"].notna(), ["step", *names]]
    ends = epochs[["step", "epoch"]].dropna()
    done = np.interp(rows["step"], [-1.0, *ends["step"]], [0.0, *(ends["epoch"] + 1)])
    return rows[names].assign(done=done)


def phase_begins(config: Mapping[str, Any]) -> dict[int, str]:
    """First epochs of later phases by what the configuration says, each with the callback that says it."""
    trainer = config.get("trainer")
    callbacks = trainer.get("callbacks") if isinstance(trainer, dict) else None
    found = {}
    for callback in callbacks if isinstance(callbacks, list) else []:
        arguments = callback.get("init_args") if isinstance(callback, dict) else None
        epoch = arguments.get("unfreeze_epoch") if isinstance(arguments, dict) else None
        if isinstance(epoch, int):
            found[epoch] = str(callback.get("class_path", "")).rpartition(".")[2]
    return dict(sorted(found.items()))


def curves_figure(
    epochs: pd.DataFrame, rates: pd.DataFrame, panels: Mapping[str, list[str]], begins: list[int], best: int | None
) -> Figure:
    """Draw a panel for each group of metrics and one of the learning rates.

    Args:
        epochs: of ``epoch_table``.
        rates: of ``learning_rates``.
        panels: columns of ``epochs`` by heading.
        begins: first epochs of later phases.
        best: epoch that was kept.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    own = [name for name in rates.columns if name != "done"]
    count = len(panels) + bool(own)
    figure = Figure(figsize=(9, 2.9 * -(-count // 2)), dpi=110, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(-(-count // 2), 2, squeeze=False).ravel()
    for place, (heading, names) in zip(axes, panels.items(), strict=False):
        _draw(place, heading, epochs["epoch"].to_numpy() + 1, epochs[names])
    if own:
        _draw(axes[count - 1], "learning rate", rates["done"].to_numpy(), rates[own].rename(columns=lambda n: n[3:]))
    last = float(epochs["epoch"].max()) + 1
    for place in axes[:count]:
        place.set_xlim(0, last)
        place.set_xlabel("epochs done")
        for begin in begins:
            place.axvspan(begin, max(last, begin), color="#3b75af", alpha=0.09, linewidth=0)
        if best is not None:
            place.axvline(best + 1, color="0.4", linestyle=":", linewidth=1)
    for place in axes[count:]:
        place.set_axis_off()
    return figure


def _panels(epochs: pd.DataFrame, monitor: str) -> dict[str, list[str]]:
    """Columns by last part of their name; losses of single tasks apart from the sum."""
    shown = [*SHOWN, monitor.rpartition("/")[2]] if monitor else list(SHOWN)
    panels: dict[str, list[str]] = {}
    for name in epochs.columns:
        split, _, rest = name.partition("/")
        last = rest.rpartition("/")[2]
        if split in ("train", "val") and last in shown:
            panels.setdefault(_SINGLE if last == "loss" != rest else last, []).append(name)
    order = ["loss", _SINGLE, *shown]
    return dict(sorted(panels.items(), key=lambda item: order.index(item[0])))


def _draw(axes: Any, heading: str, done: Any, values: pd.DataFrame) -> None:
    stems = list(dict.fromkeys(name.partition("/")[2] or name for name in values.columns))
    for name in values.columns:
        stem = name.partition("/")[2] or name
        colour = _COLOURS[stems.index(stem) % len(_COLOURS)]
        told = values[name].notna().to_numpy()
        style = "--" if name.startswith("train/") else "-"
        axes.plot(
            done[told],
            values[name][told],
            style,
            color=colour,
            marker=".",
            markersize=3,
            label=plain(name),
            linewidth=1.3,
        )
    axes.set_title(plain(heading), fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=6.5, frameon=False)


def _best_epoch(files: RunFiles, epochs: pd.DataFrame) -> tuple[str, int | None]:
    """The monitored metric, and the epoch whose value is the best that the record has."""
    fits = [
        stage["best"] for stage in files.stages if stage.get("stage") == "fit" and isinstance(stage.get("best"), dict)
    ]
    if not fits:
        return "", None
    monitor, score = str(fits[-1].get("monitor", "")), fits[-1].get("score")
    if monitor not in epochs or not isinstance(score, (int, float)):
        return monitor, None
    near = epochs.loc[np.isclose(epochs[monitor], score, rtol=1e-6, atol=1e-9), "epoch"]
    return monitor, int(near.iloc[0]) if len(near) else None
