"""Encodings of several processes on their way into one gallery: each process writes whole shards, one joins them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from retrieval.encoding import Encoded
from vitrail.files import read_parquet, write_parquet, written_whole

if TYPE_CHECKING:
    import pyarrow as pa

_CAPTIONS = ".captions.parquet"


def write_shard(folder: Path, rank: int, number: int, encoded: Encoded) -> None:
    """Writes what one process has encoded since its last shard.

    Args:
        folder: that all processes see.
        rank: of this process.
        number: of the shard on this process.
        encoded: its pictures and captions.
    """
    # Captions first: a shard counts once its pictures are there.
    if encoded.captions is not None:
        with written_whole(folder / f"rank{rank}-{number}{_CAPTIONS}") as partial:
            write_parquet(encoded.captions, partial)
    with written_whole(folder / f"rank{rank}-{number}.parquet") as partial:
        write_parquet(encoded.pictures, partial)


@dataclass(frozen=True, eq=False)
class Shards:
    """All shards of a folder as one list of samples.

    Attributes:
        sample_ids: int64 ``(n,)``, ascending, each once.
        files: of the pictures.
    """

    sample_ids: NDArray[np.int64]
    files: list[Path]
    _file: NDArray[np.int64]
    _row: NDArray[np.int64]

    @classmethod
    def of(cls, folder: Path) -> Shards:
        """Reads which samples there are; of one that several shards have, the first shard's counts."""
        files = sorted(path for path in folder.glob("rank*.parquet") if not path.name.endswith(_CAPTIONS))
        ids = [read_parquet(path, ["sample_id"]).column(0).to_numpy() for path in files]
        every = np.concatenate([*ids, np.zeros(0, dtype=np.int64)])
        distinct, first = np.unique(every, return_index=True)
        lengths = np.array([len(part) for part in ids], dtype=np.int64)
        file = np.repeat(np.arange(len(files)), lengths)[first]
        row = first - (np.cumsum(lengths) - lengths)[file]
        return cls(distinct, files, file, row)

    def chunks(self, sample_ids: NDArray[np.int64], chunk: int) -> Iterator[JoinedChunk]:
        """Some samples in their order, so many at a time.

        Args:
            sample_ids: int64, ascending, among those that there are.
            chunk: samples at a time.
        """
        for start in range(0, len(sample_ids), chunk):
            yield JoinedChunk(self, sample_ids[start : start + chunk])

    def read(self, sample_ids: NDArray[np.int64]) -> Encoded:
        """What the processes have encoded of some samples, in this order."""
        import pyarrow as pa

        places = np.searchsorted(self.sample_ids, sample_ids)
        files, rows = self._file[places], self._row[places]
        pictures, captions = [], []
        for number in np.unique(files).tolist():
            mine = files == number
            pictures.append(_read(self.files[number]).take(rows[mine]))
            beside = self.files[number].with_suffix("").with_suffix(_CAPTIONS)
            if beside.exists():
                captions.append(_of_samples(_read(beside), sample_ids[mine]))
        joined = pa.concat_tables(pictures)
        return Encoded(
            joined.take(np.argsort(joined.column("sample_id").to_numpy(), kind="stable")),
            pa.concat_tables(captions).sort_by([("sample_id", "ascending"), ("number", "ascending")])
            if captions
            else None,
        )


@dataclass(frozen=True, eq=False)
class JoinedChunk:
    """A chunk that is read when it is asked for."""

    shards: Shards
    sample_ids: NDArray[np.int64]

    def encoded(self) -> Encoded:
        """The columns."""
        return self.shards.read(self.sample_ids)


def _read(path: Path) -> pa.Table:
    return read_parquet(path)


def _of_samples(captions: pa.Table, sample_ids: NDArray[np.int64]) -> pa.Table:
    """The captions of some samples; of a sample that a process was given twice, once."""
    ids, numbers = captions.column("sample_id").to_numpy(), captions.column("number").to_numpy()
    pairs = np.stack([ids, numbers], axis=1)
    once = np.zeros(len(pairs), dtype=bool)
    once[np.unique(pairs, axis=0, return_index=True)[1]] = True
    return captions.filter(once & np.isin(ids, sample_ids))
