from __future__ import annotations

from pathlib import Path

import pytest

from datamodules.files.label_csv import (
    Vocabulary,
    VocabularyOptions,
    canonical_attribute,
    parse_attributes,
    plain_text,
    read_attributes_file,
    read_classes_file,
)
from datamodules.table import Missing
from tests.fakes import TEAM14_ATTRIBUTES, TEAM14_CLASSES, write_team14
from vitrail.errors import UserError


def test_both_spellings_of_colour_are_one_attribute() -> None:
    assert {canonical_attribute(name) for name in ("color", "colour", " Color", "COLOUR ")} == {"colour"}
    assert canonical_attribute("Material") == "material"


def test_attributes_are_taken_apart_in_their_order() -> None:
    values, wrong = parse_attributes("size:large; color : dark red ;material:;note:a:b;")
    assert list(values.items()) == [("size", "large"), ("colour", "dark red"), ("material", ""), ("note", "a:b")]
    assert wrong == []


@pytest.mark.parametrize("text", ["", "  ", ";"])
def test_no_attributes_are_no_mistake(text: str) -> None:
    assert parse_attributes(text) == ({}, [])


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("colour:red;metal", "'metal' has no colon"),
        ("colour:red;:metal", "':metal' has no name"),
        ("colour:red;material:a;material:b", "'material' occurs twice"),
        ("colour:red;color:red", "'colour' occurs twice"),
        ("class:watch", "taken by the class label"),
        ("colour:red|size:large", "looks like several; separate attributes by semicolons"),
        ("colour:red, size:large", "looks like several; separate attributes by semicolons"),
    ],
)
def test_malformed_attributes_are_told(text: str, wrong: str) -> None:
    problems = parse_attributes(text)[1]
    assert len(problems) == 1
    assert wrong in problems[0]


def test_captions_have_single_blanks_and_none_at_the_ends() -> None:
    assert plain_text("\u00a0 black  earphones\u00a0with cable\n") == "black earphones with cable"


VALUES = ["", " ", "unknown", "Unknown", "nan", "NA", "none", "None"]


@pytest.mark.parametrize(
    ("texts", "unknown"),
    [([], 2), (["unknown"], 4), (["NONE", " nan "], 5), (["unknown", "nan", "NA", "none"], len(VALUES))],
)
def test_what_counts_as_missing_is_one_option(texts: list[str], unknown: int) -> None:
    missing = Missing(texts)
    known = Vocabulary(None, missing).values("colour", VALUES)
    assert known.count("") == unknown
    assert [value for value in known if value] == [text for text in VALUES[2:] if text.lower() not in map(norm, texts)]
    assert sum(missing.counts.get("attribute colour", {}).values()) == unknown - 2, "empty cells need no mention"


def norm(text: str) -> str:
    return text.strip().lower()


def test_aliases_are_applied_to_their_attribute_alone() -> None:
    aliases: dict[str, dict[str, str | None]] = {
        "color": {"grey": "gray", "n/a": "unknown", "-": "", "?": None},
        "class": {"cap": "hat"},
    }
    missing = Missing(["unknown"])
    vocabulary = Vocabulary({"aliases": aliases}, missing)
    assert vocabulary.values("colour", [" grey ", "n/a", "-", "?", "red"]) == ["gray", "", "", "", "red"]
    assert vocabulary.values("material", ["grey", "cap"]) == ["grey", "cap"]
    assert vocabulary.values("class", ["cap"]) == ["hat"]
    assert missing.counts == {"attribute colour": {"n/a": 1, "-": 1, "?": 1}}


def test_letters_in_two_unicode_forms_are_one_value() -> None:
    composed, taken_apart = "caf\u00e9", "cafe\u0301"
    assert Vocabulary(None).values("colour", [composed, taken_apart]) == [composed, composed]
    vocabulary = Vocabulary({"aliases": {"colour": {taken_apart: "brown"}}})
    assert vocabulary.values("colour", [composed, taken_apart]) == ["brown", "brown"]


def test_aliases_of_an_attribute_that_does_not_exist_are_refused() -> None:
    vocabulary = Vocabulary({"aliases": {"hue": {"grey": "gray"}}})
    with pytest.raises(UserError, match=r"aliases: labels.csv has no attribute 'hue'; it has class, colour"):
        vocabulary.check_aliases({"class": [], "colour": []}, "labels.csv")


def test_aliases_that_match_no_row_are_reported() -> None:
    vocabulary = Vocabulary({"aliases": {"colour": {"grey": "gray", "gray2": "gray", "": "red"}, "class": {"a": "b"}}})
    (note,) = vocabulary.check_aliases({"class": ["a"], "colour": ["grey", " ", "x"]}, "labels.csv")
    assert note == "data vocabulary.aliases: no row of labels.csv has the colour 'gray2'; correct or remove it"


def test_vocabulary_files_keep_their_order_without_unknown_and_aliased_values(tmp_path: Path) -> None:
    write_team14(tmp_path, images=False)
    options: VocabularyOptions = {"source": "files", "aliases": {"colour": {"white": "black"}}}
    lists = Vocabulary(options, Missing(["unknown"])).from_files(tmp_path)
    assert lists["class"] == list(TEAM14_CLASSES)
    assert lists["colour"] == ["red", "blue", "green", "black", "yellow"]
    assert lists["condition"] == ["new", "used"]
    assert Vocabulary({"source": "train"}).from_files(tmp_path) == {}


def test_one_vocabulary_file_is_enough_but_none_is_not(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither classes.txt nor attributes.yaml"):
        Vocabulary({"source": "files"}).from_files(tmp_path)
    (tmp_path / "kinds.txt").write_text("b\n\na\n", encoding="utf-8")
    assert Vocabulary({"source": "files", "classes_file": "kinds.txt"}).from_files(tmp_path) == {"class": ["b", "a"]}


@pytest.mark.parametrize(
    ("options", "named"), [({"source": "test"}, "vocabulary.source"), ({"alias": {}}, "unknown key 'alias'")]
)
def test_mistaken_options_are_refused(options: VocabularyOptions, named: str) -> None:
    with pytest.raises(UserError, match=named):
        Vocabulary(options)


def test_classes_that_occur_twice_are_told_by_row(tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_text("a\nb\na\nb", encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_classes_file(path)
    assert f"{path}:3: class 'a' again, first in row 1" in str(error.value)
    assert f"{path}:4: class 'b' again, first in row 2" in str(error.value)


def test_yaml_values_stay_texts(tmp_path: Path) -> None:
    path = tmp_path / "attributes.yaml"
    path.write_text("---\nColor:\n- off\n- no\n- 1\n- 'null'\n", encoding="utf-8")
    assert read_attributes_file(path) == {"colour": ["off", "no", "1", "null"]}
    path.write_text(TEAM14_ATTRIBUTES, encoding="utf-8")
    assert list(read_attributes_file(path)) == ["colour", "material", "size", "condition"]


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("- red\n", "must hold lists of values by attribute"),
        ("", "must hold lists of values by attribute"),
        ("size: [a]\ncolour: red\n", ":2: 'colour' must hold a list"),
        ("colour: [[a]]\n", "'colour' must hold a list"),
        ("colour: [a]\nsize: [s]\ncolor: [b]\n", ":3: attribute 'colour' occurs twice"),
        ("colour: [a]\ncolour: [b]\n", ":2: attribute 'colour' occurs twice"),
        ("colour: [a\n", "is no YAML"),
    ],
)
def test_malformed_attribute_files_are_told_in_one_line(text: str, wrong: str, tmp_path: Path) -> None:
    path = tmp_path / "attributes.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_attributes_file(path)
    assert wrong in str(error.value)
    assert "\n" not in str(error.value)
