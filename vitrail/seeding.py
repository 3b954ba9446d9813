"""Counter-based randomness: every random number of the data is a function of a key such as (seed, epoch, sample).

So results depend neither on the number of worker processes nor on where a run was interrupted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive_seed(*key: int | str) -> int:
    """Return a seed in [0, 2**63), the BLAKE2b hash of the key; different keys give independent seeds.

    Example:
        >>> derive_seed(42, "augment", 0) == derive_seed(42, "augment", 0) != derive_seed(42, "augment", 1)
        True
    """
    digest = hashlib.blake2b("\0".join(map(repr, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seeded_generator(*key: int | str) -> torch.Generator:
    """Return a new generator that is seeded by the key."""
    import torch

    return torch.Generator().manual_seed(derive_seed(*key))


@contextmanager
def seeded_rng(*key: int | str) -> Iterator[None]:
    """Seed torch's global CPU generator by the key for the block, then restore it.

    For code that takes no generator, such as torchvision's transforms. Only the CPU generator is touched:
    ``torch.manual_seed`` would also reseed every accelerator, and dropout on a GPU would repeat itself where the
    images are augmented in the main process.
    """
    import torch

    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(derive_seed(*key))
    try:
        yield
    finally:
        torch.default_generator.set_state(state)
