"""``vitrail predict RUN SOURCE …``: what a run predicts for new images, as a table or a file.

Images are predicted in parts of a thousand, by one process or several, and each finished part is kept next to the
output: a command that was interrupted goes on where it was when it is given again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vitrail.console import Table, tracked
from vitrail.errors import UserError, run_reporting_user_errors
from vitrail.files import read_parquet, write_atomically, write_csv, write_parquet, write_text_atomically
from vitrail.runs import Run
from vitrail.runtime import check_device

if TYPE_CHECKING:
    import pandas as pd

    from datamodules.files.image_sources import ImageSource
    from vitrail.predictions import ImagePrediction, TaskPrediction

FORMATS = (".parquet", ".csv", ".json", ".jsonl")
PART = 1000
"""Images that are predicted before something is kept."""

_SHOWN = 50
_POLL = 0.2


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``predict``."""
    command.epilog = (
        "The data of an experiment, the split that loader.predict names, are predicted by Lightning's stage: "
        "predict --config FILE --ckpt_path CHECKPOINT."
    )
    command.add_argument("run", type=Path, metavar="RUN", help="run directory, or the folder of an export")
    command.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="image, folder, pattern ('photos/*.jpg'), table (CSV, Parquet, JSON Lines) or shard (Parquet, tar)",
    )
    command.add_argument("--top", type=int, default=1, metavar="K", help="most probable classes per task (default: 1)")
    command.add_argument(
        "--to", type=Path, metavar="FILE", help=f"write all rows to a file: {', '.join(FORMATS)}; else print a table"
    )
    command.add_argument(
        "--image",
        "--image-column",
        dest="image_column",
        default="auto",
        metavar="COLUMN",
        help="paths or URLs in a table",
    )
    command.add_argument("--batch-size", type=int, default=32, metavar="N", help="(default: 32)")
    command.add_argument(
        "--max-pixels",
        type=int,
        metavar="N",
        help="larger images are refused before they are decoded (default: image.max_pixels of the run's data)",
    )
    command.add_argument("--device", default="auto", help="such as cpu, cuda, cuda:1 or mps (default: auto)")
    command.add_argument("--processes", type=int, default=1, metavar="N", help="that predict at once (default: 1)")


@dataclass(frozen=True)
class Job:
    """What every process needs to know.

    Attributes:
        run: the run directory.
        sources: as given.
        image_column: of tables.
        top: classes of each task.
        batch_size: images that pass through the network together.
        max_pixels: of an image; None for the run's limit.
        device: chosen one; with several GPUs each process takes another.
        parts: folder of the finished parts.
    """

    run: Path
    sources: tuple[str, ...]
    image_column: str
    top: int
    batch_size: int
    max_pixels: int | None
    device: str
    parts: Path

    def find(self) -> list[ImageSource]:
        """Return the images, in the same order in every process."""
        from datamodules.files.image_sources import IMAGES_ONLY, find_images

        return find_images(self.sources, replace(IMAGES_ONLY, image=self.image_column))


def run(options: argparse.Namespace, rest: Sequence[str]) -> None:
    """Predict and print or write the predictions.

    Raises:
        UserError: for sources without images, an output of an unknown format, or a run that predicts no classes.
    """
    for name in ("top", "batch_size", "processes", "max_pixels"):
        if (given := getattr(options, name)) is not None and given < 1:
            raise UserError(f"--{name.replace('_', '-')}: must be at least 1; got {given}")
    if options.to is not None and options.to.suffix.lower() not in FORMATS:
        raise UserError(f"--to {options.to}: must end with one of {', '.join(FORMATS)}")
    opened = Run(options.run)
    job = Job(
        options.run,
        tuple(options.sources),
        options.image_column,
        options.top,
        options.batch_size,
        options.max_pixels,
        check_device(options.device),
        _parts_of(options.to) if options.to is not None else Path(),
    )
    found = job.find()
    if options.to is None:
        _show([prediction for part in _parts(found) for prediction in _predicted(opened, part, job)], job.top)
        return
    _begin(job, opened, found)
    _predict_all(job, found, options.processes)
    frame = _joined(job.parts, len(_parts(found)))
    _write(frame, options.to)
    shutil.rmtree(job.parts)
    bad = int(frame["error"].notna().sum())
    noun = "image" if len(frame) == 1 else "images"
    sys.stdout.write(f"{options.to}: {len(frame)} {noun}" + (f", {bad} of them unreadable\n" if bad else "\n"))


def _parts(found: Sequence[ImageSource]) -> list[tuple[ImageSource, np.ndarray[Any, np.dtype[np.int64]]]]:
    """Divide the images into parts, none of which is of two sources."""
    return [
        (source, np.arange(begin, min(begin + PART, len(source)), dtype=np.int64))
        for source in found
        for begin in range(0, len(source), PART)
    ]


def _predicted(
    opened: Run, part: tuple[ImageSource, np.ndarray[Any, np.dtype[np.int64]]], job: Job
) -> list[ImagePrediction]:
    source, rows = part
    named = ((source.names[row], image) for row, image in zip(rows.tolist(), source.read(rows), strict=True))
    opened.model.to(job.device)
    return list(opened.iter_predictions(named, job.batch_size, keep_unreadable=True, max_pixels=job.max_pixels))


def _show(predictions: Sequence[ImagePrediction], top: int) -> None:
    """Print the predictions as a table, one row for each task of an image, and for its caption."""
    decides = any(one.decision is not None for prediction in predictions for one in prediction.tasks.values())
    rows = [row for prediction in predictions for row in _rows(prediction, top, decides)]
    calibrated = all(one.calibrated for prediction in predictions for one in prediction.tasks.values())
    heading = "confidence" if calibrated else "confidence (not calibrated)"
    decision = ["at the operating point"] if decides else []
    Table(["image", "task", "prediction", heading, *decision], rows[:_SHOWN], left=None).show()
    if len(rows) > _SHOWN:
        sys.stdout.write(f"… and {len(rows) - _SHOWN} more rows; write all of them with --to FILE\n")
    sys.stderr.writelines(f"{one.name}: {one.error}\n" for one in predictions if one.error)


def _rows(prediction: ImagePrediction, top: int, decides: bool) -> list[list[str]]:
    """Rows of an image's tasks and of its caption, without the last column where no task decides."""
    rows = [
        [
            task,
            _shown_label(prediction, one),
            ", ".join(f"{label} {confidence:.1%}" for label, confidence in one.top_k(top)),
            one.decision or ("" if one.decision is None else "(nothing)"),
        ]
        for task, one in prediction.tasks.items()
    ]
    if prediction.caption is not None:
        rows.append(["caption", prediction.caption or "(empty)", "", ""])
    return [["" if place else prediction.name, *row[: 3 + decides]] for place, row in enumerate(rows)]


def _shown_label(prediction: ImagePrediction, one: TaskPrediction) -> str:
    label = one.label or "(none: several are equally probable)"
    return f"unknown (most like {label})" if prediction.unknown else label


def _parts_of(output: Path) -> Path:
    return output.with_name(f".{output.name}.parts")


def _begin(job: Job, opened: Run, found: Sequence[ImageSource]) -> None:
    """Make the folder of parts, or go on with it where it is of the same images, run and options."""
    digest = hashlib.sha256()
    for source in found:
        digest.update("\n".join(source.names).encode())
        digest.update(json.dumps([_stamp(Path(file)) for file in source.files]).encode())
    stamp = _stamp(opened.checkpoints.get("best") or opened.path / Run.EXPORT)
    points = {task: vars(point) for task, point in opened.operating_points.items()}
    detector = opened.detector
    of_detector = [] if detector is None else [[detector.method, detector.threshold]]
    known = [dict(opened.temperatures), *([points] if points else []), *of_detector]
    plan = json.dumps([str(job.run.resolve()), stamp, *known, job.top, job.max_pixels, PART, digest.hexdigest()])
    file = job.parts / "plan.json"
    if file.is_file() and file.read_text(encoding="utf-8") == plan:
        sys.stderr.write(f"going on: {len(_done(job.parts))} of {len(_parts(found))} parts are done\n")
        return
    if job.parts.exists():
        sys.stderr.write(f"{job.parts}: is of other images or another model, and is made again\n")
        shutil.rmtree(job.parts)
    write_text_atomically(file, plan)


def _stamp(file: Path) -> list[int]:
    """Size and time of a file, by which a change is noticed; nothing of one that is missing."""
    try:
        found = file.stat()
    except OSError:
        return []
    return [found.st_size, found.st_mtime_ns]


def _done(parts: Path) -> set[int]:
    return {int(path.stem) for path in parts.glob("[0-9]*.parquet")}


def _predict_all(job: Job, found: Sequence[ImageSource], processes: int) -> None:
    """Predict all parts that are not done, and show progress.

    Raises:
        UserError: a process ended with an error.
    """
    todo = sorted(set(range(len(_parts(found)))) - _done(job.parts))
    if processes == 1:
        opened = Run(job.run)
        for number in tracked(todo, "predicting, parts of 1,000 images", len(todo)):
            _keep(opened, found, number, job)
        return
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=_work, args=(_on_device(job, place), todo[place::processes]), daemon=True)
        for place in range(min(processes, len(todo)))
    ]
    for worker in workers:
        worker.start()
    for _ in tracked(_finished(job.parts, todo, workers), "predicting, parts of 1,000 images", len(todo)):
        pass
    for worker in workers:
        worker.join()
    if set(todo) - _done(job.parts):
        raise UserError("predict: a process ended with an error, see above; give the command again to go on")


def _on_device(job: Job, place: int) -> Job:
    import torch

    several = job.device == "cuda" and torch.cuda.device_count() > 1
    return replace(job, device=f"cuda:{place % torch.cuda.device_count()}") if several else job


def _work(job: Job, numbers: Sequence[int]) -> None:
    """Predict some of the parts, in a process of its own."""
    opened, found = Run(job.run), job.find()

    def work() -> None:
        for number in numbers:
            _keep(opened, found, number, job)

    sys.exit(run_reporting_user_errors(work))


def _finished(parts: Path, todo: Sequence[int], workers: Sequence[Any]) -> Iterator[int]:
    """Yield each part as it is finished, until all are or no worker is left."""
    seen: set[int] = set()
    while len(seen) < len(todo):
        alive = any(worker.is_alive() for worker in workers)
        new = _done(parts) & set(todo) - seen
        yield from new
        seen |= new
        if not alive and not new:
            return
        time.sleep(_POLL)


def _keep(opened: Run, found: Sequence[ImageSource], number: int, job: Job) -> None:
    import pandas as pd
    import pyarrow as pa

    rows = [prediction.row(job.top) for prediction in _predicted(opened, _parts(found)[number], job)]
    with write_atomically(job.parts / f"{number:06d}.parquet") as partial:
        write_parquet(pa.Table.from_pandas(pd.DataFrame(rows), preserve_index=False), partial)


def _joined(parts: Path, count: int) -> pd.DataFrame:
    import pandas as pd

    frames = [read_parquet(parts / f"{number:06d}.parquet").to_pandas() for number in range(count)]
    frame: pd.DataFrame = pd.concat([part.dropna(axis="columns", how="all") for part in frames], ignore_index=True)
    last = ("unknown", "error")
    names = list(dict.fromkeys(name for part in frames for name in part.columns if name not in last))
    if "error" not in frame:
        frame["error"] = None
    return frame.reindex(columns=[*names, *(name for name in last if name in frame)])


def _write(frame: pd.DataFrame, path: Path) -> None:
    """Write all rows; JSON as a list of objects, JSON Lines as one a line."""
    suffix = path.suffix.lower()
    if suffix == ".csv":
        write_csv(path, frame)
        return
    with write_atomically(path) as partial:
        if suffix == ".parquet":
            frame.to_parquet(partial, index=False)
        else:
            frame.to_json(partial, orient="records", lines=suffix == ".jsonl", force_ascii=False, indent=None)
