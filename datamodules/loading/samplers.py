"""Which sample comes when, on which process: a function of (seed, epoch), never of what was sampled before.

The samplers yield keys that carry the epoch, so worker processes need no shared state to augment by it. They are
``DistributedSampler`` by type so that Lightning leaves them alone (it would wrap any other and split its share once
more) and calls ``set_epoch``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.utils.data import DistributedSampler

from vitrail.errors import UserError
from vitrail.seeding import seeded_generator
from vitrail.types import UNKNOWN


class SampleKey(NamedTuple):
    """What a sampler asks a data set for.

    Attributes:
        place: place in the data set.
        epoch: epoch that the augmentation depends on.
        is_padding: whether the sample only fills up a process's share and must not be counted.
        draw: how often the sample was sampled before in this epoch, so that repetitions are augmented differently.
    """

    place: int
    epoch: int = 0
    is_padding: bool = False
    draw: int = 0


class TrainSampler(DistributedSampler[SampleKey]):
    """Training order of one process.

    Without weights a permutation of all samples, dealt to the processes in turn; samples from its beginning fill up, so
    that all processes make the same number of steps. With weights, float64 ``(num_samples,)``, as many draws with
    replacement (as torch's ``WeightedRandomSampler``). With ``repeats`` each comes that often in a row, in as much
    fewer images (Hoffer et al., Augment Your Batch, CVPR 2020).

    Attributes:
        order_options: what the order also depends on, for checkpoints.
        start: samples of this process to leave out when it is iterated next, for resuming within an epoch.
    """

    start = 0

    def __init__(
        self,
        num_samples: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        weights: torch.Tensor | None = None,
        repeats: int = 1,
    ) -> None:
        # `range` stands for the data set, of which only the length is asked.
        super().__init__(range(num_samples), num_replicas=world_size, rank=rank, seed=seed)  # type: ignore[arg-type]
        self._size = num_samples
        self._cumulative = None if weights is None else weights.double().cumsum(0)
        self._repeats = repeats
        self.order_options = {"repeats": repeats} if repeats > 1 else {}

    def order(self) -> torch.Tensor:
        """Return the places of all processes' samples in this epoch, int64 ``(per process · world_size,)``."""
        generator = seeded_generator("order", self.seed, self.epoch)
        if self._cumulative is None:
            permutation = torch.randperm(self._size, generator=generator)
            rounds = -(-self.total_size // max(self._size, 1))
            return permutation.repeat_interleave(self._repeats).repeat(rounds)[: self.total_size]
        # Not torch.multinomial, which ends at 2**24 samples.
        draws = -(-self.total_size // self._repeats)
        points = torch.rand(draws, generator=generator, dtype=torch.float64) * self._cumulative[-1]
        places = torch.searchsorted(self._cumulative, points, right=True).clamp_(max=self._size - 1)
        return places.repeat_interleave(self._repeats)[: self.total_size]

    def __iter__(self) -> Iterator[SampleKey]:
        start, self.start = self.start, 0
        order = self.order()
        mine = slice(self.rank + start * self.num_replicas, None, self.num_replicas)
        draws = _occurrence(order)[mine].tolist()
        for place, draw in zip(order[mine].tolist(), draws, strict=True):
            yield SampleKey(place, self.epoch, draw=draw)


class DistinctSampler(DistributedSampler[SampleKey]):
    """Training order in which no batch, over all processes, has two samples that are positives of each other.

    Each batch takes the ids with most samples left, so that as many full batches as possible are made; ties and the
    order within an id are a function of (seed, epoch), and so are the samples that are left out of an epoch when too
    few ids remain. Batches come in random order, or those of the most frequent ids would begin every epoch.

    Args:
        positive_ids: int64 ``(num_samples,)``; samples that share one are never in one batch.
        batch_size: samples of a batch on each process.
        seed: of the order.
        rank: this process.
        world_size: number of processes.

    Attributes:
        start: samples of this process to leave out when it is iterated next, for resuming within an epoch.

    Raises:
        UserError: where there are fewer ids than a batch has samples.
    """

    start = 0

    def __init__(
        self, positive_ids: torch.Tensor, batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        codes = torch.unique(positive_ids, return_inverse=True)[1]
        self._codes = codes
        self._together = batch_size * world_size
        counts = torch.bincount(codes)
        if len(counts) < self._together:
            raise UserError(
                f"data loader.sampling: distinct, but {len(counts)} different classes or captions do not fill a batch "
                f"of {self._together} (all processes together); lower the batch size or use shuffle"
            )
        self.num_batches = _full_batches(counts, self._together)
        size = self.num_batches * self._together
        super().__init__(range(size), num_replicas=world_size, rank=rank, seed=seed)  # type: ignore[arg-type]

    def order(self) -> torch.Tensor:
        """Return the places of all processes' samples in this epoch, int64 ``(batches · batch of all processes,)``."""
        generator = seeded_generator("order", self.seed, self.epoch)
        shuffled = torch.randperm(len(self._codes), generator=generator)
        # The samples of each id stand together, in random order.
        ordered = shuffled[torch.sort(self._codes[shuffled], stable=True).indices]
        left = torch.bincount(self._codes)
        ends = left.cumsum(0)
        batches = []
        for _ in range(self.num_batches):
            tie = torch.rand(len(left), generator=generator, dtype=torch.float64)
            chosen = (left + tie).topk(self._together, sorted=False).indices
            chosen = chosen[torch.randperm(self._together, generator=generator)]
            batches.append(ordered[ends[chosen] - left[chosen]])
            left[chosen] -= 1
        return torch.stack(batches)[torch.randperm(self.num_batches, generator=generator)].flatten()

    def __iter__(self) -> Iterator[SampleKey]:
        start, self.start = self.start, 0
        for place in self.order()[self.rank + start * self.num_replicas :: self.num_replicas].tolist():
            yield SampleKey(place, self.epoch)


class EvalSampler(DistributedSampler[SampleKey]):
    """Evaluation order of one process: every sample once, in order, dealt to the processes batch by batch.

    So batches, and results that depend on a whole batch, such as a contrastive loss, are the same on any number of
    processes. All get the same number of samples; padding is marked, so that metrics count every sample once. ``view``
    is the epoch that samples are augmented for, where they are.
    """

    def __init__(
        self, num_samples: int, rank: int = 0, world_size: int = 1, view: int = 0, batch_size: int = 1
    ) -> None:
        super().__init__(range(num_samples), num_replicas=world_size, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self._size = num_samples
        self._view = view
        self._batch_size = batch_size
        # In the last round only the first process may have a full batch.
        rounds, rest = divmod(num_samples, batch_size * world_size)
        self.num_samples = rounds * batch_size + min(rest, batch_size)
        self.total_size = self.num_samples * world_size

    def __iter__(self) -> Iterator[SampleKey]:
        for number in range(self.num_samples):
            batch, row = divmod(number, self._batch_size)
            place = (batch * self.num_replicas + self.rank) * self._batch_size + row
            yield SampleKey(place % self._size, self._view, is_padding=place >= self._size)


def inverse_frequency_weights(targets: torch.Tensor) -> torch.Tensor:
    """Return sampling weights, float64 ``(N,)``, with which every class of int64 ``(N,)`` targets is equally frequent.

    A sample of unknown class weighs as much as a known one on average: it is sampled as often as without balancing.
    """
    known = targets[targets != UNKNOWN]
    if not len(known):
        return torch.ones(len(targets), dtype=torch.float64)
    counts = torch.bincount(known).double()
    average = (counts > 0).sum() / len(known)
    return torch.where(targets == UNKNOWN, average, 1 / counts[targets.clamp(min=0)])


def _full_batches(counts: torch.Tensor, size: int) -> int:
    """How many batches of different ids can be made: the largest m with sum(min(count, m)) >= m · size."""
    low, high = 0, int(counts.sum()) // size
    while low < high:
        middle = (low + high + 1) // 2
        if int(counts.clamp(max=middle).sum()) >= middle * size:
            low = middle
        else:
            high = middle - 1
    return low


def _occurrence(values: torch.Tensor) -> torch.Tensor:
    """How often each value came before in the sequence, int64."""
    ordered, place = torch.sort(values, stable=True)
    positions = torch.arange(len(values))
    is_first = torch.ones(len(values), dtype=torch.bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    first = torch.where(is_first, positions, 0).cummax(0).values if len(values) else positions
    return torch.empty_like(values).scatter_(0, place, positions - first)
