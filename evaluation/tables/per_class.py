"""Confusion matrix of one task and the per-class report that follows from it, as tables with class names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vitrail.types import UNKNOWN

if TYPE_CHECKING:
    import pandas as pd


NO_PREDICTION = "(no prediction)"
"""Column of the samples for which no class was predicted, see ``predictions.predicted_classes``."""


def confusion_matrix(
    targets: NDArray[np.int64], predicted: NDArray[np.int64], class_names: Sequence[str]
) -> pd.DataFrame:
    """Count how often each target (row) was predicted as each class (column).

    Args:
        targets: int64 ``(N,)``, all known.
        predicted: int64 ``(N,)``, ``UNKNOWN`` where no class was predicted.
        class_names: in the order of the indices.

    Returns:
        int64 ``(C, C)``, index ``target`` and columns ``predicted``; one more column, ``NO_PREDICTION``, where some
        sample has none.
    """
    size = len(class_names)
    cells = targets * (size + 1) + np.where(predicted == UNKNOWN, size, predicted)
    counts = np.bincount(cells, minlength=size * (size + 1)).reshape(size, size + 1)
    return confusion_frame(counts.astype(np.int64), class_names)


def confusion_frame(counts: NDArray[np.int64], class_names: Sequence[str]) -> pd.DataFrame:
    """Name the classes of counted predictions.

    Args:
        counts: int64 ``(C, C)`` with a row for each target, or ``(C, C + 1)``, whose last column counts the samples
            without a prediction; it is left out where there are none.
        class_names: in the order of the indices.
    """
    import pandas as pd

    size = len(class_names)
    names = [*class_names]
    if counts[:, size:].any():
        names.append(NO_PREDICTION)
    index, columns = pd.Index(class_names, name="target"), pd.Index(names, name="predicted")
    return pd.DataFrame(counts[:, : len(names)], index=index, columns=columns)


@dataclass(frozen=True)
class SparseConfusion:
    """Counted predictions of many classes, of whose pairs few occur: time and memory go with the samples.

    Attributes:
        targets: int64 ``(P,)``, of each pair that occurs, ascending.
        predicted: int64 ``(P,)``, the number of classes where no class was predicted.
        counts: int64 ``(P,)``, samples.
        class_names: in the order of the indices.
    """

    targets: NDArray[np.int64]
    predicted: NDArray[np.int64]
    counts: NDArray[np.int64]
    class_names: Sequence[str]

    def report(self) -> pd.DataFrame:
        """Return what ``class_report`` returns of the whole matrix."""
        size, right = len(self.class_names), self.targets == self.predicted
        support, answers = self._sums(self.targets), self._sums(self.predicted)
        hits = np.bincount(self.targets[right], self.counts[right], size).astype(np.float64)
        return _report(hits, support[:size], answers[:size], self.class_names)

    def pairs(self) -> pd.DataFrame:
        """Return one row a pair that occurs: ``target``, ``predicted``, ``count``, and its ``share`` of the target."""
        import pandas as pd

        names = np.array([*self.class_names, NO_PREDICTION], dtype=object)
        share = self.counts / self._sums(self.targets)[self.targets]
        columns = {"target": names[self.targets], "predicted": names[self.predicted]}
        return pd.DataFrame({**columns, "count": self.counts, "share": share})

    def most_confused(self, number: int) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Return counts, and shares of the target, of the classes with the most errors, as ``confusion_frame``."""
        import pandas as pd

        size = len(self.class_names)
        wrong = self.counts * (self.targets != self.predicted)
        errors = np.bincount(self.targets, wrong, size) + np.bincount(self.predicted, wrong, size + 1)[:size]
        kept = np.sort(np.argsort(-errors, kind="stable")[:number])
        place = np.full(size + 1, -1)
        place[kept] = np.arange(len(kept))
        own = (place[self.targets] >= 0) & (place[self.predicted] >= 0)
        matrix = np.zeros((len(kept), len(kept)), np.int64)
        matrix[place[self.targets[own]], place[self.predicted[own]]] = self.counts[own]
        names = [self.class_names[row] for row in kept]
        frame = pd.DataFrame(matrix, pd.Index(names, name="target"), pd.Index(names, name="predicted"))
        totals = pd.Series(self._sums(self.targets)[kept], frame.index)
        return frame, frame.div(totals.where(totals > 0), axis=0)

    def _sums(self, codes: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.bincount(codes, self.counts, len(self.class_names) + 1).astype(np.float64)


def class_report(confusion: pd.DataFrame) -> pd.DataFrame:
    """Return precision, recall and F1 (0 to 1, higher is better) and support of each class.

    A class without a target has no recall and one that is never predicted no precision: both count as 0 here, as in
    scikit-learn's ``classification_report``. In ``macro avg`` precision and F1 are over the classes that occur in
    targets or predictions, as in scikit-learn's scores, and recall is over those that have samples, which makes it
    ``balanced_accuracy_score``. Samples without a prediction are wrong. Without any sample the averages are NaN.

    Args:
        confusion: from ``confusion_matrix``.

    Returns:
        One row a class, then ``accuracy``, ``macro avg`` and ``weighted avg``; columns ``precision``, ``recall``,
        ``f1``, ``support``; the index is called ``class``.
    """
    counts = confusion.to_numpy(dtype=np.float64)
    answers = counts[:, : len(counts)].sum(axis=0)
    return _report(np.diag(counts), counts.sum(axis=1), answers, list(confusion.index))


def _report(
    hits: NDArray[np.float64], support: NDArray[np.float64], answers: NDArray[np.float64], class_names: Sequence[str]
) -> pd.DataFrame:
    """The report of right predictions, samples and predictions of each class, all ``(C,)``."""
    import pandas as pd

    scores = np.stack([_ratio(hits, answers), _ratio(hits, support), _ratio(2 * hits, support + answers)], axis=1)
    total = support.sum()
    occurs = support + answers > 0
    counted = np.stack([occurs, support > 0, occurs], axis=1)
    some = total if total else np.nan
    rows = [
        *np.column_stack([scores, support]),
        [*np.full(3, hits.sum() / some), total],
        [*((scores * counted).sum(axis=0) / np.where(counted.any(axis=0), counted.sum(axis=0), np.nan)), total],
        [*(support @ scores / some), total],
    ]
    index = pd.Index([*class_names, "accuracy", "macro avg", "weighted avg"], name="class")
    columns = ["precision", "recall", "f1", "support"]
    return pd.DataFrame(np.array(rows), columns=columns, index=index).astype({"support": "int64"})


def normalise_by_target(counts: pd.DataFrame) -> pd.DataFrame:
    """Divide each row of a confusion matrix by its sum; the diagonal becomes the recall.

    Returns:
        float64, of the same shape, in [0, 1]; NaN in the rows of classes that have no target.
    """
    totals = counts.sum(axis=1)
    return counts.div(totals.where(totals > 0), axis=0)


def _ratio(numerator: NDArray[np.float64], denominator: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)
