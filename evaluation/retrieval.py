"""Retrieval metrics with 95 % intervals by image: a CSV file and a table for the terminal.

The intervals are those of ``statistics.group_bootstrap``: images are resampled, and all queries of a resampled
image (itself, or its texts) go with it; the gallery stays as it is. So they say how the numbers would vary with other
queries of the same kind, not with another or a larger gallery.

How well rankers find what people ask for: metrics over all queries made of attributes, with intervals.

Queries are all combinations of a class and attribute values that some image has, and an image is relevant if its
true labels say what the query says (``retrieval.metrics``). Rankers are those that people search with
(``retrieval.search.searcher``), and each ranks all images; the numbers come from the ranks of the relevant ones
(``retrieval.metrics``), where equal scores never flatter and what a ranker leaves out is not found.

Two rows do not depend on a model: ``tfidf`` over the true labels, the most that words can do, and ``random``, the mean
of some random orders, the least.

The 95 % intervals resample queries in groups of the same head, because "blue bottle" and "blue plastic bottle" are much
the same question: the class, or what is named last where there is none. They say how the numbers would vary with
other such questions of the same images, not with other images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from evaluation.statistics.intervals import Interval, Statistic, group_bootstrap
from retrieval.metrics import (
    TIE_TOLERANCE,
    AttributeQuery,
    ClassWords,
    attribute_queries,
    average_precision,
    ndcg_at,
    precision_at,
    r_precision,
    relevant_ranks,
)
from retrieval.schema import LABEL
from retrieval.search.searcher import Query, Searcher
from vitrail.console import Table
from vitrail.errors import UserError
from vitrail.files import read_csv, write_csv
from vitrail.types import LABEL_TASK

if TYPE_CHECKING:
    from retrieval.gallery import Gallery
    from retrieval.search.text import WordSource


BOTH, MEAN_RECALL = "both", "mean_recall"
MEDIAN_RANK = "median_rank"


class RankedAnswers(NamedTuple):
    """What the Q queries of one direction got (see ``retrieval.metrics.RankedQueries``).

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
    images = np.concatenate([answer.images for answer in answers])
    mean_recall = _mean_recall(answers)
    value = float(mean_recall(np.ones((1, len(images))))[0])
    interval = group_bootstrap(mean_recall, images, n_resamples, seed=seed)
    return [*rows, Row(BOTH, MEAN_RECALL, value, *interval, len(np.unique(images)))]


def write_report(path: Path, rows: Sequence[Row]) -> None:
    """Write the rows as CSV, atomically."""
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
    cells = {(row.direction, row.metric): with_interval(row) for row in rows}
    directions = {row.direction: row.n for row in rows if row.direction != BOTH}
    caption = " ".join(f"{row.metric} {with_interval(row)}" for row in rows if row.direction == BOTH)
    from retrieval.metrics import RECALL_AT

    for direction, count in (candidates or {}).items():
        if trivial := [f"R@{k}" for k in RECALL_AT if k >= count]:
            caption += f"\n{', '.join(trivial)} of {direction} cannot be below 1: there are {count} candidates"
    metrics = dict.fromkeys(row.metric for row in rows if row.direction != BOTH)
    lines = [[metric, *(cells[direction, metric] for direction in directions)] for metric in metrics]
    columns = ["metric", *(f"{direction}\nn = {n}" for direction, n in directions.items())]
    return Table(columns, lines, None, title, caption)


def _estimates(answer: RankedAnswers, n_resamples: int, seed: int) -> dict[str, tuple[float, Interval]]:
    def estimate(statistic: Statistic) -> tuple[float, Interval]:
        value = statistic(np.ones((1, len(answer.images))))
        return float(value[0]), group_bootstrap(statistic, answer.images, n_resamples, seed=seed)

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


MeasuredRanker = Literal["clip", "tfidf", "hybrid", "random"]
"""Those of ``retrieval.search.searcher``, and the floor."""

METRICS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "P@5": lambda ranks: precision_at(ranks, 5, torch.float64),
    "P@10": lambda ranks: precision_at(ranks, 10, torch.float64),
    "R-precision": lambda ranks: r_precision(ranks, torch.float64),
    "mAP": lambda ranks: average_precision(ranks, torch.float64),
    "nDCG@10": lambda ranks: ndcg_at(ranks, 10, torch.float64),
}
"""What is measured of each query, 0 to 1, higher is better."""

_RANDOM_ORDERS = 20
_QUERIES_AT_ONCE = 64
_CELLS_AT_ONCE = 4_000_000
_FUSION_TOLERANCE = 1e-9
"""Sums of reciprocal ranks are float64, and differ by less than 1e-6 from rank 1,000 on."""


class AttributeRow(NamedTuple):
    """A line of the report; the fields are the columns of the file.

    Attributes:
        gallery: name of the gallery, empty where nothing depends on its model.
        ranker: clip, tfidf, hybrid, or random.
        words: what the ranker's words are, empty where it has none.
        metric: a key of ``METRICS``.
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
    """A ranker with its words."""

    ranker: MeasuredRanker
    words: WordSource | None

    @property
    def depends_on_model(self) -> bool:
        """Whether another gallery of the same images can rank otherwise."""
        return self.ranker != "random" and not (self.ranker == "tfidf" and self.words in ("label", "caption"))


@dataclass(frozen=True, eq=False)
class Ground:
    """Images that are ranked, and the questions to them.

    Attributes:
        ids: of the images, in the order of the gallery.
        queries: with their relevant images, as places in ``ids``.
        where: filter that leaves these images.
    """

    ids: list[str]
    queries: list[AttributeQuery]
    where: str

    def same_as(self, other: Ground) -> bool:
        """Whether the same images are to answer the same questions."""

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
    """The images of a gallery that are ranked, and all queries that they answer.

    Args:
        gallery: whose labels are asked for.
        splits: only images of these; all by default.
        where: only images that fit this filter.
        tasks: labels that queries are made of; all by default.
        class_words: what a class is called in a query.

    Raises:
        UserError: the gallery has no such labels, or no such image has a label.
    """
    labels = gallery.identity.labels
    if strange := [task for task in tasks if task not in labels]:
        raise UserError(f"--tasks {strange[0]}: {gallery.uri} has labels of {', '.join(labels) or 'nothing'}")
    columns = {task: f"{LABEL}{task}" for task in (tasks or labels)}
    everything = gallery.table(["id", *columns.values()], where)
    if splits:
        chosen = "split IN ({})".format(", ".join("'" + split.replace("'", "''") + "'" for split in splits))
        where = f"({where}) AND {chosen}" if where else chosen
    table = gallery.table(["id", *columns.values()], where)
    names = set(everything.column(columns[LABEL_TASK]).to_pylist()) - {None} if LABEL_TASK in columns else set()
    values = {task: table.column(column).to_pylist() for task, column in columns.items()}
    queries = attribute_queries(values, class_words, names)
    if not queries:
        there = f" of {', '.join(splits)}" if splits else ""
        raise UserError(f"{gallery.uri}: no image{there} that fits has a label, so there is nothing to ask for")
    return Ground(table.column("id").to_pylist(), queries, where)


def systems_of(
    gallery: Gallery, rankers: Sequence[str], words: Sequence[str], *, has_words_gallery: bool = False
) -> list[System]:
    """The rankers that a gallery can be searched with.

    Args:
        gallery: to search in.
        rankers: those that are wanted; all by default.
        words: what words may be; by default what a model predicts, and the true labels. ``hybrid`` never has the true
            labels, because nobody can search so.
        has_words_gallery: whether what is predicted comes from another gallery to ``hybrid``.

    Raises:
        UserError: for an unknown one.
    """
    for name, given, known in (
        ("--rankers", rankers, get_args(MeasuredRanker)),
        ("--words", words, ("predicted", "label", "caption")),
    ):
        if strange := [value for value in given if value not in known]:
            raise UserError(f"{name} {strange[0]}: is unknown; choose among {', '.join(known)}")
    sources = cast("list[WordSource]", list(words or ("predicted", "label")))
    predicts, encodes = bool(gallery.identity.predicts), gallery.identity.encodes_text
    of_tfidf = [source for source in sources if source != "predicted" or predicts]
    fused = [
        source
        for source in sources
        if source == "caption" or (source == "predicted" and (predicts or has_words_gallery))
    ]
    possible: dict[MeasuredRanker, list[WordSource | None]] = {
        "clip": [None] if encodes else [],
        "tfidf": [*of_tfidf],
        "hybrid": [*fused] if encodes else [],
        "random": [None],
    }
    return [
        System(ranker, source)
        for ranker in cast("list[MeasuredRanker]", list(rankers or possible))
        for source in possible[ranker]
    ]


def measure(ground: Ground, searcher: Searcher | None, system: System) -> Iterator[dict[str, NDArray[np.float64]]]:
    """Metrics of some queries after the other, in their order.

    Args:
        ground: images and queries.
        searcher: of the gallery, with the words of the system; ``random`` does without.
        system: who ranks.

    Yields:
        Each metric of some queries, float64 ``(n,)``.
    """
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
        found = searcher.search_all(asked, len(ground.ids), system.ranker, ground.where)
        for row, result in enumerate(found):
            scores[row, [place[hit.id] for hit in result.hits]] = [hit.score for hit in result.hits]
        tolerance = _FUSION_TOLERANCE if system.ranker == "hybrid" else TIE_TOLERANCE
        yield _metrics(relevant_ranks(torch.from_numpy(scores), relevant, tolerance))


def rows_of(
    gallery: str, system: System, ground: Ground, values: Iterable[Mapping[str, NDArray[np.float64]]]
) -> list[AttributeRow]:
    """Means over all queries, with intervals.

    Args:
        gallery: its name.
        system: who ranked.
        ground: images and queries.
        values: what ``measure`` gives.
    """
    parts = list(values)
    heads = np.array([query.head for query in ground.queries], dtype=object)
    counts = len(heads), len(set(heads)), len(ground.ids)
    rows = []
    for metric in METRICS:
        of_queries = np.concatenate([part[metric] for part in parts])
        interval = group_bootstrap(_mean_of(of_queries), heads.astype(str))
        name = gallery if system.depends_on_model else ""
        rows.append(
            AttributeRow(name, system.ranker, system.words or "", metric, float(of_queries.mean()), *interval, *counts)
        )
    return rows


def _mean_of(values: NDArray[np.float64]) -> Any:
    return lambda weights: weights @ values / weights.sum(axis=1)


def _metrics(ranks: torch.Tensor) -> dict[str, NDArray[np.float64]]:
    return {name: metric(ranks).numpy() for name, metric in METRICS.items()}


def _random(relevant: torch.Tensor, seed: int) -> dict[str, NDArray[np.float64]]:
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.argsort(torch.rand(relevant.shape, generator=generator), dim=1) for _ in range(_RANDOM_ORDERS)]
    measured = [_metrics(relevant_ranks(order.double(), relevant)) for order in orders]
    return {name: np.mean([values[name] for values in measured], axis=0) for name in METRICS}
