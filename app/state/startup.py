"""Load everything that is served before the server listens; ``--demo`` trains the quickstart's runs where missing."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from app.state.context import AppContext, display_name
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
    """Load runs and galleries, and report progress on the terminal.

    A run's own gallery is filled where it is missing. Where that is not possible, because the run's data are gone, the
    run is served without one.

    Args:
        runs: run directories.
        galleries: folders or addresses of further galleries.
        demo: whether the quickstart's runs are served too.
        root: directory of all runs, in which those of the demo are looked for.
        data_roots: further folders whose images may be shown.

    Raises:
        UserError: something cannot be loaded.
    """
    paths = list(runs)
    if demo:
        paths += [path for path in demo_runs(root) if path.resolve() not in {run.resolve() for run in runs}]
    served: dict[str, ServedRun] = {}
    for path in dict.fromkeys(path.resolve() for path in paths):
        run = ServedRun(path, display_name(path.parts, served))
        served[run.name] = run
        _report(f"{run.name}: {run.kind} is loaded")
        for note in run.notes:
            _report(f"{run.name}: {note}")
    opened: dict[str, ServedGallery] = {}
    for name, run in served.items():
        try:
            opened[name] = indexed_gallery(run, _report, data_roots=data_roots)
        except UserError as error:
            _report(f"{name}: served without a gallery: {error}")
    for address in galleries:
        found = opened_gallery(address, list(served.values()), list(opened), _report, data_roots)
        opened[found.name] = found
        if found.run is not None:
            served.setdefault(found.run.name, found.run)
    for name, gallery in opened.items():
        _report(f"{name}: gallery of {len(gallery):,} images is open")
        if outside := gallery.not_shown():
            _report(
                f"{name}: {len(outside):,} files that it names are outside of its folder and its data's and are not "
                f"shown, first {outside[0]!r}; if they are yours, name their folder with --data-root"
            )
    # Search and Explore open on the first: on one that finds what is typed, where there is one.
    ordered = sorted(opened, key=lambda name: not (opened[name].identity.encodes_text and opened[name].run))
    return AppContext(served, {name: opened[name] for name in ordered})


def _report(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


EXPERIMENTS = ("quickstart", "quickstart_pairs")
"""A classifier for Classify, and a dual encoder for Zero-shot and for search by text; both on generated images."""


def demo_runs(root: Path, names: Sequence[str] = EXPERIMENTS) -> list[Path]:
    """Return a run directory of each experiment of the demo; what is missing is trained and calibrated now."""
    runs = [finished_run(root, name) or _trained(root, name) for name in names]
    for run in runs:
        _calibrate(run)
    return runs


def finished_run(root: Path, name: str) -> Path | None:
    """Return the newest run of an experiment that was trained to its end; None where there is none."""
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
    """Train an experiment in a process of its own, as the command line does."""
    command = ["experiments", "fit", "--config", str(_experiments_folder() / f"{name}.yaml"), "--runs", str(root)]
    sys.stderr.write(f"{root}: has no finished run of {name}; training it once: python -m {' '.join(command)}\n")
    ended = subprocess.run([sys.executable, "-m", *command], check=False)
    found = finished_run(root, name)
    if ended.returncode != 0 or found is None:
        raise UserError(
            f"--demo: training {name} ended with exit code {ended.returncode}; the reason is in its output above"
        )
    return found


def _calibrate(run: Path) -> None:
    """Fit temperatures on validation where the run has none; without them its confidences are shown as they are."""
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
