from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from evaluation.__main__ import main
from evaluation.tables.summary import share, summarise_run, wide_table, with_interval
from tests.evaluation.tables.test_summary import good_predictions
from vitrail.predictions import write_predictions


def make_runs(folder: Path, *sizes: int) -> list[Path]:
    runs = [folder / "shop" / f"run {number}" for number in range(len(sizes))]
    for run, size in zip(runs, sizes, strict=True):
        write_predictions(run / "predictions" / "test.parquet", good_predictions(size))
    return runs


def test_a_run_is_a_row_and_a_task_a_column(tmp_path: Path) -> None:
    rows = [row for run in make_runs(tmp_path, 40, 40) for row in summarise_run(run)]
    table = wide_table(rows)
    headings, cells = table.columns, table.rows
    assert headings == ["run", "class, test (n 40, 10 objects) [95 %]", "colour, test (n 36, 9 objects) [95 %]"]
    assert cells[0] == ["majority", *(f"{share(row.majority)} (of the split itself)" for row in rows[:2])]
    trained = [dataclasses.replace(row, majority_source="train") for row in rows]
    assert wide_table(trained).rows[0] == ["majority", share(rows[0].majority), share(rows[1].majority)]
    assert cells[1] == ["shop/run 0", *(with_interval(row.accuracy, row.accuracy_interval) for row in rows[:2])]
    assert [row[0] for row in cells] == ["majority", "shop/run 0", "shop/run 1"]


def test_runs_of_different_sizes_say_their_own_and_have_no_common_baseline(tmp_path: Path) -> None:
    rows = [row for run in make_runs(tmp_path, 40, 32) for row in summarise_run(run)]
    table = wide_table([*rows[:2], rows[2]])
    headings, cells = table.columns, table.rows
    assert headings[1] == "class, test [95 %]"
    assert [row[0] for row in cells] == ["shop/run 0", "shop/run 1"]
    assert cells[0][1].endswith(", n 40")
    assert cells[1][1].endswith(", n 32")
    assert cells[1][2] == "–"


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(run) for run in make_runs(tmp_path, 40, 40)]
    main(["summary", *runs, "--wide", "--markdown"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert {line.count("|") for line in lines} == {4}
    main(["summary", *runs, "--wide"])
    assert "n 36, 9 objects" in " ".join(capsys.readouterr().out.split())
    assert main(["summary", *runs, "--wide", "--json"]) == 2
    assert "--wide" in capsys.readouterr().err
