"""``python -m experiments results``: make the runs of ``results.yaml`` that are missing, and the tables made of them.

A run that is there and has finished with the same configuration is not made again, wherever it was made by; one that
was stopped goes on. A table whose runs are not there, because data or weights are not, is left as it is.

``results.yaml``: which runs there are to be, and which commands make tables of them.

Makes runs that are missing and tables of those that are there; see ``results``.

One command of a list of results, as a process of its own.

Tables in a Markdown file, each between two markers, below the commands that made it.

Which run directory is the run that a command would make, judged by what the directory itself records.

A run counts as that of a command if it was begun with the same options, and its configuration still agrees with the
experiment files as they are now. So a run that somebody made by hand counts, and one of an older version does not.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import yaml

from experiments.launch.workers import last_error, logged_values
from vitrail.config import read_experiment, read_experiments
from vitrail.errors import EXIT_USER_ERROR, UserError, run_reporting_user_errors, same_command
from vitrail.runs import CHECKPOINTS, RunFiles, write_text_whole
from vitrail.runtime import begin_process, end_process
from vitrail.trust import file_name

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable


FILE = Path("experiments/results.yaml")


def main(args: Sequence[str], runner: Runner | None = None) -> int:
    """Make results, or go on with making them.

    Args:
        args: arguments after ``results``.
        runner: runs a command; by default as a process of its own.

    Returns:
        Exit code: 0 also where data or weights are not there, 1 where a command failed, 2 after a mistake of the user,
        130 after Ctrl-C, 143 after SIGTERM.
    """
    options = _parser().parse_args(list(args))
    codes: list[int] = []
    code = run_reporting_user_errors(lambda: codes.append(_run(options, runner)))
    return codes[0] if codes else code


def _run(options: argparse.Namespace, runner: Runner | None) -> int:
    from rich.console import Console

    file = read_results(options.file)
    tables, names = _chosen(file, options)
    console = Console(stderr=True)
    maker = Maker(file, Path(options.runs), runner or run_process, console)
    if options.list:
        _list(maker, tables, names)
        return 0
    check_markers(options.readme, tables)
    with _alone(maker.place), _stopping(maker.stop) as told:
        if not options.tables_only:
            maker.make_runs([entry for name, entry in file.entries.items() if name in names])
        written = [maker.make_table(table, options.readme) for table in tables if not maker.stop.is_set()]
    return _report(maker, written, told, console)


def _report(maker: Maker, written: Sequence[str], told: Sequence[int], console: Console) -> int:
    """Say what was done and what was not."""
    for line in written:
        sys.stdout.write(f"{line}\n")
    for name, reason in maker.failed.items():
        console.print(f"failed: {name}: {reason}", highlight=False, soft_wrap=True, markup=False)
    if told:
        sys.stdout.write(f"Stopped. The same command goes on. ({same_command()})\n")
        return 128 + told[0]
    return 1 if maker.failed else 0


def _chosen(file: ResultsFile, options: argparse.Namespace) -> tuple[list[Table], set[str]]:
    """Tables to be made, and names of the runs that are needed."""
    if strange := [name for name in options.only if name not in file.tables and name not in file.entries]:
        known = ", ".join([*file.tables, *file.entries])
        raise UserError(f"--only {strange[0]}: {options.file} has {known}; name some of them")
    tables = [
        table
        for table in file.tables.values()
        if (table.name in options.only if options.only else options.long or not file.is_long(table))
    ]
    names = {entry.name for table in tables for entry in file.entries_of(table.command)}
    for name in file.entries.keys() & set(options.only):
        names |= {entry.name for entry in file.entries_of([f"{{{name}}}"])}
    if not options.only:
        names |= {name for name, entry in file.entries.items() if options.long or not entry.long}
    return tables, names


def _list(maker: Maker, tables: Sequence[Table], names: set[str]) -> None:
    from vitrail.console import print_table

    print_table(_state_table(maker, tables, names))


def _state_table(maker: Maker, tables: Sequence[Table], names: set[str]) -> RichTable:
    from rich.table import Table as RichTable
    from rich.text import Text

    shown = RichTable("", "name", "state")
    for name, entry in maker.file.entries.items():
        if name in names:
            for planned in entry.runs():
                shown.add_row("run", Text(planned.label), Text(maker.state(planned)))
    for table in tables:
        shown.add_row("table", Text(table.name), Text(maker.missing(table) or "can be made"))
    return shown


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep a second process out, which would go on with the same interrupted runs.

    The operating system ends the lock with the process, so a killed one blocks nobody.
    """
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{folder}: another process makes results there; wait until it is done") from error
        yield


@contextmanager
def _stopping(stop: threading.Event) -> Iterator[list[int]]:
    """Set ``stop`` on Ctrl-C and SIGTERM, so that what runs can save; gives the signals that came."""
    came: list[int] = []

    def note(number: int, frame: object) -> None:
        came.append(number)
        stop.set()

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments results",
        description="Make the runs that are missing, and the README's tables of them.",
        allow_abbrev=False,
    )
    parser.add_argument("file", nargs="?", type=Path, default=FILE, metavar="FILE", help=f"(default: {FILE})")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these tables and runs only")
    parser.add_argument("--long", action="store_true", help="also what the file marks as long")
    parser.add_argument("--list", action="store_true", help="say what is there and what is missing, and make nothing")
    parser.add_argument("--tables-only", action="store_true", help="make no runs, only tables of those that are there")
    parser.add_argument("--readme", type=Path, default=Path("README.md"), help="(default: README.md)")
    parser.add_argument("--runs", default="runs", help="directory of all runs (default: runs); new ones: RUNS/results")
    return parser


RUN = "run"
"""``{run}`` in a run's own further steps is its directory."""

_KEYS = {"runs", "tables"}
_RUN_KEYS = {"command", "for", "needs", "then", "long"}
_TABLE_KEYS = {"command", "needs", "long"}
_STEP_KEYS = {"command", "makes", "always"}
_STAGES = ("fit", "test")
_MODULES = ("benchmarks", "datamodules", "evaluation", "experiments", "retrieval")
_PLACEHOLDER = re.compile(r"(?<!\$)\{([A-Za-z][\w.-]*)\}")
_VARIABLE = re.compile(r"\$(\w+)|\$\{(\w+)\}")
_DEFAULTS = {"VITRAIL_DATA": "data"}
"""What is meant where a variable is not set."""


@dataclass(frozen=True)
class Step:
    """What is done with a run that has ended.

    Attributes:
        command: after ``python -m``.
        makes: a file or folder below the run directory; where it is, the step is done.
        always: it is done every time all the same, because it goes on where it was stopped.
    """

    command: tuple[str, ...]
    makes: str
    always: bool = False


@dataclass(frozen=True)
class Entry:
    """A run, or several that differ in a fold or a seed.

    Attributes:
        name: by which tables call it.
        command: after ``python -m``: ``experiments fit …`` or ``experiments test …``.
        loops: values of each placeholder of its own, such as ``fold``.
        steps: what is done afterwards.
        needs: files and folders that must be there, as written.
        long: left out unless asked for.
    """

    name: str
    command: tuple[str, ...]
    loops: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    steps: tuple[Step, ...] = ()
    needs: tuple[str, ...] = ()
    long: bool = False

    def runs(self) -> list[PlannedRun]:
        """One for each combination of the loops' values."""
        combinations = itertools.product(*self.loops.values())
        return [PlannedRun(self, dict(zip(self.loops, values, strict=True))) for values in combinations]

    def calls(self) -> list[str]:
        """Names of other entries whose directories its command names."""
        return [name for name in placeholders(self.command) if name not in self.loops]


@dataclass(frozen=True)
class PlannedRun:
    """One run directory that there is to be.

    Attributes:
        entry: it belongs to.
        values: of the entry's loops.
    """

    entry: Entry
    values: Mapping[str, str]

    @property
    def label(self) -> str:
        """For messages and as a file's name."""
        return "-".join([self.entry.name, *(f"{name}{value}" for name, value in self.values.items())])

    def arguments(self, runs: Mapping[str, Sequence[Path]]) -> list[str]:
        """What stands after ``python -m experiments``, nothing left to fill in.

        Args:
            runs: directories by entry.

        Raises:
            UserError: a variable is not set.
        """
        named = {**{name: [value] for name, value in self.values.items()}, **runs}
        return [expanded(token) for token in filled(self.entry.command[1:], named)]


@dataclass(frozen=True)
class Table:
    """A part of the README.

    Attributes:
        name: in its markers.
        command: after ``python -m``; prints Markdown.
        needs: files and folders that must be there besides its runs, as written.
        long: left out unless asked for.
    """

    name: str
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()
    long: bool = False


@dataclass(frozen=True)
class ResultsFile:
    """All of it.

    Attributes:
        path: of the file.
        entries: by name, in order; one names only earlier ones.
        tables: by name, in order.
    """

    path: Path
    entries: Mapping[str, Entry]
    tables: Mapping[str, Table]

    def entries_of(self, command: Sequence[str]) -> list[Entry]:
        """Entries that a command names, and those that these name, in the order of the file."""
        wanted: set[str] = set()
        waiting = placeholders(command)
        while waiting:
            name = waiting.pop()
            if name not in wanted:
                wanted.add(name)
                waiting += self.entries[name].calls()
        return [entry for name, entry in self.entries.items() if name in wanted]

    def is_long(self, table: Table) -> bool:
        """Whether a table is made only when asked for."""
        return table.long or any(entry.long for entry in self.entries_of(table.command))


def read_results(path: Path) -> ResultsFile:
    """Read the file.

    Raises:
        UserError: for a file that is not as it should be.
    """
    content = read_experiment(path)
    if strange := sorted(set(content) - _KEYS):
        raise UserError(f"{path}: unknown key {strange[0]!r}; it has runs: and tables:")
    entries: dict[str, Entry] = {}
    for name, part in _parts(path, content, "runs", _RUN_KEYS):
        entries[name] = _entry(f"{path}: runs.{name}", name, part, entries)
    tables: dict[str, Table] = {}
    for name, part in _parts(path, content, "tables", _TABLE_KEYS):
        place = f"{path}: tables.{name}"
        command = _command(place, part.get("command"))
        _refuse_unknown(place, command, entries)
        tables[name] = Table(name, command, _needs(place, part), bool(part.get("long", False)))
    if not tables:
        raise UserError(f"{path}: tables: is empty; name at least one, with command:")
    return ResultsFile(path, entries, tables)


def placeholders(tokens: Sequence[str]) -> list[str]:
    """Names in braces, each once, in order."""
    return list(dict.fromkeys(name for token in tokens for name in _PLACEHOLDER.findall(token)))


def filled(tokens: Sequence[str], values: Mapping[str, Sequence[object]]) -> list[str]:
    """Tokens with placeholders replaced; one whose placeholder has several values becomes as many tokens."""
    result = []
    for token in tokens:
        made = [token]
        for name in placeholders([token]):
            made = [one.replace(f"{{{name}}}", str(value)) for one in made for value in values[name]]
        result += made
    return result


def expanded(text: str) -> str:
    """A text with the environment's variables in it.

    Raises:
        UserError: one is not set.
    """

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        found = os.environ.get(name) or _DEFAULTS.get(name)
        if not found:
            raise UserError(f"${name} is not set")
        return found

    return _VARIABLE.sub(value, text)


def lacking(needs: Sequence[str]) -> str:
    """The first of these files and folders that is not there, in a few words; empty where all are."""
    absent = (f"{need} is not there" for need in needs if not Path(expanded(need)).exists())
    return unset(needs) or next(absent, "")


def unset(tokens: Sequence[str]) -> str:
    """Which variable in these tokens has no value, in a few words; empty where all have."""
    try:
        _ = [expanded(token) for token in tokens]
    except UserError as error:
        return str(error)
    return ""


def _parts(path: Path, content: Mapping[str, Any], key: str, keys: set[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    parts = content.get(key) or {}
    if not isinstance(parts, dict):
        raise UserError(f"{path}: {key}: holds no names; write NAME: and below it command:")
    for name, part in parts.items():
        if not isinstance(part, dict) or (strange := sorted(set(part) - keys)):
            told = f"unknown key {strange[0]!r}" if isinstance(part, dict) else "holds no keys"
            raise UserError(f"{path}: {key}.{name}: {told}; it may have {', '.join(sorted(keys))}")
        if not re.fullmatch(r"[A-Za-z][\w.-]*", str(name)) or name == RUN:
            raise UserError(f"{path}: {key}.{name}: is no name; use letters, digits, '_', '-' and '.', and not 'run'")
        yield str(name), part


def _entry(place: str, name: str, part: Mapping[str, Any], earlier: Mapping[str, Entry]) -> Entry:
    command = _command(place, part.get("command"))
    if command[0] != "experiments" or command[1:2] not in ([(stage,) for stage in _STAGES]):
        raise UserError(f"{place}.command: must begin with python -m experiments fit, or test")
    if not any(token.split("=")[0] in ("--config", "--name") for token in command):
        raise UserError(f"{place}.command: has neither --config nor --name, so the run's name is not known; add one")
    loops = part.get("for") or {}
    if not isinstance(loops, dict) or not all(isinstance(values, list) and values for values in loops.values()):
        raise UserError(f"{place}.for: must hold lists, such as fold: [0, 1, 2]")
    entry = Entry(
        name,
        command,
        {str(key): tuple(str(value) for value in values) for key, values in loops.items()},
        tuple(
            _step(f"{place}.then[{number}]", step)
            for number, step in enumerate(_results_file_list(place, part, "then"))
        ),
        _needs(place, part),
        bool(part.get("long", False)),
    )
    _refuse_unknown(f"{place}.command", entry.command, {**earlier, **entry.loops})
    if unused := [key for key in entry.loops if key not in placeholders(entry.command)]:
        raise UserError(f"{place}.for: {{{unused[0]}}} is not in the command, so its runs would all be the same")
    return entry


def _step(place: str, part: object) -> Step:
    if not isinstance(part, dict) or not set(part) <= _STEP_KEYS or not part.get("makes"):
        raise UserError(f"{place}: needs command: and makes:, a file in the run directory, and may have always: true")
    command = _command(place, part.get("command"))
    _refuse_unknown(f"{place}.command", command, {RUN: None})
    return Step(command, str(part["makes"]), bool(part.get("always", False)))


def _needs(place: str, part: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(need) for need in _results_file_list(place, part, "needs"))


def _results_file_list(place: str, part: Mapping[str, Any], key: str) -> list[Any]:
    found = part.get(key) or []
    if not isinstance(found, list):
        raise UserError(f"{place}.{key}: must be a list")
    return found


def _command(place: str, text: object) -> tuple[str, ...]:
    """Tokens after ``python -m``."""
    try:
        tokens = shlex.split(text) if isinstance(text, str) else []
    except ValueError as error:
        raise UserError(f"{place}.command: cannot be read as a shell does ({error})") from error
    if tokens[:2] != ["python", "-m"] or len(tokens) < 4 or tokens[2] not in _MODULES:
        raise UserError(f"{place}.command: must be a command such as python -m evaluation summary …")
    return tuple(tokens[2:])


def _refuse_unknown(place: str, command: Sequence[str], known: Mapping[str, object]) -> None:
    for name in placeholders(command):
        if name not in known:
            there = ", ".join(known) or "none"
            raise UserError(f"{place}: {{{name}}} is the name of no run before it; there are: {there}")


_ELSEWHERE = {"config", "name", "runs", "ckpt_path", "test_best"}
_SILENT = ("wandb", "trainer.logger", "trainer.enable_progress_bar", "trainer.enable_model_summary")
"""Options that change nothing about what a run computes."""

Options = dict[str, list[Any]]


def run_name(arguments: Sequence[str]) -> str:
    """Name of the run that a command makes: ``--name``, else that of its first experiment file."""
    options = _options(arguments)
    return str(options["name"][-1]) if "name" in options else Path(str(options["config"][0])).stem


def find_run(arguments: Sequence[str], roots: Sequence[Path]) -> Path | None:
    """The newest finished run that a command would make again; None where there is none.

    Args:
        arguments: after ``python -m experiments``.
        roots: directories of runs, ``<root>/<name>/<time>``.

    Raises:
        UserError: an experiment file of the command cannot be read.
    """
    found = [run for root in roots for run in _candidates(arguments, root) if _has_finished(run, arguments[0])]
    return max(found, key=_begun).path if found else None


def find_interrupted(arguments: Sequence[str], root: Path) -> Path | None:
    """Last checkpoint of the newest run of a command's that did not end, or None."""
    found = [run for run in _candidates(arguments, root) if "last" in run.checkpoints and run.interrupted]
    return max(found, key=_begun).path / CHECKPOINTS / "last.ckpt" if found and arguments[0] == "fit" else None


def revision(run: Path) -> str:
    """Revision of the source that made a run, shortened, with what is known of changes; empty where not known."""
    git: Any = RunFiles(run).record.get("git")
    if not isinstance(git, dict) or not isinstance(git.get("revision"), str):
        return ""
    return f"{git['revision'][:7]}{' with changes' if git.get('changed_files') else ''}"


def _candidates(arguments: Sequence[str], root: Path) -> Iterator[RunFiles]:
    """Runs below a root that the command would make again."""
    expected = _experiment(arguments)
    wanted = _options(arguments)
    for path in sorted((root / run_name(arguments)).glob("*/")):
        try:
            run = RunFiles(path)
        except UserError:  # an empty directory of a run that was killed at once
            continue
        begun_by = [str(stage.get("command", "")) for stage in run.stages if stage.get("stage") == arguments[0]]
        given = shlex.split(begun_by[0])[3:] if begun_by else []
        if given[:1] != [arguments[0]] or not run.config:
            continue
        same = _telling(_options(given), arguments[0]) == _telling(wanted, arguments[0])
        if same and agrees(expected, run.config):
            yield run


def agrees(expected: Any, found: Any) -> bool:
    """Whether a configuration says all that is expected; it may say more, such as defaults."""
    if isinstance(expected, dict) and isinstance(found, dict):
        return all(key in found and agrees(value, found[key]) for key, value in expected.items())
    if isinstance(expected, list) and isinstance(found, list):
        pairs = zip(expected, found, strict=False)
        return len(expected) == len(found) and all(agrees(one, other) for one, other in pairs)
    # As above: a number may be written as YAML does not know it.
    return bool(expected == found) or _number(expected) == _number(found) is not None


def _experiment(arguments: Sequence[str]) -> dict[str, Any]:
    """What the experiment files say, without what the command's options say differently."""
    options = _options(arguments)
    content = read_experiments([str(name) for name in options.get("config", [])])
    return _without(content, {*options, *_ELSEWHERE})


def _without(content: Mapping[str, Any], keys: set[str], prefix: str = "") -> dict[str, Any]:
    """Without keys that options name, which may leave ``init_args`` out, and those that change nothing."""
    kept: dict[str, Any] = {}
    for name, value in content.items():
        key = _short(f"{prefix}{name}")
        if key in keys or key.startswith(_SILENT):
            continue
        kept[name] = _without(value, keys, f"{key}.") if isinstance(value, dict) else value
    return kept


def _options(arguments: Sequence[str]) -> Options:
    """Values by dotted key; a flag without a value is true, and ``--key+=``, which adds to a list, names the list."""
    options: Options = {}
    place = 1
    while place < len(arguments):
        key, equals, value = arguments[place].removeprefix("--").partition("=")
        place += 1
        if not equals:
            alone = place >= len(arguments) or arguments[place].startswith("--")
            value = "true" if alone else arguments[place]
            place += not alone
        key = {"c": "config"}.get(key.lstrip("-"), key).removesuffix("+")
        options.setdefault(_short(key), []).append(_value(value))
    return options


def _telling(options: Options, stage: str) -> Options:
    """Options that say what a run computes. Of several experiment files the names count, not the folders."""
    kept = {key: values for key, values in options.items() if key not in _ELSEWHERE and not key.startswith(_SILENT)}
    # A resumed training begins from a checkpoint of its own; a test is one of its checkpoint.
    also = {"ckpt_path": options["ckpt_path"]} if stage == "test" and "ckpt_path" in options else {}
    return {**kept, **also, "config": [Path(str(name)).name for name in options.get("config", [])]}


def _short(key: str) -> str:
    """A key as both ways of writing it have it: ``init_args`` may be left out."""
    return ".".join(part for part in key.split(".") if part != "init_args")


def _value(text: str) -> Any:
    # YAML takes 1e-3 for a text, the command line for a number.
    if re.fullmatch(r"[-+]?[\d.]+e[-+]?\d+", text, re.IGNORECASE):
        return _number(text)
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _number(value: Any) -> float | None:
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None


def _has_finished(run: RunFiles, stage: str) -> bool:
    latest = [one for one in run.stages if one.get("stage") == stage]
    return bool(latest) and latest[-1].get("exit") == "finished"


def _begun(run: RunFiles) -> str:
    return str(run.stages[0].get("started", ""))


_WIDTH = 110
_PLAIN = re.compile(r"[\w@%+=:,./${}*\[\]-]+")
"""Needs no quotes in a shell, or is meant for it to replace."""


def check_markers(readme: Path, tables: Sequence[Table]) -> None:
    """Refuse a file that has no place for a table, before anything takes time.

    Raises:
        UserError: the file cannot be read, or lacks a table's markers.
    """
    text = _read(readme)
    for table in tables:
        _place(readme, text, table.name)


def write_part(readme: Path, name: str, part: str) -> bool:
    """Put a table's part between its markers; the file is replaced whole, and only where the part is another.

    Returns:
        Whether the part is another.

    Raises:
        UserError: as ``check_markers``.
    """
    text = _read(readme)
    start, end = _place(readme, text, name)
    changed = f"{text[:start]}\n{part.strip()}\n{text[end:]}"
    if changed != text:
        write_text_whole(readme, changed)
    return changed != text


def part_of(
    table: Table, printed: str, introduced: Sequence[Entry], runs: Mapping[str, Sequence[Path]], root: Path
) -> str:
    """What stands between a table's markers.

    Args:
        table: which one.
        printed: by its command.
        introduced: runs whose commands are to be shown.
        runs: directories by entry.
        root: where runs are made that are not there yet, as commands are shown with it.
    """
    lines = [line for command in _run_commands(introduced, runs, root) for line in command]
    lines += _wrapped(["python", "-m", *filled(table.command, {name: _shown(own) for name, own in runs.items()})])
    revisions = sorted({revision(run) or "unknown" for own in runs.values() for run in own})
    made = f"\n\nRevision of the runs: {', '.join(revisions)}." if revisions else ""
    return "\n".join(["```", *lines, "```", "", printed.strip()]) + made


def _run_commands(introduced: Sequence[Entry], runs: Mapping[str, Sequence[Path]], root: Path) -> list[list[str]]:
    """How runs were made, then what was done with each afterwards, the same command once."""
    shown: list[list[str]] = []
    afterwards: dict[str, None] = {}
    for entry in introduced:
        loops = {name: [f"${name}"] for name in entry.loops}
        named = {name: _shown(own) for name, own in runs.items()}
        command = ["python", "-m", *filled(entry.command, {**named, **loops})]
        # A run that somebody made by hand lies where the command alone puts it.
        if any(root.resolve() in run.resolve().parents for run in runs[entry.name]):
            command += ["--runs", str(root)]
        made = _wrapped(command)
        for name, values in reversed(list(entry.loops.items())):
            made = [f"for {name} in {' '.join(values)}; do", *(f"  {line}" for line in made), "done"]
        shown.append(made)
        for step in entry.steps:
            afterwards["\n".join(_wrapped(["python", "-m", *filled(step.command, {"run": ["RUN"]})]))] = None
    if afterwards:
        shown.append(["# and with each directory RUN that these make", *"\n".join(afterwards).splitlines()])
    return shown


def _shown(runs: Sequence[Path]) -> list[str]:
    """Paths as a command names them, with ``*`` where that means these and no others."""
    folders = {run.parent for run in runs}
    shown = []
    for folder in sorted(folders):
        own = sorted(run for run in runs if run.parent == folder)
        every = sorted(path for path in folder.glob("*/"))
        shown += [f"{_relative(folder)}/*"] if own == every else [_relative(run) for run in own]
    return shown


def _relative(path: Path) -> str:
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _wrapped(tokens: Sequence[str]) -> list[str]:
    """A command as lines; an option stays with its value."""
    words: list[str] = []
    for token in tokens:
        quoted = token if _PLAIN.fullmatch(token) else shlex.quote(token)
        if words and words[-1].startswith("--") and "=" not in words[-1] and " " not in words[-1] and token[:2] != "--":
            words[-1] += f" {quoted}"
        else:
            words.append(quoted)
    lines = [words[0]]
    for word in words[1:]:
        if len(lines[-1]) + len(word) + 3 > _WIDTH:
            lines[-1] += " \\"
            lines.append(f"    {word}")
        else:
            lines[-1] += f" {word}"
    return lines


def _read(readme: Path) -> str:
    try:
        return readme.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else "not a text file"
        raise UserError(f"--readme {readme}: {reason}; name the file that the tables stand in") from error


def _place(readme: Path, text: str, name: str) -> tuple[int, int]:
    """Where the part between the markers begins and ends."""
    begin, end = f"<!-- results: {name} -->", f"<!-- /results: {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise UserError(f"{readme}: needs {begin} once and after it {end} once, where the table belongs")
    return text.index(begin) + len(begin), text.index(end)


_TEST = Step(("experiments", "test", "--ckpt_path", "{run}/checkpoints/best.ckpt"), makes="predictions/test.parquet")
"""What a training with ``--test_best`` that was killed between training and test still lacks."""


class Maker:
    """Runs commands and keeps account of what failed.

    Args:
        file: what there is to be.
        root: directory of all runs.
        runner: runs a command.
        console: is told how it goes.

    Attributes:
        place: directory of the runs that are made here; those of others are used, never gone on with.
        stop: set to end early.
        failed: why, by label of a run or name of a table.
    """

    def __init__(self, file: ResultsFile, root: Path, runner: Runner, console: Console) -> None:
        self.file, self.root = file, root
        self.place = root / "results"
        self.stop = threading.Event()
        self.failed: dict[str, str] = {}
        self._codes: dict[str, int] = {}
        self._finished: dict[str, Path] = {}
        self._runner = runner
        self._console = console

    def make_runs(self, entries: Iterable[Entry]) -> None:
        """Make what is missing, in order."""
        planned = [one for entry in entries for one in entry.runs()]
        refused: dict[str, str] = {}
        for number, one in enumerate(planned, 1):
            if self.stop.is_set():
                return
            if reason := self._lacking(one):
                self._say(f"[{number}/{len(planned)}] {one.label}: left out: {reason}")
                continue
            if one.entry.name in refused:
                # Its other seeds and folds have the same mistake.
                self.failed[one.label] = f"not begun, because {refused[one.entry.name]} was refused"
                continue
            self._make(one, f"[{number}/{len(planned)}] {one.label}")
            if self._codes.get(one.label) == EXIT_USER_ERROR and self._found(one) is None:
                refused[one.entry.name] = one.label

    def make_table(self, table: Table, readme: Path) -> str:
        """Make a table and put it into the README; what was done, or why it was not, in a line."""
        if missing := self.missing(table):
            return f"{table.name}: left as it is: {missing}"
        runs, _ = self.runs_of(table.command)
        output = self.place / "logs" / f"{table.name}.out"
        command = [expanded(token) for token in filled(table.command, runs)]
        if not self._command(table.name, command, output):
            return f"{table.name}: left as it is: its command {'was stopped' if self.stop.is_set() else 'failed'}"
        part = part_of(table, output.read_text(encoding="utf-8"), self._introduced_by(table), runs, self.place)
        return f"{table.name}: {'written' if write_part(readme, table.name, part) else 'unchanged'}"

    def missing(self, table: Table) -> str:
        """What a table cannot be made without: runs, files or variables; empty where nothing is missing."""
        _, runs = self.runs_of(table.command)
        return runs or lacking(table.needs) or unset(table.command)

    def runs_of(self, command: Sequence[str]) -> tuple[dict[str, list[Path]], str]:
        """Directories of all runs that a command names, by entry; and what is missing, empty where nothing is."""
        found: dict[str, list[Path]] = {}
        for entry in self.file.entries_of(command):
            for planned in entry.runs():
                run = self._found(planned)
                if run is None:
                    return found, self._why_missing(planned)
                found.setdefault(entry.name, []).append(run)
        return found, ""

    def state(self, planned: PlannedRun) -> str:
        """Where a run is, or why it is not there."""
        run = self._found(planned)
        if run is not None:
            lacks = [step.makes for step in self._steps(planned) if not (run / step.makes).exists()]
            return f"{run}" + (f", lacks {', '.join(lacks)}" if lacks else "")
        if reason := self._lacking(planned):
            return reason
        resumed = find_interrupted(self._arguments(planned), self.place)
        return f"stopped: {resumed.parent.parent}" if resumed else "to be made"

    def _make(self, planned: PlannedRun, label: str) -> None:
        run, begun = self._found(planned), time.monotonic()
        if run is None:
            arguments = self._arguments(planned)
            resumed = find_interrupted(arguments, self.place)
            self._say(f"{label}: {'goes on with ' + str(resumed.parent.parent) if resumed else 'begins'}")
            place = ["--runs", str(self.place), *(["--ckpt_path", str(resumed)] if resumed else [])]
            if not self._command(planned.label, ["experiments", *arguments, *place], watched=run_name(arguments)):
                return
            run = self._found(planned)
            if run is None and not self.stop.is_set():
                self.failed[planned.label] = f"no finished run of this command is below {self.place}"
            if run is None:
                return
        for step in self._steps(planned):
            if self.stop.is_set():
                return
            if step.always or not (run / step.makes).exists():
                command = [expanded(token) for token in filled(step.command, {"run": [run]})]
                if not self._command(planned.label, command):
                    return
        self._say(f"{label}: {run}, {(time.monotonic() - begun) / 60:.1f} min")

    def _command(
        self, label: str, command: Sequence[str], output: Path | None = None, watched: str | None = None
    ) -> bool:
        """Run one; whether it ended well. One that was stopped is no failure."""
        log = self.place / "logs" / f"{file_name(label)}.log"
        with self._console.status(label) as status:

            def beat() -> None:
                if watched is not None and (epochs := _epochs(self.place / watched)):
                    status.update(f"{label}: {epochs} epochs")

            code = self._runner(command, log, self.stop, output, beat)
        self._codes[label] = code
        if code and not self.stop.is_set():
            self.failed[label] = f"{last_error(log, code)} (python -m {' '.join(command[:2])}; {log})"
            self._say(f"{label}: {self.failed[label]}")
        return not code

    def _found(self, planned: PlannedRun) -> Path | None:
        """Its directory, if it has finished; also one that somebody made by hand."""
        if planned.label not in self._finished and not self._unresolved(planned):
            run = find_run(self._arguments(planned), [self.place, self.root])
            if run is not None:
                self._finished[planned.label] = run
        return self._finished.get(planned.label)

    def _arguments(self, planned: PlannedRun) -> list[str]:
        calls, _ = self._calls(planned)
        return planned.arguments(calls)

    def _calls(self, planned: PlannedRun) -> tuple[dict[str, list[Path]], str]:
        """Directories of the entries that its command names, and what of them is missing."""
        names = planned.entry.calls()
        return self.runs_of([f"{{{name}}}" for name in names]) if names else ({}, "")

    def _unresolved(self, planned: PlannedRun) -> str:
        """What keeps its command from being known: runs or variables; empty where nothing does."""
        _, missing = self._calls(planned)
        return missing or unset(planned.entry.command)

    def _lacking(self, planned: PlannedRun) -> str:
        """What keeps it from being made."""
        return self._unresolved(planned) or lacking(planned.entry.needs)

    def _why_missing(self, planned: PlannedRun) -> str:
        if planned.label in self.failed:
            return f"{planned.label} failed"
        reason = self._lacking(planned)
        return f"{planned.label} cannot be made: {reason}" if reason else f"{planned.label} is not made yet"

    def _steps(self, planned: PlannedRun) -> list[Step]:
        tests = planned.entry.command[1] == "fit" and any("--test_best" in token for token in planned.entry.command)
        return [*([_TEST] if tests else []), *planned.entry.steps]

    def _introduced_by(self, table: Table) -> list[Entry]:
        """Runs that no earlier table of the file names: their commands are shown here."""
        seen: set[str] = set()
        for other in self.file.tables.values():
            own = self.file.entries_of(other.command)
            if other.name == table.name:
                return [entry for entry in own if entry.name not in seen]
            seen |= {entry.name for entry in own}
        return []

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)


def _epochs(folder: Path) -> int:
    """How many epochs the run that begun last has logged."""
    newest = max(folder.glob("*/"), key=lambda path: path.name, default=None)
    values = logged_values(newest, "epoch")
    return int(max(values)) if values else 0


_POLL_SECONDS = 0.5


class Runner(Protocol):
    """Runs a command to its end."""

    def __call__(
        self,
        command: Sequence[str],
        log: Path,
        stop: threading.Event,
        output: Path | None = None,
        beat: Callable[[], None] = lambda: None,
    ) -> int:
        """Run it.

        Args:
            command: after ``python -m``.
            log: file for what it prints.
            stop: set from outside to end it early; a training then saves where it is.
            output: file for standard output, where that is wanted by itself.
            beat: called about twice a second.

        Returns:
            Its exit code, negative for a signal.
        """


def run_process(
    command: Sequence[str],
    log: Path,
    stop: threading.Event,
    output: Path | None = None,
    beat: Callable[[], None] = lambda: None,
) -> int:
    """Run a command as ``Runner`` says; it ends when this process is killed."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as files:
        errors = files.enter_context(log.open("wb"))
        out = files.enter_context(output.open("wb")) if output else errors
        process = begin_process(command, out, errors)
        try:
            while process.poll() is None and not stop.wait(_POLL_SECONDS):
                beat()
        finally:
            end_process(process)
    return process.returncode
