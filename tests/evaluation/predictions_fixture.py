"""Small made-up predictions for the tests of evaluation and callbacks."""

from __future__ import annotations

import numpy as np

from vitrail.predictions import Predictions

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
