"""Where metrics go: always ``metrics.csv`` in the run directory, and Weights & Biases.

A resumed run continues the file as if it had never been interrupted. Lightning's CSV logger empties the file that it
finds, and rewrites it in place when a new column comes; here it is kept until the row to continue from is known, and
written atomically.
"""

from __future__ import annotations

import csv
import io
import os
import secrets
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
from lightning.fabric.utilities import rank_zero_only
from lightning.pytorch.loggers import CSVLogger, Logger

from vitrail.files import write_text_atomically
from vitrail.runs import Run

Row = dict[str, Any]


class MetricsLog(CSVLogger):
    """Writes ``metrics.csv`` in a directory.

    Args:
        directory: where.
        continues: keep what is in the file until ``keep_rows`` says how much of it holds; otherwise start again.
    """

    def __init__(self, directory: Path, *, continues: bool) -> None:
        # Name and version are parts of the path for Lightning's logger, so together they make the directory itself.
        super().__init__(directory.parent.parent, name=directory.parent.name, version=directory.name)
        self._rows = _Rows(directory / Run.METRICS, continues=continues)

    @property
    def experiment(self) -> Any:
        """Return what Lightning writes to."""
        self._rows.path.parent.mkdir(parents=True, exist_ok=True)
        return self._rows

    @rank_zero_only
    def keep_rows(self, number: int) -> None:
        """Forget all rows but the first ones."""
        self._rows.keep(number)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is left."""
        self.save()

    @property
    def number_of_rows(self) -> int:
        """Return how many rows are in the file; what was logged since is written first."""
        self._rows.save()
        return self._rows.written


class _Rows:
    """The rows of a CSV file whose columns are only known as they come."""

    def __init__(self, path: Path, *, continues: bool) -> None:
        self.path = path
        self.written = 0
        self._pending: list[Row] = []
        self._columns: list[str] = []
        self._continues = continues
        self._opened = False

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Remember a row."""
        values = {key: value.item() if isinstance(value, torch.Tensor) else value for key, value in metrics.items()}
        self._pending.append({**values, "step": step})

    def log_hparams(self, params: object) -> None:
        """Do nothing: ``config.yaml`` has them."""

    def save(self) -> None:
        """Write the rows that are remembered."""
        if not self._pending:
            return
        self._open()
        columns = sorted({*self._columns, *(key for row in self._pending for key in row)})
        if columns == self._columns:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                file.write(_text(columns, self._pending, header=False))
        else:
            self._columns = columns
            write_text_atomically(self.path, _text(columns, [*self._all(), *self._pending], header=True))
        self.written += len(self._pending)
        self._pending = []

    def keep(self, number: int) -> None:
        """Keep the first ``number`` rows."""
        self._open()
        rows = self._all()[:number]
        self._pending = []
        self.written = len(rows)
        if rows:
            write_text_atomically(self.path, _text(self._columns, rows, header=True))
        else:
            self._columns = []
            self.path.unlink(missing_ok=True)

    def _open(self) -> None:
        """Take over what is in the file, or empty it where it is not to be continued."""
        if self._opened:
            return
        self._opened = True
        if not self._continues:
            self.path.unlink(missing_ok=True)
        rows = self._all()
        self._columns = list(rows[0]) if rows else []
        self.written = len(rows)

    def _all(self) -> list[Row]:
        if not self.path.is_file():
            return []
        with self.path.open(newline="", encoding="utf-8") as file:
            # A row that a kill has cut short has fewer values.
            return [row for row in csv.DictReader(file) if None not in row.values()]


def _text(columns: list[str], rows: list[Row], *, header: bool) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, restval="", lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


WANDB_ID_FILE, MLFLOW_ID_FILE = "wandb_id", "mlflow_id"

WandbMode = Literal["auto", "online", "offline", "disabled"]


class WandbOptions(TypedDict, total=False):
    """Settings of Weights & Biases.

    Attributes:
        mode: ``auto`` is online with an account and offline without one; ``WANDB_MODE`` in the environment
            beats ``auto``; ``disabled`` writes nothing.
        project: Project name; default ``vitrail``.
        group: Group of runs, for example the name of an ablation.
        tags: Tags of the run.
    """

    mode: WandbMode
    project: str
    group: str
    tags: list[str]


def wandb_mode(mode: WandbMode) -> str:
    """Resolve ``auto``: the environment's ``WANDB_MODE``, else online with an account and offline without one."""
    if mode != "auto":
        return mode
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    import wandb

    # Without a prompt this only looks for an API key in the environment and in netrc.
    return "online" if wandb.login(prompt=False) else "offline"


Tracker = Literal["tensorboard", "mlflow"]


def build_loggers(
    run_directory: Path, options: WandbOptions | None, trackers: Sequence[Tracker] = (), *, continues: bool = False
) -> list[Logger]:
    """Return the loggers of a run; that of ``metrics.csv`` comes first and gives ``trainer.log_dir``.

    Args:
        run_directory: Receives ``metrics.csv`` and, offline or online, W&B's own folder ``wandb``.
        options: W&B's settings.
        trackers: further ones, each with a folder of its name in the run directory.
        continues: Whether this may go on with what an interrupted run has logged there.
    """
    options = options or {}
    loggers: list[Logger] = [MetricsLog(run_directory, continues=continues)]
    mode = wandb_mode(options.get("mode", "auto"))
    if mode != "disabled":
        from lightning.pytorch.loggers import WandbLogger

        wandb_logger = WandbLogger(
            name=f"{run_directory.parent.name}/{run_directory.name}",
            save_dir=run_directory,
            version=_wandb_id(run_directory),
            resume="allow",
            offline=mode != "online",
            project=options.get("project", "vitrail"),
            group=options.get("group"),
            tags=options.get("tags"),
            # The run's configuration is logged under one key, because the flat keys belong to a sweep
            # (Lightning issue 7679).
            settings=_settings(mode),
        )
        # Lightning passes the unset argument on, and W&B warns that it has no effect.
        wandb_logger._wandb_init.pop("anonymous", None)
        loggers.append(wandb_logger)
    return [*loggers, *(_tracker(name, run_directory) for name in dict.fromkeys(trackers))]


def _tracker(name: Tracker, run_directory: Path) -> Logger:
    """Return a logger whose run is the same where training goes on: both find it by its folder or its tag."""
    if name == "tensorboard":
        from lightning.pytorch.loggers import TensorBoardLogger

        return TensorBoardLogger(run_directory, name="", version="tensorboard")
    from lightning.pytorch.loggers import MLFlowLogger

    folder = (run_directory / "mlflow").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    path = run_directory / MLFLOW_ID_FILE
    run_id = path.read_text(encoding="utf-8").strip() if path.is_file() else None
    logger = MLFlowLogger(
        experiment_name=run_directory.parent.name,
        run_name=run_directory.name,
        # MLflow has given its store of plain files up.
        tracking_uri=f"sqlite:///{folder.as_posix()}/mlflow.db",
        artifact_location=(folder / "artifacts").as_uri(),
        run_id=run_id,
    )
    if run_id is None:
        _keep_id(path, logger)
    return logger


@rank_zero_only
def _keep_id(path: Path, logger: Any) -> None:
    write_text_atomically(path, f"{logger.run_id}\n")


def sync_hint(loggers: Sequence[Logger]) -> str:
    """Return a line about where W&B's offline run is and how to upload it; empty where there is none."""
    from lightning.pytorch.loggers import WandbLogger

    for logger in loggers:
        if isinstance(logger, WandbLogger) and logger._offline:
            folder = Path(logger.experiment.dir).parent
            return f"W&B (offline): {folder}, to be uploaded with: wandb sync {shlex.quote(str(folder))}\n"
    return ""


def finish_wandb() -> None:
    """Close the W&B run of this process, so that everything is written and another run can begin."""
    if "wandb" in sys.modules:
        import wandb

        if wandb.run is not None:
            wandb.finish()


def _wandb_id(run_directory: Path) -> str:
    """W&B's name of the run, kept in the run directory, so that a resumed run is the same one there."""
    path = run_directory / WANDB_ID_FILE
    if not path.is_file():
        # W&B takes up to 128 letters and digits; its own identifiers have eight.
        write_text_atomically(path, secrets.token_hex(8))
    return path.read_text(encoding="utf-8").strip()


def _settings(mode: str) -> object:
    import wandb

    # The mode once more: the client has read its environment before Lightning's logger sets the mode there.
    return wandb.Settings(mode=mode, silent=True, console="off")
