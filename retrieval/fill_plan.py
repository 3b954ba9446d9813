"""What filling a gallery has to do: which pictures are to be encoded, and which only to be described anew."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from retrieval.schema import LABEL, ModelIdentity

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray


class Plan(NamedTuple):
    """What becomes of the pictures of a list.

    Attributes:
        encode: int64, places in the list that the model has to see.
        renew: int64, places that only have other labels, captions, paths or splits.
        added: bool, for all of the list, whether a picture is new.
        replaced: bool, for all of the list, whether another picture has its name.
    """

    encode: NDArray[np.int64]
    renew: NDArray[np.int64]
    added: NDArray[np.bool_]
    replaced: NDArray[np.bool_]


def plan(facts: pa.Table, known: pa.Table, captions: pa.Table | None, identity: ModelIdentity) -> Plan:
    """Compares what the data say with what the gallery holds.

    Args:
        facts: of ``DescribesPictures.picture_facts``, with the gallery's labels.
        known: rows of the gallery, without vectors.
        captions: ``picture`` and ``caption`` of the captions that it has vectors of; None where there are to be none.
        identity: of the gallery.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    place = pc.index_in(facts.column("id"), value_set=known.column("id").combine_chunks())
    there = known.take(place)  # null where a picture is not there
    is_new = place.is_null().to_numpy()
    unknown_content = pc.equal(facts.column("content"), "").to_numpy()
    other_content = _differs(facts.column("content"), there.column("content")) | unknown_content
    described = ["path", "caption", "group", "split", *(f"{LABEL}{task}" for task in identity.labels)]
    other = np.zeros(len(facts), dtype=bool)
    for name in described:
        other |= _differs(pc.cast(facts.column(name), pa.string()), there.column(name))
    replaced = ~is_new & other_content
    encode = is_new | replaced
    if captions is not None:
        encode |= _other_captions(facts, captions)  # their vectors have to be made anew
    return Plan(np.flatnonzero(encode), np.flatnonzero(other & ~encode), is_new, replaced)


def _differs(first: Any, second: Any) -> NDArray[np.bool_]:
    """Where two columns differ; null is like null only. bool ``(N,)``."""
    import pyarrow.compute as pc

    same = pc.fill_null(pc.equal(first, second), False)
    both_null = pc.and_(pc.is_null(first), pc.is_null(second))
    differs: NDArray[np.bool_] = pc.invert(pc.or_(same, both_null)).to_numpy()
    return differs


def _other_captions(facts: pa.Table, captions: pa.Table) -> NDArray[np.bool_]:
    """Which pictures have other captions than those that are known, bool ``(N,)``."""
    there: dict[str, list[str]] = {}
    for picture, caption in zip(*(captions.column(name).to_pylist() for name in ("picture", "caption")), strict=True):
        there.setdefault(picture, []).append(caption)
    pairs = zip(facts.column("id").to_pylist(), facts.column("captions").to_pylist(), strict=True)
    return np.array([texts != there.get(name, []) for name, texts in pairs], dtype=bool)
