"""The script that writes the tables of the documentation, on commands that only leave a run directory behind."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "docs" / "results.py"))
FIT = "python -m experiments fit --config tiny.yaml"
PAIR = """# Title

<!-- results: pair -->
nothing yet
<!-- /results: pair -->

between
"""
GUIDE = """<!-- results: again -->
<!-- /results: again -->
<!-- results: absent -->
an older table
<!-- /results: absent -->
the end
"""
CONTENT: dict[str, Any] = {
    "runs": {
        "one": {
            "command": f"{FIT} --test_best=true",
            "then": [
                {"command": "python -m retrieval index --run {run}", "makes": "gallery", "always": True},
                {
                    "command": "python -m experiments validate --ckpt_path {run}/checkpoints/best.ckpt",
                    "makes": "predictions/val.parquet",
                },
            ],
        },
        "pair": {"command": f"{FIT} --seed_everything {{seed}} --name pair", "for": {"seed": [1, 2]}},
        "again": {"command": "python -m experiments test --ckpt_path {one}/checkpoints/last.ckpt --name again"},
        "absent": {"command": f"{FIT} --model.pretrained $NOT_SET/weights.pth --name absent"},
        "away": {"command": f"{FIT} --name away", "needs": ["nowhere/labels.csv"]},
    },
    "tables": {
        "pair": {"command": "python -m evaluation summary {pair} {one} --markdown"},
        "again": {"command": "python -m evaluation summary {again} --markdown"},
        "absent": {"command": "python -m evaluation summary {absent} --markdown"},
    },
}


class Commands:
    """Runs nothing: a run leaves a directory with its record, a table prints its command."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ran = folder, list[list[str]]()
        self.fails_at: Callable[[Sequence[str]], bool] = lambda _: False

    def __call__(self, command: Sequence[str], output: Path | None) -> int:
        self.ran.append(list(command))
        if output is not None:
            output.write_text(f"| {' '.join(command)} |\n")
        elif "--runs" in command:
            name = command[command.index("--name") + 1] if "--name" in command else "tiny"
            folder = Path(command[command.index("--runs") + 1]) / name
            run = folder / f"{len([*folder.glob('*')])}"
            if not any("--ckpt_path=" in token for token in command):
                (run / "checkpoints").mkdir(parents=True)
                (run / "checkpoints" / "last.ckpt").touch()
                (run / "run.json").write_text(json.dumps({"git": {"revision": "abcdef0123", "changed_files": []}}))
        elif "--ckpt_path" in command:
            made = Path(command[-1]).parents[1] / "predictions" / {"test": "test", "validate": "val"}[command[1]]
            made.parent.mkdir(exist_ok=True)
            made.with_suffix(".parquet").touch()
        return int(self.fails_at(command))

    def main(self, *arguments: str) -> int:
        """Run the script, and return its exit code."""
        self.ran.clear()
        return int(SCRIPT["main"](["--file", "results.yaml", *arguments], self))


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text("trainer: {max_epochs: 1}\n")
    Path("docs/results").mkdir(parents=True)
    Path("docs/results/pair.md").write_text(PAIR)
    Path("docs/guide.md").write_text(GUIDE)
    Path("results.yaml").write_text(yaml.safe_dump(CONTENT, sort_keys=False))
    return Commands(tmp_path)


def part(page: str, name: str) -> str:
    (found,) = re.findall(rf"<!-- results: {name} -->\n(.*)<!-- /results: {name} -->", Path(page).read_text(), re.S)
    return str(found)


def test_tables_go_between_their_markers(commands: Commands, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main() == 0
    pair = part("docs/results/pair.md", "pair")
    assert "| evaluation summary runs/results/pair/0 runs/results/pair/1 runs/results/tiny/0 --markdown |" in pair
    assert "Revision of the runs: abcdef0." in pair
    assert "summary runs/results/again/* --markdown" in part("docs/guide.md", "again")
    assert part("docs/guide.md", "absent") == "an older table\n"
    assert Path("docs/results/pair.md").read_text().startswith("# Title\n\n<!--")
    assert Path("docs/results/pair.md").read_text().endswith("-->\n\nbetween\n")
    printed = capsys.readouterr().out
    assert "absent: left as it is: $NOT_SET is not set" in printed or "absent: $NOT_SET is not set" in printed
    assert "away: left out: nowhere/labels.csv does not exist" in printed
    assert commands.main("--list") == 0
    assert commands.ran == []


def test_the_commands_shown_are_those_that_were_run(commands: Commands, tmp_path: Path) -> None:
    """A shell reads them; instead of Python it finds a program that notes what it is asked for."""
    assert commands.main() == 0
    text = Path("docs/results/pair.md").read_text() + Path("docs/guide.md").read_text()
    shown = "".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL))
    (tmp_path / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$*" >> notes\n')
    (tmp_path / "python").chmod(0o755)
    subprocess.run(["bash", "-e", "-c", shown], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, check=True)
    noted = {
        line.removeprefix("-m ").replace("RUN", "runs/results/tiny/0")
        for line in Path("notes").read_text().splitlines()
    }
    ran = {" ".join(command) for command in commands.ran}
    assert {
        line for line in ran if "experiments test --ckpt_path runs/results/tiny/0/checkpoints/best" not in line
    } == noted


def test_a_finished_run_is_made_again_only_after_a_change(commands: Commands) -> None:
    commands.main()
    before = Path("docs/results/pair.md").read_text()
    assert commands.main() == 0
    assert [command[1] for command in commands.ran if command[1] != "summary"] == ["index"]
    assert Path("docs/results/pair.md").read_text() == before
    Path("tiny.yaml").write_text("trainer: {max_epochs: 2}\n")
    assert commands.main("--only", "pair") == 0
    assert [command[1] for command in commands.ran].count("fit") == 3


def test_an_interrupted_run_is_resumed_in_its_own_directory(commands: Commands) -> None:
    commands.fails_at = lambda command: command[1] == "fit" and "2" in command
    assert commands.main("--only", "pair") == 1
    assert part("docs/results/pair.md", "pair") == "nothing yet\n"
    commands.fails_at = lambda _: False
    assert commands.main("--only", "pair") == 0
    (fit,) = [command for command in commands.ran if command[1] == "fit"]
    assert fit[-1] == "--ckpt_path=runs/results/pair/1/checkpoints/last.ckpt"
    assert sorted(path.name for path in Path("runs/results/pair").iterdir()) == ["0", "1"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"run": {}}, "unknown key 'run'"),
        ({"runs": {"one": {"command": FIT, "seeds": 1}}}, "runs.one: needs command, may have"),
        ({"runs": {"one": {"command": f"{FIT} {{two}}"}}}, "{two} is not a run listed before it"),
        ({"tables": {"none": {"command": "python -m evaluation summary x"}}}, "needs <!-- results: none --> once"),
    ],
)
def test_mistakes_are_refused_before_anything_runs(
    commands: Commands, change: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("results.yaml").write_text(yaml.safe_dump({**CONTENT, **change}, sort_keys=False))
    assert commands.main() == 2
    assert message in capsys.readouterr().err
    assert commands.ran == []


def test_every_table_of_results_has_its_command_and_its_scores_have_n_and_interval() -> None:
    wanted = ("accuracy", "macro F1", "R@1", "median rank", "mAP", "P@5", ", test (", ", val (")
    tables = 0
    for page in sorted((ROOT / "docs").rglob("*.md")):
        for name, text in re.findall(r"<!-- results: (\w+) -->\n(.*?)<!-- /results", page.read_text(), re.S):
            if not text:
                continue  # not made yet: it has no number
            tables += 1
            assert "```bash\npython -m " in text or "```bash\nfor " in text, name
            [head, *_] = re.findall(r"^(\| .*)\n\| ---", text, re.M)
            columns = [column.strip() for column in head.strip("|").split("|")]
            scores = [one for one in columns if any(part in one for part in wanted) and "agrees" not in one]
            above = re.findall(r"^\d[\d,]* queries in \d+ groups, .*; mean \[95 %\]$", text, re.M)
            if scores and not above:
                assert all("[95 %]" in one or "± sd" in one for one in scores), name
                assert "n" in columns or all("(n " in one for one in scores), name
    assert tables > 15


def test_the_projects_own_file_can_be_read(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    assert SCRIPT["main"](["--list", "--long"]) == 0
    printed = capsys.readouterr().out
    file = yaml.safe_load(Path("docs/results.yaml").read_text())
    assert len(printed.splitlines()) == len(file["runs"]) + len(file["tables"])
    commands = " ".join(part["command"] for section in file.values() for part in section.values())
    assert all(Path(path).is_file() for path in re.findall(r"--config (\S+)", commands))
