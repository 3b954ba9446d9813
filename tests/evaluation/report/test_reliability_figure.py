from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from evaluation.report.figures import reliability_figure
from evaluation.statistics.calibration import reliability_bins


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
