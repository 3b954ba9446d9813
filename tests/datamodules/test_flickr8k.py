from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from datamodules import Flickr8k, UserError
from datamodules.flickr8k import read_captions
from datamodules.options import CheckOptions, ImageOptions
from tests.support.data import GHOST, LISTS, captions_of, photo_name, split_of, write_flickr

REAL = Path(os.environ.get("VITRAIL_DATA", "")) / "flickr8k"


def names(data: Flickr8k, split: str) -> list[str]:
    return [data.table.name(int(row)) for row in data.table.split_indices(split)]


def test_the_original_layout_is_read_and_its_slip_left_out(tmp_path: Path) -> None:
    data = Flickr8k(str(write_flickr(tmp_path)))
    with pytest.warns(UserWarning, match="left out 1 photos in no list, 5 captions of photos that do not exist"):
        data.table  # noqa: B018
    for split in ("train", "val", "test"):
        assert names(data, split) == [photo_name(n) for n in range(23) if split_of(n) == split]
    assert data.left_out == {"photos in no list": 1, "captions of photos that do not exist": 5}
    assert GHOST not in data.sample_names()
    assert data.table.caption_lists.of([3]) == [captions_of(3)]
    data.prepare_data()
    data.setup("fit")
    assert data.data_record()["left_out"] == data.left_out


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("auto", "Flickr8k.token.txt"),
        ("", "Flickr8k.token.txt"),
        ("token", "Flickr8k.token.txt"),
        ("kaggle", "captions.txt"),
        ("karpathy", "dataset_tiny.json"),
        ("dataset_tiny.json", "dataset_tiny.json"),
    ],
)
def test_one_kind_of_captions_is_chosen_among_several(tmp_path: Path, kind: str, file: str) -> None:
    write_flickr(tmp_path)
    write_flickr(tmp_path, layout="kaggle")
    write_flickr(tmp_path, layout="karpathy")
    assert Path(Flickr8k(str(tmp_path), captions=kind).table.origin).name == file


def test_photos_of_coco_lie_in_the_folder_that_the_file_names(tmp_path: Path) -> None:
    root = write_flickr(tmp_path, layout="karpathy")
    (root / "images").rename(root / "val2014")
    path = root / "dataset_tiny.json"
    found = json.loads(path.read_text())
    for entry in found["images"]:
        entry["filepath"] = "val2014"
    path.write_text(json.dumps(found))
    data = Flickr8k(str(root))
    data.prepare_data()
    assert data.table.name(0) == f"val2014/{photo_name(0)}"
    assert data.data_record()["skipped"] == []


def test_kaggles_layout_is_divided_at_random_by_photo(tmp_path: Path) -> None:
    data = Flickr8k(str(write_flickr(tmp_path, layout="kaggle")), seed=4)
    parts = [set(names(data, split)) for split in ("train", "val", "test")]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 24
    assert all(parts)
    assert data.table.caption_lists.of([0]) == [captions_of(0)]
    assert names(Flickr8k(str(tmp_path), seed=5), "val") != names(data, "val")


def test_kaggles_captions_with_the_original_lists(tmp_path: Path) -> None:
    original, kaggle = write_flickr(tmp_path / "a"), write_flickr(tmp_path / "b", layout="kaggle")
    for file in LISTS.values():
        (kaggle / file).write_text((original / "Flickr8k_text" / file).read_text())
    assert names(Flickr8k(str(kaggle)), "test") == names(Flickr8k(str(original)), "test")


def test_karpathys_layout_says_the_split(tmp_path: Path) -> None:
    data = Flickr8k(str(write_flickr(tmp_path, layout="karpathy")))
    assert photo_name(0) in names(data, "train")
    assert names(data, "val") == [photo_name(n) for n in range(24) if split_of(n) == "val"]


@pytest.mark.parametrize(("caption", "expected"), [("first", 16), ("random", 16), ("all", 80)])
def test_an_epoch_has_every_photo_once_or_with_every_caption(tmp_path: Path, caption: Any, expected: int) -> None:
    loader = {"batch_size": 8, "contrastive_batch_size": 16}
    data = Flickr8k(str(write_flickr(tmp_path)), caption=caption, image={"size": 16}, loader=loader)
    data.prepare_data()
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert {len(batch["sample_id"]) for batch in batches} == {16}
    assert data.chunk_size == 8
    pairs = [(i, c) for batch in batches for i, c in zip(batch["sample_id"].tolist(), batch["caption"], strict=True)]
    assert len(set(pairs)) == expected
    assert all(text in data.table.caption_lists.of([row])[0] for row, text in pairs)
    if caption == "first":
        assert all(text == data.table.caption(row) for row, text in pairs)
    assert all("label" not in batch and "captions" not in batch for batch in batches)


def test_evaluation_has_every_caption_and_no_classes(tmp_path: Path) -> None:
    data = Flickr8k(str(write_flickr(tmp_path)), image=ImageOptions(size=16))
    data.prepare_data()
    data.setup("fit")
    [batch] = data.val_dataloader()
    assert [len(texts) for texts in batch["captions"]] == [5] * 4
    assert batch["caption"] == [texts[0] for texts in batch["captions"]]
    assert (data.tasks, data.class_names, data.class_prompts) == ({}, [], [])
    assert len(data.training_texts()) == len(
        {text for n in range(23) if split_of(n) == "train" for text in captions_of(n)}
    )


def test_problems_are_reported_together_by_line(tmp_path: Path) -> None:
    root = write_flickr(tmp_path)
    text = root / "Flickr8k_text"
    with (text / "Flickr8k.token.txt").open("a") as file:
        file.write("broken line\n")
    with (text / LISTS["val"]).open("a") as file:
        file.write(f"{photo_name(0)}\nunknown.jpg\n")
    with pytest.raises(UserError) as caught:
        Flickr8k(str(root)).table  # noqa: B018
    message = str(caught.value)
    assert "Flickr8k.token.txt:126: 'broken line'" in message
    assert f"{LISTS['val']}:5: {photo_name(0)} again, it is in the list for train" in message
    assert f"{LISTS['val']}:6: unknown.jpg has no captions" in message


def test_a_listed_photo_that_is_absent_is_refused_or_skipped(tmp_path: Path) -> None:
    root = write_flickr(tmp_path)
    (root / "Flicker8k_Dataset" / photo_name(1)).unlink()
    with pytest.raises(UserError, match=photo_name(1)):
        Flickr8k(str(root)).prepare_data()
    data = Flickr8k(str(root), checks=CheckOptions(on_bad_image="skip"))
    data.prepare_data()
    assert [skipped["name"] for skipped in data.data_record()["skipped"]] == [photo_name(1)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"root": "nowhere"}, "kaggle.com"),
        ({"captions": "other.txt"}, "data captions"),
        ({"captions": "karpathy"}, "no captions of kind karpathy"),
        ({"images": "other"}, "data images"),
        ({"images": "Flickr8k_text"}, "none of its photos"),
        ({"caption": "last"}, "data caption"),
    ],
)
def test_wrong_places_are_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    root = write_flickr(tmp_path)
    with pytest.raises(UserError, match=message):
        Flickr8k(**{"root": str(root), **changes}).texts  # noqa: B018


def test_half_of_the_lists_are_refused(tmp_path: Path) -> None:
    root = write_flickr(tmp_path)
    (root / "Flickr8k_text" / LISTS["test"]).unlink()
    with pytest.raises(UserError, match=LISTS["test"]):
        Flickr8k(str(root)).table  # noqa: B018


@pytest.mark.skipif(not REAL.is_dir(), reason="needs $VITRAIL_DATA/flickr8k")
def test_the_real_files_are_read_whole() -> None:
    token, kaggle = Flickr8k(), Flickr8k(captions="captions.txt")
    assert len(token.table) == len(kaggle.table) > 1000
    assert token.left_out["captions of photos that do not exist"] == 5
    for split, file in LISTS.items():
        listed = (REAL / "Flickr8k_text" / file).read_text().split()
        assert sorted(names(token, split)) == sorted(names(kaggle, split)) == sorted(listed)
    assert len(token.table) + token.left_out["photos in no list"] == len(list((REAL / "Flicker8k_Dataset").iterdir()))
    assert min(token.table.caption_lists.counts) == 5


def test_names_in_two_unicode_forms_and_missing_captions(tmp_path: Path) -> None:
    composed, taken_apart = "caf\u00e9", "cafe\u0301"
    (tmp_path / "Images").mkdir()
    lines = ["image,caption"]
    for n in range(4):
        Image.effect_noise((24, 24), 60 + n).save(tmp_path / "Images" / f"{taken_apart}{n}.png")
        lines += [f"{(composed, taken_apart)[n % 2]}{n}.png,{text}" for text in (f"a {n}", "nan" if n else "none")]
    (tmp_path / "captions.txt").write_text("\n".join(lines), encoding="utf-8")
    data = Flickr8k(str(tmp_path))
    assert data.sample_names() == [f"{composed}{n}.png" for n in range(4)]
    assert data.table.caption_lists.of([0, 1]) == [["a 0", "none"], ["a 1", "nan"]]
    data = Flickr8k(str(tmp_path), checks=CheckOptions(missing=["nan"]))
    assert data.table.caption_lists.of([0, 1]) == [["a 0", "none"], ["a 1"]]
    assert data.table.missing == {"caption": {"nan": 3}}
    assert data.read_image(0).shape == (3, 24, 24)


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_token_files_are_read_in_their_order(tmp_path: Path) -> None:
    file = read_captions(written(tmp_path, "t.token", "b.jpg#0\tOne .\nb.jpg#1\t two \n\na.jpg#0\tthree\n"))
    assert file.captions == {"b.jpg": ["One .", "two"], "a.jpg": ["three"]}
    assert file.rows == {"b.jpg": 1, "a.jpg": 4}
    assert not file.problems


def test_kaggles_file_has_quoted_commas(tmp_path: Path) -> None:
    file = read_captions(written(tmp_path, "captions.txt", 'image,caption\na.jpg,"One , two ."\na.jpg,Three\n'))
    assert file.captions == {"a.jpg": ["One , two .", "Three"]}


def test_karpathys_file_says_the_split(tmp_path: Path) -> None:
    images = [
        {"filename": "a.jpg", "split": "restval", "sentences": [{"raw": "one"}, {"raw": "two"}]},
        {"filename": "b.jpg", "filepath": "val2014", "split": "test", "sentences": [{"raw": "three"}]},
    ]
    file = read_captions(written(tmp_path, "d.json", json.dumps({"images": images})))
    assert file.splits == {"a.jpg": "train", "val2014/b.jpg": "test"}
    assert file.captions["val2014/b.jpg"] == ["three"]


@pytest.mark.parametrize(
    ("name", "text", "row", "message"),
    [
        ("t.token", "a.jpg#0\tone\na.jpg two\n", 2, "not name.jpg#number"),
        ("t.token", "a.jpg#0\t  \n", 1, "empty caption of a.jpg"),
        ("captions.txt", "image,caption\na.jpg,\n", 2, "empty caption of a.jpg"),
        ("captions.txt", "image,caption\n,one\n", 2, "no name"),
        ("d.json", '{"images": [{"filename": "a", "split": "dev"}]}', 1, "its split is not"),
        ("d.json", '{"images": [{"filename": "a", "split": "val"}]}', 1, "a has no captions"),
        ("d.json", '{"images": [{"filename": "a", "split": "val", "sentences": null}]}', 1, "a has no captions"),
        ("d.json", '{"images": [7]}', 1, "no filename"),
    ],
)
def test_what_is_wrong_is_gathered_by_row(tmp_path: Path, name: str, text: str, row: int, message: str) -> None:
    [(found, problem)] = read_captions(written(tmp_path, name, text)).problems
    assert found == row
    assert message in problem


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("header", ["image{}caption", "caption{}comment_number{}image", "sep={}\nimage{}caption"])
def test_kaggles_table_may_have_any_separator(tmp_path: Path, separator: str, header: str) -> None:
    names = header.replace("{}", separator).split("\n")[-1].split(separator)
    row = separator.join({"image": "a#1.jpg", "caption": "one #2", "comment_number": "0"}[name] for name in names)
    text = f"{header.replace('{}', separator)}\n{row}\n"
    assert read_captions(written(tmp_path, "captions.txt", text)).captions == {"a#1.jpg": ["one #2"]}


def test_a_unicode_line_separator_does_not_end_a_caption(tmp_path: Path) -> None:
    file = read_captions(written(tmp_path, "t.token", "a.jpg#0\tone\u2028two\x85three\r\na.jpg#1\tfour\r\n"))
    assert file.captions == {"a.jpg": ["one\u2028two\x85three", "four"]}
    assert not file.problems


@pytest.mark.parametrize(
    ("name", "text"),
    [("d.json", "[]"), ("d.json", "no"), ("d.json", '{"images": 7}'), ("captions.txt", "image,text\n")],
)
def test_files_of_another_kind_are_refused(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(UserError, match=name):
        read_captions(written(tmp_path, name, text))
