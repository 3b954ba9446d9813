"""Figures of results for run directories and trackers, without a display or matplotlib's global state.

Pages draw their own charts (``charts``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluation.statistics.calibration import ReliabilityBins
from vitrail.files import write_atomically

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


MAX_ANNOTATED = 30
"""Classes up to which cells show their numbers, not only colours."""

_LONGEST_NAME = 28
_BLUE, _RED = "#3b75af", "#c8553d"


def blank_figure(width: float, height: float, dpi: int = 110) -> Figure:
    """Return an empty figure of a size in inches, on white, so that it is readable on light and dark pages."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def confusion_figure(matrix: pd.DataFrame, title: str, names: tuple[str, str] = ("target", "predicted")) -> Figure:
    """Draw a confusion matrix, raw (whole numbers) or normalised (shares), from one class to a few hundred.

    Args:
        matrix: rows are the C targets, columns the predictions, as ``per_class.confusion_matrix`` makes them; NaN
            rows (classes without a target) stay grey.
        title: above the matrix.
        names: of rows and columns.
    """
    from matplotlib.colors import PowerNorm

    size = max(matrix.shape)
    # Inches: a cell never gets too small for its name at the smallest readable font (about 5.5 points).
    cell = float(np.clip(9.0 / size, 0.11, 0.75))
    font = float(np.clip(cell * 72 * 0.62, 5.5, 10.0))
    classes = [short(str(name), _LONGEST_NAME) for name in matrix.columns]
    figure, axes, bar = _places(max(cell * size, 2.2), classes, font, names, has_numbers=size <= MAX_ANNOTATED)
    values = matrix.to_numpy(dtype=np.float64)
    is_share = not all(np.issubdtype(kind, np.integer) for kind in matrix.dtypes)
    highest = 1.0 if is_share else max(1.0, float(np.nanmax(values, initial=0.0)))
    axes.set_facecolor("0.85")
    # Without numbers, rare confusions are visible by their colour only: a root scale lifts them.
    norm = PowerNorm(1.0 if size <= MAX_ANNOTATED else 0.5, vmin=0.0, vmax=highest)
    image = axes.imshow(values, cmap="Blues", norm=norm, interpolation="nearest")
    ticks = [plain(name) for name in classes]
    axes.set_xticks(range(size), ticks, rotation=90, fontsize=font)
    axes.set_yticks(range(len(matrix)), ticks[: len(matrix)], fontsize=font)
    axes.set_title(plain(title), fontsize=11, y=1.0)
    if bar is not None:
        figure.colorbar(image, cax=bar)
    else:
        _annotate(axes, values, highest, is_share, min(font, cell * 72 * (0.36 if is_share else 0.42)))
    return figure


def _places(
    side: float, classes: Sequence[str], font: float, names: tuple[str, str], has_numbers: bool
) -> tuple[Figure, Axes, Axes | None]:
    """A figure with room for a square of ``side`` inches, for the names left of it and below, and for a colour bar.

    Cells that show their numbers need no bar.

    The room follows from the longest name. Matplotlib's own layouts measure every name several times, which takes
    most of the time that a figure needs.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties

    dpi = 110 if has_numbers else 140
    figure = Figure(dpi=dpi)
    renderer = FigureCanvasAgg(figure).get_renderer()
    properties = FontProperties(size=font)
    longest = max(renderer.get_text_width_height_descent(name, properties, ismath=False)[0] for name in classes) / dpi
    edge, above, beyond = longest + 0.45, 0.4, 0.5 if has_numbers else 0.9
    width, height = edge + side + beyond, edge + side + above
    figure.set_size_inches(width, height)
    axes = figure.add_axes((edge / width, edge / height, side / width, side / height))
    figure.text((edge + side / 2) / width, 0.08 / height, names[1], ha="center", va="bottom")
    figure.text(0.08 / width, (edge + side / 2) / height, names[0], ha="left", va="center", rotation=90)
    if has_numbers:
        return figure, axes, None
    return figure, axes, figure.add_axes(((edge + side + 0.15) / width, edge / height, 0.16 / width, side / height))


def plain(text: str) -> str:
    """Escape a text for Matplotlib, which reads formulas between dollar signs and leaves ``_names`` out of legends."""
    escaped = text.replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically."""
    with write_atomically(path) as partial:
        # Half the time of the best compression, and files that are hardly larger.
        figure.savefig(partial, format="png", pil_kwargs={"compress_level": 3})


def _annotate(axes: Any, values: Any, highest: float, is_share: bool, font: float) -> None:
    """Write the number into each cell that is not empty, in white where the cell is dark."""
    for row, column in zip(*np.nonzero(np.nan_to_num(values)), strict=True):
        value = float(values[row, column])
        text = f"{value:.2f}".removeprefix("0") if is_share else f"{value:.0f}"
        colour = "white" if value > 0.55 * highest else "black"
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=font)


def short(text: str, longest: int = 30) -> str:
    """Cut a text that is too long."""
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def reliability_figure(panels: Mapping[str, ReliabilityBins], title: str, score: str = "accuracy") -> Figure:
    """Draw a diagram for each of several bins by heading, such as "before" and "after".

    Bars are the accuracy (or ``score``) of each bin; the red piece up or down to the dot is its gap to the mean
    confidence. Below is the share of samples in each bin.
    """
    figure = blank_figure(0.4 + 3.6 * len(panels), 5.4)
    figure.suptitle(plain(title), fontsize=11)
    axes = figure.subplots(
        2, len(panels), squeeze=False, sharex=True, sharey="row", gridspec_kw={"height_ratios": [3, 1]}
    )
    for column, (heading, bins) in enumerate(panels.items()):
        _draw_diagram(axes[0][column], bins, heading, score)
        _draw_counts(axes[1][column], bins)
    axes[0][0].set_ylabel(score)
    axes[1][0].set_ylabel("share of samples")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8, frameon=False)
    return figure


def _draw_diagram(axes: Any, bins: ReliabilityBins, heading: str, score: str) -> None:
    filled = bins.count > 0
    left, width = bins.edges[:-1][filled], np.diff(bins.edges)[filled]
    accuracy, confidence = bins.accuracy[filled], bins.confidence[filled]
    axes.plot([0, 1], [0, 1], color="0.5", linestyle="--", linewidth=1, label="perfect")
    axes.bar(left, accuracy, width, align="edge", color=_BLUE, alpha=0.75, edgecolor="white", label=score)
    axes.vlines(confidence, accuracy, confidence, color=_RED, linewidth=2, label="gap")
    axes.plot(confidence, confidence, ".", color=_RED, markersize=7, label="mean confidence")
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    axes.set_title(plain(heading), fontsize=10)


def _draw_counts(axes: Any, bins: ReliabilityBins) -> None:
    shares = bins.count / max(1, int(bins.count.sum()))
    axes.bar(bins.edges[:-1], shares, np.diff(bins.edges), align="edge", color="0.6", edgecolor="white")
    axes.set_xlabel("confidence")
