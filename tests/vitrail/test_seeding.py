from __future__ import annotations

from unittest import mock

import pytest
import torch

from vitrail.seeding import derive_seed, seeded_generator, seeded_rng


def test_the_seed_is_the_same_on_every_machine() -> None:
    # Fixed values: a change would change every run that was ever recorded.
    assert derive_seed(0) == 4761921975702974394
    assert derive_seed("augment", 1, 2, 3) == 3788009916320440256


def test_keys_do_not_run_into_each_other() -> None:
    keys: list[tuple[int | str, ...]] = [
        (1, 23),
        (12, 3),
        (123,),
        ("1", 23),
        (0, 1, 23),
        (-1, 23),
        ("1\0", 23),
        (23, 1),
    ]
    assert len({derive_seed(*key) for key in keys}) == len(keys)


def test_seeds_are_spread_over_63_bits() -> None:
    seeds = [derive_seed(0, epoch, sample) for epoch in range(20) for sample in range(50)]
    assert len(set(seeds)) == 1000
    assert min(seeds) >= 0
    assert max(seeds) < 2**63
    for bit in (0, 20, 40, 62):
        assert 400 < sum(seed >> bit & 1 for seed in seeds) < 600


def test_generators_repeat_themselves() -> None:
    assert torch.rand(3, generator=seeded_generator(1, 2)).equal(torch.rand(3, generator=seeded_generator(1, 2)))
    assert not torch.rand(3, generator=seeded_generator(1, 2)).equal(torch.rand(3, generator=seeded_generator(1, 3)))


def test_the_global_generator_is_seeded_for_the_block_only() -> None:
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    with seeded_rng(1, 2):
        inside = torch.rand(2)
    assert torch.rand(4).equal(expected)
    with seeded_rng(1, 2):
        assert torch.rand(2).equal(inside)


def test_the_global_generator_is_restored_after_an_error_and_accelerators_are_not_reseeded() -> None:
    before = torch.get_rng_state()
    with mock.patch("torch.cuda.manual_seed_all") as reseed, pytest.raises(ZeroDivisionError), seeded_rng(1):
        _ = torch.rand(1) / (1 // 0)
    assert torch.get_rng_state().equal(before)
    reseed.assert_not_called()
