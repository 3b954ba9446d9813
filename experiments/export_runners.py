"""Exported files as functions from arrays to arrays, so that all formats are compared and timed in one way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._inductor.config
from numpy.typing import NDArray

from experiments.export_graphs import Tower

Arrays = dict[str, NDArray[Any]]
Runner = Callable[[Mapping[str, NDArray[Any]]], Arrays]
"""From a tower's inputs by name to its outputs by name."""


def module_runner(tower: Tower) -> Runner:
    """The tower itself, in PyTorch."""
    return _torch_runner(tower.module, tower)


def program_runner(path: Path, tower: Tower, *, compiled: bool = False) -> Runner:
    """A file of ``torch.export``.

    Args:
        path: of the file.
        tower: that it was made of, for the names of its outputs.
        compiled: by inductor, as it should be where speed matters; the first batch of each size takes long.
    """
    # It makes the operators of eight-bit graphs known.
    import_module("torch.ao.quantization.fx._decomposed")
    module: Any = torch.export.load(path).module()
    if not compiled:
        return _torch_runner(module, tower)
    run = _torch_runner(torch.compile(module, dynamic=False), tower)

    def run_compiled(inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        # Weights become constants that are packed for the kernels once, without which eight bits do not compile. The
        # compiler asks for it when it sees a size for the first time, and not by its own options but globally.
        with torch._inductor.config.patch(freezing=True):
            return run(inputs)

    return run_compiled


def onnx_runner(path: Path) -> Runner:
    """A file of ONNX, by ONNX Runtime on the CPU with as many threads as PyTorch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads that spin while they wait would slow down whoever is measured next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    wanted = [one.name for one in session.get_inputs()]
    names = [one.name for one in session.get_outputs()]

    def run(inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        return dict(zip(names, session.run(names, {name: inputs[name] for name in wanted}), strict=True))

    return run


def _torch_runner(module: Any, tower: Tower) -> Runner:
    def run(inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        with torch.no_grad():
            found = module(*(torch.from_numpy(np.ascontiguousarray(inputs[name])) for name in tower.inputs))
        return {name: values.numpy() for name, values in zip(tower.outputs, found, strict=True)}

    return run
