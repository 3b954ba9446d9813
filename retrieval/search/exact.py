"""Exact nearest neighbours by dot product: the best ``k`` of a million vectors in tens of milliseconds.

**Algorithm.** Every row gets an approximate score, which is cheap to compute and whose error has a proven bound. Only
rows that the bound cannot rule out, a few per query, are scored again, in float64 and row by row. So the result is that
of a comparison with every vector: equal vectors have equal scores, of equal scores the lower row is first, and neither
depends on the other queries of a call.

**Proof.** Let ``s`` be the exact score of a row, ``a`` the approximate one, and ``|s - a| <= margin``. The *bar* ``b``
of a query is the ``k``-th best exact score among the rows that have one, so ``k`` rows score ``b`` or more at any time.
A row with ``a < b - margin`` has ``s < b`` and is not among the best; every other row is scored exactly. (The bar is
lowered by 1e-6 of its size, more than what rounding final scores to float32 can change.)

**Approximate scores** come from one of three scans:

- int8, on processors with integer dot products (VNNI), from a copy of the vectors in a quarter of their bytes, because
  a search takes as long as it takes to read the rows from memory. With a vector ``v = centre + scale * codes + r`` and
  ``query * scale = factor * q + l``, where ``codes`` and ``q`` are integers and ``r`` and ``l`` what rounding left,

      query · v = query · centre + factor * (q · codes) + l · codes + query · r

  and by Cauchy-Schwarz the last two terms are at most ``|l| max|codes| + |query| max|r|``, the margin.
- float32 on other processors: ``(D + 8) * 2**-23 * |query| * max|v|``, in any order of summation.
- on a GPU: ``2**-7 * |query| * max|v|``, which covers TF32 and bfloat16.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

LEVELS = 127
"""Largest code; -128 stays unused, so that codes are symmetric."""

_ROUNDING = 1e-6
"""Relative slack for float32 rounding in what is computed about a coarse copy."""

_GPU_ERROR = 2.0**-7

_GPU_ROOM = 256 << 20
"""Bytes that are left free on a GPU for the scores."""

_CELLS = 1 << 23
"""Scores at a time: 32 MB, of which the processor's cache holds a good part."""

_QUERIES = 128
"""Queries at a time."""

_RESULTS = 1 << 22
"""Results at a time, for large ``k``."""

_SAMPLE = 16384
"""Rows from which the first bar is taken."""

_BLOCK = 16384
"""Rows, or exact scores, that are computed at a time."""


@dataclass(frozen=True)
class Coarse:
    """Vectors as ``centre + scale * codes``, rounded.

    Attributes:
        codes: int8 ``(N, D)``.
        centre: float32 ``(D,)``, mean of the vectors: what all have in common needs no bits.
        scale: float32 ``(D,)``, greater than 0, step from one code to the next.
        residual: largest norm of a row of ``vectors - centre - scale * codes``.
        reach: largest norm of a row of ``codes``.
        norm: largest norm of a vector.
    """

    codes: NDArray[np.int8]
    centre: NDArray[np.float32]
    scale: NDArray[np.float32]
    residual: float
    reach: float
    norm: float


class Coder:
    """Codes of a matrix, block by block.

    Args:
        matrix: float32 ``(N, D)``, finite.

    Attributes:
        centre: as in ``Coarse``; so is ``scale``.
        residual: as in ``Coarse`` once all codes have been made; so are ``reach`` and ``norm``.
    """

    def __init__(self, matrix: NDArray[np.float32]) -> None:
        self.matrix = matrix
        self.residual = self.reach = self.norm = 0.0
        total = np.zeros(matrix.shape[1])
        extent = np.zeros((2, matrix.shape[1]), np.float32)
        if len(matrix):
            extent[:] = matrix[0]
        for block in _blocks(matrix):
            total += block.sum(axis=0, dtype=np.float64)
            np.minimum(extent[0], block.min(axis=0), out=extent[0])
            np.maximum(extent[1], block.max(axis=0), out=extent[1])
        self.centre = (total / max(1, len(matrix))).astype(np.float32)
        scale = np.abs(extent - self.centre).max(axis=0) / LEVELS
        self.scale = np.maximum(scale, np.finfo(np.float32).tiny).astype(np.float32)

    def codes(self) -> Iterator[NDArray[np.int8]]:
        """Yield codes of blocks of rows, int8 ``(B, D)``."""
        for block in _blocks(self.matrix):
            centred = block - self.centre
            rounded = np.rint(centred / self.scale)
            np.clip(rounded, -LEVELS, LEVELS, out=rounded)
            self.norm = max(self.norm, largest_norm(block))
            self.reach = max(self.reach, largest_norm(rounded))
            left = largest_norm(centred - rounded * self.scale) + _ROUNDING * largest_norm(centred)
            self.residual = max(self.residual, left)
            yield rounded.astype(np.int8)


def coarse_copy(matrix: NDArray[np.float32]) -> Coarse:
    """Make a coarse copy of a float32 matrix ``(N, D)`` in memory."""
    coder = Coder(matrix)
    codes = np.concatenate([*coder.codes(), np.zeros((0, matrix.shape[1]), np.int8)])
    return Coarse(codes, coder.centre, coder.scale, coder.residual, coder.reach, coder.norm)


def largest_norm(rows: NDArray[np.float32]) -> float:
    """Largest Euclidean norm of the rows ``(B, D)``, 0 without rows."""
    return float(np.sqrt(np.einsum("ij,ij->i", rows, rows).max(initial=0)))


def integer_products() -> bool:
    """Whether the processor multiplies bytes fast, and without overflow."""
    import torch

    return bool(torch.cpu.get_capabilities().get("avx512_vnni"))


class ScanQueries(NamedTuple):
    """Queries of a scan: a score is ``offset + factor * scanned``, with an error of at most ``margin``.

    Attributes:
        columns: ``(D, Q)``, in the scan's type and on its device.
        offset: float64 ``(Q,)``.
        factor: float64 ``(Q,)``, greater than 0.
        margin: float64 ``(Q,)``.
    """

    columns: torch.Tensor
    offset: NDArray[np.float64]
    factor: NDArray[np.float64]
    margin: NDArray[np.float64]


def coarse_queries(coarse: Coarse, queries: NDArray[np.float64]) -> ScanQueries:
    """Round queries float64 ``(Q, D)`` to codes for a coarse copy."""
    import torch

    weighted = queries * coarse.scale
    factor = np.maximum(np.abs(weighted).max(axis=1, initial=0) / LEVELS, np.finfo(np.float64).tiny)
    codes = np.rint(weighted / factor[:, None])
    lost = np.linalg.norm(weighted - factor[:, None] * codes, axis=1)
    norms = np.linalg.norm(queries, axis=1)
    margin = lost * coarse.reach + norms * (coarse.residual + _ROUNDING * coarse.norm)
    columns = torch.from_numpy(codes.T.astype(np.int8)).contiguous()
    return ScanQueries(columns, queries @ coarse.centre.astype(np.float64), factor, margin * 1.0001)


class Scan:
    """Approximate scores of rows.

    Args:
        matrix: float32 ``(N, D)``.
        norm: largest norm of a row.
        device: ``cpu`` or a GPU's name; there the vectors stay if they fit, else they pass by in every search.
        coarse: copy of the matrix, used where the processor has integer products.
    """

    def __init__(self, matrix: NDArray[np.float32], norm: float, device: str, coarse: Coarse | None) -> None:
        self.device, self.norm = device, norm
        self.coarse = coarse if device == "cpu" and integer_products() else None
        self.vectors = _tensor(matrix if self.coarse is None else self.coarse.codes)
        if device != "cpu" and _fits(self.vectors, device):
            self.vectors = self.vectors.to(device)

    def queries(self, queries: NDArray[np.float64]) -> ScanQueries:
        """Convert queries float64 ``(Q, D)`` to the scan's type."""
        import torch

        if self.coarse is not None:
            return coarse_queries(self.coarse, queries)
        count, dim = queries.shape
        error = (dim + 8) * 2.0**-23 if _on_processor(self.device) else _GPU_ERROR
        margin = np.linalg.norm(queries, axis=1) * self.norm * error
        columns = torch.from_numpy(queries.astype(np.float32).T).contiguous()
        return ScanQueries(columns.to(self.device), np.zeros(count), np.ones(count), margin)

    def buffer(self, rows: int, queries: int) -> torch.Tensor:
        """Allocate scores ``(rows, queries)``, which are written over again and again."""
        import torch

        dtype = torch.float32 if self.coarse is None else torch.int32
        return torch.empty((rows, queries), dtype=dtype, device=self.device)

    def scores(self, rows: slice | NDArray[np.int64], queries: ScanQueries, out: torch.Tensor) -> torch.Tensor:
        """Compute ``scanned`` of ``ScanQueries``, ``(B, Q)``, into ``out``, which has at least as many rows."""
        import torch

        if isinstance(rows, slice):
            block = self.vectors[rows]
        elif _on_processor(self.device):
            # NumPy copies whole rows, torch number by number, which takes several times as long.
            block = _tensor(self.vectors.numpy()[rows])
        else:
            block = self.vectors[torch.from_numpy(rows).to(self.vectors.device)]
        block, out = block.to(self.device), out[: len(block)]
        if self.coarse is not None:
            return torch._int_mm(block, queries.columns, out=out)
        if not _on_processor(self.device):
            return torch.mm(block, queries.columns, out=out)
        # NumPy's float32 is float32, whatever precision torch is set to.
        np.matmul(block.numpy(), queries.columns.numpy(), out=out.numpy())
        return out


class Nearest(NamedTuple):
    """The best rows of each query, best first; of equal scores the lower row first.

    Attributes:
        rows: int64 ``(Q, k)``.
        scores: float32 ``(Q, k)``, dot products.
    """

    rows: NDArray[np.int64]
    scores: NDArray[np.float32]


class ExactIndex:
    """Vectors that can be searched.

    Args:
        matrix: float32 ``(N, D)``, may be mapped from a file; not copied on a processor.
        device: ``cpu`` or a GPU's name.
        coarse: a coarse copy of the same vectors, which makes searches on a processor faster.
        check: receives the rows of the matrix that a result depends on, int64 ``(n,)``, and raises where they are
            damaged.

    Raises:
        ValueError: for a matrix of another type or shape, or that is not finite.
    """

    def __init__(
        self,
        matrix: NDArray[np.float32],
        device: str = "cpu",
        coarse: Coarse | None = None,
        check: Callable[[NDArray[np.int64]], None] | None = None,
    ) -> None:
        if matrix.ndim != 2 or matrix.dtype != np.float32:
            raise ValueError(f"vectors: are {matrix.dtype} {matrix.shape}, must be float32 (N, D)")
        if coarse is not None and coarse.codes.shape != matrix.shape:
            raise ValueError(f"coarse copy: is {coarse.codes.shape}, the vectors are {matrix.shape}")
        norm = _finite_norm(matrix) if coarse is None else coarse.norm
        self._parts = [_Part(0, matrix, Scan(matrix, norm, device, coarse), check or (lambda rows: None))]

    @classmethod
    def joined(cls, indexes: Sequence[ExactIndex]) -> ExactIndex:
        """Return an index of the vectors of several, at least one, whose rows follow one another."""
        joined = copy(indexes[0])
        starts = np.cumsum([0, *map(len, indexes)]).tolist()
        joined._parts = [
            part._replace(start=part.start + start)
            for start, index in zip(starts[:-1], indexes, strict=True)
            for part in index._parts
        ]
        return joined

    def __len__(self) -> int:
        return self._parts[-1].start + len(self._parts[-1].matrix)

    def search(self, queries: NDArray[np.float32], k: int, allowed: NDArray[np.int64] | None = None) -> Nearest:
        """Find the best rows of each query.

        Args:
            queries: float32 ``(Q, D)``.
            k: how many, at least 0; fewer where there are fewer rows.
            allowed: rows that may be found, int64 ``(A,)``; None for all.

        Raises:
            ValueError: for queries of another length or that are not finite, a negative ``k``, or rows that are not
                there.
        """
        if queries.ndim != 2 or queries.shape[1] != (dim := self._parts[0].matrix.shape[1]):
            raise ValueError(f"queries: are {queries.shape}, must be (Q, {dim})")
        if not np.isfinite(queries).all():
            raise ValueError("queries: hold numbers that are not finite")
        if k < 0:
            raise ValueError(f"k: is {k}, must be at least 0")
        if allowed is not None:
            allowed = np.unique(allowed)
            if len(allowed) and (allowed[0] < 0 or allowed[-1] >= len(self)):
                raise ValueError(f"allowed: rows must be from 0 to {len(self) - 1}")
            allowed = None if len(allowed) == len(self) else allowed
        k = min(k, len(self) if allowed is None else len(allowed))
        rows, scores = np.empty((len(queries), k), np.int64), np.empty((len(queries), k), np.float32)
        step = max(1, min(_QUERIES, _RESULTS // max(1, k)))
        for start in range(0, len(queries) if k else 0, step):
            some = np.ascontiguousarray(queries[start : start + step], np.float64)
            found = _Search(some, k).run(self._parts, allowed)
            rows[start : start + step] = found.rows.reshape(len(some), k)
            scores[start : start + step] = found.scores.reshape(len(some), k)
        return Nearest(rows, scores)


class _Part(NamedTuple):
    """Vectors float32 ``(n, D)`` with their scan and check; ``start`` is the number of rows before them."""

    start: int
    matrix: NDArray[np.float32]
    scan: Scan
    check: Callable[[NDArray[np.int64]], None]


class _Pairs(NamedTuple):
    """Rows with an exact score for a query, each ``(P,)``."""

    queries: NDArray[np.int64]
    rows: NDArray[np.int64]
    scores: NDArray[np.float32]


class _Search:
    """One search of some queries; ``bar`` is what a row must score to be among the best so far."""

    def __init__(self, queries: NDArray[np.float64], k: int) -> None:
        self.queries, self.k = queries, k
        self.best = _Pairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
        self.bar = np.full(len(queries), -np.inf)

    def run(self, parts: Sequence[_Part], allowed: NDArray[np.int64] | None) -> _Pairs:
        """Scan all rows and return the best ``k`` of each query, in the order of the queries."""
        for part in parts:
            own = None
            if allowed is not None:
                first, last = np.searchsorted(allowed, [part.start, part.start + len(part.matrix)])
                own = allowed[first:last] - part.start
            if total := len(part.matrix) if own is None else len(own):
                self._search_part(part, own, total)
        return self.best

    def _search_part(self, part: _Part, allowed: NDArray[np.int64] | None, total: int) -> None:
        self.part, self.allowed, count = part, allowed, len(self.queries)
        self.asked = part.scan.queries(self.queries)
        sample = min(total, max(_SAMPLE, 4 * self.k))
        step = max(1, min(total, _CELLS // count))
        out = part.scan.buffer(max(sample, step), count)
        if total >= self.k and not np.isfinite(self.bar).all():
            # A first bar by the best of some rows, which are found again below.
            scanned = self._scanned(0, sample, out)
            places = scanned.T.contiguous().topk(self.k, dim=1, sorted=False).indices.cpu().numpy().reshape(-1)
            scores = self._exact_scores(np.repeat(np.arange(count), self.k), self._row_numbers(0, places))
            self.bar = np.maximum(self.bar, scores.reshape(count, self.k).min(axis=1).astype(np.float64))
        for start in range(0, total, step):
            self._search_block(start, min(start + step, total), out)

    def _search_block(self, start: int, stop: int, out: torch.Tensor) -> None:
        scanned = self._scanned(start, stop, out)
        flat, approximate = _at_least(scanned, self._threshold(scanned.is_floating_point()))
        places, queries = np.divmod(flat, len(self.queries))
        rows = self._row_numbers(start, places)
        # The best of the block first: they raise the bar, so that most others need not be scored.
        leading = _leading(_Pairs(queries, rows, approximate), self.k)
        self._merge(queries[leading], rows[leading])
        rest = approximate >= self._threshold(scanned.is_floating_point())[queries]
        rest[leading] = False
        self._merge(queries[rest], rows[rest])

    def _scanned(self, start: int, stop: int, out: torch.Tensor) -> torch.Tensor:
        rows = slice(start, stop) if self.allowed is None else self.allowed[start:stop]
        return self.part.scan.scores(rows, self.asked, out)

    def _row_numbers(self, start: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows of the part."""
        return places + start if self.allowed is None else self.allowed[places + start]

    def _threshold(self, floating: bool) -> NDArray[np.float32] | NDArray[np.int32]:
        """What ``scanned`` must be of a row that may be among the best, ``(Q,)``; rounded down."""
        scores = self.bar - self.asked.margin - 1e-6 * np.abs(self.bar)
        least = (scores - self.asked.offset) / self.asked.factor
        if floating:
            lower: NDArray[np.float32] = np.nextafter(least.astype(np.float32), np.float32(-np.inf))
            return lower
        limit = np.iinfo(np.int32)
        whole: NDArray[np.int32] = np.clip(np.floor(least), limit.min, limit.max).astype(np.int32)
        return whole

    def _merge(self, queries: NDArray[np.int64], rows: NDArray[np.int64]) -> None:
        """Score queries and rows of the part exactly, keep the best and raise the bar."""
        pairs = _Pairs(
            np.concatenate((self.best.queries, queries)),
            np.concatenate((self.best.rows, rows + self.part.start)),
            np.concatenate((self.best.scores, self._exact_scores(queries, rows))),
        )
        leading = _leading(pairs, self.k)
        self.best = _Pairs(pairs.queries[leading], pairs.rows[leading], pairs.scores[leading])
        counts = np.bincount(self.best.queries, minlength=len(self.queries))
        full, last = counts == self.k, np.cumsum(counts) - 1
        self.bar[full] = np.maximum(self.bar[full], self.best.scores[last[full]])

    def _exact_scores(self, queries: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Dot products of pairs ``(P,)``, summed in float64 in an order that depends on nothing."""
        scores = np.empty(len(rows), np.float32)
        self.part.check(rows)
        for start in range(0, len(rows), _BLOCK):
            some = slice(start, start + _BLOCK)
            scores[some] = (self.queries[queries[some]] * self.part.matrix[rows[some]]).sum(axis=1)
        return scores


def _at_least(
    scanned: torch.Tensor, threshold: NDArray[np.float32] | NDArray[np.int32]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Where scores ``(B, Q)`` reach ``threshold`` ``(Q,)``: places in the flat matrix, ascending, and the scores."""
    import torch

    if scanned.device.type == "cpu":
        values = scanned.numpy()
        flat = np.flatnonzero(values >= threshold)
        return flat, values.reshape(-1)[flat]
    places = (scanned >= torch.from_numpy(threshold).to(scanned.device)).view(-1).nonzero().view(-1)
    return places.cpu().numpy(), scanned.view(-1)[places].cpu().numpy()


def _leading(pairs: _Pairs, k: int) -> NDArray[np.int64]:
    """Places of the ``k`` best pairs of each query, by query, best first, of equal ones the lower row first."""
    order = np.lexsort((pairs.rows, -pairs.scores, pairs.queries))
    queries = pairs.queries[order]
    rank = np.arange(len(order)) - np.searchsorted(queries, queries)
    return order[rank < k]


def _finite_norm(matrix: NDArray[np.float32]) -> float:
    """Largest norm of a row; ``ValueError`` if one is not finite."""
    norm = 0.0
    for number, block in enumerate(_blocks(matrix)):
        norm = max(norm, length := largest_norm(block))
        if not np.isfinite(length):
            row = number * _BLOCK + int(np.flatnonzero(~np.isfinite(block).all(axis=1))[0])
            raise ValueError(f"vectors: row {row} holds numbers that are not finite")
    return norm


def _blocks(matrix: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    for start in range(0, len(matrix), _BLOCK):
        yield matrix[start : start + _BLOCK]


def _on_processor(device: str) -> bool:
    return device.startswith("cpu")


def _tensor(array: NDArray[np.float32] | NDArray[np.int8]) -> torch.Tensor:
    """The same memory for torch, which warns of arrays that may not be written; nothing writes here."""
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def _fits(vectors: torch.Tensor, device: str) -> bool:
    """Whether vectors fit into a device's free memory, with room for the scores."""
    import torch

    if torch.device(device).type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return vectors.nbytes + _GPU_ROOM < free
