from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pytest

from datamodules.files.arrow_columns import class_names_of, first_text, label_texts, plain_texts, vocabularies
from datamodules.files.label_csv import (
    Problems,
    Vocabulary,
    VocabularyOptions,
    canonical_attribute,
    locate,
    parse_attributes,
    plain_text,
    read_attributes_file,
    read_classes_file,
    read_label_file,
    read_text,
    relative_path,
)
from datamodules.table import Missing, target_column
from tests.support.data import TEAM14_ATTRIBUTES, TEAM14_CLASSES, write_team14
from vitrail.errors import UserError


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_columns_come_with_the_lines_of_their_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'name, size\none,1\n\n"two\nlines",2\r\n"a ""b"", c",3')
    file = read_label_file(path, ["name", "size"])
    assert file.columns == {"name": ["one", "two\nlines", 'a "b", c'], "size": ["1", "2", "3"]}
    assert file.rows == [2, 4, 6]
    assert file.problems == []


def test_a_byte_order_mark_is_no_part_of_the_header(tmp_path: Path) -> None:
    assert read_label_file(write(tmp_path / "a.csv", b"\xef\xbb\xbfname\none\n"), ["name"]).columns == {"name": ["one"]}


def test_rows_with_another_number_of_fields_are_left_out_and_told(tmp_path: Path) -> None:
    file = read_label_file(write(tmp_path / "a.csv", "a,b\n1,2\n3\n4,5,6\n7,8\n"), ["a"])
    assert file.columns == {"a": ["1", "7"], "b": ["2", "8"]}
    assert file.rows == [2, 5]
    assert file.problems == [
        (3, "1 fields where the header has 2"),
        (4, "3 fields where the header has 2"),
    ]


def test_every_line_that_is_not_utf8_is_told(tmp_path: Path) -> None:
    file = read_label_file(write(tmp_path / "a.csv", b"a,b\n1,caf\xe9\n2,fine\n3,\xff\n"), ["a"])
    assert [row for row, _ in file.problems] == [2, 4]
    assert "0xe9" in file.problems[0][1]
    assert "UTF-8" in file.problems[0][1]
    assert file.columns["a"] == ["1", "2", "3"], "the other columns can be checked all the same"


def test_a_stray_quote_is_told_where_it_begins(tmp_path: Path) -> None:
    file = read_label_file(write(tmp_path / "a.csv", 'a,b\n1,2\n3,"4\n5,6\n'), ["a"])
    assert [row for row, _ in file.problems] == [3]
    assert "quote" in file.problems[0][1]


def test_missing_and_repeated_columns_are_told(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "a,b,b\n1,2,3\n")
    with pytest.raises(UserError, match=r"missing column x, y; the header has a, b, b"):
        read_label_file(path, ["a", "x", "y"])
    with pytest.raises(UserError, match="column b occurs twice"):
        read_label_file(path, ["a"])
    with pytest.raises(UserError, match="the header has nothing"):
        read_label_file(write(path, ""), ["a"])


def test_a_file_that_cannot_be_read_is_told_with_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path / "labels_fixed.csv", "a")
    with pytest.raises(UserError, match=r"labels.csv: cannot be read .* has labels_fixed.csv"):
        read_text(tmp_path / "labels.csv", [])
    with pytest.raises(UserError, match="broken UTF-16"):
        read_text(write(tmp_path / "wide.csv", "a,b".encode("utf-16")[:-1]), [])


def test_clean_text_has_no_problems(tmp_path: Path) -> None:
    problems: Problems = []
    assert read_text(write(tmp_path / "a.txt", "é\n"), problems) == "é\n"
    assert problems == []


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("images/a.jpg", "images/a.jpg"),
        (r"images\team14_wrist_watch (1).jpg", "images/team14_wrist_watch (1).jpg"),
        (" ./images//a.jpg ", "images/a.jpg"),
        ("a..b/c.jpg", "a..b/c.jpg"),
    ],
)
def test_paths_are_brought_to_one_form(text: str, path: str) -> None:
    assert relative_path(text) == path


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", "no image path"),
        (" . ", "no image path"),
        ("/etc/passwd", "absolute"),
        ("\\\\server\\share\\a.jpg", "absolute"),
        ("C:\\images\\a.jpg", "absolute"),
        ("../a.jpg", "leads out"),
        ("images\\..\\..\\a.jpg", "leads out"),
    ],
)
def test_paths_out_of_the_folder_are_refused(text: str, wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        relative_path(text)


TABLE = 'name,note,size\nb\u00e9,"a, b; c",1.5\nc,"two\nlines",\n'
SPREADSHEETS = {
    "comma": TABLE,
    "semicolons": 'name;note;size\nb\u00e9;"a, b; c";1.5\nc;"two\nlines";\n',
    "tabs": 'name\tnote\tsize\nb\u00e9\ta, b; c\t1.5\nc\t"two\nlines"\t\n',
    "bars": 'name|note|size\nb\u00e9|a, b; c|1.5\nc|"two\nlines"|\n',
    "Excel's own line": 'sep=;\nname;note;size\nb\u00e9;"a, b; c";1.5\nc;"two\nlines";\n',
    "byte order mark": "\ufeff" + TABLE,
    "blank lines": "\n  \n" + TABLE + "\n,,\n  \n",
    "empty columns at the end": TABLE.replace("size\n", "size,,\n")
    .replace("1.5", "1.5,,")
    .replace('lines",', 'lines",,,'),
    "fields beyond the header": TABLE.replace("1.5", "1.5,,"),
    "letters taken apart": TABLE.replace("\u00e9", "e\u0301"),
}


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("text", SPREADSHEETS.values(), ids=SPREADSHEETS)
def test_what_spreadsheets_write_is_one_table(text: str, encoding: str, ends: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", text.replace("\n", ends).encode(encoding))
    file = read_label_file(path, ["name", "size"])
    notes = [value.replace("\r\n", "\n") for value in file.columns["note"]]
    assert (file.columns["name"], notes, file.columns["size"]) == (
        ["b\u00e9", "c"],
        ["a, b; c", "two\nlines"],
        ["1.5", ""],
    )
    assert (file.problems, file.notes) == ([], [])


def test_a_column_without_a_name_is_left_out_and_reported(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", ",a,b,\n0,x,y,\n1,z,,\n")  # pandas writes the index so
    file = read_label_file(path, ["a"])
    assert file.columns == {"a": ["x", "z"], "b": ["y", ""]}
    assert file.notes == [f"{path}: column 1 has no name and is left out"]


def test_bars_separate_fields_where_the_header_says_so(tmp_path: Path) -> None:
    file = read_label_file(write(tmp_path / "a.csv", 'name|note|size\na|"b|c, d;e"|1\n'), ["name", "size"])
    assert file.columns == {"name": ["a"], "note": ["b|c, d;e"], "size": ["1"]}
    file = read_label_file(write(tmp_path / "b.csv", "name,a|b|c|d\nx,1|2\n"), ["name"])
    assert file.columns == {"name": ["x"], "a|b|c|d": ["1|2"]}, "the column that must be there decides"


def test_apostrophes_that_guard_against_formulas_are_no_part_of_a_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "name,'=b\n'-bag,''=1\n'quoted',it's\n'-bag,-5\n")
    file = read_label_file(path, ["name", "=b"])
    assert file.columns == {"name": ["-bag", "'quoted'", "-bag"], "=b": ["'=1", "it's", "-5"]}
    assert file.notes == [
        f"{path}: an apostrophe before = + - or @ guards against formulas and is no part of the text; left out of "
        '2 texts, such as "\'-bag"'
    ]


def test_numbers_become_the_names_that_they_stand_for() -> None:
    assert label_texts(pa.array([1, None, -1, 0]), ["cup", "hat"], "here") == ["hat", "", "", "cup"]
    assert label_texts(pa.array([10, None, 2]), [], "here") == ["10", "", "2"]
    assert label_texts(pa.array([True, None]), [], "here") == ["True", ""]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_texts_are_names_without_spaces_around(kind: pa.DataType) -> None:
    assert label_texts(pa.array([" cup ", None, ""], type=kind), ["cup"], "here") == ["cup", "", ""]


def test_a_column_of_nothing_is_unknown() -> None:
    assert label_texts(pa.nulls(2), ["cup"], "here") == ["", ""]


def test_a_number_without_a_name_is_told_with_its_row() -> None:
    with pytest.raises(UserError, match=r"here: row 2 has the label 5, but there are 2 class names \(0 to 1\)"):
        label_texts(pa.array([0, 1, 5]), ["cup", "hat"], "here")


def test_other_types_are_no_classes() -> None:
    with pytest.raises(UserError, match="here: holds double, which is no class"):
        label_texts(pa.array([0.5]), [], "here")


def test_names_of_features() -> None:
    assert class_names_of(datasets.ClassLabel(names=["b", "a"])) == ["b", "a"]
    assert class_names_of(datasets.Value("int64")) == class_names_of(None) == []


def test_classes_that_are_numbers_are_ordered_by_size() -> None:
    frame = pd.DataFrame({"split": "train", target_column("class"): ["10", "", "2", "-1", "2"]})
    assert vocabularies(frame, {"class": "label"}, {}, Missing()) == {"class": ["-1", "2", "10"]}


def test_a_caption_is_one_line() -> None:
    assert first_text([" a\n red  cup ", "another"]) == "a red cup"
    assert first_text([]) == first_text(None) == ""
    assert first_text(7) == "7"


def test_pandas_ways_with_missing_values() -> None:
    numbers = pa.array([1.0, None, float("nan"), 0.0])
    assert label_texts(numbers, ["cup", "hat"], "here") == ["hat", "", "", "cup"]
    assert plain_texts(numbers) == ["1", "", "", "0"]
    assert plain_texts(pa.array([1.5, float("nan")])) == ["1.5", ""]
    assert label_texts(pa.array(["cup", None, "hat"]).dictionary_encode(), [], "here") == ["cup", "", "hat"]
    assert plain_texts(pa.array(["001", "1e3", "None", None, "cafe\u0301"])) == ["001", "1e3", "None", "", "caf\u00e9"]


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
    known = Vocabulary(VocabularyOptions(), missing).values("colour", VALUES)
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
    vocabulary = Vocabulary(VocabularyOptions(aliases=aliases), missing)
    assert vocabulary.values("colour", [" grey ", "n/a", "-", "?", "red"]) == ["gray", "", "", "", "red"]
    assert vocabulary.values("material", ["grey", "cap"]) == ["grey", "cap"]
    assert vocabulary.values("class", ["cap"]) == ["hat"]
    assert missing.counts == {"attribute colour": {"n/a": 1, "-": 1, "?": 1}}


def test_letters_in_two_unicode_forms_are_one_value() -> None:
    composed, taken_apart = "caf\u00e9", "cafe\u0301"
    assert Vocabulary(VocabularyOptions()).values("colour", [composed, taken_apart]) == [composed, composed]
    vocabulary = Vocabulary(VocabularyOptions(aliases={"colour": {taken_apart: "brown"}}))
    assert vocabulary.values("colour", [composed, taken_apart]) == ["brown", "brown"]


def test_aliases_of_an_attribute_that_does_not_exist_are_refused() -> None:
    vocabulary = Vocabulary(VocabularyOptions(aliases={"hue": {"grey": "gray"}}))
    with pytest.raises(UserError, match=r"aliases: labels.csv has no attribute 'hue'; it has class, colour"):
        vocabulary.check_aliases({"class": [], "colour": []}, "labels.csv")


def test_aliases_that_match_no_row_are_reported() -> None:
    vocabulary = Vocabulary(
        VocabularyOptions(aliases={"colour": {"grey": "gray", "gray2": "gray", "": "red"}, "class": {"a": "b"}})
    )
    (note,) = vocabulary.check_aliases({"class": ["a"], "colour": ["grey", " ", "x"]}, "labels.csv")
    assert note == "data vocabulary.aliases: no row of labels.csv has the colour 'gray2'; correct or remove it"


def test_vocabulary_files_keep_their_order_without_unknown_and_aliased_values(tmp_path: Path) -> None:
    write_team14(tmp_path, images=False)
    options = VocabularyOptions(source="files", aliases={"colour": {"white": "black"}})
    lists = Vocabulary(options, Missing(["unknown"])).from_files(tmp_path)
    assert lists["class"] == list(TEAM14_CLASSES)
    assert lists["colour"] == ["red", "blue", "green", "black", "yellow"]
    assert lists["condition"] == ["new", "used"]
    assert Vocabulary(VocabularyOptions(source="train")).from_files(tmp_path) == {}


def test_one_vocabulary_file_is_enough_but_none_is_not(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither classes.txt nor attributes.yaml"):
        Vocabulary(VocabularyOptions(source="files")).from_files(tmp_path)
    (tmp_path / "kinds.txt").write_text("b\n\na\n", encoding="utf-8")
    assert Vocabulary(VocabularyOptions(source="files", classes_file="kinds.txt")).from_files(tmp_path) == {
        "class": ["b", "a"]
    }


@pytest.mark.parametrize(
    ("options", "named"), [({"source": "test"}, "vocabulary.source"), ({"alias": {}}, "unknown key 'alias'")]
)
def test_mistaken_options_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        VocabularyOptions.of(options)


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


def find(root: str = "") -> Path:
    return locate(root, "things", "example.org/things", "things.csv next to images/")


def test_a_given_folder_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITRAIL_DATA", str(tmp_path / "elsewhere"))
    assert find(str(tmp_path)) == tmp_path


def test_a_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    assert find("~/mine") == tmp_path / "mine"


def test_the_variable_names_the_usual_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "things").mkdir()
    monkeypatch.setenv("VITRAIL_DATA", str(tmp_path))
    assert find() == tmp_path / "things"


@pytest.mark.parametrize("value", [None, ""])
def test_without_the_variable_it_is_below_data(
    value: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data" / "things").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VITRAIL_DATA", raising=False)
    if value is not None:
        monkeypatch.setenv("VITRAIL_DATA", value)
    assert find() == Path("data/things")


@pytest.mark.parametrize(("root", "asked"), [("", "$VITRAIL_DATA"), ("/nowhere/at/all", "data root")])
def test_a_missing_folder_is_told_with_the_way_to_it(
    root: str, asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VITRAIL_DATA", str(tmp_path))
    with pytest.raises(UserError) as error:
        find(root)
    message = str(error.value)
    assert message.startswith(asked)
    assert (root or str(tmp_path / "things")) in message
    for part in ("example.org/things", "things.csv next to images/", "VITRAIL_DATA"):
        assert part in message
    assert "\n" not in message


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "things.csv").write_text("a", encoding="utf-8")
    with pytest.raises(UserError, match="is a file"):
        find(str(tmp_path / "things.csv"))
