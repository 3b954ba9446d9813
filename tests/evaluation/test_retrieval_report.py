from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from evaluation.retrieval import RankedAnswers, Row, report_rows, report_table, write_report

IMAGES = 60


def answers() -> list[RankedAnswers]:
    """Each image asks once, and 1 to 4 texts an image ask; all of them fare alike."""
    rng = np.random.default_rng(0)
    images = np.arange(IMAGES, dtype=np.int64) + 1000
    owners = np.repeat(images, rng.integers(1, 5, IMAGES))
    hard = rng.integers(1, 31, IMAGES)
    made = []
    for name, ids in (("image_to_text", images), ("text_to_image", owners)):
        ranks = np.maximum(1, hard[ids - 1000] + rng.integers(-2, 3, len(ids))).astype(np.int64)
        made.append(RankedAnswers(name, ranks, 1 / ranks, ids))
    return made


def by_name(rows: list[Row]) -> dict[tuple[str, str], Row]:
    return {(row.direction, row.metric): row for row in rows}


def test_values_and_order() -> None:
    rows = report_rows(answers(), n_resamples=200)
    metrics = ["R@1", "R@5", "R@10", "median_rank", "mAP"]
    assert [row.metric for row in rows] == [*metrics, *metrics, "mean_recall"]
    found = by_name(rows)
    recalls: list[float] = []
    for answer in answers():
        ranks, name = answer.first_rank, answer.direction
        for k in (1, 5, 10):
            recalls.append(float(np.mean(ranks <= k)))
            assert found[name, f"R@{k}"].value == pytest.approx(recalls[-1])
        assert found[name, "median_rank"].value == pytest.approx(np.median(ranks))
        assert found[name, "mAP"].value == pytest.approx(np.mean(1 / ranks))
        assert {row.n for row in rows if row.direction == name} == {len(ranks)}
    assert found["both", "mean_recall"].value == pytest.approx(np.mean(recalls))
    assert found["both", "mean_recall"].n == IMAGES


def test_intervals_equal_brute_force() -> None:
    """Draw images, take all their queries along, compute anew: the same percentiles but for the luck of drawing."""
    made, rng = answers(), np.random.default_rng(1)
    queries = [[np.flatnonzero(answer.images == 1000 + index) for index in range(IMAGES)] for answer in made]
    resampled: dict[tuple[str, str], list[float]] = {}
    for _ in range(3000):
        drawn = rng.integers(IMAGES, size=IMAGES)
        recalls: list[float] = []
        for answer, rows in zip(made, queries, strict=True):
            ranks = answer.first_rank[np.concatenate([rows[index] for index in drawn])]
            values = {f"R@{k}": float(np.mean(ranks <= k)) for k in (1, 5, 10)}
            recalls += values.values()
            values |= {"median_rank": float(np.median(ranks)), "mAP": float(np.mean(1 / ranks))}
            for metric, value in values.items():
                resampled.setdefault((answer.direction, metric), []).append(value)
        resampled.setdefault(("both", "mean_recall"), []).append(float(np.mean(recalls)))
    for name, row in by_name(report_rows(made)).items():
        low, high = np.quantile(resampled[name], [0.025, 0.975])
        near = 1.0 if row.metric == "median_rank" else 0.015
        assert [row.low, row.high] == pytest.approx([low, high], abs=near), name
        assert row.low < row.value < row.high


def test_texts_of_a_image_stay_together() -> None:
    """Were texts drawn one by one, the interval would be narrower."""
    grouped = answers()[1]
    apart = grouped._replace(images=np.arange(len(grouped.images), dtype=np.int64))
    widths = []
    for answer in (grouped, apart):
        row = by_name(report_rows([answer]))["text_to_image", "R@10"]
        widths.append(row.high - row.low)
    assert widths[0] > 1.2 * widths[1]


def test_perfect_answers_have_intervals_too() -> None:
    """The data say nothing about their spread: as many trials as images."""
    perfect = [
        answer._replace(first_rank=answer.first_rank**0, average_precision=np.ones(len(answer.images)))
        for answer in answers()
    ]
    for row in report_rows(perfect):
        assert row.value == 1
        if row.metric == "median_rank":
            assert row.low == 1
            assert 1 < row.high < 1.1
        else:
            assert row.high == 1
            assert 0.9 < row.low < 1


@pytest.mark.parametrize("ranks", [[3], [7, 2], [2, 2, 9, 9], [5, 1, 4]])
def test_median_of_few_answers(ranks: list[int]) -> None:
    first_rank = np.array(ranks, dtype=np.int64)
    answer = RankedAnswers("image_to_text", first_rank, 1 / first_rank, np.arange(len(ranks), dtype=np.int64))
    row = by_name(report_rows([answer], n_resamples=100))["image_to_text", "median_rank"]
    assert row.value == pytest.approx(np.median(ranks))
    assert 1 <= row.low <= row.value <= row.high


def test_file_and_table_say_the_same(tmp_path: Path) -> None:
    rows = report_rows(answers(), n_resamples=200)
    write_report(tmp_path / "reports" / "test_retrieval.csv", rows)
    frame = pd.read_csv(tmp_path / "reports" / "test_retrieval.csv")
    assert list(frame.columns) == ["direction", "metric", "value", "low", "high", "n"]
    assert [Row(*values) for values in frame.itertuples(index=False)] == rows
    assert [path.name for path in (tmp_path / "reports").iterdir()] == ["test_retrieval.csv"]
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(report_table(rows, "test"))
    printed = console.export_text()
    assert f"n = {IMAGES}" in printed
    row = by_name(rows)["text_to_image", "R@5"]
    assert f"{row.value:.3f} [{row.low:.3f}, {row.high:.3f}]" in printed
    assert f"mean_recall {rows[-1].value:.3f} [" in printed
    assert "cannot be below 1" not in printed
    few = Console(width=100, file=io.StringIO(), record=True)
    few.print(report_table(rows, "test", {"image_to_text": 11, "text_to_image": 5}))
    told = " ".join(few.export_text().split())
    assert "R@5, R@10 of text_to_image cannot be below 1: there are 5 candidates" in told
    assert "of image_to_text" not in told
