from __future__ import annotations

import html
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn import metrics

from evaluation.__main__ import main
from experiments.train.run_record import write_report
from tests.evaluation.predictions_fixture import make_predictions_of_every_kind
from tests.evaluation.report.test_page import Checked
from tests.support.runs import write_run
from vitrail.predictions import Predictions, read_predictions, write_predictions
from vitrail.runs import Run

TITLES = (
    "Scores on test",
    "Mistakes",
    "Confusions",
    "Classes",
    "Calibration",
    "Thresholds",
    "Embedding map",
    "Retrieval examples",
    "Training",
    "Data",
    "Leaks between splits",
    "Run",
    "Configuration",
    "Environment",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run, reported."""
    path = write_run(tmp_path_factory.mktemp("report"))
    assert main(["report", str(path)]) == 0
    return path


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    """A run to be damaged, not yet reported."""
    leave_out = shutil.ignore_patterns("report*", "gallery")
    return Path(shutil.copytree(run, tmp_path / "shop" / "20260101-100000", ignore=leave_out))


def page(run: Path, *arguments: str) -> str:
    assert main(["report", str(run), "--no-data", *arguments]) == 0
    return html.unescape((run / "report.html").read_text(encoding="utf-8"))


def predictions_of(run: Path) -> Predictions:
    return read_predictions(run / "predictions" / "test.parquet")


def test_data_of_the_training_are_not_set_up_again(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datamodule = Run(copied).load_datamodule()
    monkeypatch.delattr(Run, "load_datamodule")
    write_report(Run(copied), datamodule)
    assert "<h2>Leaks between splits</h2>" in (copied / "report.html").read_text(encoding="utf-8")


def test_page_has_every_section_and_stands_alone(run: Path) -> None:
    text = (run / "report.html").read_text(encoding="utf-8")
    assert tuple(re.findall("<h2>(.*?)</h2>", text)) == ("How sure", "What to do next", *TITLES, "Missing")
    assert re.findall("<dt>(.*?)</dt>", text) == [
        *("Slices", "Corrupted images", "Unknown images", "Efficiency", "Data quality")
    ]
    parser = Checked()
    parser.feed(text)
    assert parser.open == []
    assert all(address.startswith(("data:image/", "#")) for address in parser.addresses)
    assert "url(" not in text


def test_scores_are_those_of_scikit_learn(run: Path) -> None:
    predictions = predictions_of(run)
    table = pd.read_csv(run / "report" / "scores_test.csv").set_index("task")
    for task in predictions.tasks:
        known = predictions.targets[task] >= 0
        targets, answers = predictions.targets[task][known], predictions.predicted(task)[known]
        row = table.loc[task]
        assert row["n"] == known.sum()
        for column, value in (
            ("accuracy [95 %]", metrics.accuracy_score(targets, answers)),
            ("macro F1 [95 %]", metrics.f1_score(targets, answers, average="macro")),
            ("weighted F1 [95 %]", metrics.f1_score(targets, answers, average="weighted")),
        ):
            assert row[column].startswith(f"{value:.3f} [")
    confusion = np.zeros((3, 3), int)
    classes = list(predictions.tasks["class"])
    for found in pd.read_csv(run / "report" / "confused_test_class.csv").to_dict("records"):
        confusion[classes.index(found["target"]), classes.index(found["predicted"])] = found["samples"]
    expected = metrics.confusion_matrix(predictions.targets["class"], predictions.predicted("class"))
    np.testing.assert_array_equal(confusion, expected - np.diag(np.diag(expected)))


def test_mistakes_show_their_images_worst_first(run: Path) -> None:
    predictions = predictions_of(run)
    table = pd.read_csv(run / "report" / "mistakes_test_class.csv")
    targets = predictions.targets["class"]
    wrong = predictions.predicted("class") != targets
    assert sorted(table["name"]) == sorted(predictions.names[wrong])
    assert table["probability of the target"].is_monotonic_increasing
    text = (run / "report.html").read_text(encoding="utf-8")
    assert f"class: {wrong.sum()} of {len(predictions)} predictions are wrong." in text
    first = table.iloc[0]
    row = predictions.names.tolist().index(str(first["name"]))
    assert first["confidence"] == pytest.approx(predictions.probabilities("class")[row].max())
    photo = np.asarray(Image.open(run.parent.parent / "photos" / first["name"]).convert("RGB"), float)
    shown = np.asarray(Image.open(run / "report" / "mistakes_test_class_01.jpg"), float)
    assert shown.shape == photo.shape
    assert np.abs(shown - photo).mean() < 8  # compressed twice


def test_markdown_says_the_same_and_its_links_lead_somewhere(run: Path) -> None:
    text = (run / "report.md").read_text(encoding="utf-8")
    further = ("Slices", "Corrupted images", "Unknown images")
    in_order = (*TITLES[:6], *further, *TITLES[6:9], "Efficiency", *TITLES[9:11], "Data quality", *TITLES[11:])
    assert tuple(re.findall("^## (.*)$", text, re.MULTILINE)) == in_order
    links = re.findall(r"\]\((report/[^)]+)\)", text)
    assert len(links) > 20
    assert any(link.endswith(".svg") for link in links)
    assert all((run / link).is_file() for link in links)
    accuracy = pd.read_csv(run / "report" / "scores_test.csv")["accuracy [95 %]"][0]
    assert f"| {accuracy} |" in text
    assert accuracy in (run / "report.html").read_text(encoding="utf-8")


def test_the_same_files_give_the_same_page(run: Path, tmp_path: Path) -> None:
    assert main(["report", str(run), "--to", str(tmp_path)]) == 0
    again = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert again == (run / "report.html").read_text(encoding="utf-8")


def test_files_of_an_earlier_report_do_not_stay(copied: Path) -> None:
    page(copied)
    mine = copied / "report" / "notes.txt"
    mine.write_text("mine", encoding="utf-8")
    assert (copied / "report" / "scores_test.csv").exists()
    shutil.rmtree(copied / "predictions")
    page(copied)
    assert not (copied / "report" / "scores_test.csv").exists()
    assert (copied / "report" / "curves_loss.svg").exists()
    assert mine.exists()


def test_run_that_was_killed_has_a_report_that_says_so(copied: Path) -> None:
    shutil.rmtree(copied / "predictions")
    (copied / "checkpoints" / "best.ckpt").unlink()
    content = json.loads((copied / "run.json").read_text(encoding="utf-8"))
    stage = content["stages"][0]
    del stage["ended"], stage["best"]
    content["stages"] = [{**stage, "exit": "unfinished"}]
    (copied / "run.json").write_text(json.dumps(content), encoding="utf-8")
    lines = (copied / "metrics.csv").read_text(encoding="utf-8").splitlines()
    (copied / "metrics.csv").write_text("\n".join(lines[:8])[:-3], encoding="utf-8")
    text = page(copied)
    for message in (
        "Training was interrupted",
        "it was killed, or still runs",
        "python -m experiments test --ckpt_path",
        "training left no best checkpoint",
        "python -m retrieval index --run",
        "python -m evaluation efficiency",
    ):
        assert message in text
    assert "scores_test" not in text
    assert not (copied / "report" / "scores_test.csv").exists()
    assert (copied / "report" / "curves_loss.svg").exists()


def test_run_that_ended_before_it_wrote_anything_but_its_record(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}", encoding="utf-8")
    text = page(tmp_path)
    for message in ("config.yaml", "metrics.csv", "has no data (run.json", "test.parquet"):
        assert message in text


def not_finite(run: Path) -> None:
    path = run / "predictions" / "test.parquet"
    table = pq.read_table(path)
    logits = table.column("logits_class").to_pylist()
    logits[2][0] = float("nan")
    place = table.schema.get_field_index("logits_class")
    table = table.set_column(place, "logits_class", pa.array(logits, pa.list_(pa.float32())))
    unchecked = {key: value for key, value in table.schema.metadata.items() if b"check" not in key}
    pq.write_table(table.replace_schema_metadata(unchecked), path)


def of_one_class(run: Path) -> None:
    found = predictions_of(run)
    targets = {**found.targets, "class": np.zeros(len(found), np.int64)}
    write_predictions(run / "predictions" / "test.parquet", replace(found, targets=targets))


def with_a_class_of_one_sample(run: Path) -> None:
    found = predictions_of(run)
    targets = {**found.targets, "class": np.where(np.arange(len(found)) == 4, 2, 0)}
    write_predictions(run / "predictions" / "test.parquet", replace(found, targets=targets))


def without_known_targets(run: Path) -> None:
    found = predictions_of(run)
    targets = {task: np.full(len(found), -1) for task in found.tasks}
    write_predictions(run / "predictions" / "test.parquet", replace(found, targets=targets))


def of_no_samples(run: Path) -> None:
    write_predictions(run / "predictions" / "test.parquet", predictions_of(run).take(np.zeros(0, np.int64)))


@pytest.mark.parametrize(
    ("damage", "message", "has_scores"),
    [
        (not_finite, "logits of task 'class' are not finite for 1 of 9 samples", False),
        (of_one_class, "so its scores do not show whether classes are distinguished", True),
        (with_a_class_of_one_sample, "fewer than 5 samples, so their scores mean little: footwear_sneakers (1)", True),
        (without_known_targets, "Of 'class' no target is known.", True),
        (of_no_samples, "holds no samples", False),
    ],
)
def test_predictions_that_say_little_or_nothing(
    copied: Path, damage: Callable[[Path], None], message: str, has_scores: bool
) -> None:
    damage(copied)
    assert message in page(copied).replace(predictions_class_2(copied), "footwear_sneakers")
    scores = copied / "report" / "scores_test.csv"
    assert scores.exists() == has_scores
    if damage is without_known_targets:
        assert set(pd.read_csv(scores)["accuracy [95 %]"]) == {"–"}


def predictions_class_2(run: Path) -> str:
    """Name of the last class; of damaged predictions too."""
    metadata = pq.read_schema(run / "predictions" / "test.parquet").metadata
    return str(json.loads(metadata[b"vitrail.tasks"])["class"][2])


def test_data_that_are_gone_are_reported(copied: Path, tmp_path: Path) -> None:
    assert main(["report", str(copied), "--data-root", str(tmp_path / "nowhere")]) == 0
    text = html.unescape((copied / "report.html").read_text(encoding="utf-8"))
    assert text.count("The run's data are not there: ") == 2
    assert not list((copied / "report").glob("mistakes_*.jpg"))
    assert len(pd.read_csv(copied / "report" / "mistakes_test_class.csv")) > 0


def test_photos_that_are_gone_leave_a_gap(copied: Path, run: Path, tmp_path: Path) -> None:
    photos = Path(shutil.copytree(run.parent.parent / "photos", tmp_path / "photos"))
    name = pd.read_csv(run / "report" / "mistakes_test_class.csv")["name"][0]
    (photos / name).unlink()
    assert main(["report", str(copied), "--data.init_args.root", str(photos)]) == 0
    assert "the image cannot be read" in (copied / "report.html").read_text(encoding="utf-8")


def test_fitted_temperatures_are_used(copied: Path) -> None:
    found = predictions_of(copied)
    write_predictions(copied / "predictions" / "val.parquet", found)
    assert main(["calibrate", str(copied)]) == 0
    assert "after temperature scaling" in page(copied)
    table = pd.read_csv(copied / "report" / "calibration_test.csv")
    assert table["task"].tolist() == ["class", "class", "colour", "colour"]
    assert (table["T"][[0, 2]] == 1).all()
    assert table["NLL"][1] < table["NLL"][0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no such run directory"),
        (["{run}", "--mistakes", "0"], "--mistakes: is 0, must be at least 1"),
        (["{run}", "--gallery", "nowhere"], "there is no gallery here"),
    ],
)
def test_mistakes_of_the_user_are_one_line(
    run: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", *(argument.format(run=run) for argument in arguments), "--no-data"]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert len(printed.splitlines()) == 1


def test_tasks_of_every_kind_have_their_sections(copied: Path) -> None:
    path = copied / "predictions" / "test.parquet"
    names = read_predictions(path).names
    write_predictions(path, replace(make_predictions_of_every_kind(len(names)), names=names))
    (copied / "run.json").write_text("{}")
    text = page(copied)
    for title in (
        "Scores on test",
        "Classes",
        "Confusions",
        "Labels",
        "Numbers",
        "Calibration of labels and numbers",
        "Mistakes",
    ):
        assert f"<h2>{title}" in text or f">{title}</h2>" in text
    for name in ("scores_test_regression.csv", "labels_test_tags.csv", "numbers_test_price.svg"):
        assert (copied / "report" / name).exists()
    assert pd.read_csv(copied / "report" / "scores_test_ordinal.csv")["constant quadratic kappa"].iloc[0] == 0
