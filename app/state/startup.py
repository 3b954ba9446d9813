"""Load everything that is served before the server listens; ``--demo`` trains its own runs where they are missing.

The page of the demo opens once there is a classifier; the dual encoder is trained while it is looked at.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from app.state.context import AppContext, Pending, display_name
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
        demo: whether the demo's runs are served too.
        root: directory of all runs, in which those of the demo are looked for.
        data_roots: further folders whose images may be shown.

    Raises:
        UserError: something cannot be loaded.
    """
    paths = list(runs)
    if demo:
        paths += demo_runs(root)
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
    _report_galleries(opened)
    # Search and Explore open on the first: on one that finds what is typed, where there is one.
    ordered = sorted(opened, key=lambda name: not (opened[name].identity.encodes_text and opened[name].run))
    pending = None
    if demo and lacks_something(root):

        def complete(report: Callable[[str], None]) -> AppContext:
            complete_demo(root, report)
            return load(runs, galleries, demo=True, root=root, data_roots=data_roots)

        pending = Pending(complete)
    return AppContext(served, {name: opened[name] for name in ordered}, pending=pending)


def _report_galleries(opened: Mapping[str, ServedGallery]) -> None:
    """Report the size of each gallery, and which of its files are not shown."""
    for name, gallery in opened.items():
        _report(f"{name}: gallery of {len(gallery):,} images is open")
        if outside := gallery.not_shown():
            _report(
                f"{name}: {len(outside):,} files that it names are outside of its folder and its data's and are not "
                f"shown, first {outside[0]!r}; if they are yours, name their folder with --data-root"
            )


def _report(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


CLASSIFIER, DUAL_ENCODER = "demo_classifier", "demo_dual_encoder"
"""Runs of the demo, the quickstart's experiments with more objects, so that most predictions are right.

The dual encoder has the classifier's image tower and trains texts for it, in a fraction of the time."""

_DATA = {"n_samples": "2400", "views": "1", "val_fraction": "0.1", "test_fraction": "0.1"}
_OPTIONS = {
    CLASSIFIER: ("quickstart", {"trainer.max_epochs": "8", "report": "false", "test_best": "false"}),
    DUAL_ENCODER: (
        "quickstart_pairs",
        {
            "data.init_args.short_captions": "true",
            "trainer.max_epochs": "16",
            "features.mode": "always",
            "features.n_views": "2",
            "model.init_args.freeze": "vision_only",
            "model.init_args.lr": "2.0e-3",
            "test_best": "false",
        },
    ),
}
"""Experiment and settings of each."""

_EPOCH = re.compile(r"epoch (\d+/\d+): ")


def demo_runs(root: Path) -> list[Path]:
    """Return the runs of the demo that are there; the classifier, which takes a minute, is trained where it is not."""
    classifier = finished_run(root, CLASSIFIER) or _trained(root, CLASSIFIER)
    return [run for run in (classifier, finished_run(root, DUAL_ENCODER)) if run is not None]


def lacks_something(root: Path) -> bool:
    """Return whether a run of the demo is missing or not calibrated."""
    runs = [finished_run(root, name) for name in _OPTIONS]
    return any(run is None or not (run / Run.CALIBRATION).exists() for run in runs)


def complete_demo(root: Path, report: Callable[[str], None]) -> None:
    """Train and calibrate what the demo lacks.

    Args:
        root: directory of all runs.
        report: receives a line on how far it is.

    Raises:
        UserError: training failed.
    """
    for name in _OPTIONS:
        run = finished_run(root, name) or _trained(root, name, report)
        report("calibrating confidences")
        _calibrate(run)


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


def _trained(root: Path, name: str, report: Callable[[str], None] | None = None) -> Path:
    """Train a run in a process of its own, as the command line does; its output goes to the terminal."""
    experiment, settings = _OPTIONS[name]
    settings = {**{f"data.init_args.{key}": value for key, value in _DATA.items()}, **settings}
    if name == DUAL_ENCODER:
        settings["model.init_args.towers.image_pretrained"] = str(demo_runs(root)[0] / Run.BEST)
    command = ["experiments", "fit", "--config", str(_experiments_folder() / f"{experiment}.yaml"), "--name", name]
    command += ["--runs", str(root), *(f"--{key}={value}" for key, value in settings.items())]
    sys.stderr.write(f"{root}: has no finished run of {name}; training it once: python -m {' '.join(command)}\n")
    with subprocess.Popen(
        [sys.executable, "-m", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as process:
        stop = atexit.register(process.terminate)
        for line in process.stdout or ():
            sys.stderr.write(line)
            if report is not None and (epoch := _EPOCH.match(line)):
                report(f"epoch {epoch[1]}")
        atexit.unregister(stop)
    found = finished_run(root, name)
    if process.returncode != 0 or found is None:
        raise UserError(
            f"--demo: training {name} ended with exit code {process.returncode}; the reason is in its output above"
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
