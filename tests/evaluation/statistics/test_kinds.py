"""Weighted scores are those of scikit-learn of samples that are repeated as often as they weigh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, cohen_kappa_score, f1_score, mean_absolute_error, r2_score

from evaluation.statistics.intervals import Statistic
from evaluation.statistics.kinds import (
    explained_variance,
    mean_average_precision,
    mean_error,
    micro_f1,
    quadratic_kappa,
)

N = 30
RNG = np.random.default_rng(0)
WEIGHTS = RNG.integers(0, 4, (5, N))
REPEATED = [np.repeat(np.arange(N), row) for row in WEIGHTS]
LABELS = RNG.integers(0, 2, (N, 3))
PROBABILITIES = np.round(RNG.random((N, 3)), 1)  # with ties
NUMBERS, VALUES = RNG.normal(50, 10, N), RNG.normal(50, 10, N)
GRADES, PREDICTED = RNG.integers(0, 4, N), RNG.integers(0, 4, N)


@pytest.mark.parametrize(
    ("statistic", "score", "first", "second"),
    [
        (mean_average_precision(LABELS, PROBABILITIES), average_precision_score, LABELS, PROBABILITIES),
        (micro_f1(LABELS, PROBABILITIES > 0.4), f1_score, LABELS, PROBABILITIES > 0.4),
        (mean_error(NUMBERS - VALUES), mean_absolute_error, NUMBERS, VALUES),
        (explained_variance(NUMBERS, VALUES), r2_score, NUMBERS, VALUES),
        (quadratic_kappa(GRADES, PREDICTED), cohen_kappa_score, GRADES, PREDICTED),
    ],
    ids=["mAP", "micro_f1", "mae", "r2", "kappa"],
)
def test_weights_are_repetitions(statistic: Statistic, score: Callable[..., float], first: Any, second: Any) -> None:
    options: dict[Any, dict[str, str]] = {f1_score: {"average": "micro"}, cohen_kappa_score: {"weights": "quadratic"}}
    expected = [score(first[rows], second[rows], **options.get(score, {})) for rows in REPEATED]
    assert statistic(WEIGHTS.astype(np.float64)) == pytest.approx(expected)


def test_unknown_labels_and_labels_without_samples_are_left_out() -> None:
    labels = LABELS.copy()
    labels[:7, 1], labels[:, 2] = -1, 0
    expected = [
        average_precision_score(LABELS[:, 0], PROBABILITIES[:, 0]),
        average_precision_score(LABELS[7:, 1], PROBABILITIES[7:, 1]),
    ]
    assert mean_average_precision(labels, PROBABILITIES)(np.ones((1, N))) == pytest.approx([np.mean(expected)])
