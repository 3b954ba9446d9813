"""Weights and activations in eight bits: by torchao for PyTorch's formats, by ONNX Runtime's own tools for ONNX.

Networks of images are quantised statically: the ranges of their activations are measured on training images.
Those of texts are quantised dynamically, because the lengths of texts differ.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.export import ExportedProgram

from datamodules.base import ImageDataModule
from experiments.export.graphs import Tower, quiet, without_unused
from lightning_modules.base import VisionTask
from vitrail.errors import UserError, first_line

CALIBRATION = 128
"""Training images that ranges are measured on, at most."""

_AT_A_TIME = 8
"""Images whose smallest and largest values are taken together; the ranges are means of these, so that a single
outlier does not stretch them."""


def calibration_images(datamodule: ImageDataModule, count: int = CALIBRATION) -> list[NDArray[np.uint8]]:
    """Training images by the evaluation transform, spread over the whole split.

    Args:
        datamodule: set up.
        count: how many at most.

    Returns:
        Batches of uint8 ``(B, 3, S, S)``.

    Raises:
        UserError: if there is no training image.
    """
    rows = datamodule.split_indices("train")
    if not len(rows):
        raise UserError("export --quantize: the run's data have no training images to measure ranges on")
    chosen = np.unique(rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(np.int64)])
    return [batch["image"].numpy() for batch in datamodule.rows_dataloader(chosen)]


def quantize_onnx(source: Path, target: Path, tower: Tower, calibration: Sequence[NDArray[np.uint8]]) -> None:
    """Make an eight-bit file of one in float32; its metadata stay.

    Raises:
        UserError: if ONNX Runtime cannot.
    """
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder, quiet():
        simpler = Path(folder) / "simpler.onnx"
        try:
            quant_pre_process(str(source), str(simpler), skip_symbolic_shape=True)
            _forget_weight_shapes(simpler)
            if "image" in tower.inputs:
                quantize_static(
                    simpler,
                    target,
                    _reader(calibration),
                    quant_format=QuantFormat.QDQ,
                    # All operators that it can: turning values back between convolutions costs more than they save.
                    per_channel=True,
                    activation_type=QuantType.QUInt8,
                    weight_type=QuantType.QInt8,
                    extra_options={"CalibMovingAverage": True},
                )
            else:
                quantize_dynamic(simpler, target, op_types_to_quantize=["MatMul", "Gemm"], per_channel=True)
        except Exception as error:
            raise _cannot("ONNX Runtime", tower.name, error) from error
    kept = {entry.key: entry.value for entry in onnx.load(source, load_external_data=False).metadata_props}
    made = onnx.load(target)
    del made.metadata_props[:]
    onnx.helper.set_model_props(made, kept)
    onnx.save(made, target)


def quantize_program(
    program: ExportedProgram, tower: Tower, calibration: Sequence[NDArray[np.uint8]]
) -> ExportedProgram:
    """Make an eight-bit graph of one in float32, for x86 processors through ``torch.compile``.

    Without compilation it computes the same, but slowly: eight-bit values are turned back in front of each operator.

    Raises:
        UserError: if torchao cannot.
    """
    is_static = "image" in tower.inputs
    try:
        with torch.no_grad(), quiet():
            from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
            from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

            quantizer = x86.X86InductorQuantizer()
            quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_dynamic=not is_static))
            observed = prepare_pt2e(program.module(), quantizer)
            for images in calibration if is_static else ():
                observed(torch.from_numpy(images))
            if not is_static:
                observed(*tower.inputs.values())
            converted = convert_pt2e(observed)
            shapes = tuple(tower.dynamic.values())
            return without_unused(torch.export.export(converted, tuple(tower.inputs.values()), dynamic_shapes=shapes))
    except Exception as error:
        raise _cannot("torchao", tower.name, error) from error


def quantize_weights(task: VisionTask) -> None:
    """Quantise the weights of linear layers in place; activations stay as they are.

    Raises:
        UserError: if torchao cannot, or there is no linear layer.
    """
    if not any(isinstance(module, nn.Linear) for module in task.modules()):
        raise UserError("export --quantize int8: the model has no linear layers; --format onnx quantises convolutions")
    try:
        with quiet():
            from torchao.quantization import Int8WeightOnlyConfig, quantize_

            quantize_(task, Int8WeightOnlyConfig())
    except Exception as error:
        raise _cannot("torchao", "", error) from error


def _forget_weight_shapes(path: Path) -> None:
    """Drop the shapes that a file notes of its weights in addition to the weights themselves.

    ``torch.onnx`` notes them. ONNX Runtime transposes the weights of a Gemm in place and leaves the note as it is, so
    shape inference then finds two shapes of any weight that is not square.
    """
    import onnx

    model = onnx.load(path)
    weights = {weight.name for weight in model.graph.initializer}
    kept = [value for value in model.graph.value_info if value.name not in weights]
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)
    onnx.save(model, path)


def _reader(images: Sequence[NDArray[np.uint8]]) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    together = np.concatenate(images)
    # Whole batches only, unless there is but one.
    count = max(1, len(together) // _AT_A_TIME)
    batches = iter([together[place * _AT_A_TIME :][:_AT_A_TIME] for place in range(count)])

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # it ships no types
        def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
            batch = next(batches, None)
            return None if batch is None else {"image": batch}

    return Reader()


def _cannot(tool: str, tower: str, error: Exception) -> UserError:
    network = f"the {tower} network" if tower else "the network"
    return UserError(f"export --quantize int8: {tool} cannot quantise {network} ({first_line(error)}); export without")
