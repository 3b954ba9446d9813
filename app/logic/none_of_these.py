"""Whether an image shows none of some labels: its best similarity compared with that of images that show none of them.

A softmax always finds one of the labels likely, also for an image that shows none. The similarity itself shows it, but
what is high differs from model to model and from label to label. So it is compared with a background: images of the
run's own gallery that, as far as is known, show none of the labels. For each of them, as for the uploaded image, the
statistic is the largest cosine over the labels. The conformal p-value (Vovk, Gammerman & Shafer, Algorithmic Learning
in a Random World, 2005) of the hypothesis that the image is one more of the background is

    p = (1 + number of background images with at least its statistic) / (1 + number of background images)

and where p > ``ALPHA`` the verdict is "none of these". If the image shows none of the labels and is otherwise like the
background, p ≤ ``ALPHA`` happens in at most that share of cases, however good the model is; a poor model only reports
"none of these" more often than it should. Images of other kinds than the gallery's are not covered by that.

What an image shows is taken from its labels, and from the predictions where there is no label. A label that names
values of tasks ("blue mug": a colour and a class) is shown by an image that has them all; one that names none ("cup")
counts as shown by no image, so that mugs stay in its background and make the verdict stricter. Training images are
left out where there are others: the model knows them by heart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from app.state.limits import SingleFlightCache
from retrieval.metrics import class_texts
from retrieval.schema import LABEL, PREDICTED
from retrieval.search.text import words
from vitrail.types import LABEL_TASK

if TYPE_CHECKING:
    from app.state.context import AppContext
    from app.state.galleries import ServedGallery
    from app.state.runs import ServedRun

ALPHA = 0.05
"""Share of images that show none of the labels for which the verdict may miss it."""

FEWEST = 19
"""Images with which a p-value can be as low as ``ALPHA``."""

MOST = 2_000
"""Background images that are kept; more would only make p-values finer."""


@dataclass(frozen=True)
class Verdict:
    """Whether an image shows none of the labels, None where unknown; its p-value (NaN), and the background images."""

    none_of_these: bool | None
    p_value: float
    count: int

    @property
    def text(self) -> str:
        """The verdict in one line."""
        if self.none_of_these is None:
            return (
                f"No verdict: only {self.count} images are known that show none of the labels, and {FEWEST} are needed."
            )
        compared = f"p = {self.p_value:.3f}, compared with {self.count} such images"
        if self.none_of_these:
            return f"None of these: images that show none of the labels are as similar to one of them ({compared})."
        return f"One of these: few images that show none of the labels are as similar to one of them ({compared})."


class Background:
    """Images that others are compared with; none by default, so that there are no verdicts.

    Args:
        vectors: float32 ``(N, D)``, of unit length, made by the run that is asked.
        shown: by task what each of the N images shows, of multi-label tasks lists; None where not known.
    """

    def __init__(
        self,
        vectors: NDArray[np.float32] | None = None,
        shown: Mapping[str, Sequence[str | list[str] | None]] | None = None,
    ) -> None:
        vectors, shown = np.zeros((0, 1), np.float32) if vectors is None else vectors, shown or {}
        self._vectors = vectors
        self._shown = {
            task: [set(value) if isinstance(value, list) else {value} if value else set() for value in values]
            for task, values in shown.items()
        }
        self._words = {task: _words_of(task, values) for task, values in self._shown.items()}

    @classmethod
    def of(cls, gallery: ServedGallery) -> Background:
        """Take images evenly from a gallery."""
        columns = gallery.metadata
        splits = np.array(columns.column("split").to_pylist(), dtype=object)
        unseen = np.flatnonzero(splits != "train")
        rows = unseen if len(unseen) >= FEWEST else np.arange(len(splits))
        rows = rows[np.unique(np.linspace(0, len(rows) - 1, min(MOST, len(rows))).astype(np.int64))]
        shown: dict[str, list[str | list[str] | None]] = {}
        for task in gallery.identity.worded(gallery.tasks):
            known: list[str | list[str] | None] = [None] * len(splits)
            for column in (f"{LABEL}{task}", f"{PREDICTED}{task}"):
                if column in columns.column_names:
                    given = columns.column(column).to_pylist()
                    known = [one or other for one, other in zip(known, given, strict=True)]
            shown[task] = [known[row] for row in rows.tolist()]
        ids = columns.column("id").take(rows).to_pylist()
        return cls(gallery.gallery.vectors(ids), shown)

    def __len__(self) -> int:
        return len(self._vectors)

    def showing_none_of(self, labels: Sequence[str]) -> NDArray[np.bool_]:
        """Return which images are not known to show any of the labels, bool ``(N,)``."""
        shows = np.zeros(len(self), dtype=bool)
        for label in labels:
            shows |= self._showing(set(words(label)))
        return ~shows

    def verdicts(self, best: NDArray[np.float64], labels: Sequence[str], texts: NDArray[np.float32]) -> list[Verdict]:
        """Return a verdict on each image.

        Args:
            best: float64 ``(Q,)``, the largest cosine of each of Q images over the labels.
            labels: C of them.
            texts: float32 ``(C, D)``, their embeddings.
        """
        rows = np.flatnonzero(self.showing_none_of(labels))
        if len(rows) < FEWEST:
            return [Verdict(None, float("nan"), len(rows)) for _ in best]
        others = np.sort((self._vectors[rows] @ texts.T).max(axis=1).astype(np.float64))
        at_least = len(others) - np.searchsorted(others, best, side="left")
        p_values = (1 + at_least) / (1 + len(others))
        return [Verdict(bool(p_value > ALPHA), float(p_value), len(others)) for p_value in p_values]

    def _showing(self, label: set[str]) -> NDArray[np.bool_]:
        """Which images have every value that a label names; none where it names no value."""
        names_any, shows = False, np.ones(len(self), dtype=bool)
        for task, called in self._words.items():
            if named := [value for value, own in called.items() if own <= label]:
                names_any = True
                shows &= np.array([bool(values.intersection(named)) for values in self._shown[task]], bool)
        return shows if names_any else np.zeros(len(self), dtype=bool)


class Backgrounds:
    """The background of each run, made when it is first asked for; from several threads too."""

    def __init__(self, context: AppContext) -> None:
        self._context = context
        self._made: SingleFlightCache[Background] = SingleFlightCache(len(context.runs))

    def of(self, run: ServedRun) -> Background:
        """Return images of the first gallery that the run made; none where no gallery of it is served."""
        return self._made.get(run.name, lambda: self._make(run))

    def _make(self, run: ServedRun) -> Background:
        galleries = self._context.galleries.values()
        own = next((gallery for gallery in galleries if gallery.identity.weights == run.weights), None)
        return Background() if own is None else Background.of(own)


def _words_of(task: str, values: Sequence[set[str]]) -> dict[str, set[str]]:
    """The words that name each value: of a class the last one, as people say "bottle" for ``water_bottle``."""
    known = {value for own in values for value in own}
    called = class_texts(known, "last") if task == LABEL_TASK else {value: value for value in known}
    return {value: found for value, text in called.items() if (found := set(words(text)))}
