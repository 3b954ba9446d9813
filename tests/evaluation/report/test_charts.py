from __future__ import annotations

import math
from xml.etree import ElementTree

import numpy as np
import pytest
from numpy.typing import NDArray

from evaluation.report.charts import (
    POINTS,
    Chart,
    Scale,
    Span,
    histogram_chart,
    line_chart,
    map_chart,
    on_the_front,
    pareto_chart,
    reliability_chart,
    scatter_chart,
)
from evaluation.statistics.calibration import reliability_bins
from evaluation.statistics.intervals import Estimate, Interval

ODD = ["<script>alert(1)</script>", 'a "quoted" & b', "שלום", "\x00bell\x07", "日本", ""]


def places(chart: Chart, points: list[tuple[float, float]]) -> NDArray[np.float64]:
    """What points of a chart mean by its axes, float64 ``(N, 2)``."""
    left, top, right, bottom = map(float, chart.root.attrib["data-frame"].split())
    found = []
    for name, share in (
        ("data-x", [(x - left) / (right - left) for x, _ in points]),
        ("data-y", [(bottom - y) / (bottom - top) for _, y in points]),
    ):
        *ends, kind = chart.root.attrib[name].split()
        low, high = map(float, ends)
        found.append([low * (high / low) ** one if kind == "log" else low + one * (high - low) for one in share])
    return np.array(found).T


def line(chart: Chart, name: str) -> NDArray[np.float64]:
    """Points of a line, float64 ``(N, 2)``."""
    [found] = [one for one in chart.root.iter("polyline") if one.get("data-name") == name]
    return places(chart, [(float(x), float(y)) for x, y in (one.split(",") for one in found.attrib["points"].split())])


def dots(chart: Chart) -> NDArray[np.float64]:
    """Places of a chart's dots, float64 ``(N, 2)``."""
    found = [one for one in chart.root.iter("circle") if "dot" in one.attrib["class"]]
    return places(chart, [(float(one.attrib["cx"]), float(one.attrib["cy"])) for one in found])


def test_a_line_goes_through_its_finite_points() -> None:
    x, y = np.arange(6.0), np.array([3.0, 2.0, np.nan, 1.5, 1.2, 1.1])
    chart = line_chart(
        "loss", {"val/loss": (x, y), "train/loss": (x, y - 1)}, "epochs", dashed=["train/loss"], hues=[0, 0]
    )
    kept = np.isfinite(y)
    np.testing.assert_allclose(line(chart, "val/loss"), np.stack([x[kept], y[kept]], axis=1), atol=0.01)
    np.testing.assert_allclose(line(chart, "train/loss")[:, 1], y[kept] - 1, atol=0.01)
    assert chart.legend == [("val/loss", "h0"), ("train/loss", "h0 dashed")]


def test_long_lines_are_thinned_and_keep_their_ends() -> None:
    x = np.linspace(0, 1, 5_000)
    found = line(line_chart("ROC", {"a": (x, x**2)}, "x", unit=True, diagonal=True), "a")
    assert len(found) == POINTS
    np.testing.assert_allclose(found[[0, -1]], [[0, 0], [1, 1]], atol=1e-3)


@pytest.mark.parametrize(
    "scale", [Scale(0, 1), Scale(-3, 14_000), Scale(2.5, 2.6), Scale(1e4, 3e9, "", True), Scale(0.8, 1.3, "", True)]
)
def test_ticks_lie_within_the_scale(scale: Scale) -> None:
    ticks = scale.ticks()
    assert 2 <= len(ticks) <= 14
    assert all(-1e-6 <= scale.share(value) <= 1 + 1e-6 for value, _ in ticks)
    assert len({text for _, text in ticks}) == len(ticks)


def test_bars_are_the_accuracy_of_each_bin() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.3, 1, 200)
    bins = reliability_bins(confidence, rng.random(200) < confidence, 10)
    chart = reliability_chart("class", bins)
    bars = [one for one in chart.root.iter("rect") if one.attrib["class"].startswith("bar")]
    tops = places(chart, [(0.0, float(bar.attrib["y"])) for bar in bars])[:, 1]
    filled = bins.count > 0
    np.testing.assert_allclose(tops, bins.accuracy[filled], atol=1e-3)
    assert [f"{count} samples" in bar.attrib["data-tip"] for bar, count in zip(bars, bins.count[filled], strict=True)]


def test_dots_are_where_the_numbers_are_and_say_so() -> None:
    x, y = np.array([1.0, 2.0, 4.0]), np.array([1.5, 2.0, 3.0])
    chart = scatter_chart("price", x, y, ["a", "b", "c"], ("true", "predicted"))
    np.testing.assert_allclose(dots(chart), np.stack([x, y], axis=1), atol=0.02)
    assert [one.get("data-tip") for one in chart.root.iter("circle")][2] == "c: true 4, predicted 3"
    assert scatter_chart("one", np.ones(1), np.ones(1), ["a"], ("a", "b")).root is not None  # all the same


def test_a_histogram_counts_every_sample() -> None:
    values = np.random.default_rng(0).normal(size=300)
    bars = [one.attrib["data-tip"] for one in histogram_chart("errors", values, "error").root.iter("rect")]
    assert sum(int(tip.rpartition(": ")[2].split()[0]) for tip in bars) == 300


def test_every_class_is_in_the_legend() -> None:
    labels = [f"c{number:02}" for number in range(45)] * 2
    chart = map_chart("PCA", np.random.default_rng(0).normal(size=(90, 2)), labels, labels)
    assert [int(one.attrib["data-class"]) for one in chart.root.iter("circle")] == [*range(45)] * 2
    assert [name for name, _ in chart.legend] == labels[:45]
    assert chart.choices


def test_front_is_that_of_brute_force() -> None:
    rng = np.random.default_rng(0)
    cost, score = rng.integers(5, size=30).astype(float), rng.integers(5, size=30) / 5
    cost[3], score[4] = math.nan, math.nan
    expected = [
        not math.isnan(cost[own])
        and not math.isnan(score[own])
        and not any(
            cost[other] <= cost[own]
            and score[other] >= score[own]
            and (cost[other] < cost[own] or score[other] > score[own])
            for other in range(30)
        )
        for own in range(30)
    ]
    assert on_the_front(cost, score).tolist() == expected
    assert 0 < sum(expected) < 28


def test_equal_models_are_both_on_the_front() -> None:
    assert on_the_front(np.array([1.0, 1.0]), np.array([0.5, 0.5])).tolist() == [True, True]


@pytest.mark.parametrize("lower_is_better", [False, True])
def test_every_known_model_is_drawn_with_its_interval(lower_is_better: bool) -> None:
    scores = [Estimate(0.5, Interval(0.4, 0.7)), Estimate(0.8, Interval(0.7, 0.9)), Estimate(0.6, Interval(0.5, 0.7))]
    cost = [1e6, math.nan, 9e6]
    chart = pareto_chart(
        "cost", ["a", "b", "c"], scores, cost, ("parameters", "score"), lower_is_better=lower_is_better
    )
    np.testing.assert_allclose(dots(chart), [[1e6, 0.5], [9e6, 0.6]], rtol=0.01)
    whiskers = [one for one in chart.root.iter("line") if one.attrib["class"].startswith("whisker")]
    ends = [places(chart, [(0, float(one.attrib["y1"])), (0, float(one.attrib["y2"]))])[:, 1] for one in whiskers]
    np.testing.assert_allclose(ends, [[0.4, 0.7], [0.5, 0.7]], atol=1e-3)
    hollow = ["hollow" in one.attrib["class"] for one in chart.root.iter("circle")]
    assert hollow == [False, lower_is_better]


def test_files_are_whole_and_names_are_text() -> None:
    x = np.arange(3.0)
    charts = [
        line_chart(ODD[0], dict.fromkeys(ODD, (x, x)), ODD[1], ODD[3]),
        map_chart(ODD[1], np.zeros((len(ODD), 2)), ODD, ODD),
        scatter_chart(ODD[3], np.arange(6.0), np.arange(6.0), ODD, (ODD[0], ODD[1])),
    ]
    for chart in charts:
        root = ElementTree.fromstring(chart.file())
        assert {one.tag.rpartition("}")[2] for one in root.iter()} <= {
            "svg",
            "style",
            "rect",
            "text",
            "g",
            "line",
            "circle",
            "polyline",
        }
        assert "<script" not in chart.__html__()
    texts = [one.text for one in ElementTree.fromstring(charts[0].file()).iter() if one.tag.endswith("text")]
    assert set(texts) >= {ODD[0], ODD[1], ODD[2]}


def test_a_span_is_its_text_and_its_interval() -> None:
    span = Span(Estimate(0.5, Interval(0.25, 0.75)), "<0.5>", (0.0, 1.0), 0.1)
    assert str(span) == "<0.5>"
    shown = span.__html__()
    assert "&lt;0.5&gt;" in shown
    interval = next(
        one for one in ElementTree.fromstring(span.bar(110)).iter("line") if one.attrib["class"] == "interval"
    )
    assert (float(interval.attrib["x1"]), float(interval.attrib["x2"])) == (30, 80)
    assert "svg" not in Span(Estimate(math.nan, Interval(math.nan, math.nan)), "–", (0.0, 1.0)).__html__()
