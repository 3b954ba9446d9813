"""Figures of a data set: classes, colours, sizes, captions, maps and sheets of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from evaluation.report.figures import blank_figure, plain, short

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

SPLIT_COLOURS = {"train": "#3b6ea8", "val": "#d98324", "test": "#3f9463"}

NAMED_CLASSES = 150
"""Classes up to which each bar has its name; more are ordered by frequency without names."""


class Tile(NamedTuple):
    """A small image and the text below it, in one line or several."""

    image: NDArray[np.uint8]
    text: str


def class_bars(counts: pd.DataFrame, title: str) -> Figure:
    """Draw samples of each class; ``counts`` has a row for each class and a column, thus a panel, for each split."""
    from matplotlib.ticker import MaxNLocator

    if len(counts) > NAMED_CLASSES:
        return _frequency_curves(counts, title)
    names = [plain(short(str(name))) for name in counts.index]
    figure = blank_figure(2.2 + 2.3 * counts.shape[1], 1.1 + 0.2 * len(counts))
    panels = figure.subplots(1, counts.shape[1], sharey=True, squeeze=False)[0]
    for axes, split in zip(panels, counts.columns, strict=True):
        bars = axes.barh(range(len(counts)), counts[split], color=SPLIT_COLOURS.get(split, "0.5"), height=0.75)
        axes.bar_label(bars, fontsize=7, padding=2)
        axes.set_title(plain(f"{split} ({int(counts[split].sum()):,})"), fontsize=9)
        axes.set_xlim(0, max(1.0, 1.18 * float(counts[split].max())))
        axes.tick_params(labelsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        _clean(axes)
    panels[0].set_yticks(range(len(counts)), names)
    panels[0].set_ylim(len(counts) - 0.4, -0.6)
    figure.suptitle(plain(title), fontsize=11)
    return figure


def density_curves(densities: Mapping[str, NDArray[np.float64]], levels: NDArray[np.float64], title: str) -> Figure:
    """Draw densities of hue, saturation and value, float64 ``(3, B)`` for each class, at B levels from 0 to 1."""
    from matplotlib.colors import hsv_to_rgb

    figure = blank_figure(10.5, 3.9)
    panels = figure.subplots(1, 3)
    grey = np.stack([levels] * 3, axis=1)
    full = np.ones_like(levels)
    strips = (
        hsv_to_rgb(np.stack([levels, full, full], axis=1)),
        hsv_to_rgb(np.stack([full * 0.6, levels, full], axis=1)),
        grey,
    )
    for place, (axes, name, strip) in enumerate(zip(panels, ("hue", "saturation", "value"), strips, strict=True)):
        highest = max((float(curves[place].max()) for curves in densities.values()), default=1.0) or 1.0
        for number, (label, curves) in enumerate(densities.items()):
            axes.plot(levels, curves[place], color=f"C{number % 10}", linewidth=1.6, label=plain(short(label)))
        axes.imshow(
            strip[None], extent=(0, 1, -0.09 * highest, -0.02 * highest), aspect="auto", interpolation="bilinear"
        )
        axes.set(xlim=(0, 1), ylim=(-0.1 * highest, 1.08 * highest), xlabel=name)
        axes.set_yticks([])
        _clean(axes)
    panels[0].set_ylabel("density")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9
    )
    figure.suptitle(plain(title), fontsize=11)
    return figure


def image_map(places: NDArray[np.float64], tiles: Sequence[Tile], title: str) -> Figure:
    """Draw small images at their places in the plane, float64 ``(N, 2)``, each with its text."""
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage

    many = len(tiles) > 40
    side = 30 if many else 44
    figure = blank_figure(15, 11) if many else blank_figure(10.5, 7.5)
    axes = figure.subplots()
    for (x, y), tile in zip(places, tiles, strict=True):
        zoom = side / max(tile.image.shape[:2])
        box = AnnotationBbox(OffsetImage(tile.image, zoom=zoom), (x, y), frameon=True, pad=0.12, bboxprops={"lw": 0.4})
        axes.add_artist(box)
        offset = (0, -side * 0.5 - 5)
        axes.annotate(
            plain(short(tile.text, 24)), (x, y), xytext=offset, textcoords="offset points", ha="center", va="center",
            fontsize=5.5 if many else 6.5, zorder=5,
            bbox={"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.6},
        )  # fmt: skip
    axes.scatter(places[:, 0], places[:, 1], s=1, color="white")
    axes.margins(0.09)
    axes.set(xlabel="first dimension", ylabel="second dimension")
    axes.set_title(plain(title), fontsize=11)
    axes.grid(alpha=0.2)
    return figure


def size_figure(widths: NDArray[np.int64], heights: NDArray[np.int64]) -> Figure:
    """Draw width against height, and the distribution of shapes."""
    figure = blank_figure(9.5, 3.8)
    left, right = figure.subplots(1, 2)
    sizes, counts = np.unique(np.stack([widths, heights], axis=1), axis=0, return_counts=True)
    area = 14 + 260 * counts / counts.max()
    left.scatter(sizes[:, 0], sizes[:, 1], s=area, alpha=0.45, color=SPLIT_COLOURS["train"], linewidths=0)
    longest = 1.1 * max(int(widths.max()), int(heights.max()))
    left.plot([0, longest], [0, longest], color="0.6", linewidth=0.8, linestyle=":")
    left.set(xlim=(0, longest), ylim=(0, longest), xlabel="width in pixels", ylabel="height in pixels")
    left.set_title("sizes, larger where there are more", fontsize=9)
    shapes = np.log2(widths / heights)
    reach = max(1.0, float(np.abs(shapes).max()) * 1.05)
    right.hist(shapes, bins=np.linspace(-reach, reach, 42).tolist(), color=SPLIT_COLOURS["train"])
    ticks = [tick for tick in range(-6, 7) if abs(tick) <= reach]
    right.set_xticks(ticks, [f"{2**tick}:1" if tick >= 0 else f"1:{2**-tick}" for tick in ticks])
    right.set(xlabel="width to height", ylabel="images")
    right.set_title("shapes", fontsize=9)
    for axes in (left, right):
        _clean(axes)
    return figure


def length_histogram(lengths: Mapping[str, NDArray[np.int64]]) -> Figure:
    """Draw the number of words of captions by split; each split's bars sum to 1, so that splits compare."""
    longest = max(int(values.max(initial=0)) for values in lengths.values())
    width = max(1, -(-longest // 40))
    fewest = min(int(values.min(initial=longest)) for values in lengths.values())
    edges = np.arange(fewest, longest + 2 * width, width) - 0.5
    return _histogram(lengths, edges, xlabel="words in a caption", ylabel="share of captions")


def number_histogram(numbers: Mapping[str, NDArray[np.float64]], task: str) -> Figure:
    """Draw the numbers of a regression task by split, likewise; at least one split has some."""
    together = np.concatenate(list(numbers.values()))
    bins = min(40, max(8, round(len(together) ** 0.5)))
    edges = np.histogram_bin_edges(together, bins)
    return _histogram(numbers, edges, xlabel=plain(task), ylabel="share of samples")


def _histogram(values: Mapping[str, NDArray[Any]], edges: NDArray[Any], **labels: str) -> Figure:
    figure = blank_figure(7.2, 3.4)
    axes = figure.subplots()
    for split, of_split in values.items():
        shares = np.full(len(of_split), 1 / max(len(of_split), 1))
        axes.hist(
            of_split,
            edges.tolist(),
            weights=shares,
            histtype="step",
            linewidth=1.8,
            color=SPLIT_COLOURS[split],
            label=f"{split} ({len(of_split):,})",
        )
    axes.set(**labels)
    axes.legend(frameon=False)
    _clean(axes)
    return figure


def heatmap(table: pd.DataFrame, title: str, *, highest: float | None = None) -> Figure:
    """Draw numbers in a grid, each written into its cell; white is 0."""
    rows, columns = table.shape
    names = [short(str(name)) for name in table.index]
    margin = 0.085 * max(map(len, names), default=1)
    figure = blank_figure(max(4.0, 1.1 + margin + 0.55 * columns), max(2.4, 1.5 + 0.3 * rows))
    axes = figure.subplots()
    values = table.to_numpy(np.float64)
    top = highest or max(1.0, float(np.nanmax(values, initial=0.0)))
    axes.imshow(np.ma.masked_invalid(values), cmap="Blues", vmin=0, vmax=top, aspect="auto")
    axes.set_xticks(
        range(columns), [plain(short(str(name))) for name in table.columns], rotation=40, ha="right", fontsize=8
    )
    axes.set_yticks(range(rows), [plain(name) for name in names], fontsize=8)
    is_count = highest is None
    for row, column in zip(*np.nonzero(np.nan_to_num(values)), strict=True):
        value = values[row, column]
        colour = "white" if value > 0.55 * top else "black"
        text = f"{value:.0f}" if is_count else f"{value:.2f}"
        axes.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
    axes.set_title(plain(title), fontsize=10)
    return figure


def contact_sheet(tiles: Sequence[Tile], columns: int = 6, side: float = 1.55) -> Figure:
    """Draw images in a grid with their texts below."""
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    lines = max(tile.text.count("\n") + 1 for tile in tiles)
    figure = blank_figure(max(3.0, side * columns), rows * (side + 0.15 * lines))
    grid = figure.subplots(rows, columns, squeeze=False)
    for place, axes in enumerate(grid.ravel()):
        axes.axis("off")
        if place < len(tiles):
            axes.imshow(tiles[place].image, interpolation="nearest")
            axes.text(
                0.5, -0.04, plain(tiles[place].text), transform=axes.transAxes, ha="center", va="top", fontsize=7
            )  # fmt: skip
    return figure


def _frequency_curves(counts: pd.DataFrame, title: str) -> Figure:
    """Samples of each class, most frequent first, one line a split; for more classes than have room for names."""
    figure = blank_figure(8.5, 3.6)
    axes = figure.subplots()
    for split in counts.columns:
        ordered = np.sort(counts[split].to_numpy())[::-1]
        label = f"{split} ({int(ordered.sum()):,})"
        axes.step(
            np.arange(1, len(ordered) + 1), ordered, where="mid", color=SPLIT_COLOURS.get(split, "0.5"), label=label
        )
    axes.set_yscale("symlog", linthresh=1)
    axes.set(xlabel="class, most frequent first", ylabel="samples", ylim=(0, None))
    axes.legend(frameon=False)
    axes.set_title(plain(title), fontsize=11)
    _clean(axes)
    return figure


def _clean(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
