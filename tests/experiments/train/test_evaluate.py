from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.support.data import write_csv
from tests.support.runs import data_of, flowers_run, products_run
from vitrail.programs import main
from vitrail.runs import Run


@pytest.fixture(scope="module")
def trained() -> Path:
    return products_run()


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run, so that others see no evaluations."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(trained, tmp_path / "runs" / trained.parent.name / trained.name))


def write_folder(run: Path, names: Sequence[str], strange: str = "") -> Path:
    """Class folders with the run's test images; ``strange`` is a class that the model lacks."""
    data = data_of(run)
    for row in data.split_indices("test").tolist():
        label = data.class_names[data.table.targets["class"][row]]
        for name in {label} & set(names) or ({strange} - {""}):
            target = Path("new") / name / f"{row:03d}{Path(data.table.source(row)).suffix}"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(data.table.source(row), target)
    return Path("new")


def test_the_same_images_in_folders_have_the_run_s_own_scores(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classes = data_of(run).class_names
    folder = write_folder(run, classes)

    assert main("vitrail", ["evaluate", str(run), "--data", str(folder), "--batch-size", "5"]) == 0

    evaluated, own = Run(run / "evaluations" / "new"), Run(run)
    found, known = evaluated.predictions("test"), own.predictions("test")
    assert found is not None
    assert known is not None
    assert found.tasks == known.tasks
    right = np.mean(found.predicted("class") == found.targets["class"])
    assert right == np.mean(known.predicted("class") == known.targets["class"])
    assert np.sort(found.logits["class"], axis=0) == pytest.approx(np.sort(known.logits["class"], axis=0), abs=1e-4)
    assert (found.targets["color" if "color" in found.targets else "colour"] == -1).all(), "folders have no colours"
    assert evaluated.temperatures == own.temperatures
    assert evaluated.name == f"{own.name} on new"
    assert evaluated.record["evaluation"]["restricted"] is False
    assert evaluated.record["evaluation"]["in_training"] == 0
    assert f"Results: {run}/evaluations/new" in capsys.readouterr().out


def test_a_subset_of_classes_and_one_that_the_model_lacks(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, _ = data_of(run).class_names
    folder = write_folder(run, [first, second], strange="gizmo")
    command = ["evaluate", str(run), "--data", str(folder)]

    assert main("vitrail", command) == 0
    printed = capsys.readouterr().out
    further = ["--metrics", "auroc", "nll", "--calibrated"]
    assert main("vitrail", [*command, "--restrict-classes", "--name", "two", *further]) == 0

    strange = len(list((folder / "gizmo").iterdir()))
    assert "restricted to 2 of its classes" in capsys.readouterr().out
    assert f"class: {strange} images of classes that the model lacks: gizmo ({strange})" in printed
    whole, restricted = (Run(run / "evaluations" / name) for name in ("new", "two"))
    predictions, fewer = whole.predictions("test"), restricted.predictions("test")
    assert predictions is not None
    assert fewer is not None
    assert (predictions.targets["class"] == -1).sum() == strange
    assert fewer.tasks == {"class": [first, second]}
    assert np.array_equal(fewer.logits["class"], predictions.logits["class"][:, :2])
    assert restricted.record["evaluation"]["classes"] == {"class": [first, second]}
    assert [len(counts) for counts in restricted.record["data"]["class_counts"].values()] == [2]


def test_a_table_is_matched_by_the_names_of_tasks_and_replaces_an_earlier_result(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = data_of(run)
    task = list(data.tasks)[1]
    rows = [["file", "kind", task, "split"]]
    for row in data.split_indices("test").tolist():
        label, value = (data.tasks[name][data.table.targets[name][row]] for name in ("class", task))
        rows.append([data.table.source(row), label, value, "of no matter"])
    write_csv(Path("table.csv"), rows)
    command = ["evaluate", str(run), "--data", "table.csv", "--labels", "kind", task]

    assert main("vitrail", command) == 0
    assert main("vitrail", command) == 0

    found = Run(run / "evaluations" / "table").predictions("test")
    assert found is not None
    assert (found.targets[task] >= 0).all()
    assert [path.name for path in (run / "evaluations").iterdir()] == ["table"]
    assert len(json.loads((run / "evaluations/table/run.json").read_text())["stages"]) == 1
    # Other data with the same name replace nothing.
    write_csv(Path("other/table.csv"), rows)
    assert main("vitrail", ["evaluate", str(run), "--data", "other/table.csv", *command[4:]]) == 2
    assert "table has the results of " in capsys.readouterr().err


def test_images_of_the_training_split_are_reported(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = data_of(run)
    rows = data.split_indices("train").tolist()[:3]
    write_csv(Path("leak.csv"), [["image", "label"], *([data.table.source(row), data.class_names[0]] for row in rows)])

    assert main("vitrail", ["evaluate", str(run), "--data", "leak.csv"]) == 0

    assert "Warning: 3 images are in the run's training split" in capsys.readouterr().out


def test_a_dual_encoder_is_evaluated_on_captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trained = flowers_run()
    run = Path(shutil.copytree(trained, tmp_path / "runs" / trained.parent.name / trained.name))
    data = data_of(trained)
    rows = data.split_indices("test").tolist()[:6]
    write_csv(Path("pairs.csv"), [["image", "caption"], *([data.table.source(row), f"flower {row}"] for row in rows)])

    assert main("vitrail", ["evaluate", str(run), "--data", "pairs.csv"]) == 0

    assert (run / "evaluations" / "pairs" / "reports" / "test_retrieval.csv").exists()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["image", "label"], ["{image}", "gizmo"]], "none of its classes of 'class' (gizmo) is one of the model's"),
        ([["image", "caption"], ["{image}", "a text"]], "has no labels of the tasks class, "),
    ],
)
def test_data_that_the_model_knows_nothing_of_are_refused(
    run: Path, rows: list[list[str]], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    image = data_of(run).table.source(0)
    write_csv(Path("table.csv"), [[cell.format(image=image) for cell in row] for row in rows])

    assert main("vitrail", ["evaluate", str(run), "--data", "table.csv"]) == 2

    assert message in capsys.readouterr().err
    assert not (run / "evaluations").exists()
