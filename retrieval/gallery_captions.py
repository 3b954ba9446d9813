"""The captions of a gallery: texts with vectors of their own, each of which belongs to a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from retrieval.filters import one_of
from retrieval.hits import CaptionHit
from retrieval.schema import CAPTIONS
from retrieval.store import ROW_ID, Store
from retrieval.vector_rows import VectorRows

if TYPE_CHECKING:
    import pyarrow as pa


class GalleryCaptions:
    """What a gallery asks its table of captions.

    Args:
        store: the table.
        uri: place of the gallery.
        device: where searches are computed, ``cpu`` or a GPU's name.
    """

    def __init__(self, store: Store, uri: str, device: str) -> None:
        self._store = store
        self._vectors = VectorRows(store, uri, CAPTIONS, device)

    def __len__(self) -> int:
        return len(self._store)

    def refresh(self) -> None:
        """Makes ready what the next search needs."""
        self._vectors.refresh()

    def of_pictures(self, ids: Sequence[str]) -> pa.Table:
        """Captions of some pictures in the order in which they were written.

        Returns:
            Columns ``picture``, ``caption`` and ``vector``.
        """
        columns = ["picture", "caption", "vector"]
        return self._store.scan(columns, one_of("picture", ids)).select(columns)

    def nearest(self, queries: NDArray[np.float32], k: int, pictures: Sequence[str]) -> list[list[CaptionHit]]:
        """The captions nearest to each query, best first, each text once.

        Args:
            queries: float32 ``(Q, D)``, of unit length.
            k: how many.
            pictures: ids of those whose captions may be found.
        """
        captions = self._store.scan(["picture", "caption"]).to_pandas()
        shown = captions[captions["picture"].isin(pictures)].drop_duplicates("caption")
        found = self._vectors.nearest(queries, k, shown[ROW_ID].to_numpy(np.uint64))
        said = shown.set_index(ROW_ID)
        return [
            [
                CaptionHit(str(said.at[row, "caption"]), str(said.at[row, "picture"]), float(score))
                for row, score in zip(near.row_ids.tolist(), near.scores, strict=True)
            ]
            for near in found
        ]
