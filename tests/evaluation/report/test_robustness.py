from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from evaluation.report.robustness import (
    corruptions_section,
    other_data_section,
    slices_section,
    unknown_images_section,
)
from tests.evaluation.report.test_charts import line
from tests.evaluation.test_robustness import write as write_corrupted
from tests.support.runs import write_run
from vitrail.programs import main
from vitrail.runs import Run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("robust"), gallery=False)


def test_scores_fall_with_severity_and_the_mean_error_is_named(run: Path) -> None:
    measured = write_corrupted(run, 0.5)
    section = corruptions_section(Run(run))
    [stem] = section.tables
    chart = section.charts[stem]
    assert [name for name, _ in chart.legend] == ["noise", "blur", "weather", "digital"]
    drawn = line(chart, "noise")
    np.testing.assert_allclose(drawn[:, 0], range(6), atol=0.01)
    task = measured.tasks[0]
    first = [one.value for one in measured.conditions if one.severity == 5 and one.corruption.endswith("_noise")]
    assert drawn[5, 1] == pytest.approx(np.mean(first), abs=0.01)
    assert drawn[0, 1] == pytest.approx(measured.clean(task).value, abs=0.01)
    assert any("mean corruption error" in sentence for sentence in section.paragraphs)


def test_nothing_measured_names_the_command(tmp_path: Path) -> None:
    run = write_run(tmp_path, gallery=False)
    assert f"`vitrail evaluate {run} --corrupt imagenet-c`." in corruptions_section(Run(run)).missing[0]


def test_other_data_sets_have_a_row_for_each_task(tmp_path: Path) -> None:
    run = write_run(tmp_path, gallery=False)
    target = run / "evaluations" / "elsewhere" / "predictions" / "test.parquet"
    target.parent.mkdir(parents=True)
    shutil.copy(run / "predictions" / "test.parquet", target)
    table = other_data_section(Run(run)).tables["other_data"]
    assert table[["data", "task"]].to_numpy().tolist() == [["elsewhere", "class"], ["elsewhere", "colour"]]
    predictions = Run(run).predictions("test")
    assert predictions is not None
    right = (predictions.predicted("class") == predictions.targets["class"]).mean()
    assert table["value [95 %]"][0].value == pytest.approx(right)


def test_slices_are_those_of_the_command(tmp_path: Path) -> None:
    run = write_run(tmp_path, gallery=False)
    assert slices_section(Run(run), "test").missing == [
        f"Slices have not been evaluated: run `vitrail slices {run} --split test`."
    ]
    assert main("vitrail", ["slices", str(run), "--by", "predicted_class"]) == 0
    section = slices_section(Run(run), "test")
    rows = json.loads((run / "reports" / "slices_test_class.json").read_text())
    table = section.tables["slices_test_class"]
    assert table["slice"].tolist() == [row["slice"] for row in rows]
    assert table["difference"].tolist() == pytest.approx([row["difference"] for row in rows])
    assert str(table.iloc[0, 1]).startswith(f"{rows[0]['value']:.3f} [{rows[0]['interval'][0]:.3f}")
    assert section.missing == []
    (run / "reports" / "slices_test_class.json").write_text("[1")
    assert "cannot be read" in slices_section(Run(run), "test").missing[0]


def test_recognition_of_unknown_images_is_shown_with_its_intervals(tmp_path: Path) -> None:
    run = write_run(tmp_path, gallery=False)
    row = {"ood": "noise", "method": "knn", "threshold": 0.1, "rate": 0.95, "test_images": 10, "ood_images": 6}
    found = {"auroc": 0.9, "fpr": 0.25, "kept": 0.94, "unknown": None}
    spans = {name: {"value": value, "low": value, "high": value} for name, value in found.items()}
    (run / "reports").mkdir(exist_ok=True)
    (run / "reports" / "ood.json").write_text(json.dumps([row | spans]))
    section = unknown_images_section(Run(run))
    [shown] = section.tables["unknown_images"].to_dict("records")
    assert (shown["other images"], shown["n"]) == ("noise", 6)
    assert shown["AUROC [95 %]"] == "0.900 [0.900, 0.900]"
    assert shown["unknown [95 %]"] == "–"
