"""What the dataset browser shows of a gallery: filters, totals, counts, facts, mistakes of the model, corrections.

Everything here is computed from the gallery's metadata in memory; see ``widgets.charts`` for what takes longer.
Labels that a person corrects are kept by gallery and image, and written as a table, which ``vitrail relabel`` applies.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from app.state.context import shortened
from app.state.galleries import NO_LABEL, NOT_KNOWN, Facet, facet_of
from evaluation.tables.per_class import NO_PREDICTION
from retrieval.schema import CONFIDENCE, LABEL, PREDICTED, Predicted, prediction_of, value_text
from vitrail.errors import UserError
from vitrail.files import write_csv
from vitrail.types import LABEL_TASK

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

    from app.state.galleries import ServedGallery


_SPLITS = ("train", "val", "test")
"""Order in which splits are shown."""


@dataclass(frozen=True)
class Filter:
    """Which images are shown: those of the split that have, of each task that is named, one of its values.

    Attributes:
        split: empty for all.
        values: by task, in the order of tasks; tuples, so that figures can be cached by their filter.
    """

    split: str = ""
    values: tuple[tuple[str, tuple[str, ...]], ...] = ()


class Mistakes(NamedTuple):
    """Rows of wrong predictions, int64 ``(n,)``, the most confident first, and how many have label and prediction."""

    rows: NDArray[np.int64]
    evaluated: int


class Disagreements(NamedTuple):
    """Images for which two models predict different values of a task.

    Attributes:
        rows: int64 ``(n,)``, those first on which the first model is the most confident.
        compared: images of which both have a prediction.
        labelled: those of them whose label is known.
        right: predictions of each model that are the label.
    """

    rows: NDArray[np.int64]
    compared: int
    labelled: int
    right: tuple[int, int]


class Explorer:
    """The metadata of a gallery, ready to be filtered.

    Attributes:
        ids: of all images, in the gallery's order.
        facets: by task, the class first: its labels where the data have any, otherwise the predictions.
        splits: that occur, ``train`` first.
        main: task whose values are called classes; empty where there is none.
        made_by: name of the model.
    """

    def __init__(self, gallery: ServedGallery) -> None:
        self.name = gallery.name
        self.made_by = gallery.run_name or gallery.identity.task
        self._gallery = gallery
        self._metadata = gallery.metadata
        self.ids: list[str] = self._metadata.column("id").to_pylist()
        self._splits = facet_of(self._metadata.column("split"))
        order = {split: place for place, split in enumerate(_SPLITS)}
        self.splits = sorted(self._splits.values, key=lambda split: (order.get(split, len(order)), split))
        self.facets = {task: self._facet_of(task) for task in gallery.tasks}
        self.main = LABEL_TASK if LABEL_TASK in self.facets else next(iter(self.facets), "")
        self._options = {
            f"{task}: {value}": (task, value)
            for task, facet in self.facets.items()
            if task != self.main
            for value in facet.values
        }

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def classes(self) -> tuple[str, ...]:
        """Values of the main task."""
        return self.facets[self.main].values if self.main else ()

    @property
    def has_single_classes(self) -> bool:
        """Whether an image has one class of a list, which a person can correct."""
        return bool(self.main) and self._gallery.identity.kind(self.main) in ("single_label", "ordinal")

    @property
    def attribute_options(self) -> list[str]:
        """All values of all other tasks, such as ``colour: blue``."""
        return list(self._options)

    def row_of(self, sample_id: object) -> int:
        """Return the row of an image; raise ``UserError`` where there is no such image."""
        if not isinstance(sample_id, str):
            raise UserError(f"gallery {self.name!r}: an image is named by a text; choose one of the gallery")
        return self._gallery.place(sample_id)

    def filter(self, split: object = "", class_name: object = "", attributes: object = ()) -> Filter:
        """Make a filter; whatever comes from a browser is checked here.

        Args:
            split: name of a split; nothing for all.
            class_name: value of the main task; nothing for all.
            attributes: of ``attribute_options``; those of one task widen, those of several narrow.

        Raises:
            UserError: the gallery does not have such a value.
        """
        chosen: dict[str, list[str]] = {}
        if class_name not in ("", None):
            chosen[self.main] = [_one_of(class_name, self.classes, f"gallery {self.name!r}: class")]
        if attributes is not None and not isinstance(attributes, (list, tuple)):
            raise UserError(f"gallery {self.name!r}: attributes are a list such as ['colour: blue']")
        for option in attributes or ():
            known = _one_of(option, self.attribute_options, f"gallery {self.name!r}: attribute")
            task, value = self._options[known]
            chosen.setdefault(task, []).append(value)
        asked = "" if split in ("", None) else _one_of(split, self.splits, f"gallery {self.name!r}: split")
        values = tuple((task, tuple(sorted(set(chosen[task])))) for task in self.facets if task in chosen)
        return Filter(asked, values)

    def find(self, chosen: Filter) -> NDArray[np.int64]:
        """Return the rows that the filter leaves, int64 ``(n,)``, ascending."""
        wanted = np.ones(len(self), bool)
        if chosen.split:
            wanted &= self._splits.having([chosen.split])
        for task, values in chosen.values:
            wanted &= self.facets[task].having(values)
        return np.flatnonzero(wanted).astype(np.int64)

    def totals(self, rows: NDArray[np.int64]) -> str:
        """Return how many images these are, and in which splits, in words."""
        counts = np.bincount(self._splits.first[rows], minlength=len(self._splits.values))
        by_split = [f"{split} {counts[self._splits.values.index(split)]:,}" for split in self.splits]
        of = f"{len(rows):,} of {len(self):,} images" if len(rows) != len(self) else f"{len(rows):,} images"
        return f"{of} ({', '.join(by_split)})"

    def counts(self, rows: NDArray[np.int64], task: str) -> pd.DataFrame:
        """Count rows by value of a task and by split; int64, a row per value of ``facets``, a column per split.

        An image counts for each of its labels.
        """
        import pandas as pd

        facet = self.facets[task]
        shape = len(facet.values), len(self._splits.values)
        counted = np.isin(facet.rows, rows)
        cells = facet.codes[counted] * shape[1] + self._splits.first[facet.rows[counted]]
        table = np.bincount(cells, minlength=shape[0] * shape[1]).reshape(shape)
        return pd.DataFrame(table, index=list(facet.values), columns=list(self._splits.values))[self.splits]

    def evaluated_tasks(self) -> list[str]:
        """Return the tasks whose predictions can be compared with labels."""
        identity = self._gallery.identity
        return [
            task for task in identity.worded(self.facets) if task in identity.predicts and self.facets[task].labelled
        ]

    def mistakes(self, rows: NDArray[np.int64], task: str) -> Mistakes:
        """Return those of some rows whose prediction is not the label; the task is one of ``evaluated_tasks()``."""
        import pyarrow.compute as pc

        if task not in self.evaluated_tasks():
            have = ", ".join(self.evaluated_tasks()) or "none"
            raise UserError(
                f"gallery {self.name!r}: labels and predictions cannot be compared for {task!r}; tasks: {have}"
            )
        label, predicted, confidence = self._predictions(rows, task)
        known = pc.and_(pc.is_valid(label), pc.is_valid(predicted)).to_numpy()
        wrong = np.flatnonzero(known & pc.fill_null(pc.not_equal(label, predicted), fill_value=False).to_numpy())
        order = np.argsort(-confidence[wrong], kind="stable")
        return Mistakes(rows[wrong[order]], int(known.sum()))

    def predicted_tasks(self) -> list[str]:
        """Return the tasks of which there are predictions."""
        return [task for task in self._gallery.identity.worded(self.facets) if task in self._gallery.identity.predicts]

    def shares_images(self, other: Explorer) -> bool:
        """Return whether two galleries have images in common."""
        return self._gallery.shares_images(other._gallery)

    def disagreements(self, rows: NDArray[np.int64], task: str, other: Explorer) -> Disagreements:
        """Return those of some rows for which another gallery's model predicts another value of a task.

        Raises:
            UserError: one of the models does not predict the task.
        """
        for explorer in (self, other):
            if task not in explorer.predicted_tasks():
                have = ", ".join(explorer.predicted_tasks()) or "none"
                raise UserError(f"gallery {explorer.name!r}: no predictions of {task!r}; tasks: {have}")
        places = {sample_id: place for place, sample_id in enumerate(other.ids)}
        shared = np.array([row for row in rows.tolist() if self.ids[row] in places], np.int64)
        theirs = np.array([places[self.ids[row]] for row in shared.tolist()], np.int64)
        label, one, confidence = (np.array(part, object) for part in self._predictions(shared, task))
        two = np.array(other._predictions(theirs, task)[1], object)
        known = np.array([value is not None for value in label], bool)
        differs = np.flatnonzero(one != two)
        order = np.argsort(-confidence[differs].astype(np.float64), kind="stable")
        right = int((known & (one == label)).sum()), int((known & (two == label)).sum())
        return Disagreements(shared[differs[order]], len(shared), int(known.sum()), right)

    def prediction(self, sample_id: str, task: str) -> tuple[str, str, float]:
        """Return label (empty where not known), prediction, and its confidence (0 to 1) of an image."""
        label, predicted, confidence = self._predictions(np.array([self.row_of(sample_id)], np.int64), task)
        return label[0].as_py() or "", str(predicted[0]), float(confidence[0])

    def mistake(self, row: int, task: str) -> tuple[str, str, float]:
        """Return label, prediction, and its confidence (0 to 1) of an image."""
        label, predicted, confidence = self._predictions(np.array([row], np.int64), task)
        return str(label[0]), str(predicted[0]), float(confidence[0])

    def split_of(self, row: int) -> str:
        """Return the split of an image."""
        return self._splits.values[int(self._splits.first[row])]

    def value_of(self, row: int, task: str) -> str:
        """Return the value of a task for an image: its class, its labels, or its number."""
        value = self._metadata.column(self._column_of(task))[row].as_py()
        return NOT_KNOWN if value is None else value_text(value) or NO_LABEL

    def facts(self, row: int) -> dict[str, str]:
        """Return everything that is known of an image, in words, in the order to be shown."""
        known = self._gallery.row(self.ids[row])
        facts = {name: str(known[name]) for name in ("id", "split", "group", "caption") if known.get(name)}
        for task in self.facets:
            label, predicted = known.get(f"{LABEL}{task}"), prediction_of(known, task)
            parts = []
            if f"{LABEL}{task}" in known:
                parts.append(NOT_KNOWN if label is None else value_text(label) or NO_LABEL)
            if predicted is not None:
                verdict = " ✓" if _same(label, predicted.value) else " ✗"
                verdict = "" if label is None or isinstance(label, float) else verdict
                parts.append(f"the model predicts {_shown(predicted)}{verdict}")
            # An attribute may have the name of one of the gallery's own columns.
            facts[f"attribute {task}" if task in facts else task] = "; ".join(parts)
        return facts

    def _predictions(
        self, rows: NDArray[np.int64], task: str
    ) -> tuple[pa.ChunkedArray, pa.ChunkedArray, NDArray[np.float64]]:
        """Labels (null where not known), predictions, and confidences of some rows.

        A model that predicts none of the classes is wrong where there is a label, so this is a prediction of its own.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        columns = self._metadata
        if f"{LABEL}{task}" not in columns.column_names:
            columns = columns.append_column(f"{LABEL}{task}", pa.nulls(len(self), pa.string()))
        picked = columns.select([f"{LABEL}{task}", f"{PREDICTED}{task}", f"{CONFIDENCE}{task}"]).take(rows)
        if self._gallery.identity.kind(task) == "multi_label":
            label, predicted = (_joined(picked.column(place)) for place in (0, 1))
            least = [min(shares or [0.0]) for shares in picked.column(2).to_pylist()]
            return label, pc.fill_null(predicted, NO_PREDICTION), np.array(least, np.float64)
        predicted = pc.fill_null(picked.column(1).cast(pa.string()), NO_PREDICTION)
        return picked.column(0), predicted, picked.column(2).fill_null(0.0).to_numpy().astype(np.float64)

    def _column_of(self, task: str) -> str:
        """The column of a task's labels, or of its predictions where no label is known."""
        label, predicted = f"{LABEL}{task}", f"{PREDICTED}{task}"
        columns = self._metadata.column_names
        if label in columns and (self._metadata.column(label).null_count < len(self) or predicted not in columns):
            return label
        return predicted

    def _facet_of(self, task: str) -> Facet:
        column = self._column_of(task)
        scale = self._gallery.identity.scales.get(task, ())
        return facet_of(self._metadata.column(column), scale, labelled=column == f"{LABEL}{task}")


def _joined(lists: pa.ChunkedArray) -> pa.ChunkedArray:
    """Labels as texts, in an order that does not depend on their confidences."""
    import pyarrow as pa

    texts = [None if labels is None else ", ".join(sorted(labels)) or NO_LABEL for labels in lists.to_pylist()]
    return pa.chunked_array([pa.array(texts, pa.string())])


def _same(label: object, predicted: object) -> bool:
    return (
        sorted(label) == sorted(predicted)
        if isinstance(label, list) and isinstance(predicted, list)
        else label == predicted
    )


def _shown(predicted: Predicted) -> str:
    if isinstance(predicted.value, str) and isinstance(predicted.confidence, float):
        return f"{predicted.value} ({predicted.confidence:.2f})"
    return str(predicted)


def _one_of(value: object, known: Sequence[str], what: str) -> str:
    if isinstance(value, str) and value in known:
        return value
    listed = ", ".join(known[:12]) + (" …" if len(known) > 12 else "")
    raise UserError(f"{what} {shortened(repr(value))}: is not there; choose one of: {listed or 'there are none'}")


class Page(NamedTuple):
    """Some of the rows, int64 ``(n,)``; page number from 1, how many pages there are, and place of the first row."""

    rows: NDArray[np.int64]
    number: int
    pages: int
    first: int


def page_of(rows: NDArray[np.int64], number: int, size: int) -> Page:
    """Return a page of ``size`` rows; numbers from 1, those outside are the nearest page."""
    pages = max(1, -(-len(rows) // size))
    number = min(max(number, 1), pages)
    start = (number - 1) * size
    return Page(rows[start : start + size], number, pages, start + 1 if len(rows) else 0)


def shuffled(rows: NDArray[np.int64], seed: int | None) -> NDArray[np.int64]:
    """Return the rows in a random order by a seed; as they are without one."""
    return rows if seed is None else np.random.default_rng(seed).permutation(rows)


def step(rows: NDArray[np.int64], current: int | None, by: int) -> int:
    """Return the place of the next image in an order of one row or more, which ends at both ends.

    Args:
        rows: int64 ``(n,)``.
        current: row that is shown; None, or one that is not among them, for the first.
        by: how far to go, negative for back.
    """
    found = np.flatnonzero(rows == current) if current is not None else rows[:0]
    return int(np.clip(found[0] + by, 0, len(rows) - 1)) if len(found) else 0


Corrections = dict[str, dict[str, str]]
"""Of each gallery the corrected value of the main task by image."""

MOST = 10_000
"""Corrections that a browser keeps."""


def read_corrections(kept: object, explorer: Explorer) -> dict[str, str]:
    """Return the corrections of a gallery; what is not of it is left out: a browser kept them."""
    own = kept.get(explorer.name) if isinstance(kept, Mapping) else None
    if not isinstance(own, Mapping):
        return {}
    known = set(explorer.ids)
    found = [(key, value) for key, value in own.items() if key in known and value in explorer.classes]
    return dict(found[:MOST])


def corrected(kept: object, explorer: Explorer, sample_id: object, value: object) -> Corrections:
    """Return the kept corrections with one more; the label that the data have removes it.

    Raises:
        UserError: there is no such image or class, or there are too many corrections.
    """
    row = explorer.row_of(sample_id)
    if not isinstance(value, str) or value not in explorer.classes:
        raise UserError(f"{explorer.main}: has no value {shortened(repr(value))}; choose one of the list")
    own = read_corrections(kept, explorer) | {explorer.ids[row]: value}
    if value == explorer.value_of(row, explorer.main):
        del own[explorer.ids[row]]
    if len(own) > MOST:
        raise UserError(f"{len(own):,} corrections are too many for a browser; download and apply them first")
    others = {name: dict(values) for name, values in kept.items()} if isinstance(kept, Mapping) else {}
    return {**others, explorer.name: own}


def corrections_file(own: Mapping[str, str], explorer: Explorer) -> Path:
    """Write corrections as a CSV with the columns ``id``, ``task``, ``label`` and ``old_label``."""
    import pandas as pd

    rows: list[dict[str, Any]] = [
        {
            "id": sample_id,
            "task": explorer.main,
            "label": value,
            "old_label": explorer.value_of(explorer.row_of(sample_id), explorer.main),
        }
        for sample_id, value in own.items()
    ]
    digest = hashlib.sha256(repr((explorer.name, rows)).encode()).hexdigest()[:32]
    path = Path(os.environ["GRADIO_TEMP_DIR"]) / "corrections" / digest / "corrections.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_csv(path, pd.DataFrame(rows))
    return path
