"""Figures of results for run directories and trackers, without a display or matplotlib's global state.

Pages draw their own charts (``charts``).
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from evaluation.statistics.calibration import ReliabilityBins
from vitrail.files import write_atomically

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


MAX_ANNOTATED = 30
"""Classes up to which cells show their numbers, not only colours."""

MAX_DRAWN = 300
"""Classes that a matrix shows."""

_LONGEST_NAME = 28
_BLUE, _RED = "#3b75af", "#c8553d"


def blank_figure(width: float, height: float, dpi: int = 110) -> Figure:
    """Return an empty figure of a size in inches, on white, so that it is readable on light and dark pages."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def confusion_image(matrix: pd.DataFrame, title: str, names: tuple[str, str] = ("target", "predicted")) -> Image.Image:
    """Draw a confusion matrix, raw (whole numbers) or normalised (shares).

    Args:
        matrix: rows are the C targets, columns the predictions, as ``per_class.confusion_matrix`` makes them; NaN
            rows (classes without a target) stay grey. Of more than ``MAX_DRAWN`` classes those are drawn that are
            confused most.
        title: above the matrix.
        names: of rows and columns.
    """
    if len(matrix) > MAX_DRAWN:
        kept = _most_confused(matrix)
        title = f"{title}: the {MAX_DRAWN} of {len(matrix):,} classes that are confused most"
        matrix = matrix.iloc[kept, kept]
    rows, columns = matrix.shape
    has_numbers = max(rows, columns) <= MAX_ANNOTATED
    cell = int(np.clip(990 / max(rows, columns), 15, 82))
    font, heading = _font(min(cell * 0.62, 15)), _font(17)
    labels = [short(" ".join(str(name).split()), _LONGEST_NAME) for name in matrix.columns]
    widest = math.ceil(max(font.getlength(label) for label in labels)) + 6
    left, top = widest + 36, 44
    size = max(left + columns * cell + 24, math.ceil(heading.getlength(title)) + 24), top + rows * cell + widest + 36
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    values = matrix.to_numpy(dtype=np.float64)
    is_share = not all(np.issubdtype(kind, np.integer) for kind in matrix.dtypes)
    shares = values / (1.0 if is_share else max(1.0, float(np.nanmax(values, initial=0.0))))
    # Without numbers, rare confusions are visible by their colour only: a root lifts them.
    colours = _blues(shares if has_numbers else np.sqrt(shares)).repeat(cell, 0).repeat(cell, 1)
    image.paste(Image.fromarray(colours), (left, top))
    draw.rectangle((left - 1, top - 1, left + columns * cell, top + rows * cell), outline="black")
    row_labels = _labels_image(labels[:rows], cell, widest, font)
    column_labels = _labels_image(labels, cell, widest, font).transpose(Image.Transpose.ROTATE_90)
    image.paste(row_labels, (left - widest - 1, top))
    image.paste(column_labels, (left, top + rows * cell + 1))
    middle = left + columns * cell // 2
    draw.text((max(middle, heading.getlength(title) / 2 + 12), 24), title, "black", heading, anchor="mm")
    draw.text((middle, size[1] - 16), names[1], "black", heading, anchor="mm")
    rotated = _labels_image([names[0]], 24, math.ceil(heading.getlength(names[0])) + 6, heading)
    image.paste(rotated.transpose(Image.Transpose.ROTATE_90), (6, top + (rows * cell - rotated.width) // 2))
    if has_numbers:
        own = _font(min(15, cell * (0.36 if is_share else 0.42)))
        for row, column in zip(*np.nonzero(np.nan_to_num(values)), strict=True):
            text = f"{values[row, column]:.2f}".removeprefix("0") if is_share else f"{values[row, column]:.0f}"
            place = left + (column + 0.5) * cell, top + (row + 0.5) * cell
            draw.text(place, text, "white" if shares[row, column] > 0.55 else "black", own, anchor="mm")
    return image


def _most_confused(matrix: pd.DataFrame) -> NDArray[np.int64]:
    """Places of ``MAX_DRAWN`` classes with the most errors, in their order."""
    values = np.nan_to_num(matrix.to_numpy()[:, : len(matrix)])
    errors = values.sum(axis=0) + values.sum(axis=1) - 2 * np.diagonal(values)
    return np.sort(np.argsort(-errors, kind="stable")[:MAX_DRAWN])


def _blues(shares: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Colours uint8 ``(..., 3)``, from white for 0 to dark blue for 1, grey for NaN."""
    places, anchors = (
        (0, 0.25, 0.5, 0.75, 1),
        ((247, 198, 107, 33, 8), (251, 219, 174, 113, 48), (255, 239, 214, 181, 107)),
    )
    found = np.stack([np.interp(shares, places, anchor) for anchor in anchors], axis=-1)
    return np.where(np.isnan(shares)[..., None], 217, found).astype(np.uint8)


def _labels_image(labels: Sequence[str], height: int, width: int, font: ImageFont.FreeTypeFont) -> Image.Image:
    """Names below each other, each flush right in a line of its own."""
    image = Image.new("RGB", (width, height * len(labels)), "white")
    draw = ImageDraw.Draw(image)
    for place, label in enumerate(labels):
        draw.text((width - 3, (place + 0.5) * height), label, "black", font, anchor="rm")
    return image


@functools.cache
def _font(size: float) -> ImageFont.FreeTypeFont:
    """Matplotlib's font, which has Greek and Cyrillic, too; Matplotlib itself takes a second to import."""
    spec = importlib.util.find_spec("matplotlib")
    assert spec is not None
    assert spec.origin is not None
    return ImageFont.truetype(Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def plain(text: str) -> str:
    """Escape a text for Matplotlib, which reads formulas between dollar signs and leaves ``_names`` out of legends."""
    escaped = text.replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped


def save_figure(figure: Figure | Image.Image, path: Path) -> None:
    """Write a figure as PNG, atomically."""
    with write_atomically(path) as partial:
        # Half the time of the best compression, and files that are hardly larger.
        if isinstance(figure, Image.Image):
            figure.save(partial, format="png", compress_level=3)
        else:
            figure.savefig(partial, format="png", pil_kwargs={"compress_level": 3})


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
