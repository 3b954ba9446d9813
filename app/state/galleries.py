"""A gallery as the application serves it: opened once, its metadata in memory, and filled where a run has none yet."""

from __future__ import annotations

import argparse
import io
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from app.state.context import display_name, shortened
from datamodules.loading.decode import ValueRange, read_array
from retrieval.gallery import Gallery
from retrieval.image_files import ImageFiles
from retrieval.schema import LABEL, NOT_METADATA, PREDICTED, ModelIdentity, image_schema
from vitrail.errors import UserError
from vitrail.files import local_folder
from vitrail.runs import Run
from vitrail.types import LABEL_TASK

if TYPE_CHECKING:
    from app.state.runs import ServedRun


NOT_KNOWN, NO_LABEL = "(not known)", "(no label)"
"""Values of an image whose label is not known, and of one that has none of a multi-label task's."""

_SHARES = (0.2, 0.4, 0.6, 0.8)
"""Quantiles between the ranges of numbers."""


@dataclass(frozen=True)
class Facet:
    """The value of a task for each of N images; several of a multi-label task.

    Attributes:
        values: those that occur, ascending, by the order of an ordinal task's classes, or ranges of numbers; last
            ``NO_LABEL`` and ``NOT_KNOWN`` where they occur.
        rows: int64 ``(M,)``, ascending, the image of each entry; every image has at least one.
        codes: int64 ``(M,)``, index into ``values`` of each entry.
        labelled: whether it is the data's label; otherwise it is the model's prediction.
    """

    values: tuple[str, ...]
    rows: NDArray[np.int64]
    codes: NDArray[np.int64]
    labelled: bool = True

    @cached_property
    def first(self) -> NDArray[np.int64]:
        """The code of each image's first entry, int64 ``(N,)``: the most confident of predicted labels."""
        starts = np.flatnonzero(np.r_[True, self.rows[1:] != self.rows[:-1]]) if len(self.rows) else self.rows
        return self.codes[starts]

    @property
    def known(self) -> list[str]:
        """The values without ``NOT_KNOWN``."""
        return [value for value in self.values if value != NOT_KNOWN]

    def having(self, values: Sequence[str]) -> NDArray[np.bool_]:
        """Return which images have one of some values, bool ``(N,)``."""
        wanted = np.isin(self.codes, [self.values.index(value) for value in values])
        having = np.zeros(int(self.rows[-1]) + 1 if len(self.rows) else 0, bool)
        having[self.rows[wanted]] = True
        return having


def facet_of(column: pa.ChunkedArray, scale: Sequence[str] = (), *, labelled: bool = True) -> Facet:
    """Return the values of a column of labels or predictions.

    Args:
        column: of N texts, lists of texts, or numbers.
        scale: of an ordinal task its classes in their order.
        labelled: whether the column is the data's.
    """
    import pandas as pd

    rows = np.arange(len(column), dtype=np.int64)
    if pa.types.is_floating(column.type):
        numbers = column.to_numpy().astype(np.float64)
        names, codes = _ranges(numbers)
    else:
        entries = column.to_pandas()
        if pa.types.is_list(column.type):
            lists = [[NOT_KNOWN] if labels is None else labels or [NO_LABEL] for labels in column.to_pylist()]
            rows = np.repeat(rows, [len(labels) for labels in lists])
            entries = pd.Series([label for labels in lists for label in labels], dtype=object)
        found, values = pd.factorize(entries.fillna(NOT_KNOWN), sort=True)
        codes, names = np.asarray(found, np.int64), [str(value) for value in values]
    order = {name: place for place, name in enumerate([*scale])} | {NO_LABEL: len(scale) + 1, NOT_KNOWN: len(scale) + 2}
    if not pa.types.is_floating(column.type):
        places = sorted(range(len(names)), key=lambda place: (order.get(names[place], len(scale)), names[place]))
        codes, names = np.argsort(places)[codes].astype(np.int64), [names[place] for place in places]
    return Facet(tuple(names), rows, codes, labelled)


def _ranges(numbers: NDArray[np.float64]) -> tuple[list[str], NDArray[np.int64]]:
    """Names of ranges with about as many numbers each, and the range of each number; NaN is not known."""
    known = ~np.isnan(numbers)
    edges = np.unique([float(f"{edge:.3g}") for edge in np.quantile(numbers[known], _SHARES)] if known.any() else [])
    codes = np.searchsorted(edges, numbers, side="right")
    texts = [f"{edge:.6g}" for edge in edges]
    names = [f"{low} to {high}" for low, high in itertools.pairwise(texts)]
    names = [f"below {texts[0]}", *names, f"from {texts[-1]}"] if texts else []
    codes = np.where(known, codes, len(names))
    occur, codes = np.unique(codes, return_inverse=True)
    return [[*names, NOT_KNOWN][place] for place in occur.tolist()], codes.astype(np.int64)


MOST_CHOICES = 1_000
"""Values of a column up to which it is offered as a filter; no one picks from a longer list."""


class ServedGallery:
    """An opened gallery; nothing of it changes while the application runs, so any thread may read it.

    Args:
        address: folder or URI.
        name: by which users and requests know it.
        run: the run that made it, where it is served too; it encodes queries.
        data_roots: further folders whose images may be shown.

    Attributes:
        gallery: the gallery itself, for vectors and searches.
        metadata: all rows in the gallery's order, without vectors and thumbnails: ``id``, ``path``, ``caption``,
            ``group``, ``split``, ``label_<task>``, ``predicted_<task>``, ``confidence_<task>`` …
        choices: of each name that a person can filter by (the class first, other tasks, ``split``) the values that
            occur, ascending; of numbers ranges.

    Raises:
        UserError: there is no gallery, or its files are damaged.
    """

    def __init__(
        self, address: str | Path, name: str, run: ServedRun | None = None, data_roots: Sequence[Path] = ()
    ) -> None:
        self.name = name
        self.run = run
        self.gallery = Gallery.open(str(address))
        self._data_roots = data_roots
        columns = [column for column in image_schema(self.identity).names if column not in NOT_METADATA]
        self.metadata: pa.Table = self.gallery.table(columns).combine_chunks()
        self._row_of = {sample_id: row for row, sample_id in enumerate(self.metadata.column("id").to_pylist())}
        self._contents: list[str] = self.metadata.column("content").to_pylist()
        scales = self.identity.scales
        self._values = {
            name: facet_of(self.metadata.column(column), scales.get(name, ()))
            for name, column in self.filter_columns().items()
        }
        self.choices = {
            name: facet.known for name, facet in self._values.items() if 0 < len(facet.known) <= MOST_CHOICES
        }

    def __len__(self) -> int:
        return len(self._row_of)

    @property
    def identity(self) -> ModelIdentity:
        """Which model made the gallery, what it predicts, and which labels the data have."""
        return self.gallery.identity

    @property
    def value_range(self) -> ValueRange:
        """How images with more than 8 bits a channel were read for the gallery."""
        chosen: ValueRange = self.identity.input_options.get("value_range", "auto")
        return chosen

    @property
    def run_name(self) -> str:
        """Name of the run that made it; empty where that run is not served."""
        return "" if self.run is None else self.run.name

    @property
    def tasks(self) -> list[str]:
        """Tasks that the model predicts or the data have labels for, the class first."""
        named = dict.fromkeys([*self.identity.predicts, *self.identity.labels])
        return sorted(named, key=lambda task: task != LABEL_TASK)

    def filter_columns(self) -> dict[str, str]:
        """Return the column of each name that a person filters by: the prediction, otherwise the label.

        ``split`` is the gallery's own; where an attribute is called so, the gallery's is ``gallery_split``.
        """
        columns = {task: f"{LABEL}{task}" for task in self.tasks}
        columns |= {task: f"{PREDICTED}{task}" for task in self.identity.predicts}
        return columns | {"gallery_split" if "split" in columns else "split": "split"}

    def fitting(self, filters: Mapping[str, Sequence[str]]) -> NDArray[np.int64]:
        """Return the places of the images that have one of the values of each filter, ascending, int64 ``(n,)``."""
        fits = np.ones(len(self), bool)
        for name, wanted in filters.items():
            if not wanted:
                continue
            if name not in self.choices:
                known = ", ".join(self.choices) or "nothing"
                raise UserError(f"filter {shortened(name)!r}: gallery {self.name!r} can be filtered by {known}")
            for value in wanted:
                if value not in self.choices[name]:
                    raise UserError(f"filter {name}: no image has {shortened(str(value))!r}; choose another value")
            fits &= self._values[name].having(wanted)
        return np.flatnonzero(fits)

    def shares_images(self, other: ServedGallery) -> bool:
        """Return whether another gallery has some of the images: the same id, and the same content if known."""
        return any(
            not own or not theirs or own == theirs
            for own, theirs in (
                (self._contents[row], other._contents[other._row_of[sample_id]])
                for sample_id, row in self._row_of.items()
                if sample_id in other._row_of
            )
        )

    def place(self, sample_id: str) -> int:
        """Return the row of an image in ``metadata``; raise ``UserError`` where there is no such image."""
        row = self._row_of.get(sample_id)
        if row is None:
            raise UserError(f"gallery {self.name!r}: there is no image {shortened(sample_id)!r}; choose one of it")
        return row

    def row(self, sample_id: str) -> dict[str, Any]:
        """Return the metadata of an image by column."""
        return self.rows([sample_id])[0]

    def rows(self, sample_ids: Sequence[str]) -> list[dict[str, Any]]:
        """Return the metadata of images in the order of their ids."""
        places = [self.place(sample_id) for sample_id in sample_ids]
        found: list[dict[str, Any]] = self.metadata.take(pa.array(places, pa.int64())).to_pylist()
        return found

    def image_path(self, sample_id: str) -> Path:
        """Return the file of an image; raise ``UserError`` where it has none, or it may not be shown."""
        path = str(self.metadata.column("path")[self.place(sample_id)].as_py() or "")
        try:
            return self._files.file(path)
        except UserError as error:
            raise UserError(f"gallery {self.name!r}: image {shortened(sample_id)!r}: {error}") from error

    @cached_property
    def _files(self) -> ImageFiles:
        run = self.run.path if self.run is not None else self.identity.run
        return ImageFiles(self.gallery.uri, run, self._data_roots)

    def not_shown(self) -> list[str]:
        """Return files of the gallery that are outside of what it may show (``retrieval.image_files``)."""
        return self._files.outside(path or "" for path in self.metadata.column("path").to_pylist())

    def thumbnail(self, sample_id: str) -> bytes | None:
        """Return the JPEG in the gallery, at most 128 pixels long; None where there is none."""
        self.place(sample_id)
        kept: bytes | None = self.gallery.rows([sample_id], ["thumbnail"]).column("thumbnail")[0].as_py()
        return kept

    def image(self, sample_id: str) -> Path | bytes:
        """Return an image's file, or the JPEG in the gallery: generated images have no file, others may be removed."""
        try:
            return self.image_path(sample_id)
        except UserError:
            kept = self.thumbnail(sample_id)
            if kept is None:
                raise
            return kept

    def jpeg(self, sample_id: str, side: int) -> bytes:
        """Return an image as JPEG, its longest side at most ``side`` pixels; raise ``UserError`` as ``image``."""
        from PIL import Image

        image = Image.fromarray(read_array(self.image(sample_id), sample_id, self.value_range))
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        content = io.BytesIO()
        image.save(content, format="JPEG", quality=88)
        return content.getvalue()


def gallery_name(address: str | Path, taken: Sequence[str]) -> str:
    """Return a name for a gallery that was given by its address: that of its folder, made different from others."""
    folder = local_folder(str(address))
    parts = folder.resolve().parts if folder is not None else tuple(str(address).rstrip("/").split("/"))
    # RUN/gallery has the name of the run.
    return display_name(parts[:-1] if parts[-1] == "gallery" and len(parts) > 2 else parts, taken)


def indexed_gallery(
    run: ServedRun, report: Callable[[str], None], name: str = "", data_roots: Sequence[Path] = ()
) -> ServedGallery:
    """Open the gallery in a run's directory; what is missing in it is encoded first, as by ``retrieval index``.

    Args:
        run: that is served.
        report: receives a line before work that takes a while.
        name: of the gallery; the run's by default.
        data_roots: further folders whose images may be shown.

    Raises:
        UserError: other weights made the gallery, or it is missing and so are the run's data.
    """
    from retrieval.fill import is_complete

    folder = run.path / Run.GALLERY
    if not is_complete(folder, run.weights):
        report(f"{run.name}: indexing its images for the search, once")
        try:
            _fill(run.path, folder)
        except UserError as error:
            # The data may stay behind where a run is copied to with its gallery.
            if not _is_by(folder, run.weights):
                raise
            report(f"{run.name}: its gallery may lack images and is served as it is, because {error}")
    return ServedGallery(folder, name or run.name, run, data_roots)


def opened_gallery(
    address: str,
    runs: Iterable[ServedRun],
    taken: Sequence[str],
    report: Callable[[str], None],
    data_roots: Sequence[Path] = (),
) -> ServedGallery:
    """Open a gallery by its address, with the run that made it, as far as that is there.

    Args:
        address: folder or URI.
        runs: that are served already; one with the gallery's weights is taken.
        taken: names of other galleries.
        report: receives a line where the model is not available, so that only text and own images can be searched for.
        data_roots: further folders whose images may be shown.

    Raises:
        UserError: there is no gallery, or its files are damaged.
    """
    name = gallery_name(address, taken)
    identity = Gallery.open(address).identity
    run = next((run for run in runs if run.weights == identity.weights), None)
    if run is None:
        run, reason = _recorded_run(identity.run, identity.weights)
        if run is None:
            report(f"{name}: {reason}; texts and uploads cannot be searched for; name its run with --run")
    return ServedGallery(address, name, run, data_roots)


def _is_by(folder: Path, weights: str) -> bool:
    try:
        return Gallery.open(str(folder)).identity.weights == weights
    except UserError:
        return False


def _recorded_run(path: str, weights: str) -> tuple[ServedRun | None, str]:
    """The run that a gallery names, or why it is not available."""
    from app.state.runs import ServedRun

    if not path:
        return None, "its run is not recorded"
    try:
        run = ServedRun(path)
    except UserError as error:
        return None, f"its run cannot be loaded ({error})"
    return (run, "") if run.weights == weights else (None, f"{path} has other weights by now")


def _fill(run: Path, folder: Path) -> None:
    from retrieval.commands.gallery import add_index_arguments
    from retrieval.commands.gallery import run_index as index

    parser = argparse.ArgumentParser()
    add_index_arguments(parser)
    # An unreadable image is reported and left out: the others can be shown.
    asked = ["--run", str(run), "--gallery", str(folder), "--on-bad-image", "skip"]
    index(parser.parse_args(asked))
