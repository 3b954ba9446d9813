"""A checkpoint as if it were written between two training batches: nothing begun, nothing left to log.

Lightning saves while a batch is still being finished (its metrics are not logged yet) or an epoch is (its averages are
not), and makes up for part of it when it resumes. Here the moment is the beginning of the next batch, when everything
of the last one is done; what has begun of the next one is taken back for the time of saving.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch import Trainer


@runtime_checkable
class CountsBatches(Protocol):
    """A loader whose state says how many batches it has delivered."""

    pending: int
    """Batches that were delivered and do not count, because nothing was done with them yet."""


@contextmanager
def between_batches(trainer: Trainer) -> Iterator[None]:
    """What this block saves, in the first callback's ``on_train_batch_start``, is the state between two batches."""
    loop = trainer.fit_loop.epoch_loop
    counters = (loop.batch_progress.current, loop.batch_progress.total)
    loaders = [loader for loader in _loaders(trainer) if isinstance(loader, CountsBatches)]
    for counter in counters:
        counter.ready -= 1
    for loader in loaders:
        loader.pending = 1
    idle = int(_resumes_with_an_idle_step(trainer))
    loop._batches_that_stepped -= idle
    try:
        yield
    finally:
        loop._batches_that_stepped += idle
        for counter in counters:
            counter.ready += 1
        for loader in loaders:
            loader.pending = 0


def _resumes_with_an_idle_step(trainer: Trainer) -> bool:
    """Whether Lightning, when it resumes here, will go once through its loop without a batch.

    It does so where a validation has just been, at the beginning of an epoch too, and counts a logging step too many.
    """
    progress, every = trainer.fit_loop.epoch_loop.batch_progress, trainer.check_val_every_n_epoch
    if not trainer.enable_validation or (every is not None and (trainer.current_epoch + 1) % every):
        return False
    done = progress.total.completed if every is None else progress.current.completed
    interval = trainer.val_check_batch
    validated = isinstance(interval, int) and done % interval == 0
    return validated and progress.current.completed % trainer.accumulate_grad_batches == 0


def _loaders(trainer: Trainer) -> list[Any]:
    loader = trainer.train_dataloader
    return list(loader) if isinstance(loader, (list, tuple)) else [loader]
