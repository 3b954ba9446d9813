"""Reliability diagrams: confidence against accuracy, and how many samples have which confidence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluation.calibration import ReliabilityBins
from evaluation.figures import plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BLUE, _RED = "#3b75af", "#c8553d"


def reliability_figure(panels: Mapping[str, ReliabilityBins], title: str) -> Figure:
    """Draw one diagram a panel, side by side.

    Bars are the accuracy of each bin; the red piece up or down to the dot is its gap to the mean confidence. Below is
    the share of samples in each bin.

    Args:
        panels: bins by heading, such as "before" and "after".
        title: shown above all.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(0.4 + 3.6 * len(panels), 5.4), dpi=110, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(plain(title), fontsize=11)
    axes = figure.subplots(
        2, len(panels), squeeze=False, sharex=True, sharey="row", gridspec_kw={"height_ratios": [3, 1]}
    )
    for column, (heading, bins) in enumerate(panels.items()):
        _draw_diagram(axes[0][column], bins, heading)
        _draw_counts(axes[1][column], bins)
    axes[0][0].set_ylabel("accuracy")
    axes[1][0].set_ylabel("share of samples")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8, frameon=False)
    return figure


def _draw_diagram(axes: Any, bins: ReliabilityBins, heading: str) -> None:
    filled = bins.count > 0
    left, width = bins.edges[:-1][filled], np.diff(bins.edges)[filled]
    accuracy, confidence = bins.accuracy[filled], bins.confidence[filled]
    axes.plot([0, 1], [0, 1], color="0.5", linestyle="--", linewidth=1, label="perfect")
    axes.bar(left, accuracy, width, align="edge", color=_BLUE, alpha=0.75, edgecolor="white", label="accuracy")
    axes.vlines(confidence, accuracy, confidence, color=_RED, linewidth=2, label="gap")
    axes.plot(confidence, confidence, ".", color=_RED, markersize=7, label="mean confidence")
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    axes.set_title(plain(heading), fontsize=10)


def _draw_counts(axes: Any, bins: ReliabilityBins) -> None:
    shares = bins.count / max(1, int(bins.count.sum()))
    axes.bar(bins.edges[:-1], shares, np.diff(bins.edges), align="edge", color="0.6", edgecolor="white")
    axes.set_xlabel("confidence")
