from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluation.__main__ import main
from evaluation.statistics import intervals as statistics
from evaluation.statistics.pooled import join_runs
from evaluation.tables.summary import summarise, summarise_run
from tests.evaluation.predictions_fixture import TASKS, make_predictions
from vitrail.errors import UserError
from vitrail.predictions import Predictions, write_predictions
from vitrail.runs import read_class_counts


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
    # Every answer right: as many trials as objects.
    assert by_class.accuracy_interval == statistics.wilson(1.0, 10)
    known = predictions.targets["colour"][4:]
    assert (by_colour.n, by_colour.groups) == (36, 9)
    assert by_colour.accuracy == pytest.approx(np.mean(known == 0))
    assert by_colour.majority == pytest.approx(np.mean(known == 1))
    statistic = statistics.accuracy_statistic(known, np.zeros_like(known))
    assert by_colour.accuracy_interval == statistics.group_bootstrap(statistic, predictions.groups[4:], 500)


def test_a_result_that_only_guesses_says_so() -> None:
    colour = summarise(good_predictions(), {"colour": [8, 1]}, "run", "test", n_resamples=500)[1]
    assert colour.accuracy == colour.majority
    assert colour.note == "not above majority"


def test_samples_without_a_prediction_are_counted_and_wrong() -> None:
    predictions = good_predictions()
    logits = predictions.logits["class"].copy()
    logits[:6] = 0.0
    tied = dataclasses.replace(predictions, logits={**predictions.logits, "class": logits})
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


def test_one_group_says_nothing_of_others() -> None:
    alone = dataclasses.replace(good_predictions(), groups=np.full(40, "object", dtype=object))
    by_class, _ = summarise(alone, {"class": [3, 9, 4]}, "run", "test", n_resamples=50)
    assert "one group: its interval is a guess" in by_class.note


def test_predictions_of_another_checkpoint_are_told(tmp_path: Path) -> None:
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
def test_record_may_say_nothing(tmp_path: Path, record: object) -> None:
    assert {row.majority_source for row in summarise_run(make_run(tmp_path, record))} == {"split"}


def test_record_that_contradicts_is_told(tmp_path: Path) -> None:
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
