"""``python -m retrieval index``: a trained model and a data set, or a folder of images, become a gallery."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from retrieval.schema import CHUNK
from vitrail.errors import UserError
from vitrail.runs import Run
from vitrail.runtime import check_device
from vitrail.types import DATA_ARGUMENTS

if TYPE_CHECKING:
    from datamodules.base import ImageDataModule
    from lightning_modules.base import VisionTask
    from retrieval.fill import FillReport

SPLITS = ("train", "val", "test")
_SHOWN = 20
_SKIP_IN_YAML = "set data checks.on_bad_image: skip"

_EPILOG = """\
examples:
  python -m retrieval index --run runs/NAME/TIME
  python -m retrieval index --run runs/NAME/TIME --data holiday/ --gallery galleries/holiday
  python -m retrieval index --run runs/NAME/TIME --data experiments/NAME.yaml --data.init_args.root more/
"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``index``."""
    command.description = "Images are prepared as in the model's training, whatever size the data's configuration has."
    command.epilog = _EPILOG
    command.add_argument("--run", type=Path, required=True, metavar="RUN", help="run directory of the model")
    command.add_argument("--gallery", metavar="G", help="folder or address of the gallery (default: RUN/gallery)")
    command.add_argument(
        "--data",
        metavar="DATA",
        help="an experiment's YAML, a folder of images, a table, or a DataModule with --data.init_args.KEY VALUE "
        "(default: the run's own)",
    )
    command.add_argument("--splits", nargs="+", choices=SPLITS, default=list(SPLITS), help="default: all of them")
    command.add_argument("--checkpoint", default="best", metavar="C", help="best, last or a file (default: best)")
    command.add_argument("--device", help="to compute on, such as cpu, cuda or mps (default: a GPU where there is one)")
    command.add_argument(
        "--thumbnails",
        choices=("auto", "always", "never"),
        default="auto",
        help="small images in the gallery; auto: where images are not files of their own (default)",
    )
    command.add_argument("--on-bad-image", choices=("error", "skip"), help="stop at unreadable images, or list them")
    command.add_argument(
        "--dim",
        type=int,
        metavar="D",
        help="keep the first D numbers of each embedding, for models trained with loss_options.matryoshka",
    )
    command.add_argument(
        "--chunk", type=int, default=CHUNK, metavar="N", help=f"images a commit, in whole batches (default: {CHUNK})"
    )


def run(options: argparse.Namespace, rest: Sequence[str] = ()) -> None:
    """Fill the gallery and print how many images were added, replaced, renewed and left out."""
    if options.chunk < 1:
        raise UserError(f"--chunk: must be at least 1; got {options.chunk}")
    datamodule = _data(options, rest)
    task = _model(options)
    if options.on_bad_image is not None:
        datamodule.check_options = replace(datamodule.check_options, on_bad_image=options.on_bad_image)
    uri = options.gallery or str(options.run / Run.GALLERY)
    report = _filled(task, datamodule, uri, options)
    if options.data is None and not rest and set(options.splits) == set(SPLITS):
        from retrieval.fill import mark_complete

        mark_complete(uri)  # the application does not index it again
    sys.stdout.write(f"Gallery {uri}: {report}\n")
    _print_left_out(datamodule, report)


def _filled(task: VisionTask, datamodule: ImageDataModule, uri: str, options: argparse.Namespace) -> FillReport:
    from retrieval.fill import fill
    from retrieval.gallery import Gallery
    from retrieval.schema import identity_of
    from vitrail.console import tracked

    # Images are prepared as the model's, whatever the configuration of other data is.
    datamodule.image_options = {**task.input_options}
    run = str(options.run.resolve())
    identity = identity_of(task, run, task.input_options, datamodule.tasks, datamodule.task_kinds)
    if options.dim is not None:
        if not 1 <= options.dim <= identity.dim:
            raise UserError(f"--dim: must be between 1 and the model's {identity.dim}; got {options.dim}")
        trained = [*getattr(task, "shorter_lengths", []), identity.dim]
        if options.dim not in trained:
            lengths = ", ".join(map(str, trained))
            sys.stderr.write(f"index: the model was trained for the lengths {lengths}, not for --dim {options.dim}\n")
        identity = replace(identity, dim=options.dim)
    gallery = Gallery.open_or_create(uri, identity)
    _set_up(datamodule)
    return fill(
        task,
        datamodule,
        gallery,
        splits=options.splits,
        run=run,
        chunk=options.chunk,
        thumbnails=options.thumbnails,
        progress=lambda batches, total: tracked(batches, "encoding, in batches", total),
    )


def _data(options: argparse.Namespace, rest: Sequence[str]) -> ImageDataModule:
    """The DataModule of ``--data``, by default the run's own."""
    from datamodules.cli import load_datamodule

    if not options.run.is_dir():
        raise UserError(f"--run {options.run}: there is no such directory; give one such as runs/NAME/TIME")
    if strange := [one for one in rest if one.startswith("-") and not one.startswith(DATA_ARGUMENTS)]:
        raise UserError(f"index: unknown argument {strange[0]!r}; see python -m retrieval index --help")
    if options.data is None:
        own: ImageDataModule = Run(options.run).load_datamodule(rest)
        return own
    if "/" in options.data and not Path(options.data).expanduser().exists():
        raise UserError(f"--data {options.data}: there is no such folder or experiment file")
    return load_datamodule(options.data, rest, "python -m retrieval index")


def _model(options: argparse.Namespace) -> VisionTask:

    from lightning_modules.checkpoint import load_task

    device = check_device(options.device or "auto")
    if options.checkpoint in ("best", "last"):
        return load_task(Run(options.run).checkpoint(options.checkpoint), device)
    return load_task(options.checkpoint, device)


def _set_up(datamodule: ImageDataModule) -> None:
    """Prepare the data, which finds unreadable images."""
    # Leaks between splits do not matter to a gallery.
    datamodule.check_options = replace(datamodule.check_options, allow_leaks=["groups", "exact", "near"])
    try:
        datamodule.prepare_data()
        datamodule.setup("predict")
    except UserError as error:
        if _SKIP_IN_YAML not in str(error):
            raise
        raise UserError(str(error).replace(_SKIP_IN_YAML, "give --on-bad-image skip")) from error


def _print_left_out(datamodule: ImageDataModule, report: FillReport) -> None:
    reasons = [f"{entry['name']}: {entry['reason']}" for entry in datamodule.data_record()["skipped"]]
    reasons += [f"{name}: cannot be read" for name in report.left_out]
    if reasons:
        sys.stdout.write(f"Left out, because they cannot be read: {len(reasons)}\n")
    for line in reasons[:_SHOWN]:
        sys.stdout.write(f"  {line}\n")
    if len(reasons) > _SHOWN:
        sys.stdout.write(f"  and {len(reasons) - _SHOWN} more\n")
