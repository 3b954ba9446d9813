"""Figures, tables and the configuration in whatever experiment trackers a run has: W&B, TensorBoard and MLflow.

Lightning's loggers share a way to log numbers only; here is one for the rest. Other loggers get numbers alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from datamodules.loading.decode import read_image

MOST_ROWS = 10_000
"""Of a table in a tracker: W&B shows no more."""


@rank_zero_only
def log_images(trainer: Trainer, images: Mapping[str, Path]) -> None:
    """Log image files.

    Args:
        trainer: whose loggers get them, at its global step.
        images: files by key, such as ``confusion/test/class``.
    """
    step = trainer.global_step
    for logger in trainer.loggers:
        match logger:
            case WandbLogger():
                import wandb

                logger.log_metrics({key: wandb.Image(str(path)) for key, path in images.items()}, step=step)
            case TensorBoardLogger():
                for key, path in images.items():
                    logger.experiment.add_image(key, read_image(path), step)
            case MLFlowLogger():
                for key, path in images.items():
                    logger.experiment.log_artifact(str(logger.run_id), str(path), str(Path(key).parent))


@rank_zero_only
def log_table(trainer: Trainer, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Log a table, of which the first 10,000 rows are kept.

    Args:
        trainer: whose loggers get it, at its global step.
        key: such as ``report/test/class``.
        columns: headings.
        rows: one value for each column.
    """
    kept = [list(row) for row in rows[:MOST_ROWS]]
    for logger in trainer.loggers:
        match logger:
            case WandbLogger():
                import wandb

                logger.log_metrics({key: wandb.Table(columns=list(columns), data=kept)}, step=trainer.global_step)
            case TensorBoardLogger():
                from vitrail.console import Table

                cells = [[str(value) for value in row] for row in kept]
                logger.experiment.add_text(key, Table(list(columns), cells).markdown(), trainer.global_step)
            case MLFlowLogger():
                import json

                # The layout of MLflow's own `log_table`, which needs the whole package.
                content = json.dumps({"columns": list(columns), "data": kept}, default=str)
                logger.experiment.log_text(str(logger.run_id), content, f"{key}.json")


@rank_zero_only
def log_configuration(loggers: Sequence[Logger], text: str, content: Mapping[str, Any]) -> None:
    """Log the run's configuration.

    Args:
        loggers: that get it.
        text: YAML.
        content: the same as values.
    """
    for logger in loggers:
        match logger:
            case WandbLogger():
                # Flat keys of this name belong to a sweep, and W&B refuses to change those (Lightning #7679).
                logger.experiment.config.update({"experiment": dict(content)}, allow_val_change=True)
            case TensorBoardLogger():
                logger.experiment.add_text("config", f"```yaml\n{text}\n```")
            case MLFlowLogger():
                logger.experiment.log_text(str(logger.run_id), text, "config.yaml")
