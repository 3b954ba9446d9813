"""Makes runs that are missing and tables of those that are there; see ``results``."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.results_file import Entry, PlannedRun, ResultsFile, Step, Table, expanded, filled, lacking, unset
from experiments.results_readme import part_of, write_part
from experiments.results_runs import find_interrupted, find_run, run_name
from experiments.sweep_trial import last_error, logged_values
from vitrail.errors import EXIT_USER_ERROR
from vitrail.trust import file_name

if TYPE_CHECKING:
    from rich.console import Console

    from experiments.results_process import Runner

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
