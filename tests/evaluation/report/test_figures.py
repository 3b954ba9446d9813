from __future__ import annotations

import sys
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from evaluation.dataset.figures import Tile, class_bars, contact_sheet, density_curves, heatmap, image_map
from evaluation.report.figures import confusion_figure, reliability_figure, save_figure
from evaluation.statistics.calibration import reliability_bins
from evaluation.tables.per_class import confusion_matrix, normalise_by_target


@pytest.mark.parametrize("num_classes", [1, 3, 45])
@pytest.mark.parametrize("normalised", [False, True])
def test_figure_names_every_class(tmp_path: Path, num_classes: int, normalised: bool) -> None:
    rng = np.random.default_rng(0)
    names = [f"class {index}" for index in range(num_classes)]
    matrix = confusion_matrix(rng.integers(num_classes, size=90), rng.integers(num_classes, size=90), names)
    figure = confusion_figure(normalise_by_target(matrix) if normalised else matrix, "class (test)")
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == names
    assert [label.get_text() for label in axes.get_xticklabels()] == names
    assert axes.get_title() == "class (test)"
    save_figure(figure, tmp_path / "figures" / "confusion.png")
    with Image.open(tmp_path / "figures" / "confusion.png") as image:
        assert image.format == "PNG"
        assert min(image.size) > 250
    assert [entry.name for entry in (tmp_path / "figures").iterdir()] == ["confusion.png"]


def test_numbers_stand_in_the_cells() -> None:
    matrix = confusion_matrix(np.array([0, 0, 0, 0, 1]), np.array([0, 0, 0, 1, 1]), ["a", "b"])
    assert sorted(text.get_text() for text in confusion_figure(matrix, "").axes[0].texts) == ["1", "1", "3"]
    shares = confusion_figure(normalise_by_target(matrix), "")
    assert sorted(text.get_text() for text in shares.axes[0].texts) == [".25", ".75", "1.00"]


def test_names_neighbours_do_not_overlap() -> None:
    names = [f"a rather long name of class {index}" for index in range(116)]
    matrix = confusion_matrix(np.arange(116), np.arange(116), names)
    figure = confusion_figure(matrix, "")
    figure.canvas.draw()
    boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    gaps = [upper.y0 - lower.y1 for upper, lower in pairwise(boxes)]
    assert min(gaps) > -0.35 * boxes[0].height  # the boxes hold room for ascenders and descenders
    assert all(label.get_text().endswith("…") for label in figure.axes[0].get_yticklabels())


def test_no_global_state_is_touched() -> None:
    before = "matplotlib.pyplot" in sys.modules
    confusion_figure(confusion_matrix(np.array([0]), np.array([0]), ["a"]), "")
    assert ("matplotlib.pyplot" in sys.modules) == before


NAMES = [
    "$5 and $10",
    "$x^",
    "a_b^{c}",
    "_hidden",
    "100 %",
    "\\$",
    "[red]x[/red]",
    "日本",
    "😀",
    "שלום",
    "x" * 300,
    "two\nlines",
    " ",
]


def test_names_are_drawn_as_they_are(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    targets = rng.integers(len(NAMES), size=60)
    matrix = confusion_matrix(targets, targets, NAMES)
    figures = {
        "confusion": confusion_figure(matrix, "$price$ of $"),
        "bars": class_bars(pd.DataFrame({"$t$": range(len(NAMES))}, index=NAMES), "$price$ of $"),
        "colours": density_curves({name: rng.random((3, 8)) for name in NAMES}, np.linspace(0, 1, 8), "$price$ $"),
        "heatmap": heatmap(matrix, "$price$ of $"),
        "sheet": contact_sheet([Tile(np.zeros((4, 4, 3), np.uint8), name) for name in NAMES]),
        "images": image_map(
            rng.normal(size=(len(NAMES), 2)), [Tile(np.zeros((4, 4, 3), np.uint8), name) for name in NAMES], "$x$ $"
        ),
    }
    for stem, figure in figures.items():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            warnings.filterwarnings("ignore", message=".*constrained_layout not applied.*")
            save_figure(figure, tmp_path / f"{stem}.png")


@pytest.mark.parametrize("n", [1, 200])
def test_bars_are_the_accuracy_of_each_bin(n: int) -> None:
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.3, 1, n)
    bins = reliability_bins(confidence, rng.random(n) < confidence, 10)
    figure = reliability_figure({"before": bins, "after": bins}, "class, test")
    every: list[Any] = figure.axes
    diagrams, counts = every[:2], every[2:]
    filled = bins.count > 0
    for axes in diagrams:
        assert [bar.get_height() for bar in axes.patches] == pytest.approx(bins.accuracy[filled].tolist())
    for axes in counts:
        assert sum(bar.get_height() for bar in axes.patches) == pytest.approx(1)
    assert [axes.get_title() for axes in diagrams] == ["before", "after"]
