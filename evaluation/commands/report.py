"""``python -m evaluation report RUN``: everything known about a run, on one page, each number read from its files.

What cannot be shown is reported as missing, with the command that makes it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vitrail.errors import UserError
from vitrail.files import write_text_atomically
from vitrail.runs import Run
from vitrail.types import CLASS_KINDS

if TYPE_CHECKING:
    from datamodules.base import ImageDataModule
    from evaluation.report.images import ReadImage
    from evaluation.report.page import Section, Summary
    from evaluation.retrieval import Row
    from evaluation.tables.summary import TaskSummary

NAME = "report"

_EPILOG = """\
examples:
  python -m evaluation report runs/NAME/TIME
  python -m evaluation report runs/NAME/TIME --split val --to somewhere/
  python -m evaluation report runs/NAME/TIME --data.init_args.root photos/
"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``report``."""
    command.epilog = _EPILOG
    command.add_argument("run", type=Path, metavar="RUN", help="run directory, of an interrupted run too")
    command.add_argument("--split", default="test", help="split whose predictions are evaluated (default: test)")
    command.add_argument("--to", type=Path, metavar="FOLDER", help="for report.html and report.md (default: RUN)")
    command.add_argument("--data-root", metavar="FOLDER", help="where the data are now: data.init_args.root")
    command.add_argument("--no-data", action="store_true", help="leave out what needs the data: images and leaks")
    command.add_argument("--gallery", metavar="G", help="for the map and retrieval (default: RUN/gallery)")
    command.add_argument(
        "--mistakes", type=int, default=96, metavar="N", help="mistakes of a task that have their image (default: 96)"
    )
    command.add_argument("--seed", type=int, default=0, help="of all sampling (default: 0)")


def run(options: argparse.Namespace, rest: Sequence[str] = (), datamodule: ImageDataModule | None = None) -> None:
    """Write the report, and print where it is and how much is missing.

    Args:
        options: see ``add_arguments``.
        rest: arguments of the data.
        datamodule: the run's own data, where they are at hand; otherwise they are set up from its configuration.

    Raises:
        UserError: the directory is no run, or an option is not as it must be.
    """
    from evaluation.report.page import Page

    if options.mistakes < 1:
        raise UserError(f"--mistakes: is {options.mistakes}, must be at least 1")
    files = Run(options.run)
    folder = options.to or options.run
    summary, sections = parts_of(files, options, rest, datamodule)
    lead = [
        f"Made of the files in {options.run} by `python -m evaluation report`. Charts, images and tables are also "
        f"files in {NAME}/."
    ]
    page = Page(title_of(files), lead, sections, summary)
    write_text_atomically(folder / f"{NAME}.md", page.markdown(NAME))
    path = page.write(folder, NAME, files=folder / NAME)
    _remove_old_files(folder / NAME, set(page.files))
    gaps = sum(bool(section.missing) for section in sections)
    sys.stdout.write(f"{path} has the page, {folder / NAME}.md the same as Markdown")
    sys.stdout.write(
        f"; {gaps} of {len(sections)} sections are incomplete and list what is missing\n" if gaps else "\n"
    )


def title_of(files: Run) -> str:
    """Return the name of a run's experiment, or of the data set that it was evaluated on, without the time."""
    path = files.path.resolve()
    if path.parent.name == Run.EVALUATIONS:
        return f"{path.parents[2].name} on {path.name}"
    name = files.record.get("name") or files.config.get("name")
    return name if isinstance(name, str) and name else path.parent.name


def _remove_old_files(folder: Path, written: set[str]) -> None:
    """Remove files of an earlier report, as ``files.json`` lists them, so that no old number stays next to new ones."""
    listed = folder / "files.json"
    try:
        old = {str(name) for name in json.loads(listed.read_text(encoding="utf-8"))}
    except (OSError, ValueError, TypeError):
        old = set()
    for name in old - written:
        if Path(name).name == name:
            (folder / name).unlink(missing_ok=True)
    write_text_atomically(listed, json.dumps(sorted(written), indent=1) + "\n")


def parts_of(
    files: Run, options: argparse.Namespace, rest: Sequence[str], datamodule: ImageDataModule | None = None
) -> tuple[Summary, list[Section]]:
    """Make the summary and all sections in order; those that cannot be made report what is missing."""
    from evaluation.report import data_quality, images, labels, robustness, sections, thresholds
    from evaluation.report.summary import run_summary
    from evaluation.tables.summary import summarise, train_targets_of

    split = options.split
    predictions = files.predictions(split)
    tasks = {} if predictions is None else predictions.tasks
    datamodule, why_not = (datamodule, "") if datamodule else data_of_run(files, options, rest)
    read = None if datamodule is None else reader(datamodule)
    summaries: list[TaskSummary] = []
    details = [_without("Scores, classes, confusions, calibration, mistakes", files.problem_of(split))]
    if predictions is not None:
        temperatures, counts = files.temperatures_for(split), files.class_counts(predictions.tasks)
        train = train_targets_of(files, predictions.tasks, counts)
        summaries = summarise(predictions, train, files.name, split)
        details = [
            sections.scores_section(predictions, summaries, split),
            images.mistakes_section(predictions, temperatures, split, options.mistakes, read, why_not),
        ]
        if other := files.other_checkpoint(split):
            details[0].missing.append(f"These predictions are of checkpoint {other}, not of the best one.")
        classes, labelled, numbers = (
            predictions.of_kinds(*kinds) for kinds in (CLASS_KINDS, ("multi_label",), ("regression",))
        )
        if classes.tasks:
            details += [
                sections.confusion_section(classes, split),
                sections.classes_section(classes, counts, split),
                sections.calibration_section(classes, temperatures, split, str(files.path)),
            ]
        details += [labels.labels_section(labelled, counts, split)] if labelled.tasks else []
        details += [labels.numbers_section(numbers, split)] if numbers.tasks else []
        if (others := predictions.of_kinds("multi_label", "regression")).tasks:
            fitted, val = files.output_calibration_for(split), files.predictions("val")
            details.append(labels.outputs_calibration_section(others, val, fitted, split, str(files.path)))
        with_thresholds = predictions.of_kinds(*CLASS_KINDS, "multi_label")
        details += [thresholds.thresholds_section(with_thresholds, split)] if with_thresholds.tasks else []
    made = [
        *details,
        robustness.slices_section(files, split),
        robustness.corruptions_section(files),
        robustness.unknown_images_section(files),
        *([robustness.other_data_section(files)] if files.evaluations else []),
        *_gallery_sections(files, options, next(iter(tasks), ""), read),
        images.curves_section(files),
        sections.efficiency_section(files),
        sections.data_section(files),
        _leaks(datamodule, why_not),
        data_quality.data_quality_section(files, read, options.mistakes),
        sections.run_section(files),
        sections.configuration_section(files),
        sections.environment_section(files),
    ]
    return run_summary(files, split, summaries, _retrieval_rows(files, split), made), made


def _retrieval_rows(files: Run, split: str) -> list[Row]:
    from evaluation.retrieval import read_report

    path = files.path / Run.REPORTS / f"{split}_retrieval.csv"
    try:
        return read_report(path) if path.is_file() else []
    except UserError:
        return []  # the section shows the file as it is


def reader(datamodule: ImageDataModule) -> ReadImage:
    """Return a function that reads images by their stable names; None for those that cannot be read."""
    from datamodules.loading.decode import ImageError

    rows = {name: row for row, name in enumerate(datamodule.sample_names())}

    def read(name: str) -> NDArray[np.uint8] | None:
        if name not in rows:
            return None
        try:
            pixels: NDArray[np.uint8] = datamodule.read_image(rows[name]).permute(1, 2, 0).contiguous().numpy()
        except (ImageError, OSError):
            return None
        return pixels

    return read


def data_of_run(files: Run, options: argparse.Namespace, rest: Sequence[str]) -> tuple[ImageDataModule | None, str]:
    """Return the run's own data, or why they are not there, by ``--no-data`` and ``--data-root``."""
    if options.no_data:
        return None, "Left out as asked (--no-data)."
    if not files.config:
        return None, f"Without {Run.CONFIG} it is not known which data the run had."
    arguments = [] if options.data_root is None else ["--data.init_args.root", options.data_root]
    try:
        datamodule: ImageDataModule = files.load_datamodule([*arguments, *rest])
        # What cannot be read leaves a gap on the page, no more.
        datamodule.check_options = replace(datamodule.check_options, on_bad_image="skip")
        datamodule.prepare_data()
        _ = datamodule.table
    except UserError as error:
        return None, f"The run's data are not there: {error}"
    return datamodule, ""


def _leaks(datamodule: ImageDataModule | None, why_not: str) -> Section:
    from evaluation.commands.dataset.explore import collection_of
    from evaluation.dataset.checks import leak_section

    title = "Leaks between splits"
    if datamodule is None:
        return _without(title, why_not)
    try:
        return leak_section(collection_of(datamodule), datamodule.audit().to_dict())
    except UserError as error:
        return _without(title, str(error))


def _gallery_sections(files: Run, options: argparse.Namespace, task: str, read: ReadImage | None) -> list[Section]:
    from evaluation.report.images import map_section
    from evaluation.report.sections import retrieval_section
    from retrieval.gallery import Gallery

    why_not, gallery = "", None
    if options.gallery is None and not (files.path / Run.GALLERY).exists():
        needs = "" if files.checkpoints else " It needs a checkpoint, and the run has none."
        why_not = f"There is no gallery of this run: `python -m retrieval index --run {files.path}` makes it.{needs}"
    else:
        try:
            gallery = Gallery.open(options.gallery or str(files.path / Run.GALLERY))
        except UserError as error:
            if options.gallery is not None:
                raise
            why_not = str(error)
    if gallery is None or not len(gallery):
        why_not = why_not or f"{'' if gallery is None else gallery.uri}: the gallery is empty."
        return [_without(title, why_not) for title in ("Embedding map", "Retrieval examples")]
    # Maps and examples are by single classes.
    known = [
        name
        for name in (*gallery.identity.labels, *gallery.identity.predicts)
        if gallery.identity.kind(name) in CLASS_KINDS
    ]
    task = task if task in known else next(iter(known), "")
    scores = files.path / Run.REPORTS / f"{options.split}_retrieval.csv"
    return [
        map_section(gallery, options.split, task, options.seed),
        retrieval_section(gallery, options.split, task, read, scores, options.seed),
    ]


def _without(title: str, why: str) -> Section:
    from evaluation.report.page import Section

    return Section(title, missing=[why])
