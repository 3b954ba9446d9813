from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

import pytest
from PIL import Image

from datamodules.files.label_csv import VocabularyOptions
from datamodules.options import CheckOptions
from datamodules.products import Products
from datamodules.splits import SplitBy, SplitOptions
from datamodules.streaming import StreamedImages
from datamodules.streaming.index import StreamColumns
from datamodules.streaming.pack import PackFormat, pack
from tests.support.data import TEAM14_CLASSES, from_yaml, write_csv, write_products, write_team14
from vitrail.errors import UserError
from vitrail.types import UNKNOWN

HEADER = ["image_path", "class_label", "attributes", "caption", "split", "instance_id"]
GREY = VocabularyOptions(aliases={"colour": {"grey": "gray"}})
REAL = Path(os.environ.get("VITRAIL_DATA", "")) / "products"
REAL_TEAM14 = Path(os.environ.get("VITRAIL_DATA", "")) / "products_team14_metadata"


def split_sizes(data: Products) -> list[int]:
    return [len(data.table.split_indices(split)) for split in ("train", "val", "test")]


def groups_of(data: Products, split: str) -> set[int]:
    return set(data.table.group_ids[data.table.split_indices(split)].tolist())


@pytest.fixture
def root(tmp_path: Path) -> str:
    return str(write_products(tmp_path / "products"))


def test_the_table_becomes_tasks_groups_and_captions(root: str) -> None:
    data = Products(root, vocabulary=GREY)
    assert data.tasks == {
        "class": ["clothing_cap", "clothing_wrist_watch", "food_storage_plastic_container"],
        "colour": ["blue", "gray", "green", "red"],
        "material": ["fabric", "metal", "plastic"],
        "condition": ["new", "used"],
        "size": ["large", "small"],
        "style": ["casual", "modern"],
    }
    assert split_sizes(data) == [18, 9, 9]
    assert data.class_counts["class"] == [6, 6, 6]
    table = data.table
    assert table.name(1) == "images/team13_clothing_cap_002.jpg"
    assert table.source(1) == f"{root}/images/team13_clothing_cap_002.jpg"
    assert table.caption(1) == "clothing cap in red in view 2", "the blank in front is gone"
    assert [table.group(i) for i in (0, 2, 3)] == ["TEAM13_CLOTHING_CAP_A"] * 2 + ["TEAM13_CLOTHING_CAP_B"]
    assert table.where(1) == f"{root}/labels.csv:3"


def test_aliases_merge_values_that_are_unseen_without(root: str) -> None:
    assert Products(root).table.unseen["colour"] == {"grey": 3}
    data = Products(root, vocabulary=GREY)
    assert data.table.unseen["colour"] == {}
    merged = data.table.targets["colour"][data.table.split_indices("val")]
    assert data.tasks["colour"].index("gray") in merged


def test_attributes_are_chosen_and_ordered_by_the_user(root: str) -> None:
    assert list(Products(root, attributes=["size", "color"]).tasks) == ["class", "size", "colour"]
    assert list(Products(root, attributes=[]).tasks) == ["class"]
    with pytest.raises(UserError, match="no attribute 'weight'; it has colour, material, condition, size, style"):
        _ = Products(root, attributes=["weight"]).tasks


def test_quirks_of_the_second_table(tmp_path: Path) -> None:
    write_team14(tmp_path)
    data = Products(str(tmp_path), "labels_fixed.csv", vocabulary=VocabularyOptions(source="files"))
    assert data.class_names == list(TEAM14_CLASSES), "the order of classes.txt"
    assert data.tasks["colour"] == ["red", "blue", "green", "black", "white", "yellow"]
    assert data.table.unseen == {"class": {}, "colour": {"orange": 10}, "material": {}, "condition": {}, "size": {}}
    assert data.table.targets["material"][:5].tolist() == [0, 1, UNKNOWN, UNKNOWN, 2]
    assert data.table.targets["colour"][3] == UNKNOWN
    assert data.table.source(0) == f"{tmp_path}/images/team14_water_bottle (1).jpg"
    assert data.table.caption(1) == "blue plastic thing"
    assert split_sizes(data) == [40, 10, 0]
    assert data.read_image(0).shape == (3, 32, 32)


def test_vocabularies_come_from_train_by_default_even_if_there_are_files(tmp_path: Path) -> None:
    write_team14(tmp_path, images=False)
    data = Products(str(tmp_path), "labels_fixed.csv")
    assert data.class_names == sorted(TEAM14_CLASSES)
    assert "orange" in data.tasks["colour"]
    assert "yellow" not in data.tasks["colour"], "it occurs in val alone"
    assert data.table.unseen["colour"] == {"yellow": 10}


@pytest.mark.parametrize("by", ["group", "group_kfold"])
def test_groups_stay_together(by: SplitBy, root: str) -> None:
    split = SplitOptions(by=by, n_folds=4)
    data = Products(root, vocabulary=GREY, split=split)
    train, val, test = (groups_of(data, name) for name in ("train", "val", "test"))
    assert not train & val
    assert not train & test
    assert not val & test
    assert len(train | val | test) == 12
    assert all(count > 0 for count in data.class_counts["class"])


GOOD = ["images/good.jpg", "cap", "colour:red", "", "train", "A"]


def write_rows(root: Path, *rows: list[str]) -> str:
    write_csv(root / "labels.csv", [HEADER, *rows])
    return str(root)


def test_all_problems_are_reported_together_by_row(tmp_path: Path) -> None:
    root = write_rows(
        tmp_path,
        GOOD,
        ["images/a.jpg", "cap", "colour:red", "", "elsewhere", "A"],
        ["images\\good.jpg", "cap", "colour:red", "", "train", "A"],
        ["../b.jpg", "cap", "colour:red", "", "train", "A"],
        ["/c.jpg", "cap", "colour:red;metal", "", "train", "A"],
        ["images/d.jpg", "cap"],
        ["images/e.jpg", "cap", "colour:red;color:blue", "", "train", "A"],
        ["", "cap", "colour:red", "", "", "A"],
    )
    with (tmp_path / "labels.csv").open("ab") as file:
        file.write(b"images/f.jpg,cap,colour:red,caf\xe9,train,A\n")
    with pytest.raises(UserError) as error:
        _ = Products(root).tasks
    lines = str(error.value).split("\n")
    where = f"  {root}/labels.csv"
    assert lines[0].startswith(f"{root}/labels.csv: 10 problems")
    assert [line.split(": ")[0] for line in lines[1:]] == [f"{where}:{row}" for row in (3, 4, 5, 6, 6, 7, 8, 9, 9, 10)]
    for row, part in [
        (3, "split 'elsewhere' is not one of train, val, test"),
        (4, "image 'images/good.jpg' again, first in row 2"),
        (5, "leads out of the data set's folder"),
        (6, "is absolute"),
        (6, "attribute 'metal' has no colon"),
        (7, "2 fields where the header has 6"),
        (8, "attribute 'colour' occurs twice"),
        (9, "no image path"),
        (9, "split '' is not one of"),
        (10, "not UTF-8"),
    ]:
        assert any(line.startswith(f"{where}:{row}: ") and part in line for line in lines), (row, part)


def test_missing_columns_and_files_are_refused(tmp_path: Path) -> None:
    write_csv(tmp_path / "labels.csv", [["image_path", "caption"], ["a.jpg", ""]])
    with pytest.raises(UserError, match="missing column class_label, attributes, split; the header has"):
        _ = Products(str(tmp_path)).tasks
    with pytest.raises(UserError, match="missing column class_label, instance_id;"):
        _ = Products(str(tmp_path), attributes=[], split=SplitOptions(by="group")).tasks
    with pytest.raises(UserError, match=r"mine.csv: cannot be read .* has labels.csv"):
        _ = Products(str(tmp_path), "mine.csv").tasks
    with pytest.raises(UserError, match="no folder"):
        _ = Products(str(tmp_path / "nowhere")).tasks
    with pytest.raises(UserError, match="has no rows"):
        _ = Products(write_rows(tmp_path)).tasks


def test_columns_that_are_not_needed_may_be_missing(tmp_path: Path) -> None:
    rows = [[f"images/{name}{i}.jpg", name] for name in ("cap", "bag") for i in range(10)]
    write_csv(tmp_path / "labels.csv", [["image_path", "class_label"], *rows])
    data = Products(
        str(tmp_path), attributes=[], split=SplitOptions(by="stratified", val_fraction=0.2, test_fraction=0.2)
    )
    assert split_sizes(data) == [12, 4, 4]
    assert data.group_names() == data.sample_names()


def test_rows_without_label_or_object_are_taken(tmp_path: Path) -> None:
    rows = [
        GOOD,
        ["images/b.jpg", "unknown", "", "", " Train ", ""],
        ["images/c.jpg", "bag", "colour:", "", "val", "A"],
    ]
    table = Products(write_rows(tmp_path, *rows)).table
    assert table.targets["class"].tolist() == [0, UNKNOWN, UNKNOWN]
    assert table.targets["colour"].tolist() == [0, UNKNOWN, UNKNOWN]
    assert table.unseen["class"] == {"bag": 1}
    assert table.groups.to_pylist() == ["A", "images/b.jpg", "A"]


def test_captions_are_made_of_attributes(root: str) -> None:
    # Rows 6 to 8 are grey in the file.
    data = Products(root, vocabulary=GREY, caption_templates=["{caption}", "{colour} {material} {noun}"])
    assert data.table.caption_lists.of([1, 6]) == [
        ["clothing cap in red in view 2", "red plastic cap"],
        ["clothing cap in grey in view 1", "gray plastic cap"],
    ]
    assert data.texts.own
    with pytest.raises(UserError, match=r"data caption_templates: .*labels.csv: '\{shape\}' has no such field"):
        _ = Products(root, caption_templates=["{shape}"]).table


def test_arguments_come_from_yaml(root: str) -> None:
    data = from_yaml(f"""
class_path: datamodules.Products
init_args:
  root: {root}
  attributes: [color, material]
  vocabulary: {{source: train, aliases: {{colour: {{grey: gray}}}}}}
  split: {{by: group_kfold, fold: 1, n_folds: 4}}
  loader: {{batch_size: 4}}
""")
    assert isinstance(data, Products)
    assert list(data.tasks) == ["class", "colour", "material"]
    assert data.hparams["split"] == asdict(SplitOptions(by="group_kfold", fold=1, n_folds=4))


@pytest.mark.skipif(not REAL.is_dir(), reason="needs $VITRAIL_DATA/products")
def test_the_600_real_photos() -> None:
    data = Products(str(REAL), vocabulary=GREY)
    assert split_sizes(data) == [447, 100, 53]
    assert [len(groups_of(data, split)) for split in ("train", "val", "test")] == [92, 20, 11]
    assert len(data.table.group_values) == 123
    assert data.num_classes == 10
    assert {task: len(names) for task, names in data.tasks.items() if task != "class"} == {
        "colour": 13,
        "material": 9,
        "condition": 4,
        "size": 3,
        "style": 6,
    }
    assert "grey" not in data.tasks["colour"]
    assert data.table.unseen["colour"] == {"gold": 5}, "gold occurs in test alone"
    gray = data.table.targets["colour"] == data.tasks["colour"].index("gray")
    assert gray.sum() == 28
    assert not data.table.caption(16).startswith(" ")
    assert data.read_image(0).shape == (3, 96, 96)


@pytest.mark.skipif(not REAL.is_dir(), reason="needs $VITRAIL_DATA/products")
def test_folds_of_the_real_photos_have_all_classes() -> None:
    for fold in range(5):
        data = Products(str(REAL), split=SplitOptions(by="group_kfold", fold=fold, n_folds=5))
        for split in ("train", "val", "test"):
            assert min(data.table.class_counts(split)["class"]) >= 5
        assert abs(split_sizes(data)[2] - 120) <= 15


@pytest.mark.skipif(not REAL_TEAM14.is_dir(), reason="needs $VITRAIL_DATA/products_team14_metadata")
def test_the_real_table_without_photos() -> None:
    files = VocabularyOptions(source="files")
    data = Products(str(REAL_TEAM14), "labels_fixed.csv", vocabulary=files)
    assert split_sizes(data) == [800, 200, 0]
    assert data.class_names[0] == "tableware_water_bottle"
    assert data.class_names[-1] == "footware_slippers"
    assert data.table.unseen["colour"] == {"orange": 5}
    unknown = {task: int((values == UNKNOWN).sum()) for task, values in data.table.targets.items()}
    assert unknown == {"class": 0, "colour": 68 + 5, "material": 186 + 2, "condition": 45 + 3, "size": 20 + 1}
    captions = data.table.captions.to_pylist()
    assert not [text for text in captions if text != text.strip() or "\u00a0" in text]
    assert len(set(data.table.groups.to_pylist())) == 1000


ODD = ["group", "caption", "split", "source", "row", "name", "id", "label", "image", "target", "key", "size", "noun"]


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Twelve rows whose attributes are called like columns of tables, shards and galleries."""
    root = tmp_path_factory.mktemp("odd")
    rows = [HEADER]
    for n in range(12):
        values = ";".join(f"{name}:{('none', 'None', '001')[(n + place) % 3]}" for place, name in enumerate(ODD))
        split = ("train", "val", "test")[n // 6 if n < 9 else 2]
        rows.append([f"images/{n}.png", ("cup", "None")[n % 2], values, f"caption {n}", split, f"{n // 2:03}"])
        (root / "images").mkdir(exist_ok=True)
        Image.effect_noise((24, 24), 60 + 9 * n).convert("RGB").save(root / "images" / f"{n}.png")
    write_csv(root / "labels.csv", rows)
    return str(root)


def test_attributes_may_be_called_like_columns_of_ours(odd: str) -> None:
    data = Products(odd)
    assert data.tasks == {"class": ["None", "cup"], **{key: ["001", "None", "none"] for key in ODD}}
    table = data.table
    for n in range(12):
        assert (table.name(n), table.group(n), table.caption(n)) == (f"images/{n}.png", f"{n // 2:03}", f"caption {n}")
        for place, name in enumerate(ODD):
            value = data.tasks[name][int(table.targets[name][n])]
            assert value == ("none", "None", "001")[(n + place) % 3]


def test_what_is_missing_is_an_option_and_reported(odd: str) -> None:
    data = Products(odd, attributes=["row"], checks=CheckOptions(missing=["NONE", "003"]))
    assert data.tasks == {"class": ["cup"], "row": ["001"]}
    assert data.table.missing == {"class": {"None": 6}, "attribute row": {"None": 4, "none": 4}, "group": {"003": 2}}
    assert data.group_names()[6:8] == ["images/6.png", "images/7.png"]
    assert data.data_record()["missing"] == data.table.missing


def test_templates_distinguish_attributes_from_their_own_fields(odd: str) -> None:
    templates = ["{noun}: {attribute noun}, {caption}, {attribute caption}, {row}"]
    assert Products(odd, caption_templates=templates).table.caption(0) == "cup: none, caption 0, None, None"


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_shards_keep_such_attributes(kind: PackFormat, odd: str, tmp_path: Path) -> None:
    products = Products(odd, checks=CheckOptions(allow_leaks=["groups", "near"]))
    pack(products, tmp_path, kind, shard_size=5)
    columns: list[StreamColumns] = [{}, {"attributes": ["size", "image"]}]
    for chosen in columns:
        streamed = StreamedImages(str(tmp_path), columns=chosen)
        names = ["class", "size", "image"] if chosen else list(products.tasks)
        assert list(streamed.tasks) == names
        place = {name: row for row, name in enumerate(products.sample_names())}
        theirs = [place[name] for name in streamed.sample_names()]
        for name in names:
            assert streamed.table.targets[name].tolist() == products.table.targets[name][theirs].tolist()
        assert streamed.group_names() == [products.table.group(row) for row in theirs]
        assert [streamed.table.caption(row) for row in range(12)] == [products.table.caption(row) for row in theirs]


def test_names_on_disk_may_be_in_another_unicode_form(tmp_path: Path) -> None:
    composed, taken_apart = "caf\u00e9", "cafe\u0301"
    folder = tmp_path / taken_apart
    folder.mkdir()
    rows = [HEADER]
    for n, name in enumerate([composed, taken_apart] * 2):
        Image.effect_noise((24, 24), 60 + n).save(folder / f"{taken_apart}{n}.png")
        split = ("train", "train", "val", "test")[n]
        rows.append([f"{composed}/{composed}{n}.png", name, f"{name}:{name}", name, split, name])
    write_csv(tmp_path / "labels.csv", rows)
    data = Products(str(tmp_path), checks=CheckOptions(allow_leaks=["groups"]))
    assert data.tasks == {"class": [composed], composed: [composed]}
    assert set(data.group_names()) == {composed}
    assert data.table.source(0) == str(folder / f"{taken_apart}0.png")
    assert data.read_image(0).shape == (3, 24, 24)


def test_files_that_no_row_names_are_counted(tmp_path: Path) -> None:
    data = Products(str(write_products(tmp_path)))
    assert data.files_left_out == {}
    (tmp_path / "images" / "extra.JPG").write_bytes(b"")
    (tmp_path / "images" / "notes.txt").write_bytes(b"")
    (tmp_path / "other.txt").write_bytes(b"")
    again = Products(str(tmp_path))
    assert again.data_record()["files_left_out"] == {".jpg": 1, ".txt": 1}
