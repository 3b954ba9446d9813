"""Randomness that is counted, not drawn: a seed for each (seed, epoch, sample), whoever asks and whenever.

Whatever is random in the data is a function of such a key, so results depend neither on the number of worker
processes nor on where a run was interrupted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive_seed(*key: int | str) -> int:
    """A seed in [0, 2**63) that is a hash (BLAKE2b) of the key; different keys give independent seeds."""
    digest = hashlib.blake2b("\0".join(map(repr, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seeded_generator(*key: int | str) -> torch.Generator:
    """A generator of its own, seeded by the key."""
    return torch.Generator().manual_seed(derive_seed(*key))


@contextmanager
def seeded_rng(*key: int | str) -> Iterator[None]:
    """Seeds torch's global CPU generator by the key for the block, and then puts it back.

    For code that takes no generator, as torchvision's transforms. Only the CPU generator is touched:
    ``torch.manual_seed`` would also reseed every accelerator, and dropout on a GPU would repeat itself where the
    images are augmented in the main process.
    """
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(derive_seed(*key))
    try:
        yield
    finally:
        torch.default_generator.set_state(state)
