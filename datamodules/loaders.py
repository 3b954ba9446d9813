"""From a data set, a sampler and the options to a loader."""

from __future__ import annotations

import torch
from torch.utils.data import DistributedSampler

from datamodules.captions import Texts
from datamodules.dataset import Collate, CountedLoader, ImageDataset
from datamodules.options import LoaderOptions
from datamodules.samplers import DistinctSampler, SampleKey, TrainSampler, inverse_frequency_weights
from datamodules.table import SampleTable
from vitrail.errors import UserError


def training_batch_size(options: LoaderOptions) -> int:
    """Samples of a training batch on each process."""
    return options["contrastive_batch_size"] or options["batch_size"]


def train_sampler(
    dataset: ImageDataset,
    table: SampleTable,
    texts: Texts,
    options: LoaderOptions,
    seed: int,
    rank: int,
    world_size: int,
) -> TrainSampler | DistinctSampler:
    """The order of training samples that the options ask for.

    Raises:
        UserError: where there is no task to balance on, or too few classes for a batch of different ones.
    """
    if options["sampling"] == "distinct":
        ids = torch.from_numpy(texts.positive_ids[dataset.indices])
        return DistinctSampler(ids, training_batch_size(options), seed, rank, world_size)
    weights = None
    if options["sampling"] == "balanced":
        task = options["balance_on"]
        if task not in table.tasks:
            raise UserError(f"data loader.balance_on: no task {task!r}; tasks are {', '.join(table.tasks)}")
        weights = inverse_frequency_weights(torch.from_numpy(table.targets[task][dataset.indices]))
    return TrainSampler(len(dataset), seed, rank, world_size, weights)


def train_loader(
    dataset: ImageDataset, sampler: DistributedSampler[SampleKey], collate: Collate, options: LoaderOptions
) -> CountedLoader:
    """Training batches.

    Raises:
        UserError: where only full batches are wanted and there is none.
    """
    batch_size = training_batch_size(options)
    if options["drop_last"] and len(sampler) < batch_size:
        raise UserError(
            f"data loader.drop_last: {len(sampler)} training samples a process do not fill one batch of "
            f"{batch_size}; lower loader.batch_size or set loader.drop_last: false"
        )
    # BatchNorm cannot normalise a batch of one.
    lone_picture = len(sampler) > batch_size > 1 and len(sampler) % batch_size == 1
    return _loader(dataset, sampler, collate, options, batch_size, drop_last=options["drop_last"] or lone_picture)


def eval_loader(
    dataset: ImageDataset, sampler: DistributedSampler[SampleKey], collate: Collate, options: LoaderOptions
) -> CountedLoader:
    """Evaluation batches."""
    return _loader(dataset, sampler, collate, options, options["batch_size"], drop_last=False)


def _loader(
    dataset: ImageDataset,
    sampler: DistributedSampler[SampleKey],
    collate: Collate,
    options: LoaderOptions,
    batch_size: int,
    drop_last: bool,
) -> CountedLoader:
    workers = options["num_workers"]
    return CountedLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        drop_last=drop_last,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        # Its own generator: else each epoch's loader would draw a seed from the global one.
        generator=torch.Generator().manual_seed(0),
    )
