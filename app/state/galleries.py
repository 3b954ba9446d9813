"""A gallery as the application serves it: opened once, what is said of its images in memory, its name for users.

Galleries of the runs that are served: filled at the first start, with progress, and only opened at the next.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from datamodules.loading.decode import ValueRange
from retrieval.gallery import NOT_METADATA, Gallery
from retrieval.image_files import ImageFiles
from retrieval.schema import LABEL, PREDICTED, ModelIdentity, image_schema
from vitrail.errors import UserError
from vitrail.files import local_folder, write_text_atomically
from vitrail.runs import Run
from vitrail.types import LABEL_TASK

if TYPE_CHECKING:
    from app.state.runs import ServedRun


MOST_CHOICES = 1_000
"""Values of a column up to which it is offered as a filter; nobody picks from a longer list."""


class ServedGallery:
    """An opened gallery; nothing of it changes while the application runs, so any thread may read it.

    Args:
        address: folder or URI.
        name: what users see, and the only way how requests name it.
        run: the run that made it, where it is served too; it encodes what is searched for.
        data_roots: folders whose images may be shown besides those of the gallery and its data.

    Attributes:
        name: see above.
        run: see above.
        gallery: the gallery itself, for vectors and searches.
        metadata: all rows in the gallery's order, without vectors and thumbnails: ``id``, ``path``, ``caption``,
            ``group``, ``split``, ``label_<task>``, ``predicted_<task>``, ``confidence_<task>`` …
        choices: of each name that a person can filter by (the class first, other tasks, ``split``) the values that
            occur, ascending.

    Raises:
        UserError: where there is no gallery, or its files are damaged.
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
        self._values = {name: self._encoded(column) for name, column in self.filter_columns().items()}
        self.choices = {name: values for name, (values, _) in self._values.items() if 0 < len(values) <= MOST_CHOICES}

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
        """Tasks that the model predicts or the data have labels of, the class first."""
        named = dict.fromkeys([*self.identity.predicts, *self.identity.labels])
        return sorted(named, key=lambda task: task != LABEL_TASK)

    def filter_columns(self) -> dict[str, str]:
        """Names that a person filters by, with the table's column of each: what the model says, else the label.

        ``split`` is the gallery's own; where an attribute is called so, the gallery's is ``gallery_split``.
        """
        columns = {task: f"{LABEL}{task}" for task in self.tasks}
        columns |= {task: f"{PREDICTED}{task}" for task in self.identity.predicts}
        return columns | {"gallery_split" if "split" in columns else "split": "split"}

    def fitting(self, filters: Mapping[str, Sequence[str]]) -> NDArray[np.int64]:
        """Places of the images that fit, ascending, int64 ``(n,)``.

        Args:
            filters: by name of ``choices`` the values of which an image has one; a name without values is none.

        Raises:
            UserError: for a name that nothing can be filtered by, or a value that does not occur.
        """
        fits = np.ones(len(self), bool)
        for name, wanted in filters.items():
            if not wanted:
                continue
            if name not in self.choices:
                known = ", ".join(self.choices) or "nothing"
                raise UserError(f"filter {_shortened(name)!r}: gallery {self.name!r} can be filtered by {known}")
            values, places = self._values[name]
            for value in wanted:
                if value not in self.choices[name]:
                    raise UserError(f"filter {name}: no image has {_shortened(str(value))!r}; choose another value")
            fits &= np.isin(places, [values.index(value) for value in wanted])
        return np.flatnonzero(fits)

    def has(self, sample_id: str) -> bool:
        """Whether there is such an image."""
        return sample_id in self._row_of

    def shares_images(self, other: ServedGallery) -> bool:
        """Whether some images are in another gallery too: under the same id, and with the same content if known."""
        return any(
            not own or not theirs or own == theirs
            for own, theirs in (
                (self._contents[row], other._contents[other._row_of[sample_id]])
                for sample_id, row in self._row_of.items()
                if sample_id in other._row_of
            )
        )

    def place(self, sample_id: str) -> int:
        """Row of an image in ``metadata``.

        Raises:
            UserError: if there is no such image.
        """
        row = self._row_of.get(sample_id)
        if row is None:
            raise UserError(f"gallery {self.name!r}: there is no image {_shortened(sample_id)!r}; choose one of it")
        return row

    def row(self, sample_id: str) -> dict[str, Any]:
        """What is said of an image, by column of ``metadata``.

        Raises:
            UserError: if there is no such image.
        """
        return self.rows([sample_id])[0]

    def rows(self, sample_ids: Sequence[str]) -> list[dict[str, Any]]:
        """What is said of images, in the order of their ids.

        Raises:
            UserError: names the first that is not there.
        """
        places = [self.place(sample_id) for sample_id in sample_ids]
        found: list[dict[str, Any]] = self.metadata.take(pa.array(places, pa.int64())).to_pylist()
        return found

    def image_path(self, sample_id: str) -> Path:
        """File of an image; only the gallery's own have one.

        Raises:
            UserError: if there is no such image, or it is no file of its own, or that is gone, or lies where the
                gallery has no business (``retrieval.image_files``).
        """
        path = str(self.metadata.column("path")[self.place(sample_id)].as_py() or "")
        try:
            return self._files.file(path)
        except UserError as error:
            raise UserError(f"gallery {self.name!r}: image {_shortened(sample_id)!r}: {error}") from error

    @cached_property
    def _files(self) -> ImageFiles:
        run = self.run.path if self.run is not None else self.identity.run
        return ImageFiles(self.gallery.uri, run, self._data_roots)

    def not_shown(self) -> list[str]:
        """Files that the gallery names but that lie outside of what it may show."""
        return self._files.outside(path or "" for path in self.metadata.column("path").to_pylist())

    def thumbnail(self, sample_id: str) -> bytes | None:
        """JPEG that the gallery keeps of an image, at most 128 pixels long; None where it keeps none.

        Raises:
            UserError: if there is no such image.
        """
        self.place(sample_id)
        kept: bytes | None = self.gallery.rows([sample_id], ["thumbnail"]).column("thumbnail")[0].as_py()
        return kept

    def image(self, sample_id: str) -> Path | bytes:
        """The best that there is to be shown of an image: its file, else the JPEG that the gallery keeps.

        Generated images have no file, and a file may have been removed since.

        Raises:
            UserError: if there is no such image, or nothing of it is left.
        """
        try:
            return self.image_path(sample_id)
        except UserError:
            kept = self.thumbnail(sample_id)
            if kept is None:
                raise
            return kept

    def _encoded(self, column: str) -> tuple[list[str], NDArray[np.int64]]:
        """Values that occur in a column, ascending, and the place of each row's value among them, -1 for none."""
        encoded = self.metadata.column(column).combine_chunks().dictionary_encode()
        found = encoded.dictionary.to_pylist()
        values = sorted(found)
        place = {value: number for number, value in enumerate(values)}
        places = np.array([*(place[value] for value in found), -1])
        return values, places[encoded.indices.fill_null(len(found)).to_numpy(zero_copy_only=False)]


def gallery_name(address: str | Path, taken: Sequence[str]) -> str:
    """What users see of a gallery that was given by its address: its folder's name, made different from others.

    Args:
        address: folder or URI.
        taken: names of other galleries.
    """
    folder = local_folder(str(address))
    parts = folder.resolve().parts if folder is not None else tuple(str(address).rstrip("/").split("/"))
    # RUN/gallery is told by the run.
    name = "/".join(parts[-3:-1]) if parts[-1] == "gallery" and len(parts) > 2 else parts[-1]
    numbered = (f"{name} ({number})" for number in range(2, len(taken) + 3))
    return name if name not in taken else next(other for other in numbered if other not in taken)


def _shortened(text: str, length: int = 80) -> str:
    return text if len(text) <= length else f"{text[:length]}…"


MARK = "indexed.json"
"""File in a gallery that says that all of a run's images are in it: a killed indexing leaves none."""


def indexed_gallery(
    run: ServedRun, tell: Callable[[str], None], name: str = "", data_roots: Sequence[Path] = ()
) -> ServedGallery:
    """The gallery in a run's directory; what is missing in it is encoded now, as ``python -m retrieval index`` does.

    Args:
        run: that is served.
        tell: gets a line before work that takes a while; a bar on the terminal shows how far it is.
        name: of the gallery; the run's by default.
        data_roots: folders whose images may be shown besides those of the gallery and its data.

    Raises:
        UserError: if other weights made the gallery, or there is none yet and the run's data are not there, or its
            model yields no vectors.
    """
    folder = run.path / Run.GALLERY
    if not is_whole(folder, run.weights):
        tell(f"{run.name}: indexing its images for the search, once")
        try:
            _fill(run.path, folder)
            _mark(folder, run.weights)
        except UserError as error:
            # The data may stay behind where a run is copied to with its gallery.
            if not _is_by(folder, run.weights):
                raise
            tell(f"{run.name}: its gallery may lack images and is served as it is, because {error}")
    return ServedGallery(folder, name or run.name, run, data_roots)


def is_whole(folder: Path, weights: str) -> bool:
    """Whether a gallery holds all images of a run.

    Args:
        folder: of the gallery.
        weights: digest of the run's weights.
    """
    try:
        mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
        gallery = Gallery.open(str(folder))
        return bool(mark["weights"] == gallery.identity.weights == weights and mark["images"] <= len(gallery))
    except (OSError, ValueError, KeyError, TypeError, UserError):
        # Whatever is wrong, indexing again mends it or says what it is.
        return False


def opened_gallery(
    address: str,
    runs: Iterable[ServedRun],
    taken: Sequence[str],
    tell: Callable[[str], None],
    data_roots: Sequence[Path] = (),
) -> ServedGallery:
    """A gallery that was named by its address, with the run that made it, as far as that is there.

    Args:
        address: folder or URI.
        runs: that are served already; one with the gallery's weights is taken.
        taken: names of other galleries.
        tell: gets a line where the model is not to be had: then the gallery can be searched by words and by its own
            images only.
        data_roots: see ``indexed_gallery``.

    Raises:
        UserError: where there is no gallery, or its files are damaged.
    """
    name = gallery_name(address, taken)
    identity = Gallery.open(address).identity
    run = next((run for run in runs if run.weights == identity.weights), None)
    if run is None:
        run, reason = _recorded_run(identity.run, identity.weights)
        if run is None:
            tell(f"{name}: {reason}; texts and images from outside cannot be searched for; name its run with --run")
    return ServedGallery(address, name, run, data_roots)


def _mark(folder: Path, weights: str) -> None:
    mark = {"weights": weights, "images": len(Gallery.open(str(folder)))}
    write_text_atomically(folder / MARK, json.dumps(mark))


def _is_by(folder: Path, weights: str) -> bool:
    """Whether there is a gallery that these weights made."""
    try:
        return Gallery.open(str(folder)).identity.weights == weights
    except UserError:
        return False


def _recorded_run(path: str, weights: str) -> tuple[ServedRun | None, str]:
    """The run that a gallery names, or why it is not to be had."""
    from app.state.runs import ServedRun

    if not path:
        return None, "does not say which run made it"
    try:
        run = ServedRun(path)
    except UserError as error:
        return None, f"its run cannot be loaded ({error})"
    return (run, "") if run.weights == weights else (None, f"{path} has other weights by now")


def _fill(run: Path, folder: Path) -> None:
    from retrieval.commands.index import add_arguments
    from retrieval.commands.index import run as index

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    # An image that cannot be read is told and left out: the others are to be seen.
    asked = ["--run", str(run), "--gallery", str(folder), "--on-bad-image", "skip"]
    index(parser.parse_args(asked))
