"""One task in several formats, each compared with the task itself."""

from __future__ import annotations

import argparse
import copy
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from torch.export import ExportedProgram

from datamodules.base import ImageDataModule
from evaluation.efficiency import BatchCost
from experiments.export import LAYOUTS, MIN_AGREEMENT, precision_of, predict_onnx
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
from experiments.export.runtimes import (
    COREML_UNMEASURED,
    bf16_runner,
    coreml_runner,
    executorch_runner,
    openvino_runner,
    write_coreml,
    write_executorch,
    write_onnx_bf16,
    write_onnx_fp16,
    write_openvino,
)
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
_SUFFIX = {
    "onnx": ".onnx",
    "torch_export": ".pt2",
    "openvino": ".xml",
    "executorch": ".pte",
    "coreml": ".mlpackage",
}
"""By what the format's name begins with."""

_MODEL_FILES = {".onnx", ".pt2", ".safetensors", ".xml", ".bin", ".pte", ".mlmodel"}
_TOOL = {"onnx": "ONNX Runtime", "torch_export": "torchao", "safetensors": "torchao, weights"}


class _Written(NamedTuple):
    kind: str
    folder: Path
    eight_bits: bool


class Exporter:
    """Exports one task."""

    def __init__(self, task: VisionTask, files: Run, datamodule: ImageDataModule, options: argparse.Namespace) -> None:
        self._task, self._files, self._data, self._options = task, files, datamodule, options
        self._metadata = metadata_of(task, files, options.checkpoint)
        self._detector = files.detector if self._metadata["ood"] else None
        self._features = self._detector is not None and self._detector.needs_features
        self._towers = towers_of(task, features=self._features)
        self._graphs: dict[str, ExportedProgram] = {}
        self._calibration: list[Any] = []
        self._scratch = TemporaryDirectory()

    def export(self, folders: Mapping[str, Path]) -> list[Form]:
        """Fill an empty folder for each format.

        Returns:
            The model itself, then each form: of every format in float32 and, where asked for, in eight bits.

        Raises:
            UserError: A form cannot be made, or does not reproduce the model.
        """
        quantize = self._options.quantize
        if quantize or self._options.repeats:
            from experiments.export.quantize import calibration_images

            self._calibration = calibration_images(self._data)
        forms: dict[str, _Written] = {}
        for kind, folder in folders.items():
            plain = folder if not quantize else folder / ".float32"
            plain.mkdir(exist_ok=True)
            self._write(kind, plain)
            forms[_form(kind)] = _Written(kind, plain, eight_bits=False)
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
            path, strings = self._path(kind, folder, tower), self._strings(tower)
            match kind:
                case "onnx":
                    shutil.copyfile(self._onnx(tower), path)
                case "onnx_bf16":
                    write_onnx_bf16(tower, path, strings)
                case "onnx_fp16":
                    write_onnx_fp16(self._onnx(tower), path)
                case "openvino" | "openvino_fp16":
                    write_openvino(self._onnx(tower), path, strings, fp16=kind == "openvino_fp16")
                case "executorch":
                    write_executorch(tower, path)
                case "coreml" | "coreml_fp16":
                    write_coreml(tower, path, strings, fp16=kind == "coreml_fp16")
                case _:
                    write_torch_export(self._graph(tower), path, strings)

    @staticmethod
    def _path(kind: str, folder: Path, tower: Tower) -> Path:
        [suffix] = [suffix for name, suffix in _SUFFIX.items() if kind.startswith(name)]
        return folder / f"{tower.name}{suffix}"

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

    def _onnx(self, tower: Tower) -> Path:
        """The tower as ONNX in float32, which other formats are made of, too."""
        path = Path(self._scratch.name) / f"{tower.name}.onnx"
        if not path.exists():
            write_onnx(self._graph(tower), tower, path, self._strings(tower))
        return path

    def _strings(self, tower: Tower) -> dict[str, str]:
        return as_strings({**self._metadata, "tower": tower.name, "outputs": tower.outputs})

    def _runners(self, kind: str, folder: Path, *, compiled: bool = False) -> dict[str, Runner]:
        if kind == "safetensors":
            return {
                tower.name: module_runner(tower) for tower in towers_of(read_weights(folder), features=self._features)
            }
        if kind in LAYOUTS:
            found = reloaded(kind, self._task, folder)
            return {tower.name: module_runner(tower) for tower in towers_of(found, features=self._features)}
        return {tower.name: self._runner(kind, tower, folder, compiled=compiled) for tower in self._towers}

    def _runner(self, kind: str, tower: Tower, folder: Path, *, compiled: bool) -> Runner:
        path = self._path(kind, folder, tower)
        match kind:
            case "onnx" | "onnx_fp16":
                return onnx_runner(path)
            case "onnx_bf16":
                return bf16_runner(path)
            case "openvino" | "openvino_fp16":
                return openvino_runner(path)
            case "executorch":
                return executorch_runner(path, tower)
            case "coreml" | "coreml_fp16":
                return coreml_runner(path, tower)
            case _:
                return program_runner(path, tower, compiled=compiled)

    def _measured(self, forms: Mapping[str, _Written]) -> list[Form]:
        """Measure parity of all forms in one pass over the images, and their speed in turn with eight bits."""
        options = self._options
        unmeasured = {
            name: COREML_UNMEASURED
            for name, form in forms.items()
            if form.kind.startswith("coreml") and sys.platform != "darwin"
        }
        for name, reason in unmeasured.items():
            rank_zero_warn(f"{name}: {reason}")
        runners = {name: self._runners(one.kind, one.folder) for name, one in forms.items() if name not in unmeasured}
        own = {tower.name: module_runner(tower) for tower in self._towers}
        parity = measure(self._task, self._data, options.split, {OWN: own, **runners}, self._detector)
        for name in runners:
            precision = "int8" if forms[name].eight_bits else precision_of(forms[name].kind)
            given = options.min_agreement if forms[name].eight_bits or not options.quantize else None
            share = MIN_AGREEMENT[precision] if given is None else given
            refuse_disagreement(name, parity[name], tolerance=TOLERANCE[precision], min_agreement=share)
        costs = self._timed(forms, {OWN: own, **runners}) if options.repeats else {}
        state = self._task.state_dict().values()
        sizes = {OWN: sum(value.numel() * value.element_size() for value in state)}
        sizes |= {name: sum(file.stat().st_size for file in _model_files(form.folder)) for name, form in forms.items()}
        return [
            Form(name, sizes[name], parity.get(name, []), costs.get(name, {}), unmeasured.get(name, ""))
            for name in (OWN, *forms)
        ]

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
        plain = _form(kind)
        mine = [form for form in forms if form.name in (OWN, plain) or form.name.startswith(f"{kind}, int8")]
        if kind not in (*LAYOUTS, "safetensors"):
            write_tokenizer(self._task, folder)
        metadata = self._metadata
        if self._features and kind in LAYOUTS:
            metadata = {**metadata, "ood": None}  # other libraries know no detector
        elif self._features:
            shutil.copyfile(self._files.path / Run.OOD, folder / predict_onnx.DETECTOR)
        if kind.startswith(("onnx", "openvino")):
            shutil.copyfile(str(predict_onnx.__file__), folder / "predict.py")
        digests = {str(path.relative_to(folder)): predict_onnx.sha256(path) for path in _model_files(folder)}
        files = sorted(digests)
        tolerance = TOLERANCE["int8" if self._options.quantize else precision_of(kind)]
        measured = {"split": self._options.split, "tolerance": tolerance, "forms": [asdict(form) for form in mine]}
        values = {**metadata, "format": kind, "files": files, "sha256": digests, "measured": measured}
        write_summary(folder, values)
        write_card(folder / "README.md", self._files, metadata, kind, mine, self._options.split)


def _form(kind: str) -> str:
    """What tables call a format without eight bits."""
    precision = precision_of(kind)
    return f"{kind.removesuffix(f'_{precision}')}, {precision or 'float32'}"


def _model_files(folder: Path) -> list[Path]:
    """Files of the model, those of an ``.mlpackage`` one folder or more below."""
    found = [path for path in folder.rglob("*") if path.is_file() and path.suffix in _MODEL_FILES]
    return [path for path in found if ".float32" not in path.relative_to(folder).parts]
