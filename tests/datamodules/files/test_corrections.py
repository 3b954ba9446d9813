from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
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
