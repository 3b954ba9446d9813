from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from datamodules.loading import corruptions
from evaluation.robustness import IMAGENET_C, Robustness
from experiments.train import robustness
from experiments.train.robustness import chosen, evaluate_corrupted
from tests.support.runs import data_of, flowers_run, kinds_run, products_run
from vitrail.errors import UserError
from vitrail.programs import main
from vitrail.runs import Run


def copied(run: Path, folder: Path) -> Path:
    return Path(shutil.copytree(run, folder / "runs" / run.parent.name / run.name))


def evaluate(run: Path, *arguments: str) -> int:
    return main("vitrail", ["evaluate", str(run), "--corrupt", *arguments])


def test_scores_are_those_of_the_run_and_of_its_predictions_for_corrupted_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(products_run(), tmp_path)

    assert evaluate(run, "gaussian_noise", "flip", "--severities", "1", "5") == 0

    found = Robustness(run / "robustness" / "test")
    known = Run(run).predictions("test")
    assert known is not None
    rows = {(one.corruption, one.severity, one.task): one for one in found.conditions}
    assert {key[:2] for key in rows} == {("clean", 0), ("gaussian_noise", 1), ("gaussian_noise", 5), ("flip", 1)}
    assert rows["clean", 0, "class"].value == np.mean(known.predicted("class") == known.targets["class"])
    data = data_of(run)
    ids = data.split_indices("test").tolist()
    images = [corruptions.corrupted(data.read_image(row), "gaussian_noise", 5, (0, row)) for row in ids]
    predicted = [one.label for one in Run(run).predict(images)]
    right = [
        label == data.class_names[data.table.targets["class"][row]] for label, row in zip(predicted, ids, strict=True)
    ]
    noisy = rows["gaussian_noise", 5, "class"]
    assert noisy.value == pytest.approx(np.mean(right))
    assert noisy.relative == pytest.approx(noisy.value / rows["clean", 0, "class"].value)
    assert noisy.low <= noisy.value <= noisy.high
    clean = [one.label for one in Run(run).predict([data.read_image(row) for row in ids])]
    assert noisy.unchanged == pytest.approx(
        np.mean([one == other for one, other in zip(clean, predicted, strict=True)])
    )
    assert noisy.groups == len(set(known.groups.tolist()))
    table = pq.read_table(run / "robustness/test/robustness.parquet").to_pylist()
    assert [row["value"] for row in table] == [one.value for one in found.conditions]
    assert json.loads((run / "robustness/test/robustness.json").read_text())["mean_corruption_error"] == {}
    assert "class: flip left to right leaves 1.000" in capsys.readouterr().out


def test_a_finished_corruption_is_not_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(products_run(), tmp_path)
    made: list[tuple[str, int]] = []

    killed = [True]

    def counted(image: torch.Tensor, name: str, severity: int, key: tuple[int, int]) -> torch.Tensor:
        made.append((name, severity))
        if killed[0] and name == "contrast" and len(made) > 20:
            raise KeyboardInterrupt
        return corruptions.corrupted(image, name, severity, key)

    monkeypatch.setattr(robustness, "corrupted", counted)
    assert evaluate(run, "fog", "contrast", "--severities", "2", "3") == 130
    first, n, killed[0] = set(made), made.count(("fog", 2)), False
    made.clear()
    assert evaluate(run, "fog", "contrast", "--severities", "3", "4") == 0

    assert ("fog", 2) in first
    assert made.count(("fog", 4)) == made.count(("contrast", 3)) == made.count(("contrast", 4)) == n
    assert set(made) == {("fog", 4), ("contrast", 3), ("contrast", 4)}
    assert Robustness(run / "robustness" / "test").results["fog"].severities == {2, 3, 4}
    made.clear()
    whole = (run / "robustness/test/robustness.parquet").read_bytes()
    assert evaluate(run, "fog", "--severities", "3") == 0
    assert made == []
    assert (run / "robustness/test/robustness.parquet").read_bytes() == whole
    checkpoint = torch.load(run / "checkpoints/best.ckpt", weights_only=True)
    torch.save({**checkpoint, "epoch": 99}, run / "checkpoints/best.ckpt")
    assert evaluate(run, "fog", "--severities", "3") == 0
    assert len(made) == n
    assert "has results that differ in checkpoint, and is measured again" in capsys.readouterr().err


def test_order_batches_and_a_limit_change_nothing(tmp_path: Path) -> None:
    run = copied(products_run(), tmp_path)
    wanted = {"snow": [3], "shot_noise": [1, 5]}
    model, data = Run(run).model, data_of(run)

    first = evaluate_corrupted(Run(run), model, data, "one", wanted, batch_size=2)
    second = evaluate_corrupted(Run(run), model, data, "two", dict(reversed(wanted.items())), batch_size=64)
    part = evaluate_corrupted(Run(run), model, data, "part", wanted, limit=4)

    for name, results in first.results.items():
        assert second.results[name].conditions == results.conditions
        places = [results.names.tolist().index(one) for one in part.results[name].names]
        assert len(places) == 4
        for key, right in part.results[name].right.items():
            assert np.array_equal(right, results.right[key][places])


@pytest.mark.parametrize("make", [kinds_run, flowers_run])
def test_tasks_of_every_kind_and_zero_shot_classes(make: Callable[[], Path], tmp_path: Path) -> None:
    run = copied(make(), tmp_path)

    assert evaluate(run, "fog", "jpeg", "--severities", "5", "--limit", "12") == 0

    found = Robustness(run / "robustness" / "test_limit12")
    model = Run(run).model
    assert found.tasks == list(model.tasks)
    scores = {one.task: one.score for one in found.conditions}
    kinds = {"multi_label": "mAP", "regression": "mae"}
    assert scores == {
        task: kinds.get(getattr(model, "task_kinds", {}).get(task, ""), "accuracy") for task in model.tasks
    }


def test_other_data_and_their_subset_of_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = copied(products_run(), tmp_path)
    data = data_of(run)
    for row in data.split_indices("test").tolist():
        label = data.class_names[data.table.targets["class"][row]]
        if label != data.class_names[-1]:
            target = Path("new") / label / f"{row}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(data.table.source(row), target)

    assert evaluate(run, "fog", "--severities", "1", "--data", "new", "--restrict-classes") == 0

    found = Robustness(run / "robustness" / "new_restricted")
    assert found.tasks == ["class"]
    assert found.results["clean"].key["restricted"] is True
    assert not (run / "evaluations").exists()
    # Results by another map of classes are others.
    first, second, third = data.class_names
    for classes in ([first], [first, third]):
        Path("map.json").write_text(json.dumps({first: classes, second: [second]}))
        assert evaluate(run, "fog", "--severities", "1", "--data", "new", "--class-map", "map.json") == 0
        found = Robustness(run / "robustness" / "new")
        assert found.results["fog"].key["class_map"] == {first: classes, second: [second]}


def test_wishes() -> None:
    assert list(chosen(["imagenet-c"], [])) == list(IMAGENET_C)
    assert chosen(["flip", "jpeg", "flip"], [1, 7]) == {"flip": [1], "jpeg": [1, 7]}
    with pytest.raises(UserError, match=r"--corrupt: must be one of imagenet-c, consistency, .*; got 'smoke'"):
        chosen(["smoke"], [])
    with pytest.raises(UserError, match="--severities: must be from 1 to 5; got 6"):
        chosen(["fog"], [6])


def test_a_run_alone_is_not_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("vitrail", ["evaluate", str(products_run())]) == 2
    assert "give --data DATA, or --corrupt NAME" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "new", "--limit", "5"], "--limit: is of images with faults"),
        (["--data", "new", "--severities", "1"], "--severities: is of images with faults"),
        (["--corrupt", "fog", "--limit", "-5"], "--limit: must be at least 1; got -5"),
        (["--corrupt", "fog", "--batch-size", "0"], "--batch-size: must be at least 1; got 0"),
        (["--corrupt", "fog", "--metrics", "auroc"], "--metrics: images with faults have the main scores only"),
        (["--corrupt", "fog", "--class-map", "index"], "--class-map: leave it out where the images are those of"),
        (["--corrupt", "fog", "--label", "kind"], "--label: leave it out where the images are those of"),
        (["--data", "Wares", "--label", "kind"], "--label: is about the columns of a table, which Wares is not"),
        (["--corrupt", "fog", "--data", "data/test"], "--name: test are the results of the run's own test split"),
    ],
)
def test_options_without_effect_are_refused(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = products_run().absolute()
    (tmp_path / "data" / "test").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    assert main("vitrail", ["evaluate", str(run), *arguments]) == 2

    assert message in capsys.readouterr().err
