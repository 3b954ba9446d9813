"""A gallery: images with their vectors and all that a model said of them, to be filled once and searched often.

Up to ``EXACT_LIMIT`` images every search is exact; past that it uses an approximate index, if one was built.

The captions of a gallery: texts with vectors of their own, each of which belongs to an image.

Changes to a gallery: each is whole or not there at all, and in an order that a kill at any point does no harm.

Names that a filter of a gallery may use, the short ones too.

Which rows of a table fit a filter; the answers to the last few filters are kept.
"""

from __future__ import annotations

import threading
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from retrieval.filters import IN_ONE_CONDITION, Column, checked_filter, one_of
from retrieval.schema import (
    CAPTIONS,
    CONFIDENCE,
    IDENTITY_KEY,
    IMAGES,
    LABEL,
    PREDICTED,
    CaptionHit,
    Hit,
    ModelIdentity,
    caption_schema,
    difference,
    image_schema,
)
from retrieval.search.vectors import UNIT_TOLERANCE, VectorRows, check_lengths
from retrieval.store import ROW_ID, Neighbours, Store, create_store, matrix_of, open_store
from vitrail.errors import UserError
from vitrail.files import current_keys, local_folder, lock
from vitrail.types import LABEL_TASK

if TYPE_CHECKING:
    import pyarrow as pa

    from retrieval.search.vectors import IndexReport


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

    def of_images(self, ids: Sequence[str]) -> pa.Table:
        """Captions of some images in the order in which they were written.

        Returns:
            Columns ``image``, ``caption`` and ``vector``.
        """
        columns = ["image", "caption", "vector"]
        return self._store.scan(columns, one_of("image", ids)).select(columns)

    def nearest(self, queries: NDArray[np.float32], k: int, images: Sequence[str]) -> list[list[CaptionHit]]:
        """The captions nearest to each query, best first, each text once.

        Args:
            queries: float32 ``(Q, D)``, of unit length.
            k: how many.
            images: ids of those whose captions may be found.
        """
        captions = self._store.scan(["image", "caption"]).to_pandas()
        shown = captions[captions["image"].isin(images)].drop_duplicates("caption")
        found = self._vectors.nearest(queries, k, shown[ROW_ID].to_numpy(np.uint64))
        said = shown.set_index(ROW_ID)
        return [
            [
                CaptionHit(str(said.at[row, "caption"]), str(said.at[row, "image"]), float(score))
                for row, score in zip(near.row_ids.tolist(), near.scores, strict=True)
            ]
            for near in found
        ]


_FORMER_IMAGES, _FORMER_OWNER = "pictures", "picture"
"""Table of images, and column of captions that names the image, in galleries of version 0.1."""

NOT_METADATA = ("vector", "thumbnail")
"""Columns that are large and of no use to a filter."""


class GalleryWriter:
    """What ``Gallery.writing`` gives; not for use outside of its block."""

    def __init__(self, identity: ModelIdentity, images: Store, captions: Store | None) -> None:
        self._identity = identity
        self._images = images
        self._captions = captions
        self._ids: set[str] | None = None

    def known(self) -> pa.Table:
        """What is there, without vectors and thumbnails."""
        columns = [name for name in self._images.schema.names if name not in NOT_METADATA]
        return self._images.scan(columns).select(columns)

    def known_captions(self) -> pa.Table:
        """``image`` and ``caption`` of all captions that are there, those of an image in their order."""
        if self._captions is None:
            return caption_schema(self._identity).empty_table().select(["image", "caption"])
        return self._captions.scan(["image", "caption"]).select(["image", "caption"])

    def add(self, images: pa.Table, captions: pa.Table | None = None) -> None:
        """Adds images; those whose id is there are replaced, and then stand at the gallery's end.

        Captions go first and images last, new ones in one commit. So after a kill an image that is there has its
        captions, and captions without an image are removed by the next writer.

        Args:
            images: with the columns of ``image_schema``.
            captions: with the columns of ``caption_schema``: all captions of these images. None leaves those that
                are there.

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
        """Removes images and their captions.

        Raises:
            UserError: names the first id that is not there, before anything is removed.
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
        """Removes captions whose image is not there."""
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
    if rows.num_rows:
        lengths = np.linalg.norm(matrix_of(rows.column("vector")), axis=1)
        # Written so that NaN is refused.
        wrong = np.flatnonzero(~(np.abs(lengths - 1) <= UNIT_TOLERANCE))
        if len(wrong):
            raise UserError(
                f"image {ids[wrong[0]]!r}: its vector has the length {lengths[wrong[0]]:.3g}, not 1; the model's "
                "embedding of it is broken (a run that diverged?)"
            )
    return rows


def filter_columns(names: Sequence[str], identity: ModelIdentity) -> dict[str, Column]:
    """What each name means: the table's columns, and short names.

    ``colour`` is what the model predicts of the colour, or where it predicts nothing, the label; ``confidence`` is that
    of the class. Where an attribute is called like a column (``split``, ``caption`` …), the bare name is refused:
    ``label_split`` and ``predicted_split`` are the attribute, ``gallery_split`` is the gallery's own.

    Args:
        names: columns of the table of images.
        identity: which tasks the model predicts and the data have labels of.
    """
    columns = {
        name: Column(name, "number" if name.startswith(CONFIDENCE) else "text")
        for name in names
        if name not in NOT_METADATA
    }
    short = {task: Column(f"{LABEL}{task}", "text") for task in identity.labels}
    short |= {task: Column(f"{PREDICTED}{task}", "text") for task in identity.predicts}
    own = {name: columns[name] for name in columns if name in short}
    if LABEL_TASK in identity.predicts:
        confidence = Column(f"{CONFIDENCE}{LABEL_TASK}", "number")
        (own if "confidence" in short else short)["confidence"] = confidence
    for name, column in own.items():
        tasks = [
            f"{LABEL}{name}" if name in identity.labels else "",
            f"{PREDICTED}{name}" if name in identity.predicts else "",
        ]
        meant = column.name if column.name.startswith(CONFIDENCE) else f"gallery_{name}"
        short[meant] = column
        columns[name] = Column("", column.kind, tuple(filter(None, [*tasks, meant])))
    return columns | {name: column for name, column in short.items() if name not in columns}


Where = str | NDArray[np.int64]
"""Which images may be found: a filter as a user writes it, empty for all, or their places in the gallery's order."""

_KEPT = 8
"""Filters whose rows are remembered: those who leaf through results ask with the same one again and again."""


class FilteredRows:
    """Rows of one table by filter.

    Args:
        store: the table.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._found: dict[tuple[str, str], NDArray[np.uint64]] = {}
        self._lock = threading.Lock()

    def row_ids(self, condition: str) -> NDArray[np.uint64]:
        """Row ids ``(n,)`` in the order of the table.

        Args:
            condition: as ``filters.checked_filter`` returns it, empty for all.

        Raises:
            UserError: where a file of the table is damaged or gone.
        """
        key = (self._store.revision, condition)
        with self._lock:
            found = self._found.pop(key, None)
        if found is None:
            found = self._store.scan(["id"], condition).column(ROW_ID).to_numpy()
        with self._lock:
            # Put back as the newest; the oldest goes.
            self._found[key] = found
            while len(self._found) > _KEPT:
                del self._found[next(iter(self._found))]
        return found

    def places(self, condition: str) -> NDArray[np.int64]:
        """Places ``(n,)`` of the rows in the order of the table, ascending.

        Args:
            condition: see ``row_ids``.

        Raises:
            UserError: as ``row_ids``.
        """
        if not condition:
            return np.arange(len(self._store))
        everything = self.row_ids("")
        order = np.argsort(everything, kind="stable")
        return np.sort(order[np.searchsorted(everything, self.row_ids(condition), sorter=order)])


EXACT_LIMIT = 1_000_000
"""Images up to which every search compares all vectors: tens of milliseconds, and nothing is missed."""


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
        captions = open_store(uri, CAPTIONS)
        if captions is not None and _FORMER_OWNER in captions.schema.names:
            captions.rename_column(_FORMER_OWNER, "image")
        (folder / f"{_FORMER_IMAGES}.lance").rename(folder / f"{IMAGES}.lance")
        for file in folder.glob(f"{_FORMER_IMAGES}.*.vectors"):
            file.unlink()  # a copy of the vectors, which is made again under its new name
    return True


def _refuse_former(uri: str) -> None:
    if open_store(uri, _FORMER_IMAGES) is not None:
        raise UserError(
            f"{uri}: is a gallery of version 0.1; run `python -m retrieval upgrade --gallery {uri}` once, which "
            "renames its tables in place"
        )


class Gallery:
    """See ``open``, ``create`` and ``open_or_create``.

    Whoever reads goes on with what was there at the opening; what others write is seen by opening again.

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
        self._fitting = FilteredRows(images)
        self._vectors = VectorRows(images, uri, IMAGES, device)
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
        images = open_store(uri, IMAGES)
        if images is None:
            _refuse_former(uri)
            folder = local_folder(uri)
            there = "is no gallery" if folder is not None and folder.exists() else "there is no gallery here"
            raise UserError(f"{uri}: {there}; make one: python -m retrieval index --run RUN --gallery {uri}")
        text = current_keys(images.schema.metadata).get(IDENTITY_KEY)
        if text is None:
            raise UserError(f"{uri}: has a table {IMAGES!r} that is no gallery's; name a new gallery")
        identity = ModelIdentity.from_json(text.decode(), uri)
        return cls(uri, identity, images, open_store(uri, CAPTIONS), device)

    @classmethod
    def create(cls, uri: str, identity: ModelIdentity, device: str = "cpu") -> Gallery:
        """Makes an empty gallery.

        Raises:
            UserError: where there is one already, the place cannot be written, or a task's name cannot be a column's.
        """
        for task in dict.fromkeys([*identity.labels, *identity.predicts]):
            if "." in task or "`" in task:
                raise UserError(f"{uri}: attribute {task!r} cannot be a column of a gallery; rename it without . and `")
        if open_store(uri, IMAGES) is not None:
            raise UserError(f"{uri}: there is a gallery already; name a new one")
        _refuse_former(uri)
        folder = local_folder(uri)
        if folder is not None and folder.exists() and not folder.is_dir():
            raise UserError(f"{uri}: is a file; name a folder for the gallery")
        # The table of images last: a gallery is there as soon as it is.
        captions = None
        if identity.encodes_text:
            captions = create_store(uri, CAPTIONS, caption_schema(identity), replace=True)
        images = create_store(uri, IMAGES, image_schema(identity))
        return cls(uri, identity, images, captions, device)

    @classmethod
    def open_or_create(cls, uri: str, identity: ModelIdentity, device: str = "cpu") -> Gallery:
        """Opens the gallery to add images of the same model, or makes an empty one.

        Raises:
            UserError: where the gallery was made by another model, or the data have other tasks.
        """
        if open_store(uri, IMAGES) is None:
            folder = local_folder(uri)
            try:
                if folder is not None and not folder.is_file():
                    folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"{uri}: cannot be written ({error.strerror}); name another place") from error
            # Of two that begin at once one makes the gallery; the other is told, or finds it there.
            with _write_lock(uri):
                if open_store(uri, IMAGES) is None:
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
        return len(self._images)

    def n_captions(self) -> int:
        """Number of captions with vectors of their own."""
        return 0 if self._said is None else len(self._said)

    def captions_of(self, ids: Sequence[str]) -> pa.Table:
        """Captions of some images, with their vectors.

        Returns:
            Columns ``image``, ``caption`` and ``vector`` (of unit length), in the order in which they were written.

        Raises:
            UserError: where the gallery has no captions with vectors.
        """
        return self._with_captions().of_images(ids)

    def columns(self) -> list[str]:
        """Names that a filter may use: those of the table, then the short ones (``colour``, ``confidence``)."""
        return list(self._filter_columns())

    @contextmanager
    def writing(self) -> Iterator[GalleryWriter]:
        """Lets one writer at a time change the newest revision; then makes ready what the next search needs.

        Captions whose image was never written, because a writer was killed between the two, are removed first.

        Raises:
            UserError: while somebody else writes, and where the disk is full.
        """
        with _write_lock(self.uri):
            stores = [store for store in (self._images, self._captions) if store is not None]
            for store in stores:
                store.refresh()
            before = [store.revision for store in stores]
            writer = GalleryWriter(self.identity, self._images, self._captions)
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
        return self._images.scan(columns, self._condition(where)).select(list(columns))

    def places(self, where: str = "") -> NDArray[np.int64]:
        """Places ``(n,)`` in the gallery's order of the images that fit a filter, ascending.

        Raises:
            UserError: for a filter that is none.
        """
        return self._fitting.places(self._condition(where))

    def id_of(self, text: str) -> str:
        """The id as the gallery spells it, of a text that may be in another Unicode normal form; else the text."""
        forms = dict.fromkeys([text, *(unicodedata.normalize(form, text) for form in ("NFC", "NFD"))])
        if len(forms) == 1:
            return text
        there = set(self._images.scan(["id"], one_of("id", list(forms))).column("id").to_pylist())
        return next((form for form in forms if form in there), text)

    def rows(self, ids: Sequence[str], columns: Sequence[str]) -> pa.Table:
        """Rows in the order of ``ids``.

        Raises:
            UserError: names the first id that is not there.
        """
        return self._images.take(self._row_ids(ids), columns)

    def vectors(self, ids: Sequence[str]) -> NDArray[np.float32]:
        """Vectors in the order of ``ids``.

        Returns:
            float32 ``(len(ids), D)``, of unit length.

        Raises:
            UserError: names the first id that is not there.
        """
        vectors = matrix_of(self.rows(ids, ["vector"]).column("vector"))
        check_lengths(vectors, self._images.origin)
        return vectors

    def nearest(
        self, queries: NDArray[np.float32], k: int, where: Where = "", *, exact: bool | None = None
    ) -> list[list[Hit]]:
        """The images nearest to each query, best first; equal scores in the gallery's order.

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
            found = [self._images.nearest(query, k, condition) for query in queries]
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
            where: filter on the images that the captions belong to.

        Raises:
            UserError: where the gallery has no captions with vectors, and as ``nearest``.
        """
        self._check_queries(queries, k)
        images = self._images.scan(["id"], self._condition(where)).column("id").to_pylist()
        return self._with_captions().nearest(queries, k, images)

    def build_index(self, *, sample: int = 200, k: int = 10) -> IndexReport:
        """Builds the approximate index and measures what it finds of the exact answer.

        Args:
            sample: number of stored vectors that are searched for.
            k: number of neighbours that are compared.

        Raises:
            UserError: for a gallery too small for an index, and while somebody else writes.
        """
        from retrieval.search.vectors import build_index

        with _write_lock(self.uri):
            self._images.refresh()
            former = self._images.revision
            report = build_index(self._images, self.uri, sample=sample, k=k)
            self._vectors.rename_to_revision(former)
        return report

    def has_index(self) -> bool:
        """Whether an approximate index was built."""
        return self._images.has_index()

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
        known = self._images.scan(["id"], one_of("id", ids) if few and ids else "")
        places = dict(zip(known.column("id").to_pylist(), known.column(ROW_ID).to_pylist(), strict=True))
        for name in ids:
            if name not in places:
                raise UserError(f"{self.uri}: there is no image {name!r} in the gallery; searches show ids")
        return np.array([places[name] for name in ids], np.uint64)

    def _allowed(self, where: Where) -> NDArray[np.uint64] | None:
        if isinstance(where, str):
            return self._fitting.row_ids(self._condition(where)) if where else None
        return self._fitting.row_ids("")[where]

    def _names(self, found: Sequence[Neighbours]) -> dict[int, str]:
        rows = np.unique(np.concatenate([near.row_ids for near in found] or [np.zeros(0, np.uint64)]))
        if len(rows) == 0:
            return {}
        names = self._images.take(rows, ["id"]).column("id").to_pylist()
        return dict(zip(rows.tolist(), names, strict=True))

    def _condition(self, where: str) -> str:
        return checked_filter(where, self._filter_columns()) if where else ""

    def _filter_columns(self) -> dict[str, Column]:
        return filter_columns(self._images.schema.names, self.identity)
