"""Changes to a gallery: each is whole or not there at all, and in an order that a kill at any point does no harm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from retrieval.schema import ModelIdentity, caption_schema, picture_schema
from retrieval.store import Store, matrix_of
from vitrail.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

NOT_METADATA = ("vector", "thumbnail")
"""Columns that are large and of no use to a filter."""

UNIT_TOLERANCE = 1e-3
"""How far a vector's length may be from 1; half precision rounds by less."""


class GalleryWriter:
    """What ``Gallery.writing`` gives; not for use outside of its block."""

    def __init__(self, identity: ModelIdentity, pictures: Store, captions: Store | None) -> None:
        self._identity = identity
        self._pictures = pictures
        self._captions = captions
        self._ids: set[str] | None = None

    def known(self) -> pa.Table:
        """What is there, without vectors and thumbnails."""
        columns = [name for name in self._pictures.schema.names if name not in NOT_METADATA]
        return self._pictures.scan(columns).select(columns)

    def known_captions(self) -> pa.Table:
        """``picture`` and ``caption`` of all captions that are there, those of a picture in their order."""
        if self._captions is None:
            return caption_schema(self._identity).empty_table().select(["picture", "caption"])
        return self._captions.scan(["picture", "caption"]).select(["picture", "caption"])

    def add(self, pictures: pa.Table, captions: pa.Table | None = None) -> None:
        """Adds pictures; those whose id is there are replaced, and then stand at the gallery's end.

        Captions go first and pictures last, new ones in one commit. So after a kill a picture that is there has its
        captions, and captions without a picture are removed by the next writer.

        Args:
            pictures: with the columns of ``picture_schema``.
            captions: with the columns of ``caption_schema``: all captions of these pictures. None leaves those that
                are there.

        Raises:
            UserError: for a vector that is not of unit length, a second writer, or a full disk.
            ValueError: for other columns, an id twice, or captions of other pictures.
        """
        pictures = _checked(pictures, picture_schema(self._identity))
        ids = pictures.column("id").to_pylist()
        known = self._known_ids()
        if captions is not None:
            self._put_captions(captions, ids)
        is_known = np.array([name in known for name in ids], bool)
        self._pictures.replace(pictures.filter(is_known))
        self._pictures.append(pictures.filter(~is_known))
        known.update(ids)

    def remove(self, ids: Sequence[str]) -> None:
        """Removes pictures and their captions.

        Raises:
            UserError: names the first id that is not there, before anything is removed.
        """
        known = self._known_ids()
        for name in ids:
            if name not in known:
                raise UserError(f"{self._pictures.origin}: there is no picture {name!r} in the gallery")
        self._pictures.delete("id", list(ids))
        known.difference_update(ids)
        if self._captions is not None:
            self._captions.delete("picture", list(ids))

    def remove_orphans(self) -> None:
        """Removes captions whose picture is not there."""
        if self._captions is None or len(self._captions) == 0:
            return
        named = set(self._captions.scan(["picture"]).column("picture").to_pylist())
        orphans = sorted(named - self._known_ids())
        self._captions.delete("picture", orphans)

    def _known_ids(self) -> set[str]:
        if self._ids is None:
            self._ids = set(self._pictures.scan(["id"]).column("id").to_pylist())
        return self._ids

    def _put_captions(self, captions: pa.Table, ids: list[str]) -> None:
        captions = _checked(captions, caption_schema(self._identity))
        if self._captions is None:
            if captions.num_rows:
                raise ValueError("captions: the model encodes no texts")
            return
        owners = set(captions.column("picture").to_pylist())
        if not owners <= set(ids):
            raise ValueError(f"captions: of {sorted(owners - set(ids))[0]!r}, which is not among the pictures")
        again = [name for name in ids if name in self._known_ids()]
        self._captions.delete("picture", again)
        self._captions.append(captions)


def _checked(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """The rows with exactly the schema's columns.

    Raises:
        UserError: for a vector that is not of unit length.
        ValueError: for other columns, or an id twice or not at all.
    """
    missing = set(schema.names) ^ set(rows.column_names)
    if missing:
        raise ValueError(f"rows of a gallery: columns {sorted(missing)} are missing or unknown")
    # Metadata would be compared too.
    rows = rows.select(schema.names).cast(schema.remove_metadata())
    ids = rows.column("id").to_pylist()
    if len(set(ids)) != len(ids) or None in ids:
        raise ValueError("rows of a gallery: an id is there twice or missing")
    if rows.num_rows:
        lengths = np.linalg.norm(matrix_of(rows.column("vector")), axis=1)
        # Written so that NaN is refused.
        wrong = np.flatnonzero(~(np.abs(lengths - 1) <= UNIT_TOLERANCE))
        if len(wrong):
            raise UserError(
                f"picture {ids[wrong[0]]!r}: its vector has the length {lengths[wrong[0]]:.3g}, not 1; the model's "
                "embedding of it is broken (a run that diverged?)"
            )
    return rows
