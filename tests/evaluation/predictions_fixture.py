"""Small made-up predictions for the tests of evaluation and callbacks."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from vitrail.predictions import Predictions
from vitrail.types import TaskKind

TASKS = {"class": ["bag", "cap", "mug"], "colour": ["blue", "red"]}


def make_predictions(n: int = 20, seed: int = 0, first_id: int = 0) -> Predictions:
    """``n`` samples of groups of up to four, with some unknown targets in every task."""
    rng = np.random.default_rng(seed)
    ids = np.arange(first_id, first_id + n, dtype=np.int64)
    return Predictions(
        sample_id=ids,
        names=np.array([f"photo {index}" for index in ids], dtype=object),
        groups=np.array([f"object {index // 4}" for index in ids], dtype=object),
        tasks=TASKS,
        targets={task: rng.integers(-1, len(names), n) for task, names in TASKS.items()},
        logits={task: rng.normal(size=(n, len(names))).astype(np.float32) for task, names in TASKS.items()},
    )


KINDS: dict[str, TaskKind] = {"grade": "ordinal", "tags": "multi_label", "price": "regression"}
ALL_TASKS = {"class": ["bag", "cap", "mug"], "grade": ["bad", "fair", "good", "new"], "tags": ["dots", "lid", "red"]}


def make_predictions_of_every_kind(n: int = 60, seed: int = 0, noise: float = 1.0) -> Predictions:
    """``n`` samples of groups of three, with a task of each kind; the lower the noise, the better the model.

    Targets do not depend on the noise. Some are unknown, of the labels single entries and whole rows.
    """
    rng = np.random.default_rng(seed)
    ids = np.arange(n, dtype=np.int64)
    classes, grades = (rng.integers(-1, len(ALL_TASKS[task]), n) for task in ("class", "grade"))
    tags = (rng.random((n, 3)) < (0.5, 0.3, 0.15)).astype(np.int8)
    tags[rng.random((n, 3)) < 0.05] = -1
    tags[0] = -1
    prices = rng.gamma(4.0, 10.0, n).astype(np.float32)
    prices[1] = np.nan
    rng = np.random.default_rng(seed + 1)
    shared = np.repeat(rng.normal(size=(-(-n // 3), 1)), 3, axis=0)[:n]

    def disturbed(*shape: int) -> NDArray[np.float64]:
        return noise * (0.6 * shared.reshape(n, *[1] * (len(shape) - 1)) + 0.8 * rng.normal(size=shape))

    values = np.nan_to_num(prices, nan=40.0)[:, None] + 10 * disturbed(n, 1)
    placed = grades[:, None] + disturbed(n, 1)
    logits = {
        "class": 2 * np.eye(3)[np.maximum(classes, 0)] + disturbed(n, 3),
        "grade": log_softmax(-((placed - np.arange(4)) ** 2), axis=1),
        "tags": 2.0 * (tags == 1) - 1 + disturbed(n, 3),
        "price": np.concatenate([values, np.full((n, 1), 4.0)], axis=1),
    }
    return Predictions(
        sample_id=ids,
        names=np.array([f"photo {index}" for index in ids], dtype=object),
        groups=np.array([f"object {index // 3}" for index in ids], dtype=object),
        tasks={**ALL_TASKS, "price": []},
        targets={"class": classes, "grade": grades, "tags": tags, "price": prices},
        logits={task: values.astype(np.float32) for task, values in logits.items()},
        kinds=KINDS,
        thresholds={"tags": [0.5, 0.4, 0.3]},
    )
