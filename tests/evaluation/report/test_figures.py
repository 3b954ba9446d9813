from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from evaluation.dataset.figures import Tile, class_bars, contact_sheet, density_curves, heatmap, image_map
from evaluation.report.figures import MAX_DRAWN, confusion_image, reliability_figure, save_figure
from evaluation.statistics.calibration import reliability_bins
from evaluation.tables.per_class import confusion_matrix, normalise_by_target
from vitrail.types import UNKNOWN

WHITE, GRAY, DARKEST = (247, 251, 255), (217, 217, 217), (8, 48, 107)
"""Cells of 0, of classes without a target, and of the highest value."""


def cells(image: Image.Image, rows: int, columns: int) -> list[list[tuple[int, ...]]]:
    """Colours of the cells, near their upper left corners, where no number is."""
    pixels = np.asarray(image)
    coloured = (pixels != 255).any(axis=2) & (pixels != 0).any(axis=2)
    side = int(np.clip(990 / max(rows, columns), 15, 82))
    top = 44
    left = next(x for x in range(image.width) if coloured[top : top + rows * side, x].all())
    corners = [[(top + row * side + 2, left + column * side + 2) for column in range(columns)] for row in range(rows)]
    return [[tuple(pixels[corner].tolist()) for corner in row] for row in corners]


@pytest.mark.parametrize("num_classes", [1, 3, 45])
def test_cells_have_the_colour_of_their_value(tmp_path: Path, num_classes: int) -> None:
    names = [f"class {index}" for index in range(num_classes)]
    matrix = confusion_matrix(np.arange(num_classes), np.arange(num_classes), names)
    image = confusion_image(matrix, "class (test)")
    found = cells(image, num_classes, num_classes)
    assert {found[row][row] for row in range(num_classes)} == {DARKEST}
    assert {cell for row in range(num_classes) for cell in found[row][:row]} <= {WHITE}
    save_figure(image, tmp_path / "figures" / "confusion.png")
    with Image.open(tmp_path / "figures" / "confusion.png") as written:
        assert written.format == "PNG"
        assert written.size == image.size
    assert [entry.name for entry in (tmp_path / "figures").iterdir()] == ["confusion.png"]


def test_rows_are_targets_and_those_without_one_gray() -> None:
    matrix = normalise_by_target(confusion_matrix(np.array([0, 0]), np.array([1, 1]), ["a", "b"]))
    assert cells(confusion_image(matrix, ""), 2, 2) == [[WHITE, DARKEST], [GRAY, GRAY]]


def test_samples_without_a_prediction_have_a_column() -> None:
    matrix = confusion_matrix(np.array([0, 1]), np.array([UNKNOWN, 1]), ["a", "b"])
    assert cells(confusion_image(matrix, ""), 2, 3) == [[WHITE, WHITE, DARKEST], [WHITE, DARKEST, WHITE]]


def test_of_many_classes_those_are_drawn_that_are_confused_most() -> None:
    size = MAX_DRAWN + 700
    targets = np.array([3, 3, 990, *range(size)])
    predicted = np.array([990, 990, 3, *range(size)])
    matrix = confusion_matrix(targets, predicted, [str(index) for index in range(size)])
    image = confusion_image(matrix, "class")
    assert image.width < 6000
    found = cells(image, MAX_DRAWN, MAX_DRAWN)
    assert found[3][MAX_DRAWN - 1] == DARKEST  # the first classes up to 298, and class 990


def test_matplotlib_is_not_imported() -> None:
    """It takes a second, at the end of every training."""
    code = (
        "import sys; from evaluation.report.figures import confusion_image; "
        "from evaluation.tables.per_class import confusion_frame; import numpy; "
        "confusion_image(confusion_frame(numpy.eye(2, dtype=int), ['a', 'b']), ''); print('matplotlib' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


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
    save_figure(confusion_image(matrix, "$price$ of $"), tmp_path / "confusion.png")


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
