"""Checkpoint files: tasks loaded from them without running code, and their weights averaged or interpolated.

The mean of BatchNorm's running statistics is not the statistics of the mean network, so those are recomputed on
training images, unless all members share them (a backbone with frozen BatchNorm).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_modules.base import VisionTask
from lightning_modules.encoders.weights import misfits
from lightning_modules.options import current_arguments
from vitrail.config import current_class_path
from vitrail.errors import UserError, first_line
from vitrail.files import check_zip, write_atomically
from vitrail.trust import PLUGINS, is_trusted

PACKAGE = "lightning_modules"

State = dict[str, torch.Tensor]

_OF_TRAINING = {"optimizer_states", "lr_schedulers", "callbacks", "loops"}


def load_task(path: str | Path, map_location: str = "cpu") -> VisionTask:
    """Load a task with its weights, classes (``tasks``) and preprocessing (``input_options``), in evaluation mode.

    Args:
        path: path of a checkpoint of the trainer.
        map_location: device to load to, such as ``cpu`` or ``cuda:0``.

    Raises:
        UserError: there is no such file, or it is not a checkpoint of one of our tasks.

    Example:
        >>> task = load_task("runs/quickstart/20260101-120000/checkpoints/best.ckpt")  # doctest: +SKIP
        >>> task.tasks["class"]  # doctest: +SKIP
    """
    return task_from(_content(path, map_location), path).to(map_location).eval()


def task_from(checkpoint: dict[str, Any], path: str | Path, *, assign: bool = False) -> VisionTask:
    """Build a task from the content of a checkpoint, with its weights."""
    task = untrained_task(checkpoint["hyper_parameters"], path)
    try:
        task.on_load_checkpoint(checkpoint)
        task.load_state_dict(checkpoint["state_dict"], assign=assign)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (RuntimeError, TypeError) as error:
        raise _other_version(path, type(task), error) from error
    return task


def untrained_task(hyper_parameters: Mapping[str, Any], path: str | Path) -> VisionTask:
    """Build a task from the hyper-parameters of a checkpoint, without its weights."""
    task_class = _task_class(current_class_path(str(hyper_parameters.get("_class_path", ""))), path)
    known = inspect.signature(task_class).parameters
    try:
        arguments = current_arguments(task_class, hyper_parameters)
        return task_class(**{name: value for name, value in arguments.items() if name in known})
    except (RuntimeError, TypeError) as error:
        raise _other_version(path, task_class, error) from error


def read_checkpoint(path: str | Path, map_location: str = "cpu") -> dict[str, Any]:
    """Read a checkpoint, at least ``state_dict`` and ``hyper_parameters``, with ``weights_only=True``.

    Weights that it names by their origin, as that of a zero-shot model does, are read from there.

    Raises:
        UserError: there is no such file, it is not a checkpoint, or weights that it names have changed or are gone.
    """
    checkpoint = _content(path, map_location)
    if checkpoint.get("by_reference"):
        untrained_task(checkpoint["hyper_parameters"], path).on_load_checkpoint(checkpoint)
    return checkpoint


def _content(path: str | Path, map_location: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise UserError(f"{path}: there is no such checkpoint; give the path of a .ckpt file in a run directory")
    check_zip(Path(path), "take another checkpoint of the run, or train again")
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:
        raise UserError(f"{path}: is not a checkpoint that can be read safely; give a .ckpt file of a run") from error
    parts = ("state_dict", "hyper_parameters")
    if not isinstance(checkpoint, dict) or not all(isinstance(checkpoint.get(part), dict) for part in parts):
        raise UserError(f"{path}: is not a checkpoint of a run; it lacks state_dict or hyper_parameters")
    return checkpoint


def write_weights(path: Path, checkpoint: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> None:
    """Write a checkpoint with other weights, atomically and without the state of the training.

    Args:
        path: of the new file.
        checkpoint: content of the one whose settings are kept.
        state: the weights.
    """
    kept = {key: value for key, value in checkpoint.items() if key not in _OF_TRAINING}
    with write_atomically(path) as partial, partial.open("wb") as file:
        torch.save({**kept, "state_dict": state}, file)


def _other_version(path: str | Path, task_class: type[VisionTask], error: Exception) -> UserError:
    return UserError(f"{path}: was made by another version of {task_class.__name__}: {first_line(error)}")


def _task_class(class_path: str, path: str | Path) -> type[VisionTask]:
    """Import a class of this project or an allowed plugin; its name may come from a file of any author."""
    module_name, _, name = class_path.rpartition(".")
    if is_trusted(class_path):
        try:
            task_class = getattr(import_module(module_name), name)
        except (ModuleNotFoundError, AttributeError):
            task_class = None
        if isinstance(task_class, type) and issubclass(task_class, VisionTask) and not inspect.isabstract(task_class):
            return task_class
    raise UserError(
        f"{path}: contains a {class_path[:200] or 'model without a name'!r}; must be one of the tasks of {PACKAGE}, or "
        f"of a module that {PLUGINS} allows"
    )


def averaged_weights(states: Sequence[State]) -> State:
    """Return the mean of weights of the same names and shapes, computed in float64.

    Integers (counters, positions) are the first member's.
    """
    mean = {}
    for name, first in states[0].items():
        if first.is_floating_point():
            mean[name] = torch.stack([state[name].double() for state in states]).mean(0).to(first.dtype)
        else:
            mean[name] = first
    return mean


def interpolated_weights(start: State, end: State, alpha: float) -> State:
    """Return (1 - α) · start + α · end (WiSE-FT: Wortsman et al., Robust fine-tuning of zero-shot models, CVPR 2022).

    An adapter's update is a product of two matrices, the second of which begins as zero: that one alone is scaled, so
    that the sum of base and update is what is interpolated.

    Args:
        start: weights at the beginning.
        end: weights at the end, of the same names and shapes.
        alpha: 0 for the beginning, 1 for the end.

    Raises:
        UserError: the names or shapes differ.
    """
    if wrong := misfits(end, start):
        raise UserError(f"the end's weights do not fit the start: {wrong}; give the start and the end of one run")
    mixed = {}
    for name, last in end.items():
        if not last.is_floating_point() or ".lora_A." in name:
            mixed[name] = last
        else:
            mixed[name] = torch.lerp(start[name].double(), last.double(), alpha).to(last.dtype)
    return mixed


def differing_batchnorm(network: nn.Module, states: Sequence[State]) -> list[_BatchNorm]:
    """Return the BatchNorm layers whose running statistics are not the same in all members."""
    return [
        module
        for name, module in network.named_modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
        if any(
            not torch.equal(states[0][key], state[key])
            for key in (f"{name}.running_mean", f"{name}.running_var")
            for state in states[1:]
        )
    ]


@torch.no_grad()
def refresh_batchnorm(
    network: nn.Module,
    layers: Sequence[_BatchNorm],
    features: Callable[[torch.Tensor], torch.Tensor],
    batches: Iterable[torch.Tensor],
) -> None:
    """Recompute BatchNorm's running statistics as their mean over all batches.

    Unlike ``torch.optim.swa_utils.update_bn`` it leaves all other layers, and dropout, in evaluation mode.

    Args:
        network: all of it.
        layers: whose statistics are recomputed.
        features: runs the part of the network that has these layers.
        batches: images uint8 ``(B, 3, H, W)``, on the network's device.

    Raises:
        UserError: no batch reached a layer.
    """
    network.eval()
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a plain mean instead of a moving one
        layer.train()
    for images in batches:
        if len(images) > 1:  # one image alone may have no variance
            features(images)
    network.eval()
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
        if not layer.num_batches_tracked:
            raise UserError(
                "BatchNorm of this network cannot be recomputed on images alone (or there are fewer than two); "
                "train with frozen BatchNorm (fixed_batchnorm) for a soup"
            )
