"""``python -m experiments export RUN --format onnx``: a trained model as files that others can run.

A format's folder is written whole, and only if what it holds says what the model says: every export is loaded back and
compared with the model on all real pictures of a split, as numbers and on the task.
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

from vitrail.errors import UserError, run_reporting_user_errors
from vitrail.types import DATA_ARGUMENTS

if TYPE_CHECKING:
    from datamodules.base import ImageDataModule
    from experiments.export_timing import Form
    from vitrail.runs import RunFiles

FORMATS = ("onnx", "safetensors", "torch_export")
BATCH_SIZES = [1, 8]
REPEATS = 10
MIN_AGREEMENT = {"": 1.0, "int8": 0.9}

_EPILOG = """\
examples:
  python -m experiments export runs/NAME/TIME                              # ONNX, in runs/NAME/TIME/export/onnx
  python runs/NAME/TIME/export/onnx/predict.py photo.jpg                   # needs no PyTorch
  python -m experiments export runs/NAME/TIME --format onnx torch_export --quantize int8 --markdown
  python -m experiments push_to_hub runs/NAME/TIME/export/onnx --repo owner/name
"""


def main(args: Sequence[str]) -> int:
    """Export a run.

    Args:
        args: arguments after ``export``.

    Returns:
        Exit code: 0, or 2 after a mistake of the user and where parity does not hold.
    """
    options, rest = parser().parse_known_args(list(args))
    if rest and not rest[0].startswith(DATA_ARGUMENTS):
        parser().error(f"unknown argument {rest[0]!r}")
    return run_reporting_user_errors(lambda: _run(options, rest))


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    command = argparse.ArgumentParser(
        prog="python -m experiments export",
        description="Writes a trained model in formats that others can run, compared with the model on real pictures.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument("run", type=Path, metavar="RUN", help="run directory")
    command.add_argument("--format", nargs="+", choices=FORMATS, default=["onnx"], help="(default: onnx)")
    command.add_argument(
        "--quantize", choices=("int8",), default="", help="eight bits: by ONNX Runtime for onnx, else by torchao; timed"
    )
    command.add_argument("--to", type=Path, metavar="FOLDER", help="for a folder each (default: RUN/export)")
    command.add_argument("--checkpoint", default="best", help="its name in checkpoints/ (default: best)")
    command.add_argument("--split", default="test", help="whose pictures are compared on (default: test)")
    command.add_argument("--data-root", metavar="FOLDER", help="where the data are now: data.init_args.root")
    command.add_argument(
        "--min-agreement",
        type=float,
        metavar="SHARE",
        help="of pictures that model and export must decide alike (default: 1, with --quantize 0.9)",
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
    return command


def _run(options: argparse.Namespace, rest: Sequence[str]) -> None:
    _check(options)
    from experiments.export_making import Maker
    from experiments.export_timing import markdown, rich_table
    from lightning_modules.checkpoint import load_task
    from vitrail.console import print_table
    from vitrail.runs import RunFiles

    # What torchao, which peft imports, makes PyTorch tell of its own enumerations.
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    files = RunFiles(options.run)
    if options.checkpoint not in files.checkpoints:
        there = ", ".join(files.checkpoints) or "none"
        raise UserError(f"{options.run}: has no checkpoints/{options.checkpoint}.ckpt; there are {there}")
    task = load_task(files.checkpoints[options.checkpoint])
    datamodule = _data(files, options, rest)
    datamodule.adopt_image_options(task.input_options)
    maker = Maker(task, files, datamodule, options)
    forms: list[Form] = []
    made: list[Path] = []
    root = options.to or options.run / "export"
    with _new_folders(root, [_folder(name, options.quantize) for name in options.format]) as folders:
        forms = maker.make(dict(zip(options.format, folders, strict=True)))
        made = [root / folder.name for folder in folders]
    if options.markdown:
        sys.stdout.write(markdown(forms) + "\n")
        return
    print_table(rich_table(forms))
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
        raise UserError(f"export: needs {', '.join(missing)}; install with `pip install 'vitrine[export]'`")


def _data(files: RunFiles, options: argparse.Namespace, rest: Sequence[str]) -> ImageDataModule:
    """The run's own data, set up for testing."""
    from datamodules.cli import data_of_run
    from vitrail.runs import CONFIG

    if not files.config:
        raise UserError(f"{files.path}: without {CONFIG} it is not known which pictures to compare on")
    arguments = [] if options.data_root is None else ["--data.init_args.root", options.data_root]
    datamodule = data_of_run("python -m experiments export", files.path, [*arguments, *rest])
    datamodule.prepare_data()
    datamodule.setup("test")
    return datamodule


def _folder(name: str, quantize: str) -> str:
    return f"{name}_{quantize}" if quantize else name


@contextmanager
def _new_folders(root: Path, names: Sequence[str]) -> Iterator[list[Path]]:
    """Folders to write to, which take the place of older ones once the block has ended without an error."""
    root.mkdir(parents=True, exist_ok=True)
    place = root / f".{os.getpid()}.part"
    folders = [place / name for name in names]
    try:
        for folder in folders:
            if (old := root / folder.name).exists() and not (old / "export.json").is_file():
                raise UserError(f"{old}: is there and no export; name another folder with --to")
            folder.mkdir(parents=True)
        yield folders
        for folder in folders:
            if (root / folder.name).exists():
                (root / folder.name).rename(place / f"old.{folder.name}")
            folder.rename(root / folder.name)
    finally:
        shutil.rmtree(place, ignore_errors=True)
        # Where nothing was made, not even an empty folder stays.
        if not any(root.iterdir()):
            root.rmdir()
