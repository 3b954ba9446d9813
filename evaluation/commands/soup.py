"""``python -m evaluation soup``: build data and network to judge a soup with, and keep the result as a run.

The result is a directory like any other run's, with ``config.yaml`` and ``checkpoints/best.ckpt``, so that
``python -m experiments test --ckpt_path …/checkpoints/best.ckpt`` needs nothing else.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from evaluation.weights.soup import (
    Score,
    Soup,
    State,
    greedy_soup,
    moving_statistics,
    refresh_batchnorm,
    refuse_strangers,
    save_soup,
    soup_table,
    uniform_soup,
)
from vitrail.errors import UserError
from vitrail.files import read_csv, timestamped_directory, write_text_atomically
from vitrail.runs import Run

if TYPE_CHECKING:
    from datamodules.base import ImageDataModule
    from lightning_modules.base import VisionTask
    from vitrail.console import Table

METHODS = {"uniform": uniform_soup, "greedy": greedy_soup}


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``soup``."""
    command.description = "Averages the weights of several runs of one experiment, chosen on validation, as a new run."
    command.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run directories, at least two")
    command.add_argument("--sweep", type=Path, metavar="DIR", help="the best members of a sweep instead")
    command.add_argument("--top", type=int, default=5, metavar="N", help="how many of the sweep (default: 5)")
    command.add_argument(
        "--method",
        choices=("uniform", "greedy"),
        default="greedy",
        help="all, or only those that do not make the validation metric fall (default: greedy)",
    )
    command.add_argument("--metric", help="val/… metric to choose by (default: that of the runs' best checkpoints)")
    command.add_argument("--test", action="store_true", help="test the best member and the soup as well")


def run(options: argparse.Namespace, rest: Sequence[str] = ()) -> None:
    """Make the soup and print what it was chosen by."""
    from vitrail.runs import runs_among

    if bool(options.runs) == (options.sweep is not None):
        raise UserError("soup: name either run directories, or one sweep with --sweep DIR --top N")
    named = runs_among(options.runs, "soup", Run.BEST, unfinished_only=True)
    runs = named or best_of_sweep(options.sweep, options.top)
    place = place_beside(runs[0]) if options.runs else place_of_sweep(options.sweep)
    made = make_soup(runs, options.method, metric=options.metric, place=place, test=options.test)
    made.table.show()
    sys.stdout.write(f"{made.directory / Run.BEST} has the weights of the soup\n")


class Made(NamedTuple):
    """What the command has made.

    Attributes:
        directory: of the new run.
        table: to be shown.
    """

    directory: Path
    table: Table


def make_soup(
    runs: Sequence[Path],
    method: str,
    *,
    metric: str | None = None,
    place: Path,
    test: bool = False,
) -> Made:
    """Average the best checkpoints of runs and keep the result as a new run.

    Args:
        runs: run directories of one experiment.
        method: ``uniform`` or ``greedy``.
        metric: of the validation split; by default what the runs chose their best checkpoint by.
        place: directory in which the new run gets one, ``runs/<name>``.
        test: whether the best member and the soup are tested as well.

    Raises:
        UserError: the runs do not fit together, or the metric is none of theirs.
    """
    from lightning_modules.checkpoint import load_task, read_checkpoint
    from vitrail.config import dump_yaml

    configs = [_config(run) for run in runs]
    files = [run / Run.BEST for run in runs]
    checkpoints = [read_checkpoint(file) for file in files]
    refuse_strangers(runs, checkpoints, [_data_of(run) for run in runs])
    metric, maximize = _metric(configs[0], metric, runs[0])
    states = [checkpoint["state_dict"] for checkpoint in checkpoints]
    judge = _Judge(load_task(files[0]), _datamodule(runs[0]), configs[0], states)
    soup = METHODS[method](states, runs, judge.score_by(metric), maximize)
    best = list(runs).index(soup.members[0])
    directory = timestamped_directory(place)
    save_soup(directory / Run.BEST, checkpoints[best], soup)
    config = configs[best] | {"name": directory.parent.name, "runs": str(directory.parent.parent)}
    write_text_atomically(directory / Run.CONFIG, dump_yaml(config))
    write_text_atomically(directory / Run.SOUP, json.dumps(_record(soup, metric), indent=2) + "\n")
    tested: list[float | None] | None = None
    if test:
        on_test = metric.replace("val/", "test/", 1)
        tested = [None] * (len(runs) + 1)
        tested[0] = judge.measure(states[best], on_test)
        tested[-1] = judge.measure(soup.state, on_test)
    return Made(directory, soup_table(soup, metric, tested))


def best_of_sweep(folder: Path, top: int) -> list[Path]:
    """Run directories of a sweep's best trials, the best first.

    Args:
        folder: of the sweep, with ``sweep.csv``.
        top: how many.

    Raises:
        UserError: there is no finished sweep, or too few of its trials are complete.
    """
    path = folder / "sweep.csv"
    if not path.is_file():
        raise UserError(f"--sweep {folder}: has no sweep.csv; give the directory of a sweep that has ended")
    frame = read_csv(path)
    complete = frame[frame["state"] == "complete"].head(top)
    if len(complete) < 2:
        raise UserError(f"{path}: {len(complete)} complete trials, and a soup needs at least two (--top {top})")
    runs = []
    for run in map(Path, complete["run"]):
        # Beside the table first: the sweep's directory may have been moved.
        beside = folder / "trials" / run.parent.name / run.name
        runs.append(beside if beside.is_dir() else run)
    return runs


class _Judge:
    """Measures weights on the data of the runs."""

    def __init__(
        self, task: VisionTask, datamodule: ImageDataModule, config: dict[str, Any], states: Sequence[State]
    ) -> None:
        self._task = task
        self._datamodule = datamodule
        datamodule.adopt_image_options(task.input_options)
        # As the runs were validated themselves.
        trainer: dict[str, Any] = config.get("trainer") or {}
        self._settings: dict[str, Any] = {key: trainer.get(key) for key in ("precision", "limit_val_batches")}
        self._states = states
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def score_by(self, metric: str) -> Score:
        """The function that soups are chosen by."""

        def score(state: State, members: Sequence[int]) -> tuple[float, State]:
            self._task.load_state_dict(state)
            layers = moving_statistics(self._task, [self._states[number] for number in members])
            if layers:
                self._task.to(self._device)
                refresh_batchnorm(self._task, layers, self._task.image_features, self._train_images())
                state = {name: value.detach().cpu().clone() for name, value in self._task.state_dict().items()}
            return self.measure(state, metric), state

        return score

    def measure(self, state: State, metric: str) -> float:
        """A metric of the validation or the test split, as a run logs it.

        Raises:
            UserError: the task has no such metric.
        """
        from lightning.pytorch import Trainer

        self._task.load_state_dict(state)
        with _quiet():
            trainer = Trainer(
                accelerator="auto",
                devices=1,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                use_distributed_sampler=False,
                **self._settings,
            )
            stage = trainer.test if metric.startswith("test/") else trainer.validate
            [measured] = stage(self._task, datamodule=self._datamodule, verbose=False)
        if metric not in measured:
            raise UserError(f"--metric {metric}: the task does not measure it; it has {', '.join(sorted(measured))}")
        return float(measured[metric])

    def _train_images(self) -> Iterator[torch.Tensor]:
        """Training images without augmentation, as the network will see images."""
        for batch in self._datamodule.eval_dataloader("train"):
            yield batch["image"].to(self._device)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the lines that a trainer writes each time it is made."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _config(run: Path) -> dict[str, Any]:
    from vitrail.config import read_experiment

    path = run / Run.CONFIG
    if not path.is_file():
        raise UserError(f"{run}: has no config.yaml; give run directories such as runs/<name>/<time>")
    return read_experiment(path)


def _data_of(run: Path) -> Any:
    """What tells data and their division apart."""
    path = run / Run.RECORD
    if not path.is_file():
        raise UserError(f"{run}: has no run.json, which says what data it saw; give directories that `fit` has made")
    data = Run(run).record.get("data") or {}
    return data.get("fingerprint"), data.get("samples")


def _metric(config: dict[str, Any], asked: str | None, run: Path) -> tuple[str, bool]:
    """The metric that soups are chosen by, and whether higher is better."""
    chosen = config.get("checkpoint") or {}
    if not (isinstance(chosen, dict) and {"monitor", "mode"} <= chosen.keys()):
        raise UserError(
            f"{run / Run.CONFIG}: says nothing of checkpoint.monitor and .mode; give runs that `fit` has made"
        )
    metric = asked or chosen["monitor"]
    if not metric.startswith("val/"):
        raise UserError(f"--metric {metric}: a soup is chosen on the validation split; name a val/… metric")
    # A loss is the only metric of ours of which less is better.
    maximize = chosen["mode"] == "max" if metric == chosen["monitor"] else "loss" not in metric
    return metric, maximize


def _datamodule(run: Path) -> ImageDataModule:
    datamodule: ImageDataModule = Run(run).datamodule
    datamodule.prepare_data()
    datamodule.setup("fit")
    return datamodule


def place_beside(run: Path) -> Path:
    """Directory for soups of a run and others: ``runs/<name>_soup`` for ``runs/<name>/<time>``.

    Of a trial it is that of its sweep.
    """
    run = run if len(run.parts) > 2 else run.absolute()
    if run.parent.parent.name == "trials":
        return place_of_sweep(run.parents[2])
    return run.parent.parent / f"{run.parent.name}_soup"


def place_of_sweep(folder: Path) -> Path:
    """Directory for soups of a sweep: ``runs/<name>_soup`` for ``runs/sweeps/<name>``."""
    folder = folder if len(folder.parts) > 2 else folder.absolute()
    root = folder.parent.parent if folder.parent.name == "sweeps" else folder.parent
    return root / f"{folder.name}_soup"


def _record(soup: Soup, metric: str) -> dict[str, Any]:
    members = [
        {"run": str(run), metric: score, "kept": number in soup.kept}
        for number, (run, score) in enumerate(zip(soup.members, soup.scores, strict=True))
    ]
    return {"method": soup.method, metric: soup.score, "members": members}
