"""The table of commands: every one is listed, describes itself, and is called as it is written now or was before."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from vitrail import programs
from vitrail.programs import PROGRAMS, Command, Program, hyphenated, main, packaged_config, underscored
from vitrail.trust import plugins

COMMANDS = [(program, name) for program, group in PROGRAMS.items() for name in group.commands]


def ran(call: Callable[[], int]) -> int:
    """Return the exit code, also of a parser that ends the process."""
    try:
        return call()
    except SystemExit as ended:
        return int(ended.code or 0)


def test_no_two_commands_have_the_same_name() -> None:
    assert max(Counter(name for _, name in COMMANDS).values()) == 1
    assert all(name == name.lower().replace("_", "-") for _, name in COMMANDS)


@pytest.mark.parametrize(("program", "name"), COMMANDS)
def test_every_command_describes_itself(program: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--help"] if program == "app" else [name, "--help"]
    assert ran(lambda: main(program, arguments)) == 0
    usage = f"usage: python -m {program}" if program == "app" else f"usage: python -m {program} "
    printed = capsys.readouterr().out
    assert printed.startswith(usage)
    assert name in printed


@pytest.mark.parametrize("program", [*PROGRAMS, "vitrail"])
def test_help_lists_every_command_and_loads_nothing_heavy(program: str) -> None:
    heavy = "torch", "matplotlib", "sklearn", "lightning", "pandas", "lancedb", "jsonargparse", "rich"
    code = (
        f"import sys; from {program}.__main__ import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        f"print('loaded:', *[name for name in {heavy!r} if name in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines()[-1] == "loaded:"
    if program != "app":
        assert all(f"  {name} " in printed for own, name in COMMANDS if program in (own, "vitrail"))


def test_help_of_commands_is_quick() -> None:
    names = [name for group in PROGRAMS.values() for name in group.commands]
    code = (
        "import sys; from vitrail.programs import main\n"
        f"for name in {names!r}:\n"
        "    try: main('vitrail', [name, '--help'])\n    except SystemExit: pass\n"
        "    print('loaded:', name, *{'torch', 'matplotlib', 'sklearn', 'pandas'} & {*sys.modules})"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert [line for line in printed.splitlines() if line.startswith("loaded:")] == [
        f"loaded: {name}" for name in names
    ]


def test_the_console_script_is_this_one() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, function = project["scripts"]["vitrail"].split(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_the_version_is_that_of_the_distribution(capsys: pytest.CaptureFixture[str]) -> None:
    assert [main(program, ["--version"]) for program in ("vitrail", "experiments", "app")] == [0, 0, 0]
    assert len(set(capsys.readouterr().out.splitlines())) == 1


def test_names_are_those_that_the_user_called(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/vitrail"])
    assert ran(lambda: main("vitrail", ["summary", "--help"])) == 0
    assert capsys.readouterr().out.startswith("usage: vitrail summary ")
    assert ran(lambda: main("vitrail", ["app", "--help"])) == 0
    assert capsys.readouterr().out.startswith("usage: vitrail app ")


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        ("evaluation", ["dance"], "unknown command 'dance'; must be one of summary, report"),
        ("vitrail", ["sumary"], "unknown command 'sumary'; did you mean summary?"),
        ("retrieval", [], "usage: python -m retrieval "),
        ("retrieval", ["info"], "the following arguments are required: --gallery"),
        ("evaluation", ["summary", "run", "--nonsense"], "unknown argument '--nonsense'"),
        ("evaluation", ["summary", "run", "--data.init_args.seed", "1"], "unknown argument '--data.init_args.seed'"),
        ("evaluation", ["summary", "run", "--split", "../x"], "--split"),
        ("retrieval", ["info", "--gallery", "s3://key:secret@b/g"], "--gallery: s3://key:***@b/g has a password"),
        ("experiments", ["fit", "--a.b=https://key:secret@b/g"], "--a.b: https://key:***@b/g has a password"),
    ],
)
def test_mistakes_end_with_code_2(
    program: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ran(lambda: main(program, arguments)) == 2
    assert message in capsys.readouterr().err


def test_former_spellings_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(programs, "PROGRAMS", {"p": Program("", {"a-b": Command("math:hypot", "")})})
    monkeypatch.setattr("math.hypot", calls.append)
    assert main("p", ["a_b", "--image_size=4", "--seed_everything", "1", "--", "--test_best"]) == 0
    assert calls == [["--image-size=4", "--seed_everything", "1", "--", "--test_best"]]


def test_options_are_written_as_their_parser_has_them() -> None:
    data = "--data.init_args.n_samples=3"
    assert hyphenated([data, "--long_tail", "a_b"]) == [data, "--long-tail", "a_b"]
    given = ["fit", "--test-best=true", "--ckpt-path", "a-b", "--class-report.x-y"]
    assert underscored(given) == ["fit", "--test_best=true", "--ckpt_path", "a-b", "--class_report.x-y"]


def test_a_packaged_experiment_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    experiments = Path(programs.__file__).parents[1] / "experiments"
    for name in ("quickstart", "quickstart.yaml", "experiments/quickstart.yaml"):
        assert packaged_config(name) == str(experiments / "quickstart.yaml")
    assert packaged_config("overlays/ddp") == str(experiments / "overlays" / "ddp.yaml")
    assert packaged_config("flowers_lr_epochs") == str(experiments / "sweeps" / "flowers_lr_epochs.yaml")
    for name in ("no_such", "../experiments/quickstart", "trainer: {max_epochs: 1}", "x" * 5000):
        assert packaged_config(name) == name
    Path("quickstart").write_text("own")
    assert packaged_config("quickstart") == "quickstart"


def test_commands_take_the_names_of_packaged_experiments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main("vitrail", ["audit", "--config", "quickstart"]) == 0
    assert "Wares" in capsys.readouterr().out


def test_plugins_are_allowed_and_importable_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VITRAIL_PLUGINS", "")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    source = "from datamodules import Wares\n\nclass MyWares(Wares):\n    pass\n"
    Path("my_plugin.py").write_text(source)
    Path("mine.yaml").write_text("data: {class_path: my_plugin.MyWares, init_args: {n_samples: 60}}\n")

    assert main("vitrail", ["--plugins", "my_plugin", "audit", "--config", "mine.yaml"]) == 0

    assert "MyWares" in capsys.readouterr().out
    assert plugins() == ("my_plugin",)


def test_folders_of_the_users_are_not_taken_for_ours(tmp_path: Path) -> None:
    for name in ("app", "callbacks", "datamodules", "evaluation"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('not ours')\n")
    root = str(Path(programs.__file__).parents[1])
    command = [sys.executable, "-m", "vitrail", "summary", "--help"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "optuna" or "experiments.launch" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "optuna", None)

    assert ran(lambda: main("vitrail", ["sweep", "flowers_lr_epochs"])) == 2

    assert "error: optuna is not installed; install it with: pip install 'vitrail[sweeps]'" in capsys.readouterr().err
