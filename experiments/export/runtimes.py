"""Graphs for other runtimes: OpenVINO, ExecuTorch and Core ML, and ONNX in 16 bits.

OpenVINO takes batches of any size, as ONNX does. ExecuTorch and Core ML run on telephones and boards, which see
one image at a time: their graphs have a batch of one, and texts at their full length. Runners go through a batch row by
row.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.export import ExportedProgram, default_decompositions

from experiments.export.graphs import Arrays, Runner, Tower, graph_of, onnx_runner, quiet, write_onnx
from experiments.export.predict_onnx import openvino_graph
from experiments.export.weights import KEY
from vitrail.errors import UserError, first_line

COREML_UNMEASURED = "Core ML runs on macOS only: parity was not measured; export on a Mac to have it measured"
_BF16_OPSET = 22
"""The first in which convolutions take bfloat16."""


def write_onnx_fp16(source: Path, target: Path) -> None:
    """Make an ONNX file whose weights and operators are float16 of one in float32; inputs and outputs stay.

    Raises:
        UserError: ONNX Runtime's converter cannot.
    """
    import onnx

    try:
        with quiet():
            from onnxruntime.transformers.float16 import convert_float_to_float16

            onnx.save(convert_float_to_float16(onnx.load(source), keep_io_types=True), target)
    except Exception as error:
        raise _cannot("ONNX Runtime", source.stem, error) from error


def write_onnx_bf16(tower: Tower, path: Path, metadata: dict[str, str]) -> None:
    """Write a tower as ONNX in bfloat16, normalisation and outputs in float32."""
    low = replace(tower, module=copy.deepcopy(tower.module).to(torch.bfloat16))
    write_onnx(graph_of(low), low, path, metadata, _BF16_OPSET)


def bf16_runner(path: Path) -> Runner:
    """Run ONNX in bfloat16.

    Raises:
        UserError: ONNX Runtime has no kernels for it here, as is so on most processors.
    """
    try:
        return onnx_runner(path)
    except Exception as error:  # each kind of lack has an exception of its own
        raise UserError(
            f"export: ONNX Runtime has no bfloat16 kernels for this network here ({first_line(error)}), so it cannot "
            "be compared with the model; choose --format onnx_fp16 or onnx"
        ) from error


def write_openvino(onnx_file: Path, path: Path, metadata: Mapping[str, str], *, fp16: bool) -> None:
    """Write ``path`` (XML) and the weights next to it (``.bin``).

    By way of ONNX, whose names and shapes stay: OpenVINO's own converter of PyTorch's graphs reports its use to its
    makers over the network.

    Args:
        onnx_file: the graph in float32.
        path: of the XML file.
        metadata: strings, of which ``vitrail`` is kept in the file.
        fp16: store weights in float16; what computes in which precision is the device's choice.

    Raises:
        UserError: OpenVINO has no operator for something in the graph.
    """
    import openvino

    try:
        model = openvino.Core().read_model(onnx_file)
        model.set_rt_info(metadata[KEY], KEY)
        openvino.save_model(model, path, compress_to_fp16=fp16)
    except Exception as error:
        raise _cannot("OpenVINO", path.stem, error) from error


def openvino_runner(path: Path) -> Runner:
    """Run a file of OpenVINO on the CPU in float32, with as many threads as PyTorch has."""
    return openvino_graph(path, torch.get_num_threads())[1]


def write_executorch(tower: Tower, path: Path) -> None:
    """Write a tower as a program of ExecuTorch, with the kernels of XNNPACK where it has some.

    Raises:
        UserError: ExecuTorch has no operator for something in the graph.
    """
    program = graph_of(alone(tower))
    try:
        with quiet():
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
            from executorch.exir import to_edge_transform_and_lower

            lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
            path.write_bytes(lowered.to_executorch().buffer)
    except Exception as error:
        raise _cannot("ExecuTorch", tower.name, error) from error


def executorch_runner(path: Path, tower: Tower) -> Runner:
    """Run a program of ExecuTorch, row by row.

    Raises:
        UserError: its runtime cannot load the program.
    """
    from executorch.runtime import Runtime

    try:
        method: Any = Runtime.get().load_program(path).load_method("forward")
    except Exception as error:
        raise _cannot("ExecuTorch", tower.name, error) from error

    def run(inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        # Outputs lie in memory that the next call writes to.
        rows = [
            [value.numpy().copy() for value in method.execute([torch.from_numpy(value) for value in row.values()])]
            for row in rows_of(inputs, tower)
        ]
        return {
            name: np.concatenate(values) for name, values in zip(tower.outputs, zip(*rows, strict=True), strict=True)
        }

    return run


def write_coreml(tower: Tower, path: Path, metadata: Mapping[str, str], *, fp16: bool) -> None:
    """Write a tower as an ML program (``.mlpackage``) for iOS 17, macOS 14 and later.

    It takes pixels as float32 from 0 to 255 and tokens as int32: Core ML has no arrays of the model's own types.

    Raises:
        UserError: Core ML has no operator for something in the graph.
    """
    one = alone(tower)
    inputs = {name: value.float() if value.dtype == torch.uint8 else value.int() for name, value in one.inputs.items()}
    program = graph_of(replace(one, module=_CoreMLInputs(one), inputs=inputs))
    try:
        with quiet():
            import coremltools

            precision = coremltools.precision
            made = coremltools.convert(
                _known_operators(program),
                outputs=[coremltools.TensorType(name=name) for name in tower.outputs],
                minimum_deployment_target=coremltools.target.iOS17,
                compute_precision=precision.FLOAT16 if fp16 else precision.FLOAT32,
            )
            made.user_defined_metadata[KEY] = metadata[KEY]
            made.save(str(path))
    except Exception as error:
        raise _cannot("Core ML", tower.name, error) from error


def coreml_runner(path: Path, tower: Tower) -> Runner:
    """Run an ML program row by row, on macOS."""
    import coremltools

    model = coremltools.models.MLModel(str(path))

    def run(inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        rows = [
            model.predict({n: v.astype(np.float32 if v.dtype == np.uint8 else np.int32) for n, v in row.items()})
            for row in rows_of(inputs, tower)
        ]
        return {name: np.concatenate([row[name] for row in rows]) for name in tower.outputs}

    return run


def alone(tower: Tower) -> Tower:
    """Return the tower for one sample at a time, texts at their full length."""
    [row] = rows_of({name: value[:1].numpy() for name, value in tower.inputs.items()}, tower)
    inputs = {name: torch.from_numpy(value) for name, value in row.items()}
    return replace(tower, inputs=inputs, dynamic={name: {} for name in tower.dynamic})


def rows_of(inputs: Mapping[str, NDArray[Any]], tower: Tower) -> list[Arrays]:
    """Return each sample of a batch as a batch of one, texts padded to their full length."""
    whole: Arrays = {}
    for name, example in tower.inputs.items():
        values = inputs[name]
        length = tower.dynamic[name].get(1)
        if length is not None:
            pad = tower.pad_id if name == "input_ids" else 0
            missing = int(length.max) - values.shape[1]
            values = np.pad(values, ((0, 0), (0, missing)), constant_values=pad)
        whole[name] = np.ascontiguousarray(values.astype(example.numpy().dtype))
    count = len(next(iter(whole.values())))
    return [{name: values[place : place + 1] for name, values in whole.items()} for place in range(count)]


class _CoreMLInputs(nn.Module):
    """A tower whose inputs have types that Core ML knows."""

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.tower = tower.module
        self.dtypes = [value.dtype for value in tower.inputs.values()]

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found: tuple[torch.Tensor, ...] = self.tower(
            *(value.to(dtype) for value, dtype in zip(inputs, self.dtypes, strict=True))
        )
        return found


def _known_operators(program: ExportedProgram) -> ExportedProgram:
    """Return a graph of operators that Core ML's converter knows."""
    table = default_decompositions()
    # It knows this one, but not the strides that it would be replaced by.
    del table[torch.ops.aten.adaptive_avg_pool2d.default]
    plain: ExportedProgram = program.run_decompositions(table)
    for node in list(plain.graph.nodes):
        if node.target is torch.ops.aten.alias.default:
            node.replace_all_uses_with(node.args[0])
            plain.graph.erase_node(node)
    return plain


def _cannot(runtime: str, tower: str, error: Exception) -> UserError:
    return UserError(
        f"export: {runtime} cannot represent the {tower} network ({first_line(error)}); choose --format onnx"
    )
