"""Write the tables of the documentation: make the runs that are missing, then run each table's command.

``make results`` runs it; ``--list`` shows what is there, ``--only NAME …`` limits it, ``--long`` adds what takes hours.
``results.yaml``, next to this file, lists runs and tables. A table goes between ``<!-- results: NAME -->`` and
``<!-- /results: NAME -->``, below the commands that made it. A run that has finished with the same command and
experiment files is not made again, an interrupted one is resumed, a table that lacks data or weights stays as it is.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vitrail.config import read_experiment, read_experiments
from vitrail.errors import UserError, run_program, run_reporting_user_errors
from vitrail.files import write_atomically
from vitrail.runs import Run
from vitrail.runtime import start_process, stop_process

PLACEHOLDER = re.compile(r"(?<!\$)\{([A-Za-z][\w.-]*)\}")
KEYS = {"runs": {"command", "for", "needs", "then", "long"}, "tables": {"command", "needs", "long"}}
WIDTH = 110
TEST = {
    "command": "python -m experiments test --ckpt_path {run}/checkpoints/best.ckpt",
    "makes": "predictions/test.parquet",
}
PLAIN = re.compile(r"[\w@%+=:,./${}*\[\]-]+")
"""What needs no quotes in a shell, or is meant for it to replace."""

Paths = dict[str, list[Path]]
Runner = Callable[[Sequence[str], Path | None], int]


def run_process(command: Sequence[str], output: Path | None = None) -> int:
    """Run ``python -m command``, after Ctrl-C until its training is saved; return the exit code."""
    print("$ python -m", shlex.join(command), flush=True)
    with output.open("wb") if output else os.fdopen(os.dup(1), "wb") as out, os.fdopen(os.dup(2), "wb") as errors:
        process = start_process(command, out, errors)
        try:
            return process.wait()
        finally:
            stop_process(process)


class Results:
    """The runs and tables of a file.

    Args:
        file: such as ``docs/results.yaml``.
        root: directory of the runs that are made.
        runner: runs a command, its standard output going to a file if one is given, and returns its exit code.
    """

    def __init__(self, file: Path, root: Path, runner: Runner = run_process) -> None:
        self.root, self.runner, self.failed = root, runner, list[str]()
        content = {**{key: {} for key in KEYS}, **read_experiment(file)}
        if strange := sorted(set(content) - set(KEYS)):
            raise UserError(f"{file}: unknown key {strange[0]!r}; must be one of {', '.join(KEYS)}")
        self.runs: dict[str, dict[str, Any]] = content["runs"]
        self.tables: dict[str, dict[str, Any]] = content["tables"]
        for section, keys in KEYS.items():
            for name, part in content[section].items():
                if "command" not in part or not set(part) <= keys:
                    raise UserError(f"{file}: {section}.{name}: needs command, may have {', '.join(sorted(keys))}")
                names = list(self.runs)
                earlier = names[: names.index(name)] if section == "runs" else names
                known = {*earlier, *part.get("for", {})}
                if unknown := [key for key in placeholders(part["command"]) if key not in known]:
                    raise UserError(f"{file}: {section}.{name}: {{{unknown[0]}}} is not a run listed before it")
        self.made_file = root / "made.json"
        self.made: dict[str, dict[str, Any]] = (
            json.loads(self.made_file.read_text(encoding="utf-8")) if self.made_file.exists() else {}
        )

    def needed(self, command: str) -> list[str]:
        """Return the runs that a command names, and those that these name, in the order of the file."""
        wanted = {name for name in placeholders(command) if name in self.runs}
        for name in reversed(self.runs):
            wanted |= {one for one in placeholders(self.runs[name]["command"]) if one in self.runs and name in wanted}
        return [name for name in self.runs if name in wanted]

    def is_long(self, part: Mapping[str, Any]) -> bool:
        """Return whether a run or table is made only on request."""
        return any(one.get("long") for one in [part, *(self.runs[name] for name in self.needed(part["command"]))])

    def planned(self, name: str) -> list[tuple[str, dict[str, list[Any]]]]:
        """Return label and loop values of each run of an entry."""
        loops = self.runs[name].get("for", {})
        combinations = [dict(zip(loops, values, strict=True)) for values in itertools.product(*loops.values())]
        return [
            ("-".join([name, *(f"{key}{value}" for key, value in one.items())]), {k: [v] for k, v in one.items()})
            for one in combinations
        ]

    def directories(self, command: str) -> tuple[Paths, str]:
        """Return the directories of the finished runs that a command names, and what is missing, if anything."""
        found: Paths = {}
        for name in self.needed(command):
            for label, values in self.planned(name):
                arguments, missing = self.ready(self.runs[name], values)
                entry = self.made.get(label, {})
                run = self.root / entry.get("run", "none")
                if missing or entry.get("key") != digest(arguments) or not run.is_dir():
                    return found, f"{label}: {missing or 'not made yet'}"
                found.setdefault(name, []).append(run)
        return found, ""

    def ready(self, part: Mapping[str, Any], values: Mapping[str, Sequence[Any]]) -> tuple[list[str], str]:
        """Return the arguments after ``python -m`` of a run or table, and what it lacks: runs, files or variables."""
        runs, missing = self.directories(part["command"])
        if missing:
            return [], missing
        arguments = [os.path.expandvars(token) for token in filled(part["command"], {**values, **runs})]
        unset = re.search(r"\$\w+", " ".join([*arguments, *map(os.path.expandvars, part.get("needs", []))]))
        absent = [need for need in part.get("needs", []) if not Path(os.path.expandvars(need)).exists()]
        return arguments, f"{unset[0]} is not set" if unset else f"{absent[0]} does not exist" if absent else ""

    def make_run(self, name: str) -> None:
        """Make what is missing of an entry: its runs, and the steps after each of them."""
        for label, values in self.planned(name):
            arguments, missing = self.ready(self.runs[name], values)
            if missing:
                print(f"{label}: left out: {missing}")
                continue
            run = self._directory(label, arguments)
            # A training with --test_best that was killed between training and test still lacks the test.
            test = [TEST] if any("test_best" in token for token in arguments) else []
            for step in [*test, *self.runs[name].get("then", [])]:
                if run and (step.get("always") or not (run / step["makes"]).exists()):
                    command = [os.path.expandvars(token) for token in filled(step["command"], {"run": [run]})]
                    run = None if self.runner(command, None) else run
            if run is None:
                self.failed.append(label)

    def _directory(self, label: str, arguments: list[str]) -> Path | None:
        """Return the directory of a run, made or resumed where it has not finished; None where that fails."""
        folder, key = self.root / run_name(arguments), digest(arguments)
        entry = self.made.get(label, {})
        if entry.get("key") != key or ("run" in entry and not (self.root / entry["run"]).is_dir()):
            entry = {"key": key, "before": [path.name for path in folder.glob("*/")]}
        if "run" not in entry:
            self._note(label, entry)
            others = {self.root / one["run"] for one in self.made.values() if "run" in one}
            others |= {folder / name for name in entry["before"]}
            last = [path / Run.LAST for path in sorted({*folder.glob("*/")} - others)]
            resume = [f"--ckpt_path={path}" for path in last if path.exists() and arguments[1] == "fit"][-1:]
            if self.runner([*arguments, "--runs", str(self.root), *resume], None):
                return None
            run = max({*folder.glob("*/")} - others)
            self._note(label, entry := {**entry, "run": str(run.relative_to(self.root))})
        return self.root / str(entry["run"])

    def _note(self, label: str, entry: Mapping[str, Any]) -> None:
        self.made[label] = dict(entry)
        self.root.mkdir(parents=True, exist_ok=True)
        with write_atomically(self.made_file) as partial:
            partial.write_text(json.dumps(self.made, indent=1), encoding="utf-8")

    def make_table(self, name: str, page: Path) -> None:
        """Run a table's command and put what it prints into a page."""
        arguments, missing = self.ready(self.tables[name], {})
        if missing:
            print(f"{name}: left as it is: {missing}")
            return
        self.root.mkdir(parents=True, exist_ok=True)
        output = self.root / f"{name}.md"
        if self.runner(arguments, output):
            self.failed.append(name)
            return
        runs, _ = self.directories(self.tables[name]["command"])
        commands = [*self._run_commands(name, runs), *wrapped(filled(self.tables[name]["command"], shown(runs)))]
        revisions = sorted({revision(run) for own in runs.values() for run in own})
        made = f"\n\nRevision of the runs: {', '.join(revisions)}." if revisions else ""
        part = (
            "\n".join(["", "```bash", *commands, "```", "", output.read_text(encoding="utf-8").strip()]) + made + "\n"
        )
        before, _, after = page.read_text(encoding="utf-8").partition(f"<!-- results: {name} -->")
        end = f"<!-- /results: {name} -->"
        with write_atomically(page) as partial:
            partial.write_text(
                f"{before}<!-- results: {name} -->{part}{end}{after.partition(end)[2]}", encoding="utf-8"
            )
        print(f"{name}: written to {page}")

    def _run_commands(self, table: str, runs: Paths) -> list[str]:
        """Return the commands of the runs that no earlier table has shown."""
        earlier = itertools.takewhile(lambda one: one != table, self.tables)
        seen = {name for one in earlier for name in self.needed(self.tables[one]["command"])}
        lines: list[str] = []
        steps: dict[str, None] = {}
        for name in (name for name in runs if name not in seen):
            loops = self.runs[name].get("for", {})
            values = {**shown(runs), **{key: [f"${key}"] for key in loops}}
            made = wrapped([*filled(self.runs[name]["command"], values), "--runs", relative(self.root)])
            for key, own in reversed(loops.items()):
                made = [f"for {key} in {' '.join(map(str, own))}; do", *(f"  {line}" for line in made), "done"]
            lines += made
            for step in self.runs[name].get("then", []):
                steps |= dict.fromkeys(["\n".join(wrapped(filled(step["command"], {"run": ["RUN"]})))])
        return (
            [*lines, "# and with each directory RUN that these make", *"\n".join(steps).split("\n")] if steps else lines
        )


def placeholders(command: str) -> list[str]:
    """Return the names in braces, each once, in order."""
    return list(dict.fromkeys(PLACEHOLDER.findall(command)))


def filled(command: str, values: Mapping[str, Sequence[object]]) -> list[str]:
    """Return the arguments after ``python -m``; one whose placeholder has several values becomes several."""
    result = []
    for token in shlex.split(command)[2:]:
        made = [token]
        for name in placeholders(token):
            made = [one.replace(f"{{{name}}}", str(value)) for one in made for value in values[name]]
        result += made
    return result


def options(arguments: Sequence[str], name: str) -> list[str]:
    """Return the values of an option."""
    return [arguments[place + 1] for place, token in enumerate(arguments) if token == name]


def run_name(arguments: Sequence[str]) -> str:
    """Return the name of the run that a command makes."""
    return (options(arguments, "--name") or [Path(options(arguments, "--config")[0]).stem])[-1]


def digest(arguments: Sequence[str]) -> str:
    """Identify what a command computes: its arguments and the content of its experiment files."""
    content = read_experiments(options(arguments, "--config"))
    return hashlib.sha256(json.dumps([list(arguments), content], sort_keys=True, default=str).encode()).hexdigest()


def revision(run: Path) -> str:
    """Return the shortened source revision that made a run."""
    git = json.loads((run / Run.RECORD).read_text(encoding="utf-8")).get("git") or {}
    return f"{git.get('revision', 'unknown')[:7]}{' with changes' if git.get('changed_files') else ''}"


def relative(path: Path) -> str:
    """Return a path as commands show it."""
    return str(path.resolve().relative_to(Path.cwd())) if path.resolve().is_relative_to(Path.cwd()) else str(path)


def shown(runs: Paths) -> dict[str, list[str]]:
    """Return the directories as commands show them, with ``*`` where that means these and no others."""
    return {
        name: [f"{relative(own[0].parent)}/*"]
        if sorted(own) == sorted(own[0].parent.glob("*/"))
        else [relative(run) for run in own]
        for name, own in runs.items()
    }


def wrapped(arguments: Sequence[str]) -> list[str]:
    """Return a command as lines; an option stays with its first value."""
    words = ["python", "-m"]
    for token in arguments:
        quoted = token if PLAIN.fullmatch(token) else shlex.quote(token)
        alone = words[-1].startswith("--") and "=" not in words[-1] and " " not in words[-1]
        words = [*words[:-1], f"{words[-1]} {quoted}"] if alone and token[:2] != "--" else [*words, quoted]
    lines = [words[0]]
    for word in words[1:]:
        if len(lines[-1]) + len(word) + 3 > WIDTH:
            lines[-1] += " \\"
            lines.append(f"    {word}")
        else:
            lines[-1] += f" {word}"
    return lines


def pages_of(tables: Sequence[str], places: Sequence[Path]) -> dict[str, Path]:
    """Return the page of each table.

    Raises:
        UserError: a table's markers are not there exactly once.
    """
    pages = [page for place in places for page in (sorted(place.rglob("*.md")) if place.is_dir() else [place])]
    texts = {page: page.read_text(encoding="utf-8") for page in pages}
    found = {}
    for name in tables:
        begin, end = f"<!-- results: {name} -->", f"<!-- /results: {name} -->"
        here = [page for page, text in texts.items() if begin in text]
        if len(here) != 1 or not re.search(f"{begin}(?!.*{begin}).*{end}", texts[here[0]], re.DOTALL):
            where = ", ".join(map(str, places))
            raise UserError(f"{where}: needs {begin} once and after it {end} once, where the table belongs")
        found[name] = here[0]
    return found


def main(args: Sequence[str], runner: Runner = run_process) -> int:
    """Make runs and tables; return 0 even without data or weights, 1 where a command failed, 2 on a mistake."""
    parser = argparse.ArgumentParser(description="Make the missing runs, and the tables of the documentation.")
    parser.add_argument("--file", type=Path, default=Path("docs/results.yaml"), help="(default: %(default)s)")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these tables and runs only")
    parser.add_argument("--long", action="store_true", help="also what the file marks as long")
    parser.add_argument("--list", action="store_true", help="show what is there and what is missing, make nothing")
    parser.add_argument("--tables-only", action="store_true", help="make no runs, only tables of those that are there")
    parser.add_argument("--pages", nargs="+", type=Path, default=[Path("docs")], metavar="PATH")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="new runs go to RUNS/results (default: runs)")
    options = parser.parse_args(args)
    os.environ.setdefault("VITRAIL_DATA", "data")
    failed: list[str] = []
    return run_reporting_user_errors(lambda: failed.extend(_make(options, runner))) or bool(failed)


def _make(options: argparse.Namespace, runner: Runner) -> list[str]:
    results = Results(options.file, options.runs / "results", runner)
    if unknown := sorted(set(options.only) - {*results.tables, *results.runs}):
        raise UserError(
            f"--only {unknown[0]}: must be one of {', '.join(dict.fromkeys([*results.runs, *results.tables]))}"
        )
    wanted = [
        {
            name
            for name, part in parts.items()
            if (name in options.only if options.only else options.long or not results.is_long(part))
        }
        for parts in (results.runs, results.tables)
    ]
    tables = [name for name in results.tables if name in wanted[1]]
    needed = wanted[0] | {run for name in tables for run in results.needed(results.tables[name]["command"])}
    needed |= {run for name in wanted[0] for run in results.needed(results.runs[name]["command"])}
    pages = pages_of(tables, options.pages)
    for name in [] if options.tables_only else [name for name in results.runs if name in needed]:
        if options.list:
            print(f"run {name}: {results.directories(f'{{{name}}}')[1] or 'made'}")
        else:
            results.make_run(name)
    for name in tables:
        if options.list:
            print(f"table {name}: {results.ready(results.tables[name], {})[1] or 'can be made'}")
        else:
            results.make_table(name, pages[name])
    for name in results.failed:
        print(f"failed: {name}", file=sys.stderr)
    return results.failed


if __name__ == "__main__":
    sys.exit(run_program(lambda: main(sys.argv[1:])))
