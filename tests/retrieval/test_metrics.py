from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, ndcg_score
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics.functional.retrieval import retrieval_recall
from torchmetrics.retrieval import RetrievalHitRate, RetrievalMAP

from retrieval.metrics import (
    NOT_FOUND,
    RECALL_AT,
    TIE_TOLERANCE,
    AttributeQuery,
    RankedQueries,
    attribute_queries,
    average_precision,
    class_texts,
    ndcg_at,
    precision_at,
    r_precision,
    rank_queries,
    relevant_ranks,
)
from vitrail.errors import UserError

IMAGES = 40


def unit(*shape: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=1)


def captions() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images and texts that resemble them a little: 1 to 4 texts an image, ids in no order."""
    generator = torch.Generator().manual_seed(3)
    image_ids = torch.randperm(1000, generator=generator)[:IMAGES]
    text_ids = image_ids.repeat_interleave(torch.randint(1, 5, (IMAGES,), generator=generator))
    text_ids = text_ids[torch.randperm(len(text_ids), generator=generator)]
    images = unit(IMAGES, 8, seed=0)
    own = images[(text_ids[:, None] == image_ids).int().argmax(dim=1)]
    return images, F.normalize(own + 2 * unit(len(text_ids), 8, seed=1), dim=1), image_ids, text_ids


def brute_force(similarity: NDArray[np.float64], relevant: NDArray[np.bool_]) -> tuple[list[int], list[float]]:
    """By the definition, item by item: sort with the worst order among equals, walk down the list."""
    first_ranks, precisions = [], []
    for scores, is_relevant in zip(similarity, relevant, strict=True):
        walk = sorted(range(len(scores)), key=lambda item: (-scores[item], is_relevant[item]))
        hits = [place for place, item in enumerate(walk, start=1) if is_relevant[item]]
        first_ranks.append(hits[0])
        precisions.append(float(np.mean([found / place for found, place in enumerate(hits, start=1)])))
    return first_ranks, precisions


def both_directions() -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    images, texts, image_ids, text_ids = captions()
    return [(images, texts, image_ids, text_ids), (texts, images, text_ids, image_ids)]


@pytest.mark.parametrize("direction", [0, 1])
def test_equals_brute_force(direction: int) -> None:
    queries, gallery, query_ids, gallery_ids = both_directions()[direction]
    ranked = rank_queries(queries, gallery, query_ids, gallery_ids)
    similarity = queries.double().numpy() @ gallery.double().numpy().T
    first_ranks, precisions = brute_force(similarity, (query_ids[:, None] == gallery_ids).numpy())
    assert len(set(first_ranks)) > 5
    assert ranked.first_rank.tolist() == first_ranks
    np.testing.assert_allclose(ranked.average_precision, precisions, rtol=1e-6)
    metrics = ranked.metrics()
    assert list(metrics) == ["R@1", "R@5", "R@10", "median_rank", "mAP"]
    for k in RECALL_AT:
        assert float(metrics[f"R@{k}"]) == pytest.approx(np.mean(np.array(first_ranks) <= k))
    assert float(metrics["median_rank"]) == np.median(first_ranks)
    assert float(metrics["mAP"]) == pytest.approx(np.mean(precisions))


@pytest.mark.parametrize("direction", [0, 1])
def test_equals_torchmetrics(direction: int) -> None:
    queries, gallery, query_ids, gallery_ids = both_directions()[direction]
    metrics = rank_queries(queries, gallery, query_ids, gallery_ids).metrics()
    # Above 0, because torchmetrics takes scores for probabilities and passes over relevant items that have none.
    similarity, relevant = queries @ gallery.T + 2, query_ids[:, None] == gallery_ids
    indexes = torch.arange(len(queries))[:, None].expand_as(similarity)
    cells: Any = (similarity.flatten(), relevant.flatten(), indexes.flatten())
    assert float(metrics["mAP"]) == pytest.approx(float(RetrievalMAP()(*cells)), rel=1e-5)
    for k in RECALL_AT:
        assert float(metrics[f"R@{k}"]) == pytest.approx(float(RetrievalHitRate(top_k=k)(*cells)))


def test_with_one_relevant_item_hits_are_recall() -> None:
    images, texts, image_ids, text_ids = captions()
    metrics = rank_queries(texts, images, text_ids, image_ids).metrics()
    for k in RECALL_AT:
        recalls = [
            retrieval_recall(text @ images.T + 2, image_ids == own, top_k=k)
            for text, own in zip(texts, text_ids, strict=True)
        ]
        assert float(metrics[f"R@{k}"]) == pytest.approx(float(torch.stack(recalls).mean()))


def test_several_relevant_items_by_hand() -> None:
    similarity = torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.5]])
    relevant = torch.tensor([[False, True, False, False, True]])
    ranks = relevant_ranks(similarity, relevant)
    assert ranks.tolist() == [[2, 5]]
    assert float(average_precision(ranks)) == pytest.approx((1 / 2 + 2 / 5) / 2)
    # A second query with one relevant item only: the other place stays empty and does not count.
    ranks = relevant_ranks(similarity.repeat(2, 1), torch.cat([relevant, relevant ^ torch.eye(5).bool()[4]]))
    assert ranks.tolist() == [[2, 5], [2, 0]]
    assert average_precision(ranks).tolist() == pytest.approx([0.45, 0.5])


def test_ties_do_not_flatter() -> None:
    """A model that maps everything to one point finds nothing."""
    point = F.normalize(torch.ones(12, 6), dim=1)
    ids = torch.arange(12)
    ranked = rank_queries(point, point, ids, ids)
    assert ranked.first_rank.tolist() == [12] * 12
    assert float(ranked.recall_at(10)) == 0
    # Relevant items are no competitors of each other: 9 others, then the first of the three.
    assert rank_queries(point[:1], point, ids[:1], ids // 3).first_rank.tolist() == [10]


def test_equal_up_to_rounding_is_equal() -> None:
    relevant = torch.tensor([[True, False, False]])
    for gap, rank in ((TIE_TOLERANCE / 10, 3), (TIE_TOLERANCE * 10, 1)):
        assert relevant_ranks(torch.tensor([[0.5, 0.5 - gap, 0.5 - gap]]), relevant).tolist() == [[rank]]


def test_what_is_not_a_number_ranks_last() -> None:
    relevant = torch.tensor([[True, False, True, False]])
    nan = torch.nan
    assert relevant_ranks(torch.tensor([[nan, 0.1, nan, 0.2]]), relevant).tolist() == [[3, 4]]
    assert relevant_ranks(torch.tensor([[0.9, nan, 0.1, 0.2]]), relevant).tolist() == [[2, 4]]
    everything = torch.full((4, 2), nan)
    ids = torch.arange(4)
    assert rank_queries(everything, everything, ids, ids).first_rank.tolist() == [4] * 4


@pytest.mark.parametrize("chunk_size", [1, 7, 39, 1000])
def test_chunk_size_changes_nothing(chunk_size: int) -> None:
    for queries, gallery, query_ids, gallery_ids in both_directions():
        whole = rank_queries(queries, gallery, query_ids, gallery_ids)
        chunked = rank_queries(queries, gallery, query_ids, gallery_ids, chunk_size=chunk_size)
        assert torch.equal(whole.first_rank, chunked.first_rank)
        assert torch.equal(whole.average_precision, chunked.average_precision)


class LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Notes the size of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return result


def test_no_matrix_is_larger_than_a_chunk() -> None:
    queries, gallery = unit(1000, 4, seed=0), unit(600, 4, seed=1)
    query_ids, gallery_ids = torch.arange(1000) % 600, torch.arange(600)
    with LargestTensor() as largest:
        rank_queries(queries, gallery, query_ids, gallery_ids, chunk_size=10)
    assert largest.numel == 10 * 600


def test_default_chunk_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retrieval.metrics._CHUNK_CELLS", 5_000)
    queries, gallery = unit(300, 4, seed=0), unit(200, 4, seed=1)
    with LargestTensor() as largest:
        rank_queries(queries, gallery, torch.arange(300) % 200, torch.arange(200))
    assert largest.numel == 5_000


def test_types_are_kept_and_halves_are_not_rounded_again() -> None:
    images, texts, image_ids, text_ids = captions()
    doubles = rank_queries(images.double(), texts.double(), image_ids, text_ids)
    assert (doubles.first_rank.dtype, doubles.average_precision.dtype) == (torch.int64, torch.float64)
    assert doubles.recall_at(5).dtype == torch.float64
    rounded = images.bfloat16(), texts.bfloat16()
    halves = rank_queries(*rounded, image_ids, text_ids)
    assert halves.average_precision.dtype == torch.float32
    exact = rank_queries(rounded[0].float(), rounded[1].float(), image_ids, text_ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = rank_queries(rounded[0].float(), rounded[1].float(), image_ids, text_ids)
    for other in (halves, cast):
        assert torch.equal(other.first_rank, exact.first_rank)


def test_result_has_no_gradient() -> None:
    images, texts, image_ids, text_ids = captions()
    assert not rank_queries(images.requires_grad_(), texts, image_ids, text_ids).average_precision.requires_grad


@pytest.mark.parametrize(("ranks", "median"), [([1], 1), ([4, 1], 2.5), ([9, 1, 3], 3), ([1, 1, 2, 100], 1.5)])
def test_median_of_even_numbers_lies_between(ranks: list[int], median: float) -> None:
    assert float(RankedQueries(torch.tensor(ranks), torch.ones(len(ranks))).median_rank()) == median


def test_mistakes_are_refused() -> None:
    images, texts, image_ids, text_ids = captions()
    with pytest.raises(ValueError, match=r"1 of 2 queries have no relevant item in the gallery, the first is number 1"):
        rank_queries(images[:2], texts, torch.tensor([int(image_ids[0]), -5]), text_ids)
    with pytest.raises(ValueError, match="there are no queries"):
        rank_queries(images[:0], texts, image_ids[:0], text_ids)
    with pytest.raises(ValueError, match="40 queries with 39 ids"):
        rank_queries(images, texts, image_ids[:-1], text_ids)


def rankings(seed: int = 5, *, ties: bool = False, left_out: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of 30 items for 25 queries that have 1 to 12 relevant items each."""
    rng = np.random.default_rng(seed)
    scores = rng.permuted(np.tile(np.arange(30.0), (25, 1)), axis=1)
    if ties:
        scores = np.floor(scores / 7)
    relevant = rng.permuted(np.arange(30) < rng.integers(1, 13, size=(25, 1)), axis=1)
    if left_out:
        scores[rng.random(scores.shape) < 0.4] = -np.inf
    return torch.tensor(scores), torch.tensor(relevant)


def walked(scores: torch.Tensor, relevant: torch.Tensor, k: int) -> tuple[list[float], ...]:
    """Precision@k, R-precision, nDCG@k and average precision by their definitions, down the list item by item."""
    found: tuple[list[float], ...] = ([], [], [], [])
    for row, is_relevant in zip(scores.tolist(), relevant.tolist(), strict=True):
        walk = [item for item in range(len(row)) if row[item] != -np.inf]
        hits = [is_relevant[item] for item in sorted(walk, key=lambda item: (-row[item], is_relevant[item]))]
        total = sum(is_relevant)
        gain = sum(hit / np.log2(place + 1) for place, hit in enumerate(hits[:k], start=1))
        best = sum(1 / np.log2(place + 1) for place in range(1, min(total, k) + 1))
        precisions = [sum(hits[:place]) / place for place in range(1, len(hits) + 1) if hits[place - 1]]
        for values, value in zip(
            found, (sum(hits[:k]) / k, sum(hits[:total]) / total, gain / best, sum(precisions) / total), strict=True
        ):
            values.append(value)
    return found


@pytest.mark.parametrize("k", [1, 5, 10, 50])
@pytest.mark.parametrize("left_out", [False, True])
@pytest.mark.parametrize("ties", [False, True])
def test_list_metrics_equal_a_walk_down_the_list(k: int, left_out: bool, ties: bool) -> None:
    scores, relevant = rankings(ties=ties, left_out=left_out)
    ranks = relevant_ranks(scores, relevant)
    precision, r_precisions, ndcg, average = walked(scores, relevant, k)
    assert len(set(average)) > 5
    np.testing.assert_allclose(precision_at(ranks, k, torch.float64), precision, atol=1e-12)
    np.testing.assert_allclose(r_precision(ranks, torch.float64), r_precisions, atol=1e-12)
    np.testing.assert_allclose(ndcg_at(ranks, k, torch.float64), ndcg, atol=1e-12)
    np.testing.assert_allclose(average_precision(ranks, torch.float64), average, atol=1e-12)


@pytest.mark.parametrize("k", [1, 3, 10, 30])
def test_ndcg_and_average_precision_are_those_of_scikit_learn(k: int) -> None:
    scores, relevant = rankings()
    ranks = relevant_ranks(scores, relevant)
    for row in range(len(scores)):
        theirs = ndcg_score(relevant[row : row + 1].numpy(), scores[row : row + 1].numpy(), k=k)
        assert float(ndcg_at(ranks[row : row + 1], k)) == pytest.approx(theirs, rel=1e-5)
        theirs = average_precision_score(relevant[row].numpy(), scores[row].numpy())
        assert float(average_precision(ranks[row : row + 1])) == pytest.approx(theirs, rel=1e-5)


def test_what_a_ranking_leaves_out_is_not_found() -> None:
    # Relevant: the first listed one, one left out, and the last one; the second query lists nothing.
    scores = torch.tensor([[3.0, -torch.inf, 2.0, 1.0], [-torch.inf] * 4])
    relevant = torch.tensor([[True, True, False, True], [False, True, False, False]])
    ranks = relevant_ranks(scores, relevant)
    assert ranks.tolist() == [[1, 3, NOT_FOUND], [NOT_FOUND, 0, 0]]
    assert average_precision(ranks).tolist() == pytest.approx([(1 + 2 / 3) / 3, 0])
    assert precision_at(ranks, 2).tolist() == [0.5, 0]
    assert r_precision(ranks).tolist() == pytest.approx([2 / 3, 0])
    assert ndcg_at(ranks, 10)[1] == 0


def test_tolerance_of_ties_can_be_narrowed() -> None:
    scores, relevant = torch.tensor([[1.0, 1.0 - 5e-7]], dtype=torch.float64), torch.tensor([[True, False]])
    assert relevant_ranks(scores, relevant).tolist() == [[2]]
    assert relevant_ranks(scores, relevant, tie_tolerance=1e-9).tolist() == [[1]]


LABELS: dict[str, list[str | None]] = {
    "class": ["tableware_water_bottle", "personal_care_shampoo_bottle", "travel_handbag", "travel_handbag", None],
    "colour": ["blue", "blue", "black", None, "blue"],
    "material": ["plastic", "glass", "leather", "leather", ""],
    "condition": ["new", "used", "used", "worn", None],
}


def by_text(queries: list[AttributeQuery]) -> dict[str, list[int]]:
    assert len({query.text for query in queries}) == len(queries)
    return {query.text: query.relevant.tolist() for query in queries}


def test_texts_and_answers() -> None:
    answers = by_text(attribute_queries(LABELS))
    assert answers["blue plastic bottle"] == [0]
    assert answers["bottle"] == [0, 1]
    assert answers["blue bottle"] == [0, 1]
    assert answers["blue"] == [0, 1, 4]
    assert answers["used"] == [1, 2]
    assert answers["leather handbag"] == [2, 3]
    assert answers["new blue plastic bottle"] == [0]
    assert "black plastic" not in answers
    assert list(answers) == sorted(answers)


def test_equals_brute_force_over_all_combinations() -> None:
    said = {**LABELS, "class": [name.rpartition("_")[2] if name else None for name in LABELS["class"]]}
    order = ["condition", "colour", "material", "class"]
    expected = {}
    for values in itertools.product(*([None, *dict.fromkeys(filter(None, said[task]))] for task in order)):
        wanted = [(task, value) for task, value in zip(order, values, strict=True) if value]
        rows = [row for row in range(5) if all(said[task][row] == value for task, value in wanted)]
        if wanted and rows:
            expected[" ".join(value for _, value in wanted)] = rows
    assert len(expected) > 30
    assert by_text(attribute_queries(LABELS)) == expected


def test_nothing_is_asked_of_what_is_unknown() -> None:
    queries = attribute_queries({"colour": [None, ""], "class": ["a_cap", None]})
    assert by_text(queries) == {"cap": [0]}


@pytest.mark.parametrize(
    ("rule", "texts"),
    [
        ("last", ["bottle", "bottle", "handbag", "cap"]),
        ("unique", ["water bottle", "shampoo bottle", "handbag", "cap"]),
        ("full", ["tableware water bottle", "personal care shampoo bottle", "travel handbag", "cap"]),
    ],
)
def test_what_classes_are_called(rule: str, texts: list[str]) -> None:
    names = ["tableware_water_bottle", "personal_care_shampoo_bottle", "travel_handbag", "cap"]
    assert class_texts(names, rule) == dict(zip(names, texts, strict=True))  # type: ignore[arg-type]


def test_a_name_that_ends_another_is_said_whole() -> None:
    assert class_texts(["bottle", "water_bottle"], "unique") == {"bottle": "bottle", "water_bottle": "water bottle"}


def test_names_are_distinguished_from_classes_that_no_image_shows() -> None:
    queries = attribute_queries({"class": ["water_bottle"]}, "unique", class_names=["water_bottle", "shampoo_bottle"])
    assert [query.text for query in queries] == ["water bottle"]


def test_head_is_the_class_or_what_is_named_last() -> None:
    heads = {query.text: query.head for query in attribute_queries(LABELS)}
    assert heads["new blue plastic bottle"] == heads["bottle"] == "class=bottle"
    assert heads["used blue"] == "colour=blue"


def test_mistakes_in_labels_are_refused() -> None:
    with pytest.raises(UserError, match="attribute queries need labels"):
        attribute_queries({})
    with pytest.raises(UserError, match="must be one of last, unique, full; got 'first'"):
        attribute_queries(LABELS, "first")  # type: ignore[arg-type]


def test_each_label_of_several_is_a_word_of_its_own() -> None:
    labels: dict[str, list[str | list[str] | None]] = {"tags": [["soft", "red"], ["red"], [], None]}
    labels |= {"class": ["cap", "cap", "mug", None]}
    found = {query.text: query.relevant.tolist() for query in attribute_queries(labels)}
    assert found == {
        "soft": [0], "red": [0, 1], "cap": [0, 1], "mug": [2], "soft cap": [0], "red cap": [0, 1],
    }  # fmt: skip
