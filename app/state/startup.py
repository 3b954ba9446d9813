"""Everything that is served, loaded before the server listens: models, galleries, and what the demo lacks.

The runs that ``--demo`` shows: the quickstart's, found among the runs that are there, or trained now.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from app.state.context import AppContext
from app.state.galleries import ServedGallery, indexed_gallery, opened_gallery
from app.state.runs import ServedRun
from vitrail.errors import UserError
from vitrail.runs import Run


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
        _tell(f"{name}: gallery of {len(gallery):,} images is open")
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


EXPERIMENTS = ("quickstart", "quickstart_pairs")
"""A classifier for Classify, and a dual encoder for Zero-shot and for search by words; both on generated images."""


def demo_runs(root: Path, names: Sequence[str] = EXPERIMENTS) -> list[Path]:
    """Run directories of the demo, one of each experiment.

    What is missing is trained, and what has no temperatures is calibrated, with its output on the terminal.

    Args:
        root: directory of all runs.
        names: experiments.

    Raises:
        UserError: where a training failed.
    """
    runs = [finished_run(root, name) or _trained(root, name) for name in names]
    for run in runs:
        _calibrate(run)
    return runs


def finished_run(root: Path, name: str) -> Path | None:
    """The newest run of an experiment that was trained to its end; None where there is none.

    Args:
        root: directory of all runs.
        name: of the experiment.
    """
    for path in sorted((root / name).glob("*/"), key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            run = Run(path)
        except UserError:  # nothing of a run in it: it was killed at once
            continue
        was_trained = any(stage.get("stage") == "fit" for stage in run.stages)
        if was_trained and not run.interrupted and "best" in run.checkpoints:
            return path
    return None


def _trained(root: Path, name: str) -> Path:
    """Trains an experiment as a process of its own: nobody but the command line may import what it is made of."""
    command = ["experiments", "fit", "--config", str(_experiments_folder() / f"{name}.yaml"), "--runs", str(root)]
    sys.stderr.write(f"{root}: has no finished run of {name}; training it once: python -m {' '.join(command)}\n")
    ended = subprocess.run([sys.executable, "-m", *command], check=False)
    found = finished_run(root, name)
    if ended.returncode != 0 or found is None:
        raise UserError(
            f"--demo: training {name} ended with exit code {ended.returncode}; what it says above is the reason"
        )
    return found


def _calibrate(run: Path) -> None:
    """Fits temperatures on validation where the run has none; without them its confidences are shown as they are."""
    if (run / Run.CALIBRATION).exists():
        return
    sys.stderr.write(f"{run}: calibrating its confidences once\n")
    if not (run / Run.PREDICTIONS / "val.parquet").exists():
        validate = ["experiments", "validate", "--ckpt_path", str(run / Run.BEST)]
        if subprocess.run([sys.executable, "-m", *validate], check=False).returncode != 0:
            return
    subprocess.run([sys.executable, "-m", "evaluation", "calibrate", str(run)], check=False)


def _experiments_folder() -> Path:
    # Found, not imported.
    found = importlib.util.find_spec("experiments")
    places = list(found.submodule_search_locations or []) if found is not None else []
    if not places:
        raise UserError("--demo: the package `experiments` is not installed; run it in the repository's folder")
    return Path(places[0])
