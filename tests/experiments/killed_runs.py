"""Runs that are killed and resumed, in forked processes; called by ``test_exact_resume.py``.

A program of its own: everything is imported once, and each run is a fork of a process that has computed nothing yet.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import resource
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from experiments.train.cli import main
from tests.support.plain_figures import plain_figures
from tests.support.processes import begin_fork, end_of_fork

EVENTS = (
    "on_train_batch_start",
    "on_before_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_validation_batch_end",
    "on_validation_end",
    "on_train_epoch_end",
    "on_save_checkpoint",
)
"""Moments at which a run may be killed."""


class KilledAt(Callback):
    """Sends a signal to its own process at the n-th moment, where the environment says so, and counts the moments."""

    def __init__(self) -> None:
        self.seen = 0

    def _moment(self) -> None:
        self.seen += 1
        if self.seen != int(os.environ.get("KILL_AT", "0")):
            return
        if "FILL_DISK" in os.environ:
            # From now on no file can grow beyond this; the signal would else end the process.
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        else:
            os.kill(os.getpid(), int(os.environ.get("KILL_BY", signal.SIGKILL)))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if "COUNT_IN" in os.environ:
            Path(os.environ["COUNT_IN"]).write_text(str(self.seen), encoding="utf-8")


def _hook(name: str) -> Callable[..., None]:
    def hook(self: KilledAt, trainer: Trainer, pl_module: LightningModule, *arguments: Any, **named: Any) -> None:
        if not trainer.sanity_checking:
            self._moment()

    hook.__name__ = name
    return hook


for _name in EVENTS:
    setattr(KilledAt, _name, _hook(_name))


def in_fork(arguments: list[str], log: Path, **environment: str) -> int:
    """Runs the command line in a fork.

    Returns:
        Its exit code, negative for the signal that ended it.
    """

    def program() -> int:
        os.environ.update(environment)
        try:
            return main(arguments)
        finally:
            if "MODULES_IN" in environment:
                Path(environment["MODULES_IN"]).write_text("\n".join(sys.modules), encoding="utf-8")

    return end_of_fork(begin_fork(program, log))


def run_directory(runs: Path) -> Path:
    (directory,) = runs.glob("*/*")
    return directory


def fit(config: Path, runs: Path, **environment: str) -> int:
    """Begins, or goes on where there is something to go on from."""
    arguments = ["fit", "--config", str(config), "--runs", str(runs)]
    if list(runs.glob("*/*/checkpoints/last.ckpt")):
        arguments += ["--ckpt_path", "last"]
    else:
        for directory in runs.glob("*/*"):
            # Killed before there was anything to resume from: the user begins again, within the same second perhaps.
            number = len(list(runs.parent.glob(f"{runs.name}-given-up-*")))
            directory.rename(runs.parent / f"{runs.name}-given-up-{number}")
    return in_fork(arguments, runs.parent / f"{runs.name}.log", **environment)


def killed_often(config: Path, runs: Path, kills: int, draw: random.Random, moments: int) -> list[Any]:
    """A run that is killed up to ``kills`` times, each time somewhere in what a run does in a third of its time.

    Returns:
        For each part the moment at which it was to be killed and its exit code; the last one has come to the end.
    """
    runs.mkdir()
    history: list[Any] = []
    for _ in range(kills):
        moment = draw.randint(1, moments // 3)
        history.append([moment, fit(config, runs, KILL_AT=str(moment))])
        if history[-1][1] != -signal.SIGKILL:
            return history
    history.append([0, fit(config, runs)])
    return history


def import_all(names: list[str]) -> None:
    """Imports what a run has imported, so that the next ones find it there."""
    for name in names:
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def run_all(folder: Path, experiments: list[str], kills: int) -> None:
    """One undisturbed run of each experiment, and as many as the kills take; ``history.json`` lists them."""
    history: dict[str, Any] = {}
    for experiment in experiments:
        config = folder / f"{experiment}.yaml"
        whole = folder / f"{experiment}-whole"
        whole.mkdir()
        counted, modules = folder / f"{experiment}-moments", folder / f"{experiment}-modules"
        assert fit(config, whole, COUNT_IN=str(counted), MODULES_IN=str(modules)) == 0
        import_all(modules.read_text(encoding="utf-8").split("\n"))
        moments = int(counted.read_text(encoding="utf-8"))
        draw = random.Random(experiment)
        left = kills
        while left > 0:
            name = f"{experiment}-killed-{len(history)}"
            history[name] = killed_often(config, folder / name, left, draw, moments)
            left -= len(history[name]) - 1
    (folder / "history.json").write_text(json.dumps(history), encoding="utf-8")


def run_interrupted(folder: Path, experiment: str, moments: list[int]) -> None:
    """Runs that are terminated, that SLURM requeues, or whose disk is full, and are then resumed."""
    config = folder / f"{experiment}.yaml"
    history: dict[str, Any] = {}
    scontrol = folder / "bin" / "scontrol"
    scontrol.parent.mkdir()
    # SLURM ends a job that it requeues.
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {folder}/scontrol\nkill -9 $PPID\n', encoding="utf-8")
    scontrol.chmod(0o755)
    slurm = {
        **{"SLURM_JOB_ID": "77", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train", "SLURM_NODELIST": "localhost"},
        **{"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"},
        "PATH": f"{scontrol.parent}:{os.environ['PATH']}",
    }
    causes: dict[str, dict[str, str]] = {
        "terminated": {"KILL_BY": str(int(signal.SIGTERM))},
        "full": {"FILL_DISK": "1"},
        "requeued": {"KILL_BY": str(int(signal.SIGUSR1)), **slurm},
    }
    for cause, environment in causes.items():
        for moment in moments:
            runs = folder / f"{experiment}-{cause}-{moment}"
            runs.mkdir()
            codes = [fit(config, runs, KILL_AT=str(moment), **environment)]
            # The scheduler starts the very same command again.
            again = ["fit", "--config", str(config), "--runs", str(runs)]
            log = folder / f"{runs.name}.log"
            codes.append(in_fork(again, log, **slurm) if cause == "requeued" else fit(config, runs))
            history[runs.name] = codes
    (folder / "interrupted.json").write_text(json.dumps(history), encoding="utf-8")


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    with plain_figures():
        run_all(Path(sys.argv[1]), sys.argv[3:], int(sys.argv[2]))
        # In the middle of an epoch of phase two.
        run_interrupted(Path(sys.argv[1]), sys.argv[3], [34])
