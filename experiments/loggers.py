"""Where metrics go: always a CSV file in the run directory, and Weights & Biases beside it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Literal, TypedDict

from lightning.pytorch.loggers import CSVLogger, Logger

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


def build_loggers(run_directory: Path, options: WandbOptions | None) -> list[Logger]:
    """The loggers of a run; the CSV logger comes first and gives ``trainer.log_dir``.

    Args:
        run_directory: Receives ``metrics.csv`` and, offline or online, W&B's own folder ``wandb``.
        options: W&B's settings.
    """
    options = options or {}
    # Name and version are parts of the path for this logger, so together they make the run directory itself.
    loggers: list[Logger] = [
        CSVLogger(run_directory.parent.parent, name=run_directory.parent.name, version=run_directory.name)
    ]
    mode = wandb_mode(options.get("mode", "auto"))
    if mode != "disabled":
        from lightning.pytorch.loggers import WandbLogger

        wandb_logger = WandbLogger(
            name=f"{run_directory.parent.name}/{run_directory.name}",
            save_dir=run_directory,
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


def _settings(mode: str) -> object:
    import wandb

    # The mode once more: the client has read its environment before Lightning's logger sets the mode there.
    return wandb.Settings(mode=mode, silent=True, console="off")
