"""Whether a search by words found something, or only what is least unlike: vectors always have a nearest one.

The gallery's own captions are the measure. Each of them has a picture it belongs to, so a query that fits should be as
similar to its best picture as captions are to theirs. The conformal p-value of the hypothesis that the query is one
more caption of the gallery is

    p = (1 + number of captions that are at most as similar to their best picture) / (1 + number of captions)

and where p ≤ ``ALPHA`` the match is called weak. Captions of training pictures are left out where there are others: the
model knows them by heart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from app.served_gallery import ServedGallery

ALPHA = 0.05
"""Share of the gallery's own captions that would be called weak."""

FEWEST, MOST = 19, 128
"""Captions with which a p-value can be as low as ``ALPHA``, and those that are compared with."""

_AT_A_TIME = 32


class WeakMatches:
    """Best cosines of captions.

    Args:
        usual: float32 ``(N,)``, of each caption that of its most similar picture.
    """

    def __init__(self, usual: NDArray[np.float32]) -> None:
        self._usual = np.sort(usual)

    @classmethod
    def of(cls, gallery: ServedGallery) -> WeakMatches:
        """Captions of a gallery, evenly spread over it; none where it has none, or its model is not served."""
        captions = _captions(gallery)
        if gallery.run is None or not gallery.identity.encodes_text or len(captions) < FEWEST:
            return cls(np.zeros(0, np.float32))
        chunks = [captions[start : start + _AT_A_TIME] for start in range(0, len(captions), _AT_A_TIME)]
        vectors = np.concatenate([gallery.run.encode_texts(chunk) for chunk in chunks])
        return cls(np.array([hits[0].score for hits in gallery.gallery.nearest(vectors, 1)], np.float32))

    def weakness(self, top: float) -> str:
        """Why a query whose best picture has this cosine found rather nothing; empty where it may have."""
        count = len(self._usual)
        if count < FEWEST:
            return ""
        p_value = (1 + int(np.searchsorted(self._usual, top, side="right"))) / (1 + count)
        if p_value > ALPHA:
            return ""
        return (
            f"Nearly all of the gallery's own captions are more similar to their best picture "
            f"(p = {p_value:.3f} beside {count} of them)."
        )


def _captions(gallery: ServedGallery) -> list[str]:
    columns = gallery.metadata
    texts, splits = columns.column("caption").to_pylist(), columns.column("split").to_pylist()
    unseen = dict.fromkeys(text for text, split in zip(texts, splits, strict=True) if text and split != "train")
    distinct = list(unseen if len(unseen) >= FEWEST else dict.fromkeys(text for text in texts if text))
    places = np.unique(np.linspace(0, len(distinct) - 1, min(MOST, len(distinct))).astype(np.int64))
    return [distinct[place] for place in places.tolist()]
