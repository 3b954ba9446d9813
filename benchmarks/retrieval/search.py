"""Exact top-10 search in a million vectors by us, NumPy, scikit-learn, FAISS and LanceDB; opening such a gallery.

The vectors are random directions. All contenders have the same number of threads and find the same rows, or the
benchmark fails. Needs 5 GB on the disk and 16 GB of memory.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness.interleaved import Row, interleave, row
from benchmarks.harness.processes import Paced, in_new_process
from benchmarks.retrieval.search_contenders import CONTENDERS, OURS, OURS_WITH_NAMES, QUERIES, rows_file

SEARCHES = {1: 5, 100: 1}
"""How many searches a turn has, by the number of queries that are asked at once."""

LIMIT, LIMIT_NAME = 2.0, "two seconds"
OPENED, OPENED_COLD = "gallery opened, first answer", "the same, files not in memory"
COMMAND, IMPORT = "whole command, search --like", "import torch"
SAME_ROWS = 0.999
"""Share of the rows in which contenders must agree: sums in another order may swap two scores that differ by 1e-8."""

_CHUNK = 50_000


def threads() -> dict[str, str]:
    """Variables that give every library the same number of threads."""
    names = ("OMP", "OPENBLAS", "MKL", "RAYON")
    count = str(os.cpu_count() or 1)
    return {**{f"{name}_NUM_THREADS": count for name in names}, "LANCE_CPU_THREADS": count}


def make_gallery(folder: Path, images: int, dim: int) -> None:
    """A gallery of random directions, whose ids are their numbers, and queries."""
    random = np.random.default_rng(0)
    fill_gallery(str(folder / "gallery"), images, dim, lambda rows: random_directions(random, rows, dim))
    np.save(folder / QUERIES, random_directions(random, 200, dim))


def fill_gallery(
    uri: str, images: int, dim: int, sample: Callable[[int], NDArray[np.float32]], chunk: int = _CHUNK
) -> None:
    """Write a gallery whose ids are their numbers, ``chunk`` rows a commit.

    Args:
        uri: of the gallery.
        images: number of rows.
        dim: length of the vectors.
        sample: returns n unit vectors, float32 ``(n, dim)``.
        chunk: rows of a commit.
    """
    import pyarrow as pa

    from retrieval.gallery import Gallery
    from retrieval.schema import ModelIdentity, image_schema

    identity = ModelIdentity("Random", "0" * 64, "", dim, False, {}, {}, [])
    schema = image_schema(identity)
    with Gallery.create(uri, identity).writing() as writer:
        for start in range(0, images, chunk):
            rows = min(chunk, images - start)
            columns = {name: pa.array([""] * rows) for name in schema.names if name != "thumbnail"}
            columns["id"] = pa.array([str(number) for number in range(start, start + rows)])
            columns["thumbnail"] = pa.nulls(rows, pa.binary())
            columns["vector"] = pa.FixedSizeListArray.from_arrays(pa.array(sample(rows).ravel()), dim)
            writer.add(pa.table([columns[name] for name in schema.names], schema=schema))


def random_directions(random: np.random.Generator, rows: int, dim: int) -> NDArray[np.float32]:
    """Rows of unit length, float32 ``(rows, dim)``."""
    sampled = random.standard_normal((rows, dim), dtype=np.float32)
    sampled /= np.linalg.norm(sampled, axis=1, keepdims=True)
    return sampled


def search_times(folder: Path, names: Sequence[str], at_once: int, turns: int) -> dict[str, list[float]]:
    """Seconds of a search of ``at_once`` queries, a number for every turn of every contender.

    Raises:
        RuntimeError: if a contender fails, or finds other rows than the first one.
    """
    searches = SEARCHES[at_once]
    with ExitStack() as stack:
        loops = {}
        for number, name in enumerate(names):
            loop = Paced(
                "benchmarks.retrieval.search_contenders:contend",
                name,
                str(folder),
                at_once,
                searches * turns,
                log=folder / f"{number}_{at_once}.log",
                warm_up=0,
                chunk=searches,
                environment=threads(),
            )
            stack.callback(loop.stop)
            # One after the other: some take a multiple of their memory to start.
            loop.wait_until_warm()
            loops[name] = loop
        _check_same_rows(folder, names, at_once)
        seconds = interleave({name: loop.turn for name, loop in loops.items()}, turns)
        for loop in loops.values():
            loop.finish()
    return {name: [one / searches for one in found] for name, found in seconds.items()}


def _check_same_rows(folder: Path, names: Sequence[str], at_once: int) -> None:
    found = {name: np.load(rows_file(folder, name, at_once)) for name in names}
    first, *others = names
    for name in others:
        pairs = zip(found[first].tolist(), found[name].tolist(), strict=True)
        same = float(np.mean([len(set(one) & set(other)) / len(one) for one, other in pairs]))
        if same < SAME_ROWS:
            raise RuntimeError(f"{name} finds {same:.4f} of the rows that {first} finds")


def opening_times(folder: Path, repeats: int) -> dict[str, list[float]]:
    """Seconds from opening a gallery to the first result, and of the whole command."""
    gallery = folder / "gallery"

    def opened(cold: bool) -> float:
        if cold:
            forget(gallery)
        return float(in_new_process(f"{__name__}:open_and_search", str(folder), environment=threads()))

    def timed(*command: str) -> float:
        begin = time.perf_counter()
        environment = {**os.environ, **threads()}
        subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL, env=environment)
        return time.perf_counter() - begin

    opened(cold=False)  # what follows finds all files in the system's cache
    contenders = {
        OPENED: lambda: opened(cold=False),
        COMMAND: lambda: timed("-m", "retrieval", "search", "--gallery", str(gallery), "--like", "7", "--json"),
        IMPORT: lambda: timed("-c", IMPORT),
    }
    found = interleave(contenders, repeats)
    found[OPENED_COLD] = [opened(cold=True) for _ in range(repeats)]
    return {**found, LIMIT_NAME: [LIMIT] * repeats}


def forget(folder: Path) -> None:
    """Drop files from the system's cache, so that they are read from the disk again."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def open_and_search(folder: str) -> float:
    """Seconds from opening a gallery to its first result; what is imported before is not counted."""
    from retrieval.gallery import Gallery

    __import__("torch")
    __import__("lancedb")
    query = np.load(Path(folder) / QUERIES)[:1]
    begin = time.perf_counter()
    (hits,) = Gallery.open(str(Path(folder) / "gallery")).nearest(query, 10)
    assert len(hits) == 10
    return time.perf_counter() - begin


def search_rows(images: int, dim: int, at_once: int, seconds: Mapping[str, Sequence[float]]) -> list[Row]:
    """Ours by every other, as searches a second."""
    rates = {name: [1 / one for one in found] for name, found in seconds.items()}
    title = f"top 10 of {images:,} × {dim}, {at_once} {'query' if at_once == 1 else 'queries'}"
    rows = []
    for name in rates:
        if name != OURS:
            note = f"{1000 * median(seconds[OURS]):.0f} : {1000 * median(seconds[name]):.0f} ms"
            promise = "" if name == OURS_WITH_NAMES else "≥ 1"
            rows.append(row(title, OURS, name, rates, "searches/s", promise, note))
    return rows


def run(repeats: int, images: int = 1_000_000, dim: int = 512) -> list[Row]:
    """Searches a second, and seconds to the first result."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_gallery(folder, images, dim)
        for at_once in SEARCHES:
            seconds = search_times(folder, list(CONTENDERS), at_once, max(2, repeats))
            rows += search_rows(images, dim, at_once, seconds)
        opening = opening_times(folder, repeats)
    title = f"gallery of {images:,}"
    return [
        *rows,
        row(title, OPENED, LIMIT_NAME, opening, "s", "< 1"),
        row(title, OPENED_COLD, LIMIT_NAME, opening, "s"),
        row(title, COMMAND, IMPORT, opening, "s"),
    ]
