from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from evaluation.report.images import (
    curves_section,
    epoch_table,
    learning_rates,
    map_section,
    mistakes_section,
    phase_begins,
)
from retrieval.gallery import Gallery
from tests.evaluation.predictions_fixture import make_predictions
from tests.evaluation.report.test_charts import line, places
from tests.support.runs import EPOCHS, metrics, write_run
from vitrail.runs import Run
from vitrail.types import UNKNOWN


def test_map_has_every_image_once(gallery: Gallery) -> None:
    section = map_section(gallery, "test", "class")
    table = section.files["embedding_map"]
    assert sorted(table["id"]) == sorted(gallery.table(["id"]).column("id").to_pylist())
    classes = table["label_class"]
    places = table[["PCA x", "PCA y"]].to_numpy()
    centres = np.stack([places[classes == name].mean(axis=0) for name in sorted(set(classes))])
    nearest = np.linalg.norm(places[:, None] - centres[None], axis=2).argmin(axis=1)
    assert [sorted(set(classes))[place] for place in nearest] == classes.tolist()
    assert len(section.charts) == 3 - len(section.missing)
    drawn = section.charts["embedding_map_PCA"].root.findall("circle")
    tips = [f"{row['label_class']}: {row['id']}" for row in table.to_dict("records")]
    assert [one.get("data-tip") for one in drawn] == tips


def test_without_a_known_target_nothing_is_said_of_mistakes() -> None:
    found = make_predictions(6)
    unknown = replace(found, targets={**found.targets, "colour": np.full(6, UNKNOWN)})
    section = mistakes_section(unknown, {}, "test", 3, None)
    assert not any(said.startswith("colour:") for said in section.paragraphs)
    assert "Of 'colour' no target is known, so mistakes are not known." in section.missing


def test_one_row_an_epoch_with_what_is_logged_once_an_epoch() -> None:
    table = epoch_table(metrics())
    assert table["epoch"].tolist() == list(range(EPOCHS))
    assert table["step"].tolist() == [10 * (epoch + 1) - 1 for epoch in range(EPOCHS)]
    assert sorted(table.columns) == ["epoch", "step", "train/loss", "val/class/accuracy", "val/loss"]
    assert table["train/loss"].tolist() == [2 - epoch / 4 for epoch in range(EPOCHS)]


def test_an_epoch_that_was_logged_twice_has_its_later_values() -> None:
    log = pd.DataFrame({"epoch": [0, 0, 1], "step": [4, 9, 19], "val/loss": [3.0, 2.0, 1.0]})
    assert epoch_table(log)["val/loss"].tolist() == [2, 1]


@pytest.mark.parametrize("log", [pd.DataFrame(), pd.DataFrame({"epoch": [0], "test/loss": [1.0]})])
def test_nothing_of_training_is_no_table(log: pd.DataFrame) -> None:
    assert len(epoch_table(log)) == 0


def test_learning_rates_lie_where_their_steps_do() -> None:
    rates = learning_rates(metrics(), epoch_table(metrics()))
    # Step 4 is the fifth of the ten of the first epoch.
    assert rates["done"].tolist() == pytest.approx([0.5 + epoch for epoch in range(EPOCHS)])
    assert rates["lr-AdamW/head_decay"].iloc[0] == 0.003


@pytest.mark.parametrize(
    ("trainer", "expected"),
    [
        ({"callbacks": [{"class_path": "callbacks.Some", "init_args": {"unfreeze_epoch": 3}}]}, {3: "Some"}),
        ({"callbacks": [{"class_path": "callbacks.Other"}, {"init_args": None}, "odd"]}, {}),
        ({"callbacks": None}, {}),
        (None, {}),
    ],
)
def test_phases_are_those_of_the_configuration(trainer: object, expected: dict[int, str]) -> None:
    assert phase_begins({"trainer": trainer}) == expected


def test_section_names_phase_and_best_epoch(tmp_path: Path) -> None:
    section = curves_section(Run(write_run(tmp_path, gallery=False)))
    text = " ".join(section.paragraphs)
    assert "From epoch 4 on (shaded) the backbone is trained as well (BackboneUnfreezing)" in text
    assert "best epoch by val/class/accuracy: 4." in text
    assert [chart.title for chart in section.charts.values()] == ["loss", "accuracy", "learning rate"]
    chart = section.charts["curves_loss"]
    drawn = line(chart, "train/loss")
    np.testing.assert_allclose(drawn[:, 1], [2 - epoch / 4 for epoch in range(EPOCHS)], atol=0.01)
    np.testing.assert_allclose(drawn[:, 0], range(1, EPOCHS + 1), atol=0.02)
    [shaded] = [one for one in chart.root.iter("rect") if one.get("class") == "shade"]
    begin = float(shaded.attrib["x"])
    ends = places(chart, [(begin, 0.0), (begin + float(shaded.attrib["width"]), 0.0)])[:, 0]
    np.testing.assert_allclose(ends, [4, EPOCHS], atol=0.02)


def test_a_score_that_no_epoch_has_marks_none(tmp_path: Path) -> None:
    run = write_run(tmp_path, gallery=False)
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    record["stages"][0]["best"]["score"] = 0.123
    (run / "run.json").write_text(json.dumps(record), encoding="utf-8")
    assert not any("best epoch" in sentence for sentence in curves_section(Run(run)).paragraphs)


def test_runs_without_curves_say_why(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"stages": [{"stage": "test"}]}), encoding="utf-8")
    assert "nothing was logged" in curves_section(Run(tmp_path)).missing[0]
    (tmp_path / "metrics.csv").write_text("epoch,step,test/loss\n0,1,2.0\n", encoding="utf-8")
    section = curves_section(Run(tmp_path))
    assert section.missing == ["Nothing was trained in this run."]
    assert not section.charts


def test_gaps_are_left_out_of_the_lines(tmp_path: Path) -> None:
    log = metrics()
    log.loc[log["epoch"] == 2, "val/loss"] = math.nan
    run = write_run(tmp_path, gallery=False)
    log.to_csv(run / "metrics.csv", index=False)
    drawn = line(curves_section(Run(run)).charts["curves_loss"], "val/loss")
    np.testing.assert_allclose(drawn[:, 0], [1, 2, 4, 5, 6], atol=0.02)
