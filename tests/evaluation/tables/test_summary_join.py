from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from evaluation.__main__ import main
from evaluation.statistics.pooled import join_runs
from evaluation.tables.summary_join import join_summaries, joined_table
from tests.evaluation.predictions_fixture import make_predictions
from vitrail.errors import UserError
from vitrail.predictions import Predictions, read_predictions, write_predictions


def make_run(
    path: Path, predictions: Predictions, config: dict[str, Any] | None, counts: list[int] | None = None
) -> Path:
    write_predictions(path / "predictions" / "test.parquet", predictions)
    if config is not None:
        (path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    data = {"class_counts": {"class": counts}} if counts else {}
    (path / "run.json").write_text(json.dumps({"data": data}), encoding="utf-8")
    return path


def config_of(seed: int, fold: int = 0, **model: Any) -> dict[str, Any]:
    return {
        "seed_everything": seed,
        "name": f"shop {seed}",
        "wandb": {"mode": f"run {seed}"},
        "model": {"init_args": {"lr": 0.1, **model}},
        "data": {"init_args": {"seed": seed, "split": {"fold": fold, "n_folds": 2}}},
    }


def seeds(folder: Path) -> list[Path]:
    whole = make_predictions(40)
    runs = []
    for seed in (1, 2, 3):
        logits = np.random.default_rng(seed).normal(size=(40, 3)).astype(np.float32)
        predictions = replace(whole, logits={**whole.logits, "class": logits})
        runs.append(make_run(folder / "shop" / str(seed), predictions, config_of(seed), [1, 5, 2]))
    return runs


def test_seeds_are_joined(tmp_path: Path) -> None:
    runs = seeds(tmp_path)
    by_class, by_colour = join_summaries(runs)
    predictions = [read_predictions(run / "predictions" / "test.parquet") for run in runs]
    assert by_class.joined == join_runs(predictions, "class", [f"shop/{seed}" for seed in (1, 2, 3)])
    assert (by_class.experiment, by_class.split, by_class.joined.kind) == ("shop", "test", "seeds")
    targets = predictions[0].targets["class"]
    assert by_class.majority == pytest.approx(np.mean(targets[targets >= 0] == 1))
    assert by_class.note == "not above majority"  # logits are noise
    assert by_colour.note == "not above majority; majority of the split itself"


def test_folds_are_joined_each_with_its_own_majority(tmp_path: Path) -> None:
    whole = make_predictions(40)
    parts = [whole.take(np.arange(16)), whole.take(np.arange(16, 40))]
    runs = [
        make_run(tmp_path / "shop" / str(fold), part, config_of(1, fold), counts)
        for fold, (part, counts) in enumerate(zip(parts, ([1, 5, 2], [6, 5, 2]), strict=True))
    ]
    row = join_summaries(runs)[0]
    assert (row.joined.kind, row.joined.n) == ("folds", int((whole.targets["class"] >= 0).sum()))
    hits = (parts[0].targets["class"] == 1).sum() + (parts[1].targets["class"] == 0).sum()
    assert row.majority == pytest.approx(hits / row.joined.n)


def test_runs_of_different_experiments_are_refused(tmp_path: Path) -> None:
    first = make_run(tmp_path / "a", make_predictions(20), config_of(1))
    other = make_run(tmp_path / "b", make_predictions(20), config_of(2, lr=0.2, depth=3))
    with pytest.raises(UserError, match=r"model.init_args.depth is None and 3 \(and 1 more keys\); join runs that"):
        join_summaries([first, other])
    again = make_run(tmp_path / "c", make_predictions(20), config_of(1))
    with pytest.raises(UserError, match="have the same seed and fold, so they say nothing of the spread"):
        join_summaries([first, again])
    for runs in ([first], [first, first]):
        with pytest.raises(UserError, match="at least two runs, each once"):
            join_summaries(runs)


def test_without_a_configuration_it_says_so(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, make_predictions(20), None) for name in ("a", "b")]
    assert join_summaries(runs)[0].note.endswith("configurations not compared")


def test_command_prints_each_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(run) for run in seeds(tmp_path)]
    assert main(["summary", *runs, "--join"]) == 0
    printed = capsys.readouterr().out
    assert "mean ± sd" in printed
    assert printed.count("3 (seeds)") == 4
    assert main(["summary", *runs, "--join", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["joined"]["task"] for row in rows] == ["class", "colour"]
    assert len(rows[0]["joined"]["accuracy"]["values"]) == 3
    assert main(["summary", *runs, "--join", "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert {line.count("|") for line in lines} == {13}
    assert lines == joined_table(join_summaries([Path(run) for run in runs])).markdown().splitlines()


def test_command_tells_a_mistake_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = seeds(tmp_path)
    assert main(["summary", *map(str, runs), "--join", "--split", "val"]) == 2
    (runs[1] / "predictions" / "test.parquet").write_bytes(b"cut")
    assert main(["summary", *map(str, runs), "--join"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert "val.parquet: there are no predictions" in errors[0]
    assert "not a readable Parquet file" in errors[1]
