"""``python -m experiments export RUN --format onnx``: a trained model as files that others can run.

A format's folder is written atomically, and only if its files reproduce the model: every export is loaded back and
compared with the model on all real images of a split, by its outputs and on the task. With eight bits it is timed, too.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from vitrail.errors import EXTRAS, UserError
from vitrail.files import rename
from vitrail.runs import Run

if TYPE_CHECKING:
    from datamodules.base import ImageDataModule

LAYOUTS = ("timm", "transformers", "open_clip", "peft")
"""Formats of other libraries, see ``layouts``."""

RUNTIMES = ("onnx_fp16", "onnx_bf16", "openvino", "openvino_fp16", "executorch", "coreml", "coreml_fp16")
"""Formats for runtimes of other makers, and ONNX in 16 bits, see ``runtimes``."""

FORMATS = ("onnx", *RUNTIMES, "safetensors", "torch_export", *LAYOUTS)
BATCH_SIZES = [1, 8]
REPEATS = 10
MIN_AGREEMENT = {"": 1.0, "fp16": 0.98, "bf16": 0.95, "int8": 0.9}
_MODULES = {
    "onnx": ["onnx", "onnxscript", "onnxruntime"],
    "openvino": ["openvino", "onnx", "onnxscript"],
    "executorch": ["executorch"],
    "coreml": ["coremltools"],
    "open_clip": ["open_clip"],
}
"""What formats need, by what their names begin with."""

_EPILOG = """\
examples:
  python -m experiments export runs/NAME/TIME                              # ONNX, in runs/NAME/TIME/export/onnx
  python runs/NAME/TIME/export/onnx/predict.py photo.jpg                   # needs no PyTorch
  python -m experiments export runs/NAME/TIME --format onnx torch_export --quantize int8 --markdown
  python -m experiments export runs/NAME/TIME --format onnx_fp16 openvino executorch coreml --repeats 10 --markdown
  python -m experiments export runs/NAME/TIME --format timm                # or transformers, open_clip, peft
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
        help="of images that model and export must decide alike (default: 1, fp16 0.98, bf16 0.95, int8 0.9)",
    )
    command.add_argument("--batch-sizes", nargs="+", type=int, default=BATCH_SIZES, metavar="N", help="that are timed")
    command.add_argument(
        "--repeats",
        type=int,
        metavar="N",
        help=f"rounds that are timed (default: {REPEATS} with --quantize, else none)",
    )
    command.add_argument("--markdown", action="store_true", help="print a Markdown table")


def run(options: argparse.Namespace, rest: Sequence[str]) -> None:
    """Export the run and print what was compared.

    Raises:
        UserError: something is missing, or parity does not hold.
    """
    _check(options)
    from experiments.export.exporter import Exporter
    from experiments.export.parity import parity_table
    from experiments.export.predict_onnx import DETECTOR

    # Warnings of PyTorch about its own enumerations, caused by torchao, which peft imports.
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    files = Run(options.run)
    task = files.load_model(options.checkpoint)
    datamodule = _data(files, options, rest)
    datamodule.adopt_image_options(task.input_options)
    exporter = Exporter(task, files, datamodule, options)
    root = options.to or options.run / Run.EXPORTS
    with _new_folders(root, [_folder(name, options.quantize) for name in options.format]) as folders:
        forms = exporter.export(dict(zip(options.format, folders, strict=True)))
        made = [root / folder.name for folder in folders]
    parity_table(forms).show(as_markdown=options.markdown)
    if options.markdown:
        return
    for folder in made:
        sys.stdout.write(f"{folder} has the model; {folder / 'README.md'} its card\n")
        if (detector := folder / DETECTOR).is_file():
            sys.stdout.write(f"{detector}: {detector.stat().st_size / 1e6:.2f} MB, to recognise unknown images\n")


def _check(options: argparse.Namespace) -> None:
    if options.repeats is None:
        options.repeats = REPEATS if options.quantize else 0
    if options.repeats < 0 or min(options.batch_sizes) < 1:
        raise UserError("--repeats must be at least 0, --batch-sizes at least 1")
    if options.min_agreement is not None and not 0 <= options.min_agreement <= 1:
        raise UserError(f"--min-agreement: is a share between 0 and 1, got {options.min_agreement}")
    options.format = list(dict.fromkeys(options.format))
    if options.quantize and (others := set(options.format) & set(LAYOUTS)):
        raise UserError(f"--quantize: the layout of {min(others)} has float32 weights; leave one of the two out")
    if options.quantize and (given := [name for name in options.format if name in RUNTIMES]):
        raise UserError(
            f"--quantize: {given[0]} is not written in eight bits; choose onnx, torch_export or safetensors"
        )
    modules = ["torchao"] if options.quantize and set(options.format) - {"onnx"} else []
    for name in options.format:
        modules += next((needed for start, needed in _MODULES.items() if name.startswith(start)), [])
    from importlib.util import find_spec

    if missing := [module for module in modules if find_spec(module) is None]:
        extras = ",".join(sorted({EXTRAS[module] for module in missing}))
        raise UserError(
            f"export: needs {', '.join(dict.fromkeys(missing))}; install with `pip install 'vitrail[{extras}]'`"
        )


def _data(files: Run, options: argparse.Namespace, rest: Sequence[str]) -> ImageDataModule:
    """Return the run's own data, set up for testing."""
    if not files.config:
        raise UserError(f"{files.path}: without {Run.CONFIG} it is not known which images to compare on")
    arguments = [] if options.data_root is None else ["--data.init_args.root", options.data_root]
    datamodule: ImageDataModule = files.load_datamodule([*arguments, *rest])
    datamodule.prepare_data()
    datamodule.setup("test")
    return datamodule


def precision_of(kind: str) -> str:
    """Return ``fp16``, ``bf16``, or an empty text for a format in float32."""
    end = kind.rpartition("_")[2]
    return end if end in ("fp16", "bf16") else ""


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
            if (old := root / folder.name).exists() and not (old / Run.EXPORT).is_file():
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
