from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from huggingface_hub import constants

from datamodules import hub_images as hub_access
from datamodules.hub_images import ImageColumn, open_splits, read_columns
from datamodules.loading.decode import ImageError
from tests.support.data import draw_image, write_hub_dataset, write_image_folder
from vitrail.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def silent_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub_access, "HUB_TIMEOUT", 0.2)
        yield


@pytest.mark.parametrize("kind", ["disk", "parquet"])
def test_local_formats_have_their_splits(kind: Any, tmp_path: Path) -> None:
    parts = open_splits(str(write_hub_dataset(tmp_path / "set", kind=kind, rows=6)))
    assert sorted(parts) == ["test", "train", "validation"]
    assert {len(part) for part in parts.values()} == {6}


def test_a_data_set_without_splits_is_train(tmp_path: Path) -> None:
    root = write_hub_dataset(tmp_path / "set", splits=("",), rows=6)
    assert list(open_splits(str(root))) == ["train"]
    arrow = next(root.glob("*.arrow"))
    assert list(open_splits(str(arrow))) == ["train"]
    parquet = write_hub_dataset(tmp_path / "files", kind="parquet", splits=("all",), rows=4)
    parts = open_splits(str(parquet / "data" / "all-00000-of-00001.parquet"))
    assert [(name, len(part)) for name, part in parts.items()] == [("train", 4)]


def test_folders_of_images_are_opened(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for split in ("train", "test"):
        for code, name in enumerate(("a", "b")):
            (root / split / name).mkdir(parents=True)
            draw_image(code, "red", look=code).save(root / split / name / "1.png")
    parts = open_splits(str(root))
    assert parts["train"].features["label"].names == ["a", "b"]
    assert ImageColumn([parts["train"]], "image").read(1, "b").shape == (3, 32, 32)


@pytest.mark.parametrize(("path", "named"), [("./nowhere", "there is no"), ("/no/where", "there is no")])
def test_missing_paths_are_told(path: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        open_splits(path)


def test_other_files_and_folders_are_refused(tmp_path: Path) -> None:
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
def test_a_hub_that_does_not_answer_is_told_with_the_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    load = datasets.load_dataset

    def spy(*args: Any, **options: Any) -> Any:
        asked.append(constants.HF_HUB_OFFLINE)
        return load(*args, **options)

    monkeypatch.setattr(datasets, "load_dataset", spy)
    with pytest.raises(UserError, match=r"hub cannot be reached.*network.*HF_HOME.*local copy") as error:
        open_splits("nobody/nothing")
    assert asked == [True], "the library itself was kept from trying again and again"
    assert constants.HF_HUB_OFFLINE is False, "and only for this call"
    assert "\n" not in str(error.value)


def test_offline_mode_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub_access, "answers_in_time", lambda endpoint: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match="hub cannot be reached"):
        open_splits("nobody/nothing")


def test_images_are_counted_over_all_parts(tmp_path: Path) -> None:
    parts = open_splits(str(write_hub_dataset(tmp_path / "set", rows=6)))
    ordered = [parts["train"], parts["validation"].select(range(2)), parts["test"]]
    images = ImageColumn(ordered, "image")
    expected = [*(row["image"] for part in ordered for row in part)]
    assert len(expected) == 14
    for index, image in enumerate(expected):
        ours = images.read(index, "x").permute(1, 2, 0).numpy()
        assert (ours == image).all()


def test_encoded_bytes_and_paths_are_images_too(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    draw_image(0, "red", look=1).save(file)
    for values in ([file.read_bytes()], [str(file)]):
        part = datasets.Dataset.from_dict({"image": values})
        assert ImageColumn([part], "image").read(0, "a").shape == (3, 32, 32)


def test_bad_images_are_named(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image()})
    rows = [None, {"bytes": b"nonsense", "path": None}, {"bytes": None, "path": str(tmp_path / "gone.png")}]
    images = ImageColumn([datasets.Dataset.from_dict({"image": rows}, features=features)], "image")
    for index in range(3):
        with pytest.raises(ImageError, match=f"set: train/{index}"):
            images.read(index, f"set: train/{index}")


def test_a_column_of_numbers_is_no_image() -> None:
    with pytest.raises(UserError, match=r"columns.image: column 'size' holds no images"):
        ImageColumn([datasets.Dataset.from_dict({"size": [1, 2]})], "size")


def test_columns_are_read_without_the_others(tmp_path: Path) -> None:
    parts = open_splits(str(write_hub_dataset(tmp_path / "set", rows=6)))
    table = read_columns(parts["train"].select([4, 0]), ["caption", "label"])
    assert table.column_names == ["caption", "label"]
    assert table["label"].to_pylist() == [2, 0]


def test_mixed_depths_have_no_labels(tmp_path: Path) -> None:
    """As the library has it; HubImages then says that there is no column label."""
    assert list(open_splits(str(write_image_folder(tmp_path / "set")))["train"].features) == ["image"]
