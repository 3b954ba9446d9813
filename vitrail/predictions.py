"""The predictions of a run on one split, a Parquet file with one row per sample.

Columns: ``sample_id`` int64, ``name`` and ``group`` strings and, for each task, ``target_<task>`` int64,
``logits_<task>``, a list of float32, and, for other readers, ``answered_<task>``, false where the model predicts no
class (``predicted_classes``). The schema's metadata has the class names of all tasks under ``vitrail.tasks`` as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitrail.errors import UserError
from vitrail.files import DamagedFileError, current_keys, read_parquet, write_atomically, write_parquet
from vitrail.types import UNKNOWN

TASKS_KEY = b"vitrail.tasks"

TIE_TOLERANCE = 1e-6
"""Logits that differ by no more are equal, as in ``lightning_modules.metrics``."""

LOGIT_TOLERANCE = 1e-3
"""Tolerance for the logits of a sample predicted twice: batches of different sizes round differently."""


@dataclass(frozen=True)
class Predictions:
    """Logits and targets of N samples for each task.

    Attributes:
        sample_id: int64 ``(N,)``, row of the sample in its data set.
        names: object ``(N,)`` of strings, the stable name of each sample.
        groups: object ``(N,)`` of strings, the physical object or product in each image.
        tasks: class names of each task; the main task first.
        targets: by task int64 ``(N,)``, ``UNKNOWN`` where not known.
        logits: by task float32 ``(N, C)``.
    """

    sample_id: NDArray[np.int64]
    names: NDArray[np.object_]
    groups: NDArray[np.object_]
    tasks: Mapping[str, Sequence[str]]
    targets: Mapping[str, NDArray[np.int64]]
    logits: Mapping[str, NDArray[np.float32]]

    def __len__(self) -> int:
        return len(self.sample_id)

    def predicted(self, task: str) -> NDArray[np.int64]:
        """See ``predicted_classes``."""
        return predicted_classes(self.logits[task])

    def probabilities(self, task: str, temperature: float = 1.0) -> NDArray[np.float64]:
        """Softmax of the logits divided by a temperature (``python -m evaluation calibrate``), float64 ``(N, C)``."""
        from scipy.special import softmax

        probabilities: NDArray[np.float64] = softmax(self.logits[task].astype(np.float64) / temperature, axis=1)
        return probabilities

    def take(self, rows: NDArray[np.int64]) -> Predictions:
        """Return the given rows in the given order."""
        return Predictions(
            self.sample_id[rows],
            self.names[rows],
            self.groups[rows],
            self.tasks,
            {task: values[rows] for task, values in self.targets.items()},
            {task: values[rows] for task, values in self.logits.items()},
        )


@dataclass(frozen=True)
class TaskPrediction:
    """Prediction for one image in one task.

    Attributes:
        classes: class names.
        probabilities: float64 ``(C,)``.
        calibrated: whether they are calibrated by a temperature fitted for the task.
    """

    classes: Sequence[str]
    probabilities: NDArray[np.float64]
    calibrated: bool = False

    @property
    def label(self) -> str:
        """The most probable class; empty if several classes are equally probable."""
        [chosen] = predicted_classes(np.log(np.maximum(self.probabilities, 1e-300))[None])
        return "" if chosen == UNKNOWN else self.classes[chosen]

    @property
    def confidence(self) -> float:
        """The largest probability."""
        return float(self.probabilities.max())

    def top_k(self, k: int | None = 5) -> list[tuple[str, float]]:
        """Return the k most probable classes with their probabilities, best first; None for all."""
        order = np.argsort(-self.probabilities, kind="stable")[:k]
        return [(self.classes[index], float(self.probabilities[index])) for index in order.tolist()]


@dataclass(frozen=True)
class ImagePrediction:
    """Predictions for one image; ``label`` and the like are of its main task.

    Attributes:
        name: path of the image, or ``image 3`` for the fourth input without a file.
        tasks: prediction of each task, the main one first; empty for an image that could not be read.
        error: why it could not be read, else empty.
    """

    name: str
    tasks: dict[str, TaskPrediction]
    error: str = ""

    @property
    def main(self) -> TaskPrediction:
        """Prediction of the main task."""
        return next(iter(self.tasks.values()))

    @property
    def label(self) -> str:
        """See ``TaskPrediction``."""
        return self.main.label

    @property
    def confidence(self) -> float:
        """See ``TaskPrediction``."""
        return self.main.confidence

    @property
    def calibrated(self) -> bool:
        """See ``TaskPrediction``."""
        return self.main.calibrated

    def top_k(self, k: int | None = 5) -> list[tuple[str, float]]:
        """See ``TaskPrediction``."""
        return self.main.top_k(k)

    def __repr__(self) -> str:
        found = ", ".join(f"{task}: {one.label or '(none)'} {one.confidence:.0%}" for task, one in self.tasks.items())
        return f"<{self.name}: {found or self.error}>"

    def row(self, top: int = 1) -> dict[str, Any]:
        """Return the prediction as a row of a table.

        Args:
            top: classes of each task.

        Returns:
            ``image``; for each task ``TASK`` and ``TASK_confidence`` of the predicted class (no class where several
            share the highest confidence), and ``TASK_2``, ``TASK_2_confidence`` … of the next ones; ``error``.
        """
        values: dict[str, Any] = {"image": self.name}
        for task, one in self.tasks.items():
            for place, (label, confidence) in enumerate(one.top_k(top)):
                key = f"{task}_{place + 1}" if place else task
                values[key] = label if place else one.label or None
                values[f"{key}_confidence"] = confidence
        return {**values, "error": self.error or None}


def image_predictions(
    names: Sequence[str],
    logits: Mapping[str, NDArray[np.float32]],
    tasks: Mapping[str, Sequence[str]],
    temperatures: Mapping[str, float],
) -> list[ImagePrediction]:
    """Return predictions for N images.

    Args:
        names: names of the images.
        logits: by task float32 ``(N, C)``.
        tasks: class names of each task.
        temperatures: temperatures of the calibrated tasks.

    Raises:
        UserError: logits are not finite.
    """
    from scipy.special import softmax

    for task in tasks:
        if not np.isfinite(logits[task]).all():
            raise UserError(f"{names[0]}: the model's outputs for '{task}' are not finite; choose another run")
    predictions = []
    for row, name in enumerate(names):
        found = {}
        for task, classes in tasks.items():
            probabilities = softmax(logits[task][row].astype(np.float64) / temperatures.get(task, 1.0))
            found[task] = TaskPrediction(classes, probabilities, task in temperatures)
        predictions.append(ImagePrediction(name, found))
    return predictions


def predicted_classes(logits: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
    """Return the index of the largest of the logits ``(N, C)``, int64 ``(N,)``.

    If several classes share it, as all do if a generative model's answer names no class, the prediction is ``UNKNOWN``.
    """
    if not len(logits):
        return np.zeros(0, np.int64)
    chosen = logits.argmax(axis=1)
    return np.where(ranks_of(logits, chosen) == 0, chosen, UNKNOWN).astype(np.int64)


def ranks_of(logits: NDArray[np.floating[Any]], classes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the rank of each row's class, int64 ``(N,)``, from 0; equal logits of other classes rank before it."""
    own = np.take_along_axis(logits, classes[:, None], axis=1)
    # Not ">=": a comparison with NaN is false and would count as a hit.
    places: NDArray[np.int64] = (~(logits < own - np.float32(TIE_TOLERANCE))).sum(axis=1) - 1
    return places


def write_predictions(path: Path, predictions: Predictions) -> None:
    """Write the file atomically (UserError if logits are not finite)."""
    import pyarrow as pa

    check_finite(predictions, str(path))
    columns: dict[str, Any] = {
        "sample_id": pa.array(predictions.sample_id, pa.int64()),
        "name": pa.array(predictions.names, pa.string()),
        "group": pa.array(predictions.groups, pa.string()),
    }
    for task in predictions.tasks:
        columns[f"target_{task}"] = pa.array(predictions.targets[task], pa.int64())
        columns[f"logits_{task}"] = _lists(predictions.logits[task])
        columns[f"answered_{task}"] = pa.array(predictions.predicted(task) != UNKNOWN, pa.bool_())
    tasks = json.dumps({task: list(names) for task, names in predictions.tasks.items()})
    with write_atomically(path) as partial:
        write_parquet(pa.table(columns).replace_schema_metadata({TASKS_KEY: tasks.encode()}), partial)


def read_predictions(path: Path) -> Predictions:
    """Read what ``write_predictions`` wrote.

    Raises:
        UserError: the file is missing, damaged, not a predictions file of Vitrail, or has logits that are not finite.
    """
    import pyarrow as pa

    if not path.is_file():
        raise UserError(f"{path}: there are no predictions; write them with `python -m experiments test`")
    try:
        table = read_parquet(path)
    except (DamagedFileError, OSError) as error:
        raise UserError(f"{error}; write it again with `python -m experiments test`") from error
    try:
        tasks: dict[str, list[str]] = json.loads(current_keys(table.schema.metadata)[TASKS_KEY])
        targets = {task: table.column(f"target_{task}").to_numpy().astype(np.int64) for task in tasks}
        logits = {task: _matrix(table.column(f"logits_{task}"), len(names)) for task, names in tasks.items()}
        sample_id = table.column("sample_id").to_numpy().astype(np.int64)
        names = table.column("name").to_numpy().astype(object)
        groups = table.column("group").to_numpy().astype(object)
    except (KeyError, ValueError, AttributeError, TypeError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: not a predictions file of Vitrail ({reason}); write it again") from error
    predictions = Predictions(sample_id, names, groups, tasks, targets, logits)
    _check_targets(predictions, path)
    check_finite(predictions, str(path))
    return predictions


def join_predictions(shards: Iterable[Predictions]) -> tuple[Predictions, int]:
    """Join the shards of several processes, each sample once, sorted by ``sample_id``.

    Returns:
        The joined predictions, and the number of repeated rows that were dropped.

    Raises:
        UserError: shards differ in tasks or class names, or the same sample was predicted differently.
    """
    parts = list(shards)
    if not parts:
        raise UserError("predictions: there are no shards to join; predict at least one batch")
    if any(dict(part.tasks) != dict(parts[0].tasks) for part in parts):
        raise UserError("predictions: the shards name different tasks or classes; write them again in one run")
    joined = concatenate(parts)
    joined = joined.take(np.argsort(joined.sample_id, kind="stable"))
    is_first = np.ones(len(joined), dtype=bool)
    is_first[1:] = joined.sample_id[1:] != joined.sample_id[:-1]
    kept = joined.take(np.flatnonzero(is_first))
    again = joined.take(np.flatnonzero(~is_first))
    _check_equal(kept.take(np.searchsorted(kept.sample_id, again.sample_id)), again)
    return kept, len(again)


def concatenate(parts: Sequence[Predictions]) -> Predictions:
    """Concatenate parts with the same tasks and classes."""
    tasks = parts[0].tasks
    return Predictions(
        np.concatenate([part.sample_id for part in parts]),
        np.concatenate([part.names for part in parts]),
        np.concatenate([part.groups for part in parts]),
        tasks,
        {task: np.concatenate([part.targets[task] for part in parts]) for task in tasks},
        {task: np.concatenate([part.logits[task] for part in parts]) for task in tasks},
    )


def check_finite(predictions: Predictions, origin: str) -> None:
    """Refuse logits that are NaN or infinite."""
    for task, logits in predictions.logits.items():
        bad = np.flatnonzero(~np.isfinite(logits).all(axis=1))
        if bad.size:
            raise UserError(
                f"{origin}: logits of task '{task}' are not finite for {bad.size} of {len(predictions)} samples, first "
                f"'{predictions.names[bad[0]]}'; the model has diverged: lower the learning rate or train again"
            )


def _lists(logits: NDArray[np.float32]) -> Any:
    """Convert float32 ``(N, C)`` to a column of lists, in chunks whose offsets fit 32 bits."""
    import pyarrow as pa

    rows = max(1, 2**30 // max(1, logits.shape[1]))
    chunks = []
    for start in range(0, len(logits), rows):
        part = np.ascontiguousarray(logits[start : start + rows], np.float32)
        offsets = np.arange(len(part) + 1, dtype=np.int32) * np.int32(part.shape[1])
        chunks.append(pa.ListArray.from_arrays(pa.array(offsets), pa.array(part.reshape(-1))))
    return pa.chunked_array(chunks, pa.list_(pa.float32()))


def _matrix(column: Any, num_classes: int) -> NDArray[np.float32]:
    """Convert a column of lists to float32 ``(N, C)``."""
    import pyarrow as pa

    values = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    lengths = [chunk.value_lengths().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    if not pa.types.is_large_list(column.type) and not pa.types.is_list(column.type):
        raise ValueError(f"logits are {column.type}, not lists")
    if any((length != num_classes).any() for length in lengths):
        raise ValueError(f"some rows do not have the {num_classes} logits of their class names")
    flat = np.concatenate(values) if values else np.empty(0)
    return flat.astype(np.float32).reshape(-1, num_classes)


def _check_targets(predictions: Predictions, path: Path) -> None:
    for task, targets in predictions.targets.items():
        bad = np.flatnonzero((targets < UNKNOWN) | (targets >= len(predictions.tasks[task])))
        if bad.size:
            raise UserError(
                f"{path}: target {targets[bad[0]]} of task '{task}' in row {bad[0]} is outside its "
                f"{len(predictions.tasks[task])} classes; write the file again"
            )


def _check_equal(seen: Predictions, again: Predictions) -> None:
    differs = (seen.names != again.names) | (seen.groups != again.groups)
    for task in seen.tasks:
        close = np.isclose(seen.logits[task], again.logits[task], rtol=LOGIT_TOLERANCE, atol=LOGIT_TOLERANCE)
        differs = differs | (seen.targets[task] != again.targets[task]) | ~close.all(axis=1)
    if differs.any():
        row = int(np.flatnonzero(differs)[0])
        raise UserError(
            f"predictions: sample {seen.sample_id[row]} ('{seen.names[row]}') was predicted twice with different "
            f"results; do the processes hold the same weights and data?"
        )
