"""Everything that a run directory holds, read so that an unfinished or damaged run says what is missing.

Reports are made of runs that were killed, too. So nothing here fails for a file that is not there or cannot be read:
the part is empty, and ``missing`` has a plain sentence about it. Only a path that is no run at all is refused.

Where a run keeps what is known of it: ``runs/<name>/<time>/``.

The temperatures that `calibrate` fitted, in ``checkpoints/calibration.json`` beside their checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitrail.config import read_experiment
from vitrail.errors import UserError
from vitrail.files import write_text_atomically
from vitrail.predictions import Predictions, read_predictions

if TYPE_CHECKING:
    import pandas as pd


CALIBRATION_FILE = "checkpoints/calibration.json"
_CHECKPOINT = "checkpoints/best.ckpt"


def write_temperatures(run: Path, temperatures: Mapping[str, float], facts: Mapping[str, Any]) -> Path:
    """Save temperatures with the digest of the best checkpoint, so that they are never used for another one.

    Args:
        run: the run directory.
        temperatures: above 0, by task.
        facts: what else is known of how they were fitted; plain values.

    Returns:
        The file.
    """
    path = run / CALIBRATION_FILE
    content = {"temperatures": dict(temperatures), "checkpoint_sha256": _digest(run / _CHECKPOINT), **facts}
    write_text_atomically(path, json.dumps(content, indent=2) + "\n")
    return path


def read_temperatures(run: Path) -> dict[str, float]:
    """Read what ``write_temperatures`` wrote.

    Returns:
        By task; empty where no temperature was fitted.

    Raises:
        UserError: the file cannot be read, or belongs to another checkpoint than the one that is there.
    """
    path = run / CALIBRATION_FILE
    again = f"run `python -m evaluation calibrate {run}` again"
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        temperatures = {str(task): float(value) for task, value in content["temperatures"].items()}
        digest = content["checkpoint_sha256"]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a readable calibration ({type(error).__name__}: {error}); {again}") from error
    if not all(math.isfinite(value) and value > 0 for value in temperatures.values()):
        raise UserError(f"{path}: temperatures must be finite numbers above 0; {again}")
    if digest != _digest(run / _CHECKPOINT):
        raise UserError(f"{path}: belongs to another checkpoint than {_CHECKPOINT}; {again}")
    return temperatures


def _digest(path: Path) -> str | None:
    """SHA-256 of a file; None where there is none, as in a run of pretrained weights."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


CONFIG, RECORD, METRICS = "config.yaml", "run.json", "metrics.csv"
CHECKPOINTS, PREDICTIONS = "checkpoints", "predictions"

_HOW_TO_PREDICT = {
    "test": "`python -m experiments test --ckpt_path {run}/checkpoints/best.ckpt`",
    "val": "`python -m experiments validate --ckpt_path {run}/checkpoints/best.ckpt`",
}
_STAGE = {"val": "validate"}
"""Stage of a run's record that predicts a split, where it is not called like the split."""


class Run:
    """The files of one run; each is read when it is first asked for.

    Args:
        path: the run directory.

    Raises:
        UserError: there is no such directory, or nothing in it is of a run.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if self.path.is_file():
            raise UserError(f"{path}: a file, not a run directory; give the directory that `fit` or `test` printed")
        if not self.path.is_dir():
            raise UserError(f"{path}: no such run directory; give the directory that `fit` or `test` printed")
        if not any((self.path / name).exists() for name in (CONFIG, RECORD, METRICS, CHECKPOINTS, PREDICTIONS)):
            raise UserError(f"{path}: not a run directory (no {CONFIG}, {RECORD}, {METRICS} or {PREDICTIONS}/)")
        self._problems: dict[str, str] = {}
        self._predictions: dict[str, Predictions | None] = {}

    @property
    def name(self) -> str:
        """Name of the experiment and of the run directory, as tables show it."""
        return "/".join(self.path.resolve().parts[-2:])

    @cached_property
    def config(self) -> dict[str, Any]:
        """The whole configuration; empty where there is none."""
        import yaml

        path = self.path / CONFIG
        try:
            found = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return self._without(CONFIG, "there is no configuration: the run ended before it began to train or test")
        except (OSError, ValueError, yaml.YAMLError) as error:
            return self._without(CONFIG, f"cannot be read ({_first_line(error)})")
        return found if isinstance(found, dict) else self._without(CONFIG, "holds no configuration")

    @cached_property
    def record(self) -> dict[str, Any]:
        """The run record; empty where there is none."""
        path = self.path / RECORD
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return self._without(RECORD, "there is no record: revision, versions, data and times are not known")
        except (OSError, ValueError) as error:
            return self._without(RECORD, f"cannot be read ({_first_line(error)})")
        return found if isinstance(found, dict) else self._without(RECORD, "holds no record")

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """What was logged, float64 with NaN where a row has no value; empty where nothing was.

        A row that a kill has cut short is kept with what it has.
        """
        import pandas as pd

        path = self.path / METRICS
        try:
            frame = pd.read_csv(path, on_bad_lines="skip")
        except FileNotFoundError:
            self._problems[METRICS] = f"{METRICS}: nothing was logged, so there are no curves"
            return pd.DataFrame()
        except (OSError, ValueError) as error:
            self._problems[METRICS] = f"{METRICS}: cannot be read ({_first_line(error)}), so there are no curves"
            return pd.DataFrame()
        if frame.empty:
            self._problems[METRICS] = f"{METRICS}: nothing was logged, so there are no curves"
        return pd.DataFrame({name: pd.to_numeric(frame[name], errors="coerce") for name in frame.columns})

    @property
    def checkpoints(self) -> dict[str, Path]:
        """Checkpoints by name without suffix, such as ``best`` and ``last``."""
        return {path.stem: path for path in sorted((self.path / CHECKPOINTS).glob("*.ckpt"))}

    @property
    def splits(self) -> list[str]:
        """Splits that there is a file of predictions of, by name."""
        return [path.stem for path in sorted((self.path / PREDICTIONS).glob("[!.]*.parquet"))]

    def predictions(self, split: str = "test") -> Predictions | None:
        """Predictions of a split; None where there are none or they cannot be used, which ``missing`` tells of."""
        if split not in self._predictions:
            path = self.path / PREDICTIONS / f"{split}.parquet"
            if not path.is_file():
                how = _HOW_TO_PREDICT.get(split, "`python -m experiments predict`").format(run=self.path)
                self._problems[path.name] = (
                    f"{PREDICTIONS}/{path.name}: there are no predictions; write them with {how}"
                )
                self._predictions[split] = None
            else:
                self._predictions[split] = self._read(path)
        return self._predictions[split]

    def predicted_by(self, split: str) -> str:
        """Name of the checkpoint that made the predictions of a split, such as ``best``; empty where it is not known.

        The checkpoint is that of the latest stage of the split that ended regularly.
        """
        name = _STAGE.get(split, split)
        done = [stage for stage in self.stages if stage.get("stage") == name and stage.get("exit") == "finished"]
        checkpoint = done[-1].get("checkpoint") if done else None
        return Path(checkpoint).stem if isinstance(checkpoint, str) else ""

    def other_checkpoint(self, split: str) -> str:
        """The checkpoint that predictions of a split are of where it is another one than ``best``, else empty."""
        name = self.predicted_by(split)
        return "" if name == "best" else name

    def temperatures_for(self, split: str) -> dict[str, float]:
        """Temperatures that fit the predictions of a split: those of the best checkpoint fit no others."""
        return {} if self.other_checkpoint(split) and "best" in self.checkpoints else self.temperatures

    def problem_of(self, split: str) -> str:
        """Why there are no predictions of a split, as ``missing`` says it; empty where there are."""
        return "" if self.predictions(split) is not None else self._problems[f"{split}.parquet"]

    def class_counts(self, tasks: Mapping[str, Sequence[str]]) -> dict[str, list[int]]:
        """Samples of each class in the train split, by task; without the tasks whose counts are not known.

        Args:
            tasks: class names of each task.
        """
        try:
            return class_counts_of(self.record, tasks, RECORD)
        except UserError as error:
            self._problems["class_counts"] = str(error)
            return {}

    @cached_property
    def temperatures(self) -> dict[str, float]:
        """Temperature of each task that `calibrate` fitted; empty where it did not, or for another checkpoint."""
        try:
            return read_temperatures(self.path)
        except UserError as error:
            self._problems[CALIBRATION_FILE] = str(error)
            return {}

    @property
    def stages(self) -> list[dict[str, Any]]:
        """What was done in this directory, in order; each with ``stage``, ``started``, ``exit`` and more."""
        stages = self.record.get("stages")
        return [stage for stage in stages if isinstance(stage, dict)] if isinstance(stages, list) else []

    @property
    def interrupted(self) -> bool:
        """True where the latest training of this run did not end regularly; a resumed one that ended has."""
        fits = [stage for stage in self.stages if stage.get("stage") == "fit"]
        return bool(fits) and fits[-1].get("exit") != "finished"

    @property
    def missing(self) -> list[str]:
        """What is not there or cannot be used, one plain sentence each; empty for a complete run."""
        # Each says by itself what is wrong with it.
        _ = self.config, self.record, self.metrics, self.temperatures
        for split in self.splits or ["test"]:
            self.predictions(split)
        return [*self._endings(), *self._problems.values(), *self._missing_checkpoint()]

    def _endings(self) -> list[str]:
        latest = {str(stage.get("stage")): stage for stage in self.stages}
        said = []
        for name, stage in latest.items():
            how = stage.get("exit")
            if how != "finished":
                reason = "it was killed, or still runs" if how in (None, "unfinished") else str(how)
                said.append(f"{name}, begun {stage.get('started', 'at a time not known')}, did not finish: {reason}")
        return said

    def _missing_checkpoint(self) -> list[str]:
        trained = any(stage.get("stage") == "fit" for stage in self.stages)
        if trained and "best" not in self.checkpoints:
            return [f"{CHECKPOINTS}/best.ckpt: training left no best checkpoint"]
        return []

    def _read(self, path: Path) -> Predictions | None:
        try:
            found = read_predictions(path)
        except UserError as error:
            self._problems[path.name] = str(error)
            return None
        if not len(found):
            self._problems[path.name] = f"{PREDICTIONS}/{path.name}: holds no samples"
            return None
        return found

    def _without(self, name: str, what: str) -> dict[str, Any]:
        self._problems[name] = f"{name}: {what}"
        return {}


def runs_among(paths: Sequence[Path], command: str, needs: str, *, unfinished_only: bool = False) -> list[Path]:
    """Those of several paths, such as of ``runs/NAME/*``, that a command can use; the others are named on stderr.

    Args:
        paths: as the user gave them. One alone is not left out: what is wrong with it is the command's to report.
        command: name for messages.
        needs: file in a run directory that the command reads.
        unfinished_only: leave out a run without that file only where none of its stages has finished; the command
            reports the others.

    Raises:
        UserError: a path does not exist, or none is a run.
    """
    # A link that leads nowhere is what a pattern found, no slip of the user's.
    if absent := [path for path in paths if not path.exists() and not path.is_symlink()]:
        raise UserError(f"{absent[0]}: no such run directory; give the directory that `fit` or `test` printed")
    if len(paths) < 2:
        return list(paths)
    no_run, lacking = {}, {}
    for path in paths:
        if (path / needs).exists():
            continue
        try:
            run = Run(path)
        except UserError as error:
            no_run[path] = str(error)
            continue
        finished = any(stage.get("exit") == "finished" for stage in run.stages)
        if not (unfinished_only and finished):
            lacking[path] = f"{path}: a run without {needs}"
    if len(no_run) == len(paths):
        raise UserError(f"{command}: none of these {len(paths)} is a run; the first is {no_run[paths[0]]}")
    if len(no_run) + len(lacking) == len(paths):
        lacking = {}  # the command says how to make what they lack
    for reason in (*no_run.values(), *lacking.values()):
        sys.stderr.write(f"{command}: left out {reason}\n")
    return [path for path in paths if path not in no_run and path not in lacking]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def class_counts_of(record: Any, tasks: Mapping[str, Sequence[str]], origin: str) -> dict[str, list[int]]:
    """Class counts of the train split in a run record that was read already.

    Args:
        record: what the JSON says.
        tasks: class names of each task.
        origin: where the record is from, for the message.

    Returns:
        By task; without the tasks that the record does not count.

    Raises:
        UserError: The counts do not fit the class names.
    """
    data = record.get("data") if isinstance(record, dict) else None
    counts = data.get("class_counts") if isinstance(data, dict) else None
    if not isinstance(counts, dict):
        return {}
    for task, names in tasks.items():
        values = counts.get(task)
        if values is not None and len(values) != len(names):
            raise UserError(
                f"{origin}: data.class_counts.{task} has {len(values)} counts for {len(names)} classes; "
                f"the record belongs to other predictions: run `test` again"
            )
    return {task: [int(count) for count in counts[task]] for task in tasks if task in counts}


def read_class_counts(path: Path, tasks: Mapping[str, Sequence[str]]) -> dict[str, list[int]]:
    """Class counts of the train split from a run record.

    Returns:
        By task; empty where there is no record or it does not say.

    Raises:
        UserError: The record is no JSON, or its counts do not fit the class names.
    """
    if not path.is_file():
        return {}
    try:
        record: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON ({error}); restore or delete it") from error
    return class_counts_of(record, tasks, str(path))


CONFIG_FILE = "config.yaml"

RESERVED = {"ablations": "`ablate`", "results": "`results`", "sweeps": "`sweep`"}
"""Folders in the directory of all runs that are not an experiment's, and whose they are."""

_SHARED_WITH_RANKS = "VITRAIL_RUN_DIRECTORY"
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
