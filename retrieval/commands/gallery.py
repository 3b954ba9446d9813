"""The commands ``index``, ``info``, ``build-index`` and ``upgrade``: a gallery is filled, described and kept up."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from retrieval.schema import CHUNK
from vitrail.console import Table
from vitrail.errors import UserError
from vitrail.runs import Run
from vitrail.runtime import check_device
from vitrail.types import DATA_ARGUMENTS

if TYPE_CHECKING:
    from datamodules.base import ImageDataModule
    from lightning_modules.base import VisionTask
    from retrieval.fill import FillReport
    from retrieval.gallery import Gallery
    from retrieval.schema import ModelIdentity


def add_info_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``info``."""
    command.add_argument("--gallery", required=True, metavar="G", help="folder or address of the gallery")


def run_info(options: argparse.Namespace, rest: Sequence[str] = ()) -> None:
    """Print the table."""
    from retrieval.gallery import Gallery

    _description(Gallery.open(options.gallery)).show()


def _description(gallery: Gallery) -> Table:
    made_by = gallery.identity
    counts = gallery.table(["split"]).column("split").value_counts().to_pylist()
    splits = ", ".join(f"{entry['values'] or 'no split'} {entry['counts']:,}" for entry in counts)
    rows = {
        "made by": f"{made_by.task} of {made_by.run or 'an unknown run'}",
        "weights": made_by.weights,
        "images": f"{len(gallery):,}" + (f" ({splits})" if splits else ""),
        "captions with vectors": f"{gallery.n_captions():,}",
        "vectors": f"{made_by.dim} numbers; texts {'can' if made_by.encodes_text else 'cannot'} be compared with them",
        "predicts": ", ".join(_task(made_by, task, len(names)) for task, names in made_by.predicts.items())
        or "nothing",
        "labels": ", ".join(_task(made_by, task) for task in made_by.labels) or "none",
        "images as the model sees them": ", ".join(f"{key} {value}" for key, value in made_by.input_options.items()),
        "index": "built" if gallery.has_index() else "none; search is exact",
        "a filter may use": ", ".join(gallery.columns()),
    }
    return Table(["", "value"], [[*row] for row in rows.items()], None, f"gallery {gallery.uri}", header=False)


def _task(made_by: ModelIdentity, task: str, classes: int = 0) -> str:
    """A task with the number of its classes and its kind, such as ``tags (4, multi_label)``."""
    kind = made_by.kind(task)
    facts = [str(classes)] * bool(classes) + [kind] * (kind != "single_label")
    return f"{task} ({', '.join(facts)})" if facts else task


def add_build_index_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``build-index``."""
    command.description = "Build the approximate index of a very large gallery and print its recall."
    command.add_argument("--gallery", required=True, metavar="G", help="folder or address of the gallery")
    command.add_argument(
        "--sample", type=int, default=200, metavar="N", help="stored vectors that recall is measured on (default: 200)"
    )


def run_build_index(options: argparse.Namespace, rest: Sequence[str] = ()) -> None:
    """Build the index and print its recall."""
    from rich.console import Console

    from retrieval.gallery import EXACT_LIMIT, Gallery
    from vitrail.errors import UserError

    if options.sample < 1:
        raise UserError(f"--sample: must be at least 1; got {options.sample}")
    gallery = Gallery.open(options.gallery)
    with Console(stderr=True).status("building the index, and comparing it with exact search"):
        report = gallery.build_index(sample=options.sample)
    sys.stdout.write(
        f"{options.gallery}: index of {report.rows:,} images; recall@{report.k} against exact search "
        f"{report.recall:.3f} (mean of {report.queries} stored vectors; the worst {report.worst:.1f})\n"
    )
    if report.rows <= EXACT_LIMIT:
        sys.stdout.write(f"search stays exact up to {EXACT_LIMIT:,} images; the index is used past that\n")


def add_upgrade_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``upgrade``."""
    command.description = (
        "Renames the tables and columns of a gallery that version 0.1 made, in place and without reading the images. "
        "A gallery that is up to date is left as it is."
    )
    command.add_argument("--gallery", required=True, metavar="G", help="folder of the gallery")


def run_upgrade(options: argparse.Namespace, rest: Sequence[str] = ()) -> None:
    """Upgrade the gallery, and report how many images it has."""
    from retrieval.gallery import Gallery, upgrade_gallery

    upgraded = upgrade_gallery(options.gallery)
    count = len(Gallery.open(options.gallery))
    sys.stdout.write(f"{options.gallery}: {'upgraded' if upgraded else 'is up to date'}, {count:,} images\n")


SPLITS = ("train", "val", "test")
_SHOWN = 20
_SKIP_IN_YAML = "set data checks.on_bad_image: skip"

_EPILOG = """\
examples:
  python -m retrieval index --run runs/NAME/TIME
  python -m retrieval index --run runs/NAME/TIME --data holiday/ --gallery galleries/holiday
  python -m retrieval index --run runs/NAME/TIME --data experiments/NAME.yaml --data.init_args.root more/
"""


def add_index_arguments(command: argparse.ArgumentParser) -> None:
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


def run_index(options: argparse.Namespace, rest: Sequence[str] = ()) -> None:
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
