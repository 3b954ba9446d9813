"""From keys to batches: the map-style data set, its collation, and a loader that can be resumed.

Images are read, augmented and collated in the worker process; everything else of a batch is looked up in the table's
columns when a batch is collated.

Which sample comes when, on which process: a function of (seed, epoch), never of what was sampled before.

The samplers yield keys that carry the epoch, so worker processes need no shared state to augment by it. They are
``DistributedSampler`` by type so that Lightning leaves them alone (it would wrap any other and split its share once
more) and calls ``set_epoch``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NotRequired, TypedDict

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, default_collate, get_worker_info

from datamodules.captions import Texts
from datamodules.loading.transforms import SizedByEpoch, mix_batch
from datamodules.options import AugmentOptions, LoaderOptions
from datamodules.table import SampleTable
from vitrail.errors import UserError
from vitrail.seeding import seeded_generator, seeded_rng
from vitrail.types import LABEL_TASK, UNKNOWN, Batch, FeatureLookup

if TYPE_CHECKING:
    from numpy.typing import NDArray


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


_LARGE = 1 << 16


def to_be_sent(batch: Any) -> Any:
    """In a worker process, convert tensors of less than 64 KiB, nested in dictionaries, to arrays.

    A tensor that leaves a worker process costs a file of shared memory, a connection and a handshake, about as much as
    decoding a small image; an array travels in the message.
    """

    def small_to_array(value: Any) -> Any:
        is_small = isinstance(value, torch.Tensor) and value.numel() * value.element_size() < _LARGE
        return value.numpy() if is_small else value

    return _mapped(batch, small_to_array) if get_worker_info() is not None else batch


def received(batch: Any) -> Any:
    """Undo ``to_be_sent``."""
    return _mapped(batch, lambda value: torch.from_numpy(value) if isinstance(value, np.ndarray) else value)


def _mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    return {key: _mapped(item, function) for key, item in value.items()} if isinstance(value, dict) else function(value)


class Sample(TypedDict):
    """One sample on its way into a batch.

    Attributes:
        image: uint8 ``(3, size, size)``, RGB; missing where the image was not read.
        sample_id: row of the table.
        epoch: epoch that it was augmented for.
        is_padding: whether it only fills up a process's share.
        draw: how often it was sampled before in this epoch.
        caption_number: which of its captions goes with it, ``captions.RANDOM`` for one that is sampled.
    """

    image: NotRequired[torch.Tensor]
    sample_id: int
    epoch: int
    is_padding: bool
    draw: int
    caption_number: int


class ImageDataset(Dataset[Sample]):
    """Reads and transforms the images of a split; what is random is a function of (seed, epoch, sample id).

    Args:
        indices: int64 ``(n,)``, rows of the table.
        read_image: returns uint8 ``(3, H, W)`` for a row of the table.
        transform: from uint8 ``(3, H, W)`` to uint8 ``(3, size, size)``; may use torch's global generator.
        seed: of the augmentation.
        caption_numbers: int64 ``(n,)``, which caption goes with each place; the first by default.
    """

    def __init__(
        self,
        indices: NDArray[np.int64],
        read_image: Callable[[int], torch.Tensor],
        transform: Callable[[torch.Tensor], torch.Tensor],
        seed: int = 0,
        caption_numbers: NDArray[np.int64] | None = None,
    ) -> None:
        self.indices = indices
        self.read_image = read_image
        self._caption_numbers = caption_numbers
        self._transform = transform
        self._seed = seed

    def with_captions(self, indices: NDArray[np.int64], caption_numbers: NDArray[np.int64] | None) -> ImageDataset:
        """Return the same images by other indices, with the number of the caption at each place."""
        return ImageDataset(indices, self.read_image, self._transform, self._seed, caption_numbers)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: SampleKey | int) -> Sample:
        """Return the sample at a place of the split; a plain number means epoch 0."""
        sample = self.without_image(key)
        sample["image"] = self.transformed(self.read_image(sample["sample_id"]), sample)
        return sample

    def transformed(self, image: torch.Tensor, sample: Sample) -> torch.Tensor:
        """Return the image of a sample, uint8 ``(3, H, W)``, as it goes into a batch."""
        epoch = sample["epoch"]
        transform = self._transform.at(epoch) if isinstance(self._transform, SizedByEpoch) else self._transform
        with seeded_rng("augment", self._seed, epoch, sample["sample_id"], view_of(sample) - epoch):
            return transform(image)

    def without_image(self, key: SampleKey | int) -> Sample:
        """Return the sample at a place of the split without reading its image."""
        place, epoch, is_padding, draw = key if isinstance(key, SampleKey) else SampleKey(key)
        if not -len(self) <= place < len(self):
            raise IndexError(place)  # ends `for sample in dataset`
        return {
            "sample_id": int(self.indices[place]),
            "epoch": epoch,
            "is_padding": is_padding,
            "draw": draw,
            "caption_number": 0 if self._caption_numbers is None else int(self._caption_numbers[place]),
        }


def stack_images(images: Sequence[torch.Tensor]) -> torch.Tensor:
    """Stack images, uint8 ``(3, H, W)`` in any layout, to ``(B, 3, H, W)`` in the layout ``torch.channels_last``.

    In a worker process the batch is in shared memory, so that it is not copied again.
    """
    batch: torch.Tensor = default_collate([image.permute(1, 2, 0) for image in images])
    return batch.permute(0, 3, 1, 2)


def view_of(sample: Sample) -> int:
    """Return the number of a sample's augmentation, which changes with the epoch, repetition and caption."""
    return sample["epoch"] + sample["draw"] + max(sample["caption_number"], 0)


class Collate:
    """Collates samples to a batch and, in training, mixes it.

    Args:
        table: where targets and groups are looked up.
        seed: of the mixing.
        texts: where captions are looked up; by default those of the table.
        augment: how batches are mixed; not by default.
        evaluation: whether batches have every caption of an image.
    """

    def __init__(
        self,
        table: SampleTable,
        seed: int = 0,
        *,
        texts: Texts | None = None,
        augment: AugmentOptions | None = None,
        evaluation: bool = False,
    ) -> None:
        self._table = table
        self._seed = seed
        self._texts = texts or Texts(table, seed=seed)
        self._augment = (augment or AugmentOptions()).filled()
        self._evaluation = evaluation

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Return the batch of some samples."""
        ids = [sample["sample_id"] for sample in samples]
        table = self._table
        targets = {task: torch.from_numpy(values[ids]) for task, values in table.targets.items()}
        batch: Batch = {
            "positive_id": torch.from_numpy(self._texts.positive_ids[ids]),
            "sample_id": torch.tensor(ids),
            "group_id": torch.from_numpy(table.group_ids[ids]),
            "is_padding": torch.tensor([sample["is_padding"] for sample in samples]),
        }
        if "image" in samples[0]:
            batch["image"] = stack_images([sample["image"] for sample in samples])
        if LABEL_TASK in targets:
            batch["label"] = targets.pop(LABEL_TASK)
        batch["attributes"] = targets
        self._add_captions(batch, samples, ids)
        self._mix(batch, samples[0]["epoch"], ids[0])
        sent: Batch = to_be_sent(batch)
        return sent

    def _mix(self, batch: Batch, epoch: int, first: int) -> None:
        augment = self._augment
        mixup, cutmix = augment.mixup or 0.0, augment.cutmix or 0.0
        if not (mixup or cutmix) or (augment.mix_end_epoch and epoch >= augment.mix_end_epoch):
            return
        batch["image"], mix = mix_batch(
            batch["image"],
            (self._seed, epoch, first),
            mixup=mixup,
            cutmix=cutmix,
            probability=augment.mix_probability,
            switch=augment.mix_switch,
            later=augment.mix_on_device,
        )
        if mix is not None:
            batch["mix"] = mix

    def _add_captions(self, batch: Batch, samples: Sequence[Sample], ids: Sequence[int]) -> None:
        if self._evaluation:
            captions = self._texts.evaluation(ids)
            batch["caption"] = [texts[0] for texts in captions]
            if self._texts.own:
                # One without any is found, but asks nothing.
                batch["captions"] = [[text for text in texts if text.strip()] for texts in captions]
        else:
            batch["caption"] = self._texts.training(
                ids,
                numbers=[sample["caption_number"] for sample in samples],
                epochs=[sample["epoch"] for sample in samples],
                draws=[sample["draw"] for sample in samples],
            )


class CountedLoader(DataLoader[Sample]):
    """A loader that begins when the first batch is asked for, and can be resumed in the middle of an epoch.

    Lightning makes the first iterator before it sets the sampler's epoch, and worker processes prefetch at once: after
    a resume they would fetch the first epoch's samples. Lightning resumes by ``state_dict`` and ``load_state_dict``:
    the batches that were already delivered are skipped without being read.
    """

    features: FeatureLookup | None = None
    """Where set, batches have features instead of images, and no image is read."""

    pending: int = 0
    """Batches that were delivered and do not count in ``state_dict``, because they were not used yet."""

    # On the class and not in a constructor: Lightning rebuilds loaders from DataLoader's own arguments.
    _delivered: int = 0
    _resume: dict[str, int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # a generator, so that it begins late
        self._delivered = self._batches_to_skip()
        if self._delivered:
            self.sampler.start = self._delivered * self._samples_per_batch  # type: ignore[attr-defined]
        try:
            for batch in super().__iter__() if self.features is None else self._from_features(self.features):
                self._delivered += 1
                yield received(batch)
        except UserError as error:
            # From a worker it comes with the worker's traceback; the last line is what the user needs.
            name = type(error).__name__
            # With the last reference to their iterator the workers end. The frames of the error hold one more, and
            # what only the garbage collector finds waits five seconds for each worker.
            self._iterator = None
            raise UserError(str(error).rsplit(f"{name}: ", 1)[-1].strip()) from error.with_traceback(None)

    def _from_features(self, lookup: FeatureLookup) -> Iterator[Batch]:
        dataset: ImageDataset = self.dataset  # type: ignore[assignment]  # the only kind that these loaders are made of
        for keys in self.batch_sampler or ():
            samples = [dataset.without_image(key) for key in keys]
            batch: Batch = self.collate_fn(samples)
            view = torch.tensor([view_of(sample) for sample in samples])
            batch["features"] = {"image": lookup(batch["sample_id"], view)}
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return epoch, layout and number of delivered batches of this process."""
        return {**self._layout(), "batches": self._delivered - self.pending}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue after the delivered batches, if the same epoch is begun again."""
        self._resume = dict(state_dict)

    @property
    def _samples_per_batch(self) -> int:
        return self.batch_size or 1

    def _layout(self) -> dict[str, int]:
        return {
            "epoch": getattr(self.sampler, "epoch", 0),
            "batch_size": self._samples_per_batch,
            "processes": getattr(self.sampler, "num_replicas", 1),
            "samples": len(self.sampler),  # type: ignore[arg-type]
            **getattr(self.sampler, "order_options", {}),
        }

    def _batches_to_skip(self) -> int:
        state, self._resume = self._resume, None
        layout = self._layout()
        if state is None or state["epoch"] != layout["epoch"] or state["batches"] >= len(self):
            return 0
        for key in layout | {key: 0 for key in state if key != "batches"}:
            if (then := state.get(key)) != (value := layout.get(key)):
                raise UserError(
                    f"the checkpoint was written in the middle of epoch {state['epoch']} with {key} {then}, now "
                    f"{value}; resume with the same, or from a checkpoint of an epoch's end"
                )
        return state["batches"]


def make_loader(
    dataset: ImageDataset,
    sampler: DistributedSampler[SampleKey],
    collate: Collate,
    options: LoaderOptions,
    workers: int,
    *,
    training: bool,
) -> CountedLoader:
    """Return batches of a data set, read by worker processes or, where there are none, by this one.

    Raises:
        UserError: where only full training batches are wanted and there is none.
    """
    batch_size, count = options.batch_size, len(sampler)
    drop_last = False
    if training:
        batch_size = options.training_batch_size
        if options.drop_last and count < batch_size:
            raise UserError(
                f"data loader.drop_last: {count} training samples a process do not fill one batch of {batch_size}; "
                "lower loader.batch_size or set loader.drop_last: false"
            )
        # BatchNorm cannot normalise a batch of one.
        drop_last = options.drop_last or (count > batch_size > 1 and count % batch_size == 1)
    return CountedLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        drop_last=drop_last,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        # Its own generator: otherwise each epoch's loader would take a seed from the global one.
        generator=torch.Generator().manual_seed(0),
    )
