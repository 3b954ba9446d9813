"""Everything that is served, loaded before the server listens: models, galleries, and what the demo lacks."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from app.context import AppContext
from app.indexing import indexed_gallery, opened_gallery
from app.served_gallery import ServedGallery
from app.served_run import ServedRun
from vitrail.errors import UserError


def load(
    runs: Sequence[Path],
    galleries: Sequence[str],
    *,
    demo: bool = False,
    root: Path = Path("runs"),
    data_roots: Sequence[Path] = (),
) -> AppContext:
    """Loads runs and galleries, and tells on the terminal what it is doing.

    A run's own gallery comes with it; it is filled where it is not there yet. Where that is not possible, because the
    run's data are gone, the run is served without one.

    Args:
        runs: run directories.
        galleries: folders or addresses of further galleries.
        demo: whether the quickstart's runs are served too.
        root: directory of all runs, in which those of the demo are looked for.
        data_roots: folders whose images may be shown besides those of the galleries and their data.

    Raises:
        UserError: for whatever cannot be loaded.
    """
    paths = list(runs)
    if demo:
        from app.demo import demo_runs

        paths += [path for path in demo_runs(root) if path.resolve() not in {run.resolve() for run in runs}]
    served: dict[str, ServedRun] = {}
    for path in dict.fromkeys(path.resolve() for path in paths):
        run = ServedRun(path, _free_name(path, served))
        served[run.name] = run
        _tell(f"{run.name}: {run.kind} is loaded")
        for note in run.notes:
            _tell(f"{run.name}: {note}")
    opened: dict[str, ServedGallery] = {}
    for name, run in served.items():
        try:
            opened[name] = indexed_gallery(run, _tell, data_roots=data_roots)
        except UserError as error:
            _tell(f"{name}: served without a gallery: {error}")
    for address in galleries:
        found = opened_gallery(address, list(served.values()), list(opened), _tell, data_roots)
        opened[found.name] = found
        if found.run is not None:
            served.setdefault(found.run.name, found.run)
    for name, gallery in opened.items():
        _tell(f"{name}: gallery of {len(gallery):,} pictures is open")
        if outside := gallery.not_shown():
            _tell(
                f"{name}: {len(outside):,} files that it names lie outside of its folder and its data's and are not "
                f"shown, first {outside[0]!r}; if they are yours, name their folder with --data-root"
            )
    return AppContext(served, opened)


def _free_name(path: Path, taken: dict[str, ServedRun]) -> str:
    """What users see of a run, told from others of the same name (``shop/20260101-120000`` in two folders)."""
    name, number = "/".join(path.parts[-2:]), 2
    free = name
    while free in taken:
        free, number = f"{name} ({number})", number + 1
    return free


def _tell(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
