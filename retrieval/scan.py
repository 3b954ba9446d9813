"""The fast and slightly wrong scan of all rows that exact search begins with, and how wrong it may be."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from retrieval.coarse import Coarse, coarse_queries

if TYPE_CHECKING:
    import torch

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
