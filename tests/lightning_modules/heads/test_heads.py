"""Losses, outputs and scores of every kind of target, against the libraries that define them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    cohen_kappa_score,
    f1_score,
    mean_absolute_error,
    r2_score,
    roc_auc_score,
    root_mean_squared_error,
)
from timm.loss import AsymmetricLossMultiLabel, BinaryCrossEntropy

from lightning_modules.heads import OrdinalOutput, RegressionOutput, SingleLabelOutput, TaskOutput, task_outputs
from lightning_modules.heads.multi_label import MultiLabelOutput, MultiLabelScores, best_thresholds
from lightning_modules.heads.ordinal import OrdinalScores
from lightning_modules.heads.regression import RegressionScores
from lightning_modules.options import LossOptions, checked
from vitrail.errors import UserError
from vitrail.types import UNKNOWN, Mix, TaskFacts

N, C = 40, 5


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(high: int, *shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def some_labels(unknown: bool = True) -> torch.Tensor:
    targets = integers(2, N, C).to(torch.int8)
    if unknown:
        targets[3] = UNKNOWN
        targets[5, 2] = targets[7, 0] = UNKNOWN
    return targets


def test_focal_loss_of_a_class_is_its_definition() -> None:
    logits, target = normal(N, C), integers(C, N)
    output = SingleLabelOutput("class", C, "focal", LossOptions(gamma=1.5))
    own = logits.softmax(1).gather(1, target[:, None])[:, 0]
    assert float(output.loss(logits, target).value) == pytest.approx(float((-((1 - own) ** 1.5) * own.log()).mean()))
    target[:7] = UNKNOWN
    assert float(output.loss(logits, target).weight) == N - 7


def test_logit_adjustment_adds_the_logarithm_of_the_prior() -> None:
    logits, target, counts = normal(N, C), integers(C, N), [50, 20, 20, 9, 1]
    prior = torch.tensor(counts) / 100
    for name, tau in (("logit_adjusted", 0.7), ("balanced_softmax", 1.0)):
        output = SingleLabelOutput("class", C, name, LossOptions(tau=0.7), counts)
        expected = F.cross_entropy(logits + tau * prior.log(), target)
        assert float(output.loss(logits, target).value) == pytest.approx(float(expected), rel=1e-5)
        assert float(output.evaluation_loss(logits, target).value) == pytest.approx(
            float(F.cross_entropy(logits, target))
        )
    with pytest.raises(UserError, match="needs the training counts of the 5 classes of 'class', they are missing"):
        SingleLabelOutput("class", C, "balanced_softmax")


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_binary_cross_entropy_of_classes_is_timms(smoothing: float) -> None:
    logits, target = normal(N, C), integers(C, N)
    output = SingleLabelOutput("class", C, "bce", LossOptions(label_smoothing=smoothing))
    expected = BinaryCrossEntropy(smoothing=smoothing)(logits, target)
    assert float(output.loss(logits, target).value) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("threshold", [None, 0.2])
def test_binary_cross_entropy_of_a_mixed_batch_is_timms_of_soft_targets(threshold: float | None) -> None:
    logits, target, shares = normal(N, C), integers(C, N), torch.rand(N, generator=torch.Generator().manual_seed(2))
    partner = torch.randperm(N, generator=torch.Generator().manual_seed(3))
    mix: Mix = {"partner": partner, "lam": shares}
    soft = F.one_hot(target, C) * shares[:, None] + F.one_hot(target[partner], C) * (1 - shares[:, None])
    expected = BinaryCrossEntropy(smoothing=0.0, target_threshold=threshold)(logits, soft)
    output = SingleLabelOutput("class", C, "bce", LossOptions(bce_threshold=threshold))
    assert float(output.loss(logits, target, mix).value) == pytest.approx(float(expected), rel=1e-5)


def test_losses_of_labels_are_those_of_torch_and_timm_over_known_entries() -> None:
    logits, targets = normal(N, C), some_labels()
    known = targets != UNKNOWN
    flat, labels = logits[known], targets[known].float()
    plain = F.binary_cross_entropy_with_logits(flat, labels, reduction="none")
    own = torch.where(labels == 1, flat.sigmoid(), 1 - flat.sigmoid())
    asymmetric = AsymmetricLossMultiLabel(gamma_neg=4, gamma_pos=1, clip=0.05)(flat[None], labels[None]) / len(flat)
    expected = {"bce": plain.mean(), "focal": (plain * (1 - own) ** 2).mean(), "asymmetric": asymmetric}
    for name, value in expected.items():
        loss = MultiLabelOutput(C, name, LossOptions(gamma_positive=1.0)).loss(logits, targets)
        assert float(loss.value) == pytest.approx(float(value), rel=1e-4), name
        assert float(loss.weight) == int(known.sum())


def test_scores_of_labels_are_those_of_scikit_learn() -> None:
    logits, targets = normal(N, C), some_labels(unknown=False)
    targets[:, 4] = 0  # applies to no sample
    scores = MultiLabelScores(C)
    scores.thresholds = torch.tensor([0.3, 0.5, 0.6, 0.5, 0.9], dtype=torch.float64)
    for rows in (slice(0, 15), slice(15, N)):
        scores.update(logits[rows], targets[rows])
    found = {name: float(value) for name, value in scores.compute().items()}
    truth, probabilities = targets.numpy(), logits.double().sigmoid().numpy()
    marked = probabilities >= scores.thresholds.numpy()
    assert found["mAP"] == pytest.approx(average_precision_score(truth[:, :4], probabilities[:, :4]), abs=1e-6)
    assert found["auroc"] == pytest.approx(roc_auc_score(truth[:, :4], probabilities[:, :4]), abs=1e-6)
    assert found["f1_micro"] == pytest.approx(f1_score(truth, marked, average="micro", zero_division=0), abs=1e-6)
    assert found["f1_macro"] == pytest.approx(f1_score(truth, marked, average="macro", zero_division=0), abs=1e-6)
    assert found["exact_match"] == pytest.approx(accuracy_score(truth, marked), abs=1e-6)


def test_unknown_labels_count_in_no_score() -> None:
    logits, targets = normal(N, C), some_labels()
    scores, known = MultiLabelScores(C), (some_labels() != UNKNOWN).numpy()
    scores.update(logits, targets)
    found = scores.compute()
    per_label = [
        average_precision_score(targets[known[:, label], label], logits[known[:, label], label]) for label in range(C)
    ]
    assert float(found["mAP"]) == pytest.approx(np.mean(per_label), abs=1e-6)
    marked = logits.numpy() >= 0
    right = ((marked == (targets.numpy() == 1)) | ~known)[known.any(axis=1)].all(axis=1)
    assert float(found["exact_match"]) == pytest.approx(right.mean(), abs=1e-6)


def test_outputs_that_are_no_numbers_count_against_the_model() -> None:
    targets = torch.tensor([[1, 0], [0, 1], [1, 1], [0, 0]], dtype=torch.int8)
    scores = MultiLabelScores(2)
    scores.update(torch.full((4, 2), float("nan")), targets)
    found = {name: float(value) for name, value in scores.compute().items()}
    assert found == {"mAP": 0.5, "auroc": 0.0, "f1_micro": 0.0, "f1_macro": 0.0, "exact_match": 0.0}


def test_thresholds_have_the_highest_f1_of_each_label() -> None:
    probabilities, targets = normal(N, C).double().sigmoid(), some_labels()
    targets[:, 4] = 0
    chosen = best_thresholds(probabilities, targets.long())
    assert float(chosen[4]) == 0.5
    for label in range(4):
        known = targets[:, label] != UNKNOWN
        truth, scores = targets[known, label].numpy(), probabilities[known, label].numpy()
        best = max(f1_score(truth, scores >= cut) for cut in scores)
        assert f1_score(truth, scores >= float(chosen[label])) == pytest.approx(best)


def test_corn_and_cumulative_link_give_probabilities_of_all_classes() -> None:
    for name, width in (("corn", C - 1), ("cumulative_link", 1)):
        output = OrdinalOutput(C, name)
        assert output.width == width
        logits = output(normal(N, width) * 3)
        torch.testing.assert_close(logits.exp().sum(dim=1), torch.ones(N))
        expected = F.cross_entropy(logits, integers(C, N))
        assert float(output.loss(logits, integers(C, N)).value) == pytest.approx(float(expected), rel=1e-5)
    torch.testing.assert_close(OrdinalOutput(C, "cumulative_link")(torch.zeros(1, 1)).exp(), torch.full((1, C), 1 / C))


def test_the_loss_of_corn_is_the_sum_of_its_conditional_binary_losses() -> None:
    raw, target = normal(N, C - 1), integers(C, N)
    total = torch.zeros(())
    for k in range(C - 1):  # as in the paper: among those not below k, is it above k?
        rows = target >= k
        total = total + F.binary_cross_entropy_with_logits(raw[rows, k], (target[rows] > k).float(), reduction="sum")
    output = OrdinalOutput(C)
    assert float(output.loss(output(raw), target).value) == pytest.approx(float(total) / N, rel=1e-5)


def test_the_cumulative_link_is_the_difference_of_logistic_functions() -> None:
    output, raw = OrdinalOutput(4, "cumulative_link"), normal(N, 1)
    cutpoints = torch.cat([output.first, output.first + F.softplus(output.gaps).cumsum(0)])
    below = torch.cat([torch.zeros(N, 1), (cutpoints - raw).sigmoid(), torch.ones(N, 1)], dim=1)
    torch.testing.assert_close(output(raw).exp(), below.diff(dim=1))


def test_scores_of_ordered_classes_are_those_of_scikit_learn() -> None:
    logits, target = normal(N, C), integers(C, N)
    target[4] = UNKNOWN
    scores = OrdinalScores(C)
    for rows in (slice(0, 15), slice(15, N)):
        scores.update(logits[rows], target[rows])
    found = scores.compute()
    known = target != UNKNOWN
    truth, predicted = target[known].numpy(), logits.argmax(1)[known].numpy()
    assert float(found["mae"]) == pytest.approx(mean_absolute_error(truth, predicted), rel=1e-5)
    assert float(found["quadratic_kappa"]) == pytest.approx(
        cohen_kappa_score(truth, predicted, weights="quadratic"), abs=1e-6
    )
    assert float(found["accuracy"]) == pytest.approx(accuracy_score(truth, predicted))
    scores.reset()
    scores.update(torch.zeros(2, C), torch.tensor([0, 3]))
    assert float(scores.compute()["mae"]) == 3.5  # no class is predicted: 4 and 3 away


def numbers() -> torch.Tensor:
    targets = normal(N, seed=4) * 20 + 1000
    targets[[2, 9]] = torch.nan
    return targets


@pytest.mark.parametrize("name", ["mse", "huber", "gaussian_nll"])
def test_losses_of_numbers_are_those_of_torch_in_standard_units(name: str) -> None:
    output = RegressionOutput("price", [1000.0, 20.0], name, delta=0.5)
    raw, targets = normal(N, output.width).requires_grad_(), numbers()
    known = ~targets.isnan()
    logits = output(raw)
    torch.testing.assert_close(logits[:, 0], raw[:, 0] * 20 + 1000)
    aim = (targets[known] - 1000) / 20
    expected = {
        "mse": lambda: F.mse_loss(raw[known, 0], aim),
        "huber": lambda: F.huber_loss(raw[known, 0], aim, delta=0.5),
        "gaussian_nll": lambda: F.gaussian_nll_loss(raw[known, 0], aim, raw[known, 1].exp()),
    }[name]()
    loss = output.loss(logits, targets)
    assert float(loss.value) == pytest.approx(float(expected), rel=1e-3)
    assert float(loss.weight) == N - 2
    assert float(output.evaluation_loss(logits, targets).value) == pytest.approx(
        float(F.mse_loss(raw[known, 0], aim)), rel=1e-3
    )
    loss.value.backward()  # type: ignore[no-untyped-call]
    assert raw.grad is not None
    assert torch.isfinite(raw.grad).all()
    assert not raw.grad[~known].any()


def test_scores_of_numbers_are_those_of_scikit_learn_and_scipy() -> None:
    targets = numbers()
    values = targets.nan_to_num() + normal(N, seed=5) * 10
    scores = RegressionScores()
    for rows in (slice(0, 15), slice(15, N)):
        scores.update(values[rows, None], targets[rows])
    found = {name: float(value) for name, value in scores.compute().items()}
    known = ~targets.isnan()
    truth, predicted = targets[known].double().numpy(), values[known].double().numpy()
    expected = {
        "mae": mean_absolute_error(truth, predicted),
        "rmse": root_mean_squared_error(truth, predicted),
        "r2": r2_score(truth, predicted),
        "spearman": float(spearmanr(truth, predicted).statistic),
    }
    assert found == pytest.approx(expected, rel=1e-5)


def outputs_of_every_kind() -> list[tuple[TaskOutput, torch.Tensor]]:
    return [
        (SingleLabelOutput("class", C), integers(C, N)),
        (MultiLabelOutput(C), some_labels(unknown=False)),
        (OrdinalOutput(C), integers(C, N)),
        (RegressionOutput("price", [1000.0, 20.0]), normal(N, seed=4) * 20 + 1000),
    ]


@pytest.mark.parametrize("place", range(4))
def test_a_mixed_image_counts_as_its_parts(place: int) -> None:
    output, targets = outputs_of_every_kind()[place]
    logits = output(normal(N, output.width))
    mix: Mix = {"partner": torch.arange(N).flip(0), "lam": torch.full((N,), 0.75)}
    parts = [float(output.loss(logits, some).value) for some in (targets, targets.flip(0))]
    assert float(output.loss(logits, targets, mix).value) == pytest.approx(0.75 * parts[0] + 0.25 * parts[1], rel=1e-4)


@pytest.mark.parametrize("place", range(4))
def test_a_batch_without_known_targets_has_no_loss_and_no_gradient(place: int) -> None:
    output, targets = outputs_of_every_kind()[place]
    raw = normal(N, output.width).requires_grad_()
    loss = output.loss(output(raw), torch.full_like(targets, torch.nan if targets.is_floating_point() else UNKNOWN))
    loss.value.backward()  # type: ignore[no-untyped-call]
    assert (float(loss.value), float(loss.weight)) == (0.0, 0.0)
    assert raw.grad is not None
    assert not raw.grad.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by_task": {"size": "bce"}}, "no task 'size'; tasks are class, tags"),
        ({"by_task": {"tags": "mse"}}, "the loss of 'tags' .multi_label. must be one of bce, focal, asymmetric"),
        ({"single_label": "hinge"}, "loss_options.single_label: must be one of cross_entropy"),
        ({"gamma": -1}, "loss_options.gamma"),
    ],
)
def test_options_that_fit_no_task_are_user_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        task_outputs(
            {"class": ["a", "b"], "tags": ["x"]},
            TaskFacts({"tags": "multi_label"}),
            checked(LossOptions, options, "loss_options"),
        )


def test_numbers_that_do_not_vary_or_are_not_described_are_user_errors() -> None:
    with pytest.raises(UserError, match="'price' do not vary"):
        RegressionOutput("price", [3.0, 0.0])
    with pytest.raises(UserError, match="mean and standard deviation of 'price' are missing"):
        RegressionOutput("price", None)
