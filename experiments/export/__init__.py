"""``python -m experiments export RUN --format onnx``: a trained model as files that others can run.

A format's folder is written atomically, and only if its files reproduce the model: every export is loaded back and
compared with the model on all real images of a split, by its outputs and on the task. With eight bits it is timed, too.
"""

from __future__ import annotations

import argparse
import copy
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.export import ExportedProgram

from datamodules.base import ImageDataModule
from evaluation.efficiency import BatchCost
from experiments.export import predict_onnx
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
from experiments.export.parity import TOLERANCE, Form, interleaved, measure, parity_table, refuse_disagreement
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
from vitrail.errors import UserError
from vitrail.files import rename
from vitrail.runs import Run

FORMATS = ("onnx", "safetensors", "torch_export")
BATCH_SIZES = [1, 8]
REPEATS = 10
MIN_AGREEMENT = {"": 1.0, "int8": 0.9}

_EPILOG = """\
examples:
  python -m experiments export runs/NAME/TIME                              # ONNX, in runs/NAME/TIME/export/onnx
  python runs/NAME/TIME/export/onnx/predict.py photo.jpg                   # needs no PyTorch
  python -m experiments export runs/NAME/TIME --format onnx torch_export --quantize int8 --markdown
  python -m experiments push-to-hub runs/NAME/TIME/export/onnx --repo owner/name
"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``export``."""
    command.description = "Writes a trained model in formats that others can run, compared with it on real images."
    command.epilog = _EPILOG
    command.add_argument("run", type=Path, metavar="RUN", help="run directory")
    command.add_argument("--format", nargs="+", choices=FORMATS, default=["onnx"], help="(default: onnx)")
    command.add_argument(
        "--quantize", choices=("int8",), default="", help="eight bits: by ONNX Runtime for onnx, else by torchao; timed"
    )
    command.add_argument("--to", type=Path, metavar="FOLDER", help="for a folder each (default: RUN/export)")
    command.add_argument("--checkpoint", default="best", help="its name in checkpoints/ (default: best)")
    command.add_argument("--split", default="test", help="whose images are compared on (default: test)")
    command.add_argument("--data-root", metavar="FOLDER", help="where the data are now: data.init_args.root")
    command.add_argument(
        "--min-agreement",
        type=float,
        metavar="SHARE",
        help="of images that model and export must decide alike (default: 1, with --quantize 0.9)",
    )
    command.add_argument("--batch-sizes", nargs="+", type=int, default=BATCH_SIZES, metavar="N", help="that are timed")
    command.add_argument(
        "--repeats",
        type=int,
        default=REPEATS,
        metavar="N",
        help=f"rounds that are timed, 0 for none (default: {REPEATS})",
    )
    command.add_argument("--markdown", action="store_true", help="print a Markdown table")


def run(options: argparse.Namespace, rest: Sequence[str]) -> None:
    """Export the run and print what was compared.

    Raises:
        UserError: something is missing, or parity does not hold.
    """
    _check(options)
    # Warnings of PyTorch about its own enumerations, caused by torchao, which peft imports.
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    files = Run(options.run)
    task: VisionTask = files.load_model(options.checkpoint)
    datamodule = _data(files, options, rest)
    datamodule.adopt_image_options(task.input_options)
    maker = Maker(task, files, datamodule, options)
    forms: list[Form] = []
    made: list[Path] = []
    root = options.to or options.run / Run.EXPORTS
    with _new_folders(root, [_folder(name, options.quantize) for name in options.format]) as folders:
        forms = maker.make(dict(zip(options.format, folders, strict=True)))
        made = [root / folder.name for folder in folders]
    parity_table(forms).show(as_markdown=options.markdown)
    if options.markdown:
        return
    for folder in made:
        sys.stdout.write(f"{folder} has the model; {folder / 'README.md'} its card\n")


def _check(options: argparse.Namespace) -> None:
    if options.repeats < 0 or min(options.batch_sizes) < 1:
        raise UserError("--repeats must be at least 0, --batch-sizes at least 1")
    if options.min_agreement is None:
        options.min_agreement = MIN_AGREEMENT[options.quantize]
    if not 0 <= options.min_agreement <= 1:
        raise UserError(f"--min-agreement: is a share between 0 and 1, got {options.min_agreement}")
    options.format = list(dict.fromkeys(options.format))
    needed = {"onnx": ["onnx", "onnxscript", "onnxruntime"]}
    modules = [module for name in options.format for module in needed.get(name, [])]
    modules += ["torchao"] if options.quantize and set(options.format) - {"onnx"} else []
    from importlib.util import find_spec

    if missing := [module for module in modules if find_spec(module) is None]:
        raise UserError(f"export: needs {', '.join(missing)}; install with `pip install 'vitrail[export]'`")


def _data(files: Run, options: argparse.Namespace, rest: Sequence[str]) -> ImageDataModule:
    """Return the run's own data, set up for testing."""
    if not files.config:
        raise UserError(f"{files.path}: without {Run.CONFIG} it is not known which images to compare on")
    arguments = [] if options.data_root is None else ["--data.init_args.root", options.data_root]
    datamodule: ImageDataModule = files.load_datamodule([*arguments, *rest])
    datamodule.prepare_data()
    datamodule.setup("test")
    return datamodule


def _folder(name: str, quantize: str) -> str:
    return f"{name}_{quantize}" if quantize else name


@contextmanager
def _new_folders(root: Path, names: Sequence[str]) -> Iterator[list[Path]]:
    """Give folders to write to, which replace older ones once the block has ended without an error."""
    root.mkdir(parents=True, exist_ok=True)
    place = root / f".{os.getpid()}.part"
    folders = [place / name for name in names]
    try:
        for folder in folders:
            if (old := root / folder.name).exists() and not (old / "export.json").is_file():
                raise UserError(f"{old}: exists and is not an export; choose another folder with --to")
            folder.mkdir(parents=True)
        yield folders
        for folder in folders:
            if (root / folder.name).exists():
                rename(root / folder.name, place / f"old.{folder.name}")
            rename(folder, root / folder.name)
    finally:
        shutil.rmtree(place, ignore_errors=True)
        # Where nothing was made, not even an empty folder stays.
        if not any(root.iterdir()):
            root.rmdir()


OWN = "PyTorch"
_SUFFIX = {"onnx": ".onnx", "torch_export": ".pt2"}
_TOOL = {"onnx": "ONNX Runtime", "torch_export": "torchao", "safetensors": "torchao, weights"}


class _Written(NamedTuple):
    kind: str
    folder: Path
    eight_bits: bool


class Maker:
    """Exports one task."""

    def __init__(self, task: VisionTask, files: Run, datamodule: ImageDataModule, options: argparse.Namespace) -> None:
        self._task, self._files, self._data, self._options = task, files, datamodule, options
        self._towers = towers_of(task)
        self._metadata = metadata_of(task, files, options.checkpoint)
        self._graphs: dict[str, ExportedProgram] = {}
        self._calibration: list[Any] = []

    def make(self, folders: Mapping[str, Path]) -> list[Form]:
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
        if kind != "safetensors":
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
