import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from retrieval.search.searcher import reciprocal_rank_fusion


def _ranking(items: list[int], scores: list[float]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    return np.array(items, dtype=np.int64), np.array(scores, dtype=np.float32)


def test_an_item_gets_the_sum_of_its_reciprocal_ranks() -> None:
    items, scores = reciprocal_rank_fusion([_ranking([7, 3, 5], [0.9, 0.5, 0.1]), _ranking([3, 9], [12.0, 11.0])])
    assert items.tolist() == [3, 7, 9, 5]
    np.testing.assert_allclose(scores, [1 / 62 + 1 / 61, 1 / 61, 1 / 62, 1 / 63])


def test_equal_scores_share_the_mean_of_their_ranks_whatever_their_order() -> None:
    """Against a plain loop over SciPy's ranks."""
    generator = np.random.default_rng(0)
    rankings = [
        (generator.permutation(40)[:30].astype(np.int64), generator.integers(0, 6, 30).astype(np.float32))
        for _ in range(3)
    ]
    expected: dict[int, float] = {}
    for items, scores in rankings:
        for item, rank in zip(items.tolist(), rankdata(-scores, method="average"), strict=True):
            expected[item] = expected.get(item, 0.0) + 1 / (60 + rank)
    items, fused = reciprocal_rank_fusion(rankings)
    assert set(items.tolist()) == set(expected)
    np.testing.assert_allclose(fused, [expected[item] for item in items.tolist()])
    assert (np.diff(fused) <= 0).all()


def test_equal_sums_keep_ascending_items() -> None:
    items, _ = reciprocal_rank_fusion([_ranking([8, 2], [1.0, 0.5]), _ranking([2, 8], [1.0, 0.5])])
    assert items.tolist() == [2, 8]


def test_rankings_without_items_fuse_to_nothing() -> None:
    assert reciprocal_rank_fusion([])[0].tolist() == []
    assert reciprocal_rank_fusion([_ranking([], [])])[0].tolist() == []
    assert reciprocal_rank_fusion([_ranking([], []), _ranking([4], [1.0])])[0].tolist() == [4]
