"""Tests of the file that says how results are made: mistakes in it, and the project's own."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from experiments.launch.results import FILE, main, read_results
from tests.experiments.results_commands import FIT, ROOT, refuses

TABLE = {"t": {"command": "python -m evaluation summary {one}"}}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"run": {}}, "unknown key 'run'"),
        ({"runs": {"one": {"command": FIT}}}, "tables: is empty"),
        ({"runs": {"one": {"command": FIT, "seeds": 1}}, "tables": TABLE}, "runs.one: unknown key 'seeds'"),
        ({"runs": {"one": {"command": "python train.py --config x"}}, "tables": TABLE}, "runs.one.command: must be"),
        ({"runs": {"one": {"command": "python -m experiments fit -x"}}, "tables": TABLE}, "neither --config nor"),
        ({"runs": {"one": {"command": "python -m evaluation summary x"}}, "tables": TABLE}, "must begin with"),
        ({"runs": {"one": {"command": FIT, "for": {"fold": [1, 2]}}}, "tables": TABLE}, "would all be the same"),
        ({"runs": {"one": {"command": f"{FIT} {{two}}"}}, "tables": TABLE}, "{two} is the name of no run before it"),
        ({"runs": {"one": {"command": FIT, "then": [{"command": "x"}]}}, "tables": TABLE}, "then[0]: needs command:"),
        ({"runs": {"two": {"command": FIT}}, "tables": TABLE}, "{one} is the name of no run"),
    ],
)
def test_mistakes_in_the_file_are_told(
    content: dict[str, object], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(content))
    assert main([str(tmp_path / "wrong.yaml")], refuses) == 2
    assert says in capsys.readouterr().err


def test_the_projects_own_file_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    file = read_results(FILE)
    commands = [entry.command for entry in file.entries.values()] + [table.command for table in file.tables.values()]
    configs = [after for command in commands for token, after in pairwise(command) if token == "--config"]
    assert configs
    assert all(Path(config).is_file() for config in configs)
    used = {entry.name for table in file.tables.values() for entry in file.entries_of(table.command)}
    assert set(file.entries) - used <= {"flickr8k_regnetx_minilm"}
