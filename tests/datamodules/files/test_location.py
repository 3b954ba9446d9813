from __future__ import annotations

from pathlib import Path

import pytest

from datamodules.files.label_csv import locate
from vitrail.errors import UserError


def find(root: str = "") -> Path:
    return locate(root, "things", "example.org/things", "things.csv beside images/")


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
    for part in ("example.org/things", "things.csv beside images/", "VITRAIL_DATA"):
        assert part in message
    assert "\n" not in message


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "things.csv").write_text("a", encoding="utf-8")
    with pytest.raises(UserError, match="is a file"):
        find(str(tmp_path / "things.csv"))
