"""``results.yaml``: which runs there are to be, and which commands make tables of them."""

from __future__ import annotations

import itertools
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitrail.config import read_experiment
from vitrail.errors import UserError

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
_DEFAULTS = {"VITRINE_DATA": "data"}
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
        tuple(_step(f"{place}.then[{number}]", step) for number, step in enumerate(_list(place, part, "then"))),
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
    return tuple(str(need) for need in _list(place, part, "needs"))


def _list(place: str, part: Mapping[str, Any], key: str) -> list[Any]:
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
