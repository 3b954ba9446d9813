"""A task as one safetensors file, and the metadata of every export.

The metadata describe classes, preprocessing, temperatures, thresholds and origin; a safetensors file also has what is
needed to build the task again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from experiments.export.predict_onnx import DETECTOR, MAX_DETECTOR
from lightning_modules.base import VisionTask
from lightning_modules.checkpoint import task_from
from lightning_modules.dual_encoder import DualEncoder
from lightning_modules.encoders.dual import SIDES
from lightning_modules.encoders.image import ImageEncoder, Normalize
from lightning_modules.encoders.weights import misfits
from vitrail.console import without_nan
from vitrail.errors import UserError, first_line
from vitrail.files import current_keys
from vitrail.predictions import OutputCalibration
from vitrail.runs import Run
from vitrail.types import TaskKind

KEY = "vitrail"
"""Under which JSON of it stands in the metadata of ONNX and safetensors files, and in PyTorch's exported programs."""

VERSION = 1
TOKENIZER = "tokenizer.json"


def metadata_of(task: VisionTask, files: Run, checkpoint: str) -> dict[str, Any]:
    """Return everything that is needed to use the exported files alone.

    Args:
        task: with its weights.
        files: of its run.
        checkpoint: name of the checkpoint, such as ``best``; temperatures belong to the best one only.

    Returns:
        Plain values. ``temperatures`` by which logits are to be divided for calibrated probabilities are there for the
        tasks that were calibrated, ``calibration`` (``OutputCalibration``) for others, ``operating_points`` where they
        were chosen, ``ood`` where unknown images are recognised; ``kinds`` for those that are not single-label,
        ``thresholds`` for multi-label and ``units`` for regression tasks.
    """
    tasks: dict[str, list[str]] = {name: list(classes) for name, classes in getattr(task, "tasks", {}).items()}
    temperatures = files.temperatures if checkpoint == "best" else {}
    outputs = files.output_calibration if checkpoint == "best" else OutputCalibration()
    git = files.record.get("git")
    return {
        "version": VERSION,
        "name": str(files.record.get("name") or files.path.resolve().parent.name),
        "kind": type(task).__name__,
        "tasks": tasks,
        "temperatures": {name: value for name, value in temperatures.items() if name in tasks},
        "calibration": {name: dict(values) for name, values in vars(outputs).items()},
        "operating_points": _operating_points(files, tasks) if checkpoint == "best" else {},
        "kinds": dict(getattr(task, "task_kinds", {})),
        "thresholds": {name: list(values) for name, values in getattr(task, "thresholds", {}).items()},
        "units": _units(task),
        "ood": _ood(files) if checkpoint == "best" else None,
        "image": dict(task.input_options),
        "pixels": "uint8 RGB, 0 to 255, (batch, 3, size, size); normalisation is part of the graph",
        "text": _text(task),
        "run": files.name,
        "checkpoint": checkpoint,
        "weights": task.weights_digest(),
        "groups": groups_of(task),
        "revision": git.get("revision") if isinstance(git, dict) else None,
    }


def groups_of(task: VisionTask) -> dict[str, list[str]]:
    """Beginnings of the names of the tensors that each encoder consists of, ``image`` and ``text``, where it has them.

    The image encoder's include the statistics of its normalisation.
    """
    modules: dict[str, list[nn.Module]] = {
        "image": [module for module in task.modules() if isinstance(module, ImageEncoder)]
    }
    if isinstance(task, DualEncoder):
        modules = {side: [task.towers.backbone(side), *task.towers.projections(side)] for side in SIDES}
        modules["image"] += [module for module in task.modules() if isinstance(module, Normalize)]
    names = {module: name for name, module in task.named_modules()}
    return {part: [f"{names[module]}." for module in own] for part, own in modules.items() if own}


def _operating_points(files: Run, tasks: Mapping[str, Any]) -> dict[str, Any]:
    """What ``calibrate --operating-point`` chose."""
    return {
        task: {"goal": point.goal, "thresholds": dict(point.thresholds)}
        for task, point in files.operating_points.items()
        if task in tasks
    }


def _ood(files: Run) -> dict[str, Any] | None:
    """The detector of unknown images; ``file`` has the arrays of those that compare features.

    Raises:
        UserError: they are larger than what is read without PyTorch.
    """
    detector = files.detector
    if detector is None:
        return None
    if not detector.needs_features:
        return {**vars(detector), "arrays": {name: values.tolist() for name, values in detector.arrays.items()}}
    size = (files.path / Run.OOD).stat().st_size
    if size > MAX_DETECTOR:
        raise UserError(
            f"{files.path / Run.OOD}: {detector.method} compares with {size / 1e6:.0f} MB, more than the "
            f"{MAX_DETECTOR / 1e6:.0f} MB that an export may have; `vitrail ood {files.path} --method mahalanobis` "
            "needs less"
        )
    return {**vars(detector), "arrays": {}, "file": DETECTOR, "bytes": size}


def _units(task: VisionTask) -> dict[str, str]:
    """What the outputs of regression tasks are."""
    kinds: Mapping[str, TaskKind] = getattr(task, "task_kinds", {})
    return {
        name: "the value in the units of the data; a second number is the logarithm of its variance"
        for name, kind in kinds.items()
        if kind == "regression"
    }


def as_strings(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return metadata as files keep it: one key with JSON."""
    return {KEY: json.dumps(metadata, ensure_ascii=False)}


def from_strings(strings: Mapping[str, str], origin: str | Path) -> dict[str, Any]:
    """Undo ``as_strings``.

    Raises:
        UserError: if it was not written by an export that this version reads.
    """
    try:
        found = json.loads(strings[KEY])
        if found["version"] != VERSION:
            raise UserError(f"{origin}: was exported in format {found['version']}, this reads {VERSION}; export again")
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{origin}: is not an exported model; make one with `python -m experiments export RUN`"
        ) from error
    return dict(found)


def write_tokenizer(task: VisionTask, folder: Path) -> None:
    """Write ``tokenizer.json`` of a task that reads texts."""
    if isinstance(task, DualEncoder) and task.towers.tokenizer is not None:
        (folder / TOKENIZER).write_text(task.towers.tokenizer.state["pipeline"], encoding="utf-8")


def write_summary(folder: Path, values: Mapping[str, Any]) -> None:
    """Write ``export.json``: the metadata, and the measured parity and speed."""
    (folder / Run.EXPORT).write_text(
        json.dumps(without_nan(values), indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def _text(task: VisionTask) -> dict[str, Any] | None:
    if not isinstance(task, DualEncoder) or task.towers.tokenizer is None:
        return None
    state = task.towers.tokenizer.state
    return {
        "max_length": state["max_length"],
        "pad_id": state["pad_id"],
        "pad_token": task.towers.tokenizer.pad_token,
        "fixed_length": state["fixed_length"],
        "class_prompts": task.class_prompts,
        "logit_scale": float(task.objective.logit_scale()[0].detach()),
    }


FILE = "model.safetensors"
_CHECKPOINT = "vitrail.checkpoint"
_QUANTISED = "vitrail.quantised"
_SHAPES = "vitrail.shapes"
"""Of the plain tensors that eight-bit weights consist of: how they go together is not checked by torchao."""


def write_weights(task: VisionTask, path: Path, metadata: Mapping[str, Any]) -> None:
    """Write a task, whose linear layers may have eight-bit weights of torchao.

    Raises:
        UserError: if what the task was built with is more than plain values.
    """
    from safetensors.torch import save_file

    checkpoint: dict[str, Any] = {}
    task.on_save_checkpoint(checkpoint)
    # A training's own sums are not part of a model.
    checkpoint.pop("epoch_sums", None)
    try:
        strings = {**as_strings(metadata), _CHECKPOINT: json.dumps(checkpoint, ensure_ascii=False)}
    except TypeError as error:
        raise UserError(f"export: a {type(task).__name__} cannot be described by plain values ({error})") from error
    state: dict[str, Any] = {name: value.contiguous() for name, value in task.state_dict().items()}
    if any(type(value) is not torch.Tensor for value in state.values()):
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

        state, layout = flatten_tensor_state_dict(state)
        strings[_QUANTISED] = json.dumps(layout)
        strings[_SHAPES] = json.dumps({name: list(value.shape) for name, value in state.items()})
    # Tensors that share memory are written once each: safetensors refuses them, and loading copies anyway.
    save_file({name: value.clone() for name, value in state.items()}, path, metadata=strings)


def read_weights(path: Path) -> VisionTask:
    """Load the task of a file that ``write_weights`` wrote, on the CPU and in evaluation mode.

    Raises:
        UserError: if there is no such file, or it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; export with --format safetensors")
    try:
        with safe_open(path, framework="pt") as file:
            strings = current_keys(file.metadata())
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: is not a complete safetensors file ({error}); export again") from error
    metadata = from_strings(strings, path)
    checkpoint = _checkpoint(strings, path)
    if _QUANTISED not in strings:
        task = task_from({**checkpoint, "state_dict": state}, path).eval()
        if "weights" in metadata and metadata["weights"] != task.weights_digest():
            raise UserError(f"{path}: its weights have been changed since the export; export again")
        return task
    # These become the weights: in memory of their own, not where they happen to be in the mapped file, whose
    # alignment would show in the last digits.
    state = _unflattened({name: value.clone() for name, value in state.items()}, strings, path)
    return task_from({**checkpoint, "state_dict": state}, path, assign=True).eval()


def _checkpoint(strings: Mapping[str, str], path: Path) -> dict[str, Any]:
    try:
        checkpoint = json.loads(strings[_CHECKPOINT])
        if not isinstance(checkpoint, dict) or not isinstance(checkpoint["hyper_parameters"], dict):
            raise TypeError("no hyper_parameters")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: does not describe how its model is built ({error}); export again") from error
    return checkpoint


def _unflattened(state: dict[str, torch.Tensor], strings: Mapping[str, str], path: Path) -> dict[str, torch.Tensor]:
    """Weights of torchao from the plain tensors that they consist of."""
    try:
        from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict
    except ImportError as error:
        raise UserError(f"{path}: has eight-bit weights; `pip install torchao` to read them") from error
    shapes = {name: torch.empty(shape, device="meta") for name, shape in json.loads(strings.get(_SHAPES, "{}")).items()}
    if shapes and (wrong := misfits(state, shapes)):
        raise UserError(f"{path}: the weights do not fit what was exported: {wrong}; export again")
    try:
        found, left = unflatten_tensor_state_dict(state, json.loads(strings[_QUANTISED]))
    except Exception as error:  # a part that is missing ends in whatever torchao asks of it
        raise UserError(
            f"{path}: its eight-bit weights cannot be put together ({first_line(error)}); export again"
        ) from error
    if left:
        raise UserError(f"{path}: {len(left)} tensors belong to nothing, such as {next(iter(left))}; export again")
    return dict(found)
