"""A gallery: pictures with their vectors and all that a model said of them, to be filled once and searched often.

Up to ``EXACT_LIMIT`` pictures every search is exact; past that it uses an approximate index, if one was built.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from retrieval.filter_columns import filter_columns
from retrieval.filtered_rows import FilteredRows, Where
from retrieval.filters import IN_ONE_CONDITION, Column, checked_filter, one_of
from retrieval.gallery_captions import GalleryCaptions
from retrieval.gallery_writer import GalleryWriter
from retrieval.hits import CaptionHit, Hit
from retrieval.model_change import difference
from retrieval.schema import CAPTIONS, IDENTITY_KEY, PICTURES, ModelIdentity, caption_schema, picture_schema
from retrieval.store import ROW_ID, Neighbours, Store, create_store, matrix_of, open_store
from retrieval.vector_rows import VectorRows, check_lengths
from vitrail.errors import UserError
from vitrail.files import local_folder, writing_lock

if TYPE_CHECKING:
    import pyarrow as pa

    from retrieval.vector_index import IndexReport

EXACT_LIMIT = 1_000_000
"""Pictures up to which every search compares all vectors: tens of milliseconds, and nothing is missed."""


class Gallery:
    """See ``open``, ``create`` and ``open_or_create``.

    Whoever reads goes on with what was there at the opening; what others write is seen by opening again.

    Attributes:
        identity: which model made it.
        uri: where it is.
    """

    def __init__(
        self, uri: str, identity: ModelIdentity, pictures: Store, captions: Store | None, device: str = "cpu"
    ) -> None:
        self.uri = uri
        self.identity = identity
        self._pictures = pictures
        self._captions = captions
        self._fitting = FilteredRows(pictures)
        self._vectors = VectorRows(pictures, uri, PICTURES, device)
        self._said = None if captions is None else GalleryCaptions(captions, uri, device)

    @classmethod
    def open(cls, uri: str, device: str = "cpu") -> Gallery:
        """Opens a gallery to read or to fill further.

        Args:
            uri: a folder, or the URI of one at an object store.
            device: where searches are computed, ``cpu`` or a GPU's name.

        Raises:
            UserError: where there is none, its files are damaged, or it was made by a newer version.
        """
        pictures = open_store(uri, PICTURES)
        if pictures is None:
            folder = local_folder(uri)
            there = "is no gallery" if folder is not None and folder.exists() else "there is no gallery here"
            raise UserError(f"{uri}: {there}; make one: python -m retrieval index --run RUN --gallery {uri}")
        text = (pictures.schema.metadata or {}).get(IDENTITY_KEY)
        if text is None:
            raise UserError(f"{uri}: has a table {PICTURES!r} that is no gallery's; name a new gallery")
        identity = ModelIdentity.from_json(text.decode(), uri)
        return cls(uri, identity, pictures, open_store(uri, CAPTIONS), device)

    @classmethod
    def create(cls, uri: str, identity: ModelIdentity, device: str = "cpu") -> Gallery:
        """Makes an empty gallery.

        Raises:
            UserError: where there is one already, the place cannot be written, or a task's name cannot be a column's.
        """
        for task in dict.fromkeys([*identity.labels, *identity.predicts]):
            if "." in task or "`" in task:
                raise UserError(f"{uri}: attribute {task!r} cannot be a column of a gallery; rename it without . and `")
        if open_store(uri, PICTURES) is not None:
            raise UserError(f"{uri}: there is a gallery already; name a new one")
        folder = local_folder(uri)
        if folder is not None and folder.exists() and not folder.is_dir():
            raise UserError(f"{uri}: is a file; name a folder for the gallery")
        # The table of pictures last: a gallery is there as soon as it is.
        captions = None
        if identity.encodes_text:
            captions = create_store(uri, CAPTIONS, caption_schema(identity), replace=True)
        pictures = create_store(uri, PICTURES, picture_schema(identity))
        return cls(uri, identity, pictures, captions, device)

    @classmethod
    def open_or_create(cls, uri: str, identity: ModelIdentity, device: str = "cpu") -> Gallery:
        """Opens the gallery to add pictures of the same model, or makes an empty one.

        Raises:
            UserError: where the gallery was made by another model, or the data have other tasks.
        """
        if open_store(uri, PICTURES) is None:
            folder = local_folder(uri)
            try:
                if folder is not None and not folder.is_file():
                    folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"{uri}: cannot be written ({error.strerror}); name another place") from error
            # Of two that begin at once one makes the gallery; the other is told, or finds it there.
            with writing_lock(uri):
                if open_store(uri, PICTURES) is None:
                    return cls.create(uri, identity, device)
        gallery = cls.open(uri, device)
        refused = difference(gallery.identity, identity)
        if refused:
            raise UserError(
                f"{uri}: was made by {gallery.identity.task} of {gallery.identity.run or 'an unknown run'}, and "
                f"{refused}; vectors of two models do not compare: name a new gallery"
            )
        return gallery

    def __len__(self) -> int:
        return len(self._pictures)

    def n_captions(self) -> int:
        """Number of captions with vectors of their own."""
        return 0 if self._said is None else len(self._said)

    def captions_of(self, ids: Sequence[str]) -> pa.Table:
        """Captions of some pictures, with their vectors.

        Returns:
            Columns ``picture``, ``caption`` and ``vector`` (of unit length), in the order in which they were written.

        Raises:
            UserError: where the gallery has no captions with vectors.
        """
        return self._with_captions().of_pictures(ids)

    def columns(self) -> list[str]:
        """Names that a filter may use: those of the table, then the short ones (``colour``, ``confidence``)."""
        return list(self._filter_columns())

    @contextmanager
    def writing(self) -> Iterator[GalleryWriter]:
        """Lets one writer at a time change the newest revision; then makes ready what the next search needs.

        Captions whose picture was never written, because a writer was killed between the two, are removed first.

        Raises:
            UserError: while somebody else writes, and where the disk is full.
        """
        with writing_lock(self.uri):
            stores = [store for store in (self._pictures, self._captions) if store is not None]
            for store in stores:
                store.refresh()
            before = [store.revision for store in stores]
            writer = GalleryWriter(self.identity, self._pictures, self._captions)
            writer.remove_orphans()
            yield writer
            if [store.revision for store in stores] != before:
                for store in stores:
                    store.tidy()
            if not self._uses_index(None):
                self._vectors.refresh()
            if self._said is not None:
                self._said.refresh()

    def table(self, columns: Sequence[str], where: str = "") -> pa.Table:
        """Metadata in the gallery's order.

        Args:
            columns: names of the table's columns.
            where: filter as a user writes it; empty for all.

        Raises:
            UserError: for a filter that is none.
        """
        return self._pictures.scan(columns, self._condition(where)).select(list(columns))

    def places(self, where: str = "") -> NDArray[np.int64]:
        """Places ``(n,)`` in the gallery's order of the pictures that fit a filter, ascending.

        Raises:
            UserError: for a filter that is none.
        """
        return self._fitting.places(self._condition(where))

    def id_of(self, text: str) -> str:
        """The id as the gallery spells it, of a text that may be in another Unicode normal form; else the text."""
        forms = dict.fromkeys([text, *(unicodedata.normalize(form, text) for form in ("NFC", "NFD"))])
        if len(forms) == 1:
            return text
        there = set(self._pictures.scan(["id"], one_of("id", list(forms))).column("id").to_pylist())
        return next((form for form in forms if form in there), text)

    def rows(self, ids: Sequence[str], columns: Sequence[str]) -> pa.Table:
        """Rows in the order of ``ids``.

        Raises:
            UserError: names the first id that is not there.
        """
        return self._pictures.take(self._row_ids(ids), columns)

    def vectors(self, ids: Sequence[str]) -> NDArray[np.float32]:
        """Vectors in the order of ``ids``.

        Returns:
            float32 ``(len(ids), D)``, of unit length.

        Raises:
            UserError: names the first id that is not there.
        """
        vectors = matrix_of(self.rows(ids, ["vector"]).column("vector"))
        check_lengths(vectors, self._pictures.origin)
        return vectors

    def nearest(
        self, queries: NDArray[np.float32], k: int, where: Where = "", *, exact: bool | None = None
    ) -> list[list[Hit]]:
        """The pictures nearest to each query, best first; equal scores in the gallery's order.

        Args:
            queries: float32 ``(Q, D)``, of unit length.
            k: how many; fewer where the gallery, or what the filter leaves of it, has fewer.
            where: only these, which holds before the best are chosen; the approximate index takes no places.
            exact: False to use the approximate index; None: only past ``EXACT_LIMIT``, if one was built.

        Raises:
            UserError: for a filter that is none, vectors of another length, ``k`` below 1, or no index to use.
        """
        self._check_queries(queries, k)
        if isinstance(where, str) and self._uses_index(exact):
            condition = self._condition(where)
            found = [self._pictures.nearest(query, k, condition) for query in queries]
        else:
            found = self._vectors.nearest(queries, k, self._allowed(where))
        ids = self._names(found)
        return [
            [Hit(ids[row], float(score)) for row, score in zip(near.row_ids.tolist(), near.scores, strict=True)]
            for near in found
        ]

    def nearest_captions(self, queries: NDArray[np.float32], k: int, where: str = "") -> list[list[CaptionHit]]:
        """The captions nearest to each query, best first, each text once.

        Args:
            queries: float32 ``(Q, D)``, of unit length.
            k: how many.
            where: filter on the pictures that the captions belong to.

        Raises:
            UserError: where the gallery has no captions with vectors, and as ``nearest``.
        """
        self._check_queries(queries, k)
        pictures = self._pictures.scan(["id"], self._condition(where)).column("id").to_pylist()
        return self._with_captions().nearest(queries, k, pictures)

    def build_index(self, *, sample: int = 200, k: int = 10) -> IndexReport:
        """Builds the approximate index and measures what it finds of the exact answer.

        Args:
            sample: number of stored vectors that are searched for.
            k: number of neighbours that are compared.

        Raises:
            UserError: for a gallery too small for an index, and while somebody else writes.
        """
        from retrieval.vector_index import build_index

        with writing_lock(self.uri):
            self._pictures.refresh()
            former = self._pictures.revision
            report = build_index(self._pictures, self.uri, sample=sample, k=k)
            self._vectors.rename_to_revision(former)
        return report

    def has_index(self) -> bool:
        """Whether an approximate index was built."""
        return self._pictures.has_index()

    def _with_captions(self) -> GalleryCaptions:
        if self._said is None or len(self._said) == 0:
            raise UserError(f"{self.uri}: has no captions; they come with a dual encoder on data with captions")
        return self._said

    def _uses_index(self, exact: bool | None) -> bool:
        if exact is None:
            return len(self) > EXACT_LIMIT and self.has_index()
        if not exact and not self.has_index():
            raise UserError(f"{self.uri}: has no index; make one: python -m retrieval build-index --gallery {self.uri}")
        return not exact

    def _check_queries(self, queries: NDArray[np.float32], k: int) -> None:
        if k < 1:
            raise UserError(f"top-k: is {k}, must be at least 1")
        if queries.ndim != 2 or queries.shape[1] != self.identity.dim:
            raise UserError(
                f"{self.uri}: holds vectors of length {self.identity.dim}, the query's shape is {queries.shape}; "
                "was it encoded by another model?"
            )
        if not np.isfinite(queries).all():
            raise UserError("the query's vector is not finite; the model is broken (a run that diverged?)")

    def _row_ids(self, ids: Sequence[str]) -> NDArray[np.uint64]:
        few = len(ids) <= IN_ONE_CONDITION
        known = self._pictures.scan(["id"], one_of("id", ids) if few and ids else "")
        places = dict(zip(known.column("id").to_pylist(), known.column(ROW_ID).to_pylist(), strict=True))
        for name in ids:
            if name not in places:
                raise UserError(f"{self.uri}: there is no picture {name!r} in the gallery; searches show ids")
        return np.array([places[name] for name in ids], np.uint64)

    def _allowed(self, where: Where) -> NDArray[np.uint64] | None:
        if isinstance(where, str):
            return self._fitting.row_ids(self._condition(where)) if where else None
        return self._fitting.row_ids("")[where]

    def _names(self, found: Sequence[Neighbours]) -> dict[int, str]:
        rows = np.unique(np.concatenate([near.row_ids for near in found] or [np.zeros(0, np.uint64)]))
        if len(rows) == 0:
            return {}
        names = self._pictures.take(rows, ["id"]).column("id").to_pylist()
        return dict(zip(rows.tolist(), names, strict=True))

    def _condition(self, where: str) -> str:
        return checked_filter(where, self._filter_columns()) if where else ""

    def _filter_columns(self) -> dict[str, Column]:
        return filter_columns(self._pictures.schema.names, self.identity)
