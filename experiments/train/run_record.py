"""``run.json``: the facts that a number needs to be trusted: revision, versions, data, seed, hardware, times, exit.

``closing_summary`` is what a tested training prints last.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException

import vitrail
from callbacks.best_checkpoint import BestCheckpoint
from evaluation.commands import report
from evaluation.efficiency import parameter_count
from evaluation.statistics.scores import heading
from evaluation.tables.summary import number_text, score_text, summarise_run
from experiments.train.loggers import MetricsLog
from lightning_modules.base import VisionTask
from vitrail.errors import UserError, without_passwords
from vitrail.files import write_text_atomically
from vitrail.programs import program_name
from vitrail.runs import Run
from vitrail.runtime import memory_bytes
from vitrail.types import CLASS_KINDS

if TYPE_CHECKING:
    from datamodules.base import ImageDataModule


_PACKAGES = ("torch", "torchvision", "lightning", "timm", "transformers", "torchmetrics", "datasets", "numpy", "pillow")


class RunRecorder(Callback):
    """Write ``run.json`` when a stage begins and again when it ends, however it ends."""

    def __init__(
        self, directory: Path, name: str, seed: int, checkpoint: Path | None = None, parent: Path | None = None
    ) -> None:
        self.parent = parent
        self.directory = directory
        self.name = name
        self.seed = seed
        self.checkpoint = checkpoint
        self._stage: dict[str, Any] = {}
        self._has_size = True
        self._logged_rows = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Record the start of a stage and everything that is fixed from now on."""
        if not trainer.is_global_zero:
            return
        # A test that follows training is of the best checkpoint, not of the one that training went on from.
        follows_training = bool(self._stage) and self._stage["stage"] != stage
        checkpoint = _best(trainer) if follows_training else self.checkpoint
        self._stage = {
            "stage": stage,
            "command": without_passwords(shlex.join(["python", "-m", "experiments", *sys.argv[1:]])),
            "started": _now(),
            "exit": "unfinished",
            "checkpoint": str(checkpoint) if checkpoint else None,
        }
        facts = self._facts(trainer, pl_module)
        facts["pretrained"] = origins(pl_module)
        # A task may make its network in its own setup, which comes after this.
        self._has_size = facts["model"]["parameters"] > 0
        self._write(trainer, facts)

    def _note_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The size of a network that is made only now, and what a checkpoint changes about the data.
        if not trainer.is_global_zero:
            return
        facts: dict[str, Any] = {}
        if not self._has_size:
            self._has_size = True
            facts["model"] = _model(pl_module)
        if self.checkpoint and (data := _data(trainer)):
            facts["data"] = data  # images are read as the model of the checkpoint takes them
        if facts:
            self._write(trainer, facts)

    on_fit_start = on_validation_start = on_test_start = on_predict_start = _note_start

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the log again, or continue it from the checkpoint's row; the pretrained weights are known by now."""
        if trainer.is_global_zero:
            # Whether images come as JPEG files out of the cache is known when the loaders have been made.
            lossy = getattr(getattr(trainer, "datamodule", None), "lossy_cache", False)
            cache = {"data": {"cache": "jpeg"}} if lossy else {}
            self._write(trainer, {"pretrained": origins(pl_module), **cache})
        for logger in trainer.loggers:
            if isinstance(logger, MetricsLog):
                logger.keep_rows(self._logged_rows)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Record how many rows had been logged."""
        rows = [logger.number_of_rows for logger in trainer.loggers if isinstance(logger, MetricsLog)]
        checkpoint["logged_rows"] = rows[0] if rows and trainer.is_global_zero else 0

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Record how many rows of the log are valid."""
        self._logged_rows = checkpoint.get("logged_rows", 0)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Record a stage's regular end, its metrics and the best checkpoint."""
        if not trainer.is_global_zero or self._stage.get("stage") != stage:
            return
        self._stage["metrics"] = {key: float(value) for key, value in trainer.callback_metrics.items()}
        best = _saver(trainer)
        if best is not None and best.best_model_score is not None:
            self._stage["best"] = {"monitor": best.monitor, "score": float(best.best_model_score)}
            if best.best_epoch is not None:
                self._stage["best"]["epoch"] = best.best_epoch
        self._stage["epochs"] = trainer.current_epoch
        if stage == "fit":
            # The model's facts are of the beginning: later phases may train more of it.
            self._stage["trainable"] = parameter_count(pl_module, trainable_only=True)
        self._end(trainer, pl_module, "interrupted" if trainer.interrupted else "finished")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Record that a stage failed, and why."""
        if trainer.is_global_zero and self._stage:
            how = f"{type(exception).__name__}: {exception}".splitlines()[0]
            self._end(trainer, pl_module, "terminated" if isinstance(exception, SIGTERMException) else how)

    def _end(self, trainer: Trainer, pl_module: LightningModule, how: str) -> None:
        self._stage |= {"ended": _now(), "exit": how}
        # A checkpoint records what its training started from, too, and is read after `setup`.
        self._write(trainer, {"pretrained": origins(pl_module)})

    def _write(self, trainer: Trainer, facts: Mapping[str, Any]) -> None:
        path = self.directory / Run.RECORD
        record = _read(path)
        stages = [stage for stage in record.get("stages", []) if stage["started"] != self._stage["started"]]
        # The facts of training stay; a later stage adds itself, and what an older version did not record.
        data = {**(facts.get("data") or {}), **(record.get("data") or {})}
        if not stages:
            data |= facts.get("data") or {}
        record = {**facts, **record, "data": data or None, "stages": [*stages, self._stage]}
        if "model" in facts and not record["model"]["parameters"]:
            record["model"] = facts["model"]
        known = record.get("pretrained") or []
        # The teacher of a distillation is only known when training begins.
        parts = {origin["part"] for origin in known}
        record["pretrained"] = known + [one for one in facts.get("pretrained") or [] if one["part"] not in parts]
        write_text_atomically(path, json.dumps(record, indent=2, sort_keys=False) + "\n")

    def _facts(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        return {
            "name": self.name,
            **({"parent": str(self.parent)} if self.parent else {}),
            "seed": self.seed,
            "vitrail": vitrail.__version__,
            "git": git_revision(),
            "python": platform.python_version(),
            "packages": {package: importlib.metadata.version(package) for package in _PACKAGES},
            "hardware": hardware(),
            "processes": trainer.world_size,
            "data": _data(trainer),
            "model": _model(pl_module),
        }


def origins(pl_module: LightningModule) -> list[dict[str, Any]]:
    """Return the pretrained weights a model started from: name, source, hub revision and digests of the files."""
    return [dict(origin) for origin in pl_module.origins] if isinstance(pl_module, VisionTask) else []


def _data(trainer: Trainer) -> dict[str, Any] | None:
    record = getattr(getattr(trainer, "datamodule", None), "data_record", None)
    return None if record is None else record()


def _saver(trainer: Trainer) -> BestCheckpoint | None:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set at run time
    return next((callback for callback in callbacks if isinstance(callback, BestCheckpoint)), None)


def _best(trainer: Trainer) -> str:
    saver = _saver(trainer)
    return "" if saver is None else saver.best_model_path


def _model(pl_module: LightningModule) -> dict[str, Any]:
    sizes = {"parameters": parameter_count(pl_module), "trainable": parameter_count(pl_module, trainable_only=True)}
    return {"class": type(pl_module).__name__, **sizes}


def git_revision() -> dict[str, Any] | None:
    """Return the source's revision and how many files differ from it, of the checkout or of the wheel's build."""
    source = Path(__file__).parents[2]
    build = Path(vitrail.__file__).with_name("build.json")
    if build.is_file():
        found: dict[str, Any] = json.loads(build.read_text(encoding="utf-8"))
        return found
    if not (source / ".git").exists():
        return None  # installed below another project's checkout

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(source), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return {"revision": git("rev-parse", "HEAD"), "changed_files": len(git("status", "--porcelain").splitlines())}
    except (OSError, subprocess.CalledProcessError):
        return None


def hardware() -> dict[str, Any]:
    """Return processor, cores, memory in bytes and accelerators of this machine."""
    return {
        "machine": platform.machine(),
        "system": platform.system(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": memory_bytes(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def _read(path: Path) -> dict[str, Any]:
    """Return what has been recorded so far; empty where nothing has."""
    try:
        record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON ({error}); restore it, or delete it to start again") from error
    return dict(record)


def _now() -> str:
    # Milliseconds distinguish two stages that begin within one second.
    now = time.time_ns()
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.localtime(now // 10**9))}.{now // 10**6 % 1000:03d}"


def closing_summary(run: Run) -> str:
    """Return a dozen lines for a user who has just trained a first model.

    Args:
        run: that was tested.
    """
    data, model = run.record.get("data") or {}, run.record.get("model") or {}
    samples = data.get("samples") or {}
    size, trained, tested = int(model.get("parameters", 0)), samples.get("train", 0), samples.get("test", 0)
    lines = [
        f"{model.get('class', 'The model')} ({size:,} parameters) was trained on {trained:,} images of "
        f"{data.get('data', 'the data')} and tested on {tested:,} others."
    ]
    if parent := run.record.get("parent"):
        lines.append(f"  It went on from {parent}.")
    try:
        summaries = summarise_run(run.path, "test")
    except UserError:
        summaries = []  # captions alone: their scores are in the table above
    for one in summaries:
        constant = "the most frequent class" if one.kind in CLASS_KINDS else one.majority_label or "the same"
        lines.append(
            f"  {one.task}: {heading(one.main)} {score_text(one.main, one.main_score)}; always predicting {constant} "
            f"gives {number_text(one.main, one.majority)}"
        )
    return "\n".join([*lines, "Next:", *(f"  {line}" for line in _next(run, has_labels=bool(summaries))), ""])


def _next(run: Run, *, has_labels: bool) -> list[str]:
    path = shlex.quote(str(run.path))
    evaluation, experiments, retrieval = (program_name(name) for name in ("evaluation", "experiments", "retrieval"))
    page = run.path / "report.html"
    app = "vitrail app" if program_name("app") == "vitrail" else "python -m app"
    commands = [
        (f"{evaluation} report {path}", "everything about the run on one page"),
        (f"{experiments} predict {path} YOUR_IMAGES/", "what the model predicts for new images"),
        (f"{retrieval} index --run {path}", "a gallery of its images, to search in"),
        (f"{app} --run {path}", "try it in a browser"),
    ]
    left_out = 0 if page.exists() else 2 if has_labels else 1
    del commands[left_out]
    width = max(len(command) for command, _ in commands)
    lines = [f"{command:{width}}  # {what}" for command, what in commands]
    return [*lines, f"Report: {page}"] if page.exists() else lines


def write_report(run: Run, datamodule: ImageDataModule) -> None:
    """Write ``report.html``, as ``report RUN`` does, with the data of the training, which are read already."""
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    options: Any = parser.parse_args([str(run.path)])
    report.run(options, datamodule=datamodule)
