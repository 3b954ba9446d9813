"""What the command line refuses, because a number made that way could not be trusted."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher

from callbacks.best_checkpoint import BEST_NAME, BestCheckpoint
from callbacks.finetuning import START_FILE
from callbacks.last_checkpoint import LastCheckpoint
from lightning_modules.base import VisionTask
from vitrail.errors import UserError
from vitrail.files import check_zip

_NOT_COMPARED = {"_instantiator", "class_counts", "class_prompts", "chunk_size", "architectures"}
"""Counts of the training split only shape the loss, and a checkpoint may well be tested on other data; prompts may be
changed after training; chunks do not change results; configurations follow from names, which are compared."""

_NEEDED = {"state_dict", "hyper_parameters", "pytorch-lightning_version"}
"""What Lightning reads of a checkpoint before anything else."""


@runtime_checkable
class KnowsReadiness(Protocol):
    """A task that can say whether it means anything without training."""

    @property
    def ready_without_training(self) -> bool:
        """Whether every part was built from pretrained weights."""


def refuse_conflicting_checkpoint(model: LightningModule, checkpoint: Path, *, trains: bool = False) -> None:
    """Refuse a checkpoint whose hyper-parameters differ from the configuration.

    LightningCLI would silently let the checkpoint win over YAML and flags. Weights must be the model's, all of them, by
    names and shapes. Class names and image size, which come from
    the data, are compared as well: other names in the same places would permute the predictions without a word.

    Args:
        model: The model as the configuration made it.
        checkpoint: A file that the trainer wrote.
        trains: Whether training is to go on from it.

    Raises:
        UserError: Some value differs, or weights do not fit; the line names each.
    """
    check_zip(checkpoint, "take the run's other checkpoint (best.ckpt, last.ckpt), or train again")
    try:
        saved: Any = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds for a file that is none of its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"--ckpt_path {checkpoint}: not a readable checkpoint ({reason[:120]})") from error
    whole = isinstance(saved, dict) and saved.keys() >= _NEEDED
    if not whole or not all(isinstance(saved[key], dict) for key in ("state_dict", "hyper_parameters")):
        raise UserError(
            f"--ckpt_path {checkpoint}: is not a checkpoint of a run; plain weights belong to the model's `pretrained:`"
        )
    if trains and "optimizer_states" not in saved:
        raise UserError(
            f"--ckpt_path {checkpoint}: holds weights but no state of a training, so none can go on from it; give "
            "last.ckpt of the run, or begin anew with these weights as model.init_args.pretrained"
        )
    theirs = {key: value for key, value in saved["hyper_parameters"].items() if key not in _NOT_COMPARED}
    ours = {key: _plain(value) for key, value in model.hparams.items() if key not in _NOT_COMPARED}
    different = [
        f"{key}: the checkpoint has {_short(_plain(theirs[key]))}, the configuration {_short(ours[key])}"
        for key in ours
        if key in theirs and _plain(theirs[key]) != ours[key]
    ]
    if different:
        raise UserError(
            f"--ckpt_path {checkpoint} does not fit the configuration (model.init_args): {'; '.join(different)}. "
            "Use the run's own config.yaml, or leave --ckpt_path out to start anew"
        )
    if isinstance(model, VisionTask) and (wrong := model.misfits(saved["state_dict"])):
        raise UserError(
            f"--ckpt_path {checkpoint}: the weights do not fit {type(model).__name__}: {wrong}; give a whole checkpoint"
        )


def refuse_sections(config: Mapping[str, Any], keys: Iterable[str]) -> None:
    """Refuse sections of a configuration that are no mappings.

    Args:
        config: what was parsed.
        keys: of the sections that it may have.

    Raises:
        UserError: Names the first such section.
    """
    for key in keys:
        if key in config and not hasattr(config[key], "items"):
            raise UserError(f"{key}: must hold options, `key: value`; got {config[key]!r}: give some or leave it out")


def refuse_trainer_options(options: Mapping[str, Any]) -> None:
    """Refuse settings of the trainer that Lightning takes, and trains nothing, fails at once, or does something else.

    Args:
        options: the section ``trainer``.

    Raises:
        UserError: A value is out of range.
    """
    for name, least in _LEAST.items():
        value = options.get(name)
        if isinstance(value, (int, float)) and value < least:
            raise UserError(
                f"trainer.{name}: must be {'more than 0' if 0 < least < 1 else f'at least {least}'}; got {value}"
            )
    for name in _NOT_ZERO:
        if options.get(name) == 0:
            raise UserError(f"trainer.{name}: 0 trains nothing; leave it out or raise it")


def refuse_spawning(trainer: Trainer) -> None:
    """Refuse strategies that begin their processes by pickling everything.

    Raises:
        UserError: The strategy is one.
    """
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _MultiProcessingLauncher) and launcher._start_method != "fork":
        raise UserError("trainer.strategy: processes that are spawned cannot be given callbacks and data; use ddp")


_LEAST = {
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "val_check_interval": 1e-6,
    "gradient_clip_val": 0,
    "min_epochs": 0,
}
_NOT_ZERO = ("max_epochs", "max_steps", "limit_train_batches")


def refuse_test_metrics(callbacks: list[Callback]) -> None:
    """Refuse callbacks that select or stop by a metric of the test split.

    Raises:
        UserError: A callback monitors one.
    """
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        if isinstance(monitor, str) and monitor.startswith("test"):
            raise UserError(
                f"{type(callback).__name__}.monitor: {monitor!r} would select on the test split, and the test result "
                "would no longer be one; monitor a val/… metric"
            )


def refuse_reversed_selection(callbacks: Sequence[Callback]) -> None:
    """Refuse callbacks that would keep, or wait for, the worst epoch: ``mode`` is min unless it is set.

    Raises:
        UserError: A callback takes the lowest of a metric of ours that is better the higher it is, or the other way.
    """
    for callback in callbacks:
        monitor, mode = getattr(callback, "monitor", None), getattr(callback, "mode", None)
        metric = str(monitor).rpartition("/")[2]
        right = "max" if _HIGHER_IS_BETTER.fullmatch(metric) else "min" if metric in _LOWER_IS_BETTER else mode
        if mode in ("min", "max") and mode != right:
            key = "checkpoint" if isinstance(callback, BestCheckpoint) else type(callback).__name__
            worst = "lowest" if mode == "min" else "highest"
            raise UserError(f"{key}.mode: {mode} takes the {worst} {monitor} for the best; set {key}.mode: {right}")


_HIGHER_IS_BETTER = re.compile(r"accuracy|mean_per_class|top\d+|f1_\w+|R@\d+|mAP|mean_recall")
_LOWER_IS_BETTER = ("loss", "median_rank")


def refuse_other_checkpoints(callbacks: Sequence[Callback], best: BestCheckpoint, last: LastCheckpoint) -> None:
    """Refuse callbacks that would write, and delete, checkpoints under the names of the run's own.

    Args:
        callbacks: all of the trainer.
        best: that of the command line, which writes ``best.ckpt``.
        last: that of the command line, which writes ``last.ckpt``.

    Raises:
        UserError: A callback would do so.
    """
    folder = Path(str(best.dirpath))
    ours = {(folder / f"{name}.ckpt").resolve() for name in (BEST_NAME, "last", Path(START_FILE).stem)}
    for callback in callbacks:
        if callback is best or callback is last:
            continue
        kind = type(callback).__name__
        if isinstance(callback, (BestCheckpoint, LastCheckpoint)):
            section = "checkpoint" if isinstance(callback, BestCheckpoint) else "last"
            raise UserError(f"trainer.callbacks: {kind} is there already; set it in the section `{section}:`")
        if not isinstance(callback, (ModelCheckpoint, OnExceptionCheckpoint)):
            continue
        names = [callback.filename]
        if isinstance(callback, ModelCheckpoint) and callback.save_last:
            names.append(callback.CHECKPOINT_NAME_LAST)
        for name in names:
            path = Path(callback.dirpath or folder) / f"{name}{callback.FILE_EXTENSION}"
            if path.resolve() in ours:
                raise UserError(
                    f"trainer.callbacks: {kind} would overwrite the run's own {path.name}; give it another filename "
                    "(and no save_last), or another dirpath"
                )


def refuse_untrained(model: LightningModule, stage: str) -> None:
    """Refuse to evaluate a model that has untrained parts and got no checkpoint.

    Raises:
        UserError: The model's head is random.
    """
    if not (isinstance(model, KnowsReadiness) and model.ready_without_training):
        raise UserError(
            f"{stage}: {type(model).__name__} has untrained parts, so its numbers would mean nothing; "
            "give --ckpt_path runs/…/checkpoints/best.ckpt (or `best` for the newest run)"
        )


def _plain(value: object) -> object:
    """Make values comparable that a checkpoint and a parser keep in different containers."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "as_dict"):
        return _plain(value.as_dict())
    return value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
