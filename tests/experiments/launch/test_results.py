"""Results on generated images: runs in this process, and a README of their own.

Tests of the file that says how results are made: mistakes in it, and the project's own.

Commands in processes of their own.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from evaluation.tables.summary import markdown_table, summarise_run
from experiments.launch.results import FILE, find_run, main, read_results, run_process
from tests.experiments.conftest import TINY
from tests.experiments.results_commands import FIT, ROOT, InProcess, refuses

EXPERIMENT = TINY.replace("name: tiny\n", "").replace("MultiTask", "Image")
SHORT = EXPERIMENT.replace("max_epochs: 2", "max_epochs: 1")
README = """# Title

<!-- results: pair -->
nothing yet
<!-- /results: pair -->

between

<!-- results: again -->
<!-- /results: again -->

<!-- results: absent -->
an older table
<!-- /results: absent -->
the end
"""
RESULTS = {
    "runs": {
        "one": {
            "command": FIT,
            "then": [
                {
                    "command": "python -m experiments validate --ckpt_path {run}/checkpoints/best.ckpt",
                    "makes": "predictions/val.parquet",
                }
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("results")
    (folder / "tiny.yaml").write_text(SHORT)
    (folder / "results.yaml").write_text(yaml.safe_dump(RESULTS, sort_keys=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VITRAIL_CACHE", str(folder / "cache"))
        patch.delenv("NOT_SET", raising=False)
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def made(folder: Path) -> InProcess:
    (folder / "README.md").write_text(README)
    runner = InProcess()
    assert main(["results.yaml"], runner) == 0
    return runner


def write(folder: Path, runs: dict[str, object], table: str) -> None:
    """A results file with one table, and its README."""
    content = {"runs": runs, "tables": {"pair": {"command": table}}}
    (folder / "results.yaml").write_text(yaml.safe_dump(content))
    (folder / "README.md").write_text(README)


def part(readme: Path, name: str) -> str:
    (found,) = re.findall(rf"<!-- results: {name} -->\n(.*)<!-- /results: {name} -->", readme.read_text(), re.DOTALL)
    return str(found)


def test_the_readme_has_what_the_commands_print(made: InProcess, folder: Path) -> None:
    runs = [*sorted((folder / "runs/results/pair").glob("*")), *(folder / "runs/results/tiny").glob("*")]
    assert len(runs) == 3
    table = markdown_table([row for run in runs for row in summarise_run(run)])
    assert table in part(folder / "README.md", "pair")
    assert "| again/" in part(folder / "README.md", "again")
    text = (folder / "README.md").read_text()
    assert [text.startswith("# Title\n\n<!--"), "\n\nbetween\n\n" in text, text.endswith("-->\nthe end\n")] == [
        True
    ] * 3
    assert part(folder / "README.md", "absent") == "an older table\n"


def test_the_commands_shown_are_those_that_were_run(made: InProcess, folder: Path, tmp_path: Path) -> None:
    """A shell reads them; instead of Python it finds a program that notes what it is asked for."""
    shown = "".join(re.findall(r"```\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL))
    (tmp_path / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$*" >> "$NOTES"\n')
    (tmp_path / "python").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "NOTES": str(tmp_path / "notes")}
    subprocess.run(["bash", "-e", "-c", shown], cwd=folder, env=environment, check=True)
    noted = {line.removeprefix("-m ") for line in (tmp_path / "notes").read_text().splitlines()}
    (one,) = (folder / "runs/results/tiny").glob("*")
    ran = {
        " ".join(command).replace(f"{one.relative_to(folder)}/checkpoints/best", "RUN/checkpoints/best")
        for command in made.commands
    }
    assert {line.replace("tiny/*", f"tiny/{one.name}") for line in noted} == ran


def test_nothing_is_made_twice(made: InProcess, folder: Path) -> None:
    before = (folder / "README.md").read_text()
    runner = InProcess()
    assert main(["results.yaml"], runner) == 0
    assert [command[:2] for command in runner.commands] == [["evaluation", "summary"]] * 2
    assert (folder / "README.md").read_text() == before


def test_what_is_not_there_is_told(
    made: InProcess, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert main(["results.yaml", "--list"], InProcess()) == 0
    said = capsys.readouterr().out
    assert "$NOT_SET is not set" in said
    assert "nowhere/labels.csv is not there" in said
    assert "absent cannot be made: $NOT_SET is not set" in said
    assert main(["results.yaml", "--only", "absent"], InProcess()) == 0
    assert "absent: left as it is: absent cannot be made" in capsys.readouterr().out


def test_a_run_made_by_hand_counts_until_the_experiment_changes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(SHORT)
    command = ["fit", "--config", "tiny.yaml", "--model.init_args.lr=2e-3", "--trainer.enable_model_summary=false"]
    assert InProcess()(["experiments", *command], tmp_path / "log" / "fit.log", threading.Event()) == 0
    (run,) = (tmp_path / "runs" / "tiny").glob("*")
    asked = ["fit", "--config", "tiny.yaml", "--model.lr", "0.002", "--test_best=true"]
    assert find_run(asked, [Path("runs")]) == run.relative_to(tmp_path)
    assert find_run([*asked[:-2], "0.003"], [Path("runs")]) is None
    assert find_run(asked[:3], [Path("runs")]) is None
    for before, after in (("n_samples: 60", "n_samples: 61"), ("max_epochs: 1", "max_epochs: 2")):
        text = (tmp_path / "tiny.yaml").read_text()
        (tmp_path / "tiny.yaml").write_text(text.replace(before, after))
        assert find_run(asked, [Path("runs")]) is None
        (tmp_path / "tiny.yaml").write_text(text)
    # It was never tested, so that alone is done, and the run stays where it is.
    runs: dict[str, object] = {"a": {"command": "python -m experiments " + shlex.join(asked)}}
    write(tmp_path, runs, "python -m evaluation summary {a} --markdown")
    runner = InProcess()
    assert main(["results.yaml"], runner) == 0
    assert [command[1] for command in runner.commands] == ["test", "summary"]
    assert "--runs" not in part(tmp_path / "README.md", "pair")


def test_a_stopped_run_goes_on_in_its_own_directory(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(EXPERIMENT)
    write(tmp_path, {"one": {"command": FIT}}, "python -m evaluation summary {one} --markdown")
    assert main(["results.yaml"], InProcess(stops=True)) == 0
    assert (tmp_path / "README.md").read_text() == README
    (run,) = (tmp_path / "runs" / "results" / "tiny").glob("*")
    # Its files as a process leaves them that was killed after its first epoch.
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["trainer"]["max_epochs"], config["test_best"] = 2, True
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "run.json").write_text((run / "run.json").read_text().replace('"exit": "finished"', '"exit": "unfinished"'))
    runner = InProcess()
    assert main(["results.yaml"], runner) == 0
    (fit,) = runner.fits
    assert Path(fit[fit.index("--ckpt_path") + 1]).resolve() == run / "checkpoints" / "last.ckpt"
    assert list((tmp_path / "runs" / "results" / "tiny").glob("*")) == [run]
    assert f"| tiny/{run.name} |" in part(tmp_path / "README.md", "pair")


def test_a_command_that_fails_leaves_the_table_and_is_told(
    made: InProcess, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = {**RESULTS, "tables": {"pair": {"command": "python -m evaluation summary {one} --split none"}}}
    (folder / "wrong.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    readme = tmp_path / "other.md"
    readme.write_text(README)
    assert main(["wrong.yaml", "--readme", str(readme), "--tables-only"], InProcess()) == 1
    assert readme.read_text() == README
    told = capsys.readouterr()
    assert "pair: left as it is: its command failed" in told.out
    assert "as told above" in told.err


def test_the_other_seeds_of_a_run_that_was_refused_are_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.yaml").write_text(SHORT)
    monkeypatch.chdir(tmp_path)
    refused = {"command": f"{FIT} --data.nothing 1 --seed_everything {{seed}} --name a", "for": {"seed": [1, 2, 3]}}
    write(
        tmp_path,
        {"a": refused, "b": {"command": f"{FIT} --data.nothing 1 --name b"}},
        "python -m evaluation summary {a}",
    )
    runner = InProcess()
    assert main(["results.yaml"], runner) == 1
    assert [command[command.index("--name") + 1] for command in runner.fits] == ["a", "b"]
    told = capsys.readouterr().err
    assert told.count("not begun, because a-seed1 was refused") == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "needs <!-- results: pair --> once"),
        (README.replace("<!-- /results: pair -->", ""), "needs <!-- results: pair --> once"),
        (README + "<!-- results: pair -->", "needs <!-- results: pair --> once"),
    ],
)
def test_a_readme_without_a_place_is_refused_before_anything_runs(
    folder: Path, tmp_path: Path, text: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "README.md").write_text(text)
    assert main(["results.yaml", "--readme", str(tmp_path / "README.md"), "--runs", str(tmp_path)], refuses) == 2
    assert says in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_command_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny.yaml").write_text(EXPERIMENT.replace("max_epochs: 2", "max_epochs: 60"))
    write(tmp_path, {"one": {"command": FIT}}, "python -m evaluation summary {one} --markdown")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "VITRAIL_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "experiments", "results", "results.yaml"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment) as killed:
        while not list(tmp_path.glob("runs/results/tiny/*/checkpoints/last.ckpt")):
            assert killed.poll() is None
            time.sleep(0.2)
        killed.kill()
    assert (tmp_path / "README.md").read_text() == README
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    (run,) = (tmp_path / "runs" / "results" / "tiny").glob("*")
    stages = json.loads((run / "run.json").read_text())["stages"]
    assert [stage["exit"] for stage in stages if stage["stage"] == "fit"][1:] == ["finished"]
    assert f"| tiny/{run.name} |" in part(tmp_path / "README.md", "pair")


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


def test_a_process_ends_when_asked_to(tmp_path: Path) -> None:
    stop, beats = threading.Event(), []

    def beat() -> None:
        beats.append(True)
        stop.set()

    assert (
        run_process(["timeit", "-n1", "-r1", "import time; time.sleep(60)"], tmp_path / "a.log", stop, beat=beat) != 0
    )
    assert beats == [True]
    assert run_process(["calendar", "2026", "1"], tmp_path / "b.log", threading.Event(), tmp_path / "b.out") == 0
    assert "January 2026" in (tmp_path / "b.out").read_text()
    assert (tmp_path / "b.log").read_text() == ""
