from __future__ import annotations

from pathlib import Path

import pytest

from datamodules.files.label_csv import Problems, read_label_file, read_text, relative_path
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
