"""Where a run keeps what is known of it: ``runs/<name>/<time>/``."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from datamodules.from_experiment import read_experiment
from datamodules.schema import UserError
from datamodules.whole_files import written_whole

CONFIG_FILE = "config.yaml"
CHECKPOINTS = "checkpoints"

RESERVED = {"ablations": "`ablate`", "results": "`results`", "sweeps": "`sweep`"}
"""Folders in the directory of all runs that are not an experiment's, and whose they are."""

_SHARED_WITH_RANKS = "VITRINE_RUN_DIRECTORY"
_NOT_OF_THE_EXPERIMENT = {"ckpt_path", "runs", "name", "config", "weights_only"}


def new_run_directory(root: Path, name: str) -> Path:
    """Make an empty directory for a new run.

    Processes that one launcher started for the same run get the same directory: Lightning's own launcher passes the
    environment on, torchrun and SLURM have an identifier of the job.

    Args:
        root: Directory of all runs.
        name: Name of the experiment.

    Returns:
        The directory; it exists.
    """
    shared = os.environ.get(_SHARED_WITH_RANKS)
    if shared and "LOCAL_RANK" in os.environ:
        return Path(shared)
    job = os.environ.get("TORCHELASTIC_RUN_ID") or os.environ.get("SLURM_JOB_ID")
    if job and job != "none":
        directory = root / name / f"job-{job}"
        directory.mkdir(parents=True, exist_ok=True)
    else:
        directory = _make_unique(root / name / time.strftime("%Y%m%d-%H%M%S"))
    os.environ[_SHARED_WITH_RANKS] = str(directory.resolve())
    return directory


def discard_empty(directory: Path) -> None:
    """Remove a run directory in which nothing has been kept, as of a run that was refused, and its empty parent.

    Args:
        directory: ``<root>/<name>/<time>``; one that holds any file stays as it is.
    """
    # Another process of the same run may do so at the same time, and the parent may have other runs.
    with suppress(OSError):
        if any(path.is_file() for path in directory.rglob("*")):
            return
        for folder in sorted((path for path in directory.rglob("*") if path.is_dir()), reverse=True):
            folder.rmdir()
        directory.rmdir()
        directory.parent.rmdir()


def _make_unique(directory: Path) -> Path:
    directory.parent.mkdir(parents=True, exist_ok=True)
    candidate, number = directory, 1
    while True:
        try:
            candidate.mkdir()
            return candidate
        except FileExistsError:
            number += 1
            candidate = directory.with_name(f"{directory.name}-{number}")


def resolve_checkpoint(ckpt_path: str, root: Path, name: str) -> Path:
    """Turn ``best`` and ``last`` into the checkpoint of the newest run of this name that has one.

    Args:
        ckpt_path: ``best``, ``last`` or a file.
        root: Directory of all runs.
        name: Name of the experiment.

    Raises:
        UserError: There is no such file.
    """
    if ckpt_path in ("best", "last"):
        found = sorted((root / name).glob(f"*/{CHECKPOINTS}/{ckpt_path}.ckpt"), key=lambda path: path.stat().st_mtime)
        if not found:
            raise UserError(
                f"--ckpt_path {ckpt_path}: no run under {root / name} has a {ckpt_path}.ckpt; "
                "run `fit` first or give the path of a checkpoint"
            )
        return found[-1]
    path = Path(ckpt_path)
    if not path.is_file():
        raise UserError(f"--ckpt_path {ckpt_path}: no such file; a run keeps its checkpoints in {CHECKPOINTS}/")
    return path


def run_of_checkpoint(checkpoint: Path) -> Path | None:
    """The run directory that a checkpoint belongs to, or None where it lies outside of one."""
    directory = checkpoint.parent.parent
    inside = checkpoint.parent.name == CHECKPOINTS and (directory / CONFIG_FILE).is_file()
    return directory if inside else None


def same_data(run: Path, data: dict[str, Any]) -> bool:
    """Whether a run was made with this ``data:`` section, so that its test results belong beside it.

    Which splits ``predict`` goes through is no part of it.
    """
    saved = read_experiment(run / CONFIG_FILE)
    return _without_predict(saved.get("data")) == _without_predict(data)


def _without_predict(data: dict[str, Any] | None) -> dict[str, Any] | None:
    arguments = (data or {}).get("init_args") or {}
    loader = {key: value for key, value in (arguments.get("loader") or {}).items() if key != "predict"}
    return data and {**data, "init_args": {**arguments, "loader": loader or None}}


def same_experiment(run: Path, values: dict[str, Any]) -> bool:
    """Whether a run was made with this configuration, so that resuming it is going on with the run itself.

    Where it lies and which checkpoint it goes on from is no part of it.
    """
    saved = read_experiment(run / CONFIG_FILE)
    return all(saved.get(key) == values.get(key) for key in {*saved, *values} - _NOT_OF_THE_EXPERIMENT)


def same_validation(run: Path, values: dict[str, Any]) -> bool:
    """Whether scores of a run's validations can be compared with those of this configuration.

    Its data, and how much of them is looked at; the model is compared elsewhere.
    """
    saved = read_experiment(run / CONFIG_FILE)
    ours, theirs = values.get("trainer") or {}, saved.get("trainer") or {}
    parts = ("limit_val_batches", "overfit_batches")
    return (
        same_data(run, values.get("data") or {})
        and saved.get("seed_everything") == values.get("seed_everything")
        and all(ours.get(part) == theirs.get(part) for part in parts)
    )


def resumed_run_directory(run: Path) -> Path:
    """The directory of a run that this process, and those that it starts, go on with."""
    os.environ[_SHARED_WITH_RANKS] = str(run.resolve())
    return run


def write_text_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")
