from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight

from datamodules.schema import UNKNOWN, Mix, UserError
from lightning_modules.losses import (
    ClassWeighting,
    TaskLoss,
    class_weights_from_counts,
    masked_cross_entropy,
)

WEIGHTS = torch.tensor([0.5, 1.0, 3.0])


def some_logits(rows: int = 5) -> torch.Tensor:
    return torch.randn(rows, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()


def some_mix() -> Mix:
    return {"partner": torch.tensor([4, 3, 2, 1, 0]), "lam": torch.tensor([0.9, 0.6, 0.5, 0.25, 1.0])}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_the_loss_is_that_of_torch_over_the_known_targets(smoothing: float, weights: torch.Tensor | None) -> None:
    logits, target = some_logits(), torch.tensor([0, 2, UNKNOWN, 1, UNKNOWN])
    known = target != UNKNOWN
    loss = masked_cross_entropy(logits, target, class_weights=weights, label_smoothing=smoothing)
    expected = F.cross_entropy(logits[known], target[known], weights, label_smoothing=smoothing)
    torch.testing.assert_close(loss.value, expected)
    assert loss.weight == (3.0 if weights is None else 4.5)


def test_without_any_known_target_the_loss_is_zero_and_differentiable() -> None:
    logits = some_logits()
    loss = masked_cross_entropy(logits, torch.full((5,), UNKNOWN), class_weights=WEIGHTS, label_smoothing=0.1)
    loss.value.backward()  # type: ignore[no-untyped-call]
    assert loss.value == 0
    assert loss.weight == 0
    assert logits.grad is not None
    assert not logits.grad.any()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_mixed_loss_is_that_of_soft_targets(smoothing: float) -> None:
    logits, target, mix = some_logits(), torch.tensor([0, 2, 2, 1, 0]), some_mix()
    one_hot, lam = F.one_hot(target, 3).float(), mix["lam"][:, None]
    soft = lam * one_hot + (1 - lam) * one_hot[mix["partner"]]
    loss = masked_cross_entropy(logits, target, label_smoothing=smoothing, mix=mix)
    torch.testing.assert_close(loss.value, F.cross_entropy(logits, soft, label_smoothing=smoothing))
    torch.testing.assert_close(loss.weight, torch.tensor(5.0))


def test_of_a_mixed_picture_only_the_known_sides_count() -> None:
    logits, target, mix = some_logits(), torch.tensor([0, UNKNOWN, 2, 1, UNKNOWN]), some_mix()
    rows = F.log_softmax(logits, dim=1).neg()
    total, weight = torch.tensor(0.0), 0.0
    for row, (partner, lam) in enumerate(zip(mix["partner"].tolist(), mix["lam"].tolist(), strict=True)):
        for label, share in ((int(target[row]), lam), (int(target[partner]), 1 - lam)):
            if label != UNKNOWN:
                total, weight = (
                    total + share * WEIGHTS[label] * rows[row, label],
                    weight + share * float(WEIGHTS[label]),
                )
    loss = masked_cross_entropy(logits, target, class_weights=WEIGHTS, mix=mix)
    torch.testing.assert_close(loss.value, total / weight)
    torch.testing.assert_close(loss.weight, torch.tensor(weight))


def test_means_of_unequal_batches_join_to_the_mean_over_all_samples() -> None:
    logits, target = some_logits(7), torch.tensor([0, 1, 2, UNKNOWN, 1, 2, 2])
    parts = [
        masked_cross_entropy(logits[rows], target[rows], class_weights=WEIGHTS) for rows in (slice(4), slice(4, 7))
    ]
    whole = masked_cross_entropy(logits, target, class_weights=WEIGHTS)
    joined = sum(part.value * part.weight for part in parts) / sum(part.weight for part in parts)
    torch.testing.assert_close(joined, whole.value)


def test_inverse_weights_are_those_of_scikit_learn() -> None:
    labels = [0] * 7 + [1] * 2 + [2]
    weights = class_weights_from_counts("class", 3, {"class": [7, 2, 1]}, "inverse")
    assert weights is not None
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    assert weights.tolist() == pytest.approx(expected.tolist())


@pytest.mark.parametrize("scheme", ["inverse", "sqrt_inverse", "effective_number"])
def test_rare_classes_count_more_and_the_mean_over_samples_is_one(scheme: ClassWeighting) -> None:
    counts = torch.tensor([700.0, 20.0, 1.0, 0.0])
    weights = class_weights_from_counts("class", 4, {"class": [700, 20, 1, 0]}, scheme)
    assert weights is not None
    assert weights[0] < weights[1] < weights[2]
    assert weights[3] == 1
    assert float((weights * counts).sum() / counts.sum()) == pytest.approx(1)


def test_no_weights_need_no_counts() -> None:
    assert class_weights_from_counts("class", 3, None, "none") is None


@pytest.mark.parametrize("counts", [None, {}, {"class": [1, 2]}])
def test_counts_that_are_missing_or_do_not_fit_are_a_user_error(counts: dict[str, list[int]] | None) -> None:
    with pytest.raises(UserError, match="class_weighting"):
        class_weights_from_counts("class", 3, counts, "inverse")


def test_an_unknown_scheme_and_smoothing_out_of_range_are_user_errors() -> None:
    with pytest.raises(UserError, match="choose one of"):
        class_weights_from_counts("class", 3, None, "rare")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="label_smoothing"):
        TaskLoss(None, 1.0)


def test_class_weights_are_not_saved() -> None:
    assert not TaskLoss(WEIGHTS, 0.0).state_dict()
