from __future__ import annotations

import pytest
import torch
from scipy import stats

from datamodules.loading.transforms import mix_batch


def batch(size: int = 6, side: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8, generator=generator)


def test_mixup_is_the_weighted_mean() -> None:
    images = batch()
    mixed, mix = mix_batch(images, (0, 1, 2), mixup=1.0, cutmix=0.0)
    assert mix is not None
    assert mixed.dtype == torch.uint8
    assert mix["lam"].dtype == torch.float32
    assert mix["partner"].dtype == torch.int64
    lam = mix["lam"].view(-1, 1, 1, 1)
    expected = lam * images.float() + (1 - lam) * images[mix["partner"]].float()
    assert (mixed.float() - expected).abs().max() <= 0.5
    assert sorted(mix["partner"].tolist()) == list(range(6))


def test_mixup_keeps_extreme_values() -> None:
    images = torch.stack([torch.full((3, 4, 4), 255, dtype=torch.uint8), torch.zeros(3, 4, 4, dtype=torch.uint8)])
    for key in range(40):
        mixed, mix = mix_batch(images, (key,), mixup=0.5, cutmix=0.0)
        assert mix is not None
        for row in range(2):
            other = int(mix["partner"][row])
            share = float(mix["lam"][row])
            expected = share * float(images[row, 0, 0, 0]) + (1 - share) * float(images[other, 0, 0, 0])
            value = int(mixed[row, 0, 0, 0])
            assert value == pytest.approx(expected, abs=0.51)
            assert (mixed[row] == value).all()


def test_cutmix_pastes_a_box_and_tells_the_share_that_is_left() -> None:
    side = 24
    images = torch.arange(8, dtype=torch.uint8).view(8, 1, 1, 1).expand(8, 3, side, side).contiguous()
    shares = []
    for key in range(60):
        mixed, mix = mix_batch(images, (key,), mixup=0.0, cutmix=1.0)
        assert mix is not None
        for row in range(8):
            own = mixed[row, 0] == row
            if mix["partner"][row] != row:
                assert float(own.double().mean()) == pytest.approx(float(mix["lam"][row]), abs=1e-6)
                assert (mixed[row, 0][~own] == mix["partner"][row]).all()
                rows, columns = torch.where(~own)
                if len(rows):
                    area = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
                    assert int(area) == len(rows), "what was pasted is one box"
            assert (mixed[row] == mixed[row, :1]).all(), "all channels alike"
        shares.append(float(mix["lam"][0]))
    assert len(set(shares)) > 40
    # The share is drawn evenly for alpha 1 and can only grow where the box is clipped.
    assert 0.5 < sum(shares) / len(shares) < 0.85


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_mixups_share_is_beta_distributed(alpha: float) -> None:
    images = torch.zeros(2, 3, 1, 1, dtype=torch.uint8)
    shares = []
    for key in range(400):
        _, mix = mix_batch(images, (key,), mixup=alpha, cutmix=0.0)
        assert mix is not None
        shares.append(float(mix["lam"][0]))
    # In steps of 1/128, so compare the distribution functions with half a step of room.
    grid = [0.1, 0.3, 0.5, 0.7, 0.9]
    for point in grid:
        below = sum(share < point for share in shares) / len(shares)
        assert below == pytest.approx(stats.beta(alpha, alpha).cdf(point), abs=0.09)


def test_both_are_used_with_equal_chance() -> None:
    images = torch.arange(4, dtype=torch.uint8).mul(60).view(4, 1, 1, 1).expand(4, 3, 8, 8).contiguous()
    blended = 0
    for key in range(200):
        mixed, mix = mix_batch(images, (key,), mixup=5.0, cutmix=5.0)
        assert mix is not None
        blended += not bool(torch.isin(mixed, images).all())
    assert 70 < blended < 130


def test_mixing_is_a_function_of_its_key_alone() -> None:
    images = batch()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, mix = mix_batch(images, (0, 1, 2), mixup=0.4, cutmix=1.0)
    assert torch.get_rng_state().equal(state)
    torch.manual_seed(1)
    again, same = mix_batch(images, (0, 1, 2), mixup=0.4, cutmix=1.0)
    assert first.equal(again)
    assert mix is not None
    assert same is not None
    assert mix["partner"].equal(same["partner"])
    assert mix["lam"].equal(same["lam"])
    other, _ = mix_batch(images, (0, 2, 2), mixup=0.4, cutmix=1.0)
    assert not first.equal(other)


def test_the_batch_given_is_left_as_it_was() -> None:
    images = batch()
    before = images.clone()
    mix_batch(images, (3,), mixup=1.0, cutmix=0.0)
    mix_batch(images, (3,), mixup=0.0, cutmix=1.0)
    assert images.equal(before)


def test_a_single_image_and_alpha_zero_are_not_mixed() -> None:
    images = batch(1)
    assert mix_batch(images, (0,), mixup=1.0, cutmix=1.0) == (images, None)
    images = batch(4)
    assert mix_batch(images, (0,), mixup=0.0, cutmix=0.0) == (images, None)
