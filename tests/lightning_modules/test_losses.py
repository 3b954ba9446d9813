from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight

from lightning_modules.losses import (
    ClassWeighting,
    Pairs,
    TaskLoss,
    class_weights_from_counts,
    info_nce,
    label_aware_info_nce,
    masked_cross_entropy,
    sigmoid_contrastive,
)
from vitrail.errors import UserError
from vitrail.types import UNKNOWN, Mix

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


def test_of_a_mixed_image_only_the_known_sides_count() -> None:
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


def some_pairs(rows: int = 7, ids: list[int] | None = None, *, dtype: torch.dtype = torch.float64) -> Pairs:
    generator = torch.Generator().manual_seed(1)
    image, text = (F.normalize(torch.randn(rows, 5, generator=generator, dtype=dtype), dim=-1) for _ in range(2))
    positive_id = torch.tensor(ids) if ids else torch.arange(rows)
    return Pairs(image.requires_grad_(), text.requires_grad_(), positive_id)


def test_info_nce_is_that_of_open_clip_and_of_transformers() -> None:
    from open_clip.loss import ClipLoss
    from transformers.models.clip.modeling_clip import image_text_contrastive_loss

    pairs, scale = some_pairs(dtype=torch.float32), torch.tensor(20.0)
    ours = info_nce(pairs, scale)
    assert float(ours) == pytest.approx(float(ClipLoss()(pairs.image, pairs.text, scale)), abs=1e-6)
    assert float(ours) == pytest.approx(
        float(image_text_contrastive_loss(scale * pairs.text @ pairs.image.T)), abs=1e-6
    )


def test_the_sigmoid_loss_is_that_of_open_clip() -> None:
    from open_clip.loss import SigLipLoss

    pairs, scale, bias = some_pairs(dtype=torch.float32), torch.tensor(10.0), torch.tensor(-10.0)
    peer = SigLipLoss()(pairs.image, pairs.text, scale, bias)
    assert float(sigmoid_contrastive(pairs, scale, bias)) == pytest.approx(float(peer), abs=1e-6)


def test_without_repeated_ids_the_label_aware_loss_is_the_plain_one() -> None:
    pairs, scale = some_pairs(), torch.tensor(20.0)
    torch.testing.assert_close(label_aware_info_nce(pairs, scale), info_nce(pairs, scale))


def test_the_label_aware_loss_averages_over_all_positives() -> None:
    pairs, scale = some_pairs(5, [3, 8, 3, 3, 8]), torch.tensor(4.0)
    expected = 0.0
    for one, other in ((pairs.image, pairs.text), (pairs.text, pairs.image)):
        log_share = np.log(np.exp(4.0 * (one @ other.T).detach().numpy()))
        log_share = log_share - np.log(np.exp(log_share).sum(axis=1, keepdims=True))
        for row, positives in enumerate(([0, 2, 3], [1, 4], [0, 2, 3], [0, 2, 3], [1, 4])):
            expected -= log_share[row, positives].mean() / 10
    assert float(label_aware_info_nce(pairs, scale)) == pytest.approx(expected)


def test_equal_captions_do_not_pull_the_label_aware_loss_apart() -> None:
    """Two images of one class with the same prompt: the plain loss cannot be satisfied, this one's gradient is 0."""
    vectors = torch.eye(2, dtype=torch.float64)[[0, 0, 1]].requires_grad_()
    pairs = Pairs(vectors, vectors, torch.tensor([0, 0, 1]))
    scale = torch.tensor(1000.0)
    aware, plain = label_aware_info_nce(pairs, scale), info_nce(pairs, scale)
    assert float(aware) == pytest.approx(2 / 3 * np.log(2))  # its floor, the logarithm of two positives
    assert float(plain) == pytest.approx(float(aware))
    # Break the tie between the two: the plain loss changes at once, at its floor the other has nothing to gain.
    [gradient] = torch.autograd.grad(aware, vectors)
    assert float(gradient.abs().max()) < 1e-9


def test_pairs_that_share_an_id_are_positives_of_the_sigmoid_loss() -> None:
    pairs = some_pairs(4, [0, 1, 0, 2])
    logits = (5.0 * pairs.image @ pairs.text.T - 1.0).detach().numpy()
    sign = np.where(np.equal.outer([0, 1, 0, 2], [0, 1, 0, 2]), 1, -1)
    expected = np.log1p(np.exp(-sign * logits)).sum() / 4
    assert float(sigmoid_contrastive(pairs, torch.tensor(5.0), torch.tensor(-1.0))) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["info_nce", "label_aware", "sigmoid"])
def test_the_mean_over_shares_is_the_loss_of_the_joined_pairs(name: str) -> None:
    pairs, scale, bias = some_pairs(6, [0, 1, 2, 0, 1, 3]), torch.tensor(3.0), torch.tensor(-2.0)

    def loss(own: Pairs, first: int) -> torch.Tensor:
        if name == "info_nce":
            return info_nce(own, scale, pool=pairs, first=first)
        if name == "sigmoid":
            return sigmoid_contrastive(own, scale, bias, pool=pairs)
        return label_aware_info_nce(own, scale, pool=pairs)

    shares = [loss(Pairs(*(rows[start : start + 2] for rows in pairs)), start) for start in (0, 2, 4)]
    torch.testing.assert_close(torch.stack(shares).mean(), loss(pairs, 0))


def test_with_the_fixed_scale_of_the_reference_the_loss_cannot_fall_below_its_floor() -> None:
    """The Mini-CLIP of the reference multiplied cosines by e and could not get below about 2.2 with 128 pairs.

    The best that 128 pairs can do is a simplex: equal to their own text, at -1/127 to every other.
    """
    floor = float(np.log(1 + 127 * np.exp(-np.e * (1 + 1 / 127))))
    assert floor == pytest.approx(2.20, abs=0.03)
    simplex = F.normalize(torch.eye(128, dtype=torch.float64) - 1 / 128, dim=-1)
    scale = torch.tensor(np.e)
    assert float(info_nce(Pairs(simplex, simplex, torch.arange(128)), scale)) == pytest.approx(floor)
    # And nothing near it is better: whoever optimises the embeddings freely ends there.
    free = (simplex + 0.01 * torch.randn(128, 128, generator=torch.Generator().manual_seed(0))).requires_grad_()
    optimizer = torch.optim.Adam([free], lr=1e-3)
    for _ in range(50):
        unit = F.normalize(free, dim=-1)
        loss = info_nce(Pairs(unit, unit, torch.arange(128)), scale)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert floor <= float(loss) < floor + 0.01
