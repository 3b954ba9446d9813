from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from evaluation.dataset.active_learning import Pool, ranking, to_label
from vitrail.errors import UserError


def pool(**changes: Any) -> Pool:
    """Four images in a plane; the model tells two classes apart."""
    probability = np.array([[0.9, 0.1], [0.45, 0.55], [0.7, 0.3], [0.2, 0.8]])
    fields: dict[str, Any] = {
        "names": np.array(["a", "b", "c", "d"], dtype=object),
        "paths": np.array(["/a.jpg", "/b.jpg", "", ""], dtype=object),
        "vectors": np.array([[1, 0], [0.8, 0.6], [0, 1], [-1, 0]], np.float32),
        "probability": probability,
        "predicted": np.array(["cat", "dog", "cat", "dog"], dtype=object),
        "confidence": probability.max(axis=1),
        "covered": np.array([[1, 0]], np.float32),
    }
    return Pool(**{**fields, **changes})


def test_strategies_rank_what_they_say() -> None:
    assert ranking(pool(), "entropy", 4).rows.tolist() == [1, 2, 3, 0]
    assert ranking(pool(), "margin", 2).rows.tolist() == [1, 2]
    confident = ranking(pool(probability=None), "confidence", 4)
    assert confident.rows.tolist() == [1, 2, 3, 0]
    np.testing.assert_allclose(confident.scores, [0.45, 0.3, 0.2, 0.1])
    core = ranking(pool(), "coreset", 2)
    assert core.rows.tolist() == [3, 2]
    np.testing.assert_allclose(core.scores, [2, np.sqrt(2)])


def test_table_is_ready_to_be_filled_in() -> None:
    table = to_label(pool(), ranking(pool(), "margin", 3), "class")
    assert table.columns.tolist() == ["rank", "name", "path", "score", "predicted", "confidence", "class"]
    assert table["rank"].tolist() == [1, 2, 3]
    assert table["name"].tolist() == ["b", "c", "d"]
    assert table["predicted"].tolist() == ["dog", "cat", "dog"]
    assert (table["class"] == "").all()
    bare = pool(probability=None, predicted=None, confidence=None)
    assert to_label(bare, ranking(bare, "coreset", 1), "class").columns.tolist() == [
        "rank",
        "name",
        "path",
        "score",
        "class",
    ]


def test_what_a_pool_lacks_is_told() -> None:
    with pytest.raises(
        UserError, match=r"best class's probability only; name the images .* take confidence or coreset"
    ):
        ranking(pool(probability=None), "entropy", 2)
    with pytest.raises(UserError, match=r"this pool has no probabilities; .* or take coreset"):
        ranking(pool(probability=None, confidence=None), "confidence", 2)
