"""Which sample of a streamed set comes when and where: a function of (seed, epoch), computed without reading anything.

The shards of a split stand one after another, in training in an order of the epoch. This sequence is cut into one
piece for each process and that into one for each stream, so that every sample belongs to one stream, all processes
have the same number, and but for the few shards at the cuts each shard is read by one stream alone, front to back.
Batch i of a process is made by its stream i mod ``streams``: a loader asks its workers in turn, so that a stream
belongs to one worker, and the batches are the same for any number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch.utils.data import DistributedSampler

from datamodules.samplers import SampleKey
from vitrail.seeding import counted_generator

if TYPE_CHECKING:
    from numpy.typing import NDArray


class StreamPart(NamedTuple):
    """What one stream delivers in one epoch; n is the number of its samples.

    Attributes:
        places: int64 ``(n,)``, places in the split in the order in which they are read.
        rounds: int64 ``(n,)``, 0, or more where the sample fills up a process's share and has come before.
        order: int64 ``(n,)``, index into the two others in the order in which they are delivered.
    """

    places: NDArray[np.int64]
    rounds: NDArray[np.int64]
    order: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class StreamOrder:
    """The order of one split on one process.

    Attributes:
        shard_sizes: int64 ``(shards,)``, samples of the split in each of its shards.
        batch_size: samples of a batch on each process.
        streams: parts of a process's share that are read side by side.
        rank: this process.
        world_size: number of processes.
        seed: of the order.
        shuffle_buffer: samples of all streams of a process that are read ahead to draw from; 0 for the split's own
            order in every epoch.
    """

    shard_sizes: NDArray[np.int64]
    batch_size: int
    streams: int
    rank: int = 0
    world_size: int = 1
    seed: int = 0
    shuffle_buffer: int = 0

    @property
    def num_samples(self) -> int:
        """Samples of all processes, each once."""
        return int(self.shard_sizes.sum())

    @property
    def share(self) -> int:
        """Samples of each process; the last ones fill up with such as have come before."""
        return -(-self.num_samples // self.world_size)

    def stream_of(self, slot: int) -> tuple[int, int]:
        """Stream and place in what it delivers of the sample at a slot of this process's epoch."""
        batch, inside = divmod(slot, self.batch_size)
        return batch % self.streams, batch // self.streams * self.batch_size + inside

    def length(self, stream: int) -> int:
        """Samples that a stream delivers in an epoch."""
        full, rest = divmod(self.share, self.batch_size)
        batches = max(0, -(-(full - stream) // self.streams))
        return batches * self.batch_size + (rest if full % self.streams == stream else 0)

    def part(self, epoch: int, stream: int) -> StreamPart:
        """What a stream delivers in an epoch."""
        first = self.rank * self.share + sum(self.length(before) for before in range(stream))
        position = np.arange(first, first + self.length(stream), dtype=np.int64)
        rounds, position = np.divmod(position, max(self.num_samples, 1))
        shards = self._shards(epoch)
        ends = np.cumsum(self.shard_sizes[shards])
        which = np.searchsorted(ends, position, side="right")
        starts = np.cumsum(self.shard_sizes) - self.shard_sizes
        inside = position - (ends - self.shard_sizes[shards])[which]
        return StreamPart(starts[shards[which]] + inside, rounds, self._delivery(epoch, stream, len(position)))

    def _shards(self, epoch: int) -> NDArray[np.int64]:
        count = len(self.shard_sizes)
        if not self.shuffle_buffer:
            return np.arange(count, dtype=np.int64)
        permuted: NDArray[np.int64] = torch.randperm(
            count, generator=counted_generator("shards", self.seed, epoch)
        ).numpy()
        return permuted

    def _delivery(self, epoch: int, stream: int, count: int) -> NDArray[np.int64]:
        """Each sample moves back by at most a stream's share of the buffer, which so never holds more."""
        window = self.shuffle_buffer // self.streams
        place = np.arange(count, dtype=np.int64)
        if window <= 1:
            return place
        generator = counted_generator("stream", self.seed, epoch, self.rank, stream)
        delay = torch.rand(count, generator=generator, dtype=torch.float64).numpy() * window
        return np.argsort(place + delay, kind="stable").astype(np.int64)


class StreamSampler(DistributedSampler[SampleKey]):
    """Asks for the slots of one process's epoch in turn; the data set knows which sample stands where.

    A ``DistributedSampler`` by type, so that Lightning leaves it alone and tells it the epoch.

    Args:
        order: of the split on this process.
        view: epoch that the samples are augmented for, where it is not the sampler's own.

    Attributes:
        start: samples of this process to leave out when it is iterated next, for resuming within an epoch.
        order_options: on what else the order depends, for checkpoints.
    """

    start = 0

    def __init__(self, order: StreamOrder, view: int | None = None) -> None:
        super().__init__(range(order.num_samples), order.world_size, order.rank)  # type: ignore[arg-type]
        self._view = view
        self.order_options = {
            "streams": order.streams,
            "shuffle_buffer": order.shuffle_buffer,
            "shards": len(order.shard_sizes),
        }

    def __iter__(self) -> Iterator[SampleKey]:
        start, self.start = self.start, 0
        for slot in range(start, len(self)):
            yield SampleKey(slot, self.epoch if self._view is None else self._view)
