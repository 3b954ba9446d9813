"""The samples of a streamed split: their order, a function of (seed, epoch) alone, and reading them in that order.

The shards of a split, in training in an order of the epoch, form one sequence, which is cut into one piece for each
process and that into one for each stream. So all processes have the same number of samples, and but for those at the
cuts each shard is read by one stream, front to back. In training a stream reads several of its shards in turn and
delivers from a bounded buffer. Batch i of a process comes from its stream i mod ``streams``: a loader asks its workers
in turn, so a stream belongs to one worker, and batches are the same for any number of workers.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch.utils.data import DistributedSampler

from datamodules.loading.dataset import ImageDataset, Sample, SampleKey
from datamodules.loading.decode import MAX_PIXELS, UNDECIDED, ImageError, UndecidedRangeError, ValueRange, read_image
from datamodules.streaming.shards import Shards
from vitrail.seeding import seeded_generator

if TYPE_CHECKING:
    from numpy.typing import NDArray


class StreamPart(NamedTuple):
    """What one stream delivers in one epoch; n is the number of its samples.

    Attributes:
        places: int64 ``(n,)``, places in the split in the order in which they are read.
        runs: int64 ``(n,)``, number of the shard that is read there, in the order in which they are begun.
        rounds: int64 ``(n,)``, 0, or more where the sample fills up a process's share and has come before.
        order: int64 ``(n,)``, index into the others in the order in which they are delivered.
    """

    places: NDArray[np.int64]
    runs: NDArray[np.int64]
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
        shuffle_buffer: samples of all streams of a process that are read ahead to sample from; 0 for the split's own
            order in every epoch.
        interleave: shards that each stream reads in turn; 1 for one after another.
    """

    shard_sizes: NDArray[np.int64]
    batch_size: int
    streams: int
    rank: int = 0
    world_size: int = 1
    seed: int = 0
    shuffle_buffer: int = 0
    interleave: int = 1

    @property
    def num_samples(self) -> int:
        """Samples of all processes, each once."""
        return int(self.shard_sizes.sum())

    @property
    def share(self) -> int:
        """Samples of each process; the last one fills up with samples that came before."""
        return -(-self.num_samples // self.world_size)

    def stream_of(self, slot: int) -> tuple[int, int]:
        """Return the stream of a slot of this process's epoch, and the place in what it delivers."""
        batch, inside = divmod(slot, self.batch_size)
        return batch % self.streams, batch // self.streams * self.batch_size + inside

    def length(self, stream: int) -> int:
        """Return the number of samples that a stream delivers in an epoch."""
        full, rest = divmod(self.share, self.batch_size)
        batches = max(0, -(-(full - stream) // self.streams))
        return batches * self.batch_size + (rest if full % self.streams == stream else 0)

    def part(self, epoch: int, stream: int) -> StreamPart:
        """Return what a stream delivers in an epoch."""
        first = self.rank * self.share + sum(self.length(before) for before in range(stream))
        position = np.arange(first, first + self.length(stream), dtype=np.int64)
        rounds, position = np.divmod(position, max(self.num_samples, 1))
        shards = self._shards(epoch)
        ends = np.cumsum(self.shard_sizes[shards])
        which = np.searchsorted(ends, position, side="right")
        starts = np.cumsum(self.shard_sizes) - self.shard_sizes
        places = starts[shards[which]] + position - (ends - self.shard_sizes[shards])[which]
        # A new run begins with another shard, and where the sequence begins again to fill up.
        begins = (np.diff(which, prepend=which[:1]) != 0) | (np.diff(rounds, prepend=rounds[:1]) != 0)
        runs = np.cumsum(begins)
        read = self._reading(runs)
        return StreamPart(places[read], runs[read], rounds[read], self._delivery(epoch, stream, len(read)))

    def _reading(self, runs: NDArray[np.int64]) -> NDArray[np.int64]:
        """Deal the runs to lanes, each of which reads one shard at a time; all advance in step and end together."""
        count = int(runs[-1]) + 1 if len(runs) else 0
        lanes = runs * min(self.interleave, count) // max(count, 1)
        place = np.arange(len(runs)) - np.searchsorted(lanes, lanes)
        return np.argsort((place + 0.5) / np.bincount(lanes)[lanes], kind="stable")

    def _shards(self, epoch: int) -> NDArray[np.int64]:
        count = len(self.shard_sizes)
        if not self.shuffle_buffer:
            return np.arange(count, dtype=np.int64)
        permuted: NDArray[np.int64] = torch.randperm(
            count, generator=seeded_generator("shards", self.seed, epoch)
        ).numpy()
        return permuted

    def _delivery(self, epoch: int, stream: int, count: int) -> NDArray[np.int64]:
        """Each sample moves back by at most a stream's share of the buffer, which bounds what is held."""
        window = self.shuffle_buffer // self.streams
        place = np.arange(count, dtype=np.int64)
        if window <= 1:
            return place
        generator = seeded_generator("stream", self.seed, epoch, self.rank, stream)
        delay = torch.rand(count, generator=generator, dtype=torch.float64).numpy() * window
        return np.argsort(place + delay, kind="stable").astype(np.int64)


class StreamSampler(DistributedSampler[SampleKey]):
    """Yields the slots of one process's epoch in turn; the data set knows the sample of each.

    A ``DistributedSampler`` by type, so that Lightning leaves it alone but sets its epoch. ``view`` is the epoch that
    samples are augmented for, by default the sampler's own.

    Attributes:
        start: samples of this process to leave out when it is iterated next, for resuming within an epoch.
        order_options: what the order also depends on, for checkpoints.
    """

    start = 0

    def __init__(self, order: StreamOrder, view: int | None = None) -> None:
        super().__init__(range(order.num_samples), order.world_size, order.rank)  # type: ignore[arg-type]
        self._view = view
        self.order_options = {
            "streams": order.streams,
            "shuffle_buffer": order.shuffle_buffer,
            "shards": len(order.shard_sizes),
            "interleave": order.interleave,
        }

    def __iter__(self) -> Iterator[SampleKey]:
        start, self.start = self.start, 0
        for slot in range(start, len(self)):
            yield SampleKey(slot, self.epoch if self._view is None else self._view)


OnBad = Literal["error", "replace", "leave_out"]
"""What becomes of an unreadable image: an error, another image of its batch, or a row that is not counted."""


class Cursor:
    """A place in what one stream delivers in one epoch, and the images that were read ahead.

    Args:
        shards: to read from.
        indices: int64 ``(samples of the split,)``, rows of the table.
        part: what the stream delivers.
        next_place: where to begin; what comes before is not read.
    """

    def __init__(self, shards: Shards, indices: NDArray[np.int64], part: StreamPart, next_place: int) -> None:
        self.next_place = next_place
        self.held: dict[int, bytes] = {}
        self._part = part
        self._fetched = self._fetch(shards, indices[part.places])

    def take(self) -> bytes:
        """Return the next encoded image."""
        place = int(self._part.order[self.next_place])
        while place not in self.held:
            fetched, content = next(self._fetched)
            self.held[fetched] = content
        self.next_place += 1
        if self.next_place == len(self._part.order):
            self.close()
        return self.held.pop(place)

    def close(self) -> None:
        """Close the shards that are being read."""
        self._fetched.close()

    def _fetch(self, shards: Shards, rows: NDArray[np.int64]) -> Generator[tuple[int, bytes], None, None]:
        """Places of the stream and their images, in the order of reading, without those already delivered."""
        due = np.ones(len(rows), dtype=bool)
        due[self._part.order[: self.next_place]] = False
        places = np.flatnonzero(due)
        runs = self._part.runs[places]
        by_run = np.argsort(runs, kind="stable")
        ends = np.cumsum(np.bincount(runs))
        opened: dict[int, Generator[bytes, None, None]] = {}
        left: dict[int, int] = {}
        try:
            for place, run in zip(places, map(int, runs), strict=True):
                if run not in opened:
                    here = places[by_run[ends[run - 1] if run else 0 : ends[run]]]
                    opened[run], left[run] = shards.read(rows[here]), len(here)
                yield int(place), next(opened[run])
                left[run] -= 1
                if not left[run]:
                    opened.pop(run).close()
        finally:
            for images in opened.values():
                images.close()


class StreamedDataset(ImageDataset):
    """Samples by their slot in one process's epoch; each worker reads the streams that it is asked for.

    Slots should be asked for in turn. Where one is skipped or asked for again, its stream moves there without reading
    the images in between.

    Args:
        indices: int64 ``(n,)``, rows of the table, ascending.
        shards: where the images are.
        order: of the samples.
        transform: see ``ImageDataset``, as for ``seed`` and ``caption_numbers``.
        size: side of the transformed images.
        seed: of the augmentation.
        caption_numbers: of the samples.
        on_bad: what becomes of an unreadable image.
        journal: file to which unreadable images are added, one JSON object a line.
        value_range: as of ``images.read_image``.
        max_pixels: likewise.
    """

    def __init__(
        self,
        indices: NDArray[np.int64],
        shards: Shards,
        order: StreamOrder,
        transform: Callable[[torch.Tensor], torch.Tensor],
        size: int,
        seed: int = 0,
        caption_numbers: NDArray[np.int64] | None = None,
        on_bad: OnBad = "error",
        journal: Path | None = None,
        value_range: ValueRange = UNDECIDED,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        read = partial(shards.image, value_range=value_range, max_pixels=max_pixels)
        super().__init__(indices, read, transform, seed, caption_numbers)
        self._value_range, self._max_pixels = value_range, max_pixels
        self._shards = shards
        self.order = order
        self._size = size
        self._on_bad = on_bad
        self._journal = journal
        self._noted: set[int] = set()
        self._parts: dict[int, tuple[int, StreamPart]] = {}
        self._cursors: dict[int, tuple[int, Cursor]] = {}

    @property
    def buffered(self) -> int:
        """Number of encoded images in the buffers."""
        return sum(len(cursor.held) for _, cursor in self._cursors.values())

    def __getitem__(self, key: SampleKey | int) -> Sample:
        """Return the sample at a slot; a plain number means epoch 0."""
        if isinstance(key, int) and not 0 <= key < self.order.share:
            raise IndexError(key)  # ends `for sample in dataset`
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[SampleKey | int]) -> list[Sample]:
        """Return the samples of a batch; torch's loader asks for them together."""
        samples = [self.without_image(key) for key in keys]
        for key, sample in zip(keys, samples, strict=True):
            row = sample["sample_id"]
            content = self._take(key if isinstance(key, SampleKey) else SampleKey(key))
            try:
                image = read_image(content, self._shards.label(row), self._value_range, self._max_pixels)
            except UndecidedRangeError:
                raise  # all images of this kind have it, so leaving them out would leave out a part of the set
            except ImageError as error:
                self._note(row, error)
                continue
            sample["image"] = self.transformed(image, sample)
        return self._without_bad(samples)

    def without_image(self, key: SampleKey | int) -> Sample:
        """Return the sample at a slot without reading its image."""
        slot, epoch, is_padding, draw = key if isinstance(key, SampleKey) else SampleKey(key)
        stream, place = self.order.stream_of(slot)
        part = self._part(epoch, stream)
        at = int(part.order[place])
        rounds = int(part.rounds[at])
        # What fills up is padding in evaluation; in training it is another sample, augmented differently.
        training = bool(self.order.shuffle_buffer)
        is_padding = is_padding or (rounds > 0 and not training)
        return super().without_image(
            SampleKey(int(part.places[at]), epoch, is_padding, draw + (rounds if training else 0))
        )

    def _take(self, key: SampleKey) -> bytes:
        stream, place = self.order.stream_of(key.place)
        epoch = self._order_epoch(key.epoch)
        known = self._cursors.get(stream)
        if known is None or known[0] != epoch or known[1].next_place != place:
            if known is not None:
                known[1].close()
            cursor = Cursor(self._shards, self.indices, self._part(epoch, stream), place)
            self._cursors[stream] = (epoch, cursor)
        return self._cursors[stream][1].take()

    def _part(self, epoch: int, stream: int) -> StreamPart:
        epoch = self._order_epoch(epoch)
        if stream not in self._parts or self._parts[stream][0] != epoch:
            self._parts[stream] = (epoch, self.order.part(epoch, stream))
        return self._parts[stream][1]

    def _order_epoch(self, epoch: int) -> int:
        """The epoch that the order depends on; without shuffling it is always the same."""
        return epoch if self.order.shuffle_buffer else 0

    def _note(self, row: int, error: ImageError) -> None:
        if self._on_bad == "error":
            raise ImageError(f"{error}, or set data checks.on_bad_image: skip") from error
        if row in self._noted:
            return
        self._noted.add(row)
        warnings.warn(f"left out: {error}", stacklevel=2)
        if self._journal is not None:
            line = json.dumps({"row": row, "name": self._shards.images["key"][row].as_py(), "reason": str(error)})
            # Another machine need not have the run directory.
            self._journal.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered, so that lines stay whole where several workers append at the same time.
            with self._journal.open("ab", buffering=0) as file:
                file.write(f"{line}\n".encode())

    def _without_bad(self, samples: list[Sample]) -> list[Sample]:
        """The same number of samples, each with an image, as a function of the batch alone."""
        good = [sample for sample in samples if "image" in sample]
        if len(good) == len(samples):
            return samples
        if self._on_bad == "leave_out":
            for sample in samples:
                if "image" not in sample:
                    # A blank image in a row that is not counted.
                    sample["image"] = torch.zeros(3, self._size, self._size, dtype=torch.uint8)
                    sample["is_padding"] = True
            return samples
        if not good:
            names = self._shards.label(samples[0]["sample_id"])
            raise ImageError(f"{names}: no image of its batch can be read; repair the shard")
        bad = len(samples) - len(good)
        return [*good, *(good[place % len(good)] for place in range(bad))]

    def __getstate__(self) -> dict[str, Any]:
        # Each worker opens the shards itself.
        return {**self.__dict__, "_cursors": {}}
