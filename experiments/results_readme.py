"""Tables in a Markdown file, each between two markers, below the commands that made it."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.results_file import Entry, Table, filled
from experiments.results_runs import revision
from vitrail.errors import UserError
from vitrail.runs import write_text_whole

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
