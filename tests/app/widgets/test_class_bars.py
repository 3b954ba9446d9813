"""Tests of the bars of classes."""

from __future__ import annotations

import re

import pandas as pd
import pytest

from app.logic.explore import NOT_KNOWN
from app.widgets.charts import bars_html


def counts(**columns: list[int]) -> pd.DataFrame:
    return pd.DataFrame(columns, index=["mug", '<img src=x onerror="alert(1)">', "bowl", "cap"])


def test_bars_are_as_long_as_their_counts_longest_first() -> None:
    shown = bars_html(counts(train=[3, 8, 0, 1], test=[1, 2, 0, 0]), "class")
    bars = re.findall(r"<button.*?</button>", shown)
    assert [re.search(r'data-place="(\d)"', bar)[1] for bar in bars] == ["0", "1", "2"]  # type: ignore[index]
    widths = [[float(width) for width in re.findall(r"width: ([\d.]+)%", bar)] for bar in bars]
    assert widths == [[80, 20], [30, 10], [10]]
    assert [re.search(r'bar-count">(\d+)', bar)[1] for bar in bars] == ["10", "4", "1"]  # type: ignore[index]
    assert "3 of 4 values of class occur" in shown
    assert "is 66.7% of these images" in shown
    assert 'title="mug: train 3, test 1"' in shown


def test_not_all_and_no_unknown_value_is_the_most_frequent() -> None:
    known = counts(train=[3, 8, 2, 1])
    shown = bars_html(pd.concat([known, pd.DataFrame({"train": [20]}, index=[NOT_KNOWN])]), "class")
    # A class that no image of the gallery has is none of its values, so nobody knows whether these are all.
    assert "4 values of class occur; the most frequent, &lt;img" in shown
    assert f"is {8 / 34:.1%} of these images" in shown
    assert "All" not in shown
    nothing = pd.DataFrame({"train": [20]}, index=[NOT_KNOWN])
    assert "No value of class is known of these images." in bars_html(nothing, "class")


def test_names_never_become_markup() -> None:
    shown = bars_html(counts(train=[3, 8, 2, 1]), "class")
    assert "<img" not in shown
    assert shown.count("&lt;img src=x onerror=&quot;alert(1)&quot;&gt;") == 4  # value, title, name and note
    assert "the most frequent, &lt;img" in shown


def test_no_images_are_told() -> None:
    assert "No image is left by the filters." in bars_html(counts(train=[0, 0, 0, 0]), "class")


@pytest.mark.parametrize("split", ["train", "holdout"])
def test_any_split_has_a_colour(split: str) -> None:
    shown = bars_html(counts(**{split: [1, 2, 3, 4]}), "class")
    assert len(re.findall(r"background: #[0-9a-f]{6}", shown)) == 5  # four bars and the key
