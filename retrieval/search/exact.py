"""Exact search: the ``k`` vectors of a matrix with the largest dot products, of a million of them in a blink.

A fast and slightly wrong scan of all rows (integers where the processor has dot products of bytes and there is a coarse
copy, else float32, on a GPU if asked) leaves the few rows whose scores may be among the best, by a proven bound. Only
these are computed anew, in float64 and one by one. So the answer is that of a comparison with every vector, equal
vectors have equal scores, and a query's result does not depend on the queries beside it.

A copy of vectors in a quarter of their bytes, with a bound on what it gets wrong.

Reading a million vectors from memory is what a search of one query takes its time for. With eight bits a number there
is a quarter to read, and processors with integer dot products (VNNI) multiply four times as many at once. Dot products
with the copy are off by at most ``CoarseQuery.margin`` (Cauchy-Schwarz on the lengths of what rounding left). Whoever
looks at all rows within the margin, and computes these anew, has the exact answer.

The fast and slightly wrong scan of all rows that exact search begins with, and how wrong it may be.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch


LEVELS = 127
"""Largest code; -128 stays unused, so that codes are symmetric."""

_ROUNDING = 1e-6
"""Relative slack for the rounding of float32 in what is computed about a copy."""

_BLOCK = 16384
"""Rows at a time."""


@dataclass(frozen=True)
class Coarse:
    """Vectors as ``centre + scale * codes``, rounded.

    Attributes:
        codes: int8 ``(N, D)``.
        centre: float32 ``(D,)``, mean of the vectors: what all have in common needs no bits.
        scale: float32 ``(D,)``, greater than 0, step from one code to the next.
        residual: largest length of a row of ``vectors - centre - scale * codes``.
        reach: largest length of a row of ``codes``.
        norm: largest length of a vector.
    """

    codes: NDArray[np.int8]
    centre: NDArray[np.float32]
    scale: NDArray[np.float32]
    residual: float
    reach: float
    norm: float


class CoarseQuery(NamedTuple):
    """Queries for a coarse copy: a score is ``offset + factor * (codes @ query)``, give or take ``margin``.

    Attributes:
        codes: int8 ``(Q, D)``.
        offset: float64 ``(Q,)``.
        factor: float64 ``(Q,)``, greater than 0.
        margin: float64 ``(Q,)``.
    """

    codes: NDArray[np.int8]
    offset: NDArray[np.float64]
    factor: NDArray[np.float64]
    margin: NDArray[np.float64]


class Spread:
    """Mean and extremes of each dimension, gathered batch by batch."""

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.total = np.zeros(dim)
        self.low = np.full(dim, np.inf, np.float32)
        self.high = np.full(dim, -np.inf, np.float32)

    def add(self, vectors: NDArray[np.float32]) -> None:
        """Counts vectors ``(B, D)``."""
        if not len(vectors):
            return
        self.count += len(vectors)
        self.total += vectors.sum(axis=0, dtype=np.float64)
        np.minimum(self.low, vectors.min(axis=0), out=self.low)
        np.maximum(self.high, vectors.max(axis=0), out=self.high)

    def centre_and_scale(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Centre and step of each dimension, float32 ``(D,)``; no vector lies outside of the codes."""
        if not self.count:
            return np.zeros_like(self.low), np.ones_like(self.low)
        centre = (self.total / self.count).astype(np.float32)
        scale = np.maximum(self.high - centre, centre - self.low) / LEVELS
        return centre, np.maximum(scale, np.finfo(np.float32).tiny).astype(np.float32)


class Coder:
    """Turns vectors into codes, block by block, and keeps the bounds."""

    def __init__(self, centre: NDArray[np.float32], scale: NDArray[np.float32]) -> None:
        self.centre, self.scale = centre, scale
        self.residual = self.reach = self.norm = 0.0

    def code(self, vectors: NDArray[np.float32]) -> NDArray[np.int8]:
        """Codes of vectors ``(B, D)``, int8 ``(B, D)``."""
        away = vectors - self.centre
        rounded = np.rint(away / self.scale)
        np.clip(rounded, -LEVELS, LEVELS, out=rounded)
        self.norm = max(self.norm, longest(vectors))
        self.reach = max(self.reach, longest(rounded))
        self.residual = max(self.residual, longest(away - rounded * self.scale) + _ROUNDING * longest(away))
        codes: NDArray[np.int8] = rounded.astype(np.int8)
        return codes

    def done(self, codes: NDArray[np.int8]) -> Coarse:
        """The copy, with all codes."""
        return Coarse(codes, self.centre, self.scale, self.residual, self.reach, self.norm)


def coarse_copy(matrix: NDArray[np.float32]) -> Coarse:
    """A coarse copy in memory.

    Args:
        matrix: float32 ``(N, D)``, finite.
    """
    spread = Spread(matrix.shape[1])
    for block in blocks(matrix):
        spread.add(block)
    coder = Coder(*spread.centre_and_scale())
    codes = [coder.code(block) for block in blocks(matrix)]
    return coder.done(np.concatenate(codes) if codes else np.zeros(matrix.shape, np.int8))


def blocks(matrix: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    """The rows of a matrix, some at a time."""
    for start in range(0, len(matrix), _BLOCK):
        yield matrix[start : start + _BLOCK]


def longest(rows: NDArray[np.float32]) -> float:
    """Largest Euclidean length of the rows ``(B, D)``, 0 without rows."""
    return float(np.sqrt(np.einsum("ij,ij->i", rows, rows).max(initial=0)))


def coarse_queries(coarse: Coarse, queries: NDArray[np.float64]) -> CoarseQuery:
    """Queries in codes, and how far scores may be off.

    With ``w = queries * scale`` a score is ``query · centre + w · codes + query · residual``; ``w`` has codes too.

    Args:
        coarse: the copy to be asked.
        queries: float64 ``(Q, D)``.
    """
    weighted = queries * coarse.scale
    factor = np.maximum(np.abs(weighted).max(axis=1, initial=0) / LEVELS, np.finfo(np.float64).tiny)
    codes = np.rint(weighted / factor[:, None])
    lost = np.linalg.norm(weighted - factor[:, None] * codes, axis=1)
    lengths = np.linalg.norm(queries, axis=1)
    margin = lost * coarse.reach + lengths * (coarse.residual + _ROUNDING * coarse.norm)
    return CoarseQuery(codes.astype(np.int8), queries @ coarse.centre.astype(np.float64), factor, margin * 1.0001)


ROOM = 256 << 20
"""Bytes that are left free on a GPU for the scores."""

_GPU_ERROR = 2.0**-7
"""Bound of the relative error of a product on a GPU, which torch may be told to do in TF32 or bfloat16."""


class Asked(NamedTuple):
    """Queries of a scan; a score is ``offset + factor * scanned``, give or take ``margin``.

    Attributes:
        columns: ``(D, Q)``, on the scan's device.
        offset: float64 ``(Q,)``.
        factor: float64 ``(Q,)``.
        margin: float64 ``(Q,)``.
    """

    columns: torch.Tensor
    offset: NDArray[np.float64]
    factor: NDArray[np.float64]
    margin: NDArray[np.float64]


class Scan:
    """Approximate scores of all rows, with their bound."""

    def __init__(self, matrix: NDArray[np.float32], norm: float, device: str, coarse: Coarse | None) -> None:
        self.device, self.norm = device, norm
        self.coarse = coarse if device == "cpu" and integer_products() else None
        self.vectors = _tensor(matrix if self.coarse is None else self.coarse.codes)
        if device != "cpu" and _fits(self.vectors, device):
            self.vectors = self.vectors.to(device)

    def ask(self, queries: NDArray[np.float64]) -> Asked:
        """Queries float64 ``(Q, D)`` as the scan takes them."""
        import torch

        if self.coarse is None:
            error = _float_error(queries.shape[1]) if _is_processor(self.device) else _GPU_ERROR
            margin = np.linalg.norm(queries, axis=1) * self.norm * error
            columns = torch.from_numpy(queries.astype(np.float32).T).contiguous()
            return Asked(columns.to(self.device), np.zeros(len(queries)), np.ones(len(queries)), margin)
        asked = coarse_queries(self.coarse, queries)
        return Asked(torch.from_numpy(asked.codes.T).contiguous(), asked.offset, asked.factor, asked.margin)

    def scores(self, rows: slice | NDArray[np.int64], asked: Asked, out: torch.Tensor) -> torch.Tensor:
        """Scores ``(B, Q)`` in the scan's own unit, written over ``out``, which has at least as many rows."""
        import torch

        if isinstance(rows, slice):
            block = self.vectors[rows]
        elif _is_processor(self.device):
            # NumPy copies rows whole, torch number by number, which takes several times as long.
            block = _tensor(self.vectors.numpy()[rows])
        else:
            block = self.vectors[torch.from_numpy(rows).to(self.vectors.device)]
        block, out = block.to(self.device), out[: len(block)]
        if self.coarse is not None:
            return torch._int_mm(block, asked.columns, out=out)
        if not _is_processor(self.device):
            return torch.mm(block, asked.columns, out=out)
        # NumPy's float32 is float32, whatever torch has been told.
        np.matmul(block.numpy(), asked.columns.numpy(), out=out.numpy())
        return out

    def buffer(self, rows: int, queries: int) -> torch.Tensor:
        """Room for scores of blocks, used again and again."""
        import torch

        dtype = torch.float32 if self.coarse is None else torch.int32
        return torch.empty((rows, queries), dtype=dtype, device=self.device)


def _float_error(dim: int) -> float:
    """Bound of the relative error of a dot product in float32, in any order of summation."""
    return (dim + 8) * 2.0**-23


def _is_processor(device: str) -> bool:
    return device.startswith("cpu")


def integer_products() -> bool:
    """Whether the processor multiplies bytes fast, and without overflow."""
    import torch

    return bool(torch.cpu.get_capabilities().get("avx512_vnni"))


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
    return vectors.nbytes + ROOM < free


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
