"""``python -m benchmarks [NAME …] [--repeats N]``: measures, and writes the table of ``benchmarks/README.md``.

Without names everything is measured. Results of a benchmark replace its older ones; those of the others stay.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import pkgutil
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import benchmarks
from benchmarks.harness.interleaved import Row, table
from vitrail.console import without_nan
from vitrail.errors import run_program
from vitrail.files import write_text_atomically

FOLDER = Path(__file__).parent
RESULTS, README = "results.json", "README.md"
BEGIN, END = "<!-- results: begin -->\n", "<!-- results: end -->\n"

Benchmark = Callable[[int], list[Row]]


def found_benchmarks() -> dict[str, Benchmark]:
    """Every module of this package that has a function ``run``, by its name below the package, as ``training.step``."""
    found = pkgutil.walk_packages(benchmarks.__path__, "benchmarks.")
    modules = [importlib.import_module(module.name) for module in found if not module.name.endswith("__main__")]
    named = {module.__name__.removeprefix("benchmarks."): module for module in modules if hasattr(module, "run")}
    return {name: module.run for name, module in sorted(named.items())}


def measure(name: str, benchmark: Benchmark, repeats: int, *, write: bool) -> int:
    """Run a benchmark and print its table.

    Args:
        name: of the benchmark.
        benchmark: is called with ``repeats``.
        repeats: of every contender.
        write: whether results and README are rewritten.

    Returns:
        Number of promises that were missed.
    """
    import torch

    begin = time.monotonic()
    rows = benchmark(repeats)
    table(rows).show()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    entry = {
        "command": f"python -m benchmarks {name} --repeats {repeats}",
        "date": time.strftime("%Y-%m-%d"),
        "seconds": round(time.monotonic() - begin),
        "machine": f"{os.cpu_count()} cores {platform.machine()}{gpu}, {platform.system()}, torch {torch.__version__}",
        "rows": [without_nan(asdict(one)) for one in rows],
    }
    if write:
        path = FOLDER / RESULTS
        results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        results[name] = entry
        page = with_table((FOLDER / README).read_text(encoding="utf-8"), results)
        text = json.dumps(results, indent=1, ensure_ascii=False, sort_keys=True, allow_nan=False)
        write_text_atomically(path, f"{text}\n")
        write_text_atomically(FOLDER / README, page)
    return sum(one.kept is False for one in rows)


def with_table(page: str, results: Mapping[str, Mapping[str, Any]]) -> str:
    """The page with the table of these results in the place of the old one.

    Raises:
        ValueError: if it lacks the two lines between which the table belongs.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ValueError(f"{README}: needs one line {BEGIN.strip()} and after it one line {END.strip()}")
    parts = []
    for _, entry in sorted(results.items()):
        about = f"`{entry['command']}`: {entry['date']}, {entry['seconds']} s, {entry['machine']}."
        values: list[dict[str, Any]] = entry["rows"]
        rows = [Row(**{**one, **{key: math.nan for key, value in one.items() if value is None}}) for one in values]
        parts.append(f"\n{about}\n\n{table(rows).markdown()}\n")
    head, tail = page[: page.index(BEGIN)], page[page.index(END) :]
    return f"{head}{BEGIN}{''.join(parts)}\n{tail}"


def main(arguments: Sequence[str]) -> int:
    """Measure what is named.

    Returns:
        Exit code: 0, 1 where a promise was missed, 2 after a mistake of the user.
    """
    by_name = found_benchmarks()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(by_name)}")
    parser.add_argument("--repeats", type=int, default=3, help="of every contender (default: 3)")
    parser.add_argument("--dry-run", action="store_true", help="print the table only, leave README and results alone")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.names if name not in by_name]:
        parser.error(f"NAME: must be one of {', '.join(by_name)}; got {unknown[0]!r}")
    if options.repeats < 1:
        parser.error(f"--repeats: must be at least 1, got {options.repeats}")
    names = dict.fromkeys(options.names or by_name)
    missed = [measure(name, by_name[name], options.repeats, write=not options.dry_run) for name in names]
    return int(any(missed))


if __name__ == "__main__":
    sys.exit(run_program(lambda: main(sys.argv[1:])))
