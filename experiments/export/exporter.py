"""One task in several formats, each compared with the task itself."""

from __future__ import annotations

import argparse
import copy
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.export import ExportedProgram

from datamodules.base import ImageDataModule
from evaluation.efficiency import BatchCost
from experiments.export import LAYOUTS, predict_onnx
from experiments.export.graphs import (
    Runner,
    Tower,
    graph_of,
    module_runner,
    onnx_runner,
    program_runner,
    towers_of,
    write_onnx,
    write_torch_export,
)
from experiments.export.hub import write_card
from experiments.export.layouts import reloaded, write_layout
from experiments.export.parity import TOLERANCE, Form, interleaved, measure, refuse_disagreement
from experiments.export.weights import (
    FILE,
    as_strings,
    metadata_of,
    read_weights,
    write_summary,
    write_tokenizer,
    write_weights,
)
from lightning_modules.base import VisionTask
from vitrail.runs import Run

OWN = "PyTorch"
_SUFFIX = {"onnx": ".onnx", "torch_export": ".pt2"}
_TOOL = {"onnx": "ONNX Runtime", "torch_export": "torchao", "safetensors": "torchao, weights"}


class _Written(NamedTuple):
    kind: str
    folder: Path
    eight_bits: bool


class Exporter:
    """Exports one task."""

    def __init__(self, task: VisionTask, files: Run, datamodule: ImageDataModule, options: argparse.Namespace) -> None:
        self._task, self._files, self._data, self._options = task, files, datamodule, options
        self._towers = towers_of(task)
        self._metadata = metadata_of(task, files, options.checkpoint)
        self._graphs: dict[str, ExportedProgram] = {}
        self._calibration: list[Any] = []

    def export(self, folders: Mapping[str, Path]) -> list[Form]:
        """Fill an empty folder for each format.

        Returns:
            The model itself, then each form: of every format in float32 and, where asked for, in eight bits.

        Raises:
            UserError: A form cannot be made, or does not reproduce the model.
        """
        quantize = self._options.quantize
        if quantize:
            from experiments.export.quantize import calibration_images

            self._calibration = calibration_images(self._data)
        forms: dict[str, _Written] = {}
        for kind, folder in folders.items():
            plain = folder if not quantize else folder / ".float32"
            plain.mkdir(exist_ok=True)
            self._write(kind, plain)
            forms[f"{kind}, float32"] = _Written(kind, plain, eight_bits=False)
            if quantize:
                self._write_quantised(kind, plain, folder)
                forms[f"{kind}, int8 ({_TOOL[kind]})"] = _Written(kind, folder, eight_bits=True)
        found = self._measured(forms)
        for kind, folder in folders.items():
            shutil.rmtree(folder / ".float32", ignore_errors=True)
            self._describe(kind, folder, found)
        return found

    def _write(self, kind: str, folder: Path) -> None:
        if kind == "safetensors":
            write_weights(self._task, folder / FILE, self._metadata)
            return
        if kind in LAYOUTS:
            write_layout(kind, self._task, folder)
            return
        for tower in self._towers:
            path = folder / f"{tower.name}{_SUFFIX[kind]}"
            if kind == "onnx":
                write_onnx(self._graph(tower), tower, path, self._strings(tower))
            else:
                write_torch_export(self._graph(tower), path, self._strings(tower))

    def _write_quantised(self, kind: str, plain: Path, folder: Path) -> None:
        from experiments.export.quantize import quantize_onnx, quantize_program, quantize_weights

        if kind == "safetensors":
            task = copy.deepcopy(self._task)
            quantize_weights(task)
            write_weights(task, folder / FILE, self._metadata)
            return
        for tower in self._towers:
            name = f"{tower.name}{_SUFFIX[kind]}"
            if kind == "onnx":
                quantize_onnx(plain / name, folder / name, tower, self._calibration)
            else:
                program = quantize_program(self._graph(tower), tower, self._calibration)
                write_torch_export(program, folder / name, self._strings(tower))

    def _graph(self, tower: Tower) -> ExportedProgram:
        if tower.name not in self._graphs:
            self._graphs[tower.name] = graph_of(tower)
        return self._graphs[tower.name]

    def _strings(self, tower: Tower) -> dict[str, str]:
        return as_strings({**self._metadata, "tower": tower.name, "outputs": tower.outputs})

    def _runners(self, kind: str, folder: Path, *, compiled: bool = False) -> dict[str, Runner]:
        if kind == "safetensors":
            return {tower.name: module_runner(tower) for tower in towers_of(read_weights(folder))}
        if kind in LAYOUTS:
            found = reloaded(kind, self._task, folder)
            return {tower.name: module_runner(tower) for tower in towers_of(found)}
        if kind == "onnx":
            return {tower.name: onnx_runner(folder / f"{tower.name}.onnx") for tower in self._towers}
        return {
            tower.name: program_runner(folder / f"{tower.name}.pt2", tower, compiled=compiled) for tower in self._towers
        }

    def _measured(self, forms: Mapping[str, _Written]) -> list[Form]:
        """Measure parity of all forms in one pass over the images, and their speed in turn with eight bits."""
        options = self._options
        runners = {name: self._runners(form.kind, form.folder) for name, form in forms.items()}
        own = {tower.name: module_runner(tower) for tower in self._towers}
        parity = measure(self._task, self._data, options.split, {OWN: own, **runners})
        for name, form in forms.items():
            share = options.min_agreement if form.eight_bits or not options.quantize else 1.0
            tolerance = None if form.eight_bits else TOLERANCE
            refuse_disagreement(name, parity[name], tolerance=tolerance, min_agreement=share)
        costs = self._timed(forms, {OWN: own, **runners}) if options.quantize and options.repeats else {}
        state = self._task.state_dict().values()
        sizes = {OWN: sum(value.numel() * value.element_size() for value in state)}
        sizes |= {name: sum(file.stat().st_size for file in _model_files(form.folder)) for name, form in forms.items()}
        return [Form(name, sizes[name], rows, costs.get(name, {})) for name, rows in parity.items()]

    def _timed(
        self, forms: Mapping[str, _Written], runners: dict[str, dict[str, Runner]]
    ) -> dict[str, dict[int, BatchCost]]:
        """Time the image tower; PyTorch's graphs are compiled, as they should be where speed matters."""
        compiled = {
            name: self._runners(form.kind, form.folder, compiled=True)
            for name, form in forms.items()
            if form.kind == "torch_export"
        }
        tower = self._towers[0].name
        first = {name: towers[tower] for name, towers in {**runners, **compiled}.items()}
        images = np.concatenate(self._calibration)
        return interleaved(first, images, self._options.batch_sizes, self._options.repeats)

    def _describe(self, kind: str, folder: Path, forms: list[Form]) -> None:
        mine = [form for form in forms if form.name == OWN or form.name.startswith(f"{kind},")]
        if kind in ("onnx", "torch_export"):
            write_tokenizer(self._task, folder)
        if kind == "onnx":
            shutil.copyfile(str(predict_onnx.__file__), folder / "predict.py")
        files = sorted(path.name for path in _model_files(folder))
        measured = {"split": self._options.split, "forms": [asdict(form) for form in mine]}
        digests = {path.name: predict_onnx.sha256(path) for path in _model_files(folder)}
        values = {**self._metadata, "format": kind, "files": files, "sha256": digests, "measured": measured}
        write_summary(folder, values)
        write_card(folder / "README.md", self._files, self._metadata, kind, mine, self._options.split)


def _model_files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_file() and path.suffix in {".onnx", ".pt2", ".safetensors"}]
