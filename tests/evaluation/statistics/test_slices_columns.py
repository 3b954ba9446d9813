from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation.statistics.slices import Columns, rows_where, sample_columns
from tests.support.runs import data_of, products_run
from vitrail.errors import UserError
from vitrail.predictions import Predictions
from vitrail.runs import Run

COLUMNS: Columns = {
    "store": np.array(["north", "south", None, "it's"], dtype=object),
    "width": np.array([10.0, 200.0, 30.0, np.nan]),
    "height": np.array([10.0, 20.0, 30.0, 40.0]),
    "Price now": np.array([1.0, 2.0, 3.0, 4.0]),
}


@pytest.mark.parametrize(
    ("condition", "rows"),
    [
        ("store = 'north'", [0]),
        ("store != 'north'", [1, 3]),
        ("store == 'it''s' or WIDTH > 100", [1, 3]),
        ("width * height < 1e3", [0, 2]),
        ("width / height >= 1 and not (height = 10)", [1, 2]),
        ("height between 20 and 30", [1, 2]),
        ("store in ('north', 'south') AND height + 1 > 20", [1]),
        ("store is null", [2]),
        ("NOT width IS NULL", [0, 1, 2]),
        ("-height < -35", [3]),
        ('"Price now" > 3.5', [3]),
    ],
)
def test_conditions(condition: str, rows: list[int]) -> None:
    assert np.flatnonzero(rows_where(condition, COLUMNS)).tolist() == rows


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("stor = 'north'", "no column 'stor'; did you mean store"),
        ("store = north", "no column 'north'"),
        ("__import__('os').system('true') = 0", "is not allowed|not understood"),
        ("store = (SELECT 1)", "is not allowed"),
        ("width", "must compare texts with texts"),
        ("store < 3", "must compare texts with texts"),
        ("store =", "not understood"),
        ("width < 3; width > 4", "not allowed"),
        ("store in (width)", "IN takes words"),
    ],
)
def test_what_is_no_condition_is_refused(condition: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        rows_where(condition, COLUMNS)


def test_columns_of_a_run_and_of_its_data(tmp_path: Path) -> None:
    run = Run(products_run())
    predictions = run.predictions("test")
    assert predictions is not None
    (tmp_path / "stores.csv").write_text(
        "photo,store\n" + "".join(f"{name},{place % 2}\n" for place, name in enumerate(predictions.names)),
        encoding="utf-8",
    )
    columns, notes = sample_columns(run, predictions, "class", tmp_path / "stores.csv")
    assert notes == []
    data = data_of(run.path)
    with Image.open(data.table.source(int(predictions.sample_id[0]))) as image:
        assert (columns["width"][0], columns["height"][0]) == image.size
    assert columns["store"].tolist() == [place % 2 for place in range(len(predictions))]
    classes = predictions.tasks["class"]
    assert columns["class"].tolist() == [classes[target] for target in predictions.targets["class"]]
    confidence = predictions.probabilities("class").max(axis=1)
    assert np.flatnonzero(rows_where("confidence < .5", columns)).tolist() == np.flatnonzero(confidence < 0.5).tolist()
    (tmp_path / "other.csv").write_text("photo,store\nx,1\n", encoding="utf-8")
    with pytest.raises(UserError, match="no column has the names of the samples"):
        sample_columns(run, predictions, "class", tmp_path / "other.csv")


@pytest.mark.parametrize("suffix", ["csv", "CSV", "jsonl"])
def test_further_columns_are_taken_as_they_are_written(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"stores.{suffix}"
    rows = [("./a.jpg", "007", "NA", "3"), ("sub\\b.jpg", "7", "", "NA"), ("c.jpg", "12", "FR", "4.5")]
    if suffix == "jsonl":
        numbers = ("3", "null", "4.5")
        path.write_text(
            "".join(
                f'{{"file": "{row[0]}", "store": "{row[1]}", "country": "{row[2]}", "age": {age}}}\n'.replace(
                    "\\", "\\\\"
                )
                for row, age in zip(rows, numbers, strict=True)
            ),
            encoding="utf-8",
        )
    else:
        path.write_text(
            "\ufefffile;store;country;age\n" + "".join(";".join(row) + "\n" for row in rows), encoding="utf-8"
        )
    names = np.array(["a.jpg", "sub/b.jpg", "c.jpg"], dtype=object)
    none = np.zeros(0, np.int64)
    predictions = Predictions(none, names, names, {}, {}, {})

    columns, _ = sample_columns(Run(products_run()), predictions, "class", path)

    assert columns["store"].tolist() == ["007", "7", "12"]
    assert columns["country"].tolist() == ["NA", None, "FR"]
    assert str(columns["age"].tolist()) == "[3.0, nan, 4.5]"
