from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import savemat

from datamodules import Flowers102, UserError
from tests.support.data import NAMES, write_flowers

REAL = Path(os.environ.get("VITRAIL_DATA", "")) / "flowers102"


def flowers(root: Path, **changes: Any) -> Flowers102:
    return Flowers102(str(root), **changes)


def splits(data: Flowers102) -> dict[str, list[int]]:
    return {s: data.table.rows[data.table.split_indices(s)].tolist() for s in ("train", "val", "test")}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_flowers(tmp_path_factory.mktemp("flowers"))


def test_the_official_lists_and_labels_are_honoured(root: Path) -> None:
    data = flowers(root)
    assert {split: len(rows) for split, rows in splits(data).items()} == {"train": 16, "val": 16, "test": 16}
    assert data.class_names == NAMES
    assert data.table.targets["class"][:7].tolist() == [0, 0, 0, 0, 0, 0, 1]
    assert data.table.name(0) == "image_00001.jpg"
    assert data.class_prompts[0] == ["a photo of a flower 1, a type of flower."]
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["positive_id"].tolist() == batch["label"].tolist()
    assert batch["caption"][0] == data.class_prompts[int(batch["label"][0])][0]
    assert "captions" not in next(iter(data.val_dataloader()))


def test_the_folder_itself_may_be_given(root: Path) -> None:
    assert flowers(root / "flowers-102").table.fingerprint() == flowers(root).table.fingerprint()


def test_swapped_trains_on_the_large_lists_and_carves_validation_from_them(root: Path) -> None:
    official, data = splits(flowers(root)), flowers(root, split={"protocol": "swapped", "val_fraction": 0.25})
    found = splits(data)
    assert found["test"] == official["train"]
    assert sorted(found["train"] + found["val"]) == sorted(official["val"] + official["test"])
    val = data.table.targets["class"][data.table.split_indices("val")]
    assert set(Counter(val.tolist()).values()) == {1}


def test_few_shot_samples_k_photos_of_each_class_from_the_official_train_list(root: Path) -> None:
    official = splits(flowers(root))
    data = flowers(root, split={"protocol": "few_shot", "shots": 1})
    found = splits(data)
    assert set(found["train"]) < set(official["train"])
    assert found["val"] == official["val"]
    counts = Counter(data.table.targets["class"][data.table.split_indices("train")].tolist())
    assert set(counts.values()) == {1}
    assert len(counts) == 8
    assert splits(flowers(root, split={"protocol": "few_shot", "shots": 1, "seed": 5}))["train"] != found["train"]
    with pytest.warns(UserWarning, match="8 classes have fewer than 3 photos in the train list"):
        assert splits(flowers(root, split={"protocol": "few_shot", "shots": 3})) == official


def test_zhou_reads_the_file_of_coop(tmp_path: Path) -> None:
    root = write_flowers(tmp_path)
    with pytest.raises(UserError, match=r"split_zhou_OxfordFlowers\.json"):
        flowers(root, split={"protocol": "zhou"}).table  # noqa: B018
    parts = {"train": [1, 7], "val": [2], "test": [3, 4]}
    rows = {split: [[f"image_{n:05d}.jpg", 0, "x"] for n in numbers] for split, numbers in parts.items()}
    path = root / "split_zhou_OxfordFlowers.json"
    path.write_text(json.dumps(rows))
    assert splits(flowers(root, split={"protocol": "zhou"})) == parts
    rows["val"].append(["image_00999.jpg", 0, "x"])
    path.write_text(json.dumps(rows))
    with pytest.raises(UserError, match=r"OxfordFlowers\.json:2: place 2 of the list for val: there is no photo 999"):
        flowers(root, split={"protocol": "zhou"}).table  # noqa: B018


def test_base_trains_on_the_first_half_of_the_classes_and_tests_on_all(root: Path) -> None:
    data = flowers(root, classes="base")
    labels = {split: data.table.targets["class"][data.table.split_indices(split)] for split in ("train", "val", "test")}
    assert data.base_classes == 51
    assert labels["train"].max() < 51
    assert labels["val"].max() < 51
    assert set(labels["test"].tolist()) == {0, 1, 2, 3, 51, 52, 53, 54}
    assert data.class_names == NAMES


def test_photos_that_are_in_no_list_are_left_out(tmp_path: Path) -> None:
    root = write_flowers(tmp_path, lists={"tstid": [5, 6]})
    assert len(flowers(root).table) == 34


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"valid": [3, 999]}, "there is no photo 999"),
        ({"valid": [0]}, "there is no photo 0"),
        ({"valid": [1]}, r"place 1 of the list for val: photo 1 again, first at place 1 of the list for train"),
    ],
)
def test_wrong_numbers_are_named_by_list_and_place(tmp_path: Path, lists: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        flowers(write_flowers(tmp_path, lists=lists)).table  # noqa: B018


def test_an_absent_photo_is_named_before_training(tmp_path: Path) -> None:
    root = write_flowers(tmp_path)
    (root / "flowers-102" / "jpg" / "image_00003.jpg").unlink()
    with pytest.raises(UserError, match=r"image_00003\.jpg"):
        flowers(root).prepare_data()
    data = flowers(root, checks={"on_bad_image": "skip", "allow_leaks": ["near", "exact"]})
    data.prepare_data()
    assert len(data.data_record()["skipped"]) == 1


def test_labels_out_of_range_are_named(tmp_path: Path) -> None:
    root = write_flowers(tmp_path)
    savemat(root / "flowers-102" / "imagelabels.mat", {"labels": np.array([[1] * 47 + [103]])})
    with pytest.raises(UserError, match="photo 48 has the label 103"):
        flowers(root).table  # noqa: B018


def test_missing_and_broken_files_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"robots\.ox\.ac\.uk"):
        flowers(tmp_path / "nowhere").table  # noqa: B018
    root = write_flowers(tmp_path / "a")
    (root / "cat_to_name.json").unlink()
    with pytest.raises(UserError, match=r"cat_to_name\.json"):
        flowers(root).table  # noqa: B018
    root = write_flowers(tmp_path / "b")
    (root / "flowers-102" / "setid.mat").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"setid\.mat.*cannot be read"):
        flowers(root).table  # noqa: B018
    (root / "flowers-102" / "setid.mat").unlink()
    with pytest.raises(UserError, match=r"has no setid\.mat"):
        flowers(root).table  # noqa: B018


def test_without_a_network_a_download_ends_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datamodules.flowers102.answers_in_time", lambda endpoint: False)
    with pytest.raises(UserError, match="data download: no answer"):
        flowers(tmp_path, download=True).table  # noqa: B018


def test_a_download_is_laid_out_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Server:
        classes = NAMES
        breaks = True

        def __init__(self, root: str, split: str, download: bool) -> None:
            write_flowers(Path(root))
            if self.breaks:
                raise RuntimeError("connection lost")

    monkeypatch.setattr("datamodules.flowers102.answers_in_time", lambda endpoint: True)
    monkeypatch.setattr("torchvision.datasets.Flowers102", Server)
    with pytest.raises(UserError, match=r"could not be fetched \(connection lost\)"):
        flowers(tmp_path, download=True).table  # noqa: B018
    assert [path.name for path in tmp_path.rglob("*")] == ["flowers-102"]
    Server.breaks = False
    data = flowers(tmp_path, download=True)
    assert data.class_names == NAMES
    assert len(data.table) == 48
    names = sorted(path.name for path in (tmp_path / "flowers-102").iterdir())
    assert names == ["cat_to_name.json", "imagelabels.mat", "jpg", "setid.mat"]


def test_the_folder_itself_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_flowers(tmp_path)
    (root / "cat_to_name.json").unlink()
    monkeypatch.setattr("datamodules.flowers102.answers_in_time", lambda endpoint: pytest.fail("asked the server"))
    assert flowers(root / "flowers-102", download=True).class_names[73] == "rose"
    assert flowers(root).class_names[73] == "rose"


def test_what_is_there_is_not_downloaded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datamodules.flowers102.answers_in_time", lambda endpoint: pytest.fail("asked the server"))
    assert len(flowers(root, download=True).table) == 48


@pytest.mark.parametrize(
    "changes", [{"split": {"protocol": "random"}}, {"split": {"shots": 0}}, {"split": {"by": "x"}}, {"classes": "new"}]
)
def test_wrong_options_are_refused(root: Path, changes: Any) -> None:
    with pytest.raises(UserError, match=r"data (split|classes)"):
        flowers(root, **changes)


@pytest.mark.skipif(not REAL.is_dir(), reason="needs $VITRAIL_DATA/flowers102")
def test_the_real_lists_are_read_whole() -> None:
    data = Flowers102()
    counts = {split: len(rows) for split, rows in splits(data).items()}
    assert sum(counts.values()) == len(list((REAL / "flowers-102" / "jpg").glob("*.jpg")))
    assert data.class_names[0] == "pink primrose"
    assert min(data.class_counts["class"]) > 0
