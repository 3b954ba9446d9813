"""``python -m evaluation export-dataset RUN --to PLACE``: labels, predictions, vectors, findings by image.

A place that ends in ``.parquet`` gets one table; any other a FiftyOne dataset on disk, which
``fiftyone.Dataset.from_dir(PLACE, dataset_type=fiftyone.types.FiftyOneDataset)`` loads. FiftyOne itself is not needed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vitrail.errors import UserError
from vitrail.files import read_csv, read_parquet, write_atomically, write_parquet, write_text_atomically
from vitrail.predictions import LABEL_SEPARATOR, TaskPrediction, task_predictions
from vitrail.runs import Run
from vitrail.types import LABEL_TASK, TaskKind, kind_of

if TYPE_CHECKING:
    from datamodules.base import ImageDataModule

_VALUE = {"single_label": "Classification", "ordinal": "Classification", "multi_label": "Classifications"}


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``export-dataset``."""
    command.add_argument("run", metavar="RUN", help="run directory, whose data must be at hand")
    command.add_argument(
        "--to", type=Path, required=True, metavar="PLACE", help="FILE.parquet, or a folder for FiftyOne"
    )
    command.add_argument("--gallery", metavar="G", help="its vectors become embeddings")
    command.add_argument(
        "--findings", type=Path, metavar="FILE", help="what audit --findings wrote (.parquet, .json, .csv)"
    )


def run(options: argparse.Namespace, rest: Sequence[str] = ()) -> None:
    """Write the table or the folder.

    Raises:
        UserError: where the data, the gallery or the findings cannot be read, or the place cannot be written to.
    """
    opened = Run(options.run)
    data: ImageDataModule = opened.load_datamodule()
    rows = joined(opened, data, options.gallery, options.findings)
    try:
        if options.to.suffix == ".parquet":
            _write_table(options.to, rows, data.table.kinds)
        else:
            _write_fiftyone(options.to, rows, opened, data)
    except OSError as error:
        raise UserError(f"--to {options.to}: cannot be written ({error.strerror})") from error
    predicted = sum(bool(row["predicted"]) for row in rows)
    embedded = sum(row["embedding"] is not None for row in rows)
    found = sum(bool(row["findings"]) for row in rows)
    sys.stdout.write(
        f"{options.to}: {len(rows):,} images, {predicted:,} with predictions, {embedded:,} with embeddings, {found:,} "
        "with findings\n"
    )


def joined(opened: Run, data: ImageDataModule, gallery: str | None, findings: Path | None) -> list[dict[str, Any]]:
    """Return for each sample ``name``, ``source``, ``split``, ``group``, and by task ``targets`` and ``predicted``.

    Also ``embedding``, a list or None, and ``findings``, those of the audit by name.
    """
    table = data.table
    every = np.arange(len(table))
    targets = {task: table.target_texts(task, every) for task in table.tasks}
    rows: list[dict[str, Any]] = [
        {
            "name": table.name(row),
            "source": table.source(row),
            "split": table.split(row),
            "group": table.group(row),
            "targets": {task: texts[row] for task, texts in targets.items()},
            "predicted": {},
            "embedding": None,
            "findings": [],
        }
        for row in every.tolist()
    ]
    by_name = {row["name"]: row for row in rows}
    for split in opened.splits:
        predictions = opened.predictions(split)
        for task in predictions.tasks if predictions else ():
            assert predictions is not None
            for name, one in zip(predictions.names, task_predictions(predictions, task), strict=True):
                if name in by_name:
                    by_name[name]["predicted"][task] = one
    if gallery is not None:
        from retrieval.gallery import Gallery

        store = Gallery.open(gallery)
        ids = [one for one in store.table(["id"]).column("id").to_pylist() if one in by_name]
        for name, vector in zip(ids, store.vectors(ids) if ids else [], strict=True):
            by_name[name]["embedding"] = [round(value, 6) for value in vector.tolist()]
    for image, finding in _findings(findings) if findings is not None else ():
        if image not in by_name:
            raise UserError(f"--findings {findings}: {image!r} is not in the run's data; audit the same data")
        if finding not in by_name[image]["findings"]:
            by_name[image]["findings"].append(finding)
    return rows


def _findings(path: Path) -> list[tuple[str, str]]:
    try:
        if path.suffix == ".parquet":
            values = read_parquet(path, ["image", "finding"]).to_pydict()
            return list(zip(values["image"], values["finding"], strict=True))
        if path.suffix == ".json":
            return [(one["image"], one["finding"]) for one in json.loads(path.read_text(encoding="utf-8"))]
        frame = read_csv(path)
        return list(zip(frame["image"], frame["finding"], strict=True))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--findings {path}: not what audit --findings writes ({type(error).__name__})") from error


def _write_table(path: Path, rows: Sequence[Mapping[str, Any]], kinds: Mapping[str, TaskKind]) -> None:
    """One row for each image; of each task its target, and what is predicted with which confidence."""
    import pyarrow as pa

    text = pa.string()
    columns: dict[str, Any] = {
        name: pa.array([row[name] for row in rows], text) for name in ("name", "source", "split", "group")
    }
    tasks = dict.fromkeys(task for row in rows for task in (*row["targets"], *row["predicted"]))
    for task in tasks:
        own: list[TaskPrediction | None] = [row["predicted"].get(task) for row in rows]
        is_number = kind_of(kinds, task) == "regression"
        given = [row["targets"].get(task) for row in rows]
        if is_number:
            columns[f"target_{task}"] = pa.array([None if one is None else float(one) for one in given], pa.float64())
            columns[f"predicted_{task}"] = pa.array([one and one.value for one in own], pa.float64())
            continue
        columns[f"target_{task}"] = pa.array(given, text)
        columns[f"predicted_{task}"] = pa.array([one and one.label for one in own], text)
        columns[f"confidence_{task}"] = pa.array([one and one.confidence for one in own], pa.float64())
    columns["embedding"] = pa.array([row["embedding"] for row in rows], pa.list_(pa.float32()))
    columns["findings"] = pa.array([row["findings"] for row in rows], pa.list_(text))
    with write_atomically(path) as partial:
        write_parquet(pa.table(columns), partial)


def _write_fiftyone(folder: Path, rows: Sequence[Mapping[str, Any]], opened: Run, data: ImageDataModule) -> None:
    samples = []
    for number, row in enumerate(rows):
        path = Path(row["source"]).absolute() if data.image_files else folder / "data" / f"{number:08d}.png"
        if not data.image_files:
            with write_atomically(path) as partial:
                partial.write_bytes(data.encoded_image(number))
        samples.append(_sample(row, path if data.image_files else path.relative_to(folder), data.table.kinds))
    info = {"run": str(opened.path), "fingerprint": data.table.fingerprint(), "tasks": dict(data.tasks)}
    write_text_atomically(folder / "samples.json", json.dumps({"samples": samples}, ensure_ascii=False))
    # Without a version it is read field by field, so that no schema of a certain version has to be written.
    metadata = {"name": opened.path.name, "media_type": "image", "info": info}
    write_text_atomically(folder / "metadata.json", json.dumps(metadata, ensure_ascii=False))


def _sample(row: Mapping[str, Any], path: Path, kinds: Mapping[str, TaskKind]) -> dict[str, Any]:
    """One sample as FiftyOne serialises it; see also ``datamodules.files.corrections``, which reads it back."""
    sample: dict[str, Any] = {
        "filepath": path.as_posix(),
        "tags": [row["split"], *row["findings"]],
        "vitrail_name": row["name"],
        "group_name": row["group"],
        "vitrail_tasks": {},
    }
    for task, target in row["targets"].items():
        field, kind = _field(task), kind_of(kinds, task)
        sample["vitrail_tasks"][field] = task
        if target is not None:
            texts = [text for text in target.split(LABEL_SEPARATOR) if text] if kind == "multi_label" else [target]
            sample[field] = _value(kind, [(text, None) for text in texts])
    for task, one in row["predicted"].items():
        field = "predictions" if task == LABEL_TASK else f"{_field(task)}_predicted"
        sample[field] = one.value if one.kind == "regression" else _value(one.kind, one.labels)
    if row["embedding"] is not None:
        sample["embedding"] = row["embedding"]
    return {name: value for name, value in sample.items() if value is not None}


_RESERVED = (
    "id",
    "tags",
    "filepath",
    "metadata",
    "media_type",
    "embedding",
    "group_name",
    "predictions",
    "ground_truth",
)
"""Names of fields that FiftyOne or this export has."""


def _field(task: str) -> str:
    if task == LABEL_TASK:
        return "ground_truth"
    return f"{task}_labels" if task in _RESERVED else task.replace(".", "_")


def _value(kind: TaskKind, labels: Sequence[tuple[str, float | None]]) -> Any:
    """A number, or a label or several of FiftyOne; None for no class."""
    if kind == "regression":
        return float(labels[0][0])
    found = [
        {"_cls": "Classification", "label": text, **({} if chance is None else {"confidence": round(chance, 6)})}
        for text, chance in labels
    ]
    if _VALUE[kind] == "Classifications":
        return {"_cls": "Classifications", "classifications": found}
    return found[0] if found else None
