from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pandas as pd
import pytest

from datamodules.table import SampleTable, table_error
from vitrail.errors import UserError
from vitrail.types import UNKNOWN, TaskKind


def small_frame() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "name": ["a", "b", "c", "d", "e"],
            "source": ["a.jpg", "b.jpg", "c.jpg", "d.jpg", "/elsewhere/e.jpg"],
            "split": ["train", "train", "train", "val", "test"],
            "group": ["x", "y", "x", "z", ""],
            "caption": ["an a", None, "", "a d", "an e"],
            "row": [2, 3, 4, 6, 9],
            "class": ["dog", "cat", "dog", "cow", "cow"],
            "colour": ["red", None, float("nan"), "red", ""],
        }
    )


def test_vocabulary_comes_from_train_alone_and_unseen_values_are_unknown_and_counted() -> None:
    table = SampleTable.from_frame(small_frame(), ["class", "colour"])
    assert table.tasks == {"class": ["cat", "dog"], "colour": ["red"]}
    assert table.targets["class"].tolist() == [1, 0, 1, UNKNOWN, UNKNOWN]
    assert table.targets["colour"].tolist() == [0, UNKNOWN, UNKNOWN, 0, UNKNOWN]
    assert table.unseen == {"class": {"cow": 2}, "colour": {}}


def test_a_given_vocabulary_keeps_its_order() -> None:
    table = SampleTable.from_frame(small_frame(), ["class"], {"class": ["dog", "cow", "bird"]})
    assert table.tasks["class"] == ["dog", "cow", "bird"]
    assert table.targets["class"].tolist() == [0, UNKNOWN, 0, 1, 1]
    assert table.unseen["class"] == {"cat": 1}
    assert table.class_counts() == {"class": [2, 0, 0]}
    assert table.class_counts("test") == {"class": [0, 1, 0]}


def test_columns_are_found_again_by_row() -> None:
    table = SampleTable.from_frame(small_frame(), ["class"], root="/data/")
    assert len(table) == 5
    assert [table.name(i) for i in range(5)] == ["a", "b", "c", "d", "e"]
    assert table.source(0) == "/data/a.jpg"
    assert table.source(4) == "/elsewhere/e.jpg"
    assert table.sources.to_pylist() == [table.source(i) for i in range(5)]
    assert [table.caption(i) for i in range(5)] == ["an a", "", "", "a d", "an e"]
    assert table.groups.to_pylist() == ["x", "y", "x", "z", "e"], "an empty group is the sample's own"
    assert [table.group(i) for i in range(5)] == table.groups.to_pylist()
    assert table.group_ids.tolist() == [0, 1, 0, 2, 3]
    assert [table.split(i) for i in range(5)] == ["train", "train", "train", "val", "test"]
    assert table.split_indices("train").tolist() == [0, 1, 2]
    assert table.split_indices("val").dtype == np.int64
    assert table.where(3) == "labels.csv:6"


def test_optional_columns_have_defaults() -> None:
    table = SampleTable.from_frame(small_frame()[["name", "source", "split", "class"]], ["class"])
    assert table.groups.to_pylist() == table.names.to_pylist()
    assert table.caption(0) == ""
    assert table.rows.tolist() == [2, 3, 4, 5, 6]


def test_the_frames_index_and_value_types_do_not_matter() -> None:
    frame = pd.DataFrame(
        {
            "name": [7, 8, 9],
            "source": [0, 1, 2],
            "split": ["train"] * 3,
            "class": [1, "x", None],
        },
        index=[5, 5, 2],
    )
    table = SampleTable.from_frame(frame, ["class"])
    assert table.names.to_pylist() == ["7", "8", "9"]
    assert table.source(2) == "2"
    assert table.tasks["class"] == ["1", "x"]
    assert table.targets["class"].tolist() == [0, 1, UNKNOWN]


def test_several_captions_a_row_are_part_of_the_content() -> None:
    frame = small_frame()
    frame["caption"] = [["one", "two"], ["three"], [], ["four"], ["five", "six"]]
    table = SampleTable.from_frame(frame, ["class"])
    assert table.captions.to_pylist() == ["one", "three", "", "four", "five"]
    assert table.caption_lists.of([0, 2]) == [["one", "two"], [""]]
    other = small_frame()
    other["caption"] = [["one"], ["two", "three"], [], ["four"], ["five", "six"]]
    assert SampleTable.from_frame(other, ["class"]).fingerprint() != table.fingerprint()


def test_problems_of_rows_are_reported_together_in_their_order() -> None:
    frame = small_frame()
    frame.loc[3, "name"] = "a"
    frame.loc[1, "split"] = "valid"
    frame.loc[4, "source"] = None
    frame.loc[2, "name"] = ""
    with pytest.raises(UserError) as caught:
        SampleTable.from_frame(frame, ["class"], origin="wares.csv")
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("wares.csv: 4 problems; ")
    assert lines[1:] == [
        "  wares.csv:3: split 'valid' is not one of train, val, test",
        "  wares.csv:4: empty name",
        "  wares.csv:6: name 'a' again, first in row 2",
        "  wares.csv:9: empty source",
    ]


def test_only_the_first_twenty_problems_are_listed() -> None:
    error = table_error("t.csv", [(row, "wrong") for row in range(90, 40, -1)], "mend them")
    listed = [f"  t.csv:{row}: wrong" for row in range(41, 61)]
    assert str(error).splitlines() == ["t.csv: 50 problems; mend them", *listed, "  and 30 more"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda frame: frame.drop(columns="split"), "missing column split"),
        (lambda frame: frame.drop(columns="colour"), "missing column colour"),
        (lambda frame: frame.iloc[:0], "has no rows"),
        (lambda frame: frame.assign(colour=None), "task 'colour' has no known value in the train split"),
        (lambda frame: frame.assign(split="val"), "no known value in the train split"),
    ],
)
def test_unusable_tables_are_refused(change: object, message: str) -> None:
    assert callable(change)
    with pytest.raises(UserError, match=message):
        SampleTable.from_frame(change(small_frame()), ["class", "colour"])


def test_vocabularies_are_checked() -> None:
    for names in (["cat", "cat"], ["cat", ""]):
        with pytest.raises(UserError, match="vocabulary of 'class' has a repeated or empty name"):
            SampleTable.from_frame(small_frame(), ["class"], {"class": names})
    with pytest.raises(UserError, match="vocabulary for 'size', which is not a target"):
        SampleTable.from_frame(small_frame(), ["class"], {"size": ["big"]})


@pytest.mark.parametrize(
    ("column", "value"),
    [("name", "z"), ("source", "z"), ("split", "val"), ("group", "z"), ("caption", "z"), ("class", "cat")],
)
def test_the_fingerprint_covers_all_content(column: str, value: str) -> None:
    original = SampleTable.from_frame(small_frame(), ["class", "colour"]).fingerprint()
    changed = small_frame()
    changed.loc[2, column] = value
    assert SampleTable.from_frame(changed, ["class", "colour"]).fingerprint() != original


def test_the_fingerprint_depends_neither_on_place_nor_on_representation() -> None:
    frame = small_frame()
    original = SampleTable.from_frame(frame, ["class", "colour"]).fingerprint()
    elsewhere = SampleTable.from_frame(frame, ["class", "colour"], origin="x.csv", root="/mnt/data")
    assert elsewhere.fingerprint() == original
    assert SampleTable.from_frame(frame.astype(object), ["class", "colour"]).fingerprint() == original
    pieces = pd.concat([frame.iloc[:2], frame.iloc[2:]])
    assert SampleTable.from_frame(pieces, ["class", "colour"]).fingerprint() == original
    part = pd.concat([frame.iloc[:1].assign(name="z"), frame]).iloc[1:]
    assert SampleTable.from_frame(part, ["class", "colour"]).fingerprint() == original


def test_the_fingerprint_depends_on_where_one_string_ends() -> None:
    def fingerprint(names: list[str]) -> str:
        frame = pd.DataFrame(
            {"name": names, "source": ["s", "t"], "split": ["train"] * 2, "class": ["u"] * 2, "group": "g"}
        )
        return SampleTable.from_frame(frame, ["class"]).fingerprint()

    assert fingerprint(["ab", "c"]) != fingerprint(["a", "bc"])


def test_large_tables_hold_no_python_object_per_row() -> None:
    rows = 200_000
    numbers = np.arange(rows)
    frame = pd.DataFrame(
        {
            "name": "sample-" + pd.Series(numbers).astype("string"),
            "source": "images/" + pd.Series(numbers).astype("string") + ".jpg",
            "split": np.where(numbers % 10 == 0, "val", "train"),
            "group": "object-" + pd.Series(numbers // 5).astype("string"),
            "class": "class-" + pd.Series(numbers % 17).astype("string"),
        }
    )
    tracemalloc.start()
    try:
        table = SampleTable.from_frame(frame, ["class"])
        table.fingerprint()
        blocks = len(tracemalloc.take_snapshot().traces)
    finally:
        tracemalloc.stop()
    assert len(table.split_indices("val")) == rows // 10
    assert sum(table.class_counts()["class"]) == rows * 9 // 10
    assert blocks < 5_000


def of_kind(kind: TaskKind, cells: list[Any]) -> SampleTable:
    """A table of five samples, the first three train, with one task."""
    names = [f"image {row}" for row in range(len(cells))]
    rows = {"name": names, "source": names, "split": ["train"] * 3 + ["val", "test"], "price": cells}
    return SampleTable.from_frame(pd.DataFrame(rows), {"class": "price"}, kinds={"class": kind})


@pytest.mark.parametrize(
    ("kind", "cells", "message"),
    [
        ("regression", [1, 2, 3, np.inf, 5], r"labels\.csv:5: class 'inf' must be a number"),
        ("regression", [1, 1e39, 3, 4, 5], r"labels\.csv:3: class '1e\+39' must be a number"),
        ("regression", ["1", "dear", "3", "", "5"], r"labels\.csv:3: class 'dear' must be a number"),
        ("regression", [1e9, 1e9 + 1, 1e9 + 2, 1e9, 1e9], "differ by less than float32 can hold, such as 1000000000"),
        ("multi_label", [["a"], "ab", ["b"], None, []], r"labels\.csv:3: class 'ab' must be a list of labels"),
        ("multi_label", [["a"], 3, ["b"], None, []], r"labels\.csv:3: class 3 must be a list of labels"),
        ("ordinal", ["good", "bad", "good", "", "bad"], "is ordinal; give its classes in their order"),
    ],
)
def test_targets_that_would_be_taken_for_others_are_refused(kind: TaskKind, cells: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        of_kind(kind, cells)


def test_empty_cells_of_numbers_and_labels_are_unknown() -> None:
    values = of_kind("regression", ["1", None, "2.5", "", np.nan]).targets["class"]
    np.testing.assert_array_equal(values, np.array([1, np.nan, 2.5, np.nan, np.nan], np.float32))
    labels = of_kind("multi_label", [["a"], np.nan, ["b"], None, []]).targets["class"]
    assert labels.tolist() == [[1, 0], [UNKNOWN, UNKNOWN], [0, 1], [UNKNOWN, UNKNOWN], [0, 0]]
