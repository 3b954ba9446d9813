from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.covariance import LedoitWolf
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.neighbors import NearestNeighbors

from evaluation.commands.ood import (
    OodOutputs,
    auroc_statistic,
    fit_detector,
    fpr_statistic,
    methods_for,
    separation,
    threshold_for,
)
from vitrail.errors import UserError
from vitrail.ood import METHODS, scores_of

SIZE, CLASSES = 10, 3
RNG = np.random.default_rng(0)
HEAD = RNG.normal(size=(CLASSES, SIZE)), RNG.normal(size=CLASSES)
CENTRES = np.concatenate([3 * RNG.normal(size=(CLASSES, 4)), np.zeros((CLASSES, SIZE - 4))], axis=1)


def outputs(n: int, *, known: bool = True, seed: int = 1) -> OodOutputs:
    """Features around a centre for each class, in a subspace; those of unknown images are anywhere."""
    rng = np.random.default_rng(seed)
    targets = np.arange(n) % CLASSES
    noise = rng.normal(size=(n, SIZE)) * ([1.0] * 4 + [0.1] * (SIZE - 4))
    features = CENTRES[targets] + noise if known else rng.normal(size=(n, SIZE)) * 3
    logits = features @ HEAD[0].T + HEAD[1]
    groups = np.array([f"object {row // 2}" for row in range(n)], dtype=object)
    return OodOutputs(logits.astype(np.float32), features.astype(np.float32), groups, targets)


TRAIN, TEST, OTHER = outputs(90), outputs(40, seed=2), outputs(50, known=False, seed=3)


def scores(method: str, of: OodOutputs, arrays: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float64]:
    return scores_of(method, of.logits, of.features, arrays)


def test_mahalanobis_is_the_distance_of_scikit_learn() -> None:
    found = scores("mahalanobis", TEST, fit_detector("mahalanobis", TRAIN))

    means = np.stack([TRAIN.features[TRAIN.targets == one].mean(axis=0) for one in range(CLASSES)])
    shrunk = LedoitWolf(assume_centered=True).fit(TRAIN.features.astype(float) - means[TRAIN.targets])
    distances = [shrunk.mahalanobis(TEST.features.astype(float) - mean) for mean in means]
    assert found == pytest.approx(-np.min(distances, axis=0), rel=1e-3)


def test_nearest_neighbours_are_those_of_scikit_learn() -> None:
    found = scores("knn", TEST, fit_detector("knn", TRAIN, neighbours=4))

    distances, _ = NearestNeighbors(n_neighbors=4, metric="cosine").fit(TRAIN.features).kneighbors(TEST.features)
    assert found == pytest.approx(1 - distances[:, 3], abs=1e-5)
    assert int(fit_detector("knn", TRAIN)["neighbours"]) == 3
    assert int(fit_detector("knn", TRAIN, neighbours=1000)["neighbours"]) == len(TRAIN)


def test_vim_takes_off_what_is_outside_of_the_principal_subspace() -> None:
    arrays = fit_detector("vim", TRAIN, head=HEAD)

    origin = -np.linalg.pinv(HEAD[0]) @ HEAD[1]
    assert arrays["origin"] == pytest.approx(origin, rel=1e-4)
    centred = TRAIN.features - origin
    # Principal directions around the origin: those of the points together with their mirror images.
    pca = PCA(SIZE // 2).fit(np.concatenate([centred, -centred]))

    def outside(of: OodOutputs) -> NDArray[np.float64]:
        moved = of.features - origin
        return np.asarray(np.linalg.norm(moved - pca.inverse_transform(pca.transform(moved)), axis=1))

    scale = TRAIN.logits.max(axis=1).mean() / outside(TRAIN).mean()
    energy = np.log(np.exp(TEST.logits.astype(float)).sum(axis=1))
    assert scores("vim", TEST, arrays) == pytest.approx(energy - scale * outside(TEST), rel=1e-3, abs=1e-3)
    assert fit_detector("vim", TRAIN)["origin"] == pytest.approx(TRAIN.features.mean(axis=0), rel=1e-4)


@pytest.mark.parametrize("method", ["mahalanobis", "knn", "vim"])
def test_images_from_elsewhere_have_low_scores(method: str) -> None:
    arrays = fit_detector(method, TRAIN, head=HEAD)

    inside, outside = (scores(method, one, arrays) for one in (TEST, OTHER))

    assert roc_auc_score([1] * len(inside) + [0] * len(outside), [*inside, *outside]) > 0.9


@pytest.mark.parametrize("ties", [False, True])
def test_auroc_and_fpr_with_weights_are_those_of_scikit_learn(ties: bool) -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=60) + np.repeat([1.0, 0.0], 30)
    values = np.round(values) if ties else values
    positive = np.arange(60) < 30
    weights = rng.integers(0, 4, size=(5, 60)).astype(float)

    areas, shares = (make(values, positive)(weights) for make in (auroc_statistic, fpr_statistic))

    for row, area, share in zip(weights, areas, shares, strict=True):
        assert area == pytest.approx(roc_auc_score(positive, values, sample_weight=row))
        false, true, _ = roc_curve(positive, values, sample_weight=row, drop_intermediate=False)
        assert share == pytest.approx(false[np.argmax(true >= 0.95 - 1e-9)])
    assert math.isnan(auroc_statistic(values, positive)(positive[None].astype(float))[0])


@pytest.mark.parametrize(("n", "rate"), [(1, 0.5), (10, 0.95), (20, 0.95), (100, 0.9), (37, 0.8)])
def test_the_threshold_is_the_highest_that_keeps_the_share(n: int, rate: float) -> None:
    values = np.random.default_rng(n).permutation(n).astype(float)

    threshold = threshold_for(values, rate)

    assert (values >= threshold).mean() >= rate
    assert (values > threshold).mean() < rate


def test_intervals_are_over_groups_of_both_sets() -> None:
    arrays = fit_detector("knn", TRAIN)
    inside, outside = (scores("knn", one, arrays) for one in (TEST, OTHER))
    alone = (np.arange(len(TEST)).astype(object), np.arange(len(OTHER)).astype(object))

    found = separation(inside, outside, (TEST.groups, OTHER.groups), 0.5)
    # Two copies of every image in one group are worth no more than one.
    twice = separation(
        np.repeat(inside, 2), np.repeat(outside, 2), (np.repeat(alone[0], 2), np.repeat(alone[1], 2)), 0.5
    )
    once = separation(inside, outside, alone, 0.5)

    assert found.auroc.value == pytest.approx(roc_auc_score([1] * 40 + [0] * 50, [*inside, *outside]))
    assert found.auroc.interval.low <= found.auroc.value <= found.auroc.interval.high
    assert found.kept.value == (inside >= 0.5).mean()
    assert found.unknown.value == (outside < 0.5).mean()
    for one, other in zip(vars(twice).values(), vars(once).values(), strict=True):
        assert one.value == pytest.approx(other.value)
        assert tuple(one.interval) == pytest.approx(tuple(other.interval), abs=1e-6)


def test_each_kind_has_the_methods_that_it_has_the_outputs_for() -> None:
    assert methods_for("single_label", has_prompts=True) == list(METHODS)
    assert methods_for("ordinal", has_prompts=False) == [one for one in METHODS if one != "mcm"]
    assert methods_for("multi_label", has_prompts=False) == ["msp", "max_logit", "energy", "mahalanobis", "knn"]
    assert methods_for("regression", has_prompts=False) == ["mahalanobis", "knn"]


def test_few_images_and_unknown_classes() -> None:
    one = OodOutputs(TRAIN.logits[:1], TRAIN.features[:1], TRAIN.groups[:1], TRAIN.targets[:1])
    few = OodOutputs(TRAIN.logits[:4], TRAIN.features[:4], TRAIN.groups[:4])

    with pytest.raises(UserError, match="needs at least two training images; got 1"):
        fit_detector("knn", one)
    for method in ("mahalanobis", "knn", "vim"):
        assert np.isfinite(scores(method, TEST, fit_detector(method, few))).all()
