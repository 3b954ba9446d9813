"""The random numbers of the generated wares.

Only ``Generator.random()`` and the raw words of PCG64 are used: their stream is fixed by the algorithm, while NumPy
reserves the right to change how other distributions are drawn.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Random = np.random.Generator


def stream(*numbers: int) -> Random:
    """A random stream that depends on the numbers (0 or more each) only: the same in every process and platform."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(numbers)))


def pick(rng: Random, count: int) -> int:
    """A number in [0, count)."""
    return min(int(rng.random() * count), count - 1)


def between(rng: Random, low: float, high: float) -> float:
    """A number in [low, high)."""
    return low + (high - low) * float(rng.random())


def noise_bytes(rng: Random, count: int) -> npt.NDArray[np.uint8]:
    """``count`` evenly distributed bytes, straight from the generator."""
    words = rng.bit_generator.random_raw(count // 8 + 1)
    return words.astype("<u8").view(np.uint8)[:count]
