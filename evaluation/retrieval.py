"""Retrieval metrics with 95 % intervals.

``report_rows`` is for images and texts that belong together: its intervals resample images, and all queries of a
resampled image (itself, or its texts) go with it, while the gallery stays as it is.

The rest measures how well rankers (``retrieval.search.searcher``) find what people ask for. Queries are all
combinations of a class and attribute values that some image has, and an image is relevant if its true labels contain
them. ``text`` over the true labels, the most that text can reach, and ``random``, the least, depend on no model.
The intervals resample queries in groups of the same head (the class, or what is named last), because "blue bottle" and
"blue plastic bottle" are much the same question: they show how the numbers would vary with other such questions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from evaluation.statistics.intervals import Interval, Statistic, estimate, group_interval, share_statistic
from vitrail.console import Table
from vitrail.errors import UserError
from vitrail.files import read_csv, write_csv
from vitrail.types import LABEL_TASK

if TYPE_CHECKING:
    import torch

    from retrieval.gallery import Gallery
    from retrieval.metrics import AttributeQuery, ClassWords
    from retrieval.search.searcher import Ranker, Searcher
    from retrieval.search.text import TextSource

BOTH, MEAN_RECALL = "both", "mean_recall"
MEDIAN_RANK = "median_rank"


class RankedAnswers(NamedTuple):
    """Results of the Q queries of one direction (see ``retrieval.metrics.RankedQueries``).

    Attributes:
        direction: image_to_text or text_to_image.
        first_rank: int64 ``(Q,)``, rank of the first relevant item, 1 is best.
        average_precision: float64 ``(Q,)``, 0 to 1, higher is better.
        images: int64 ``(Q,)``, the image that each query is or belongs to.
    """

    direction: str
    first_rank: NDArray[np.int64]
    average_precision: NDArray[np.float64]
    images: NDArray[np.int64]


class Row(NamedTuple):
    """A line of the report; the fields are the columns of the file.

    Attributes:
        direction: image_to_text, text_to_image, or both.
        metric: R@k and mAP (0 to 1, higher is better), median_rank (from 1, lower is better), or mean_recall, the mean
            of the R@k of both directions.
        value: of all queries.
        low: lower end of the 95 % interval.
        high: upper end.
        n: number of queries; for mean_recall of images.
    """

    direction: str
    metric: str
    value: float
    low: float
    high: float
    n: int


def report_rows(answers: Sequence[RankedAnswers], *, n_resamples: int = 5_000, seed: int = 0) -> list[Row]:
    """Return each metric of each direction, of at least one query each, and the mean of all recalls."""
    from retrieval.metrics import RECALL_AT

    rows = []
    for direction, ranks, precision, images in answers:
        statistics: dict[str, Statistic] = {f"R@{k}": share_statistic(ranks <= k) for k in RECALL_AT}
        statistics |= {MEDIAN_RANK: _inverse_median(ranks), "mAP": share_statistic(precision)}
        for metric, statistic in statistics.items():
            value, interval = estimate(statistic, images, n_resamples, seed=seed, percentiles=metric == MEDIAN_RANK)
            if metric == MEDIAN_RANK:
                # The bootstrap is made for values from 0 to 1; 1 / median is one, and swaps the ends of the interval.
                value, interval = 1 / value, Interval(1 / interval.high, 1 / interval.low)
            rows.append(Row(direction, metric, value, *interval, len(ranks)))
    images = np.concatenate([answer.images for answer in answers])
    value, interval = estimate(_mean_recall(answers), images, n_resamples, seed=seed)
    return [*rows, Row(BOTH, MEAN_RECALL, value, *interval, len(np.unique(images)))]


def write_report(path: Path, rows: Sequence[Row]) -> None:
    """Write the rows as CSV, atomically."""
    import pandas as pd

    write_csv(path, pd.DataFrame(rows, columns=list(Row._fields)))


def read_report(path: Path) -> list[Row]:
    """Read what ``write_report`` wrote.

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
    if not all(map(pd.api.types.is_numeric_dtype, numbers.dtypes)) or not np.isfinite(numbers).all(axis=None):
        raise UserError(f"{path}: value, low, high and n must be finite numbers; run `test` again")
    return [Row(*values) for values in frame.itertuples(index=False, name=None)]


def report_table(rows: Sequence[Row], title: str, candidates: Mapping[str, int] | None = None) -> Table:
    """Return a table with a column for each direction, and the mean recall below.

    Args:
        rows: of the report.
        title: above it.
        candidates: by direction how many items were ranked; recalls that are trivial among so few are named.
    """
    from retrieval.metrics import RECALL_AT

    cells = {(row.direction, row.metric): with_interval(row) for row in rows}
    directions = {row.direction: row.n for row in rows if row.direction != BOTH}
    caption = " ".join(f"{row.metric} {with_interval(row)}" for row in rows if row.direction == BOTH)
    for direction, count in (candidates or {}).items():
        if trivial := [f"R@{k}" for k in RECALL_AT if k >= count]:
            caption += f"\n{', '.join(trivial)} of {direction} cannot be below 1: there are {count} candidates"
    metrics = dict.fromkeys(row.metric for row in rows if row.direction != BOTH)
    lines = [[metric, *(cells[direction, metric] for direction in directions)] for metric in metrics]
    columns = ["metric", *(f"{direction}\nn = {n}" for direction, n in directions.items())]
    return Table(columns, lines, None, title, caption)


def _mean_recall(answers: Sequence[RankedAnswers]) -> Statistic:
    """Mean of the recalls of all directions, whose queries follow each other."""
    from retrieval.metrics import RECALL_AT

    hits = [np.stack([answer.first_rank <= k for k in RECALL_AT], axis=1) for answer in answers]
    parts = [share_statistic(hit.mean(axis=1)) for hit in hits]
    ends = np.cumsum([len(hit) for hit in hits])[:-1]

    def statistic(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        own = np.split(weights, ends, axis=1)
        values: NDArray[np.float64] = np.mean([part(w) for part, w in zip(parts, own, strict=True)], axis=0)
        return values

    return statistic


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
    """Return a value with its interval: ranks to one decimal, the others to three."""
    digits = 1 if row.metric == MEDIAN_RANK else 3
    return f"{row.value:.{digits}f} [{row.low:.{digits}f}, {row.high:.{digits}f}]"


RANKERS = ("vector", "text", "hybrid", "random")
WORDS = ("predicted", "label", "caption")

METRICS = ("P@5", "P@10", "R-precision", "mAP", "nDCG@10")
"""Measured for each query, 0 to 1, higher is better."""

_RANDOM_ORDERS = 20
_QUERIES_AT_ONCE = 64
_CELLS_AT_ONCE = 4_000_000
_FUSION_TOLERANCE = 1e-9
"""Sums of reciprocal ranks are float64, and differ by less than 1e-6 from rank 1,000 on."""


class AttributeRow(NamedTuple):
    """A line of the report; the fields are the columns of the file.

    Attributes:
        gallery: name of the gallery, empty where nothing depends on its model.
        ranker: one of ``RANKERS``.
        words: the ranker's text fields, empty where it has none.
        metric: one of ``METRICS``.
        value: mean over the queries, 0 to 1, higher is better.
        low: lower end of the 95 % interval.
        high: upper end.
        queries: number of queries.
        groups: groups of queries that the interval resamples.
        images: number of images that were ranked.
    """

    gallery: str
    ranker: str
    words: str
    metric: str
    value: float
    low: float
    high: float
    queries: int
    groups: int
    images: int


class System(NamedTuple):
    """A ranker with its text fields."""

    ranker: str
    source: TextSource | None

    @property
    def depends_on_model(self) -> bool:
        """Whether another gallery of the same images can rank otherwise."""
        return self.ranker != "random" and not (self.ranker == "text" and self.source in ("label", "caption"))


@dataclass(frozen=True, eq=False)
class Ground:
    """Images that are ranked, and the queries.

    Attributes:
        ids: of the images, in the order of the gallery.
        queries: with their relevant images, as places in ``ids``.
        where: filter that leaves these images.
    """

    ids: list[str]
    queries: list[AttributeQuery]
    where: str

    def same_as(self, other: Ground) -> bool:
        """Whether the same images are relevant to the same queries."""

        def plain(ground: Ground) -> list[tuple[str, list[str]]]:
            return [(query.text, sorted(ground.ids[row] for row in query.relevant)) for query in ground.queries]

        return sorted(self.ids) == sorted(other.ids) and plain(self) == plain(other)


def ground_of(
    gallery: Gallery,
    *,
    splits: Sequence[str] = (),
    where: str = "",
    tasks: Sequence[str] = (),
    class_words: ClassWords = "last",
) -> Ground:
    """Return the images of a gallery that are ranked, and all queries that they answer.

    Args:
        gallery: whose labels are asked for.
        splits: only images of these; all by default.
        where: only images that fit this filter.
        tasks: labels that queries are made of; all by default.
        class_words: what a class is called in a query.

    Raises:
        UserError: the gallery has no such labels, or no such image has a label.
    """
    from retrieval.metrics import attribute_queries
    from retrieval.schema import LABEL

    labels = gallery.identity.worded(gallery.identity.labels)
    if strange := [task for task in tasks if task not in labels]:
        raise UserError(f"--tasks {strange[0]}: {gallery.uri} has labels of {', '.join(labels) or 'nothing'}")
    columns = {task: f"{LABEL}{task}" for task in (tasks or labels)}
    everything = gallery.table(["id", *columns.values()], where)
    if splits:
        chosen = "split IN ({})".format(", ".join("'" + split.replace("'", "''") + "'" for split in splits))
        where = f"({where}) AND {chosen}" if where else chosen
    table = gallery.table(["id", *columns.values()], where)
    given = everything.column(columns[LABEL_TASK]).to_pylist() if LABEL_TASK in columns else []
    names = {name for one in given for name in (one if isinstance(one, list) else [one]) if name is not None}
    values = {task: table.column(column).to_pylist() for task, column in columns.items()}
    queries = attribute_queries(values, class_words, names)
    if not queries:
        there = f" of {', '.join(splits)}" if splits else ""
        raise UserError(f"{gallery.uri}: no image{there} that fits has a label, so there is nothing to ask for")
    return Ground(table.column("id").to_pylist(), queries, where)


def systems_of(
    gallery: Gallery, rankers: Sequence[str], words: Sequence[str], *, has_text_gallery: bool = False
) -> list[System]:
    """Return the rankers that a gallery can be searched with.

    Args:
        gallery: to search in.
        rankers: those that are wanted; all by default.
        words: text fields, by default what a model predicts, and the true labels. ``hybrid`` never has the true labels,
            which no search has.
        has_text_gallery: whether ``hybrid`` takes predicted labels from another gallery.

    Raises:
        UserError: for an unknown one.
    """
    for name, given, known in (("--rankers", rankers, RANKERS), ("--words", words, WORDS)):
        if strange := [value for value in given if value not in known]:
            raise UserError(f"{name}: must be one of {', '.join(known)}; got {strange[0]!r}")
    sources = cast("list[TextSource]", list(words or ("predicted", "label")))
    predicts, encodes = bool(gallery.identity.worded(gallery.identity.predicts)), gallery.identity.encodes_text
    predicted = predicts or has_text_gallery
    possible: dict[str, list[TextSource | None]] = {
        "vector": [None] if encodes else [],
        "text": [source for source in sources if source != "predicted" or predicts],
        "hybrid": [one for one in sources if encodes and (one == "caption" or (one == "predicted" and predicted))],
        "random": [None],
    }
    return [System(ranker, source) for ranker in rankers or RANKERS for source in possible[ranker]]


def measure(ground: Ground, searcher: Searcher | None, system: System) -> Iterator[dict[str, NDArray[np.float64]]]:
    """Yield each metric of some queries after the other, float64 ``(n,)``, in their order.

    Args:
        ground: images and queries.
        searcher: of the gallery, with the text fields of the system; ``random`` does without.
        system: the ranker.
    """
    import torch

    from retrieval.metrics import TIE_TOLERANCE, relevant_ranks
    from retrieval.search.searcher import Query

    step = max(1, min(_QUERIES_AT_ONCE, _CELLS_AT_ONCE // len(ground.ids)))
    place = {identifier: column for column, identifier in enumerate(ground.ids)}
    for start in range(0, len(ground.queries), step):
        queries = ground.queries[start : start + step]
        relevant = torch.zeros(len(queries), len(ground.ids), dtype=torch.bool)
        for row, query in enumerate(queries):
            relevant[row, query.relevant] = True
        if searcher is None or system.ranker == "random":
            yield _random(relevant, start)
            continue
        scores = np.full(relevant.shape, -np.inf)
        asked = [Query(text=query.text) for query in queries]
        found = searcher.search_all(asked, len(ground.ids), cast("Ranker", system.ranker), ground.where)
        for row, result in enumerate(found):
            scores[row, [place[hit.id] for hit in result.hits]] = [hit.score for hit in result.hits]
        tolerance = _FUSION_TOLERANCE if system.ranker == "hybrid" else TIE_TOLERANCE
        yield _metrics(relevant_ranks(torch.from_numpy(scores), relevant, tolerance))


def rows_of(
    gallery: str, system: System, ground: Ground, values: Iterable[Mapping[str, NDArray[np.float64]]]
) -> list[AttributeRow]:
    """Return means over all queries, with intervals.

    Args:
        gallery: its name.
        system: the ranker.
        ground: images and queries.
        values: from ``measure``.
    """
    parts = list(values)
    heads = np.array([query.head for query in ground.queries], dtype=object)
    counts = len(heads), len(set(heads)), len(ground.ids)
    name = gallery if system.depends_on_model else ""
    rows = []
    for metric in METRICS:
        of_queries = np.concatenate([part[metric] for part in parts])
        interval = group_interval(share_statistic(of_queries), heads.astype(str))
        rows.append(
            AttributeRow(name, system.ranker, system.source or "", metric, float(of_queries.mean()), *interval, *counts)
        )
    return rows


def _metrics(ranks: torch.Tensor) -> dict[str, NDArray[np.float64]]:
    import torch

    from retrieval.metrics import average_precision, ndcg_at, precision_at, r_precision

    values = (
        precision_at(ranks, 5, torch.float64),
        precision_at(ranks, 10, torch.float64),
        r_precision(ranks, torch.float64),
        average_precision(ranks, torch.float64),
        ndcg_at(ranks, 10, torch.float64),
    )
    return {name: value.numpy() for name, value in zip(METRICS, values, strict=True)}


def _random(relevant: torch.Tensor, seed: int) -> dict[str, NDArray[np.float64]]:
    import torch

    from retrieval.metrics import relevant_ranks

    generator = torch.Generator().manual_seed(seed)
    orders = [torch.argsort(torch.rand(relevant.shape, generator=generator), dim=1) for _ in range(_RANDOM_ORDERS)]
    measured = [_metrics(relevant_ranks(order.double(), relevant)) for order in orders]
    return {name: np.mean([values[name] for values in measured], axis=0) for name in METRICS}
