from __future__ import annotations

import datasets
import pyarrow as pa
import pytest

from datamodules.files.label_csv import class_names_of, first_text, label_texts, numbers_in_order, plain_texts
from vitrail.errors import UserError


def test_numbers_become_the_names_that_they_stand_for() -> None:
    assert label_texts(pa.array([1, None, -1, 0]), ["cup", "hat"], "here") == ["hat", "", "", "cup"]
    assert label_texts(pa.array([10, None, 2]), [], "here") == ["10", "", "2"]
    assert label_texts(pa.array([True, None]), [], "here") == ["True", ""]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_texts_are_names_without_spaces_around(kind: pa.DataType) -> None:
    assert label_texts(pa.array([" cup ", None, ""], type=kind), ["cup"], "here") == ["cup", "", ""]


def test_a_column_of_nothing_is_unknown() -> None:
    assert label_texts(pa.nulls(2), ["cup"], "here") == ["", ""]


def test_a_number_without_a_name_is_told_with_its_row() -> None:
    with pytest.raises(UserError, match=r"here: row 2 has the label 5, but there are 2 class names \(0 to 1\)"):
        label_texts(pa.array([0, 1, 5]), ["cup", "hat"], "here")


def test_other_types_are_no_classes() -> None:
    with pytest.raises(UserError, match="here: holds double, which is no class"):
        label_texts(pa.array([0.5]), [], "here")


def test_names_of_features() -> None:
    assert class_names_of(datasets.ClassLabel(names=["b", "a"])) == ["b", "a"]
    assert class_names_of(datasets.Value("int64")) == class_names_of(None) == []


def test_numbers_are_put_in_order_by_size() -> None:
    assert numbers_in_order(["10", "", "2", "-1", "2"]) == ["-1", "2", "10"]


def test_a_caption_is_one_line() -> None:
    assert first_text([" a\n red  cup ", "another"]) == "a red cup"
    assert first_text([]) == first_text(None) == ""
    assert first_text(7) == "7"


def test_pandas_ways_with_missing_values() -> None:
    numbers = pa.array([1.0, None, float("nan"), 0.0])
    assert label_texts(numbers, ["cup", "hat"], "here") == ["hat", "", "", "cup"]
    assert plain_texts(numbers) == ["1", "", "", "0"]
    assert plain_texts(pa.array([1.5, float("nan")])) == ["1.5", ""]
    assert label_texts(pa.array(["cup", None, "hat"]).dictionary_encode(), [], "here") == ["cup", "", "hat"]
    assert plain_texts(pa.array(["001", "1e3", "None", None, "cafe\u0301"])) == ["001", "1e3", "None", "", "caf\u00e9"]
