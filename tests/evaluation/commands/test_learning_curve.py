from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from evaluation.__main__ import main
from evaluation.commands.learning_curve import long_tailed

WARES = ["--data", "datamodules.Wares", "--data.init_args.n_samples", "150", "--data.init_args.resolution", "32"]


def test_curve_and_tables_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--by",
        "margin",
        "--seeds",
        "2",
        "--start",
        "20",
        "--step",
        "15",
        "--rounds",
        "2",
        "--long-tail",
        "0.9",
    ]
    assert main(["learning-curve", *WARES, "--to", str(tmp_path / "out"), *arguments]) == 0
    assert (tmp_path / "out" / "learning_curve.png").stat().st_size > 10_000
    curves = pd.read_csv(tmp_path / "out" / "learning_curve.csv")
    assert curves.groupby(["strategy", "seed"])["labels"].apply(list).tolist() == [[20, 35, 50]] * 4
    summary = pd.read_csv(tmp_path / "out" / "summary.csv").set_index("strategy")
    after = curves[(curves["strategy"] == "margin") & (curves["labels"] > 20)]
    assert summary.loc["margin", "accuracy"] == pytest.approx(after["accuracy"].mean())
    said = capsys.readouterr().out
    assert "measured on 60 images" in said
    row = summary.loc["margin"]
    assert f"| margin | {row['accuracy']:.3f} | {row['last']:.3f} | {row['ahead']:+.3f} [" in said
    assert f"| {row['verdict']} |" in said


def test_long_tail_keeps_whole_groups() -> None:
    labels = np.repeat([0, 1, 2], 40)
    groups = np.array([f"object {row // 4}" for row in range(120)], dtype=object)
    rows = long_tailed(labels, groups, 0.5)
    assert np.bincount(labels[rows]).tolist() == [40, 20, 8]  # 10, 5 and 2 groups of four
    assert all(len(rows[groups[rows] == group]) == 4 for group in set(groups[rows]))
    assert long_tailed(labels, groups, 0.01).tolist() == [*range(40), *range(40, 48), *range(80, 88)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--long-tail", "0"], "--long-tail above 0"),
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--start", "5000"], "less than the pool's 90 images"),
        (["--task", "size"], "--task size: the data have class, colour"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("VITRAIL_DEBUG", raising=False)
    assert main(["learning-curve", *WARES, "--to", str(tmp_path / "out"), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()
