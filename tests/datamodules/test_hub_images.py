from __future__ import annotations

import pickle
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import HfApi, constants

from datamodules.hub_images import ColumnOptions, HubImages, ImageColumn, open_splits
from datamodules.loading.decode import ImageError
from datamodules.options import CheckOptions, ImageOptions, LoaderOptions
from datamodules.splits import SplitOptions
from tests.datamodules.streaming.shard_sets import encoded
from tests.support.data import draw_image, from_yaml, labelled_rows, write_hub_dataset
from tests.support.hub_server import hub_server, log_in
from vitrail.errors import UserError
from vitrail.types import UNKNOWN

ALL_COLUMNS = ColumnOptions(caption="caption", group="object", attributes=["colour"])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def split_sizes(data: HubImages) -> list[int]:
    return [len(data.table.split_indices(split)) for split in ("train", "val", "test")]


def save(root: Path, columns: dict[str, list[Any]], features: datasets.Features | None = None) -> str:
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(root))
    return str(root)


@pytest.mark.parametrize("kind", ["disk", "parquet"])
@pytest.mark.parametrize(
    ("labels", "names"),
    [("classes", ["watch", "cap", "bag"]), ("texts", ["bag", "cap", "watch"]), ("numbers", ["0", "1", "2"])],
)
def test_labels_captions_groups_and_attributes(kind: Any, labels: Any, names: list[str], tmp_path: Path) -> None:
    data = HubImages(str(write_hub_dataset(tmp_path / "set", kind=kind, labels=labels)), ALL_COLUMNS)
    assert data.tasks == {"class": names, "colour": ["blue", "red"]}
    assert split_sizes(data) == [12, 12, 12]
    table = data.table
    assert table.name(0) == "train/0"
    assert table.name(12) == "validation/0"
    assert table.caption(2) == "a blue cap"
    assert [table.group(i) for i in (0, 1, 2, 12)] == ["object 0", "object 0", "object 1", "object 1000"]
    label = table.targets["class"][2]
    assert names[int(label)] == ("1" if labels == "numbers" else "cap")


def test_images_belong_to_their_rows_in_every_split(tmp_path: Path) -> None:
    root = write_hub_dataset(tmp_path / "set")
    data = HubImages(str(root))
    theirs = datasets.load_from_disk(str(root))
    for index, (split, row) in ((0, ("train", 0)), (13, ("validation", 1)), (35, ("test", 11))):
        expected = torch.from_numpy(np.array(theirs[split][row]["image"])).permute(2, 0, 1)
        assert torch.equal(data.read_image(index), expected)


def test_the_image_survives_the_way_to_a_worker(tmp_path: Path) -> None:
    data = HubImages(str(write_hub_dataset(tmp_path / "set")))
    expected = data.read_image(5)
    assert torch.equal(pickle.loads(pickle.dumps(data)).read_image(5), expected)  # noqa: S301 -- our own bytes


def test_missing_splits_are_cut_out_of_train_by_group(tmp_path: Path) -> None:
    root = str(write_hub_dataset(tmp_path / "set", splits=("train",), rows=60))
    data = HubImages(root, ALL_COLUMNS, split=SplitOptions(val_fraction=0.2, test_fraction=0.2))
    assert split_sizes(data) == [36, 12, 12]
    ids = [set(data.table.group_ids[data.table.split_indices(split)].tolist()) for split in ("train", "val", "test")]
    assert sum(map(len, ids)) == len(set.union(*ids)) == 30
    assert split_sizes(HubImages(root, split=SplitOptions(val_fraction=0.2, test_fraction=0.0))) == [48, 12, 0]


def test_splits_are_mapped_by_name(tmp_path: Path) -> None:
    root = str(write_hub_dataset(tmp_path / "set", splits=("part1", "part2", "part3")))
    with pytest.raises(UserError, match="no split train; it has part1, part2, part3"):
        _ = HubImages(root).tasks
    data = HubImages(root, splits={"train": "part1", "val": "part3", "test": "part2"})
    assert data.table.name(int(data.table.split_indices("val")[0])) == "part3/0"
    assert data.table.name(int(data.table.split_indices("test")[0])) == "part2/0"


def test_a_single_split_of_any_name_is_train(tmp_path: Path) -> None:
    data = HubImages(str(write_hub_dataset(tmp_path / "set", splits=("everything",), rows=20)))
    assert data.table.name(0) == "everything/0"
    assert len(data.table) == 20


def test_splits_may_be_divided_again(tmp_path: Path) -> None:
    split = {"by": "group_kfold", "fold": 0, "n_folds": 3}
    data = HubImages(str(write_hub_dataset(tmp_path / "set")), ALL_COLUMNS, split=split)  # type: ignore[arg-type]
    assert split_sizes(data) == [12, 12, 12]
    origins = {data.table.name(int(index)).split("/")[0] for index in data.table.split_indices("train")}
    assert len(origins) > 1


def test_labels_that_are_not_known(tmp_path: Path) -> None:
    classes = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["b", "a"])})
    image = [{"bytes": b"", "path": None}] * 4
    root = save(tmp_path / "set", {"image": image, "label": [0, -1, None, 1]}, classes)
    data = HubImages(root, split=SplitOptions(val_fraction=0.0, test_fraction=0.0))
    assert data.table.targets["class"].tolist() == [0, UNKNOWN, UNKNOWN, 1]


def test_whole_numbers_are_ordered_by_size(tmp_path: Path) -> None:
    root = save(tmp_path / "set", {"image": [b""] * 4, "label": [10, 2, 1, 10], "good": [True, False, True, None]})
    columns = ColumnOptions(attributes=["good"])
    data = HubImages(root, columns, split=SplitOptions(val_fraction=0.0, test_fraction=0.0))
    assert data.tasks == {"class": ["1", "2", "10"], "good": ["False", "True"]}
    assert data.table.targets["class"].tolist() == [2, 1, 0, 2]
    assert data.table.targets["good"].tolist() == [1, 0, 1, UNKNOWN]


def test_the_first_of_several_captions_is_taken(tmp_path: Path) -> None:
    root = save(
        tmp_path / "set",
        {"image": [b""] * 3, "label": ["a", "a", "b"], "text": [[" one\n day", "two"], [], None]},
    )
    data = HubImages(root, ColumnOptions(caption="text"), split=SplitOptions(val_fraction=0.0, test_fraction=0.0))
    assert data.table.captions.to_pylist() == ["one day", "", ""]


@pytest.mark.parametrize(
    ("columns", "named"),
    [
        ({"label": "kind"}, r"columns.label: .* has no column 'kind'; it has image, label, caption, object, colour"),
        ({"image": "photo"}, "columns.image: .* no column 'photo'"),
        ({"caption": "text"}, "columns.caption: .* no column 'text'"),
        ({"group": "thing"}, "columns.group: .* no column 'thing'"),
        ({"attributes": ["size"]}, "columns.attributes: .* no column 'size'"),
        ({"image": "caption", "label": "image"}, r"columns.label: .*set \(train\): holds struct"),
        ({"labels": "x"}, "columns: unknown key 'labels'"),
    ],
)
def test_mistaken_columns_are_refused(columns: ColumnOptions, named: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=named):
        _ = HubImages(str(write_hub_dataset(tmp_path / "set")), columns).tasks


@pytest.mark.parametrize(
    ("splits", "named"),
    [
        ({"val": "dev"}, "splits.val: .* has no split 'dev'; it has train, validation, test"),
        ({"dev": "val"}, "keys must be among train, val, test; got 'dev'"),
        ({"train": "test"}, "one split twice"),
    ],
)
def test_mistaken_splits_are_refused(splits: dict[str, str], named: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=named):
        _ = HubImages(str(write_hub_dataset(tmp_path / "set")), splits=splits).tasks


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_from_any_number_of_workers(workers: int, tmp_path: Path) -> None:
    root = str(write_hub_dataset(tmp_path / "set"))
    data = HubImages(
        root, ALL_COLUMNS, image=ImageOptions(size=16), loader=LoaderOptions(batch_size=7, num_workers=workers)
    )
    batches = list(data.test_dataloader())
    assert [len(batch["label"]) for batch in batches] == [7, 5]
    assert [data.class_names[label] for label in batches[0]["label"][:3]] == ["watch", "watch", "cap"]
    assert batches[0]["caption"][0] == "a red watch"
    assert int(batches[0]["image"][0, 0].max()) > 200


def test_bad_images_are_named_by_split_and_row(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    rows: dict[str, list[Any]] = {
        "image": [draw_image(0, "red", look=1), {"bytes": b"nonsense", "path": None}, None],
        "label": ["a", "b", "a"],
    }
    root = save(tmp_path / "set", rows, features)
    nothing = SplitOptions(val_fraction=0.0, test_fraction=0.0)
    data = HubImages(root, split=nothing, checks=CheckOptions(on_bad_image="skip"))
    data.setup("fit")
    assert data.split_indices("train").tolist() == [0]
    assert [skipped["name"] for skipped in data.data_record()["skipped"]] == ["train/1", "train/2"]
    with pytest.raises(UserError, match="train/1"):
        HubImages(root, split=nothing).setup("fit")


def test_arguments_come_from_yaml(tmp_path: Path) -> None:
    data = from_yaml(f"""
class_path: datamodules.HubImages
init_args:
  path: {write_hub_dataset(tmp_path / "set")}
  columns: {{label: colour, group: object}}
  splits: {{val: validation}}
  image: {{size: 32}}
""")
    assert isinstance(data, HubImages)
    assert data.class_names == ["blue", "red"]
    assert data.image_size == 32


def test_columns_may_be_called_like_ours(tmp_path: Path) -> None:
    names = ["group", "caption", "split", "source", "row", "name", "id", "target"]
    columns: dict[str, list[Any]] = {name: ["none", "x", None, "none"] for name in names}
    image = [np.full((8, 8, 3), 9 * n, dtype=np.uint8) for n in range(4)]
    columns |= {"image": image, "label": ["a", "None", "a", "None"], "product": [7.0, 7.0, None, 8.0]}
    features = datasets.Features({name: datasets.Value("string") for name in names})
    features |= {"image": datasets.Image(), "label": datasets.Value("string"), "product": datasets.Value("float64")}
    root = save(tmp_path / "set", columns, datasets.Features(features))
    options = ColumnOptions(attributes=names, group="product")
    data = HubImages(root, options, split=SplitOptions(val_fraction=0.0, test_fraction=0.0))
    assert data.tasks == {"class": ["None", "a"], **{key: ["none", "x"] for key in names}}
    assert data.group_names() == ["7", "7", "train/2", "8"]
    assert [data.table.targets[name].tolist() for name in names] == [[0, 1, UNKNOWN, 0]] * len(names)
    none = HubImages(
        root, options, split=SplitOptions(val_fraction=0.0, test_fraction=0.0), checks=CheckOptions(missing=["NONE"])
    )
    assert none.tasks == {"class": ["a"], **{key: ["x"] for key in names}}
    assert none.table.missing["class"] == {"None": 2}
    assert none.table.missing["attribute group"] == {"none": 2}
    with pytest.raises(UserError, match="the name 'class' is taken by the main task"):
        HubImages(root, ColumnOptions(attributes=["class"])).table  # noqa: B018


def test_class_names_in_another_unicode_form_are_the_same(tmp_path: Path) -> None:
    image = [np.full((8, 8, 3), 9 * n, dtype=np.uint8) for n in range(2)]
    names = datasets.ClassLabel(names=["cafe\u0301", "tea"])
    features = datasets.Features({"image": datasets.Image(), "label": names})
    root = save(tmp_path / "set", {"image": image, "label": [0, 1]}, features)
    data = HubImages(root, split=SplitOptions(val_fraction=0.0, test_fraction=0.0))
    assert data.tasks == {"class": ["caf\u00e9", "tea"]}
    assert data.class_counts == {"class": [1, 1]}


@pytest.mark.parametrize("kind", ["disk", "parquet"])
def test_files_in_a_local_folder_that_are_not_read_are_counted(kind: Any, tmp_path: Path) -> None:
    root = write_hub_dataset(tmp_path / "set", kind=kind)
    assert HubImages(str(root)).files_left_out == {}
    for name in ("a.jpg", "b.JPG", "notes"):
        (root / name).write_bytes(b"")
    assert HubImages(str(root)).data_record()["files_left_out"] == {".jpg": 2, "": 1}


def test_files_among_the_images_of_a_local_folder_are_counted(tmp_path: Path) -> None:
    for place, split in enumerate(("train", "train", "test")):
        for label in ("cup", "hat"):
            folder = tmp_path / "set" / split / label
            folder.mkdir(parents=True, exist_ok=True)
            draw_image(place, "red", look=place).save(folder / f"{place}.png")
    (tmp_path / "set" / "train" / "cup" / "notes.txt").write_bytes(b"")
    (tmp_path / "set" / "train" / "cup" / "Thumbs.db").write_bytes(b"")
    data = HubImages(str(tmp_path / "set"), checks=CheckOptions(allow_leaks=["exact", "near"]))
    assert len(data.table) == 6
    assert data.files_left_out == {".db": 1, ".txt": 1}


@pytest.fixture
def silent_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr("datamodules.hub_images.HUB_TIMEOUT", 0.2)
        yield


def test_a_data_set_without_splits_is_train(tmp_path: Path) -> None:
    root = write_hub_dataset(tmp_path / "set", splits=("",), rows=6)
    assert list(open_splits(str(root))) == ["train"]
    arrow = next(root.glob("*.arrow"))
    assert list(open_splits(str(arrow))) == ["train"]
    parquet = write_hub_dataset(tmp_path / "files", kind="parquet", splits=("all",), rows=4)
    parts = open_splits(str(parquet / "data" / "all-00000-of-00001.parquet"))
    assert [(name, len(part)) for name, part in parts.items()] == [("train", 4)]


def test_other_files_and_folders_are_refused(tmp_path: Path) -> None:
    for path in ("./nowhere", "/no/where"):
        with pytest.raises(UserError, match="there is no"):
            open_splits(path)
    (tmp_path / "table.txt").write_text("a", encoding="utf-8")
    with pytest.raises(UserError, match="neither Parquet nor Arrow"):
        open_splits(str(tmp_path / "table.txt"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot be opened") as error:
        open_splits(str(tmp_path / "empty"))
    assert "\n" not in str(error.value)
    (tmp_path / "broken.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match="cannot be opened"):
        open_splits(str(tmp_path / "broken.parquet"))


@pytest.mark.usefixtures("silent_hub")
def test_a_hub_that_does_not_answer_is_refused_with_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    load = datasets.load_dataset

    def spy(*args: Any, **options: Any) -> Any:
        asked.append(constants.HF_HUB_OFFLINE)
        return load(*args, **options)

    monkeypatch.setattr(datasets, "load_dataset", spy)
    with pytest.raises(UserError, match=r"hub cannot be reached.*network.*HF_HOME.*local copy"):
        open_splits("owner/nothing")
    assert asked == [True], "the library itself was kept from trying again and again"
    assert constants.HF_HUB_OFFLINE is False, "and only for this call"


def test_offline_mode_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datamodules.hub_images.answers_in_time", lambda endpoint: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match="hub cannot be reached"):
        open_splits("owner/nothing")


def test_encoded_bytes_and_paths_are_images_too(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    draw_image(0, "red", look=1).save(file)
    for values in ([file.read_bytes()], [str(file)]):
        part = datasets.Dataset.from_dict({"image": values})
        assert ImageColumn([part], "image").read(0, "a").shape == (3, 32, 32)
    file.unlink()
    with pytest.raises(ImageError, match=r"^train/7: no such file"):
        ImageColumn([part], "image").read(0, "train/7")


@pytest.mark.parametrize("values", [[1, 2], [["a"], ["b"]], [[[1], [2, 3]]]], ids=["numbers", "texts", "ragged"])
def test_columns_that_are_no_images_are_refused(values: list[Any]) -> None:
    with pytest.raises(UserError, match=r"columns.image: column 'size' holds no images but "):
        ImageColumn([datasets.Dataset.from_dict({"size": values})], "size")


def write_kinds(root: Path, *, texts: bool) -> list[dict[str, Any]]:
    """A data set of the library with labels of every kind: lists of ``ClassLabel``, or texts with semicolons."""
    rows = labelled_rows(20)
    tags: Any = (
        datasets.Value("string") if texts else datasets.List(datasets.ClassLabel(names=["red", "green", "blue"]))
    )
    features = datasets.Features(
        {"image": datasets.Image(), "tags": tags, "price": datasets.Value("float64"), "grade": datasets.Value("string")}
    )
    lines = [{**row, "tags": ";".join(row["tags"]) or ";" if texts else row["tags"]} for row in rows]
    table = {key: [row[key] for row in lines] for key in features}
    datasets.Dataset.from_dict(table, features=features).save_to_disk(str(root))
    return rows


@pytest.mark.parametrize("texts", [False, True])
def test_labels_of_every_kind(tmp_path: Path, texts: bool) -> None:
    rows = write_kinds(tmp_path / "set", texts=texts)
    columns: dict[str, Any] = {
        "label": "tags",
        "attributes": ["price", "grade"],
        "kinds": {"tags": "multi_label", "price": "regression", "grade": "ordinal"},
        "classes": {"grade": ["poor", "fair", "good"]},
        "label_sep": ";" if texts else "",
    }
    data = HubImages(str(tmp_path / "set"), columns=ColumnOptions(**columns))
    assert data.task_kinds == {"class": "multi_label", "price": "regression", "grade": "ordinal"}
    names = ["blue", "green", "red"] if texts else ["red", "green", "blue"]  # else as the library's ClassLabel has them
    assert data.tasks == {"class": names, "price": [], "grade": ["poor", "fair", "good"]}
    for row, theirs in enumerate(rows):
        assert data.table.targets["class"][row].tolist() == [int(name in theirs["tags"]) for name in names]
        assert data.table.target_texts("grade", np.array([row])) == [theirs["grade"]]
    known = [row["price"] for row in rows if row["price"] is not None]
    np.testing.assert_allclose(data.table.targets["price"][~np.isnan(data.table.targets["price"])], known, rtol=1e-6)
    if texts:
        with pytest.raises(UserError, match=r"columns.label_sep: .* 'tags' holds texts"):
            _ = HubImages(str(tmp_path / "set"), columns=ColumnOptions(**{**columns, "label_sep": ""})).table
        with pytest.raises(UserError, match="'grade' is ordinal, and its classes are no whole numbers"):
            _ = HubImages(str(tmp_path / "set"), columns=ColumnOptions(**{**columns, "classes": {}})).table
    else:
        with pytest.raises(UserError, match=r"which is not a class; .* or its kind"):
            _ = HubImages(str(tmp_path / "set"), columns=ColumnOptions(label="tags")).table


def test_a_data_set_that_was_pushed_to_a_hub_is_read_from_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    images = [{"bytes": encoded(number), "path": None} for number in range(8)]
    made = datasets.Dataset.from_dict({"image": images, "label": [0, 1] * 4}, features=features)
    made.to_parquet(str(tmp_path / "pushed" / "train-00000-of-00001.parquet"))
    with hub_server() as hub:
        log_in(hub, monkeypatch, tmp_path / "hub")
        api = HfApi()
        api.create_repo("owner/set", repo_type="dataset", private=True)
        api.upload_folder(repo_id="owner/set", repo_type="dataset", folder_path=tmp_path / "pushed")
        found = open_splits("owner/set")["train"]
        assert found["label"][:] == [0, 1] * 4
        raw = found.cast_column("image", datasets.Image(decode=False))
        assert [cell["bytes"] for cell in raw["image"]] == [image["bytes"] for image in images]
        with pytest.raises(UserError, match="data path: owner/none cannot be opened"):
            open_splits("owner/none")
