from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from evaluation.__main__ import main
from evaluation.report.page import Section
from evaluation.report.summary import HEADLINES, model_text, run_summary
from evaluation.retrieval import BOTH, MEAN_RECALL, Row
from evaluation.tables.summary import summarise
from tests.evaluation.predictions_fixture import make_predictions_of_every_kind
from tests.support.runs import write_run
from vitrail.predictions import Predictions, write_predictions
from vitrail.runs import Run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(write_run(tmp_path_factory.mktemp("summary"), gallery=False))


def test_the_main_score_of_every_task_is_next_to_its_baseline(run: Run) -> None:
    predictions = make_predictions_of_every_kind()
    summaries = summarise(predictions, {}, "shop", "test", n_resamples=200)
    found = run_summary(run, "test", summaries, [], [])
    assert len(found.headlines) == min(len(predictions.tasks), HEADLINES)
    for headline, summary in zip(found.headlines, summaries, strict=False):
        assert headline.label.startswith(f"{summary.task}: ")
        assert headline.span.estimate == summary.main_score
        assert headline.span.reference == summary.majority
        assert (headline.tone == "good") == summary.above_majority
    assert f"Evaluated on {max(one.n for one in summaries)} test images of 20 groups" in found.subject[1]


def test_retrieval_comes_first(run: Run) -> None:
    rows = [
        Row("image_to_text", "R@1", 0.2, 0.1, 0.3, 50),
        Row("image_to_text", "mAP", 0.3, 0.2, 0.4, 50),
        Row(BOTH, MEAN_RECALL, 0.4, 0.3, 0.5, 50),
    ]
    labels = [one.label for one in run_summary(run, "test", [], rows, []).headlines]
    assert labels == ["image and text retrieval: mean recall", "image to text: R@1"]


def test_what_is_doubtful_and_what_to_do_next_are_named(tmp_path: Path) -> None:
    path = write_run(tmp_path, gallery=False)
    record = json.loads((path / "run.json").read_text(encoding="utf-8"))
    record["stages"][0]["exit"] = "unfinished"
    record["git"] = {"revision": "abc", "changed_files": 3}
    (path / "run.json").write_text(json.dumps(record), encoding="utf-8")
    calibration = pd.DataFrame({"task": ["class"], "T": [1.0], "accuracy": [0.6], "mean confidence": [0.9]})
    confused = pd.DataFrame(
        {"task": ["class"], "target": ["mug"], "predicted": ["cap"], "samples": [7], "share of the target": [0.5]}
    )
    sections = [
        Section("Confusions", tables={"confused_test_class": confused}),
        Section("Calibration", tables={"calibration_test": calibration}, missing=["None: `calibrate RUN` does."]),
        Section("Map", missing=["UMAP: `pip install umap`"]),
    ]
    found = run_summary(Run(path), "test", [], [], sections)
    text = " ".join(found.caveats)
    for part in ("interrupted", "3 changed files", "too high, on average 0.90 with an accuracy of 0.60"):
        assert part in text
    assert found.steps == [
        "Look at the commonest mistake: mug taken for cap (7 of class, 50% of its images).",
        "None: `calibrate RUN` does.",
    ]


def test_a_run_of_nothing_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}", encoding="utf-8")
    found = run_summary(Run(tmp_path), "test", [], [], [])
    assert found.headlines == []
    assert "is not known" in found.subject[1]
    assert model_text(Run(tmp_path)) == "A model"


@pytest.mark.slow
def test_a_page_of_a_thousand_classes_is_small(tmp_path: Path) -> None:
    rng, classes, each = np.random.default_rng(0), 1_000, 50
    targets = np.repeat(np.arange(classes), each)
    rows = np.arange(len(targets))
    logits = rng.normal(size=(len(targets), classes)).astype(np.float32)
    logits[rows, targets] += 4
    logits[rows, targets // 5 * 5 + rng.integers(5, size=len(targets))] += 2.2  # confused within fives
    names = np.array([f"n{target:04}/{row:05}.jpg" for row, target in enumerate(targets)], dtype=object)
    tasks = {"class": [f"class {place}" for place in range(classes)]}
    predictions = Predictions(rows, names, names, tasks, {"class": targets}, {"class": logits})
    write_predictions(tmp_path / "predictions" / "test.parquet", predictions)
    (tmp_path / "run.json").write_text("{}", encoding="utf-8")
    assert main(["report", str(tmp_path), "--no-data"]) == 0
    page = tmp_path / "report.html"
    assert page.stat().st_size < 20_000_000 / 8  # without images, which have a limit of 9 MB
    text = page.read_text(encoding="utf-8")
    assert text.count("<tr>") < 300  # the others come as one scrolls
    assert "classes that are confused most often" in text
    assert len(pd.read_csv(tmp_path / "report" / "classes_test_class.csv")) == classes
