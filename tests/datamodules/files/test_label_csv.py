from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

from datamodules.files.columns import first_text, label_texts, plain_texts, vocabularies
from datamodules.files.label_csv import (
    Vocabulary,
    VocabularyOptions,
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
from tests.support.data import TEAM14_CLASSES, write_team14
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


@pytest.mark.parametrize(
    ("content", "first_column", "problems"),
    [
        (b"a,b\n1,2\n3\n4,5,6\n7,8\n", ["1", "7"], [(3, "1 fields where the header has 2"), (4, "3 fields where")]),
        (b"a,b\n1,caf\xe9\n2,fine\n3,\xff\n", ["1", "2", "3"], [(2, "is not UTF-8 (byte 0xe9"), (4, "is not UTF-8")]),
        (b'a,b\n1,2\n3,"4\n5,6\n', ["1"], [(3, "unexpected end of data; look for a stray quote")]),
    ],
)
def test_problems_are_gathered_by_row(content: bytes, first_column: Any, problems: Any, tmp_path: Path) -> None:
    file = read_label_file(write(tmp_path / "a.csv", content), ["a"])
    assert file.columns["a"] == first_column
    assert [row for row, _ in file.problems] == [row for row, _ in problems]
    for (_, found), (_, expected) in zip(file.problems, problems, strict=True):
        assert found.startswith(expected)


def test_files_without_the_columns_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "labels_fixed.csv", "a,b,b\n1,2,3\n")
    with pytest.raises(UserError, match=r"missing column x, y; the header has a, b, b"):
        read_label_file(path, ["a", "x", "y"])
    with pytest.raises(UserError, match="column b occurs twice"):
        read_label_file(path, ["a"])
    with pytest.raises(UserError, match="the header has nothing"):
        read_label_file(write(path, ""), ["a"])
    with pytest.raises(UserError, match=r"labels.csv: cannot be read .* has labels_fixed.csv"):
        read_text(tmp_path / "labels.csv", [])
    with pytest.raises(UserError, match="broken UTF-16"):
        read_text(write(tmp_path / "wide.csv", "a,b".encode("utf-16")[:-1]), [])


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


@pytest.mark.parametrize(
    ("column", "names", "texts"),
    [
        (pa.array([1, None, -1, 0]), ["cup", "hat"], ["hat", "", "", "cup"]),
        (pa.array([10, None, 2]), [], ["10", "", "2"]),
        (pa.array([1.0, None, float("nan"), 0.0]), ["cup", "hat"], ["hat", "", "", "cup"]),  # as pandas writes them
        (pa.array([True, None]), [], ["True", ""]),
        (pa.array([" cup ", None, ""], pa.string()), ["cup"], ["cup", "", ""]),
        (pa.array([" cup ", None, ""], pa.large_string()), ["cup"], ["cup", "", ""]),
        (pa.array(["cup", None, "hat"]).dictionary_encode(), [], ["cup", "", "hat"]),
        (pa.nulls(2), ["cup"], ["", ""]),
    ],
)
def test_columns_of_labels_become_texts(column: pa.Array, names: list[str], texts: list[str]) -> None:
    assert label_texts(column, names, "here") == texts


def test_numbers_without_a_name_and_other_types_are_refused() -> None:
    with pytest.raises(UserError, match=r"here: row 2 has the label 5, but there are 2 class names \(0 to 1\)"):
        label_texts(pa.array([0, 1, 5]), ["cup", "hat"], "here")
    with pytest.raises(UserError, match="here: holds double, which is not a class"):
        label_texts(pa.array([0.5]), [], "here")


def test_classes_that_are_numbers_are_ordered_by_size() -> None:
    frame = pd.DataFrame({"split": "train", target_column("class"): ["10", "", "2", "-1", "2"]})
    assert vocabularies(frame, {"class": "label"}, {}, Missing()) == {"class": ["-1", "2", "10"]}


def test_a_caption_is_one_line() -> None:
    assert first_text([" a\n red  cup ", "another"]) == "a red cup"
    assert first_text([]) == first_text(None) == ""
    assert first_text(7) == "7"


def test_plain_texts_of_numbers_and_texts() -> None:
    assert plain_texts(pa.array([1.0, None, float("nan"), 0.0])) == ["1", "", "", "0"]
    assert plain_texts(pa.array([1.5, float("nan")])) == ["1.5", ""]
    assert plain_texts(pa.array(["001", "1e3", "None", None, "cafe\u0301"])) == ["001", "1e3", "None", "", "caf\u00e9"]


def test_attributes_are_parsed_in_their_order() -> None:
    values, wrong = parse_attributes("size:large; Color : dark red ;material:;note:a:b;")
    assert list(values.items()) == [("size", "large"), ("colour", "dark red"), ("material", ""), ("note", "a:b")]
    assert wrong == []
    assert parse_attributes("  ") == parse_attributes(";") == ({}, [])


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
def test_malformed_attributes_are_one_problem_each(text: str, wrong: str) -> None:
    [problem] = parse_attributes(text)[1]
    assert wrong in problem


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
    assert [value for value in known if value] == [
        text for text in VALUES[2:] if text.lower() not in {given.strip().lower() for given in texts}
    ]
    assert sum(missing.counts.get("attribute colour", {}).values()) == unknown - 2, "empty cells need no mention"


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


def test_aliases_that_match_nothing_are_reported_or_refused() -> None:
    vocabulary = Vocabulary(VocabularyOptions(aliases={"hue": {"grey": "gray"}}))
    with pytest.raises(UserError, match=r"aliases: labels.csv has no attribute 'hue'; it has class, colour"):
        vocabulary.check_aliases({"class": [], "colour": []}, "labels.csv")
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


def test_classes_that_occur_twice_are_refused_by_row(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"txt:3: class 'a' again, first in row 1\n.*txt:4: class 'b' again, .* row 2"):
        read_classes_file(write(tmp_path / "classes.txt", "a\nb\na\nb"))


def test_yaml_values_stay_texts(tmp_path: Path) -> None:
    path = write(tmp_path / "attributes.yaml", "---\nColor:\n- off\n- no\n- 1\n- 'null'\n")
    assert read_attributes_file(path) == {"colour": ["off", "no", "1", "null"]}


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("- red\n", "must hold lists of values by attribute"),
        ("", "must hold lists of values by attribute"),
        ("size: [a]\ncolour: red\n", ":2: 'colour' must hold a list"),
        ("colour: [[a]]\n", "'colour' must hold a list"),
        ("colour: [a]\nsize: [s]\ncolor: [b]\n", ":3: attribute 'colour' occurs twice"),
        ("colour: [a]\ncolour: [b]\n", ":2: attribute 'colour' occurs twice"),
        ("colour: [a\n", "is not YAML"),
    ],
)
def test_malformed_attribute_files_are_refused_in_one_line(text: str, wrong: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        read_attributes_file(write(tmp_path / "attributes.yaml", text))
    assert wrong in str(error.value)
    assert "\n" not in str(error.value)


def find(root: str = "") -> Path:
    return locate(root, "things", "example.org/things", "things.csv next to images/")


@pytest.mark.parametrize(
    ("variable", "root", "found"),
    [("elsewhere", "~/mine", "mine"), ("data", "", "data/things"), (None, "", "data/things"), ("", "", "data/things")],
)
def test_a_data_set_is_where_the_user_the_variable_or_the_default_says(
    variable: str | None, root: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / found).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("VITRAIL_DATA", raising=False)
    if variable is not None:
        monkeypatch.setenv("VITRAIL_DATA", variable)
    assert find(root).absolute() == tmp_path / found


@pytest.mark.parametrize(("root", "asked"), [("", r"\$VITRAIL_DATA"), ("/nowhere/at/all", "data root")])
def test_a_missing_folder_is_refused_with_a_hint(
    root: str, asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VITRAIL_DATA", str(tmp_path))
    folder = root or tmp_path / "things"
    hint = r"get the data from example.org/things, .* things.csv next to images/, .*\$VITRAIL_DATA"
    with pytest.raises(UserError, match=rf"^{asked}: there is no folder {folder}; {hint}[^\n]*$"):
        find(root)
    with pytest.raises(UserError, match="is a file"):
        find(str(write(tmp_path / "things.csv", "a")))
