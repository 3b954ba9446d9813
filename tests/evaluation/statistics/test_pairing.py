from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.stats

from evaluation.statistics.intervals import share_statistic, wilson
from evaluation.statistics.pooled import in_order_of, paired_difference
from tests.evaluation.predictions_fixture import make_predictions
from vitrail.errors import UserError


def test_rows_are_paired_by_name() -> None:
    after = make_predictions(20)
    # Another numbering and other groups, as a data set with other options may have.
    other = replace(after, sample_id=after.sample_id + 7, groups=after.names)
    paired = in_order_of(after, other.take(np.random.default_rng(0).permutation(20)), "class")
    np.testing.assert_array_equal(paired.names, after.names)
    np.testing.assert_array_equal(paired.logits["class"], after.logits["class"])
    np.testing.assert_array_equal(paired.groups, after.groups)


def test_what_differs_is_named() -> None:
    after = make_predictions(20)
    first = r"^predictions before and after: "
    with pytest.raises(UserError, match=first + r"the samples differ: 2 only after \(first 'photo 0'\); test both"):
        in_order_of(after, after.take(np.arange(2, 20)), "class")
    with pytest.raises(UserError, match=r"3 only after \(first 'photo 0'\), 3 only before \(first 'photo 20'\)"):
        in_order_of(after, make_predictions(20, first_id=3), "class")
    targets = {
        **after.targets,
        "class": np.where(np.arange(20) == 5, 2 - after.targets["class"], after.targets["class"]),
    }
    with pytest.raises(UserError, match=r"1 of 20 samples have another target of 'class', first 'photo 5'"):
        in_order_of(after, replace(after, targets=targets), "class")
    with pytest.raises(UserError, match="several samples have the same name"):
        in_order_of(after, replace(after, names=np.array(["photo"] * 20, dtype=object)), "class")


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        (["bag", "hat", "mug"], "number 1 is 'cap' after and 'hat' before"),
        (["bag", "cap"], "3 after, 2 before"),
        ([], "3 after, 0 before"),
    ],
)
def test_classes_must_agree(classes: list[str], said: str) -> None:
    after = make_predictions(8)
    with pytest.raises(UserError, match=f"the classes of 'class' differ: {said}"):
        in_order_of(after, replace(after, tasks={"class": classes}), "class")


def test_paired_difference_equals_scipys_paired_bootstrap() -> None:
    rng = np.random.default_rng(0)
    first, second = ((rng.random(200) < share).astype(float) for share in (0.8, 0.6))
    expected = scipy.stats.bootstrap(
        (first, second),
        lambda x, y, axis: (x - y).mean(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=10_000,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    statistics = share_statistic(first), share_statistic(second)
    found = paired_difference(*statistics, np.arange(200), False, 10_000)
    assert found.value == pytest.approx(first.mean() - second.mean())
    assert found.interval == pytest.approx((expected.low, expected.high), abs=0.012)  # in steps of 1/200


def test_models_that_agree_could_differ_in_a_group_not_seen() -> None:
    statistic = share_statistic(np.arange(30) % 2)
    found = paired_difference(statistic, statistic, np.arange(30) // 3, True)
    most = wilson(0.0, 10).high
    assert found == (0.0, (-most, most))
