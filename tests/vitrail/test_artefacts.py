"""Tables as CSV: no cell is a formula, numbers stay numbers, and what is read back is what was written."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from datamodules.files.label_csv import read_label_file
from vitrail.files import read_csv, write_csv

FORMULAS = [
    *("=1+1", "+cmd|' /C calc'!A0", "-2+3+cmd|' /C calc'!A0", "@SUM(A1)", "\tx", "\rx", '=HYPERLINK("http://x")'),
    *("-bag", "'=1", "''-x", "'-5", "+a", "-"),
]
PLAIN = ["mug", "a=b", "'quoted'", "5", "-5", "+0.012 [-0.030, +0.055]", "-1e-05", "-.5", "0.5 ± 0.1", "ä", " =1"]


def test_no_cell_header_or_row_name_is_a_formula(tmp_path: Path) -> None:
    frame = pd.DataFrame({"=name": FORMULAS}, index=pd.Index(FORMULAS, name="@index"))
    write_csv(tmp_path / "a.csv", frame, index=True)
    with (tmp_path / "a.csv").open(newline="", encoding="utf-8") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert len(cells) == 2 * len(FORMULAS) + 2
    assert all(cell.startswith("'") for cell in cells)


def test_numbers_and_other_texts_are_as_they_are(tmp_path: Path) -> None:
    frame = pd.DataFrame({"text": PLAIN, "number": np.linspace(-1, 1, len(PLAIN)), "count": range(-3, len(PLAIN) - 3)})
    write_csv(tmp_path / "a.csv", frame)
    assert "'-" not in (tmp_path / "a.csv").read_text(encoding="utf-8")
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "a.csv"), frame)


@pytest.mark.parametrize("text", [*FORMULAS, *PLAIN])
def test_what_is_read_back_is_what_was_written(tmp_path: Path, text: str) -> None:
    frame = pd.DataFrame({"=a": [text, "between", text], "b": [1.5, -2.5, np.nan]})
    write_csv(tmp_path / "a.csv", frame)
    pd.testing.assert_frame_equal(read_csv(tmp_path / "a.csv"), frame)
    labels = read_label_file(tmp_path / "a.csv", ["=a"])
    assert labels.columns["=a"] == [text, "between", text], "also as the labels of a data set"


@pytest.mark.parametrize("name", ["None", "NA", "nan", "null"])
def test_a_name_that_pandas_takes_for_a_missing_value_is_a_text(tmp_path: Path, name: str) -> None:
    frame = pd.DataFrame({"class": [name, "cup", None], "b": [1.5, -2.5, np.nan]})
    write_csv(tmp_path / "a.csv", frame)
    pd.testing.assert_frame_equal(read_csv(tmp_path / "a.csv"), frame)


def test_an_empty_table(tmp_path: Path) -> None:
    frame = pd.DataFrame({"a": [], "=b": []})
    write_csv(tmp_path / "a.csv", frame)
    assert list(read_csv(tmp_path / "a.csv").columns) == ["a", "=b"]
