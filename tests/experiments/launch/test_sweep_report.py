from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial
from scipy.stats import t

from experiments.launch.study import RUN, VALUES, over_seeds_frame
from experiments.launch.sweep_file import Metric
from vitrail.predictions import Predictions, write_predictions

METRIC = Metric("val/class/accuracy", "maximize")
CLASSES = ["a", "b", "c", "d"]


def predicted_run(folder: Path, right: list[bool], counts: list[int]) -> Path:
    """A run that predicts some of eight samples rightly, two of each class."""
    target = np.arange(8) % 4
    logits = np.eye(4, dtype=np.float32)[np.where(right, target, (target + 1) % 2 + 2 * (target // 2))]
    names = np.array([f"sample {row}" for row in range(8)], dtype=object)
    predictions = Predictions(np.arange(8), names, names, {"class": CLASSES}, {"class": target}, {"class": logits})
    write_predictions(folder / "predictions" / "test.parquet", predictions)
    (folder / "run.json").write_text(json.dumps({"data": {"class_counts": {"class": counts}}}), encoding="utf-8")
    return folder


def trial(method: str, seed: int | None, value: float, run: Path | None = None) -> FrozenTrial:
    values: dict[str, Any] = {"method": method} | ({} if seed is None else {"seed_everything": seed})
    return create_trial(
        state=TrialState.COMPLETE,
        value=value,
        params={"method": json.dumps(method)},
        distributions={"method": CategoricalDistribution([json.dumps("x"), json.dumps("y")])},
        user_attrs={VALUES: values, **({RUN: str(run)} if run else {})},
    )


@pytest.mark.parametrize("counts", [[5, 5, 5, 5], [5, 5, 0, 0]])
def test_seeds_of_the_same_parameters_are_one_row(counts: list[int], tmp_path: Path) -> None:
    right = [[True] * 8, [True] * 6 + [False] * 2, [False] * 4 + [True] * 4]
    runs = [predicted_run(tmp_path / str(number), own, counts) for number, own in enumerate(right)]
    trials = [trial("x", seed, value, runs[seed]) for seed, value in enumerate((0.5, 0.6, 0.9))]
    frame = over_seeds_frame([*trials, trial("y", 0, 0.4)], METRIC)
    assert frame is not None
    first, second = frame.to_dict("records")
    assert (first["method"], first["seeds"], second["method"], second["seeds"]) == ("x", 3, "y", 1)
    values = [0.5, 0.6, 0.9]
    assert first["val/class/accuracy"] == pytest.approx(np.mean(values))
    low, high = t.interval(0.95, 2, np.mean(values), np.std(values, ddof=1) / 3**0.5)
    assert first["val/class/accuracy ± seeds"] == pytest.approx((high - low) / 2)
    assert first["test"] == pytest.approx(np.mean([1, 0.75, 0.5]))
    assert first["test low"] < first["test"] < first["test high"]
    assert np.isnan(second["test"])
    if counts[3]:
        assert "novel" not in frame
    else:
        # Samples 0, 1, 4, 5 are of base classes.
        base, novel = np.array([1, 1, 0.5]), np.array([1, 0.5, 0.5])
        assert first["base"] == pytest.approx(base.mean())
        assert first["novel"] == pytest.approx(novel.mean())
        assert first["harmonic_mean"] == pytest.approx((2 * base * novel / (base + novel)).mean())


def test_without_several_seeds_there_is_no_such_table() -> None:
    assert over_seeds_frame([trial("x", None, 0.5), trial("y", None, 0.6)], METRIC) is None
    assert over_seeds_frame([trial("x", 1, 0.5), trial("y", 2, 0.6)], METRIC) is None
