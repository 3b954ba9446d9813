"""Figures of evaluation results, drawn without a display and without matplotlib's global state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vitrail.files import written_whole

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_ANNOTATED = 30
"""Up to so many classes every cell shows its number; beyond, only the colours."""

_LONGEST_NAME = 28


def confusion_figure(matrix: pd.DataFrame, title: str) -> Figure:
    """Draw a confusion matrix, raw (whole numbers) or normalised (shares), from one class to a few hundred.

    Args:
        matrix: rows are the C targets, columns the predictions, as ``classification.confusion_matrix`` makes them; NaN
            rows (classes without a target) stay grey.
        title: Shown above the matrix.
    """
    from matplotlib.colors import PowerNorm

    size = max(matrix.shape)
    # Inches: a cell never gets too small for its name at the smallest readable font (about 5.5 points).
    cell = float(np.clip(9.0 / size, 0.11, 0.75))
    font = float(np.clip(cell * 72 * 0.62, 5.5, 10.0))
    names = [_short(str(name)) for name in matrix.columns]
    figure, axes, beside = _places(max(cell * size, 2.2), names, font, has_numbers=size <= MAX_ANNOTATED)
    values = matrix.to_numpy(dtype=np.float64)
    is_share = not all(np.issubdtype(kind, np.integer) for kind in matrix.dtypes)
    highest = 1.0 if is_share else max(1.0, float(np.nanmax(values, initial=0.0)))
    axes.set_facecolor("0.85")
    # Without numbers, rare confusions must be seen by their colour: a root scale lifts them.
    norm = PowerNorm(1.0 if size <= MAX_ANNOTATED else 0.5, vmin=0.0, vmax=highest)
    image = axes.imshow(values, cmap="Blues", norm=norm, interpolation="nearest")
    ticks = [plain(name) for name in names]
    axes.set_xticks(range(size), ticks, rotation=90, fontsize=font)
    axes.set_yticks(range(len(matrix)), ticks[: len(matrix)], fontsize=font)
    axes.set_title(plain(title), fontsize=11, y=1.0)
    if beside is not None:
        figure.colorbar(image, cax=beside)
    else:
        _annotate(axes, values, highest, is_share, min(font, cell * 72 * (0.36 if is_share else 0.42)))
    return figure


def _places(side: float, names: Sequence[str], font: float, has_numbers: bool) -> tuple[Figure, Axes, Axes | None]:
    """A figure with room for a square of ``side`` inches, for the names left of it and below, and for a colour bar.

    Cells that show their numbers need no bar.

    The room is reckoned from the longest name. Matplotlib's own layouts measure every name several times, which takes
    most of the time that a figure needs.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties

    dpi = 110 if has_numbers else 140
    figure = Figure(dpi=dpi)
    renderer = FigureCanvasAgg(figure).get_renderer()
    properties = FontProperties(size=font)
    longest = max(renderer.get_text_width_height_descent(name, properties, ismath=False)[0] for name in names) / dpi
    edge, above, beyond = longest + 0.45, 0.4, 0.5 if has_numbers else 0.9
    width, height = edge + side + beyond, edge + side + above
    figure.set_size_inches(width, height)
    axes = figure.add_axes((edge / width, edge / height, side / width, side / height))
    figure.text((edge + side / 2) / width, 0.08 / height, "predicted", ha="center", va="bottom")
    figure.text(0.08 / width, (edge + side / 2) / height, "target", ha="left", va="center", rotation=90)
    if has_numbers:
        return figure, axes, None
    return figure, axes, figure.add_axes(((edge + side + 0.15) / width, edge / height, 0.16 / width, side / height))


def plain(text: str) -> str:
    """A text that Matplotlib draws as it is.

    It would take what stands between two dollar signs for a formula, which may not even be one, and leave out of a
    legend what begins with an underscore.
    """
    escaped = text.replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    with written_whole(path) as partial:
        # Half the time of the best compression, and files that are hardly larger.
        figure.savefig(partial, format="png", pil_kwargs={"compress_level": 3})


def _annotate(axes: Any, values: Any, highest: float, is_share: bool, font: float) -> None:
    """Write the number into each cell that is not empty, in white where the cell is dark."""
    for row, column in zip(*np.nonzero(np.nan_to_num(values)), strict=True):
        value = float(values[row, column])
        text = f"{value:.2f}".removeprefix("0") if is_share else f"{value:.0f}"
        colour = "white" if value > 0.55 * highest else "black"
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=font)


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"
