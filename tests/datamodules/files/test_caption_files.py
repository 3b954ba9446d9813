from __future__ import annotations

import json
from pathlib import Path

import pytest

from datamodules.files.caption_files import read_captions
from vitrail.errors import UserError


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
    [(found, told)] = read_captions(written(tmp_path, name, text)).problems
    assert found == row
    assert message in told


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
