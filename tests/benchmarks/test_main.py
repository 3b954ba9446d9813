from __future__ import annotations

import ast
import json
import math
import re
import subprocess
from pathlib import Path

import pytest

import benchmarks.__main__ as command
from benchmarks.harness.interleaved import Row

PAGE = f"# Page\n\ntext\n\n{command.BEGIN}old table\n{command.END}\nafter\n"
KEPT = Row("step", "ours", "theirs", 1.0, 0.9, 1.1, "s", "≥ 0.98", "1 : 1 s")
MISSED = Row("memory", "ours", "theirs", 2.0, 1.9, 2.1, "MB", "≤ 1.1", "2 : 1 MB")
NOTHING = Row("GPU", "ours", "theirs", math.nan, math.nan, math.nan, "s", "≥ 0.95", "not measured: no GPU")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "README.md").write_text(PAGE, encoding="utf-8")
    monkeypatch.setattr(command, "FOLDER", tmp_path)
    fakes = {"kept": lambda _: [KEPT, NOTHING], "missed": lambda repeats: [MISSED] * repeats}
    monkeypatch.setattr(command, "found_benchmarks", lambda: fakes)
    return tmp_path


def test_every_benchmark_is_found() -> None:
    found = command.found_benchmarks()
    wanted = {"training.allocator", "training.gradient_cache", "training.gpu", "data.growth", "training.step"}
    assert wanted <= set(found)
    assert not [name for name in found if name.startswith("harness.")]


def test_the_table_stands_between_its_lines(folder: Path) -> None:
    assert command.main(["kept", "--repeats", "1"]) == 0
    page = (folder / "README.md").read_text(encoding="utf-8")
    assert page.startswith(f"# Page\n\ntext\n\n{command.BEGIN}")
    assert page.endswith(f"{command.END}\nafter\n")
    assert "old table" not in page
    assert "`python -m benchmarks kept --repeats 1`" in page
    assert "| step | ours | theirs | 1.000 [0.900, 1.100] | ≥ 0.98: kept | 1 : 1 s |" in page
    assert "| GPU | ours | theirs | – | ≥ 0.95 | not measured: no GPU |" in page


def test_results_of_the_others_stay(folder: Path) -> None:
    assert command.main(["kept", "--repeats", "1"]) == 0
    # A promise that is missed shows in the exit code too.
    assert command.main(["missed", "--repeats", "2"]) == 1
    page = (folder / "README.md").read_text(encoding="utf-8")
    assert page.count("| step |") == 1
    assert page.count("| memory | ours | theirs | 2.000 [1.900, 2.100] | ≤ 1.1: missed |") == 2
    assert command.main(["missed", "--repeats", "1"]) == 1
    assert (folder / "README.md").read_text(encoding="utf-8").count("| memory |") == 1
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert set(results) == {"kept", "missed"}
    assert results["kept"]["rows"][1]["ratio"] is None


def test_without_names_everything_is_measured(folder: Path) -> None:
    assert command.main(["--repeats", "1", "--dry-run"]) == 1
    assert not (folder / "results.json").exists()
    assert command.main(["--repeats", "1"]) == 1
    assert set(json.loads((folder / "results.json").read_text(encoding="utf-8"))) == {"kept", "missed"}


def test_nothing_is_lost_when_the_page_lacks_its_lines(folder: Path) -> None:
    (folder / "README.md").write_text("# Page\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"README\.md: needs one line <!-- results: begin -->"):
        command.main(["kept"])
    assert sorted(path.name for path in folder.iterdir()) == ["README.md"]


@pytest.mark.parametrize("arguments", [["speed"], ["--repeats", "0"]])
def test_mistakes_are_refused(arguments: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2
    assert re.search("NAME: must be one of .*got 'speed'|--repeats: must be at least 1", capsys.readouterr().err)
    assert not (folder / "results.json").exists()


def test_the_page_of_this_repository_has_its_lines() -> None:
    page = (command.FOLDER / "README.md").read_text(encoding="utf-8")
    assert command.with_table(page, {}).count(command.BEGIN) == 1


def test_what_runs_a_module_is_its_last_statement() -> None:
    """Else names that are defined further down do not exist yet when the module runs as a process."""
    root = Path(__file__).parents[2]
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=root, capture_output=True, text=True, check=True).stdout
    wrong = []
    for name in listed.split():
        source = (root / name).read_text(encoding="utf-8")
        statements = ast.parse(source).body if "__name__ ==" in source else []
        conditions = {number: ast.unparse(one.test) for number, one in enumerate(statements) if isinstance(one, ast.If)}
        guards = [number for number, condition in conditions.items() if condition.startswith("__name__ ==")]
        if guards and guards[-1] != len(statements) - 1:
            wrong.append(name)

    assert not wrong
