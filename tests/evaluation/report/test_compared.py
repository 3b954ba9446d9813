from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from evaluation.report.charts import Span
from evaluation.report.compared import comparison_summary, disagreements, disagreements_section, forest_section
from evaluation.tables.comparison import Side, compare_sides
from tests.evaluation.predictions_fixture import make_predictions, make_predictions_of_every_kind
from tests.support.runs import write_run
from vitrail.predictions import LABEL_SEPARATOR, Predictions
from vitrail.runs import Run

Sides = Callable[[Predictions, Predictions], list[Side]]


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> Sides:
    folder = tmp_path_factory.mktemp("sides")
    runs = [Run(write_run(folder, name, gallery=False)) for name in ("small", "target")]

    def made(first: Predictions, second: Predictions) -> list[Side]:
        pairs = zip(runs, (first, second), strict=True)
        return [Side(run.path.parent.name, [run], [predictions]) for run, predictions in pairs]

    return made


def test_images_on_which_classes_differ_are_those_of_brute_force(sides: Sides) -> None:
    first, second = make_predictions(40, 0), make_predictions(40, 1)
    second = replace(first, logits=second.logits).take(np.random.default_rng(0).permutation(40))
    table = disagreements(sides(first, second), "class")
    rows = {name: row for row, name in enumerate(second.names)}
    expected = {}
    for row in first.known("class").tolist():
        name, classes = first.names[row], first.tasks["class"]
        own = [classes[first.predicted("class")[row]], classes[second.predicted("class")[rows[name]]]]
        target = classes[first.targets["class"][row]]
        if own[0] != own[1]:
            right = [title for title, one in zip(("small", "run target"), own, strict=True) if one == target]
            expected[name] = (target, *own, ", ".join(right) or "none")
    found = {row[0]: tuple(row[1:]) for row in table.itertuples(index=False, name=None)}
    assert found == expected
    assert len(found) > 10
    assert list(table.columns) == ["name", "target", "small", "run target", "right"]
    is_none = (table["right"] == "none").to_numpy()
    assert (np.diff(is_none.astype(int)) >= 0).all()  # those that one is right about come first


def test_labels_and_numbers_differ_too(sides: Sides) -> None:
    first, second = make_predictions_of_every_kind(seed=0), make_predictions_of_every_kind(seed=0, noise=3.0)
    second = replace(first, logits=second.logits)
    both = sides(first, second)
    labels = disagreements(both, "tags").set_index("name")
    rows = {name: row for row, name in enumerate(first.names)}
    for name, row in labels.iterrows():
        place = rows[str(name)]
        known = first.targets["tags"][place] >= 0
        texts = [
            LABEL_SEPARATOR.join(np.array(one.tasks["tags"])[one.predicted_labels("tags")[place] & known])
            for one in (first, second)
        ]
        assert [row["small"], row["run target"]] == texts
        assert ("small" in row["right"]) == (texts[0] == row["target"])
    numbers = disagreements(both, "price")
    spread = (numbers["small"] - numbers["run target"]).abs()
    assert spread.is_monotonic_decreasing
    errors = np.abs(numbers[["small", "run target"]].to_numpy() - numbers[["target"]].to_numpy())
    assert numbers["closest"].tolist() == [("small", "run target")[place] for place in errors.argmin(axis=1)]


def test_images_are_shown_where_they_are_and_the_rest_is_a_table(sides: Sides) -> None:
    first, second = make_predictions(40, 0), make_predictions(40, 1)
    both = sides(first, replace(first, logits=second.logits))
    section = disagreements_section(both, ["class"], "test", lambda name: np.zeros((8, 8, 3), np.uint8), "")
    [grid] = section.grids
    assert list(grid.facets) == ["right", "target"]
    assert set(grid.images) == set(grid.rows["name"])
    without = disagreements_section(both, ["class"], "test", None, "no data")
    assert without.missing == ["no data"]
    assert list(without.tables) == ["differing_test_class"]
    same = disagreements_section(sides(first, first), ["class"], "test", None, "")
    assert "class: no image is predicted differently." in same.paragraphs


def test_a_forest_has_one_axis_and_keeps_the_words_about_one_seed(sides: Sides) -> None:
    first = make_predictions(200, 0)
    targets = first.targets["class"]
    right = replace(
        first, logits={**first.logits, "class": np.eye(len(first.tasks["class"]), dtype=np.float32)[targets]}
    )
    right = replace(right, groups=right.names)
    wrong = replace(right, logits=first.logits)
    rows = compare_sides(sides(wrong, right), ["class", "colour"], n_resamples=200)
    table = forest_section(rows).tables["differences"]
    spans = [cell for cell in table["difference of accuracy [95 %]"] if isinstance(cell, Span)]
    assert len(spans) == len(table) == 2
    assert len({span.ends for span in spans}) == 1
    assert spans[0].ends[0] == -spans[0].ends[1]
    comparison = rows[1].comparison
    assert comparison is not None
    assert spans[0].value == comparison.difference.value
    assert table["verdict"][0] == "better model, one seed"
    summary = comparison_summary(rows, "test", "first", ["careful"], ["`do`"])
    assert summary.subject[1].startswith("target is a better model than small on 'class'")
    assert "other seeds" in summary.subject[1]
    assert [one.tone for one in summary.headlines] == ["", "good"]
