"""``python -m evaluation explore``: one page, with a PNG and a CSV for each part, of what is in a data set."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from datamodules.table import composed
from vitrail.errors import UserError
from vitrail.predictions import other_kinds
from vitrail.types import CLASS_KINDS, DATA_ARGUMENTS, kind_of

if TYPE_CHECKING:
    from datamodules.base import ImageDataModule
    from evaluation.dataset.sections import Collection, ImageStats
    from retrieval.schema import ModelIdentity

_EPILOG = """\
examples:
  python -m evaluation explore --config experiments/quickstart.yaml --to exploration/wares
  python -m evaluation explore --data datamodules.ImageFolder --data.init_args.root photos/ --to exploration/photos
"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``explore``."""
    command.epilog = _EPILOG
    add_data_arguments(command)
    command.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="for explore.html, PNG and CSV files")
    command.add_argument("--task", type=composed, help="whose classes are shown in detail (default: the main task)")
    command.add_argument(
        "--classes",
        nargs="+",
        default=[],
        type=composed,
        metavar="C",
        help="to show colours of (default: the 6 most frequent)",
    )
    command.add_argument("--images", type=int, default=3000, metavar="N", help="read, sampled evenly (default: 3000)")
    command.add_argument("--side", type=int, default=128, help="that images are scaled to for colours (default: 128)")
    command.add_argument("--pixels", type=int, default=5000, help="sampled of each image for colours (default: 5000)")
    command.add_argument("--neighbours", type=int, default=8, help="of a class on the map (default: 8)")
    command.add_argument("--gallery", metavar="G", help="its vectors check the labels, instead of pixels")
    command.add_argument("--folds", type=int, default=5, help="that check the labels (default: 5)")
    command.add_argument("--seed", type=int, default=0, help="of all sampling (default: 0)")


def add_data_arguments(command: argparse.ArgumentParser) -> None:
    """Arguments that name a data set; ``--data.init_args.KEY VALUE`` may follow."""
    command.add_argument(
        "--config", action="append", default=[], help="experiment YAML whose data: part is read; repeatable"
    )
    command.add_argument("--data", metavar="CLASS", help="a DataModule, with --data.init_args.KEY VALUE")


def run(options: argparse.Namespace, rest: Sequence[str] = ()) -> None:
    """Write the page and print where it is.

    Raises:
        UserError: for every mistake in what was asked, and for data without a readable image.
    """
    for name, least in (("images", 1), ("side", 8), ("pixels", 1), ("neighbours", 1), ("folds", 2), ("seed", 0)):
        if getattr(options, name) < least:
            raise UserError(f"--{name}: is {getattr(options, name)}, must be at least {least}")
    from evaluation.dataset import checks, sections
    from evaluation.report.page import Page

    datamodule = data_of("explore", options, rest)
    collection, seed = collection_of(datamodule), options.seed
    task = sections.main_task(collection, options.task)
    stats = sections.look_at(collection, collection.sample(options.images, seed))
    rows, features, origin = _label_features(collection, stats, options.gallery)
    parts = [
        sections.splits_section(collection),
        sections.class_section(collection),
        *([sections.labels_section(collection)] if any(collection.others.values()) else []),
        *([sections.numbers_section(collection)] if not all(collection.others.values()) else []),
        sections.size_section(stats),
        sections.density_section(
            collection, stats, task, options.classes, side=options.side, pixels=options.pixels, seed=seed
        ),
        sections.centroid_section(collection, stats, task, neighbours=options.neighbours),
        sections.caption_section(collection),
        sections.cooccurrence_section(collection),
        checks.leak_section(collection, datamodule.audit().to_dict()),
        checks.label_section(collection, task, rows, features, origin, folds=options.folds, seed=seed),
    ]
    table = datamodule.table
    lead = [
        f"{table.origin}, fingerprint {table.fingerprint()[:12]}.",
        f"What needs images was computed from {stats.summary}, sampled with seed {seed}.",
    ]
    if left_out := other_kinds(table.tasks, table.kinds):
        lead.append(
            f"Colours, labels that go together and suspected labels are of tasks with a single class; {left_out} are "
            "left out there."
        )
    page = Page(f"What is in {collection.name}", lead, parts).write(options.to, "explore")
    sys.stdout.write(f"{page} has the page, and the folder its figures and tables\n")


def data_of(command: str, options: argparse.Namespace, rest: Sequence[str]) -> ImageDataModule:
    """The DataModule that ``add_data_arguments`` names.

    Raises:
        UserError: where none is named, and for arguments that are not the data's.
    """
    from datamodules.cli import load_datamodule

    if strange := [one for one in rest if one.startswith("-") and not one.startswith(DATA_ARGUMENTS)]:
        raise UserError(f"{command}: unknown argument {strange[0]!r}; see python -m evaluation {command} --help")
    if not options.config and options.data is None:
        raise UserError(f"{command}: name the data with --config EXPERIMENT.yaml or --data CLASS")
    given = ["--data", options.data] if options.config and options.data is not None else []
    return load_datamodule(options.config or options.data, [*given, *rest], f"python -m evaluation {command}")


def collection_of(datamodule: ImageDataModule) -> Collection:
    """Return a data set as the sections take it; unreadable images are noted, not refused."""
    from evaluation.dataset.sections import SPLITS, Collection

    datamodule.check_options = replace(datamodule.check_options, on_bad_image="skip")
    datamodule.verify()
    table = datamodule.table
    # Generated images need no check.
    skipped = {} if datamodule.generated else dict(datamodule.verification().bad)

    def read(row: int) -> NDArray[np.uint8]:
        pixels: NDArray[np.uint8] = datamodule.read_image(row).permute(1, 2, 0).contiguous().numpy()
        return pixels

    def captions(rows: NDArray[np.int64]) -> list[list[str]]:
        return table.caption_lists.of(rows.tolist())

    of_classes = [task for task in table.tasks if kind_of(table.kinds, task) in CLASS_KINDS]
    others = [task for task in table.tasks if task not in of_classes]
    return Collection(
        name=type(datamodule).__name__,
        names=table.names.to_numpy(zero_copy_only=False),
        groups=table.groups.to_numpy(zero_copy_only=False),
        splits=np.array(SPLITS, dtype=object)[table.split_codes],
        tasks={task: table.tasks[task] for task in of_classes},
        targets={task: table.targets[task] for task in of_classes},
        usable=np.setdiff1d(np.arange(len(table)), list(skipped)).astype(np.int64),
        unreadable=skipped,
        read=read,
        captions=captions if any(any(texts) for texts in _captions(table)) else None,
        others={task: table.tasks[task] or [] for task in others},
        other_targets={task: table.targets[task] for task in others},
    )


def gallery_vectors(
    collection: Collection, gallery: str
) -> tuple[NDArray[np.int64], NDArray[np.float32], ModelIdentity]:
    """Those of the collection's images that a gallery has.

    Returns:
        Rows int64 ``(n,)``, their vectors float32 ``(n, D)``, and the model that made them.

    Raises:
        UserError: where there is no gallery, or it has none of the images.
    """
    from retrieval.gallery import Gallery

    opened = Gallery.open(gallery)
    there = set(opened.table(["id"]).column("id").to_pylist())
    rows = np.array([row for row in collection.usable.tolist() if collection.names[row] in there], np.int64)
    if not len(rows):
        raise UserError(f"--gallery {gallery}: has none of the data's images; fill it with python -m retrieval index")
    return rows, opened.vectors([str(name) for name in collection.names[rows]]), opened.identity


def _label_features(
    collection: Collection, stats: ImageStats, gallery: str | None
) -> tuple[NDArray[np.int64], Any, str]:
    """Rows with features, the features, and what they are called."""
    if gallery is None:
        return stats.rows, stats.features, "colours and edges of the images (--gallery takes a model's vectors)"
    rows, vectors, made_by = gallery_vectors(collection, gallery)
    trained = "where it was trained on these labels, it may repeat the wrong ones"
    return rows, vectors, f"vectors of {made_by.task} ({made_by.run}; {trained})"


def _captions(table: Any) -> Iterator[list[str]]:
    """Yield the captions of each sample."""
    for start in range(0, len(table), 4096):
        yield from table.caption_lists.of(range(start, min(start + 4096, len(table))))
