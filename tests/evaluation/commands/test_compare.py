from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from evaluation.__main__ import main
from experiments.train.cli import main as fit
from tests.evaluation.commands.test_report import not_finite
from tests.evaluation.predictions_fixture import make_predictions_of_every_kind
from tests.evaluation.report.test_page import Checked
from tests.evaluation.tables.test_comparison import change_targets
from tests.support.runs import write_run
from vitrail.predictions import read_predictions, write_predictions


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("compared")
    found = [write_run(folder, "small", wrong=0.5, gallery=False)]
    found.append(write_run(folder, "large", seed=1, wrong=0.1, gallery=False))
    for run in found:
        change_targets(run)
    return found


def compare(runs: list[Path], *arguments: str) -> int:
    return main(["compare", *map(str, runs), *arguments])


def test_table_and_sentences(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(runs, "--markdown") == 0
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    heads = [cell.strip() for cell in lines[0].strip("|").split("|")]
    rows = [dict(zip(heads, (cell.strip() for cell in line.strip("|").split("|")), strict=True)) for line in lines[2:]]
    assert [(row["run"], row["task"]) for row in rows] == [
        (run, task) for task in ("class", "colour") for run in ("small", "large")
    ]
    found = [read_predictions(run / "predictions" / "test.parquet") for run in runs]
    scores = [(one.predicted("class") == one.targets["class"]).mean() for one in found]
    assert rows[1]["accuracy [95 %]"].startswith(f"{scores[1]:.3f} [")
    assert rows[1]["difference [95 %]"].startswith(f"{scores[1] - scores[0]:+.3f} [")
    assert [row["verdict"] for row in rows] == ["reference", "no clear difference"] * 2  # of three groups
    assert "large and small do not differ clearly on 'class' (difference" in printed
    assert "p-values are corrected for 2 comparisons (Holm)." in printed
    assert "runs" not in heads
    assert "ms/image" not in heads


def test_evaluations_on_other_data_sets_are_shown(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copies = [Path(shutil.copytree(run.parent, tmp_path / run.parent.name)) / run.name for run in runs]
    for run in copies:
        source = run / "predictions" / "test.parquet"
        target = run / "evaluations" / "elsewhere" / "predictions" / "test.parquet"
        target.parent.mkdir(parents=True)
        shutil.copy(source, target)
    (copies[1] / "evaluations" / "elsewhere" / "run.json").write_text(
        '{"evaluation": {"classes": {"class": ["bag", "cap", "mug"]}}}', encoding="utf-8"
    )

    assert compare(copies, "--markdown", "--task", "class") == 0

    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith("| ") and not line.startswith("| ---")]
    assert [[cell.strip() for cell in row.split("|")[1:3]] for row in rows] == [
        ["run", "data"],
        ["small", "own"],
        ["large", "own"],
        ["small", "elsewhere"],
        ["large", "elsewhere"],
    ]
    assert "restricted to 3 of its classes" in rows[4]
    assert "restricted" not in rows[3]


def test_page_with_table_and_plot(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(runs, "--html", str(tmp_path / "page.html"), "--task", "class", "--reference", "best") == 0
    printed = capsys.readouterr().out
    assert "The reference was chosen by its accuracy on these very samples" in printed
    assert f"{tmp_path / 'page.html'} has the page" in printed
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    parser = Checked()
    parser.feed(text)
    assert parser.open == []
    assert all(address.startswith(("data:image/", "#")) for address in parser.addresses)
    titles = ["Differences", "Images on which they differ", "Score against cost", "Table", "In words", "Runs"]
    assert re.findall("<h2>(.*?)</h2>", text) == ["How sure", "What to do next", *titles]
    assert (tmp_path / "page" / "pareto_minutes.svg").is_file()
    table = pd.read_csv(tmp_path / "page" / "compared.csv")
    assert table["run"].tolist() == ["small", "large"]
    assert table["verdict"].tolist() == ["no clear difference", "reference"]
    shown = [pd.read_csv(tmp_path / "page" / f"{name}.csv") for name in ("accuracies", "other_scores", "cost")]
    assert [part.columns[-1] for part in shown] == ["verdict", "ECE [95 %]", "train min"]
    assert set(table.columns) == {name for part in shown for name in part.columns}
    assert all(f"{name}.csv" in text for name in ("accuracies", "other_scores", "cost"))
    assert f"for every run: run <code>python -m evaluation efficiency {runs[0]} {runs[1]}</code>" in text


def test_a_terminal_has_cost_once_a_run(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(runs) == 0
    *_, scores, cost = re.split(r"(?m)^(?=┏)", capsys.readouterr().out)
    assert [scores.count(f"│ {name} ") for name in ("small", "large")] == [2, 2]
    assert [cost.count(f"│ {name} ") for name in ("small", "large")] == [1, 1]
    assert "train min" in cost


def test_other_test_sets_are_refused_in_one_line(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = read_predictions(runs[1] / "predictions" / "test.parquet")
    names = found.names.copy()
    names[0] = "another.jpg"
    write_predictions(tmp_path / "other" / "1" / "predictions" / "test.parquet", replace(found, names=names))
    assert compare([runs[0], tmp_path / "other" / "1"]) == 2
    printed = capsys.readouterr().err
    assert "the samples differ: 1 only in" in printed
    assert "'another.jpg'" in printed
    assert len(printed.splitlines()) == 1


@pytest.mark.parametrize("split", ["val", "nonsense"])
def test_runs_without_predictions_are_refused(runs: list[Path], split: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(runs, "--split", split) == 2
    printed = capsys.readouterr().err
    assert f"predictions/{split}.parquet: there are no predictions; write them with" in printed
    assert len(printed.splitlines()) == 1


def test_a_task_without_targets_has_no_numbers(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = []
    for number, run in enumerate(runs):
        found = read_predictions(run / "predictions" / "test.parquet")
        targets = {**found.targets, "colour": np.full(len(found), -1)}
        paths.append(tmp_path / f"run{number}" / "1")
        write_predictions(paths[-1] / "predictions" / "test.parquet", replace(found, targets=targets))
    assert compare(paths, "--markdown") == 0
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if "colour" in line and "run1" in line)
    assert "| 0 | 0 | – | – | – | – | no known targets |" in row
    assert "cannot be compared on 'colour': no sample has a known target." in printed
    assert "nan" not in printed
    assert compare(paths, "--markdown", "--task", "colour", "--reference", "best") == 0
    printed = capsys.readouterr().out
    # Neither was any calibration error computed, nor a reference chosen.
    assert "ECE" not in printed
    assert "was chosen by its accuracy" not in printed


def test_logits_that_are_not_finite_are_refused(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = Path(shutil.copytree(runs[1], tmp_path / "large" / "1"))
    not_finite(broken)
    assert compare([runs[0], broken]) == 2
    printed = capsys.readouterr().err
    assert "logits of task 'class' are not finite for 1 of 9 samples" in printed
    assert len(printed.splitlines()) == 1


def test_runs_of_other_seeds_next_to_the_named_ones_are_joined(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = []
    for name, wrong in (("small", 0.5), ("large", 0.1)):
        of_seeds = [write_run(tmp_path, name, seed=seed, wrong=wrong, gallery=False) for seed in (0, 1, 2)]
        shutil.copy(of_seeds[1] / "config.yaml", of_seeds[2])  # the third repeats the second
        named.append(of_seeds[0])
    assert compare(named, "--seeds", "2", "--task", "class") == 0
    assert capsys.readouterr().out.count("2 (seeds)") == 2
    (named[0] / "config.yaml").write_text("name: small")
    assert compare(named, "--seeds", "2") == 2
    assert "train it again with one" in capsys.readouterr().err
    assert compare(named, "--seeds", "1") == 2
    assert "--seeds: must be at least 2; got 1" in capsys.readouterr().err


@pytest.mark.slow
def test_missing_seeds_are_trained_on_the_same_splits(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["--trainer.max_epochs=1", "--data.init_args.n_samples=150", "--report=false", f"--runs={tmp_path}"]
    for name, rate in (("low", "0.001"), ("high", "0.01")):
        own = [f"--name={name}", f"--model.init_args.lr={rate}"]
        assert fit(["fit", "--config=experiments/quickstart.yaml", *own, *arguments]) == 0
    named = [next((tmp_path / name).iterdir()) for name in ("low", "high")]
    assert compare(named, "--seeds", "2", "--task", "class") == 0
    printed = capfd.readouterr().out
    assert "training with seed 43" in printed
    assert printed.count("2 (seeds)") >= 2
    for run in named:
        parts = [read_predictions(one / "predictions" / "test.parquet") for one in run.parent.iterdir()]
        assert len(parts) == 2
        assert set(parts[0].names) == set(parts[1].names)
        assert not np.allclose(parts[0].logits["class"], parts[1].logits["class"])


def test_tasks_of_every_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = []
    for name, noise in (("a", 1.5), ("b", 0.4)):
        runs.append(tmp_path / name / "run")
        predictions = make_predictions_of_every_kind(noise=noise)
        write_predictions(runs[-1] / "predictions" / "test.parquet", predictions)
        (runs[-1] / "run.json").write_text("{}")
    assert compare(runs, "--markdown", "--html", str(tmp_path / "page.html")) == 0
    printed = capsys.readouterr().out
    tables = printed.split("\n\n")
    assert [table.split(" [95 %]")[0].rpartition("| ")[2] for table in tables[:4]] == [
        "accuracy",
        "accuracy",
        "mAP",
        "MAE",
    ]
    assert tables[3].splitlines()[3].count("better model, one seed") == 1
    assert "tags: mAP is no mean over samples, so there is no test" in printed
    assert "p-values are corrected for 3 comparisons" in printed
    assert (tmp_path / "page" / "compared_regression.csv").exists()
    assert "| task | label | run | n | support | ECE [95 %] | by chance |" in printed.replace(
        "calibrated ECE [95 %] | ", ""
    )
    assert "ECE of a label: how far" in printed
    calibration = pd.read_csv(tmp_path / "page" / "number_calibration.csv")
    assert calibration["run"].tolist() == ["a", "b"] * (len(calibration) // 2)
    assert compare(runs, "--markdown", "--metrics", "auroc", "brier") == 0
    printed = capsys.readouterr().out
    assert "AUROC: difference [95 %] | Brier [95 %] | Brier: difference [95 %] | Brier: p |" in printed
    assert "AUROC: no means over samples, so without a test" in printed
    assert "price (regression) has no AUROC, Brier" in printed
    assert compare(runs, "--json", "--metrics", "brier", "auroc") == 0
    found = json.loads(capsys.readouterr().out)
    second = next(row for row in found["rows"] if row["task"] == "class" and not row["reference"])
    low, high = second["scores"]["brier"]["difference_interval"]
    assert low < second["scores"]["brier"]["difference"] < high < 0
    assert second["scores"]["brier"]["p_value"] < 0.01
    assert second["scores"]["auroc"]["p_value"] is None
    assert compare(runs, "--task", "price", "--reference", "best") == 0
    assert "worse model" in capsys.readouterr().out
