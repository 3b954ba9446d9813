from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from sklearn.metrics import log_loss

from evaluation.__main__ import main
from evaluation.retrieval import Row, report_rows, write_report
from evaluation.statistics import intervals as statistics
from evaluation.statistics.pooled import join_runs
from evaluation.tables.summary import (
    join_summaries,
    joined_table,
    share,
    summarise,
    summarise_run,
    wide_table,
    with_interval,
)
from tests.evaluation.predictions_fixture import TASKS, make_predictions, make_predictions_of_every_kind
from tests.evaluation.test_retrieval import answers
from vitrail.errors import UserError
from vitrail.predictions import Predictions, read_predictions, write_predictions
from vitrail.runs import read_class_counts, write_temperatures


def good_predictions(n: int = 40) -> Predictions:
    """The class is always right, the colour never but for chance; one object a class would be too simple."""
    predictions = make_predictions(n)
    targets = {task: np.abs(values) for task, values in predictions.targets.items()}
    targets["colour"][:4] = -1
    right = np.eye(3, dtype=np.float32)[targets["class"]]
    return Predictions(
        predictions.sample_id,
        predictions.names,
        predictions.groups,
        TASKS,
        targets,
        {"class": right, "colour": np.tile(np.array([1, 0], dtype=np.float32), (n, 1))},
    )


def make_run(folder: Path, record: object = None) -> Path:
    run = folder / "shop" / "first run"
    write_predictions(run / "predictions" / "test.parquet", good_predictions())
    if record is not None:
        (run / "run.json").write_text(json.dumps(record), encoding="utf-8")
    return run


def test_numbers_of_each_task() -> None:
    predictions = good_predictions()
    by_class, by_colour = summarise(predictions, {"class": [3, 9, 4], "colour": [1, 8]}, "run", "test", n_resamples=500)
    assert (by_class.task, by_class.n, by_class.groups, by_class.accuracy) == ("class", 40, 10, 1.0)
    assert by_class.majority == pytest.approx(np.mean(predictions.targets["class"] == 1))
    assert (by_class.majority_source, by_class.majority_label) == ("train", "cap")
    assert by_class.above_majority
    assert by_class.note == ""
    # All right: as many trials as objects.
    assert by_class.accuracy_interval == statistics.wilson(1.0, 10)
    known = predictions.targets["colour"][4:]
    assert (by_colour.n, by_colour.groups) == (36, 9)
    assert by_colour.accuracy == pytest.approx(np.mean(known == 0))
    assert by_colour.majority == pytest.approx(np.mean(known == 1))
    statistic = statistics.accuracy_statistic(known, np.zeros_like(known))
    assert by_colour.accuracy_interval == statistics.group_interval(statistic, predictions.groups[4:], 500)


def test_a_result_that_only_guesses_has_a_note() -> None:
    colour = summarise(good_predictions(), {"colour": [8, 1]}, "run", "test", n_resamples=500)[1]
    assert colour.accuracy == colour.majority
    assert colour.note == "not above majority"


def test_samples_without_a_prediction_are_counted_and_wrong() -> None:
    predictions = good_predictions()
    logits = predictions.logits["class"].copy()
    logits[:6] = 0.0
    tied = replace(predictions, logits={**predictions.logits, "class": logits})
    by_class = summarise(tied, {"class": [3, 9, 4]}, "run", "test", n_resamples=200)[0]
    # Whatever their targets: six of forty are not right, and are not among the first three of three either.
    assert by_class.accuracy == 34 / 40
    assert by_class.note.endswith("6 without a prediction")
    joined = join_runs([tied], "class", n_resamples=200)
    assert (joined.unanswered, joined.accuracy.pooled.value) == (6, 34 / 40)


def test_without_train_counts_the_split_stands_in() -> None:
    by_class = summarise(good_predictions(), {}, "run", "test", n_resamples=200)[0]
    assert by_class.majority_source == "split"
    assert by_class.note == "majority of the split itself"


def test_a_train_split_without_a_known_value_has_no_majority() -> None:
    by_class, _ = summarise(good_predictions(), {"class": [0, 0, 0]}, "run", "test", n_resamples=50)
    assert (by_class.majority_source, by_class.note) == ("split", "majority of the split itself")


def test_one_group_has_a_note() -> None:
    alone = replace(good_predictions(), groups=np.full(40, "object", dtype=object))
    by_class, _ = summarise(alone, {"class": [3, 9, 4]}, "run", "test", n_resamples=50)
    assert "one group: its interval is a guess" in by_class.note


def test_predictions_of_another_checkpoint_have_a_note(tmp_path: Path) -> None:
    stages = [{"stage": "test", "exit": "finished", "checkpoint": "runs/a/1/checkpoints/best.ckpt"}]
    assert "checkpoint" not in summarise_run(make_run(tmp_path / "a", {"stages": stages}))[0].note
    stages.append({"stage": "test", "exit": "finished", "checkpoint": "runs/a/1/checkpoints/last.ckpt"})
    assert "of checkpoint last, not best" in summarise_run(make_run(tmp_path / "b", {"stages": stages}))[0].note


def test_task_without_known_targets_is_shown_empty() -> None:
    predictions = good_predictions(8)
    predictions.targets["colour"][:] = -1
    colour = summarise(predictions, {}, "run", "test", n_resamples=200)[1]
    assert (colour.n, colour.groups, colour.note) == (0, 0, "no known targets")


def test_run_directory_is_read(tmp_path: Path) -> None:
    run = make_run(tmp_path, {"data": {"class_counts": {"class": [3, 9, 4], "colour": [1, 8]}}})
    rows = summarise_run(run)
    assert [(row.run, row.split, row.majority_source) for row in rows] == [("shop/first run", "test", "train")] * 2


@pytest.mark.parametrize("record", [None, {}, [], {"data": None}, {"data": {"class_counts": None}}])
def test_record_may_be_empty(tmp_path: Path, record: object) -> None:
    assert {row.majority_source for row in summarise_run(make_run(tmp_path, record))} == {"split"}


def test_record_that_contradicts_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"data": {"class_counts": {"class": [1, 2]}}}), encoding="utf-8")
    with pytest.raises(UserError, match=r"class_counts.class has 2 counts for 3 classes"):
        read_class_counts(path, TASKS)
    path.write_text('{"data": ', encoding="utf-8")
    with pytest.raises(UserError, match="not readable as JSON"):
        read_class_counts(path, TASKS)


def test_command_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path)
    assert main(["summary", str(run), str(run)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("first run") == 4
    assert "not above majority" in printed
    assert "1.000 [0.722, 1.000]" in printed
    assert "accuracy [95 %]" in printed


def test_command_prints_markdown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["summary", str(make_run(tmp_path)), "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert {line.count("|") for line in lines} == {10}
    assert lines[0].startswith("| run | split | task | n | groups | majority | accuracy [95 %] |")
    assert lines[2].startswith("| shop/first run | test | class | 40 | 10 |")


def test_command_prints_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path)
    assert main(["summary", str(run), "--json"]) == 0
    rows: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    assert [row["task"] for row in rows] == ["class", "colour"]
    assert rows[0]["accuracy_interval"][1] == 1.0
    assert rows[0]["above_majority"] is True


def test_mistakes_are_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VITRAIL_DEBUG", raising=False)
    assert main(["summary", str(tmp_path / "nowhere")]) == 2
    assert main(["summary", str(make_run(tmp_path)), "--split", "val"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert "no such run directory" in errors[0]
    assert "val.parquet: there are no predictions" in errors[1]
    monkeypatch.setenv("VITRAIL_DEBUG", "1")
    with pytest.raises(UserError):
        main(["summary", str(tmp_path / "nowhere")])


def run_of_every_kind(folder: Path, number: int = 0, noise: float = 1.0) -> Path:
    run = folder / "mixed" / f"run {number}"
    write_predictions(run / "predictions" / "test.parquet", make_predictions_of_every_kind(noise=noise))
    counts = {"class": [3, 2, 1], "grade": [5, 4, 3, 2], "tags": [60, 20, 10], "price": []}
    data = {"class_counts": counts, "samples": {"train": 100}}
    data |= {"target_stats": {"price": [38.0, 20.0]}, "target_medians": {"price": [35.0]}}
    (run / "run.json").write_text(json.dumps({"data": data}), encoding="utf-8")
    return run


def test_each_kind_of_task_has_its_scores_and_constant_prediction(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of_every_kind(tmp_path)
    rows = {row.task: row for row in summarise_run(run)}
    assert {task: row.main for task, row in rows.items()} == {
        "class": "accuracy",
        "grade": "accuracy",
        "tags": "mAP",
        "price": "mae",
    }
    assert {row.majority_source for row in rows.values()} == {"train"}
    assert all(row.above_majority for row in rows.values())
    price = rows["price"]
    known = price.n
    assert known == 59
    assert price.main_score.interval.high < price.majority == price.constant["mae"]
    main(["summary", str(run), "--json"])
    values = {row["task"]: row for row in json.loads(capsys.readouterr().out)}
    assert values["tags"]["mAP"] == rows["tags"].main_score.value
    assert values["price"]["constant_rmse"] == price.constant["rmse"]
    main(["summary", str(run), "--markdown"])
    tables = capsys.readouterr().out.split("\n\n")
    assert len(tables) == 4
    assert "| MAE [95 %] | RMSE [95 %] | R² [95 %] | Spearman [95 %] |" in tables[3]
    assert tables[3].splitlines()[-1].startswith("| constant: median or mean | test | price |")
    main(["summary", str(run), str(run_of_every_kind(tmp_path, 1, 2.0)), "--wide"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "constant prediction" in printed


def test_a_guess_of_labels_or_numbers_has_a_note() -> None:
    predictions = make_predictions_of_every_kind(noise=30.0)
    notes = {row.task: row.note for row in summarise(predictions, {}, "run", "test", n_resamples=200)}
    for task in ("tags", "price"):
        assert notes[task].startswith("not better than constant prediction; constant prediction of the split itself")


def test_runs_of_every_kind_are_joined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(run_of_every_kind(tmp_path, number, 1 + number / 10)) for number in range(2)]
    assert main(["summary", *runs, "--join", "--json"]) == 0
    rows = {row["joined"]["task"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["price"]["majority"] == rows["price"]["constant"]["mae"]
    assert len(rows["tags"]["joined"]["mAP"]["values"]) == 2
    assert rows["class"]["joined"]["accuracy"]["mean"] > 0
    assert main(["summary", *runs, "--join", "--markdown"]) == 0
    assert "| price | 59 | 20 |" in capsys.readouterr().out


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
    trained = [replace(row, majority_source="train") for row in rows]
    assert wide_table(trained).rows[0] == ["majority", share(rows[0].majority), share(rows[1].majority)]
    assert cells[1] == ["shop/run 0", *(with_interval(row.accuracy, row.accuracy_interval) for row in rows[:2])]
    assert [row[0] for row in cells] == ["majority", "shop/run 0", "shop/run 1"]


def test_runs_of_different_sizes_show_their_own_and_have_no_common_baseline(tmp_path: Path) -> None:
    rows = [row for run in make_runs(tmp_path, 40, 32) for row in summarise_run(run)]
    table = wide_table([*rows[:2], rows[2]])
    headings, cells = table.columns, table.rows
    assert headings[1] == "class, test [95 %]"
    assert [row[0] for row in cells] == ["shop/run 0", "shop/run 1"]
    assert cells[0][1].endswith(", n 40")
    assert cells[1][1].endswith(", n 32")
    assert cells[1][2] == "–"


def test_wide_tables_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(run) for run in make_runs(tmp_path, 40, 40)]
    main(["summary", *runs, "--wide", "--markdown"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert {line.count("|") for line in lines} == {4}
    main(["summary", *runs, "--wide"])
    assert "n 36, 9 objects" in " ".join(capsys.readouterr().out.split())
    assert main(["summary", *runs, "--wide", "--json"]) == 2
    assert "--wide" in capsys.readouterr().err


def joinable_run(
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


def seeds_of(folder: Path) -> list[Path]:
    whole = make_predictions(40)
    runs = []
    for seed in (1, 2, 3):
        logits = np.random.default_rng(seed).normal(size=(40, 3)).astype(np.float32)
        predictions = replace(whole, logits={**whole.logits, "class": logits})
        runs.append(joinable_run(folder / "shop" / str(seed), predictions, config_of(seed), [1, 5, 2]))
    return runs


def test_seeds_are_joined(tmp_path: Path) -> None:
    runs = seeds_of(tmp_path)
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
        joinable_run(tmp_path / "shop" / str(fold), part, config_of(1, fold), counts)
        for fold, (part, counts) in enumerate(zip(parts, ([1, 5, 2], [6, 5, 2]), strict=True))
    ]
    row = join_summaries(runs)[0]
    assert (row.joined.kind, row.joined.n) == ("folds", int((whole.targets["class"] >= 0).sum()))
    hits = (parts[0].targets["class"] == 1).sum() + (parts[1].targets["class"] == 0).sum()
    assert row.majority == pytest.approx(hits / row.joined.n)


def test_runs_of_different_experiments_are_refused(tmp_path: Path) -> None:
    first = joinable_run(tmp_path / "a", make_predictions(20), config_of(1))
    other = joinable_run(tmp_path / "b", make_predictions(20), config_of(2, lr=0.2, depth=3))
    with pytest.raises(UserError, match=r"model.init_args.depth is None and 3 \(and 1 more keys\); join runs that"):
        join_summaries([first, other])
    again = joinable_run(tmp_path / "c", make_predictions(20), config_of(1))
    with pytest.raises(UserError, match="have the same seed and fold, so they show nothing of the spread"):
        join_summaries([first, again])
    for runs in ([first], [first, first]):
        with pytest.raises(UserError, match="at least two runs, each once"):
            join_summaries(runs)


def test_without_a_configuration_there_is_a_note(tmp_path: Path) -> None:
    runs = [joinable_run(tmp_path / name, make_predictions(20), None) for name in ("a", "b")]
    assert join_summaries(runs)[0].note.endswith("configurations not compared")


def test_joined_runs_are_printed_in_each_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(run) for run in seeds_of(tmp_path)]
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


def test_mistakes_of_joining_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = seeds_of(tmp_path)
    assert main(["summary", *map(str, runs), "--join", "--split", "val"]) == 2
    (runs[1] / "predictions" / "test.parquet").write_bytes(b"cut")
    assert main(["summary", *map(str, runs), "--join"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert "val.parquet: there are no predictions" in errors[0]
    assert "not a readable Parquet file" in errors[1]


@pytest.fixture
def scores() -> list[Row]:
    return report_rows(answers(), n_resamples=200)


@pytest.fixture
def scored_runs(tmp_path: Path, scores: list[Row]) -> list[str]:
    """One that was tested in both directions, and one that only texts asked."""
    both, texts = tmp_path / "flickr" / "both", tmp_path / "flickr" / "texts"
    write_report(both / "reports" / "test_retrieval.csv", scores)
    write_report(texts / "reports" / "test_retrieval.csv", [row for row in scores if row.direction == "text_to_image"])
    return [str(both), str(texts)]


def test_a_row_a_run_and_direction(
    scored_runs: list[str], scores: list[Row], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["summary", *scored_runs, "--retrieval", "--markdown"]) == 0
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    names = ["R@1", "R@5", "R@10", "median rank", "mAP"]
    assert lines[0] == ["run", "split", "direction", "n", *(f"{name} [95 %]" for name in names)]
    texts = next(str(row.n) for row in scores if row.direction == "text_to_image")
    assert [line[:4] for line in lines[2:]] == [
        ["flickr/both", "test", "image → text", "60"],
        ["flickr/both", "test", "text → image", texts],
        ["flickr/texts", "test", "text → image", texts],
    ]
    first = scores[0]
    assert lines[2][4] == f"{first.value:.3f} [{first.low:.3f}, {first.high:.3f}]"
    assert lines[3][4:] == lines[4][4:]
    assert main(["summary", *scored_runs, "--retrieval"]) == 0
    assert "median rank" in " ".join(capsys.readouterr().out.split())


def test_json_has_every_number(scored_runs: list[str], scores: list[Row], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["summary", scored_runs[0], "--retrieval", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {(one["run"], one["split"]) for one in found} == {("flickr/both", "test")}
    assert [Row(*(one[name] for name in Row._fields)) for one in found] == scores


HEADER = "direction,metric,value,low,high,n\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "--ckpt_path"),
        ("", "not readable as CSV"),
        (HEADER, "needs rows with the columns"),
        ("direction,value\nboth,1\n", "needs rows with the columns"),
        (f"{HEADER}both,mAP,high,0,1,3\n", "finite numbers"),
        (f"{HEADER}both,mAP,,0,1,3\n", "finite numbers"),
        (f"{HEADER}both,mAP,inf,0,1,3\n", "finite numbers"),
    ],
)
def test_a_report_that_cannot_be_read_is_refused(
    tmp_path: Path, content: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "reports").mkdir()
        (tmp_path / "reports" / "val_retrieval.csv").write_text(content)
    assert main(["summary", str(tmp_path), "--retrieval", "--split", "val"]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "val_retrieval.csv" in error
    assert message in error


def test_what_does_not_go_together_is_refused(scored_runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--wide", "--join"):
        assert main(["summary", *scored_runs, "--retrieval", flag]) == 2
        assert "--retrieval: is a table of its own" in capsys.readouterr().err
    assert main(["summary", "nowhere", "--retrieval"]) == 2
    assert "no such run directory" in capsys.readouterr().err


def test_scores_that_are_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of_every_kind(tmp_path)
    assert main(["summary", str(run), "--metrics", "auroc", "nll", "accuracy@.5", "--json"]) == 0
    rows = {row["task"]: row for row in json.loads(capsys.readouterr().out)}
    predictions = read_predictions(run / "predictions" / "test.parquet")
    targets = predictions.targets["class"]
    known = targets >= 0
    assert rows["class"]["nll"] == pytest.approx(log_loss(targets[known], predictions.probabilities("class")[known]))
    assert rows["class"]["nll_interval"][0] < rows["class"]["nll"] < rows["class"]["nll_interval"][1]
    assert "f1_macro" not in rows["class"]
    assert {"auroc", "nll"} < set(rows["tags"])
    assert main(["summary", str(run), "--metrics", "auroc", "mcc", "--markdown"]) == 0
    printed = capsys.readouterr().out
    assert "| majority | AUROC [95 %] | MCC [95 %] | note |" in printed
    assert "no MCC of multi_label tasks" in printed
    assert "no AUROC, MCC of regression tasks" in printed
    others = [str(run_of_every_kind(tmp_path, number, noise=1.1)) for number in (1, 2)]
    assert main(["summary", *others, "--join", "--metrics", "brier", "--markdown"]) == 0
    assert "| Brier |" in capsys.readouterr().out
    assert main(["summary", str(run), "--metrics", "roc"]) == 2
    assert main(["summary", str(run), "--calibrated"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert "no score 'roc'" in errors[0]
    assert "is not calibrated; run `vitrail calibrate" in errors[1]


def test_calibrated_outputs_are_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of_every_kind(tmp_path)
    write_temperatures(run, {"class": 2.0}, {})
    assert main(["summary", str(run), "--metrics", "nll", "--calibrated", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)[0]
    predictions = read_predictions(run / "predictions" / "test.parquet")
    known = predictions.known("class")
    expected = log_loss(predictions.targets["class"][known], predictions.probabilities("class", 2.0)[known])
    assert row["nll"] == pytest.approx(expected, rel=1e-5)


def test_losses_of_a_few_groups_have_a_note() -> None:
    predictions = make_predictions_of_every_kind(n=120, noise=0.0)
    predictions.logits["class"][:] *= 10
    predictions.logits["class"][3] = [9.0, 0.0, 0.0]
    predictions.targets["class"][3] = 1
    summary = summarise(predictions, {}, "run", "test", metrics=("nll",))[0]
    assert "half of the loss is of 1 of 38 groups: the intervals of NLL and Brier may be too narrow" in summary.note


def test_few_classes_of_few_groups_have_a_note_next_to_balanced_accuracy() -> None:
    predictions = make_predictions_of_every_kind(n=120)
    by_class = summarise(predictions, {}, "run", "test", metrics=("balanced_accuracy",), n_resamples=50)[0]
    assert not by_class.thin_classes  # about thirty groups each
    fewer = predictions.take(np.arange(40))
    by_class = summarise(fewer, {}, "run", "test", metrics=("balanced_accuracy",), n_resamples=50)[0]
    assert "3 of 3 classes have fewer than 20 groups: the interval of balanced accuracy" in by_class.note
    assert "20 groups" not in summarise(fewer, {}, "run", "test", n_resamples=50)[0].note
