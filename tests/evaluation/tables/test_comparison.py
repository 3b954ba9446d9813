from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from evaluation.commands.compare import sentences
from evaluation.commands.efficiency import write_costs as write
from evaluation.efficiency import BatchCost, Costs, Counts
from evaluation.statistics.paired import holm, mcnemar_p
from evaluation.tables.comparison import (
    Side,
    caveats,
    common_tasks,
    compare_sides,
    comparison_frame,
    cost_of,
    evaluations_of,
    parts,
    sides_of,
)
from tests.evaluation.statistics.test_paired import two_models
from tests.support.runs import write_run
from vitrail.errors import UserError
from vitrail.predictions import Predictions, read_predictions, write_predictions
from vitrail.runs import Run, write_temperatures


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compared")
    write_run(folder, "small", wrong=0.5, gallery=False)
    write_run(folder, "large", seed=1, wrong=0.1, gallery=False)
    return folder


@pytest.fixture
def runs(written: Path, tmp_path: Path) -> list[Path]:
    """Two experiments of one run each, to be changed."""
    found = []
    for name in ("small", "large"):
        found.append(next(Path(shutil.copytree(written / name, tmp_path / name)).iterdir()))
        change_targets(found[-1])
    return found


def change_targets(run: Path) -> None:
    """Give a run's test set colours that do not depend on the run's seed."""
    path = run / "predictions" / "test.parquet"
    found = read_predictions(path)
    write_predictions(path, replace(found, targets={**found.targets, "colour": np.arange(len(found)) % 2}))


def change_record(run: Path, **facts: Any) -> None:
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    (run / "run.json").write_text(json.dumps({**record, **facts}), encoding="utf-8")


def side(name: str, *predictions: Predictions, folder: Path) -> Side:
    (folder / name).mkdir()
    (folder / name / "run.json").write_text("{}", encoding="utf-8")
    return Side(name, [Run(folder / name)] * len(predictions), list(predictions))


def test_rows_are_paired_comparisons_corrected_together(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    good, bad = two_models(rng, 40, (0.95, 0.4))
    worse = two_models(np.random.default_rng(0), 40, (0.95, 0.7))[0]
    assert (good.targets["class"] == worse.targets["class"]).all()
    sides = [side(name, one, folder=tmp_path) for name, one in (("good", good), ("bad", bad), ("same", good))]
    rows = compare_sides(sides, ["class"], n_resamples=500)
    assert [row.verdict for row in rows] == ["reference", "worse model, one seed", "no clear difference"]
    right = [one.predicted("class") == one.targets["class"] for one in (good, bad)]
    exact = mcnemar_p(int((right[1] & ~right[0]).sum()), int((right[0] & ~right[1]).sum()))
    assert [row.mcnemar_p for row in rows[1:]] == pytest.approx(holm([exact, 1.0]))
    alone = compare_sides(sides[:2], ["class"], n_resamples=500)
    assert rows[1].p_value == pytest.approx(2 * alone[1].p_value)
    assert alone[1].comparison is not None
    assert alone[1].comparison.accuracy_difference.value == pytest.approx(right[1].mean() - right[0].mean())
    assert math.isnan(rows[0].p_value)
    assert rows[0].joined.accuracy.pooled.value == pytest.approx(right[0].mean())


def test_samples_without_a_prediction_have_a_column(tmp_path: Path) -> None:
    good, bad = two_models(np.random.default_rng(0), 40, (0.95, 0.4))
    silent = bad.logits["class"].copy()
    silent[3:8] = 0.5
    sides = [side("good", good, folder=tmp_path)]
    costs = {"good": cost_of(sides[0])}
    assert "no prediction" not in comparison_frame(compare_sides(sides, ["class"], n_resamples=50), costs)
    sides.append(side("silent", replace(bad, logits={"class": silent}), folder=tmp_path))
    costs["silent"] = cost_of(sides[1])
    frame = comparison_frame(compare_sides(sides, ["class"], n_resamples=50), costs)
    assert frame["no prediction"].tolist() == ["–", "5"]


def test_best_of_the_first_task_as_reference(tmp_path: Path) -> None:
    good, bad = two_models(np.random.default_rng(0), 40, (0.95, 0.4))
    sides = [side("bad", bad, folder=tmp_path), side("good", good, folder=tmp_path)]
    rows = compare_sides(sides, ["class"], "best", n_resamples=200)
    assert [row.verdict for row in rows] == ["worse model, one seed", "reference"]


def test_seeds_are_one_row(tmp_path: Path) -> None:
    first, second = two_models(np.random.default_rng(0), 20, (0.9, 0.6))
    sides = [side("two", first, second, folder=tmp_path), side("one", second, folder=tmp_path)]
    costs = {one.name: cost_of(one) for one in sides}
    frame = comparison_frame(compare_sides(sides, ["class"], n_resamples=200), costs)
    row = frame.iloc[0]
    scores = [(one.predicted("class") == one.targets["class"]).mean() for one in (first, second)]
    tables = parts(frame)
    assert list(tables["accuracies"])[-1] == "mean ± sd of runs"
    assert list(tables["differences"])[:4] == ["run", "task", "difference [95 %]", "over seeds [95 %]"]
    assert list(tables["differences"])[-1] == "verdict"
    assert row["runs"] == "2 (seeds)"
    assert row["mean ± sd of runs"] == f"{np.mean(scores):.3f} ± {np.std(scores, ddof=1):.3f}"


WITHOUT_SEEDS = "A run without other seeds shows that very training"


def test_folds_have_one_seed_each(tmp_path: Path) -> None:
    models = two_models(np.random.default_rng(0), 20, (0.9, 0.6))
    half = np.arange(len(models[0])) < len(models[0]) // 2
    folds = [[model.take(np.flatnonzero(rows)) for rows in (half, ~half)] for model in models]
    sides = [side(name, *own, folder=tmp_path) for name, own in zip("AB", folds, strict=True)]
    rows = compare_sides(sides, ["class"], n_resamples=100)
    notes = " ".join(sentences(rows, "first"))
    assert WITHOUT_SEEDS in notes
    assert "ver seeds" not in notes


@pytest.mark.parametrize("seeds", [(1, 1), (2, 1), (2, 2)])
def test_notes_show_what_is_known_of_seeds(tmp_path: Path, seeds: tuple[int, int]) -> None:
    first, second = two_models(np.random.default_rng(0), 20, (0.9, 0.6))
    sides = [
        side(name, *([first, second] if count == 2 else [second]), folder=tmp_path)
        for name, count in zip(("A", "B"), seeds, strict=True)
    ]
    rows = compare_sides(sides, ["class"], n_resamples=100)
    notes = " ".join(sentences(rows, "first"))
    assert (WITHOUT_SEEDS in notes) == (1 in seeds)
    assert ("Over seeds: what training again would change" in notes) == (2 in seeds)
    assert ("over seeds [" in notes) == (2 in seeds)
    frame = comparison_frame(rows, {one.name: cost_of(one) for one in sides})
    assert ("over seeds [95 %]" in frame) == (2 in seeds)
    if 2 in seeds:
        assert frame["over seeds [95 %]"][0] == "–" != frame["over seeds [95 %]"][1]


def test_confidences_are_compared_too(runs: list[Path]) -> None:
    def row() -> Any:
        sides = sides_of(runs, "test", join=False)
        costs = {one.name: cost_of(one) for one in sides}
        return comparison_frame(compare_sides(sides, ["class"], n_resamples=200), costs).iloc[1]

    before = row()
    assert "calibrated ECE [95 %]" not in before
    write_temperatures(runs[1], {"class": 1.0}, {})
    assert row()["calibrated ECE [95 %]"] == before["ECE [95 %]"]
    write_temperatures(runs[1], {"class": 9.0}, {})
    after = row()
    assert after["ECE [95 %]"] == before["ECE [95 %]"] != after["calibrated ECE [95 %]"] != "–"


def test_runs_and_their_cost(runs: list[Path]) -> None:
    sides = sides_of(runs, "test", join=False)
    assert [one.name for one in sides] == ["small", "large"]
    assert common_tasks(sides) == ["class", "colour"]
    assert common_tasks(sides, "colour") == ["colour"]
    cost = cost_of(sides[1])
    assert (cost.parameters, cost.minutes) == (2000, 3.5)
    assert math.isnan(cost.latency)
    counts = Counts(1, 1, 1, None, 1, 32)
    write(runs[0] / "efficiency.json", {"small": (counts, Costs("cpu", 1, "small", {1: BatchCost([0.02], [1.0], 1)}))})
    assert cost_of(sides[0]).latency == pytest.approx(20)
    assert caveats(sides) == []
    write(runs[1] / "efficiency.json", {"large": (counts, Costs("cpu", 1, "large", {1: BatchCost([0.01], [1.0], 1)}))})
    assert "Latencies were not measured together" in caveats(sides)[0]


def test_what_a_part_of_the_model_trained_is_a_column(runs: list[Path]) -> None:
    sides = sides_of(runs, "test", join=False)
    rows = compare_sides(sides, ["class"], n_resamples=50)
    assert "trainable" not in comparison_frame(rows, {side.name: cost_of(side) for side in sides})
    stage = {"stage": "fit", "started": "2026-01-01T10:00:00", "exit": "finished", "trainable": 12}
    change_record(runs[0], stages=[stage])
    costs = {side.name: cost_of(side) for side in sides_of(runs, "test", join=False)}
    frame = comparison_frame(rows, costs)
    assert dict(zip(frame["run"], frame["trainable"], strict=True)) == {"small": "12", "large": "–"}


def test_unfinished_training_has_no_time_and_a_note(runs: list[Path]) -> None:
    change_record(runs[0], stages=[{"stage": "fit", "started": "2026-01-01T10:00:00", "exit": "unfinished"}])
    change_record(runs[1], hardware={"machine": "other"})
    sides = sides_of(runs, "test", join=False)
    assert math.isnan(cost_of(sides[0]).minutes)
    notes = caveats(sides)
    assert "was interrupted" in notes[0]
    assert "different machines" in notes[1]


def test_runs_of_one_experiment_are_joined_where_asked(runs: list[Path], tmp_path: Path) -> None:
    again = Path(shutil.copytree(runs[0], tmp_path / "small" / "again"))
    config = yaml.safe_load((again / "config.yaml").read_text(encoding="utf-8"))
    (again / "config.yaml").write_text(yaml.safe_dump({**config, "seed_everything": 8}), encoding="utf-8")
    every = [*runs, again]
    assert [one.name for one in sides_of(every, "test", join=False)] == [
        "small/20260101-100000",
        "large",
        "small/again",
    ]
    joined = sides_of(every, "test", join=True)
    assert [(one.name, len(one.runs)) for one in joined] == [("small", 2), ("large", 1)]
    config["model"]["init_args"]["lr"] = 9.0
    (again / "config.yaml").write_text(yaml.safe_dump({**config, "seed_everything": 8}), encoding="utf-8")
    with pytest.raises(UserError, match=r"compare --join: .* are not of one experiment: model.init_args.lr"):
        sides_of(every, "test", join=True)


def test_what_cannot_be_compared_is_refused(runs: list[Path]) -> None:
    with pytest.raises(UserError, match="there is one run; name at least two"):
        sides_of(runs[:1], "test", join=False)
    with pytest.raises(UserError, match="name every run once"):
        sides_of([runs[0], runs[0]], "test", join=False)
    with pytest.raises(UserError, match=r"val.parquet: there are no predictions"):
        sides_of(runs, "val", join=False)
    sides = sides_of(runs, "test", join=False)
    with pytest.raises(UserError, match="--task size: not all runs predict it; all predict class, colour"):
        common_tasks(sides, "size")
    fewer = replace(sides[1], predictions=[sides[1].predictions[0].take(np.arange(8))])
    with pytest.raises(UserError, match=r"the samples differ: 1 only in small \(first '.*'\)|1 only in"):
        compare_sides([sides[0], fewer], ["class"], n_resamples=10)


def evaluate(run: Path, name: str, predictions: Predictions, **facts: Any) -> None:
    """Leave what ``vitrail evaluate`` leaves."""
    write_predictions(run / "evaluations" / name / "predictions" / "test.parquet", predictions)
    record = {"name": "copied", "evaluation": facts}
    (run / "evaluations" / name / "run.json").write_text(json.dumps(record), encoding="utf-8")


def test_evaluations_follow_the_runs_own_results_and_are_corrected_with_them(runs: list[Path]) -> None:
    good, bad = two_models(np.random.default_rng(0), 40, (0.95, 0.4))
    evaluate(runs[0], "shop", bad)
    evaluate(runs[1], "shop", good)
    evaluate(runs[1], "alone", good)
    sides = sides_of(runs, "test", join=False)
    alone = compare_sides(sides, ["class"], n_resamples=200)
    evaluations, left_out = evaluations_of(sides)

    rows = compare_sides(sides, ["class"], n_resamples=200, evaluations=evaluations)

    assert left_out == []
    assert [(row.data, row.side, row.verdict) for row in rows] == [
        ("", "small", "reference"),
        ("", "large", "no clear difference"),
        ("alone", "large", "not compared"),
        ("shop", "small", "reference"),
        ("shop", "large", "better model, one seed"),
    ]
    right = [(one.predicted("class") == one.targets["class"]).mean() for one in (good, bad)]
    assert rows[4].joined.accuracy.pooled.value == pytest.approx(right[0])
    assert rows[4].comparison is not None
    assert rows[4].comparison.accuracy_difference.value == pytest.approx(right[0] - right[1])
    assert alone[1].comparison is not None
    raw = [alone[1].comparison.p_value, rows[4].comparison.p_value]
    assert [rows[1].p_value, rows[4].p_value] == pytest.approx(holm(raw))
    notes = sentences(rows, "first")
    assert notes[0].startswith("Differences are to small, small on shop, on the same samples")
    assert any(note.startswith("large on shop is a better model than small on shop on 'class'") for note in notes)
    frame = comparison_frame(rows, {one.name: cost_of(one) for one in sides})
    assert frame["data"].tolist() == ["own", "own", "alone", "shop", "shop"]
    assert [list(part)[:3] for name, part in parts(frame).items() if name != "cost"] == [
        ["run", "data", "task"],
        ["run", "data", "task"],
    ]
    assert len(parts(frame)["cost"]) == 2


def test_restricted_evaluations_have_a_note_and_are_not_compared_with_others(runs: list[Path]) -> None:
    good, bad = two_models(np.random.default_rng(0), 40, (0.95, 0.4))
    kept = good.tasks["class"][:2]
    fewer = replace(
        good,
        tasks={"class": kept},
        targets={"class": np.where(good.targets["class"] < 2, good.targets["class"], -1)},
        logits={"class": good.logits["class"][:, :2]},
    )
    evaluate(runs[0], "shop", bad)
    evaluate(runs[1], "shop", fewer, classes={"class": kept})
    sides = sides_of(runs, "test", join=False)

    rows = compare_sides(sides, ["class"], n_resamples=50, evaluations=evaluations_of(sides)[0])

    assert [row.verdict for row in rows[2:]] == ["reference", "not compared"]
    assert rows[2].note == ""
    assert rows[3].note.startswith("restricted to 2 of its classes; not compared: ")
    frame = comparison_frame(rows, {one.name: cost_of(one) for one in sides})
    assert list(parts(frame)["accuracies"])[-1] == "note"


def test_of_several_seeds_all_must_have_been_evaluated(runs: list[Path], tmp_path: Path) -> None:
    again = Path(shutil.copytree(runs[0], tmp_path / "small" / "again"))
    config = yaml.safe_load((again / "config.yaml").read_text(encoding="utf-8"))
    (again / "config.yaml").write_text(yaml.safe_dump({**config, "seed_everything": 8}), encoding="utf-8")
    good, bad = two_models(np.random.default_rng(0), 10, (0.95, 0.4))
    evaluate(runs[0], "shop", bad)

    found, left_out = evaluations_of(sides_of([*runs, again], "test", join=True))

    assert found == []
    assert left_out == ["small on shop: left out, only 1 of its 2 runs have it."]
    evaluate(again, "shop", good.take(np.arange(4)))
    found, left_out = evaluations_of(sides_of([*runs, again], "test", join=True))
    assert found == []
    assert left_out[0].startswith("small on shop: left out, ")
    evaluate(again, "shop", good)
    found, left_out = evaluations_of(sides_of([*runs, again], "test", join=True))
    assert [(one.data, [len(side.runs) for side in one.sides]) for one in found] == [("shop", [2])]
