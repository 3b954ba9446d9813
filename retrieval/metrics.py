"""Ranking metrics of retrieval, the one implementation of them all.

A query asks a gallery; an item is relevant if its id equals the query's. Everything is derived from the ranks of a
query's relevant items (``relevant_ranks``), so a further metric is one more function of these ranks.

Rank: the best place is 1. A rank never flatters: items that are not relevant and score the same as a relevant one stand
before it. "The same" means within ``TIE_TOLERANCE``, because identical texts that were encoded in different batches, or
compared in blocks of different sizes, differ by rounding. A model that maps everything to one point thus finds nothing,
instead of everything. Where a similarity is NaN, a relevant item stands last and another one first.

* R@k: the share of queries with at least one relevant item among the first k, as the image-text literature has it
  (Hodosh et al., JAIR 47 (2013); Karpathy & Fei-Fei, CVPR 2015; elsewhere called hit rate). Where a query has several
  relevant items it is not the share of these that was found.
* Median rank: of the first relevant item.
* mAP: mean over the queries of average precision (Manning et al., Introduction to Information Retrieval, 2008, ch. 8).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

RECALL_AT = (1, 5, 10)
"""The k of R@k that are reported."""

TIE_TOLERANCE = 1e-6
"""Similarities of unit vectors that differ by no more are equal: some ten times the rounding error of float32."""

_CHUNK_CELLS = 1_000_000
"""Cells of the similarity matrix at a time, by default. With all that is derived from them, 30,000 texts against 6,000
pictures took about 120 MB on a processor; the whole matrix alone has 720."""


class RankedQueries(NamedTuple):
    """What became of each query; on the device of the queries.

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
        ValueError: There are no queries, a query has no relevant item (whoever asks must leave it out, and say so), or
            the lengths differ.
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


def relevant_ranks(similarity: torch.Tensor, relevant: torch.Tensor) -> torch.Tensor:
    """Ranks of the relevant items of each query, in ascending order.

    Args:
        similarity: float ``(Q, G)``.
        relevant: bool ``(Q, G)``, with at least one relevant item for each query.

    Returns:
        int64 ``(Q, R)``, R the largest number of relevant items of a query; 0 where a query has fewer.
    """
    counts = relevant.sum(dim=1, keepdim=True)
    # Ascending, relevant items at the bottom where they are nobody's competitors. NaN would mislead the search below.
    others = (
        torch.where(similarity.isnan(), torch.inf, similarity).masked_fill_(relevant, -torch.inf).sort(dim=1).values
    )
    own = torch.where(relevant & ~similarity.isnan(), similarity, -torch.inf).topk(int(counts.max()), dim=1).values
    ahead = similarity.shape[1] - torch.searchsorted(others, own - TIE_TOLERANCE)
    places = torch.arange(1, own.shape[1] + 1, device=own.device)
    ranks = torch.minimum(ahead, similarity.shape[1] - counts) + places
    return ranks.masked_fill(places > counts, 0)


def average_precision(ranks: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Mean over the relevant items of a query of the share of relevant items down to there.

    Args:
        ranks: int64 ``(Q, R)``, of ``relevant_ranks``.
        dtype: of the result.

    Returns:
        ``(Q,)``, 0 to 1, higher is better.
    """
    places = torch.arange(1, ranks.shape[1] + 1, device=ranks.device, dtype=dtype)
    precision = torch.where(ranks > 0, places / ranks.clamp(min=1), 0)
    return precision.sum(dim=1) / (ranks > 0).sum(dim=1)
