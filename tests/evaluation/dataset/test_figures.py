from __future__ import annotations

import io
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from evaluation.dataset.figures import Tile, contact_sheet, heatmap, image_map, length_histogram, size_figure
from evaluation.report.figures import short


def drawn(figure: Figure) -> Image.Image:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer)


@pytest.mark.parametrize("count", [1, 5, 7])
def test_contact_sheet_shows_each_image_once(count: int) -> None:
    tiles = [Tile(np.full((4, 6, 3), number, np.uint8), f"image {number}") for number in range(count)]
    figure = contact_sheet(tiles, columns=3)
    shown: list[Any] = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    assert [int(image[0, 0, 0]) for image in shown] == list(range(count))
    assert [axes.texts[0].get_text() for axes in figure.axes if axes.texts] == [f"image {n}" for n in range(count)]


def test_heatmap_writes_numbers_into_cells_that_are_not_empty() -> None:
    table = pd.DataFrame([[3, 0], [10, 7]], index=["a", "b"], columns=["x", "y"])
    texts = heatmap(table, "counts").axes[0].texts
    assert [(text.get_position(), text.get_text()) for text in texts] == [((0, 0), "3"), ((0, 1), "10"), ((1, 1), "7")]
    shares = heatmap(pd.DataFrame([[0.5, np.nan]]), "shares", highest=1.0).axes[0].texts
    assert [text.get_text() for text in shares] == ["0.50"]


def test_caption_lengths_of_each_split_sum_to_one() -> None:
    lengths = {"train": np.array([3, 3, 4, 90]), "val": np.array([3])}
    figure = length_histogram(lengths)
    outlines: Any = figure.axes[0].patches
    for outline in outlines:
        assert outline.get_xy()[:, 1].max() <= 1.0
    # A step outline goes along both edges of each bar; the tallest bar of val is its only one.
    assert outlines[1].get_xy()[:, 1].max() == pytest.approx(1.0)
    assert outlines[0].get_xy()[:, 1].max() == pytest.approx(0.75)


def test_extreme_sizes_are_inside() -> None:
    axes = size_figure(np.array([10, 4000]), np.array([3000, 20])).axes
    assert axes[0].get_xlim()[1] > 4000
    bars: Any = axes[1].patches
    assert sum(bar.get_height() for bar in bars) == 2


def test_map_places_images() -> None:
    places = np.array([[0.0, 1.0], [2.0, 3.0]])
    axes = image_map(
        places, [Tile(np.zeros((8, 8, 3), np.uint8), "a"), Tile(np.zeros((4, 8, 3), np.uint8), "b")], "t"
    ).axes
    boxes: Any = axes[0].artists
    assert [tuple(box.xy) for box in boxes] == [(0.0, 1.0), (2.0, 3.0)]


def test_long_names_are_cut() -> None:
    assert short("a" * 40, 10) == "a" * 9 + "…"
    assert short("short", 10) == "short"
