from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from datamodules import Table
from datamodules.options import CheckOptions, LoaderOptions
from datamodules.splits import SplitOptions
from datamodules.table_file import TableColumns
from tests.datamodules.streaming.shard_sets import served
from tests.support.data import draw_image
from vitrail.errors import UserError

NO_TESTS = SplitOptions(val_fraction=0.25, test_fraction=0.25)


def write_images(folder: Path, names: Sequence[str]) -> None:
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        draw_image(seed, "red", look=seed).save(folder / name)


def csv_table(folder: Path, rows: Sequence[str], name: str = "labels.csv", *, images: int = 8) -> Path:
    write_images(folder, [f"img/{number}.png" for number in range(images)])
    path = folder / name
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def odd_rows(count: int = 8) -> list[str]:
    header = "ID;file name;Latin_Name;nest;Colour;remark"
    return [header, *(f"{n};img\\{n}.png;{'ab'[n % 2]};n{n // 2};{'red' if n < 4 else 'blue'};-" for n in range(count))]


def test_a_table_with_odd_columns_is_read_by_the_names_that_are_given(tmp_path: Path) -> None:
    path = csv_table(tmp_path, odd_rows())

    data = Table(str(path), TableColumns(label="Latin_Name", labels=["Colour"], group="nest"), split=NO_TESTS)

    assert data.tasks == {"class": ["a", "b"], "Colour": ["blue", "red"]}
    assert data.sample_names()[:2] == ["img/0.png", "img/1.png"]
    assert data.group_names()[:3] == ["n0", "n0", "n1"]
    by_group = pd.Series([data.table.split(row) for row in range(8)]).groupby(data.group_names()).nunique()
    assert set(by_group) == {1}
    assert data.read_image(3).shape[0] == 3
    assert any("'file name'" in note and "'ID', 'remark'" not in note for note in data.table.notes)
    assert any("not used: 'ID', 'remark'" in note for note in data.table.notes)


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet", "jsonl"])
def test_usual_names_are_found_in_every_format(tmp_path: Path, kind: str) -> None:
    write_images(tmp_path, [f"{n}.png" for n in range(6)])
    frame = pd.DataFrame(
        {
            "Image-Path": [f"{n}.png" for n in range(6)],
            "category": ["x", "y"] * 3,
            "subset": ["Training", "train", "valid", "val", "TEST", "test"],
        }
    )
    path = tmp_path / f"table.{kind}"
    if kind == "parquet":
        frame.to_parquet(path)
    elif kind == "jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_csv(path, sep="\t" if kind == "tsv" else ",", index=False)

    data = Table(str(path))

    assert data.class_names == ["x", "y"]
    assert [len(data.table.split_indices(split)) for split in ("train", "val", "test")] == [2, 2, 2]
    assert data.table.fingerprint() == Table(str(path)).table.fingerprint()


def test_whole_numbers_are_classes_in_the_order_of_their_size(tmp_path: Path) -> None:
    rows = ["image,label", *(f"img/{n}.png,{n % 2 + 9}" for n in range(8))]

    assert Table(str(csv_table(tmp_path, rows)), split=NO_TESTS).class_names == ["9", "10"]


def test_class_names_of_a_parquet_file_written_by_datasets_are_kept(tmp_path: Path) -> None:
    import datasets

    write_images(tmp_path, [f"{n}.png" for n in range(8)])
    features = datasets.Features({"image": datasets.Value("string"), "label": datasets.ClassLabel(names=["z", "a"])})
    rows = {"image": [f"{n}.png" for n in range(8)], "label": [0, 1] * 4}
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "t.parquet")

    assert Table(str(tmp_path / "t.parquet"), split=NO_TESTS).class_names == ["z", "a"]


@pytest.mark.parametrize("as_lists", [False, True])
def test_rows_of_one_image_are_joined_with_all_their_captions(tmp_path: Path, as_lists: bool) -> None:
    write_images(tmp_path, [f"{n}.png" for n in range(6)])
    if as_lists:
        table = pa.table({"url": [f"{n}.png" for n in range(6)], "text": [[f"one {n}", f"two {n}"] for n in range(6)]})
    else:
        pairs = [(f"{n}.png", f"{word} {n}") for word in ("one", "two") for n in range(6)]
        table = pa.table({"url": [name for name, _ in pairs], "text": [text for _, text in pairs]})
    pq.write_table(table, tmp_path / "captions.parquet")

    data = Table(str(tmp_path / "captions.parquet"), split=SplitOptions(val_fraction=0.3, test_fraction=0.0))

    assert data.tasks == {}
    assert data.table.caption_lists.of([0, 5]) == [["one 0", "two 0"], ["one 5", "two 5"]]
    assert data.own_captions


def test_repeated_images_without_captions_are_refused_by_row(tmp_path: Path) -> None:
    path = csv_table(tmp_path, ["image,label", "img/0.png,a", "img/1.png,b", "img/0.png,a", "./img/1.png,c"])

    with pytest.raises(UserError) as error:
        _ = Table(str(path)).table

    assert "labels.csv:4: image 'img/0.png' again, first in row 2" in str(error.value)
    assert "labels.csv:5: image 'img/1.png' again, with another class, first in row 3" in str(error.value)


def test_absolute_paths_and_another_root(tmp_path: Path) -> None:
    write_images(tmp_path / "elsewhere", ["0.png", "1.png", "2.png", "3.png"])
    rows = ["image,label", "0.png,a", "1.png,a", "2.png,b", f"{tmp_path}/elsewhere/3.png,b"]
    (tmp_path / "t.csv").write_text("\n".join(rows))

    data = Table(str(tmp_path / "t.csv"), root=str(tmp_path / "elsewhere"))

    assert data.table.source(0) == str(tmp_path / "elsewhere/0.png")
    assert data.table.source(3) == str(tmp_path / "elsewhere/3.png")
    data.prepare_data()
    assert data.verification().bad == {}


def test_images_behind_urls_are_fetched_once_and_a_dead_link_is_a_bad_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))
    write_images(tmp_path / "web", [f"{n}.png" for n in range(4)])
    with served(tmp_path / "web") as (address, asked):
        rows = ["image,label", *(f"{address}/{n}.png,{'ab'[n % 2]}" for n in range(5))]
        (tmp_path / "t.csv").write_text("\n".join(rows))
        strict = Table(str(tmp_path / "t.csv"))
        with pytest.raises(UserError, match=r"t\.csv:6: http.*/4\.png cannot be fetched \(HTTP Error 404"):
            strict.prepare_data()
        data = Table(str(tmp_path / "t.csv"), checks=CheckOptions(on_bad_image="skip"))
        data.prepare_data()

    assert data.sample_names()[0] == f"{address}/0.png"
    assert data.read_image(0).shape == (3, 32, 32)
    assert [entry["row"] for entry in data.data_record()["skipped"]] == [6]
    assert data.files_left_out == {}
    assert asked.count("/0.png") == 1, "the second data set found them in the cache"
    again = Table(str(tmp_path / "t.csv"), checks=CheckOptions(on_bad_image="skip"))
    again.prepare_data()  # the server is gone
    assert np.array_equal(again.read_image(1), data.read_image(1))


def test_nothing_can_be_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "t.csv").write_text("image,label\nhttp://127.0.0.1:9/a.png,a\n")

    with pytest.raises(UserError, match=r"no image could be fetched; http://127\.0\.0\.1:9/a\.png"):
        Table(str(tmp_path / "t.csv")).prepare_data()


MISTAKES: dict[str, tuple[list[str], dict[str, Any], str]] = {
    "no column of images": (["a,b", "1,2"], {}, r"data columns\.image: .* has the columns a, b; name the one"),
    "unknown column": (["image,label", "img/0.png,a"], {"label": "breed"}, r"has no column 'breed'"),
    "strange split": (["image,label,split", "img/0.png,a,maybe"], {}, r"labels\.csv:2: split 'maybe' must be one of"),
    "no path": (["image,label", "img/0.png,a", " ,b"], {}, r"labels\.csv:3: no image path"),
    "password": (["image,label", "https://me:secret@h/a.png,a"], {}, r"labels\.csv:2: https://me:\*\*\*@h/a\.png has"),
    "all elsewhere": (["image,label", "x.png,a"], {}, r"none of its 1 images exists below .*; set data root"),
    "no rows": (["image,label"], {}, r"has no rows"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_clear_error(tmp_path: Path, mistake: str) -> None:
    rows, columns, message = MISTAKES[mistake]

    with pytest.raises(UserError, match=message):
        _ = Table(str(csv_table(tmp_path, rows)), TableColumns(**columns)).table


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t.xlsx").write_bytes(b"PK")
    (tmp_path / "t.jsonl").write_text('{"image": ')
    pq.write_table(pa.table({"image": [b"\x89PNG"]}), tmp_path / "bytes.parquet")

    for name, message in {
        "t.xlsx": "must end with one of .csv",
        "t.jsonl": "cannot be read",
        "absent.parquet": "there is no file",
        "bytes.parquet": "datamodules.HubImages",
    }.items():
        with pytest.raises(UserError, match=message):
            _ = Table(str(tmp_path / name)).table


def test_the_separator_can_be_given(tmp_path: Path) -> None:
    path = csv_table(tmp_path, ["image:label,x", *(f"img/{n}.png:{'ab'[n % 2]},y" for n in range(8))])

    assert Table(str(path), sep=":", split=NO_TESTS, columns=TableColumns(label="label,x")).class_names == [
        "a,y",
        "b,y",
    ]
    with pytest.raises(UserError, match="one character"):
        Table(str(path), sep="::")


def test_options_are_saved_as_plain_values(tmp_path: Path) -> None:
    data = Table(str(csv_table(tmp_path, odd_rows())), TableColumns(label="nest"))

    assert json.loads(json.dumps(dict(data.hparams)["columns"]))["label"] == "nest"


KINDS_ROWS = [
    "image,class,tags,price,grade,cat,dog",
    "img/0.png,a,red|big,1.5,poor,1,0",
    "img/1.png,b,red,2.5,good,0,1",
    "img/2.png,a,|,,fair,,1",
    "img/3.png,b,,3.25,,yes,no",
    "img/4.png,a,big|round,4,good,0,0",
    "img/5.png,b,red|round,2,poor,true,false",
    "img/6.png,a,red,1.5,fair,0,1",
    "img/7.png,b,big,0.5,good,1,1",
]
KINDS_COLUMNS = TableColumns(
    kinds={"tags": "multi_label", "price": "regression", "grade": "ordinal"},
    classes={"grade": ["poor", "fair", "good"], "tags": ["big", "red", "round"]},
    one_hot={"pets": ["cat", "dog"]},
)


def test_columns_of_every_kind(tmp_path: Path) -> None:
    data = Table(str(csv_table(tmp_path, KINDS_ROWS)), KINDS_COLUMNS, split=NO_TESTS)
    table = data.table

    assert data.tasks == {
        "class": ["a", "b"],
        "tags": ["big", "red", "round"],
        "price": [],
        "grade": ["poor", "fair", "good"],
        "pets": ["cat", "dog"],
    }
    assert data.task_kinds == {
        "tags": "multi_label",
        "price": "regression",
        "grade": "ordinal",
        "pets": "multi_label",
    }
    assert table.targets["tags"][:4].tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0], [-1, -1, -1]]
    assert table.targets["pets"][:4].tolist() == [[1, 0], [0, 1], [-1, 1], [1, 0]]
    assert table.targets["grade"][:4].tolist() == [0, 2, 1, -1]
    np.testing.assert_array_equal(table.targets["price"][:4], np.array([1.5, 2.5, np.nan, 3.25], np.float32))
    train = table.split_indices("train")
    known = table.targets["price"][train][~np.isnan(table.targets["price"][train])]
    assert data.target_stats["price"] == pytest.approx([known.mean(), known.std()])
    assert data.class_counts["tags"] == (table.targets["tags"][train] == 1).sum(axis=0).tolist()
    assert data.class_counts["price"] == []
    assert any("labels of 'tags' are separated by '|'" in note for note in table.notes)
    assert table.target_texts("tags", np.arange(4)) == ["big;red", "red", "", None]
    assert table.target_texts("price", np.arange(3)) == ["1.5", "2.5", None]
    collated = data.collate(training=False)
    samples: Any = [data.dataset("train").without_image(place) for place in range(2)]
    batch = collated(samples)
    assert {name: values.dtype for name, values in batch["attributes"].items()} == {
        "tags": torch.int8,
        "price": torch.float32,
        "grade": torch.int64,
        "pets": torch.int8,
    }


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_lists_are_labels_and_an_empty_list_has_no_label(tmp_path: Path, kind: str) -> None:
    write_images(tmp_path, [f"{n}.png" for n in range(8)])
    frame = pd.DataFrame(
        {"image": [f"{n}.png" for n in range(8)], "label": [["x", "y"], [], None, ["y"], *[["x"]] * 4]}
    )
    path = tmp_path / f"t.{kind}"
    frame.to_parquet(path) if kind == "parquet" else frame.to_json(path, orient="records", lines=True)

    data = Table(str(path), split=NO_TESTS)

    assert data.task_kinds == {"class": "multi_label"}
    assert data.table.targets["class"][:4].tolist() == [[1, 1], [0, 0], [-1, -1], [0, 1]]
    assert any("'label' has lists, so it is taken as multi_label" in note for note in data.table.notes)


def test_numbers_with_fractions_and_recurring_labels_are_recognised(tmp_path: Path) -> None:
    names = [f"img/{n}.png" for n in range(24)]
    numbers = ["image,label", *(f"{name},{n / 4}" for n, name in enumerate(names))]
    lists = ["image,label", *(f"{name},{'abcd'[n % 4]};{'efgh'[n // 6]}" for n, name in enumerate(names))]
    found = {}
    for name, rows in (("numbers.csv", numbers), ("lists.csv", lists)):
        data = Table(str(csv_table(tmp_path, rows, name, images=24)), split=NO_TESTS)
        found[name] = data.task_kinds["class"]
        assert data.resolved_columns().kinds == {"label": found[name]}
        assert any("set data columns.kinds: {label: single_label}" in note for note in data.table.notes)
    assert found == {"numbers.csv": "regression", "lists.csv": "multi_label"}
    as_classes = Table(str(tmp_path / "lists.csv"), TableColumns(kinds={"label": "single_label"}), split=NO_TESTS)
    assert (len(as_classes.class_names), as_classes.task_kinds) == (16, {})


def test_few_numbers_and_names_with_separators_stay_classes(tmp_path: Path) -> None:
    half_numbers = ["image,label", *(f"img/{n}.png,{n % 2 + 0.5}" for n in range(8))]
    names = ["image,label", *(f"img/{n}.png,{'dog; small' if n % 2 else 'cat; big'}" for n in range(8))]
    assert Table(str(csv_table(tmp_path, half_numbers)), split=NO_TESTS).task_kinds == {}
    assert Table(str(csv_table(tmp_path, names)), split=NO_TESTS).class_names == ["cat; big", "dog; small"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"kinds": {"tags": "several"}}, "the kind of 'tags' must be one of single_label, multi_label"),
        ({"kinds": {"tag": "multi_label"}}, "data columns.kinds: .* has no column 'tag'"),
        ({"kinds": {"grade": "ordinal"}}, "'grade' is ordinal, and its classes are no whole numbers"),
        ({"kinds": {"grade": "ordinal"}, "classes": {"grade": ["poor", "good"]}}, "has 'fair' .first in row 2., which"),
        ({"kinds": {"class": "regression"}}, r"(?s)8 problems.*labels.csv:2: class 'a' must be a number"),
        ({"one_hot": {"pets": ["cat", "class"]}}, r"(?s)class 'a' must be 1, 0 or empty"),
        ({"one_hot": {"price": ["cat"]}}, "'price' is a name of the table's own"),
        (
            {"kinds": {"tags": "multi_label"}, "classes": {"tags": ["red", "big"]}},
            r"(?s)labels.csv:6: tags has 'round', which columns.classes lacks",
        ),
    ],
)
def test_columns_that_do_not_hold_their_kind_are_user_errors(
    tmp_path: Path, columns: dict[str, Any], message: str
) -> None:
    path = csv_table(tmp_path, KINDS_ROWS)
    with pytest.raises(UserError, match=message):
        Table(str(path), TableColumns(**columns), split=NO_TESTS).table  # noqa: B018


def test_splits_have_like_shares_of_numbers_and_of_sets_of_labels(tmp_path: Path) -> None:
    names = [f"img/{n}.png" for n in range(80)]
    rows = ["image,label,tags", *(f"{name},{n * n / 7},{'ab'[n % 2]}|{'cd'[n // 40]}" for n, name in enumerate(names))]
    path = csv_table(tmp_path, rows, images=80)
    split = SplitOptions(val_fraction=0.25, test_fraction=0.25)
    numbers = Table(str(path), TableColumns(kinds={"label": "regression"}), split=split).table
    for name in ("val", "test"):
        tenth = np.arange(80)[numbers.split_indices(name)] // 8
        assert np.bincount(tenth, minlength=10).tolist() == [2] * 10
    labels = Table(str(path), TableColumns(label="", kinds={"tags": "multi_label"}), split=split).table
    assert labels.targets["class"][labels.split_indices("test")].sum(axis=0).tolist() == [10] * 4


def test_sampling_by_class_refuses_targets_that_are_none(tmp_path: Path) -> None:
    loader = LoaderOptions(sampling="balanced", balance_on="tags")
    data = Table(str(csv_table(tmp_path, KINDS_ROWS)), KINDS_COLUMNS, split=NO_TESTS, loader=loader)
    with pytest.raises(UserError, match="sampling: balanced: task 'tags' is multi_label, must be single_label or"):
        data.train_dataloader()


def test_another_models_labels_are_taken_by_name(tmp_path: Path) -> None:
    table = Table(str(csv_table(tmp_path, KINDS_ROWS)), KINDS_COLUMNS, split=NO_TESTS).table
    moved = table.as_test_set(
        {"tags": ["round", "blue", "big"], "price": []}, {"tags": "multi_label", "price": "regression"}
    )
    assert moved.targets["tags"][:4].tolist() == [[0, -1, 1], [0, -1, 0], [0, -1, 0], [-1, -1, -1]]
    assert moved.unseen["tags"] == {"red": 4}
    np.testing.assert_array_equal(moved.targets["price"], table.targets["price"])
    with pytest.raises(UserError, match="task 'tags' is multi_label, the model has it as single_label"):
        table.as_test_set({"tags": ["red", "big"]})


def test_blanks_within_the_name_of_a_file_are_part_of_it(tmp_path: Path) -> None:
    names = [f"a  {n}\u00a0b.png" for n in range(4)]
    write_images(tmp_path, names)
    (tmp_path / "t.csv").write_text("image,label\n" + "".join(f" {name} ,{n % 2}\n" for n, name in enumerate(names)))

    data = Table(str(tmp_path / "t.csv"), split=NO_TESTS)

    assert data.sample_names() == names
    assert data.read_image(0).shape[0] == 3


@pytest.mark.parametrize("wrong", [float("inf"), 1e300])
def test_numbers_in_parquet_that_are_no_targets_are_refused_by_row(tmp_path: Path, wrong: float) -> None:
    write_images(tmp_path, [f"{n}.png" for n in range(4)])
    table = pa.table({"image": [f"{n}.png" for n in range(4)], "label": [1.0, 2.0, wrong, 4.0]})
    pq.write_table(table, tmp_path / "t.parquet")

    with pytest.raises(UserError, match=r":3: .* must be a number"):
        _ = Table(str(tmp_path / "t.parquet"), TableColumns(kinds={"label": "regression"})).table
