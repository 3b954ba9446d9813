from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from datamodules.files.label_csv import left_out_text
from datamodules.image_folder import ImageFolder, UnlabeledFolder
from datamodules.options import CheckOptions, ImageOptions, LoaderOptions
from datamodules.splits import SplitOptions
from tests.support.data import draw_image, from_yaml, write_image_folder
from vitrail.errors import UserError
from vitrail.types import UNKNOWN

OBJECT = r"_(o\d+)_"
CLASS_AND_OBJECT = r"(\w+_o\d+)_"


def split_sizes(data: ImageFolder) -> list[int]:
    return [len(data.table.split_indices(split)) for split in ("train", "val", "test")]


def names(data: ImageFolder, split: str) -> list[str]:
    return [data.table.name(int(index)) for index in data.table.split_indices(split)]


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")


def test_folders_are_splits_and_classes_at_any_depth(tmp_path: Path) -> None:
    data = ImageFolder(str(write_image_folder(tmp_path)))
    assert data.class_names == ["bag", "bottle", "cap"]
    assert split_sizes(data) == [12, 12, 12]
    assert names(data, "train")[:4] == [
        "train/bag/bag_o0_0.png",
        "train/bag/bag_o0_1.png",
        "train/bag/shelf/bag_o3_0.png",
        "train/bag/shelf/bag_o3_1.png",
    ], "hidden files and other files are left alone"
    assert data.table.source(0) == str(tmp_path / "train/bag/bag_o0_0.png")
    assert data.group_names() == data.sample_names()
    assert data.read_image(0).shape == (3, 32, 32)


def test_classes_at_the_top_are_divided_by_class(tmp_path: Path) -> None:
    root = str(write_image_folder(tmp_path, splits=(), objects=10))
    data = ImageFolder(root, SplitOptions(val_fraction=0.2, test_fraction=0.2))
    assert split_sizes(data) == [36, 12, 12]
    assert data.table.class_counts("val")["class"] == [4, 4, 4]
    other = ImageFolder(root, SplitOptions(val_fraction=0.2, test_fraction=0.2), seed=1)
    assert names(data, "val") != names(other, "val")


def test_the_pattern_keeps_objects_together(tmp_path: Path) -> None:
    root = str(write_image_folder(tmp_path, splits=(), objects=10))
    data = ImageFolder(root, SplitOptions(val_fraction=0.2, test_fraction=0.2), group_pattern=CLASS_AND_OBJECT)
    assert data.table.group(0) == "bag_o0"
    ids = [set(data.table.group_ids[data.table.split_indices(split)].tolist()) for split in ("train", "val", "test")]
    assert sum(map(len, ids)) == len(set.union(*ids)) == 30
    assert data.table.class_counts("test")["class"] == [4, 4, 4]


def test_a_missing_val_is_cut_out_of_train(tmp_path: Path) -> None:
    root = str(write_image_folder(tmp_path, splits=("train", "test"), objects=20))
    data = ImageFolder(root, SplitOptions(val_fraction=0.2), group_pattern=CLASS_AND_OBJECT)
    assert split_sizes(data) == [48, 12, 60]
    assert all(name.startswith("test/") for name in names(data, "test"))
    assert all(name.startswith("train/") for name in names(data, "val"))
    train, val = (set(data.table.group_ids[data.table.split_indices(split)]) for split in ("train", "val"))
    assert not train & val
    assert split_sizes(ImageFolder(root, SplitOptions(val_fraction=0.0))) == [60, 0, 60]


def test_own_splits_may_be_divided_again(tmp_path: Path) -> None:
    root = str(write_image_folder(tmp_path))
    data = ImageFolder(root, SplitOptions(by="random", val_fraction=0.25, test_fraction=0.25))
    assert split_sizes(data) == [18, 9, 9]
    assert len({name.split("/")[0] for name in names(data, "train")}) > 1


def test_classes_may_be_called_train_or_test(tmp_path: Path) -> None:
    for name in ("train", "plane", "ship"):
        for number in range(10):
            touch(tmp_path / name / f"{number}.jpg")
    data = ImageFolder(str(tmp_path))
    assert data.class_names == ["plane", "ship", "train"]


def test_a_class_that_train_lacks_is_unseen(tmp_path: Path) -> None:
    for path in ("train/a/1.jpg", "train/b/1.jpg", "val/c/1.jpg", "test/a/1.jpg"):
        touch(tmp_path / path)
    table = ImageFolder(str(tmp_path)).table
    assert table.unseen["class"] == {"c": 1}
    assert table.targets["class"].tolist() == [0, 1, UNKNOWN, 0]


def test_links_are_followed_once(tmp_path: Path) -> None:
    for number in range(4):
        touch(tmp_path / "store" / f"{number}.png")
        touch(tmp_path / "root" / "b" / f"{number}.png")
    (tmp_path / "root" / "a").symlink_to(tmp_path / "store")
    (tmp_path / "root" / "b" / "loop").symlink_to(tmp_path / "root" / "b")
    data = ImageFolder(str(tmp_path / "root"))
    assert data.class_names == ["a", "b"]
    assert len(data.table) == 8


def test_rare_classes_stay_in_train(tmp_path: Path) -> None:
    for name, count in (("common", 20), ("once", 1), ("twice", 2)):
        for number in range(count):
            touch(tmp_path / name / f"{number}.png")
    counts = np.array(
        [ImageFolder(str(tmp_path)).table.class_counts(split)["class"] for split in ("train", "val", "test")]
    )
    assert counts[0].min() >= 1
    assert counts.sum(0).tolist() == [20, 1, 2]


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (["train/a/1.jpg", "val/a/1.jpg", "extra/1.jpg"], "has extra next to train, val"),
        (["val/a/1.jpg", "test/a/1.jpg"], "no train"),
        (["a/1.jpg", "stray.jpg"], "stray.jpg in no class folder"),
        (["train/a/1.jpg", "train/stray.jpg", "test/a/1.jpg"], "stray.jpg in no class folder"),
        (["a/1.jpg", "b/1.cr2", "c/notes.txt"], "no images .* in class folder b, c;"),
        (["train/a/1.jpg", "val/b/notes.txt"], "no images .* in class folder b;"),
        (["stray.jpg"], "has no folders"),
    ],
)
def test_doubtful_folders_are_refused(files: list[str], named: str, tmp_path: Path) -> None:
    for file in files:
        touch(tmp_path / file)
    with pytest.raises(UserError, match=named) as error:
        _ = ImageFolder(str(tmp_path)).tasks
    assert "\n" not in str(error.value)


def test_missing_folders_and_splits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no folder"):
        _ = ImageFolder(str(tmp_path / "nowhere")).tasks
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match="has no class folders"):
        _ = ImageFolder(str(tmp_path)).tasks
    with pytest.raises(UserError, match=r"split.by: table"):
        _ = ImageFolder(str(write_image_folder(tmp_path / "a", splits=())), SplitOptions(by="table")).tasks


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("(", "not a regular expression"),
        ("a", "has 0"),
        ("(a)(b)", "has 2"),
        (r"(x\d)", "finds nothing in bag/bag_o0_0.png, .* and 31 more"),
    ],
)
def test_mistaken_patterns_are_refused(pattern: str, named: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"group_pattern.*{named}"):
        _ = ImageFolder(str(write_image_folder(tmp_path)), group_pattern=pattern).tasks


def test_arguments_come_from_yaml(tmp_path: Path) -> None:
    data = from_yaml(f"""
class_path: datamodules.ImageFolder
init_args:
  root: {write_image_folder(tmp_path)}
  split: {{by: group, val_fraction: 0.25, test_fraction: 0.25}}
  group_pattern: '{CLASS_AND_OBJECT}'
""")
    assert isinstance(data, ImageFolder)
    assert len(set(data.group_names())) == 18


@pytest.mark.parametrize(
    "folders",
    [
        {"Train": "train", "Test": "test"},
        {"training": "train", "testing": "test"},
        {"train": "train", "eval": "val"},
        {"TRAIN": "train", "VAL": "val"},
        {"train": "train", "Test": "test"},
        {"Train": "train", "valid": "val", "TEST": "test"},
        {"Training": "train", "Validation": "val", "Testing": "test"},
        {"train2017": "train", "val2017": "val"},
        {"train_set": "train", "dev-set": "val", "test_images": "test"},
        {"trainset": "train", "testset": "test"},
        {"01_train": "train", "02_evaluation": "val"},
    ],
)
def test_split_folders_are_recognized_in_any_spelling(folders: dict[str, str], tmp_path: Path) -> None:
    for folder in folders:
        for name in ("bag", "cup"):
            touch(tmp_path / folder / name / "1.png")
    data = ImageFolder(str(tmp_path), SplitOptions(val_fraction=0, test_fraction=0))
    assert data.class_names == ["bag", "cup"]
    found = {data.table.name(row).split("/")[0]: data.table.split(row) for row in range(len(data.table))}
    assert found == folders


@pytest.mark.parametrize(
    "folders",
    [
        ("A", "B"),
        ("2019", "2020"),
        ("fold1", "fold2", "fold3"),
        ("train", "unlabeled"),
        ("cat", "dog"),
        ("test", "new"),
    ],
)
def test_folders_that_may_be_splits_or_classes_are_refused(folders: tuple[str, ...], tmp_path: Path) -> None:
    for folder in folders:
        for name in ("bag", "cup"):
            touch(tmp_path / folder / name / "1.png")
    with pytest.raises(
        UserError, match=r"may be classes or splits; say which with data split_folders: \{train"
    ) as said:
        _ = ImageFolder(str(tmp_path)).table
    assert "\n" not in str(said.value)
    assert ImageFolder(str(tmp_path), split_folders={}).class_names == sorted(folders)
    chosen = {"train": list(folders[:-1]), "test": folders[-1]}
    stated = ImageFolder(str(tmp_path), {"val_fraction": 0}, split_folders=chosen)  # type: ignore[arg-type]  # variance
    assert stated.class_names == ["bag", "cup"]
    assert split_sizes(stated) == [2 * len(folders) - 2, 0, 2]


def test_folders_of_one_name_below_each_class_are_no_splits(tmp_path: Path) -> None:
    for name in ("bag", "cup", "train"):
        touch(tmp_path / name / "images" / "1.png")
    assert ImageFolder(str(tmp_path)).class_names == ["bag", "cup", "train"]


@pytest.mark.parametrize(
    ("folders", "chosen", "message"),
    [
        (("train", "Train"), None, r"several folders for train \(Train, train\); keep one, or say which"),
        (("train", "val", "dev"), None, r"several folders for val \(dev, val\)"),
        (("Val", "TEST"), None, "has TEST, Val but no train; add it, or say which"),
        (("A", "B"), {"train": "A"}, "does not name B"),
        (("A", "B"), {"train": "A", "test": "C"}, "has no folder 'C'; it has A, B"),
        (("A", "B"), {"train": "A", "val": ["A", "B"]}, "names a folder twice"),
        (("A", "B"), {"test": ["A", "B"]}, "names no folder for train"),
        (("A", "B"), {"training": "A"}, "must be one of train, val, test; got 'training'"),
    ],
)
def test_unclear_split_folders_are_refused(
    folders: tuple[str, ...], chosen: dict[str, str | list[str]] | None, message: str, tmp_path: Path
) -> None:
    for folder in folders:
        for name in ("bag", "cup"):
            touch(tmp_path / folder / name / "1.png")
    with pytest.raises(UserError, match=message):
        _ = ImageFolder(str(tmp_path), split_folders=chosen).table


def test_files_left_out_are_counted_by_suffix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.jpg", "b.JPG", "c.avif", "d.jfif", "e.jp2"):
        touch(tmp_path / "bag" / name)
        touch(tmp_path / "cup" / "deep" / name)
    for name in ("raw.CR2", "deep/raw.cr2", "notes.txt", "Makefile", "photo.heic", ".hidden.txt", "__MACOSX/x.txt"):
        touch(tmp_path / "cup" / name)
    touch(tmp_path / "readme.txt")
    monkeypatch.setattr("datamodules.loading.decode.heif_formats", tuple)
    data = ImageFolder(str(tmp_path))
    assert len(data.table) == 10
    assert data.files_left_out == {".cr2": 2, ".txt": 2, "": 1, ".heic": 1}
    folder = UnlabeledFolder(str(tmp_path))
    assert len(folder.table) == 10
    assert folder.files_left_out == data.files_left_out
    monkeypatch.setattr("datamodules.files.label_csv.heif_formats", tuple)
    assert left_out_text(data.files_left_out) == (
        "by ending: .cr2 2, .txt 2, no ending 1, .heic 1 (install the extra heic to read them)"
    )


def test_folders_in_two_unicode_forms_are_one_class(tmp_path: Path) -> None:
    composed, taken_apart = "caf\u00e9", "cafe\u0301"
    files = [f"train/{composed}/{taken_apart}.png", "train/none/b.png", f"val/{taken_apart}/c.png", "test/none/d.png"]
    for file in files:
        touch(tmp_path / file)
    data = ImageFolder(str(tmp_path))
    assert data.class_names == [composed, "none"], "none is a class as any other"
    assert data.sample_names() == ["train/caf\u00e9/caf\u00e9.png", *files[1:2], "val/caf\u00e9/c.png", files[3]]
    assert data.table.source(0) == str(tmp_path / files[0])
    without = ImageFolder(str(tmp_path), checks=CheckOptions(missing=["none"])).table
    assert (without.tasks, without.missing) == ({"class": [composed]}, {"class": {"none": 2}})


def write_images(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        draw_image(0, "red", look=number, size=(40, 30)).save(folder / name)
    return folder


def test_all_images_at_any_depth_are_test_samples(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "holiday", "z.png", "day1/b.jpg", "day1/noon/a.JPG", ".hidden.png")
    (folder / "notes.txt").write_text("none")
    data = UnlabeledFolder(str(folder), image=ImageOptions(size=16), loader=LoaderOptions(batch_size=2))
    data.prepare_data()
    data.setup("predict")
    assert data.sample_names() == ["holiday/day1/b.jpg", "holiday/day1/noon/a.JPG", "holiday/z.png"]
    assert len(data.split_indices("train")) == len(data.split_indices("val")) == 0
    batches = list(data.predict_dataloader())
    assert [len(batch["sample_id"]) for batch in batches] == [2, 1]
    assert batches[0]["image"].shape == (2, 3, 16, 16)
    assert data.tasks == {}
    assert not data.own_captions
    assert data.image_facts(data.split_indices("test")).column("path").to_pylist() == [
        str(folder / name) for name in ("day1/b.jpg", "day1/noon/a.JPG", "z.png")
    ]


@pytest.mark.parametrize(("name", "message"), [("missing", "there is no folder"), ("empty", "has no images")])
def test_a_folder_without_images_is_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        _ = UnlabeledFolder(str(tmp_path / name)).table
