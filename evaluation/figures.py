"""Figures of evaluation results, drawn without a display and without matplotlib's global state."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluation.artefacts import written_whole

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

MAX_ANNOTATED = 30
"""Up to so many classes every cell shows its number; beyond, only the colours."""

_LONGEST_NAME = 28


def confusion_figure(matrix: pd.DataFrame, title: str) -> Figure:
    """Draw a confusion matrix, raw (whole numbers) or normalised (shares), from one class to a few hundred.

    Args:
        matrix: ``(C, C)``, rows are targets, columns predictions; NaN rows (classes without a target) stay grey.
        title: Shown above the matrix.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    size = len(matrix)
    # Inches: a cell never gets too small for its name at the smallest readable font (about 5.5 points).
    cell = float(np.clip(9.0 / size, 0.11, 0.75))
    names = [_short(str(name)) for name in matrix.index]
    margin = 0.9 + 0.075 * max(len(name) for name in names) * float(np.clip(30 / size, 0.75, 1.1))
    side = max(cell * size, 2.2)
    figure = Figure(
        figsize=(side + margin + 1.0, side + margin + 0.6),
        dpi=110 if size <= MAX_ANNOTATED else 140,
        layout="constrained",
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    values = matrix.to_numpy(dtype=np.float64)
    is_share = not all(np.issubdtype(kind, np.integer) for kind in matrix.dtypes)
    highest = 1.0 if is_share else max(1.0, float(np.nanmax(values, initial=0.0)))
    axes.set_facecolor("0.85")
    # Without numbers, rare confusions must be seen by their colour: a root scale lifts them.
    norm = PowerNorm(1.0 if size <= MAX_ANNOTATED else 0.5, vmin=0.0, vmax=highest)
    image = axes.imshow(values, cmap="Blues", norm=norm, interpolation="nearest")
    font = float(np.clip(cell * 72 * 0.62, 5.5, 10.0))
    axes.set_xticks(range(size), names, rotation=90, fontsize=font)
    axes.set_yticks(range(size), names, fontsize=font)
    axes.set_xlabel("predicted")
    axes.set_ylabel("target")
    axes.set_title(title, fontsize=11)
    figure.colorbar(image, ax=axes, fraction=0.046, pad=0.02)
    if size <= MAX_ANNOTATED:
        _annotate(axes, values, highest, is_share, min(font, cell * 72 * (0.36 if is_share else 0.42)))
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    with written_whole(path) as partial:
        figure.savefig(partial, format="png")


def _annotate(axes: Any, values: Any, highest: float, is_share: bool, font: float) -> None:
    """Write the number into each cell that is not empty, in white where the cell is dark."""
    for row, column in zip(*np.nonzero(np.nan_to_num(values)), strict=True):
        value = float(values[row, column])
        text = f"{value:.2f}".removeprefix("0") if is_share else f"{value:.0f}"
        colour = "white" if value > 0.55 * highest else "black"
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=font)


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"
