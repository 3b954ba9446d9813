"""The contenders of ``benchmarks.retrieval.search``, each in a process of its own.

All get the same unit vectors, the same queries and as many threads, and report the rows they found. Vectors are in
memory before the first turn, except for LanceDB, which reads its files (from the system's cache) in every search.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness.processes import Pacer

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
