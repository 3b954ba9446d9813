from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.special import expit, softmax

from evaluation.__main__ import main
from evaluation.statistics.calibration import expected_calibration_error
from tests.evaluation.predictions_fixture import make_predictions_of_every_kind
from vitrail.predictions import Predictions, image_predictions, read_predictions, write_predictions
from vitrail.runs import Run
from vitrail.types import UNKNOWN


def overconfident(n: int, seed: int, first_id: int = 0) -> Predictions:
    """The class is drawn with temperature 2.5; nothing is known of the colour; the shape is always right."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=3, size=(n, 4))
    chances = softmax(logits / 2.5, axis=1)
    targets = (rng.random((n, 1)) > chances.cumsum(axis=1)).sum(axis=1).clip(max=3)
    shapes = rng.integers(2, size=n)
    ids = np.arange(first_id, first_id + n)
    return Predictions(
        sample_id=ids,
        names=np.array([f"photo {index}" for index in ids], dtype=object),
        groups=np.array([f"object {index // 2}" for index in ids], dtype=object),
        tasks={"class": ["a", "b", "c", "d"], "colour": ["red", "blue"], "shape": ["long", "round"]},
        targets={"class": targets, "colour": np.full(n, UNKNOWN), "shape": shapes},
        logits={
            "class": logits.astype(np.float32),
            "colour": rng.normal(size=(n, 2)).astype(np.float32),
            "shape": np.eye(2, dtype=np.float32)[shapes],
        },
    )


def _first(value: Any) -> float:
    """The number itself, where JSON has it with its interval."""
    return float(value[0] if isinstance(value, list) else value)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("shop") / "first"
    for number, split in enumerate(("val", "test")):
        write_predictions(run / "predictions" / f"{split}.parquet", overconfident(1_200, number, 10_000 * number))
    return run


@pytest.fixture(scope="module")
def printed(run: Path) -> list[dict[str, Any]]:
    """Rows of the command."""
    import contextlib
    import io

    stream = io.StringIO()
    with contextlib.redirect_stdout(stream):
        assert main(["calibrate", str(run), "--json"]) == 0
    rows: list[dict[str, Any]] = json.loads(stream.getvalue())
    return rows


def test_temperature_is_fitted_on_validation_and_kept(run: Path, printed: list[dict[str, Any]]) -> None:
    found = Run(run).temperatures
    assert found["class"] == pytest.approx(2.5, rel=0.1)
    assert sorted(found) == ["class", "shape"]  # nothing is known of the colour
    content = json.loads((run / "checkpoints" / "calibration.json").read_text(encoding="utf-8"))
    assert content["samples"]["class"] == {"n": 1_200, "groups": 600}


def test_rows_show_calibration_before_and_after(run: Path, printed: list[dict[str, Any]]) -> None:
    assert [(row["task"], row["split"]) for row in printed] == [
        ("class", "val"),
        ("class", "test"),
        ("shape", "val"),
        ("shape", "test"),
    ]
    validation, test = printed[:2]
    assert (validation["note"], test["note"]) == ("fitted here", "")
    predictions = read_predictions(run / "predictions" / "test.parquet")
    correct = predictions.predicted("class") == predictions.targets["class"]
    for key, temperature in (("ece_before", 1.0), ("ece_after", Run(run).temperatures["class"])):
        confidence = predictions.probabilities("class", temperature).max(axis=1)
        value, (low, high) = test[key]
        assert value == pytest.approx(expected_calibration_error(confidence, correct))
        assert low <= value <= high
    for key in ("ece_before", "ece_mass_before"):
        assert _first(test[key]) > 0.15
    for key in ("ece_after", "ece_mass_after"):
        assert _first(test[key]) < 0.05
    assert test["nll_after"] < test["nll_before"]
    assert "all right on val: T at the end" in str(printed[3]["note"])


def test_diagrams_are_drawn(run: Path, printed: list[dict[str, Any]]) -> None:
    names = {path.name for path in (run / "figures").iterdir()}
    assert names == {f"reliability_{split}_{task}.png" for split in ("val", "test") for task in ("class", "shape")}
    with Image.open(run / "figures" / "reliability_test_class.png") as image:
        assert min(image.size) > 400


def test_without_test_predictions_only_validation_is_evaluated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_predictions(tmp_path / "predictions" / "val.parquet", overconfident(60, 0))
    assert main(["calibrate", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "ECE before [95 %]" in out
    assert (out.count("│ val"), out.count("│ test"), out.count("fitted here")) == (2, 0, 2)
    assert out.endswith("calibration.json has the temperatures\n")


def test_notes_on_the_best_temperature_are_those_of_validation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = overconfident(40, 0)
    equal = np.zeros((40, 2), np.float32)
    weak = found.logits["class"] * np.float32(1e-4)  # not all right, but the best temperature is below the range
    logits = {**found.logits, "class": weak, "shape": equal}
    write_predictions(tmp_path / "predictions" / "val.parquet", replace(found, logits=logits))
    # On test the shape is never right.
    wrong = replace(found, targets={**found.targets, "shape": 1 - found.targets["shape"]})
    write_predictions(tmp_path / "predictions" / "test.parquet", wrong)
    assert main(["calibrate", str(tmp_path), "--json"]) == 0
    rows = {(row["task"], row["split"]): row for row in json.loads(capsys.readouterr().out)}
    assert rows["class", "val"]["note"] == "fitted here; T at the lower end of its range"
    # Equal logits stay equal at every temperature.
    assert rows["shape", "val"]["temperature"] == 1.0
    assert rows["shape", "val"]["note"] == "fitted here"


def test_predictions_of_another_checkpoint_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_predictions(tmp_path / "predictions" / "val.parquet", overconfident(40, 0))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "best.ckpt").write_bytes(b"weights")
    stage = {"stage": "validate", "exit": "finished", "checkpoint": str(tmp_path / "checkpoints" / "last.ckpt")}
    (tmp_path / "run.json").write_text(json.dumps({"stages": [stage]}), encoding="utf-8")
    assert main(["calibrate", str(tmp_path)]) == 2
    assert "val.parquet are of checkpoints/last.ckpt" in capsys.readouterr().err
    assert not (tmp_path / "checkpoints" / "calibration.json").exists()


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_predictions(tmp_path / "test" / "predictions" / "test.parquet", overconfident(60, 0))
    nothing = overconfident(60, 0)
    nothing = Predictions(
        nothing.sample_id,
        nothing.names,
        nothing.groups,
        {"colour": nothing.tasks["colour"]},
        {"colour": nothing.targets["colour"]},
        {"colour": nothing.logits["colour"]},
    )
    write_predictions(tmp_path / "unknown" / "predictions" / "val.parquet", nothing)
    for name in ("test", "unknown", "nowhere"):
        assert main(["calibrate", str(tmp_path / name)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3
    assert "val.parquet: there are no predictions; write them with `python -m experiments validate" in errors[0]
    assert "no sample of val has a known target" in errors[1]
    assert "no such run directory" in errors[2]
    assert not (tmp_path / "unknown" / "checkpoints").exists()


def of_labels_and_numbers(n: int, seed: int, *, with_deviation: bool) -> Predictions:
    """Labels are drawn with temperature 2 and biases, errors are twice as large as predicted."""
    rng = np.random.default_rng(seed)
    logits, values = rng.normal(scale=3, size=(n, 2)), rng.normal(50, 10, n)
    deviations = rng.uniform(1, 3, n)
    errors = 2 * deviations * rng.normal(size=n)
    outputs = [values, 2 * np.log(deviations)] if with_deviation else [values]
    ids = np.arange(10_000 * seed, 10_000 * seed + n)
    return Predictions(
        sample_id=ids,
        names=np.array([f"photo {index}" for index in ids], dtype=object),
        groups=np.array([f"object {index // 2}" for index in ids], dtype=object),
        tasks={"tags": ["lid", "red"], "price": []},
        targets={
            "tags": (rng.random((n, 2)) < expit(logits / 2 + (0, -1))).astype(np.int8),
            "price": (values + errors).astype(np.float32),
        },
        logits={"tags": logits.astype(np.float32), "price": np.stack(outputs, axis=1).astype(np.float32)},
        kinds={"tags": "multi_label", "price": "regression"},
        thresholds={"tags": [0.4, 0.7]},
    )


@pytest.mark.parametrize("with_deviation", [True, False])
def test_labels_and_numbers_are_calibrated(
    tmp_path: Path, with_deviation: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    for number, split in enumerate(("val", "test")):
        predictions = of_labels_and_numbers(800, number, with_deviation=with_deviation)
        write_predictions(run / "predictions" / f"{split}.parquet", predictions)
    assert main(["calibrate", str(run), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    labels = [row for row in rows if row["split"] == "test" and "label" in row]
    assert [row["label"] for row in labels] == ["lid", "red"]
    assert all(row["ece_after"][0] < 0.7 * row["ece_before"][0] for row in labels)
    assert labels[0]["temperature"] == pytest.approx(2.0, rel=0.2)
    numbers = [row for row in rows if row["split"] == "test" and "level" in row]
    for row in numbers:
        assert row["after"][0] == pytest.approx(row["level"], abs=0.05)
        assert (row["before"] is None) == (not with_deviation)
        if with_deviation:
            assert row["before"][0] < row["level"] - 0.1
    assert (run / "figures" / "reliability_test_tags.png").exists()
    fitted = Run(run).output_calibration
    assert fitted.labels["tags"][1:] == pytest.approx([0.0, -1.0], abs=0.3)
    calibrated = fitted.apply(predictions)
    np.testing.assert_array_equal(calibrated.predicted_labels("tags"), predictions.predicted_labels("tags"))
    spread = calibrated.deviations("price")
    assert spread is not None
    within = np.abs(predictions.values("price") - predictions.targets["price"]) <= spread
    assert within.mean() == pytest.approx(0.6827, abs=0.05)
    shown = image_predictions(
        ["a.jpg"],
        {task: values[:1] for task, values in predictions.logits.items()},
        predictions.tasks,
        {},
        predictions.kinds,
        predictions.thresholds,
        fitted,
    )[0].tasks
    assert shown["tags"].calibrated
    assert shown["tags"].probabilities == pytest.approx(calibrated.label_probabilities("tags")[0])
    assert shown["price"].deviation == pytest.approx(spread[0])
    assert main(["calibrate", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "has the temperatures and biases of labels and standard deviations" in printed
    path = run / "checkpoints" / "calibration.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "labels": {"tags": [0.0, 1.0, 1.0]}}))
    damaged = Run(run)
    assert not damaged.output_calibration.labels
    assert any("must be finite numbers above 0" in problem for problem in damaged.missing)


def test_operating_points_are_chosen_on_validation_and_measured_on_test(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    for number, split in enumerate(("val", "test")):
        predictions = make_predictions_of_every_kind(n=300, seed=number)
        write_predictions(run / "predictions" / f"{split}.parquet", predictions)
    assert main(["calibrate", str(run), "--operating-point", "recall>=.9", "--positive", "cap", "--json"]) == 0
    rows = [row for row in json.loads(capsys.readouterr().out) if "point" in row]
    assert [(row["split"], row["class"]) for row in rows] == [("val", "cap"), ("test", "cap")]
    threshold = rows[0]["threshold"]
    for row in rows:
        own = read_predictions(run / "predictions" / f"{row['split']}.parquet")
        probabilities = own.probabilities("class", Run(run).temperatures["class"])[:, 1]
        positive = own.targets["class"] == 1
        assert row["recall"][0] == pytest.approx((probabilities[positive] >= threshold * (1 - 1e-6)).mean())
    assert rows[0]["recall"][0] >= 0.9
    assert main(["calibrate", str(run), "--operating-point", "fpr<=.05", "--task", "tags"]) == 0
    assert main(["calibrate", str(run), "--operating-point", "risk<=.3", "--task", "grade"]) == 0
    # Points of other tasks are chosen again.
    points = Run(run).operating_points
    assert {task: point.goal for task, point in points.items()} == {
        "class": "recall>=0.9",
        "tags": "fpr<=0.05",
        "grade": "risk<=0.3",
    }
    assert points["class"].thresholds == {"cap": pytest.approx(threshold)}
    test = read_predictions(run / "predictions" / "test.parquet")
    logits = {task: test.logits[task][:1] for task in test.tasks}
    opened = Run(run)
    [found] = image_predictions(
        ["x"], logits, test.tasks, opened.temperatures, test.kinds, test.thresholds, opened.output_calibration
    )
    decided = found.decided(points)
    chances = dict(found.tasks["class"].top_k(None))
    expected = "cap" if chances["cap"] >= threshold else max({**chances, "cap": 0.0}, key=lambda name: chances[name])
    assert decided.tasks["class"].decision == expected
    assert decided.tasks["price"].decision is None
    assert decided.row()["class_decision"] == expected
    unsure = found.tasks["grade"].confidence < points["grade"].thresholds[""]
    assert decided.tasks["grade"].decision == ("" if unsure else found.tasks["grade"].label)
    labels = {name for name, chance in found.tasks["tags"].top_k(None) if chance >= points["tags"].thresholds[name]}
    assert set(filter(None, (decided.tasks["tags"].decision or "").split(";"))) == labels
    capsys.readouterr()
    for arguments, message in {
        ("recall>=.9",): "'class' has 3 classes; say which by --positive CLASS",
        ("recall=.9",): "must be one of recall>=X",
        ("risk<=.1", "--task", "tags"): "'tags' has labels",
        ("recall>=.9", "--task", "price"): "--task price: must be a task with classes or labels",
        ("recall>=.9", "--positive", "pen"): "--positive pen: must be one of bag, cap, mug",
    }.items():
        assert main(["calibrate", str(run), "--operating-point", *arguments]) == 2
        assert message in capsys.readouterr().err
    for given in (["--task", "tags"], ["--positive", "cap"], ["--operating-point", "none", "--positive", "cap"]):
        assert main(["calibrate", str(run), *given]) == 2
        assert "of an operating point; give --operating-point GOAL" in capsys.readouterr().err
    assert main(["calibrate", str(run), "--operating-point", "none", "--task", "price"]) == 2
    assert "--task price: has no operating point to remove; class, tags, grade has" in capsys.readouterr().err
    assert main(["calibrate", str(run), "--operating-point", "none", "--task", "tags"]) == 0
    assert list(Run(run).operating_points) == ["class", "grade"]
    assert main(["calibrate", str(run), "--operating-point", "none"]) == 0
    assert Run(run).operating_points == {}
