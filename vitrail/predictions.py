"""The predictions of a run on one split, a Parquet file with one row per sample.

Columns: ``sample_id`` int64, ``name`` and ``group`` strings and, for each task, ``target_<task>`` int64,
``logits_<task>``, a list of float32, and, for other readers, ``answered_<task>``, false where the model predicts no
class (``predicted_classes``). The schema's metadata has the class names of all tasks under ``vitrail.tasks`` as JSON.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitrail.errors import UserError
from vitrail.files import DamagedFileError, current_keys, read_parquet, write_atomically, write_parquet
from vitrail.types import CLASS_KINDS, UNKNOWN, TaskKind, kind_of

TASKS_KEY = b"vitrail.tasks"
KINDS_KEY = b"vitrail.task_kinds"
THRESHOLDS_KEY = b"vitrail.thresholds"

DEFAULT_THRESHOLD = 0.5
"""Probability from which a label is predicted where none was chosen."""

OWN_KEYS = ("image", "unknown", "caption", "error")
"""Of a row of predictions, next to those of the tasks."""

LABEL_SEPARATOR = ";"
"""Between several labels in one text."""

TIE_TOLERANCE = 1e-6
"""Logits that differ by no more are equal, as in ``lightning_modules.metrics``."""

LOGIT_TOLERANCE = 1e-3
"""Tolerance for the logits of a sample predicted twice: batches of different sizes round differently."""


@dataclass(frozen=True)
class Predictions:
    """Logits and targets of N samples for each task.

    A task that ``kinds`` does not name is single-label. What reads predictions of some kinds only calls
    ``refuse_kinds``.

    Attributes:
        sample_id: int64 ``(N,)``, row of the sample in its data set.
        names: object ``(N,)`` of strings, the stable name of each sample.
        groups: object ``(N,)`` of strings, the physical object or product in each image.
        tasks: class names of each task, none for regression; the main task first.
        targets: by task: single-label and ordinal int64 ``(N,)``, ``UNKNOWN`` where not known; multi-label int8
            ``(N, C)``, 1 or 0, ``UNKNOWN`` for entries that are not known; regression float32 ``(N,)``, NaN where not
            known.
        logits: by task float32: single-label, multi-label (independent) and ordinal (log-probabilities) ``(N, C)``;
            regression ``(N, 1)``, the value, or ``(N, 2)``, with the logarithm of its variance.
        kinds: kinds of the tasks that are not single-label.
        thresholds: of multi-label tasks the probability from which each label is predicted; 0.5 where there is none.
    """

    sample_id: NDArray[np.int64]
    names: NDArray[np.object_]
    groups: NDArray[np.object_]
    tasks: Mapping[str, Sequence[str]]
    targets: Mapping[str, NDArray[Any]]
    logits: Mapping[str, NDArray[np.float32]]
    kinds: Mapping[str, TaskKind] = field(default_factory=dict)
    thresholds: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.sample_id)

    def kind(self, task: str) -> TaskKind:
        """Return the kind of a task."""
        return kind_of(self.kinds, task)

    def known(self, task: str) -> NDArray[np.int64]:
        """Return the rows whose target is known (of multi-label tasks at least one entry), int64."""
        return np.flatnonzero(known_rows(self.targets[task]))

    def predicted(self, task: str) -> NDArray[np.int64]:
        """See ``predicted_classes``; UserError for a task without a single class."""
        refuse_kinds({task: self.kind(task)}, "the predicted class")
        return predicted_classes(self.logits[task])

    def probabilities(self, task: str, temperature: float = 1.0) -> NDArray[np.float64]:
        """Softmax of the logits divided by a temperature (``python -m evaluation calibrate``), float64 ``(N, C)``.

        Raises:
            UserError: a task without a single class.
        """
        from scipy.special import softmax

        refuse_kinds({task: self.kind(task)}, "class probabilities")
        probabilities: NDArray[np.float64] = softmax(self.logits[task].astype(np.float64) / temperature, axis=1)
        return probabilities

    def label_probabilities(self, task: str) -> NDArray[np.float64]:
        """Return the probability of each label of a multi-label task, float64 ``(N, C)``."""
        from scipy.special import expit

        refuse_kinds({task: self.kind(task)}, "label probabilities", handles=("multi_label",))
        probabilities: NDArray[np.float64] = expit(self.logits[task].astype(np.float64))
        return probabilities

    def predicted_labels(self, task: str) -> NDArray[np.bool_]:
        """Return which labels of a multi-label task reach their thresholds, bool ``(N, C)``."""
        marked: NDArray[np.bool_] = self.label_probabilities(task) >= self.thresholds_of(task)
        return marked

    def thresholds_of(self, task: str) -> NDArray[np.float64]:
        """Return the thresholds of a multi-label task, float64 ``(C,)``."""
        given = self.thresholds.get(task)
        return np.full(len(self.tasks[task]), DEFAULT_THRESHOLD) if given is None else np.asarray(given, np.float64)

    def values(self, task: str) -> NDArray[np.float64]:
        """Return the predicted numbers of a regression task, float64 ``(N,)``."""
        refuse_kinds({task: self.kind(task)}, "predicted numbers", handles=("regression",))
        return self.logits[task][:, 0].astype(np.float64)

    def deviations(self, task: str) -> NDArray[np.float64] | None:
        """Return the predicted standard deviations of a regression task, float64 ``(N,)``; None without any."""
        refuse_kinds({task: self.kind(task)}, "predicted standard deviations", handles=("regression",))
        logits = self.logits[task].astype(np.float64)
        return np.exp(logits[:, 1] / 2) if logits.shape[1] > 1 else None

    def of_kinds(self, *kinds: TaskKind) -> Predictions:
        """Return the predictions of the tasks of some kinds only."""
        kept = [task for task in self.tasks if self.kind(task) in kinds]
        return replace(
            self,
            tasks={task: self.tasks[task] for task in kept},
            targets={task: self.targets[task] for task in kept},
            logits={task: self.logits[task] for task in kept},
            kinds={task: kind for task, kind in self.kinds.items() if task in kept},
            thresholds={task: values for task, values in self.thresholds.items() if task in kept},
        )

    def take(self, rows: NDArray[np.int64]) -> Predictions:
        """Return the given rows in the given order."""
        return Predictions(
            self.sample_id[rows],
            self.names[rows],
            self.groups[rows],
            self.tasks,
            {task: values[rows] for task, values in self.targets.items()},
            {task: values[rows] for task, values in self.logits.items()},
            self.kinds,
            self.thresholds,
        )


def refuse_kinds(
    kinds: Mapping[str, TaskKind], what: str, *, handles: tuple[TaskKind, ...] = CLASS_KINDS, fix: str = ""
) -> None:
    """Refuse tasks of kinds that a command or a function cannot handle, before it takes them for something else.

    Args:
        kinds: of the tasks that are to be handled; those that are not named are single-label.
        what: what cannot be had of such a task, the beginning of the message.
        handles: kinds that can be handled.
        fix: what to do instead, by default to name other tasks.

    Raises:
        UserError: names the first such task and its kind.
    """
    for task, kind in kinds.items():
        if kind not in handles:
            known = " or ".join(handles)
            raise UserError(f"{what}: task '{task}' is {kind}, must be {known}; {fix or 'use tasks of these kinds'}")


def other_kinds(tasks: Iterable[str], kinds: Mapping[str, TaskKind]) -> str:
    """Return the tasks without a single class and their kinds, for messages; empty where there are none."""
    kind_by_task = {task: kind_of(kinds, task) for task in tasks}
    return ", ".join(f"{task} ({kind})" for task, kind in kind_by_task.items() if kind not in CLASS_KINDS)


def known_rows(targets: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which targets, of any kind, are known (of multi-label tasks at least one entry), bool ``(N,)``."""
    known: NDArray[np.bool_] = ~np.isnan(targets) if targets.dtype.kind == "f" else targets != UNKNOWN
    return np.any(known, axis=1) if known.ndim > 1 else known


def target_texts(targets: NDArray[Any], names: Sequence[str]) -> list[str | None]:
    """Return targets of a task of any kind as texts: a class, labels with ``;`` between, a number; None if unknown.

    Args:
        targets: of N samples, see ``Predictions``.
        names: of the classes or labels, none for regression.
    """
    texts: list[str | None] = []
    for code, is_known in zip(targets.tolist(), known_rows(targets).tolist(), strict=True):
        if not is_known:
            texts.append(None)
        elif isinstance(code, list):
            texts.append(LABEL_SEPARATOR.join(name for name, entry in zip(names, code, strict=True) if entry == 1))
        else:
            texts.append(str(names[code]) if names else f"{code:.7g}")
    return texts


@dataclass(frozen=True)
class TaskPrediction:
    """Prediction for one image in one task.

    Attributes:
        classes: class names, none for regression.
        probabilities: float64 ``(C,)``; of multi-label tasks each for itself, otherwise they sum to 1.
        calibrated: whether they are calibrated by what ``calibrate`` fitted for the task.
        kind: of the task.
        thresholds: of multi-label tasks the probability from which each label is predicted.
        value: of regression tasks the predicted number.
        deviation: of regression tasks its standard deviation where the model predicts one.
        decision: what is predicted at the run's operating point, empty for nothing; None where it has none.
    """

    classes: Sequence[str]
    probabilities: NDArray[np.float64]
    calibrated: bool = False
    kind: TaskKind = "single_label"
    thresholds: Sequence[float] = ()
    value: float | None = None
    deviation: float | None = None
    decision: str | None = None

    @property
    def labels(self) -> list[tuple[str, float]]:
        """The predicted labels with their probabilities, best first: one class, or of multi-label tasks any number."""
        if self.kind == "multi_label":
            reached = dict(zip(self.classes, self.probabilities >= np.asarray(self.thresholds), strict=True))
            return [(name, probability) for name, probability in self.top_k(None) if reached[name]]
        return [(self.label, self.confidence)] if self.kind in CLASS_KINDS and self.label else []

    @property
    def label(self) -> str:
        """The most probable class, empty if several are equally probable; predicted labels with ``;``; the number."""
        if self.kind == "regression":
            spread = "" if self.deviation is None else f" ± {self.deviation:.2g}"
            return f"{self.value:.6g}{spread}"
        if self.kind == "multi_label":
            return LABEL_SEPARATOR.join(name for name, _ in self.labels)
        [chosen] = predicted_classes(np.log(np.maximum(self.probabilities, 1e-300))[None])
        return "" if chosen == UNKNOWN else self.classes[chosen]

    @property
    def confidence(self) -> float:
        """The largest probability; of multi-label tasks the lowest of those decided for; NaN for regression."""
        if self.kind == "regression":
            return math.nan
        if self.kind == "multi_label":
            reached = self.probabilities >= np.asarray(self.thresholds)
            return float(self.probabilities[reached].min() if reached.any() else 1 - self.probabilities.max())
        return float(self.probabilities.max())

    def top_k(self, k: int | None = 5) -> list[tuple[str, float]]:
        """Return the k most probable classes with their probabilities, best first; None for all, none of regression."""
        order = np.argsort(-self.probabilities, kind="stable")[:k]
        return [(self.classes[index], float(self.probabilities[index])) for index in order.tolist()]


@dataclass(frozen=True)
class OperatingPoint:
    """What ``calibrate --operating-point`` chose for a task on validation.

    Attributes:
        goal: such as ``recall>=0.95``.
        thresholds: calibrated probability from which a class or label is predicted, by its name; of an empty name the
            confidence below which nothing is predicted.
    """

    goal: str
    thresholds: Mapping[str, float]

    def decide(self, prediction: TaskPrediction) -> str:
        """Return the class or labels that are predicted at this point, empty for none."""
        if prediction.kind == "multi_label":
            names = [str(name) for name in prediction.classes]
            own = {name: self.thresholds.get(name, at) for name, at in zip(names, prediction.thresholds, strict=True)}
            return LABEL_SEPARATOR.join(name for name, chance in prediction.top_k(None) if chance >= own[str(name)])
        [(positive, threshold)] = self.thresholds.items()
        if not positive:
            return prediction.label if prediction.confidence >= threshold else ""
        ranked = dict(prediction.top_k(None))
        if ranked[positive] >= threshold:
            return positive
        return next((name for name in ranked if name != positive), "")


@dataclass(frozen=True)
class ImagePrediction:
    """Predictions for one image; ``label`` and the like are of its main task.

    Attributes:
        name: path of the image, or ``image 3`` for the fourth input without a file.
        tasks: prediction of each task, the main one first; empty for an image that could not be read.
        error: why it could not be read, else empty.
        unknown: whether the image is unlike the training images, so that its prediction means little; None where the
            run has no detector (``vitrail ood``).
        caption: that the model has written; None where it writes none.
    """

    name: str
    tasks: dict[str, TaskPrediction]
    error: str = ""
    unknown: bool | None = None
    caption: str | None = None

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

    def decided(self, points: Mapping[str, OperatingPoint]) -> ImagePrediction:
        """Return the prediction with what is predicted at the operating points of tasks."""
        tasks = {
            task: replace(one, decision=points[task].decide(one)) if task in points else one
            for task, one in self.tasks.items()
        }
        return replace(self, tasks=tasks)

    def __repr__(self) -> str:
        found = ", ".join(f"{task}: {_shown(one)}" for task, one in self.tasks.items())
        if self.caption is not None:
            found = "; ".join(filter(None, [found, repr(self.caption)]))
        return f"<{self.name}: {'unknown; ' if self.unknown else ''}{found or self.error}>"

    def row(self, top: int = 1) -> dict[str, Any]:
        """Return the prediction as a row of a table.

        Args:
            top: classes of each task.

        Returns:
            ``image``; for each task ``TASK`` and ``TASK_confidence`` of the predicted class (no class where several
            share the highest confidence), and ``TASK_2``, ``TASK_2_confidence`` … of the next ones; of multi-label
            tasks ``TASK`` and ``TASK_confidence`` of all predicted labels, with ``;`` between them; of regression tasks
            ``TASK`` and, where it is predicted, the standard deviation ``TASK_deviation``; ``TASK_decision`` of tasks
            with an operating point; ``unknown`` where that is known; ``caption`` where one is written; ``error``.
            A task that is called like one of these is ``attribute TASK``.
        """
        values: dict[str, Any] = {"image": self.name}
        for name, one in self.tasks.items():
            task = f"attribute {name}" if name in OWN_KEYS else name
            values |= {} if one.decision is None else {f"{task}_decision": one.decision}
            if one.kind == "regression":
                values[task] = one.value
                values |= {} if one.deviation is None else {f"{task}_deviation": one.deviation}
                continue
            if one.kind == "multi_label":
                values[task] = one.label
                values[f"{task}_confidence"] = LABEL_SEPARATOR.join(f"{share:.4f}" for _, share in one.labels)
                continue
            for place, (label, confidence) in enumerate(one.top_k(top)):
                key = f"{task}_{place + 1}" if place else task
                values[key] = label if place else one.label or None
                values[f"{key}_confidence"] = confidence
        known = {"unknown": self.unknown, "caption": self.caption}
        values |= {name: value for name, value in known.items() if value is not None}
        return {**values, "error": self.error or None}


def _shown(one: TaskPrediction) -> str:
    confidence = "" if one.kind == "regression" else f" {one.confidence:.0%}"
    return f"{one.label or '(none)'}{confidence}"


@dataclass(frozen=True)
class OutputCalibration:
    """What ``calibrate`` fitted for tasks without a single class; those with one have temperatures.

    Attributes:
        labels: of multi-label tasks, a temperature above 0 and then a bias for each label: a calibrated logit is the
            logit divided by the temperature, plus the bias.
        scales: of regression tasks that predict standard deviations, the factor above 0 that these lack.
        deviations: of other regression tasks, the half-width in the units of the data that 68 % of the errors on
            validation were within, which stands in for a standard deviation.
    """

    labels: Mapping[str, Sequence[float]] = field(default_factory=dict)
    scales: Mapping[str, float] = field(default_factory=dict)
    deviations: Mapping[str, float] = field(default_factory=dict)

    def apply(self, predictions: Predictions) -> Predictions:
        """Return predictions with calibrated outputs; predicted labels and numbers stay the same."""
        logits, thresholds = dict(predictions.logits), dict(predictions.thresholds)
        for task in predictions.tasks:
            own = predictions.logits[task].astype(np.float64)
            if task in self.labels:
                logits[task], thresholds[task] = self._labels(predictions, task)
            elif task in self.scales and own.shape[1] == 2:
                logits[task] = (own + np.array([0.0, 2 * math.log(self.scales[task])])).astype(np.float32)
            elif task in self.deviations and predictions.kind(task) == "regression":
                spread = np.full((len(own), 1), 2 * math.log(self.deviations[task]))
                logits[task] = np.concatenate([own[:, :1], spread], axis=1).astype(np.float32)
        return replace(predictions, logits=logits, thresholds=thresholds)

    def _labels(self, predictions: Predictions, task: str) -> tuple[NDArray[np.float32], list[float]]:
        """Calibrated logits, and the thresholds by which they mark the same labels."""
        from scipy.special import expit, logit

        temperature, *biases = self.labels[task]
        thresholds = logit(predictions.thresholds_of(task)) / temperature + biases
        moved = predictions.logits[task].astype(np.float64) / temperature + biases
        return moved.astype(np.float32), expit(thresholds).tolist()


def image_predictions(
    names: Sequence[str],
    logits: Mapping[str, NDArray[np.float32]],
    tasks: Mapping[str, Sequence[str]],
    temperatures: Mapping[str, float],
    kinds: Mapping[str, TaskKind] | None = None,
    thresholds: Mapping[str, Sequence[float]] | None = None,
    calibration: OutputCalibration = OutputCalibration(),
) -> list[ImagePrediction]:
    """Return predictions for N images.

    Args:
        names: names of the images.
        logits: by task float32 ``(N, C)``.
        tasks: class names of each task.
        temperatures: temperatures of the calibrated tasks.
        kinds: see ``Predictions``.
        thresholds: see ``Predictions``.
        calibration: of tasks without a single class.

    Raises:
        UserError: logits are not finite.
    """
    for task in tasks:
        if not np.isfinite(logits[task]).all():
            raise UserError(f"{names[0]}: the model's outputs for '{task}' are not finite; choose another run")
    empty = np.array([""] * len(names), dtype=object)
    whole = Predictions(np.arange(len(names)), empty, empty, tasks, {}, logits, kinds or {}, thresholds or {})
    whole = calibration.apply(whole)
    of_tasks = {
        task: task_predictions(whole, task, 1.0 if task in calibration.labels else temperatures.get(task))
        for task in tasks
    }
    return [ImagePrediction(name, {task: of_tasks[task][row] for task in tasks}) for row, name in enumerate(names)]


def task_predictions(predictions: Predictions, task: str, temperature: float | None = None) -> list[TaskPrediction]:
    """Return the predictions of one task for each sample, calibrated where it has a temperature."""
    classes, kind = predictions.tasks[task], predictions.kind(task)
    if kind == "regression":
        values, deviations = predictions.values(task).tolist(), predictions.deviations(task)
        spreads = [None] * len(values) if deviations is None else deviations.tolist()
        none = np.zeros(0)
        return [
            TaskPrediction((), none, kind=kind, value=value, deviation=spread)
            for value, spread in zip(values, spreads, strict=True)
        ]
    if kind == "multi_label":
        thresholds = predictions.thresholds_of(task).tolist()
        return [
            TaskPrediction(classes, row, temperature is not None, kind, thresholds)
            for row in predictions.label_probabilities(task)
        ]
    probabilities = predictions.probabilities(task, 1.0 if temperature is None else temperature)
    return [TaskPrediction(classes, row, temperature is not None, kind) for row in probabilities]


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
        targets, kind = predictions.targets[task], predictions.kind(task)
        if kind == "multi_label":
            columns[f"target_{task}"] = _lists(targets, pa.int8())
        elif kind == "regression":
            columns[f"target_{task}"] = pa.array(targets, pa.float32(), from_pandas=True)  # null where not known
        else:
            columns[f"target_{task}"] = pa.array(targets, pa.int64())
        columns[f"logits_{task}"] = _lists(predictions.logits[task], pa.float32())
        if kind in CLASS_KINDS:
            columns[f"answered_{task}"] = pa.array(predictions.predicted(task) != UNKNOWN, pa.bool_())
    metadata = {
        TASKS_KEY: {task: list(names) for task, names in predictions.tasks.items()},
        KINDS_KEY: dict(predictions.kinds),
        THRESHOLDS_KEY: {task: list(values) for task, values in predictions.thresholds.items()},
    }
    written = {key: json.dumps(value).encode() for key, value in metadata.items() if value or key == TASKS_KEY}
    with write_atomically(path) as partial:
        write_parquet(pa.table(columns).replace_schema_metadata(written), partial)


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
        metadata = current_keys(table.schema.metadata)
        tasks: dict[str, list[str]] = json.loads(metadata[TASKS_KEY])
        kinds: dict[str, TaskKind] = json.loads(metadata.get(KINDS_KEY, b"{}"))
        thresholds: dict[str, list[float]] = json.loads(metadata.get(THRESHOLDS_KEY, b"{}"))
        targets = {task: _read_targets(table, task, kind_of(kinds, task), len(tasks[task])) for task in tasks}
        logits = {
            task: _matrix(table.column(f"logits_{task}"), None if kind_of(kinds, task) == "regression" else len(names))
            for task, names in tasks.items()
        }
        sample_id = table.column("sample_id").to_numpy().astype(np.int64)
        names = table.column("name").to_numpy().astype(object)
        groups = table.column("group").to_numpy().astype(object)
    except (KeyError, ValueError, AttributeError, TypeError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: not a predictions file of Vitrail ({reason}); write it again") from error
    predictions = Predictions(sample_id, names, groups, tasks, targets, logits, kinds, thresholds)
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
    if any((dict(part.tasks), dict(part.kinds)) != (dict(parts[0].tasks), dict(parts[0].kinds)) for part in parts):
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
        parts[0].kinds,
        parts[0].thresholds,
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


def _lists(values: NDArray[Any], kind: Any) -> Any:
    """Convert numbers ``(N, C)`` to a column of lists, in chunks whose offsets fit 32 bits."""
    import pyarrow as pa

    rows = max(1, 2**30 // max(1, values.shape[1]))
    chunks = []
    for start in range(0, len(values), rows):
        part = np.ascontiguousarray(values[start : start + rows])
        offsets = np.arange(len(part) + 1, dtype=np.int32) * np.int32(part.shape[1])
        chunks.append(pa.ListArray.from_arrays(pa.array(offsets), pa.array(part.reshape(-1), kind)))
    return pa.chunked_array(chunks, pa.list_(kind))


def _read_targets(table: Any, task: str, kind: TaskKind, num_classes: int) -> NDArray[Any]:
    """Return the targets of a task in the form of its kind."""
    column = table.column(f"target_{task}")
    if kind == "multi_label":
        return _matrix(column, num_classes).astype(np.int8)
    targets: NDArray[Any] = column.to_numpy().astype(np.float32 if kind == "regression" else np.int64)
    return targets


def _matrix(column: Any, num_classes: int | None) -> NDArray[np.float32]:
    """Convert a column of lists to float32 ``(N, C)``; C may be left open, 1 or 2."""
    import pyarrow as pa

    values = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    lengths = [chunk.value_lengths().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    if not pa.types.is_large_list(column.type) and not pa.types.is_list(column.type):
        raise ValueError(f"logits are {column.type}, not lists")
    if num_classes is None:
        num_classes = int(lengths[0][0]) if lengths and len(lengths[0]) else 1
        if num_classes not in (1, 2):
            raise ValueError(f"outputs of a regression task have {num_classes} numbers, not 1 or 2")
    if any((length != num_classes).any() for length in lengths):
        raise ValueError(f"some rows do not have the {num_classes} logits of their class names")
    flat = np.concatenate(values) if values else np.empty(0)
    return flat.astype(np.float32).reshape(-1, num_classes)


def _check_targets(predictions: Predictions, path: Path) -> None:
    for task, targets in predictions.targets.items():
        kind = predictions.kind(task)
        if kind == "regression":
            continue
        end = 2 if kind == "multi_label" else len(predictions.tasks[task])
        outside = (targets < UNKNOWN) | (targets >= end)
        bad = np.flatnonzero(outside.any(axis=1) if outside.ndim > 1 else outside)
        if bad.size:
            raise UserError(
                f"{path}: target {targets[bad[0]]} of task '{task}' in row {bad[0]} is outside its "
                f"{len(predictions.tasks[task])} classes; write the file again"
            )


def _check_equal(seen: Predictions, again: Predictions) -> None:
    differs = (seen.names != again.names) | (seen.groups != again.groups)
    for task in seen.tasks:
        close = np.isclose(seen.logits[task], again.logits[task], rtol=LOGIT_TOLERANCE, atol=LOGIT_TOLERANCE)
        other = ~np.isclose(seen.targets[task], again.targets[task], rtol=0, atol=0, equal_nan=True)
        differs = differs | (other.any(axis=1) if other.ndim > 1 else other) | ~close.all(axis=1)
    if differs.any():
        row = int(np.flatnonzero(differs)[0])
        raise UserError(
            f"predictions: sample {seen.sample_id[row]} ('{seen.names[row]}') was predicted twice with different "
            f"results; do the processes hold the same weights and data?"
        )
