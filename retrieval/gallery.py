"""A gallery: images with their vectors and a model's predictions, filled once and searched often.

Up to ``EXACT_LIMIT`` images every search is exact; beyond that it uses an approximate index, if one was built. Changes
are complete or absent, in an order in which a kill at any point does no harm.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from retrieval.filters import IN_ONE_CONDITION, Column, checked_filter, filter_columns, one_of
from retrieval.schema import (
    CAPTIONS,
    IDENTITY_KEY,
    IMAGES,
    NOT_METADATA,
    CaptionHit,
    Hit,
    ModelIdentity,
    caption_schema,
    difference,
    image_schema,
    not_unit,
)
from retrieval.search.vectors import VectorRows, check_lengths
from retrieval.store import ROW_ID, Neighbours, Store, matrix_of
from vitrail.errors import UserError
from vitrail.files import current_keys, local_folder, lock

if TYPE_CHECKING:
    import pyarrow as pa

    from retrieval.search.vectors import IndexReport

EXACT_LIMIT = 1_000_000
"""Images up to which every search compares all vectors: tens of milliseconds, and nothing is missed."""

INDEX_FROM = 1000
"""Images below which an approximate index cannot be trained, and would gain nothing."""

Where = str | NDArray[np.int64]
"""Which images may be found: a filter as a user writes it, empty for all, or their places in the gallery's order."""

_FORMER_IMAGES, _FORMER_OWNER = "pictures", "picture"
"""Table of images, and column of captions that names the image, in galleries of version 0.1."""

_REMEMBERED = 8
"""Filters whose rows are remembered: paging through results repeats the same filter again and again."""


class GalleryWriter:
    """Changes a gallery, inside of ``with gallery.writing() as writer``."""

    def __init__(self, identity: ModelIdentity, images: Store, captions: Store | None) -> None:
        self._identity = identity
        self._images = images
        self._captions = captions
        self._ids: set[str] | None = None

    def known(self) -> pa.Table:
        """Return all rows, without vectors and thumbnails."""
        columns = [name for name in self._images.schema.names if name not in NOT_METADATA]
        return self._images.scan(columns).select(columns)

    def known_captions(self) -> pa.Table:
        """Return ``image`` and ``caption`` of all captions, those of an image in their order."""
        if self._captions is None:
            return caption_schema(self._identity).empty_table().select(["image", "caption"])
        return self._captions.scan(["image", "caption"]).select(["image", "caption"])

    def add(self, images: pa.Table, captions: pa.Table | None = None) -> None:
        """Add images; those whose id exists are replaced, and are then at the gallery's end.

        Captions are written first and images last, new ones in one commit. So after a kill every image has its
        captions, and captions without an image are removed by the next writer.

        Args:
            images: with the columns of ``image_schema``.
            captions: with the columns of ``caption_schema``: all captions of these images. None keeps the present ones.

        Raises:
            UserError: for a vector that is not of unit length, a second writer, or a full disk.
            ValueError: for other columns, an id twice, or captions of other images.
        """
        images = _checked(images, image_schema(self._identity))
        ids = images.column("id").to_pylist()
        known = self._known_ids()
        if captions is not None:
            self._put_captions(captions, ids)
        is_known = np.array([name in known for name in ids], bool)
        self._images.replace(images.filter(is_known))
        self._images.append(images.filter(~is_known))
        known.update(ids)

    def remove(self, ids: Sequence[str]) -> None:
        """Remove images and their captions.

        Raises:
            UserError: for the first id that does not exist, before anything is removed.
        """
        known = self._known_ids()
        for name in ids:
            if name not in known:
                raise UserError(f"{self._images.origin}: there is no image {name!r} in the gallery")
        self._images.delete("id", list(ids))
        known.difference_update(ids)
        if self._captions is not None:
            self._captions.delete("image", list(ids))

    def remove_orphans(self) -> None:
        """Remove captions whose image does not exist."""
        if self._captions is None or len(self._captions) == 0:
            return
        named = set(self._captions.scan(["image"]).column("image").to_pylist())
        orphans = sorted(named - self._known_ids())
        self._captions.delete("image", orphans)

    def _known_ids(self) -> set[str]:
        if self._ids is None:
            self._ids = set(self._images.scan(["id"]).column("id").to_pylist())
        return self._ids

    def _put_captions(self, captions: pa.Table, ids: list[str]) -> None:
        captions = _checked(captions, caption_schema(self._identity))
        if self._captions is None:
            if captions.num_rows:
                raise ValueError("captions: the model encodes no texts")
            return
        owners = set(captions.column("image").to_pylist())
        if not owners <= set(ids):
            raise ValueError(f"captions: of {sorted(owners - set(ids))[0]!r}, which is not among the images")
        again = [name for name in ids if name in self._known_ids()]
        self._captions.delete("image", again)
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
    vectors = matrix_of(rows.column("vector"))
    if len(wrong := not_unit(vectors)):
        raise UserError(
            f"image {ids[wrong[0]]!r}: its vector has the length {np.linalg.norm(vectors[wrong[0]]):.3g}, not 1; the "
            "model's embedding of it is broken (a run that diverged?)"
        )
    return rows


@contextmanager
def _write_lock(uri: str) -> Iterator[None]:
    """Keep a second writer out of a gallery on this machine; reading goes on.

    At an object store there is no lock: a commit that another one came before is refused there.

    Raises:
        UserError: another process is writing, or the folder is not writable.
    """
    folder = local_folder(uri)
    with ExitStack() as stack:
        if folder is not None:
            busy = f"{uri}: {{owner}} is writing to this gallery; wait until it is done, then run the command again"
            try:
                stack.enter_context(lock(folder / ".writing.lock", busy))
            except OSError as error:
                raise UserError(f"{uri}: cannot be written ({error.strerror}); what is there is untouched") from error
        yield


def upgrade_gallery(uri: str) -> bool:
    """Rename the tables and columns of a gallery of version 0.1 in place.

    The table of images gets its name last, so an upgrade that was interrupted is completed by the next one.

    Returns:
        Whether there was anything to rename.

    Raises:
        UserError: for an object store, where tables cannot be renamed, or a gallery that another process writes to.
    """
    folder = local_folder(uri)
    if folder is None:
        raise UserError(
            f"{uri}: tables of an object store cannot be renamed; copy the gallery to a folder, or index again"
        )
    if not (folder / f"{_FORMER_IMAGES}.lance").is_dir():
        return False
    with _write_lock(uri):
        captions = Store.open(uri, CAPTIONS)
        if captions is not None and _FORMER_OWNER in captions.schema.names:
            captions.rename_column(_FORMER_OWNER, "image")
        (folder / f"{_FORMER_IMAGES}.lance").rename(folder / f"{IMAGES}.lance")
        for file in folder.glob(f"{_FORMER_IMAGES}.*.vectors"):
            file.unlink()  # a copy of the vectors, which is made again under its new name
    return True


def _refuse_former(uri: str) -> None:
    if Store.open(uri, _FORMER_IMAGES) is not None:
        raise UserError(
            f"{uri}: is a gallery of version 0.1; run `python -m retrieval upgrade --gallery {uri}` once, which "
            "renames its tables in place"
        )


class Gallery:
    """Images with vectors; see ``open``, ``create`` and ``open_or_create``.

    A reader keeps what was there when it opened the gallery; open it again to see what others have written.

    Attributes:
        identity: which model made it.
        uri: where it is.
    """

    def __init__(
        self, uri: str, identity: ModelIdentity, images: Store, captions: Store | None, device: str = "cpu"
    ) -> None:
        self.uri = uri
        self.identity = identity
        self._images = images
        self._captions = captions
        self._vectors = VectorRows(images, uri, IMAGES, device)
        self._caption_vectors = None if captions is None else VectorRows(captions, uri, CAPTIONS, device)

        @lru_cache(maxsize=_REMEMBERED)
        def row_ids(revision: str, condition: str) -> NDArray[np.uint64]:
            found: NDArray[np.uint64] = images.scan(["id"], condition).column(ROW_ID).to_numpy()
            return found

        self._row_ids_of_revision = row_ids

    @classmethod
    def open(cls, uri: str, device: str = "cpu") -> Gallery:
        """Open a gallery to read or to fill further.

        Args:
            uri: a folder, or the URI of one at an object store.
            device: where searches are computed, ``cpu`` or a GPU's name.

        Raises:
            UserError: where there is none, its files are damaged, or it was made by a newer version.
        """
        images = Store.open(uri, IMAGES)
        if images is None:
            _refuse_former(uri)
            folder = local_folder(uri)
            there = "is no gallery" if folder is not None and folder.exists() else "there is no gallery here"
            raise UserError(f"{uri}: {there}; make one: python -m retrieval index --run RUN --gallery {uri}")
        text = current_keys(images.schema.metadata).get(IDENTITY_KEY)
        if text is None:
            raise UserError(f"{uri}: has a table {IMAGES!r} that is no gallery's; name a new gallery")
        identity = ModelIdentity.from_json(text.decode(), uri)
        return cls(uri, identity, images, Store.open(uri, CAPTIONS), device)

    @classmethod
    def create(cls, uri: str, identity: ModelIdentity, device: str = "cpu") -> Gallery:
        """Make an empty gallery.

        Raises:
            UserError: where there is one already, the place cannot be written, or a task's name cannot be a column's.
        """
        for task in dict.fromkeys([*identity.labels, *identity.predicts]):
            if "." in task or "`" in task:
                raise UserError(f"{uri}: attribute {task!r} cannot be a column of a gallery; rename it without . and `")
        if Store.open(uri, IMAGES) is not None:
            raise UserError(f"{uri}: there is a gallery already; name a new one")
        _refuse_former(uri)
        folder = local_folder(uri)
        if folder is not None and folder.exists() and not folder.is_dir():
            raise UserError(f"{uri}: is a file; name a folder for the gallery")
        captions = None
        if identity.encodes_text:
            captions = Store.create(uri, CAPTIONS, caption_schema(identity), replace=True)
        # The table of images last: the gallery exists as soon as it does.
        images = Store.create(uri, IMAGES, image_schema(identity))
        return cls(uri, identity, images, captions, device)

    @classmethod
    def open_or_create(cls, uri: str, identity: ModelIdentity, device: str = "cpu") -> Gallery:
        """Open the gallery to add images of the same model, or make an empty one.

        Raises:
            UserError: where the gallery was made by another model, or the data have other tasks.
        """
        if Store.open(uri, IMAGES) is None:
            folder = local_folder(uri)
            try:
                if folder is not None and not folder.is_file():
                    folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"{uri}: cannot be written ({error.strerror}); name another place") from error
            # Of two processes that begin at once one makes the gallery; the other gets an error, or finds it there.
            with _write_lock(uri):
                if Store.open(uri, IMAGES) is None:
                    return cls.create(uri, identity, device)
        gallery = cls.open(uri, device)
        if refused := difference(gallery.identity, identity):
            raise UserError(
                f"{uri}: was made by {gallery.identity.task} of {gallery.identity.run or 'an unknown run'}, and "
                f"{refused}; vectors of two models do not compare: name a new gallery"
            )
        return gallery

    def __len__(self) -> int:
        return len(self._images)

    def n_captions(self) -> int:
        """Number of captions with vectors of their own."""
        return 0 if self._captions is None else len(self._captions)

    def captions_of(self, ids: Sequence[str]) -> pa.Table:
        """Return captions of some images, with their vectors.

        Returns:
            Columns ``image``, ``caption`` and ``vector`` (of unit length), in the order in which they were written.

        Raises:
            UserError: where the gallery has no captions with vectors.
        """
        columns = ["image", "caption", "vector"]
        return self._with_captions()[0].scan(columns, one_of("image", ids)).select(columns)

    def columns(self) -> list[str]:
        """Names that a filter may use: those of the table, then the short ones (``colour``, ``confidence``)."""
        return list(self._filter_columns())

    @contextmanager
    def writing(self) -> Iterator[GalleryWriter]:
        """Let one writer at a time change the newest revision; afterwards prepare what the next search needs.

        Captions whose image was never written, because a writer was killed between the two, are removed first.

        Raises:
            UserError: while another process writes, and where the disk is full.
        """
        with _write_lock(self.uri):
            stores = [store for store in (self._images, self._captions) if store is not None]
            for store in stores:
                store.refresh()
            before = [store.revision for store in stores]
            writer = GalleryWriter(self.identity, self._images, self._captions)
            writer.remove_orphans()
            yield writer
            self._refresh_vectors()
            written = [store.revision for store in stores]
            if written != before:
                for store in stores:
                    store.tidy()
                for vectors, revision in zip((self._vectors, self._caption_vectors), written, strict=False):
                    if vectors is not None:
                        vectors.keep(revision)
                self._refresh_vectors()

    def table(self, columns: Sequence[str], where: str = "") -> pa.Table:
        """Return metadata in the gallery's order.

        Args:
            columns: names of the table's columns.
            where: filter as a user writes it; empty for all.

        Raises:
            UserError: for an invalid filter.
        """
        return self._images.scan(columns, self._condition(where)).select(list(columns))

    def places(self, where: str = "") -> NDArray[np.int64]:
        """Return places ``(n,)`` in the gallery's order of the images that fit a filter, ascending.

        Raises:
            UserError: for an invalid filter.
        """
        if not where:
            return np.arange(len(self))
        everything, fitting = self._row_ids(""), self._row_ids(self._condition(where))
        order = np.argsort(everything, kind="stable")
        return np.sort(order[np.searchsorted(everything, fitting, sorter=order)])

    def id_of(self, text: str) -> str:
        """Return the id as the gallery spells it, for a text that may be in another Unicode normal form."""
        forms = dict.fromkeys([text, *(unicodedata.normalize(form, text) for form in ("NFC", "NFD"))])
        if len(forms) == 1:
            return text
        there = set(self._images.scan(["id"], one_of("id", list(forms))).column("id").to_pylist())
        return next((form for form in forms if form in there), text)

    def rows(self, ids: Sequence[str], columns: Sequence[str]) -> pa.Table:
        """Return rows in the order of ``ids``.

        Raises:
            UserError: names the first id that does not exist.
        """
        few = len(ids) <= IN_ONE_CONDITION
        known = self._images.scan(["id"], one_of("id", ids) if few and ids else "")
        row_of = dict(zip(known.column("id").to_pylist(), known.column(ROW_ID).to_pylist(), strict=True))
        for name in ids:
            if name not in row_of:
                raise UserError(f"{self.uri}: there is no image {name!r} in the gallery; searches show ids")
        return self._images.take(np.array([row_of[name] for name in ids], np.uint64), columns)

    def vectors(self, ids: Sequence[str]) -> NDArray[np.float32]:
        """Return vectors in the order of ``ids``, float32 ``(len(ids), D)``, of unit length.

        Raises:
            UserError: names the first id that does not exist.
        """
        vectors = matrix_of(self.rows(ids, ["vector"]).column("vector"))
        check_lengths(vectors, self._images.origin)
        return vectors

    def nearest(
        self, queries: NDArray[np.float32], k: int, where: Where = "", *, exact: bool | None = None
    ) -> list[list[Hit]]:
        """Find the images nearest to each query, best first; equal scores in the gallery's order.

        Args:
            queries: float32 ``(Q, D)``, of unit length.
            k: how many; fewer where the gallery, or what the filter leaves of it, has fewer.
            where: only these, which is applied before the best are chosen; the approximate index takes no places.
            exact: False to use the approximate index; None: only beyond ``EXACT_LIMIT``, if one was built.

        Raises:
            UserError: for an invalid filter, vectors of another length, ``k`` below 1, or no index to use.
        """
        self._check_queries(queries, k)
        if isinstance(where, str) and self._uses_index(exact):
            condition = self._condition(where)
            found = [self._images.nearest(query, k, condition) for query in queries]
        else:
            allowed = None
            if not isinstance(where, str):
                allowed = self._row_ids("")[where]
            elif where:
                allowed = self._row_ids(self._condition(where))
            found = self._vectors.nearest(queries, k, allowed)
        ids = self._ids_of(found)
        return [
            [Hit(ids[row], float(score)) for row, score in zip(near.row_ids.tolist(), near.scores, strict=True)]
            for near in found
        ]

    def nearest_captions(self, queries: NDArray[np.float32], k: int, where: str = "") -> list[list[CaptionHit]]:
        """Find the captions nearest to each query, best first, each text once.

        Args:
            queries: float32 ``(Q, D)``, of unit length.
            k: how many.
            where: filter on the images that the captions belong to.

        Raises:
            UserError: where the gallery has no captions with vectors, and as ``nearest``.
        """
        self._check_queries(queries, k)
        images = self._images.scan(["id"], self._condition(where)).column("id").to_pylist()
        store, vectors = self._with_captions()
        captions = store.scan(["image", "caption"]).to_pandas()
        captions = captions[captions["image"].isin(images)].drop_duplicates("caption").set_index(ROW_ID)
        found = vectors.nearest(queries, k, captions.index.to_numpy(np.uint64))
        return [
            [
                CaptionHit(str(captions.at[row, "caption"]), str(captions.at[row, "image"]), float(score))
                for row, score in zip(near.row_ids.tolist(), near.scores, strict=True)
            ]
            for near in found
        ]

    def build_index(self, *, sample: int = 200, k: int = 10) -> IndexReport:
        """Build the approximate index and compare it with exact search.

        Args:
            sample: number of stored vectors that are searched for.
            k: number of neighbours that are compared.

        Raises:
            UserError: for a gallery too small for an index, and while another process writes.
        """
        from retrieval.search.vectors import index_recall

        with _write_lock(self.uri):
            self._images.refresh()
            if len(self) < INDEX_FROM:
                raise UserError(
                    f"{self.uri}: has {len(self)} images; an index needs {INDEX_FROM:,}, and exact search of so few is "
                    "faster"
                )
            former = self._images.revision
            self._images.build_index()
            report = index_recall(self._images, sample=sample, k=k)
            self._vectors.keep(former)
        return report

    def _refresh_vectors(self) -> None:
        if not self._uses_index(None):
            self._vectors.refresh()
        if self._caption_vectors is not None:
            self._caption_vectors.refresh()

    def has_index(self) -> bool:
        """Whether an approximate index was built."""
        return self._images.has_index()

    def _with_captions(self) -> tuple[Store, VectorRows]:
        if self._captions is None or self._caption_vectors is None or len(self._captions) == 0:
            raise UserError(f"{self.uri}: has no captions; they come with a dual encoder on data with captions")
        return self._captions, self._caption_vectors

    def _uses_index(self, exact: bool | None) -> bool:
        if exact is None:
            # Without PyTorch LanceDB compares all vectors, or searches its index.
            return (len(self) > EXACT_LIMIT and self.has_index()) or find_spec("torch") is None
        if not exact and not self.has_index():
            raise UserError(f"{self.uri}: has no index; make one: python -m retrieval build-index --gallery {self.uri}")
        return not exact

    def _check_queries(self, queries: NDArray[np.float32], k: int) -> None:
        if k < 1:
            raise UserError(f"top-k: must be at least 1; got {k}")
        if queries.ndim != 2 or queries.shape[1] != self.identity.dim:
            raise UserError(
                f"{self.uri}: holds vectors of length {self.identity.dim}, the query's shape is {queries.shape}; "
                "was it encoded by another model?"
            )
        if not np.isfinite(queries).all():
            raise UserError("the query's vector is not finite; the model is broken (a run that diverged?)")

    def _row_ids(self, condition: str) -> NDArray[np.uint64]:
        """Row ids ``(n,)`` of the images that fit a condition, in the gallery's order."""
        return self._row_ids_of_revision(self._images.revision, condition)

    def _ids_of(self, found: Sequence[Neighbours]) -> dict[int, str]:
        rows = np.unique(np.concatenate([near.row_ids for near in found] or [np.zeros(0, np.uint64)]))
        if len(rows) == 0:
            return {}
        names = self._images.take(rows, ["id"]).column("id").to_pylist()
        return dict(zip(rows.tolist(), names, strict=True))

    def _condition(self, where: str) -> str:
        return checked_filter(where, self._filter_columns()) if where else ""

    def _filter_columns(self) -> dict[str, Column]:
        return filter_columns(self._images.schema.names, self.identity)
