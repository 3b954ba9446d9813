"""Score against cost, and which models no other beats in both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from evaluation.figures import plain
from evaluation.statistics import Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BLUE, _GREY = "#3b75af", "#8a8f98"


def on_the_front(cost: NDArray[np.float64], score: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which points no other beats: none costs at most as much and scores at least as high, one of both strictly.

    Args:
        cost: float64 ``(N,)``, lower is better.
        score: float64 ``(N,)``, higher is better.

    Returns:
        bool ``(N,)``; False where one of both is NaN.
    """
    usable = ~(np.isnan(cost) | np.isnan(score))
    no_worse = (cost[:, None] <= cost[None, :]) & (score[:, None] >= score[None, :])
    better = (cost[:, None] < cost[None, :]) | (score[:, None] > score[None, :])
    beaten = np.any(no_worse & better & usable[:, None], axis=0)
    front: NDArray[np.bool_] = np.logical_and(usable, np.logical_not(beaten))
    return front


def pareto_figure(
    names: Sequence[str], scores: Sequence[Estimate], costs: Mapping[str, Sequence[float]], score_name: str
) -> Figure:
    """Draw a panel for each cost, with the scores' intervals; models have numbers, told below.

    Points on the front are blue and joined; a model beaten by chance alone is grey all the same, so the intervals are
    to be read with it.

    Args:
        names: of N models.
        scores: of each.
        costs: N values by label of the axis, at least one label; NaN where not known.
        score_name: label of the scores' axis.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = (0.3 + 4.4 * max(2, len(costs)), 3.6 + 0.2 * len(names))
    figure = Figure(figsize=size, dpi=110, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(costs), squeeze=False, sharey=True)[0]
    for axes, (label, values) in zip(panels, costs.items(), strict=True):
        _draw(axes, scores, np.asarray(values, dtype=np.float64))
        axes.set_xlabel(plain(label))
    panels[0].set_ylabel(plain(score_name))
    listed = "\n".join(f"{number}  {name}" for number, name in enumerate(names, start=1))
    figure.supxlabel(plain(listed), fontsize=8, x=0.02, ha="left")
    return figure


def _draw(axes: Any, scores: Sequence[Estimate], cost: NDArray[np.float64]) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    score = np.array([estimate.value for estimate in scores])
    front = on_the_front(cost, score)
    order = [place for place in np.argsort(cost, kind="stable") if front[place]]
    axes.plot(cost[order], score[order], color=_BLUE, linewidth=1, alpha=0.6, drawstyle="steps-post")
    for place, (value, (low, high)) in enumerate(scores):
        if np.isnan(cost[place]) or np.isnan(value):
            continue
        colour = _BLUE if front[place] else _GREY
        axes.vlines(cost[place], low, high, color=colour, linewidth=1)
        axes.plot(cost[place], value, "o", color=colour, markersize=5)
        axes.annotate(
            str(place + 1), (cost[place], value), xytext=(5, 4), textcoords="offset points", fontsize=8, color="0.2"
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25)
    axes.margins(x=0.25)
