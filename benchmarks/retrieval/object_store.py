"""A gallery of a million vectors on S3 (moto's server on this machine): its index compared with exact search.

The vectors are members of clusters, as embeddings are: a random centre and as long a random direction, so that two
members of a cluster have a cosine of about 0.5. Queries are further members, not in the gallery. Exact search reads the
whole table once into a local copy; the index reads what a query needs. Needs 2 GB on the disk.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness.interleaved import Row, interleave, row
from benchmarks.harness.processes import in_new_process, s3_server
from benchmarks.retrieval.search import fill_gallery, random_directions

CLUSTERS, QUERIES, TOP_K = 5000, 100, 10
INDEX, EXACT = "index", "exact search"
URI = "s3://vitrail/gallery"


def members(dim: int, clusters: int) -> Callable[[int], NDArray[np.float32]]:
    """Return a function that samples unit vectors of clusters, float32 ``(n, dim)``."""
    random = np.random.default_rng(0)
    centres = random_directions(random, clusters, dim)

    def sample(rows: int) -> NDArray[np.float32]:
        made = centres[random.integers(clusters, size=rows)] + random_directions(random, rows, dim)
        made /= np.linalg.norm(made, axis=1, keepdims=True)
        return made

    return sample


def first_result(queries: str, exact: bool) -> float:
    """Seconds from opening the gallery to its first result; what is imported before is not counted."""
    from retrieval.gallery import Gallery

    __import__("lancedb")
    query = np.load(queries)[:1]
    begin = time.perf_counter()
    (hits,) = Gallery.open(URI).nearest(query, TOP_K, exact=exact)
    assert len(hits) == TOP_K
    return time.perf_counter() - begin


def measured(folder: Path, images: int, dim: int, repeats: int) -> list[Row]:
    """Fill the gallery on the object store of the environment, build its index and compare."""
    from retrieval.gallery import Gallery

    sample = members(dim, min(CLUSTERS, images // 50))
    # Few files, so that they need not be joined, which would be an upload of all.
    fill_gallery(URI, images, dim, sample, chunk=100_000)
    queries = sample(QUERIES)
    np.save(folder / "queries.npy", queries)
    gallery = Gallery.open(URI)
    gallery.build_index(sample=1)
    found = {
        name: [{hit.id for hit in hits} for hits in gallery.nearest(queries, TOP_K, exact=name == EXACT)]
        for name in (INDEX, EXACT)
    }
    shares = [len(ours & all_of) / TOP_K for ours, all_of in zip(found[INDEX], found[EXACT], strict=True)]

    def searched(exact: bool) -> float:
        begin = time.perf_counter()
        for query in queries:
            gallery.nearest(query[None], TOP_K, exact=exact)
        return len(queries) / (time.perf_counter() - begin)

    rates = interleave({INDEX: lambda: searched(False), EXACT: lambda: searched(True)}, repeats)
    opened = {
        name: [
            in_new_process(
                f"{__name__}:first_result",
                str(folder / "queries.npy"),
                name == EXACT,
                environment={"VITRAIL_CACHE": str(folder / f"cache of {name}")},
            )
        ]
        for name in (INDEX, EXACT)
    }
    title = f"{images:,} × {dim} on S3"
    note = f"worst of {QUERIES} queries {min(shares):.1f}"
    recall = {INDEX: [float(np.mean(shares))], EXACT: [1.0]}
    return [
        row(f"{title}, recall@{TOP_K}", INDEX, EXACT, recall, "of the nearest", "≥ 0.9", note),
        row(f"{title}, opened with no local copy, first answer", INDEX, EXACT, opened, "s", "< 1"),
        row(f"{title}, top {TOP_K} of a query", INDEX, EXACT, rates, "searches/s", note="exact: from its local copy"),
    ]


def run(repeats: int, images: int = 1_000_000, dim: int = 128) -> list[Row]:
    """Recall of the index, seconds to the first result, and searches a second."""
    with (
        tempfile.TemporaryDirectory() as name,
        s3_server() as environment,
        patch.dict(os.environ, {**environment, "VITRAIL_CACHE": name}),
    ):
        import s3fs

        s3fs.S3FileSystem(skip_instance_cache=True).mkdir("vitrail")
        return measured(Path(name), images, dim, repeats)
