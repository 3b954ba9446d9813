from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from datamodules.files.corrections import HISTORY
from datamodules.table_file import Table
from vitrail.programs import main

ROWS = [
    ("a.jpg", "cat", "soft;old", 3.5),
    ("b.jpg", "dog", "old", 4.0),
    ("c.jpg", "dog", "", 5.25),
    ("d.jpg", "cat", "soft", 1.0),
]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    for number, row in enumerate(ROWS):
        Image.new("RGB", (9 + number, 9)).save(tmp_path / row[0])
    frame(ROWS).to_csv(tmp_path / "birds.csv", index=False)
    return tmp_path / "birds.csv"


def frame(rows: list[tuple[str, str, str, float]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["file", "label", "tags", "price"])


def relabel(table: Path, corrections: str, *arguments: str, to: str = "new.csv") -> int:
    (table.parent / "fix.csv").write_text(corrections, encoding="utf-8")
    return main(
        "datamodules",
        ["relabel", str(table), str(table.parent / "fix.csv"), "--to", str(table.parent / to), *arguments],
    )


def test_labels_of_every_kind_are_corrected_in_a_new_table(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = table.read_bytes()
    fix = [
        "image,task,old,label,by,reason",
        "b.jpg,class,dog,cat,Ada,a kitten",
        "a.jpg,tags,old;soft,soft,,",
        "c.jpg,price,5.25,6,,",
        "d.jpg,class,cat,cat,,",
    ]
    assert relabel(table, "\n".join(fix)) == 0
    assert "3 labels changed; 1 were so already" in capsys.readouterr().out
    assert table.read_bytes() == before, "never in place"
    new = pd.read_csv(table.parent / "new.csv", keep_default_na=False)
    assert new[["file", "label", "tags"]].to_numpy().tolist() == [
        ["a.jpg", "cat", "soft"], ["b.jpg", "cat", "old"], ["c.jpg", "dog", ""], ["d.jpg", "cat", "soft"]
    ]  # fmt: skip
    assert new["price"].tolist() == [3.5, 4.0, 6.0, 1.0]
    history = [json.loads(text) if text else [] for text in new[HISTORY]]
    assert history[1] == [{"column": "label", "old": "dog", "new": "cat", "by": "Ada", "reason": "a kitten"}]
    assert history[3] == []
    old_data, new_data = (Table(str(table.parent / name)) for name in ("birds.csv", "new.csv"))
    assert old_data.table.fingerprint() != new_data.table.fingerprint()
    # A second round adds to the history.
    assert relabel(table.parent / "new.csv", "id,new\nb.jpg,dog\n", to="third.csv") == 0
    third = pd.read_csv(table.parent / "third.csv", keep_default_na=False)
    assert [one["new"] for one in json.loads(third[HISTORY][1])] == ["cat", "dog"]


def test_everything_that_does_not_fit_is_refused_with_its_row(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fix = [
        "image,task,old,label",
        "x.jpg,class,,cat",
        "a.jpg,colour,,red",
        "b.jpg,class,cat,dog",
        "c.jpg,class,dog,bird",
        "d.jpg,price,,1",
        "d.jpg,price,,2",
    ]
    assert relabel(table, "\n".join(fix)) == 2
    error = capsys.readouterr().err
    for row, problem in (
        (2, "no image 'x.jpg' in the table"),
        (3, "no task 'colour'; tasks are"),
        (4, "'b.jpg' is labelled 'dog' by now, not 'cat'"),
        (5, "class 'bird' is in no row of the table; allow it with --new-classes"),
        (6, "several corrections of price of 'd.jpg'"),
    ):
        assert f":{row}: {problem}" in error
    assert not (table.parent / "new.csv").exists()
    assert relabel(table, "image,label\nc.jpg,bird\n", "--new-classes") == 0
    assert relabel(table, "image,task,label\nc.jpg,price,cheap\n") == 2
    assert "'cheap' is no number" in capsys.readouterr().err
    assert relabel(table, "image,label\nc.jpg,cat\n", to="birds.csv") == 2
    assert "is the table itself" in capsys.readouterr().err
    assert relabel(table, "image,label\nc.jpg,cat\n", to="new.parquet") == 2
    assert "must end in .csv" in capsys.readouterr().err
    assert relabel(table, "file,class\nc.jpg,cat\n") == 2
    assert "has no column 'image'" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_lists_and_numbers_keep_their_types(tmp_path: Path, suffix: str) -> None:
    rows = frame(ROWS).assign(tags=pd.Series([["soft", "old"], ["old"], [], ["soft"]], dtype=object))
    path = tmp_path / f"birds{suffix}"
    rows.to_parquet(path) if suffix == ".parquet" else rows.to_json(path, orient="records", lines=True)
    assert relabel(path, "image,task,label\nb.jpg,tags,old|soft\nb.jpg,price,9\n", to=f"new{suffix}") == 0
    new = (
        pd.read_parquet(tmp_path / "new.parquet")
        if suffix == ".parquet"
        else pd.read_json(tmp_path / "new.jsonl", lines=True)
    )
    assert [list(value) for value in new["tags"]] == [["soft", "old"], ["old", "soft"], [], ["soft"]]
    assert new["price"].tolist() == [3.5, 9.0, 5.25, 1.0]


def test_cells_without_a_correction_stay_as_they_are(tmp_path: Path) -> None:
    tags = [["red, dark", "x"], None, [], ["x"]]
    rows = pa.table({"image": list("abcd"), "tags": tags, "price": [1.5, float("nan"), None, 2.0]})
    pq.write_table(rows, tmp_path / "birds.parquet")
    fix = 'image,task,label\nd,tags,"red, dark"\nd,price,3\n'
    assert relabel(tmp_path / "birds.parquet", fix, to="new.parquet") == 0
    new = pq.read_table(tmp_path / "new.parquet")
    assert new["tags"].to_pylist() == [["red, dark", "x"], None, [], ["red, dark"]]
    assert str(new["price"].to_pylist()) == "[1.5, nan, None, 3.0]"


def test_json_lines_keep_dates_and_whole_numbers(tmp_path: Path) -> None:
    rows = [{"image": "a", "label": "x", "day": "2024-05-01", "count": 3}, {"image": "b", "label": "y", "count": None}]
    (tmp_path / "t.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert relabel(tmp_path / "t.jsonl", "image,label\nb,x\n", to="new.jsonl") == 0
    new = [json.loads(line) for line in (tmp_path / "new.jsonl").read_text().splitlines()]
    assert [row["count"] for row in new] == [3, None]
    assert str(new[0]["day"]).startswith("2024-05-01")


def test_numbers_that_are_written_differently_may_be_different_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.csv").write_text("image,label\n./a.jpg,007\nsub\\b.jpg,7\nc  d.jpg,8\n")
    assert relabel(tmp_path / "t.csv", "image,old,label\na.jpg,007,7\nsub/b.jpg,7,8\nc  d.jpg,8,7\n") == 0
    assert "3 labels changed" in capsys.readouterr().out
    labels = pd.read_csv(tmp_path / "new.csv", dtype=str)["label"]
    assert labels.tolist() == ["7", "8", "7"]


def test_numbers_that_their_column_cannot_hold_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pq.write_table(pa.table({"image": ["a", "b"], "label": [1, 2]}), tmp_path / "t.parquet")
    for label in ("1.5", "nan"):
        assert relabel(tmp_path / "t.parquet", f"image,label\na,{label}\n", to="new.parquet") == 2
        assert f"{label!r} is no number" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_new_number_among_classes_that_are_numbers_is_a_new_class(
    tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = pd.DataFrame({"image": list("abcd"), "label": [1, 2, 1, 2], "price": [3, 5, 8, 13]})
    path = tmp_path / f"t.{suffix}"
    rows.to_csv(path, index=False) if suffix == "csv" else rows.to_parquet(path)
    fix = "image,task,label\na,class,7\n"
    assert relabel(path, fix, to=f"new.{suffix}") == 2
    assert ":2: class '7' is in no row of the table; allow it with --new-classes" in capsys.readouterr().err
    assert relabel(path, fix, "--new-classes", to=f"new.{suffix}") == 0
    # Numbers that hardly repeat are measured.
    assert relabel(path, "image,task,label\na,class,2.0\nb,price,4\n", to=f"newer.{suffix}") == 0
    assert "2 labels changed" in capsys.readouterr().out


def test_columns_that_are_left_out_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.csv").write_text(",image,label\n0,a,x\n1,b,y\n")
    assert relabel(tmp_path / "t.csv", "image,label\na,y\n") == 0
    assert "column 1 has no name and is left out" in capsys.readouterr().err
