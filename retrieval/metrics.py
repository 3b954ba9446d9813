"""Ranking metrics of retrieval, and queries made of attributes with the images that are relevant to them.

Ranking metrics are derived from the ranks of a query's relevant items (``relevant_ranks``); the best rank is 1. Ties
never flatter: items that are not relevant and score the same as a relevant one rank before it. "The same" means within
``TIE_TOLERANCE``, because identical texts that were encoded in different batches, or compared in blocks of different
sizes, differ by rounding. A model that maps everything to one point thus finds nothing, instead of everything. Where a
similarity is NaN, a relevant item ranks last and another one first.

* R@k: the share of queries with at least one relevant item among the first k, as in the image-text literature
  (Hodosh et al., JAIR 47 (2013); Karpathy & Fei-Fei, CVPR 2015; elsewhere called hit rate). Where a query has several
  relevant items it is not the share of these that was found.
* Median rank: of the first relevant item.
* mAP: mean over the queries of average precision (Manning et al., Introduction to Information Retrieval, 2008, ch. 8).
* Precision@k: the share of the first k places that hold a relevant item; the divisor is k even where fewer are relevant
  or fewer were listed. R-precision: the same with k the number of the query's relevant items (ibid.).
* nDCG@k: a relevant item at rank r gains 1 / log2(1 + r), summed over the first k places and divided by the largest
  sum that any order gives. Cumulated gain is Järvelin & Kekäläinen's (ACM TOIS 20 (2002)), here with gains of 0 and 1;
  the discount, which begins at the second place, is that of Burges et al. (ICML 2005) and of scikit-learn.

A ranking may leave items out, as the ranker ``text`` leaves out images that share no word with the query. A relevant
item that is left out has the rank ``NOT_FOUND``: it gains nothing, and still counts among the relevant ones.

A query made of attributes is a combination of values that at least one image has: "bottle", "blue bottle", "new blue
plastic bottle", "blue plastic". An image is relevant if its labels include all of them; an unknown label matches
nothing. Of a multi-label task a query has at most one label. Values are in the order of English adjectives: state and
others, colour, material, class. The class is called

* ``last``: by the last word of its name. People say "bottle", and mean ``tableware_water_bottle`` as well as
  ``personal_care_shampoo_bottle``: classes that share the word share the query.
* ``unique``: by as few words from its end as no other class ends in ("water bottle", "shampoo bottle").
* ``full``: by all of them ("tableware water bottle").
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from vitrail.errors import UserError
from vitrail.types import LABEL_TASK

RECALL_AT = (1, 5, 10)
"""The k of R@k that are reported."""

TIE_TOLERANCE = 1e-6
"""Similarities of unit vectors that differ by no more are equal: some ten times the rounding error of float32."""

NOT_FOUND = 2**62
"""Rank of a relevant item that the ranking leaves out: beyond every k."""

_CHUNK_CELLS = 1_000_000
"""Cells of the similarity matrix at a time, by default. With all that is derived from them, 30,000 texts against 6,000
images took about 120 MB on a processor; the whole matrix alone has 720."""


class RankedQueries(NamedTuple):
    """Ranks by query; on the device of the queries.

    Attributes:
        first_rank: int64 ``(Q,)``, rank of the first relevant item, 1 is best.
        average_precision: float32 (float64 for such embeddings) ``(Q,)``, 0 to 1, higher is better.
    """

    first_rank: torch.Tensor
    average_precision: torch.Tensor

    def recall_at(self, k: int) -> torch.Tensor:
        """Share of queries with a relevant item among the first k, a scalar from 0 to 1, higher is better."""
        return (self.first_rank <= k).to(self.average_precision.dtype).mean()

    def median_rank(self) -> torch.Tensor:
        """Median of the first ranks, a scalar from 1, lower is better; halfway between two middle ones."""
        ordered = self.first_rank.sort().values.to(self.average_precision.dtype)
        return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2

    def mean_average_precision(self) -> torch.Tensor:
        """Mean of average precision, a scalar from 0 to 1, higher is better."""
        return self.average_precision.mean()

    def metrics(self) -> dict[str, torch.Tensor]:
        """All scalars by name: ``R@1``, ``R@5``, ``R@10``, ``median_rank``, ``mAP``."""
        recalls = {f"R@{k}": self.recall_at(k) for k in RECALL_AT}
        return {**recalls, "median_rank": self.median_rank(), "mAP": self.mean_average_precision()}


@torch.no_grad()
def rank_queries(
    queries: torch.Tensor,
    gallery: torch.Tensor,
    query_ids: torch.Tensor,
    gallery_ids: torch.Tensor,
    *,
    chunk_size: int | None = None,
) -> RankedQueries:
    """Rank the gallery for each query by dot product.

    Queries are taken chunk by chunk, so that no matrix is larger than ``(chunk_size, G)``. Halves are multiplied as
    float32, under autocast too.

    Args:
        queries: float ``(Q, D)``, of unit length, at least one.
        gallery: float ``(G, D)``, of unit length, on the same device.
        query_ids: int64 ``(Q,)``.
        gallery_ids: int64 ``(G,)``; an item is relevant to the queries that have its id.
        chunk_size: queries at a time; the result does not depend on it. None bounds the memory.

    Raises:
        ValueError: There are no queries, a query has no relevant item (the caller must leave it out), or the lengths
            differ.
    """
    if len(queries) != len(query_ids) or len(gallery) != len(gallery_ids):
        raise ValueError(
            f"{len(queries)} queries with {len(query_ids)} ids, {len(gallery)} items with {len(gallery_ids)} ids"
        )
    if not len(queries):
        raise ValueError("there are no queries")
    lonely = ~torch.isin(query_ids, gallery_ids)
    if lonely.any():
        raise ValueError(
            f"{int(lonely.sum())} of {len(queries)} queries have no relevant item in the gallery, the first is number "
            f"{int(lonely.nonzero()[0])}; leave them out"
        )
    dtype = torch.promote_types(queries.dtype, torch.float32)
    gallery = gallery.to(dtype)
    chunk_size = chunk_size or max(1, _CHUNK_CELLS // len(gallery))
    first_ranks, precisions = [], []
    with torch.autocast(queries.device.type, enabled=False):
        for start in range(0, len(queries), chunk_size):
            rows = slice(start, start + chunk_size)
            ranks = relevant_ranks(queries[rows].to(dtype) @ gallery.T, query_ids[rows, None] == gallery_ids)
            first_ranks.append(ranks[:, 0])
            precisions.append(average_precision(ranks, dtype))
    return RankedQueries(torch.cat(first_ranks), torch.cat(precisions))


def relevant_ranks(
    similarity: torch.Tensor, relevant: torch.Tensor, tie_tolerance: float = TIE_TOLERANCE
) -> torch.Tensor:
    """Ranks of the relevant items of each query, in ascending order.

    Args:
        similarity: float ``(Q, G)``; minus infinity for an item that the ranking leaves out.
        relevant: bool ``(Q, G)``, with at least one relevant item for each query.
        tie_tolerance: similarities that differ by no more are equal.

    Returns:
        int64 ``(Q, R)``, R the largest number of relevant items of a query; 0 where a query has fewer, ``NOT_FOUND``
        for a relevant item that is left out.
    """
    counts = relevant.sum(dim=1, keepdim=True)
    listed = counts - (relevant & similarity.isneginf()).sum(dim=1, keepdim=True)
    # Ascending, relevant items at the bottom where they compete with none. NaN would mislead the search below.
    others = (
        torch.where(similarity.isnan(), torch.inf, similarity).masked_fill_(relevant, -torch.inf).sort(dim=1).values
    )
    own = torch.where(relevant & ~similarity.isnan(), similarity, -torch.inf).topk(int(counts.max()), dim=1).values
    ahead = similarity.shape[1] - torch.searchsorted(others, own - tie_tolerance)
    places = torch.arange(1, own.shape[1] + 1, device=own.device)
    ranks = torch.minimum(ahead, similarity.shape[1] - counts) + places
    return ranks.masked_fill(places > listed, NOT_FOUND).masked_fill(places > counts, 0)


def average_precision(ranks: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Mean over the relevant items of a query of the share of relevant items down to there.

    Args:
        ranks: int64 ``(Q, R)``, of ``relevant_ranks``.
        dtype: of the result.

    Returns:
        ``(Q,)``, 0 to 1, higher is better.
    """
    places = torch.arange(1, ranks.shape[1] + 1, device=ranks.device, dtype=dtype)
    precision = torch.where(_within(ranks, NOT_FOUND - 1), places / ranks.clamp(min=1), 0)
    return precision.sum(dim=1) / (ranks > 0).sum(dim=1)


def precision_at(ranks: torch.Tensor, k: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Share of the first k places that hold a relevant item.

    Args:
        ranks: int64 ``(Q, R)``, of ``relevant_ranks``.
        k: at least 1.
        dtype: of the result.

    Returns:
        ``(Q,)``, 0 to 1, higher is better.
    """
    return _within(ranks, k).sum(dim=1).to(dtype) / k


def r_precision(ranks: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Share of relevant items among as many first places as there are relevant items.

    Args:
        ranks: int64 ``(Q, R)``, of ``relevant_ranks``.
        dtype: of the result.

    Returns:
        ``(Q,)``, 0 to 1, higher is better.
    """
    counts = (ranks > 0).sum(dim=1)
    return _within(ranks, counts[:, None]).sum(dim=1).to(dtype) / counts


def ndcg_at(ranks: torch.Tensor, k: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Discounted cumulated gain of the first k places, as a share of the largest possible one.

    Args:
        ranks: int64 ``(Q, R)``, of ``relevant_ranks``.
        k: at least 1.
        dtype: of the result.

    Returns:
        ``(Q,)``, 0 to 1, higher is better.
    """
    gains = torch.where(_within(ranks, k), 1 / torch.log2(1 + ranks.clamp(min=1).to(dtype)), 0).sum(dim=1)
    best = 1 / torch.log2(1 + torch.arange(1, k + 1, device=ranks.device, dtype=dtype))
    return gains / best.cumsum(dim=0)[(ranks > 0).sum(dim=1).clamp(max=k) - 1]


def _within(ranks: torch.Tensor, k: int | torch.Tensor) -> torch.Tensor:
    """Bool ``(Q, R)``: which relevant items are among the first k."""
    return (ranks > 0) & (ranks <= k)


ClassWords = Literal["last", "unique", "full"]
"""What a class is called in a query."""

_LAST = ("colour", "material", LABEL_TASK)
"""Tasks whose values end a text, in this order, after all others."""

_Values = tuple[tuple[str, str], ...]
"""Tasks with values, in the order of the text."""


@dataclass(frozen=True, eq=False)
class AttributeQuery:
    """A query and its relevant images.

    Attributes:
        text: as a person would write it.
        values: tasks and their values, in the order of the text; of the class, the name as in the text.
        relevant: int64 ``(R,)``, the relevant images, ascending, at least one.
    """

    text: str
    values: _Values
    relevant: NDArray[np.int64]

    @property
    def head(self) -> str:
        """The subject of the query: its last value, the class if it has one."""
        return "=".join(self.values[-1])


def attribute_queries(
    labels: Mapping[str, Sequence[str | list[str] | None]],
    class_words: ClassWords = "last",
    class_names: Iterable[str] = (),
) -> list[AttributeQuery]:
    """Return all queries that have a relevant image, in the order of their texts.

    Args:
        labels: by task the values of N images, of multi-label tasks lists; None or empty where unknown.
        class_words: what a class is called.
        class_names: all classes that a name must be distinguished from, where the images show only some of them.

    Raises:
        UserError: there are no labels, or an unknown rule for names of classes.
    """
    if not labels:
        raise UserError("attribute queries need labels; fill the gallery from data with classes or attributes")
    if class_words not in get_args(ClassWords):
        raise UserError(f"class words: must be one of {', '.join(get_args(ClassWords))}; got {class_words!r}")
    tasks = [*(task for task in labels if task not in _LAST), *(task for task in _LAST if task in labels)]
    of_class = (value for values in labels.get(LABEL_TASK, []) for value in _several(values))
    called = class_texts({*class_names, *of_class}, class_words)
    relevant: dict[_Values, list[NDArray[np.int64]]] = {}
    for known, rows in _alike(tasks, labels, called).items():
        for values in _combinations(known):
            relevant.setdefault(values, []).append(rows)
    queries = [
        AttributeQuery(" ".join(value.replace("_", " ") for _, value in values), values, np.sort(np.concatenate(rows)))
        for values, rows in relevant.items()
    ]
    return sorted(queries, key=lambda query: (query.text, query.values))


def class_texts(names: Iterable[str], class_words: ClassWords) -> dict[str, str]:
    """Return what each class is called in a query.

    Args:
        names: of all classes.
        class_words: by which rule.
    """
    words = {name: name.replace("_", " ").split() for name in names}
    if class_words == "last":
        return {name: own[-1] for name, own in words.items()}
    if class_words == "full":
        return {name: " ".join(own) for name, own in words.items()}
    return {name: _shortest_unique(name, words) for name in words}


def _shortest_unique(name: str, words: Mapping[str, list[str]]) -> str:
    own = words[name]
    for length in range(1, len(own)):
        if all(other[-length:] != own[-length:] for key, other in words.items() if key != name):
            return " ".join(own[-length:])
    return " ".join(own)


def _several(value: str | list[str] | None) -> list[str]:
    """The known values of an image in one task."""
    return value if isinstance(value, list) else [value] if value else []


def _alike(
    tasks: Sequence[str], labels: Mapping[str, Sequence[str | list[str] | None]], called: Mapping[str, str]
) -> dict[_Values, NDArray[np.int64]]:
    """Images by their known labels, of those with the same together."""
    rows: dict[_Values, list[int]] = {}
    for row, values in enumerate(zip(*(labels[task] for task in tasks), strict=True)):
        known = ((task, value) for task, own in zip(tasks, values, strict=True) for value in _several(own))
        named = tuple(dict.fromkeys((task, called[value] if task == LABEL_TASK else value) for task, value in known))
        rows.setdefault(named, []).append(row)
    return {named: np.array(own, dtype=np.int64) for named, own in rows.items()}


def _combinations(known: _Values) -> Iterator[_Values]:
    by_task: dict[str, list[tuple[str, str]]] = {}
    for task, value in known:
        by_task.setdefault(task, []).append((task, value))
    for size in range(1, len(by_task) + 1):
        for chosen in itertools.combinations(by_task.values(), size):
            yield from itertools.product(*chosen)
