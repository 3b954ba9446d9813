"""Exact search: the ``k`` vectors of a matrix with the largest dot products, of a million of them in a blink.

A fast and slightly wrong scan of all rows (integers where the processor has dot products of bytes and there is a coarse
copy, else float32, on a GPU if asked) leaves the few rows whose scores may be among the best, by a proven bound. Only
these are computed anew, in float64 and one by one. So the answer is that of a comparison with every vector, equal
vectors have equal scores, and a query's result does not depend on the queries beside it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from retrieval.coarse import Coarse, longest
from retrieval.scan import Scan

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

_CELLS = 1 << 23
"""Scores at a time: 32 MB, of which the processor's cache holds a good part."""

_QUERIES = 128
"""Queries at a time."""

_FOUND = 1 << 22
"""Results at a time, for large ``k``."""

_SAMPLE = 16384
"""Rows in which a first threshold is looked for."""

_PAIRS = 16384
"""Dot products that are computed anew at a time."""


class Nearest(NamedTuple):
    """The best rows of each query, best first; of equal scores the lower row first.

    Attributes:
        rows: int64 ``(Q, k)``.
        scores: float32 ``(Q, k)``, dot products.
    """

    rows: NDArray[np.int64]
    scores: NDArray[np.float32]


class _Pairs(NamedTuple):
    """Rows that were compared with queries, each ``(P,)``."""

    queries: NDArray[np.int64]
    rows: NDArray[np.int64]
    scores: NDArray[np.float32]


class ExactIndex:
    """Vectors that can be searched.

    Args:
        matrix: float32 ``(N, D)``, may be mapped from a file; not copied on a processor.
        device: ``cpu`` or a GPU's name; there the vectors stay if they fit, else they pass by in every search.
        coarse: a coarse copy of the same vectors, which makes searches on a processor faster.
        check: is told the rows of the matrix that an answer is about to depend on, int64 ``(n,)``, and raises where
            they are damaged.

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
        self.matrix = matrix
        self.norm = _checked_norm(matrix) if coarse is None else coarse.norm
        self._scan = Scan(matrix, self.norm, device, coarse)
        self._check = check or (lambda rows: None)

    def __len__(self) -> int:
        return len(self.matrix)

    def search(self, queries: NDArray[np.float32], k: int, allowed: NDArray[np.int64] | None = None) -> Nearest:
        """The best rows of each query.

        Args:
            queries: float32 ``(Q, D)``.
            k: how many, at least 0; fewer where there are fewer rows.
            allowed: rows that may be found, int64 ``(A,)``; None for all.

        Raises:
            ValueError: for queries of another length or that are not finite, a negative ``k``, or rows that are not
                there.
        """
        if queries.ndim != 2 or queries.shape[1] != self.matrix.shape[1]:
            raise ValueError(f"queries: are {queries.shape}, must be (Q, {self.matrix.shape[1]})")
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
        step = max(1, min(_QUERIES, _FOUND // max(1, k)))
        for start in range(0, len(queries) if k else 0, step):
            some = np.ascontiguousarray(queries[start : start + step], np.float64)
            found = _Search(self.matrix, self._scan, some, k, allowed, self._check).run()
            rows[start : start + step] = found.rows.reshape(len(some), k)
            scores[start : start + step] = found.scores.reshape(len(some), k)
        return Nearest(rows, scores)


class _Search:
    """One search of some queries."""

    def __init__(
        self,
        matrix: NDArray[np.float32],
        scan: Scan,
        queries: NDArray[np.float64],
        k: int,
        allowed: NDArray[np.int64] | None,
        check: Callable[[NDArray[np.int64]], None],
    ) -> None:
        self.check = check
        self.matrix, self.scan, self.queries, self.k, self.allowed = matrix, scan, queries, k, allowed
        self.asked = scan.ask(queries)
        self.total = len(matrix) if allowed is None else len(allowed)
        none = np.empty(0, np.int64)
        self.found = _Pairs(none, none, np.empty(0, np.float32))
        # What a row has to score to be among the best so far.
        self.bar = np.full(len(queries), -np.inf)

    def run(self) -> _Pairs:
        """Scans all rows; the best ``k`` of each query, in the order of the queries."""
        import torch

        count = len(self.queries)
        sample = min(self.total, max(_SAMPLE, 4 * self.k))
        step = max(1, min(self.total, _CELLS // count))
        out = self.scan.buffer(max(sample, step), count)
        self.mask = torch.zeros(_in_words(step * count), dtype=torch.bool, device=out.device)
        self._set_bar(sample, out)
        for start in range(0, self.total, step):
            self._take(start, min(start + step, self.total), out)
        return self.found

    def _set_bar(self, sample: int, out: torch.Tensor) -> None:
        """The bar that the first rows set; what they found is found again, and dropped here."""
        places = self._scanned(0, sample, out).T.contiguous().topk(self.k, dim=1, sorted=False).indices.cpu().numpy()
        queries = np.repeat(np.arange(len(self.queries)), self.k)
        scores = self._exactly(queries, self._row_numbers(0, places.reshape(-1)))
        self.bar = scores.reshape(len(self.queries), self.k).min(axis=1).astype(np.float64)

    def _take(self, start: int, stop: int, out: torch.Tensor) -> None:
        """Looks for better rows in a block."""
        import torch

        scanned = self._scanned(start, stop, out)
        floating = scanned.is_floating_point()
        flat = _places_above(scanned, torch.from_numpy(self._least(floating)).to(scanned.device), self.mask)
        approximate = scanned.view(-1)[flat].cpu().numpy()
        places, queries = np.divmod(flat.cpu().numpy(), len(self.queries))
        rows = self._row_numbers(start, places)
        # The best of the block first: they raise the bar, and most others need not be computed.
        best = _leading(_Pairs(queries, rows, approximate), self.k)
        self._merge(queries[best], rows[best])
        rest = approximate >= self._least(floating)[queries]
        rest[best] = False
        self._merge(queries[rest], rows[rest])

    def _scanned(self, start: int, stop: int, out: torch.Tensor) -> torch.Tensor:
        """Approximate scores of rows from the allowed ones."""
        rows = slice(start, stop) if self.allowed is None else self.allowed[start:stop]
        return self.scan.scores(rows, self.asked, out)

    def _row_numbers(self, start: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows of the matrix at places of a block."""
        return places + start if self.allowed is None else self.allowed[places + start]

    def _least(self, floating: bool) -> NDArray[np.float32] | NDArray[np.int32]:
        """What the scan must say of a row that may be among the best, ``(Q,)``; rounded down."""
        scores = self.bar - self.asked.margin - 1e-6 * np.abs(self.bar)
        least = (scores - self.asked.offset) / self.asked.factor
        if floating:
            lower: NDArray[np.float32] = np.nextafter(least.astype(np.float32), np.float32(-np.inf))
            return lower
        limit = np.iinfo(np.int32)
        whole: NDArray[np.int32] = np.clip(np.floor(least), limit.min, limit.max).astype(np.int32)
        return whole

    def _merge(self, queries: NDArray[np.int64], rows: NDArray[np.int64]) -> None:
        """Computes scores, keeps the best and raises the bar."""
        pairs = _Pairs(
            np.concatenate((self.found.queries, queries)),
            np.concatenate((self.found.rows, rows)),
            np.concatenate((self.found.scores, self._exactly(queries, rows))),
        )
        best = _leading(pairs, self.k)
        self.found = _Pairs(pairs.queries[best], pairs.rows[best], pairs.scores[best])
        last = np.searchsorted(self.found.queries, np.arange(len(self.queries)), side="right") - 1
        counts = np.bincount(self.found.queries, minlength=len(self.queries))
        full = counts == self.k
        self.bar[full] = np.maximum(self.bar[full], self.found.scores[last[full]])

    def _exactly(self, queries: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Dot products of pairs ``(P,)``, summed in float64 in an order that depends on nothing."""
        scores = np.empty(len(rows), np.float32)
        self.check(rows)
        for start in range(0, len(rows), _PAIRS):
            some = slice(start, start + _PAIRS)
            scores[some] = (self.queries[queries[some]] * self.matrix[rows[some]]).sum(axis=1)
        return scores


def _places_above(scanned: torch.Tensor, least: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Where a score of ``scanned`` ``(B, Q)`` reaches ``least`` ``(Q,)``: places in the flat matrix, ascending.

    Args:
        scanned: scores.
        least: bars of the queries.
        mask: bool, room for at least as many words of eight, used again and again.
    """
    import torch

    torch.ge(scanned, least, out=mask[: scanned.numel()].view(scanned.shape))
    bytes_ = mask[: _in_words(scanned.numel())]
    bytes_[scanned.numel() :] = False
    # Few places are true: eight at a time are looked at.
    words = bytes_.view(torch.int64).nonzero()
    places = words * 8 + torch.arange(8, device=mask.device)
    return places[bytes_.view(-1, 8)[words.view(-1)]]


def _in_words(count: int) -> int:
    """The next multiple of eight."""
    return -(-count // 8) * 8


def _leading(pairs: _Pairs, k: int) -> NDArray[np.int64]:
    """Places of the ``k`` best pairs of each query, by query, best first, of equal ones the lower row first."""
    order = np.lexsort((pairs.rows, -pairs.scores, pairs.queries))
    queries = pairs.queries[order]
    rank = np.arange(len(order)) - np.searchsorted(queries, queries)
    return order[rank < k]


def _checked_norm(matrix: NDArray[np.float32]) -> float:
    """Largest length of a row.

    Raises:
        ValueError: if a row is not finite.
    """
    norm = 0.0
    for start in range(0, len(matrix), _PAIRS):
        block = matrix[start : start + _PAIRS]
        length = longest(block)
        if not np.isfinite(length):
            row = start + int(np.flatnonzero(~np.isfinite(block).all(axis=1))[0])
            raise ValueError(f"vectors: row {row} holds numbers that are not finite")
        norm = max(norm, length)
    return norm
