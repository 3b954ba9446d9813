"""Where metrics go: always a CSV file in the run directory, and Weights & Biases beside it."""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path
from typing import Literal, TypedDict

from lightning.pytorch.loggers import Logger

from experiments.metrics_log import MetricsLog
from vitrail.runs import write_text_whole

WANDB_ID_FILE = "wandb_id"

WandbMode = Literal["auto", "online", "offline", "disabled"]


class WandbOptions(TypedDict, total=False):
    """Settings of Weights & Biases.

    Attributes:
        mode: ``auto`` is online where somebody is logged in and offline elsewhere; ``WANDB_MODE`` in the environment
            beats ``auto``; ``disabled`` writes nothing.
        project: Project name; default ``vitrine``.
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


def build_loggers(run_directory: Path, options: WandbOptions | None, *, continues: bool = False) -> list[Logger]:
    """The loggers of a run; that of ``metrics.csv`` comes first and gives ``trainer.log_dir``.

    Args:
        run_directory: Receives ``metrics.csv`` and, offline or online, W&B's own folder ``wandb``.
        options: W&B's settings.
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
            project=options.get("project", "vitrine"),
            group=options.get("group"),
            tags=options.get("tags"),
            # The run's configuration is logged under one key, because the flat keys belong to a sweep
            # (Lightning issue 7679).
            settings=_settings(mode),
        )
        # Lightning passes the unset argument on, and W&B warns that it has no effect.
        wandb_logger._wandb_init.pop("anonymous", None)
        loggers.append(wandb_logger)
    return loggers


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
        write_text_whole(path, secrets.token_hex(8))
    return path.read_text(encoding="utf-8").strip()


def _settings(mode: str) -> object:
    import wandb

    # The mode once more: the client has read its environment before Lightning's logger sets the mode there.
    return wandb.Settings(mode=mode, silent=True, console="off")
