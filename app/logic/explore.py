"""What the dataset browser shows of a gallery: filters, totals, counts, facts, and the model's mistakes.

Everything here is computed from the gallery's metadata in memory; see ``embedding_map`` and ``class_colours`` for what
takes longer.

Leafing through images: pages, an order drawn with a seed, and the next image in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from evaluation.tables.per_class import NO_PREDICTION
from retrieval.schema import CONFIDENCE, LABEL, PREDICTED
from vitrail.errors import UserError
from vitrail.types import LABEL_TASK

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

    from app.state.galleries import ServedGallery


NOT_KNOWN = "(not known)"
"""Value of an image whose label is not known, among the values to filter by."""

SPLITS = ("train", "val", "test")
"""Order in which splits are shown."""


@dataclass(frozen=True)
class Facet:
    """What a task says of each of N images.

    Attributes:
        values: those that occur, ascending; last ``NOT_KNOWN`` where it occurs.
        codes: int64 ``(N,)``, index into ``values``.
        labelled: whether it is the data's label; else it is what the model predicts.
    """

    values: tuple[str, ...]
    codes: NDArray[np.int64]
    labelled: bool


@dataclass(frozen=True)
class Filter:
    """Which images are shown: those of the split that have, of each task that is named, one of its values.

    Attributes:
        split: empty for all.
        values: by task, in the order of tasks; tuples, so that figures can be kept by their filter.
    """

    split: str = ""
    values: tuple[tuple[str, tuple[str, ...]], ...] = ()


class Mistakes(NamedTuple):
    """Wrong answers of the model.

    Attributes:
        rows: int64 ``(n,)``, the most confident answer first.
        judged: number of images that have both a label and an answer.
    """

    rows: NDArray[np.int64]
    judged: int


class Explorer:
    """The metadata of a gallery, ready to be filtered.

    Args:
        gallery: the gallery.

    Attributes:
        name: of the gallery.
        ids: of all images, in the gallery's order.
        facets: by task, the class first: its labels where the data have any, else the model's answers.
        splits: that occur, ``train`` first.
        main: task whose values are called classes; empty where there is none.
    """

    def __init__(self, gallery: ServedGallery) -> None:
        self.name = gallery.name
        self._gallery = gallery
        self._metadata = gallery.metadata
        self.ids: list[str] = self._metadata.column("id").to_pylist()
        self._splits = _facet(self._metadata.column("split"), labelled=True)
        self.splits = sorted(self._splits.values, key=lambda split: (_place(split), split))
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
    def attribute_options(self) -> list[str]:
        """All values of all other tasks, such as ``colour: blue``."""
        return list(self._options)

    def id_of(self, row: int) -> str:
        """Name of the image in a row."""
        return self.ids[row]

    def row_of(self, sample_id: object) -> int:
        """Row of an image.

        Raises:
            UserError: if there is no such image.
        """
        if not isinstance(sample_id, str):
            raise UserError(f"gallery {self.name!r}: an image is named by a text; choose one of the gallery")
        return self._gallery.place(sample_id)

    def filter(self, split: object = "", class_name: object = "", attributes: object = ()) -> Filter:
        """A filter of what somebody chose; whatever comes from a browser is checked here.

        Args:
            split: name of a split; nothing for all.
            class_name: value of the main task; nothing for all.
            attributes: of ``attribute_options``; those of one task widen, those of several narrow.

        Raises:
            UserError: for a value that the gallery does not have.
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
        """Rows that the filter leaves, int64 ``(n,)``, ascending."""
        wanted = np.ones(len(self), bool)
        if chosen.split:
            wanted &= self._splits.codes == self._splits.values.index(chosen.split)
        for task, values in chosen.values:
            facet = self.facets[task]
            wanted &= np.isin(facet.codes, [facet.values.index(value) for value in values])
        return np.flatnonzero(wanted).astype(np.int64)

    def totals(self, rows: NDArray[np.int64]) -> str:
        """How many images these are, and in which splits, in words."""
        counts = np.bincount(self._splits.codes[rows], minlength=len(self._splits.values))
        by_split = [f"{split} {counts[self._splits.values.index(split)]:,}" for split in self.splits]
        of = f"{len(rows):,} of {len(self):,} images" if len(rows) != len(self) else f"{len(rows):,} images"
        return f"{of} ({', '.join(by_split)})"

    def counts(self, rows: NDArray[np.int64], task: str) -> pd.DataFrame:
        """Images by value and split.

        Args:
            rows: int64 ``(n,)``, that are counted.
            task: whose values.

        Returns:
            int64, a row for each value in the order of ``facets``, a column for each split.
        """
        import pandas as pd

        facet = self.facets[task]
        shape = len(facet.values), len(self._splits.values)
        cells = facet.codes[rows] * shape[1] + self._splits.codes[rows]
        table = np.bincount(cells, minlength=shape[0] * shape[1]).reshape(shape)
        return pd.DataFrame(table, index=list(facet.values), columns=list(self._splits.values))[self.splits]

    def judged_tasks(self) -> list[str]:
        """Tasks whose answers can be compared with labels."""
        identity = self._gallery.identity
        return [task for task in self.facets if task in identity.predicts and self.facets[task].labelled]

    def mistakes(self, rows: NDArray[np.int64], task: str) -> Mistakes:
        """The rows where the model's answer is not the label.

        Args:
            rows: int64 ``(n,)``, that are looked at.
            task: one of ``judged_tasks()``.

        Raises:
            UserError: for another task.
        """
        import pyarrow.compute as pc

        if task not in self.judged_tasks():
            have = ", ".join(self.judged_tasks()) or "none"
            raise UserError(f"gallery {self.name!r}: labels and answers cannot be compared for {task!r}; tasks: {have}")
        label, answer, confidence = self._answers(rows, task)
        judged = pc.and_(pc.is_valid(label), pc.is_valid(answer)).to_numpy()
        wrong = np.flatnonzero(judged & pc.fill_null(pc.not_equal(label, answer), fill_value=False).to_numpy())
        order = np.argsort(-confidence[wrong], kind="stable")
        return Mistakes(rows[wrong[order]], int(judged.sum()))

    @property
    def made_by(self) -> str:
        """The model whose gallery it is, for people."""
        return self._gallery.run_name or self._gallery.identity.task

    def split_of(self, row: int) -> str:
        """Split that an image belongs to."""
        return self._splits.values[int(self._splits.codes[row])]

    def value_of(self, row: int, task: str) -> str:
        """What a task says of an image."""
        facet = self.facets[task]
        return facet.values[int(facet.codes[row])]

    def facts(self, row: int) -> dict[str, str]:
        """Everything that is known of an image, in words, in the order to be shown."""
        known = self._gallery.row(self.ids[row])
        facts = {name: str(known[name]) for name in ("id", "split", "group", "caption") if known.get(name)}
        for task in self.facets:
            label, answer = known.get(f"{LABEL}{task}"), known.get(f"{PREDICTED}{task}")
            said = []
            if f"{LABEL}{task}" in known:
                said.append(NOT_KNOWN if label is None else str(label))
            if answer is not None:
                verdict = "" if label is None else " ✓" if label == answer else " ✗"
                confidence = known.get(f"{CONFIDENCE}{task}")
                sure = "" if confidence is None else f" ({confidence:.2f})"
                said.append(f"the model says {answer}{sure}{verdict}")
            # An attribute may be called like one of the gallery's own columns.
            facts[f"attribute {task}" if task in facts else task] = "; ".join(said)
        return facts

    def mistake(self, row: int, task: str) -> tuple[str, str, float]:
        """Label, answer, and the answer's confidence (0 to 1) of an image."""
        label, answer, confidence = self._answers(np.array([row], np.int64), task)
        return str(label[0]), str(answer[0]), float(confidence[0])

    def _answers(
        self, rows: NDArray[np.int64], task: str
    ) -> tuple[pa.ChunkedArray, pa.ChunkedArray, NDArray[np.float64]]:
        """Labels, null where not known, answers, and confidences of some rows.

        A model that predicts none of the classes is wrong where there is a label, so it has an answer of its own.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        picked = self._metadata.select([f"{LABEL}{task}", f"{PREDICTED}{task}", f"{CONFIDENCE}{task}"]).take(rows)
        answers = pc.fill_null(picked.column(1).cast(pa.string()), NO_PREDICTION)
        return picked.column(0), answers, picked.column(2).fill_null(0.0).to_numpy().astype(np.float64)

    def _facet_of(self, task: str) -> Facet:
        label, answer = f"{LABEL}{task}", f"{PREDICTED}{task}"
        columns = self._metadata.column_names
        if label in columns and (self._metadata.column(label).null_count < len(self) or answer not in columns):
            return _facet(self._metadata.column(label), labelled=True)
        return _facet(self._metadata.column(answer), labelled=False)


def _facet(column: pa.ChunkedArray, *, labelled: bool) -> Facet:
    """Values and codes of a column of texts."""
    import pandas as pd

    codes, values = pd.factorize(column.to_pandas(), sort=True)
    names = [str(value) for value in values]
    if (codes < 0).any():
        codes = np.where(codes < 0, len(names), codes)
        names.append(NOT_KNOWN)
    return Facet(tuple(names), codes.astype(np.int64), labelled)


def _one_of(value: object, known: Sequence[str], what: str) -> str:
    if isinstance(value, str) and value in known:
        return value
    shown = repr(value)[:80]
    listed = ", ".join(known[:12]) + (" …" if len(known) > 12 else "")
    raise UserError(f"{what} {shown}: is not there; choose one of: {listed or 'there are none'}")


def _place(split: str) -> int:
    return SPLITS.index(split) if split in SPLITS else len(SPLITS)


class Page(NamedTuple):
    """Some of the rows.

    Attributes:
        rows: int64 ``(n,)``.
        number: of the page, from 1.
        pages: how many there are, at least 1.
        first: place of its first row among all rows, from 1; 0 where there are none.
    """

    rows: NDArray[np.int64]
    number: int
    pages: int
    first: int


def shuffled(rows: NDArray[np.int64], seed: int | None) -> NDArray[np.int64]:
    """The rows in an order drawn with a seed; as they are without one."""
    return rows if seed is None else np.random.default_rng(seed).permutation(rows)


def page_of(rows: NDArray[np.int64], number: int, size: int) -> Page:
    """A page of rows; numbers outside are those of the nearest page.

    Args:
        rows: int64 ``(n,)``.
        number: from 1.
        size: rows of a page.
    """
    pages = max(1, -(-len(rows) // size))
    number = min(max(number, 1), pages)
    start = (number - 1) * size
    return Page(rows[start : start + size], number, pages, start + 1 if len(rows) else 0)


def step(rows: NDArray[np.int64], current: int | None, by: int) -> int:
    """Place of the next image in an order; it ends at both ends.

    Args:
        rows: int64 ``(n,)``, at least one.
        current: row that is shown; None, or one that is not among them, for the first.
        by: how far to go, negative for back.
    """
    found = np.flatnonzero(rows == current) if current is not None else rows[:0]
    if not len(found):
        return 0
    return int(np.clip(found[0] + by, 0, len(rows) - 1))
