"""Exact top-10 search in a million vectors by us, NumPy, scikit-learn, FAISS and LanceDB; opening such a gallery.

The vectors are random directions. All contenders have the same number of threads and find the same rows, or the
benchmark fails. Needs 5 GB on the disk and 16 GB of memory.

All get the same unit vectors and queries, each in a process of its own, and report the rows
they found. Vectors are in memory before the first turn, except for LanceDB, which reads its files (from the system's
cache) in every search.
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
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness.interleaved import Row, interleave, row
from benchmarks.harness.processes import Paced, Pacer, in_new_process

TOP_K = 10
QUERIES = "queries.npy"

Rows = NDArray[np.int64]
Vectors = NDArray[np.float32]
Search = Callable[[Vectors], Rows]
"""Of queries float32 ``(Q, D)`` the best rows int64 ``(Q, TOP_K)``, in any order."""


def matrix_of(gallery: Path) -> Vectors:
    """The vectors of a gallery, float32 ``(N, D)``, mapped from its file.

    Raises:
        RuntimeError: if there is not exactly one file of vectors.
    """
    from retrieval.search.vectors import open_vectors

    files = [open_vectors(path) for path in gallery.glob("images.*.vectors")]
    if len(files) != 1 or files[0] is None:
        raise RuntimeError(f"{gallery}: has {len(files)} files of vectors instead of one")
    return files[0].matrix


def ours(gallery: Path) -> Search:
    """Vitrail's index on the gallery's file, as a gallery uses it."""
    from retrieval.search.exact import ExactIndex
    from retrieval.search.vectors import open_vectors

    file = open_vectors(next(gallery.glob("images.*.vectors")))
    assert file is not None
    index = ExactIndex(file.matrix, coarse=file.coarse)
    return lambda queries: index.search(queries, TOP_K).rows


def ours_with_names(gallery: Path) -> Search:
    """Vitrail's gallery, which also looks up the names of what it found."""
    from retrieval.gallery import Gallery

    opened = Gallery.open(str(gallery))
    return lambda queries: np.array([[int(hit.id) for hit in hits] for hits in opened.nearest(queries, TOP_K)])


def numpy(gallery: Path) -> Search:
    """A matrix product, and of its rows the largest."""
    matrix = np.array(matrix_of(gallery))

    def search(queries: Vectors) -> Rows:
        scores = queries @ matrix.T
        return np.argpartition(scores, -TOP_K, axis=1)[:, -TOP_K:]

    return search


def scikit_learn(gallery: Path, metric: str) -> Search:
    """``NearestNeighbors`` by brute force; the order of Euclidean distances of unit vectors is that of the cosines."""
    from sklearn.neighbors import NearestNeighbors

    index = NearestNeighbors(n_neighbors=TOP_K, algorithm="brute", metric=metric, n_jobs=_threads())
    index.fit(np.array(matrix_of(gallery)))

    def search(queries: Vectors) -> Rows:
        rows: Rows = index.kneighbors(queries, return_distance=False)
        return rows

    return search


def faiss(gallery: Path) -> Search:
    """``IndexFlatIP``, in the faster of its two ways."""
    import faiss as library

    library.omp_set_num_threads(_threads())
    # From 20 queries on FAISS asks its wheel's own OpenBLAS, which takes three times as long as its loops do.
    library.cvar.distance_compute_blas_threshold = 1 << 20
    matrix = matrix_of(gallery)
    index = library.IndexFlatIP(matrix.shape[1])
    for start in range(0, len(matrix), 1 << 16):  # so that the vectors are there once
        index.add(np.ascontiguousarray(matrix[start : start + (1 << 16)]))

    def search(queries: Vectors) -> Rows:
        rows: Rows = index.search(queries, TOP_K)[1]
        return rows

    return search


def lancedb(gallery: Path) -> Search:
    """LanceDB without an index, on the gallery's own table."""
    import lancedb as library

    table = library.connect(str(gallery)).open_table("images")

    def search(queries: Vectors) -> Rows:
        vectors: Any = queries[0] if len(queries) == 1 else queries
        found = table.search(vectors, vector_column_name="vector").distance_type("dot").limit(TOP_K)
        rows = found.select(["id", "_distance"]).to_arrow()
        ids: Rows = rows.column("id").to_numpy(zero_copy_only=False).astype(np.int64)
        if len(queries) > 1:  # rows of a batch come with the number of their query
            ids = ids[np.argsort(rows.column("query_index").to_numpy(), kind="stable")]
        return ids.reshape(len(queries), -1)

    return search


OURS, OURS_WITH_NAMES = "Vitrail", "Vitrail, with names from the table"
CONTENDERS: dict[str, Callable[[Path], Search]] = {
    OURS: ours,
    OURS_WITH_NAMES: ours_with_names,
    "NumPy, product and argpartition": numpy,
    "scikit-learn, euclidean": lambda gallery: scikit_learn(gallery, "euclidean"),
    "scikit-learn, cosine": lambda gallery: scikit_learn(gallery, "cosine"),
    "FAISS IndexFlatIP": faiss,
    "LanceDB without an index": lancedb,
}


def rows_file(folder: Path, name: str, at_once: int) -> Path:
    """Where a contender leaves the rows it found."""
    return folder / f"{list(CONTENDERS).index(name)}_{at_once}.npy"


def _threads() -> int:
    return int(os.environ["OMP_NUM_THREADS"])


def contend(pacer: Pacer, name: str, folder: str, at_once: int, searches: int) -> None:
    """Search as one of the contenders: once to warm up, then as often as asked, in turns."""
    queries: Vectors = np.load(Path(folder) / QUERIES)
    search = CONTENDERS[name](Path(folder) / "gallery")
    np.save(rows_file(Path(folder), name, at_once), search(queries[:at_once]))
    for number in range(searches):
        pacer.tick()
        first = number * at_once % (len(queries) - at_once + 1)
        search(queries[first : first + at_once])
    pacer.tick()


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
                "benchmarks.retrieval.search:contend",
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
