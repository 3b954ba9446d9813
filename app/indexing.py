"""Galleries of the runs that are served: filled at the first start, with progress, and only opened at the next."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from app.served_gallery import ServedGallery, gallery_name
from retrieval.gallery import Gallery
from vitrail.errors import UserError
from vitrail.files import written_whole

if TYPE_CHECKING:
    from app.served_run import ServedRun

MARK = "indexed.json"
"""File in a gallery that says that all of a run's pictures are in it: a killed indexing leaves none."""


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
    folder = run.path / "gallery"
    if not is_whole(folder, run.weights):
        tell(f"{run.name}: indexing its pictures for the search, once")
        try:
            _fill(run.path, folder)
            _mark(folder, run.weights)
        except UserError as error:
            # The data may stay behind where a run is copied to with its gallery.
            if not _is_by(folder, run.weights):
                raise
            tell(f"{run.name}: its gallery may lack pictures and is served as it is, because {error}")
    return ServedGallery(folder, name or run.name, run, data_roots)


def is_whole(folder: Path, weights: str) -> bool:
    """Whether a gallery holds all pictures of a run.

    Args:
        folder: of the gallery.
        weights: digest of the run's weights.
    """
    try:
        mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
        gallery = Gallery.open(str(folder))
        return bool(mark["weights"] == gallery.identity.weights == weights and mark["pictures"] <= len(gallery))
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
            pictures only.
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
            tell(f"{name}: {reason}; texts and pictures from outside cannot be searched for; name its run with --run")
    return ServedGallery(address, name, run, data_roots)


def _mark(folder: Path, weights: str) -> None:
    mark = {"weights": weights, "pictures": len(Gallery.open(str(folder)))}
    with written_whole(folder / MARK) as partial:
        partial.write_text(json.dumps(mark), encoding="utf-8")


def _is_by(folder: Path, weights: str) -> bool:
    """Whether there is a gallery that these weights made."""
    try:
        return Gallery.open(str(folder)).identity.weights == weights
    except UserError:
        return False


def _recorded_run(path: str, weights: str) -> tuple[ServedRun | None, str]:
    """The run that a gallery names, or why it is not to be had."""
    from app.served_run import ServedRun

    if not path:
        return None, "does not say which run made it"
    try:
        run = ServedRun(path)
    except UserError as error:
        return None, f"its run cannot be loaded ({error})"
    return (run, "") if run.weights == weights else (None, f"{path} has other weights by now")


def _fill(run: Path, folder: Path) -> None:
    from retrieval.commands.index import add_parser
    from retrieval.commands.index import run as index

    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    # A picture that cannot be read is told and left out: the others are to be seen.
    asked = ["index", "--run", str(run), "--gallery", str(folder), "--on-bad-image", "skip"]
    index(parser.parse_args(asked))
