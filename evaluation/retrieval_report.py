"""Retrieval metrics with 95 % intervals by picture: a CSV file and a table for the terminal.

The intervals are those of ``statistics.group_bootstrap``: pictures are resampled, and all queries of a resampled
picture (itself, or its texts) go with it; the gallery stays as it is. So they say how the numbers would vary with other
queries of the same kind, not with another or a larger gallery.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from evaluation.statistics import Interval, Statistic, group_bootstrap
from vitrail.errors import UserError
from vitrail.files import read_csv, write_csv

if TYPE_CHECKING:
    from rich.table import Table

BOTH, MEAN_RECALL = "both", "mean_recall"
MEDIAN_RANK = "median_rank"


class RankedAnswers(NamedTuple):
    """What the Q queries of one direction got (see ``retrieval.metrics.RankedQueries``).

    Attributes:
        direction: image_to_text or text_to_image.
        first_rank: int64 ``(Q,)``, rank of the first relevant item, 1 is best.
        average_precision: float64 ``(Q,)``, 0 to 1, higher is better.
        pictures: int64 ``(Q,)``, the picture that each query is or belongs to.
    """

    direction: str
    first_rank: NDArray[np.int64]
    average_precision: NDArray[np.float64]
    pictures: NDArray[np.int64]


class Row(NamedTuple):
    """A line of the report; the fields are the columns of the file.

    Attributes:
        direction: image_to_text, text_to_image, or both.
        metric: R@k and mAP (0 to 1, higher is better), median_rank (from 1, lower is better), or mean_recall, the mean
            of the R@k of both directions.
        value: of all queries.
        low: lower end of the 95 % interval.
        high: upper end.
        n: number of queries; for mean_recall of pictures.
    """

    direction: str
    metric: str
    value: float
    low: float
    high: float
    n: int


def report_rows(answers: Sequence[RankedAnswers], *, n_resamples: int = 5_000, seed: int = 0) -> list[Row]:
    """Each metric of each direction, and the mean of all recalls.

    Args:
        answers: of each direction, each with at least one query.
        n_resamples: of the bootstrap.
        seed: of the bootstrap.
    """
    rows = []
    for answer in answers:
        for metric, (value, interval) in _estimates(answer, n_resamples, seed).items():
            rows.append(Row(answer.direction, metric, value, *interval, len(answer.first_rank)))
    pictures = np.concatenate([answer.pictures for answer in answers])
    mean_recall = _mean_recall(answers)
    value = float(mean_recall(np.ones((1, len(pictures))))[0])
    interval = group_bootstrap(mean_recall, pictures, n_resamples, seed=seed)
    return [*rows, Row(BOTH, MEAN_RECALL, value, *interval, len(np.unique(pictures)))]


def write_report(path: Path, rows: Sequence[Row]) -> None:
    """Write the rows as CSV, whole."""
    import pandas as pd

    write_csv(path, pd.DataFrame(rows, columns=list(Row._fields)))


def read_report(path: Path) -> list[Row]:
    """What ``write_report`` wrote.

    Raises:
        UserError: the file cannot be read, has no rows, or has other columns or values.
    """
    import pandas as pd

    try:
        frame = read_csv(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as CSV ({error}); restore it, or run `test` again") from error
    if list(frame.columns) != list(Row._fields) or frame.empty:
        raise UserError(f"{path}: needs rows with the columns {', '.join(Row._fields)}; run `test` again")
    numbers = frame[["value", "low", "high", "n"]]
    if not all(pd.api.types.is_numeric_dtype(kind) for kind in numbers.dtypes) or not np.isfinite(numbers).all(
        axis=None
    ):
        raise UserError(f"{path}: value, low, high and n must be finite numbers; run `test` again")
    return [Row(*values) for values in frame.itertuples(index=False, name=None)]


def report_table(rows: Sequence[Row], title: str, candidates: Mapping[str, int] | None = None) -> Table:
    """The rows as a table with a column for each direction, and the mean recall below.

    Args:
        rows: of the report.
        title: above it.
        candidates: by direction how many items were ranked; recalls that so few make trivial are named.
    """
    from rich.table import Table
    from rich.text import Text

    cells = {(row.direction, row.metric): with_interval(row) for row in rows}
    directions = {row.direction: row.n for row in rows if row.direction != BOTH}
    caption = " ".join(f"{row.metric} {with_interval(row)}" for row in rows if row.direction == BOTH)
    from retrieval.metrics import RECALL_AT

    for direction, count in (candidates or {}).items():
        if trivial := [f"R@{k}" for k in RECALL_AT if k >= count]:
            caption += f"\n{', '.join(trivial)} of {direction} cannot be below 1: there are {count} candidates"
    table = Table(title=Text(title), caption=Text(caption))
    table.add_column("metric")
    for direction, n in directions.items():
        table.add_column(f"{direction}\nn = {n}")
    for metric in dict.fromkeys(row.metric for row in rows if row.direction != BOTH):
        table.add_row(metric, *(Text(cells[direction, metric]) for direction in directions))
    return table


def _estimates(answer: RankedAnswers, n_resamples: int, seed: int) -> dict[str, tuple[float, Interval]]:
    def estimate(statistic: Statistic) -> tuple[float, Interval]:
        value = statistic(np.ones((1, len(answer.pictures))))
        return float(value[0]), group_bootstrap(statistic, answer.pictures, n_resamples, seed=seed)

    from retrieval.metrics import RECALL_AT  # which takes PyTorch along, and who only reads a report needs none

    found = {f"R@{k}": estimate(_mean((answer.first_rank <= k).astype(np.float64))) for k in RECALL_AT}
    # The bootstrap is made for values from 0 to 1; 1 / median is one, and turns the ends of the interval round.
    inverse, interval = estimate(_inverse_median(answer.first_rank))
    found[MEDIAN_RANK] = 1 / inverse, Interval(1 / interval.high, 1 / interval.low)
    found["mAP"] = estimate(_mean(answer.average_precision))
    return found


def _mean_recall(answers: Sequence[RankedAnswers]) -> Statistic:
    """Mean of the recalls of all directions, whose queries stand one after the other."""
    from retrieval.metrics import RECALL_AT

    parts = []
    for answer in answers:
        hits = np.stack([answer.first_rank <= k for k in RECALL_AT], axis=1)
        parts.append(_mean(hits.mean(axis=1)))
    ends = np.cumsum([len(answer.first_rank) for answer in answers])[:-1]

    def statistic(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        own = np.split(weights, ends, axis=1)
        values: NDArray[np.float64] = np.mean([part(w) for part, w in zip(parts, own, strict=True)], axis=0)
        return values

    return statistic


def _mean(values: NDArray[np.float64]) -> Statistic:
    """Mean as a function of sample weights."""
    return lambda weights: cast("NDArray[np.float64]", weights @ values / weights.sum(axis=1))


def _inverse_median(ranks: NDArray[np.int64]) -> Statistic:
    """1 / median as a function of sample weights that are whole numbers."""
    order = np.argsort(ranks, kind="stable")
    ordered = ranks[order].astype(np.float64)

    def statistic(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        upto = np.cumsum(weights[:, order], axis=1)
        half = upto[:, -1:] / 2
        # The two middle ones of an even number, twice the same one of an odd number.
        lower, upper = ordered[(upto < half).sum(axis=1)], ordered[(upto <= half).sum(axis=1)]
        values: NDArray[np.float64] = 2 / (lower + upper)
        return values

    return statistic


def with_interval(row: Row) -> str:
    """A value with its interval: ranks to one decimal, the others to three."""
    digits = 1 if row.metric == MEDIAN_RANK else 3
    return f"{row.value:.{digits}f} [{row.low:.{digits}f}, {row.high:.{digits}f}]"
