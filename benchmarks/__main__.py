"""``python -m benchmarks [NAME …] [--repeats N]``: measures, and writes the table of ``benchmarks/README.md``.

Without names everything is measured. Results of a benchmark replace its older ones; those of the others stay.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import benchmarks
from benchmarks.harness.interleaved import Row, as_json, from_json, markdown, say
from vitrail.errors import run_program
from vitrail.files import write_text_atomically

FOLDER = Path(__file__).parent
RESULTS, README = "results.json", "README.md"
BEGIN, END = "<!-- results: begin -->\n", "<!-- results: end -->\n"

Benchmark = Callable[[int], list[Row]]
Results = dict[str, dict[str, Any]]


def found_benchmarks() -> dict[str, Benchmark]:
    """Every module of this package that has a function ``run``, by its name below the package, as ``training.step``."""
    found = pkgutil.walk_packages(benchmarks.__path__, "benchmarks.")
    modules = [importlib.import_module(module.name) for module in found if not module.name.endswith("__main__")]
    named = {module.__name__.removeprefix("benchmarks."): module for module in modules if hasattr(module, "run")}
    return {name: module.run for name, module in sorted(named.items())}


def measure(chosen: Mapping[str, Benchmark], repeats: int, folder: Path) -> int:
    """Runs benchmarks one after the other, and writes results and table after each.

    Args:
        chosen: by name.
        repeats: of each.
        folder: with ``README.md``; ``results.json`` lies beside it.

    Returns:
        Number of promises that were missed.
    """
    missed = 0
    for name, benchmark in chosen.items():
        begin = time.monotonic()
        rows = benchmark(repeats)
        say(rows)
        missed += sum(one.kept is False for one in rows)
        entry = {
            "command": f"python -m benchmarks {name} --repeats {repeats}",
            "date": time.strftime("%Y-%m-%d"),
            "seconds": round(time.monotonic() - begin),
            "machine": machine(),
            "rows": as_json(rows),
        }
        keep(name, entry, folder)
    return missed


def machine() -> str:
    """Cores, system and the versions that matter, in one line."""
    import torch

    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{os.cpu_count()} cores {platform.machine()}{gpu}, {platform.system()}, torch {torch.__version__}"


def keep(name: str, entry: Mapping[str, Any], folder: Path) -> None:
    """Writes the results of one benchmark beside those of the others, and the table of all.

    Raises:
        ValueError: if the page lacks the lines between which the table belongs.
    """
    path = folder / RESULTS
    results: Results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    results[name] = dict(entry)
    page = with_table((folder / README).read_text(encoding="utf-8"), results)
    write_text_atomically(
        path, json.dumps(results, indent=1, ensure_ascii=False, sort_keys=True, allow_nan=False) + "\n"
    )
    write_text_atomically(folder / README, page)


def with_table(page: str, results: Results) -> str:
    """The page with the table of these results in the place of the old one.

    Raises:
        ValueError: if it lacks the two lines between which the table belongs.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ValueError(f"{README}: needs one line {BEGIN.strip()} and after it one line {END.strip()}")
    parts = []
    for _, entry in sorted(results.items()):
        about = f"`{entry['command']}`: {entry['date']}, {entry['seconds']} s, {entry['machine']}."
        parts.append(f"\n{about}\n\n{markdown(from_json(entry['rows']))}")
    head, tail = page[: page.index(BEGIN)], page[page.index(END) :]
    return f"{head}{BEGIN}{''.join(parts)}\n{tail}"


def main(arguments: Sequence[str]) -> int:
    """Measure what is named.

    Returns:
        Exit code: 0, 1 where a promise was missed, 2 after a mistake of the user.
    """
    benchmarks_by_name = found_benchmarks()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(benchmarks_by_name)}")
    parser.add_argument("--repeats", type=int, default=3, help="of every contender")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.names if name not in benchmarks_by_name]:
        parser.error(f"NAME: there is no benchmark {unknown[0]!r}; choose from {', '.join(benchmarks_by_name)}")
    if options.repeats < 1:
        parser.error(f"--repeats: is {options.repeats}, must be at least 1")
    names = list(dict.fromkeys(options.names)) or list(benchmarks_by_name)
    return int(measure({name: benchmarks_by_name[name] for name in names}, options.repeats, FOLDER) > 0)


if __name__ == "__main__":
    sys.exit(run_program(lambda: main(sys.argv[1:])))
