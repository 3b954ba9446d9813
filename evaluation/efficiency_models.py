"""The model of a run or of an experiment file, as the efficiency commands and their processes build it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitrail.errors import UserError

if TYPE_CHECKING:
    from lightning_modules.base import VisionTask

_LINKED = ("class_names", "class_prompts", "tasks", "class_counts", "chunk_size")


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from: one of the two.

    Attributes:
        experiment: content of an experiment file, overlays merged in; built with random weights.
        checkpoint: a run's checkpoint; empty for none.
    """

    experiment: Mapping[str, Any]
    checkpoint: str = ""

    def as_json(self) -> str:
        """For a process of its own."""
        return json.dumps({"experiment": self.experiment, "checkpoint": self.checkpoint})


def build(source: ModelSource, device: str) -> tuple[VisionTask, int]:
    """The model in evaluation mode, and the side of its pictures in pixels.

    Weights are random, or a checkpoint's. On the device ``meta`` there are none at all.

    Args:
        source: which model.
        device: ``meta``, ``cpu`` or ``cuda``.

    Raises:
        UserError: if it cannot be built; what the experiment says of model and data must fit.
    """
    import torch

    if source.checkpoint:
        from lightning_modules.checkpoint import load_task

        task = load_task(source.checkpoint)
        return task.to(device).eval(), int(task.input_options["size"])
    arguments, size = _arguments(source.experiment)
    # On meta nothing is drawn and nothing allocated; elsewhere all is built where it is to be.
    with torch.device(device):
        task = _task(arguments)
    return task.eval(), size


def source_of(path: Path, overlays: list[Path]) -> ModelSource:
    """The source that a run directory or an experiment file is.

    A run that was evaluated as it came, without training, has its own configuration for one.

    Args:
        path: either of them.
        overlays: laid over experiment files; runs are what they are.

    Raises:
        UserError: if it is neither.
    """
    from vitrail.config import read_experiments
    from vitrail.runs import CONFIG, RunFiles
    from vitrail.trust import refuse_foreign_code

    if path.is_dir():
        run = RunFiles(path)
        if "best" in run.checkpoints:
            return ModelSource({}, str(run.checkpoints["best"]))
        if run.config and not run.checkpoints and not any(stage.get("stage") == "fit" for stage in run.stages):
            refuse_foreign_code({key: run.config.get(key) for key in ("data", "model")}, run.path / CONFIG)
            return ModelSource(run.config)
        raise UserError(f"{path}: has no checkpoints/best.ckpt; give a run that was trained, or its experiment file")
    return ModelSource(read_experiments([path, *overlays]))


def _arguments(experiment: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """The model part, with random weights and what only the data know.

    The data are asked only for what the model cannot be built without, so that most are not needed on disk.
    """
    import lightning_modules
    from datamodules.cli import data_parser, parse_data

    model = experiment.get("model")
    if not isinstance(model, dict) or "class_path" not in model or not isinstance(experiment.get("data"), dict):
        raise UserError("experiment: needs data: and model: with class_path:, as the files in experiments/ have them")
    task_class = getattr(lightning_modules, str(model["class_path"]).removeprefix("lightning_modules."), None)
    if task_class is None:
        raise UserError(f"model.class_path: {model['class_path']} is no task of lightning_modules")
    parsed = ["--data", json.dumps(experiment["data"])]
    if experiment.get("seed_everything") is not None:
        parsed += ["--seed_everything", str(experiment["seed_everything"])]
    datamodule, _ = parse_data(data_parser("python -m evaluation efficiency"), parsed)
    known = inspect.signature(task_class).parameters
    init = {**model.get("init_args", {}), "image_size": datamodule.image_size}
    init |= {name: getattr(datamodule, name) for name in _LINKED if _is_needed(known.get(name))}
    if "pretrained" in known:
        init["pretrained"] = False
    return {"class_path": model["class_path"], "init_args": init}, datamodule.image_size


def _is_needed(parameter: inspect.Parameter | None) -> bool:
    return parameter is not None and parameter.default is inspect.Parameter.empty


def _task(arguments: dict[str, Any]) -> VisionTask:
    """The task, its arguments checked by their types as the command line does."""
    from jsonargparse import ArgumentError, ArgumentParser

    from lightning_modules.base import VisionTask

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(VisionTask, "model", required=True)
    try:
        task = parser.instantiate(parser.parse_args(["--model", json.dumps(arguments)])).model
    except ArgumentError as error:
        raise UserError(f"model: {' '.join(str(error).split())}") from error
    except ValueError as error:
        # The parser wraps what a constructor says into a report about types.
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise
    assert isinstance(task, VisionTask)
    return task
