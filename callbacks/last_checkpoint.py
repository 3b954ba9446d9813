"""``last.ckpt``, from which training is resumed, and what happens when the process is asked to end.

Whatever interrupts a run, resuming from ``last.ckpt`` gives the weights, metrics and logs of a run that was never
interrupted. Lightning saves while a batch or an epoch is still being finished, and compensates for part of it when it
resumes. Here the moment is the beginning of the next batch, when everything of the last one is done and logged; what
has begun of the next one is taken back for the time of saving.
"""

from __future__ import annotations

import io
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

from datamodules.loading.dataset import CountedLoader
from vitrail.errors import DISK_FULL, UserError
from vitrail.files import check_zip, local_folder, upload, write_atomically
from vitrail.runs import Run


@contextmanager
def between_batches(trainer: Trainer) -> Iterator[None]:
    """What this block saves, in the first callback's ``on_train_batch_start``, is the state between two batches."""
    loop, train = trainer.fit_loop.epoch_loop, trainer.train_dataloader
    counters = (loop.batch_progress.current, loop.batch_progress.total)
    several = train if isinstance(train, list | tuple) else [train]
    loaders = [loader for loader in several if isinstance(loader, CountedLoader)]
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


class DeferredSignals:
    """Notes signals, which may come in the middle of an optimizer step, and returns them when asked.

    Args:
        signals: which.
        forward: called at once with a signal that has come, to pass it on to processes that this one started.
    """

    def __init__(self, signals: Iterable[signal.Signals], forward: Callable[[signal.Signals], None]) -> None:
        self._signals = tuple(signals)
        self._forward = forward
        self._noted: list[signal.Signals] = []
        self._previous: dict[signal.Signals, Any] = {}

    def install(self) -> None:
        """Replace the signals' handlers; nothing happens outside of the main thread."""
        for number in self._signals:
            with suppress(ValueError):
                self._previous[number] = signal.signal(number, self._note)

    def remove(self) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            with suppress(ValueError):
                signal.signal(number, handler)
        self._previous = {}

    def take(self) -> signal.Signals | None:
        """The signal that came first of those that were not taken yet."""
        return self._noted.pop(0) if self._noted else None

    def handle_as_before(self, number: signal.Signals) -> None:
        """Call the handler that the signal was taken over from."""
        handler = self._previous.get(number)
        if callable(handler):
            handler(number, None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        came = signal.Signals(number)
        if came in self._noted:
            # Asked twice, end at once.
            raise SystemExit(128 + number)
        self._noted.append(came)
        self._forward(came)


EXIT_TERMINATED = 128 + signal.SIGTERM
"""143, what a shell reports for a process that SIGTERM has ended."""

_STEPS_BETWEEN_AGREEMENTS = 20


class WholeCheckpoints(TorchCheckpointIO):
    """Writes checkpoints atomically in their own folder, flushed to the disk, and reads none that is damaged.

    Lightning's own writes to the system's temporary folder and moves the file from there: where that is another file
    system, moving is copying, and a kill leaves half a checkpoint in the place of a good one.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write it."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        content = io.BytesIO()
        torch.save(checkpoint, content)
        with write_atomically(Path(path)) as partial:
            partial.write_bytes(content.getbuffer())

    @override
    def load_checkpoint(
        self, path: str | Path, map_location: Any = lambda storage, loc: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read it.

        Raises:
            UserError: where it is damaged.
        """
        if "://" not in str(path):
            check_zip(Path(path), "take the run's other checkpoint (best.ckpt, last.ckpt), or train again")
        return super().load_checkpoint(path, map_location, weights_only)


class LastCheckpoint(Callback):
    """Writes ``last.ckpt`` at the beginning of every epoch but the first, at the end of training, and in between.

    On SIGTERM the batch at hand, or the validation, is finished, the checkpoint is written and the process exits with
    143. Under SLURM with Lightning's automatic requeueing, its signal is handled by Lightning's plugin in the same
    place. With several processes, which must agree on the batch, this may take some batches longer. Where an optimizer
    step accumulates several batches, all of this waits for the step.

    It must be the first callback, so that none has begun with the next batch.

    Args:
        every_n_train_steps: write it also after every N batches; 0 for not.
        every_minutes: write it also N minutes after it was last written; 0 for not.
        dirpath: folder; ``checkpoints`` in the run directory by default.
        copy_to: address at an object store, such as ``s3://bucket/runs/name``, to which every checkpoint that is
            written is copied, with the best one so far and the run's configuration. An upload that fails is
            reported, and made up for by the next one; training goes on.
    """

    def __init__(
        self,
        every_n_train_steps: int = 0,
        every_minutes: float = 0.0,
        dirpath: str | None = None,
        copy_to: str | None = None,
    ) -> None:
        if every_n_train_steps < 0 or every_minutes < 0:
            raise UserError("last.every_n_train_steps, last.every_minutes: must be 0 or more")
        self.every_n_train_steps = every_n_train_steps
        self.every_minutes = every_minutes
        if dirpath is not None and local_folder(dirpath) is None:
            raise UserError(f"last.dirpath: must be a folder; got {dirpath}; set last.copy_to to that address as well")
        if copy_to is not None and local_folder(copy_to) is not None:
            raise UserError(f"last.copy_to: must be an address such as s3://bucket/runs/name; got {copy_to}")
        self.dirpath = dirpath
        self.copy_to = copy_to and copy_to.rstrip("/")
        self._written_at = time.monotonic()
        self._first_batch = True
        self._due = False
        self._copied: dict[str, int | None] = {}
        self._signals = DeferredSignals((), lambda number: None)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have all checkpoints of the trainer written atomically, unless the user has chosen how they are written."""
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeCheckpoints()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the signals.

        Raises:
            UserError: if another callback comes first.
        """
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set at run time
        if callbacks[0] is not self:
            raise UserError("trainer.callbacks: put LastCheckpoint first")
        # Strategies for one device do not expose their environment.
        environment = trainer._accelerator_connector.cluster_environment
        signals = [signal.SIGTERM]
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            # Lightning ignores SIGTERM there, because SLURM sends it to a job that it requeues.
            signals = [environment.requeue_signal or signal.SIGUSR1]

        def forward(number: signal.Signals) -> None:
            if (launcher := trainer.strategy.launcher) is not None and hasattr(launcher, "kill"):
                launcher.kill(number)

        self._signals = DeferredSignals(signals, forward)
        self._signals.install()
        self._written_at = time.monotonic()
        config = Path(trainer.default_root_dir) / Run.CONFIG
        if self.copy_to and trainer.is_global_zero and config.is_file():
            # A wrong address or missing rights show before hours of training.
            upload(config, f"{self.copy_to}/{config.name}")
        # Nothing has happened yet that is worth saving.
        self._first_batch, self._due = True, False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Write the checkpoint where it is due, and end where that was asked for.

        Raises:
            SIGTERMException: to end the process.
        """
        first_batch, self._first_batch = self._first_batch, False
        self._due = self._due or (not first_batch and self._is_due(trainer, batch_idx))
        if batch_idx % trainer.accumulate_grad_batches:
            return  # gradients that wait for the optimizer are in no checkpoint
        came = self._agreed_signal(trainer)
        if came is not None or self._due:
            self._due = False
            with between_batches(trainer):
                self._write(trainer)
        if came == signal.SIGTERM:
            rank_zero_info(f"SIGTERM: {self._path(trainer)} is written; go on with --ckpt_path {self._path(trainer)}")
            raise SIGTERMException(EXIT_TERMINATED)
        if came is not None:
            # Lightning saves a checkpoint of its own, and has the job requeued.
            with between_batches(trainer):
                self._signals.handle_as_before(came)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the checkpoint of the finished training."""
        self._signals.remove()
        self._write(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the signals back."""
        self._signals.remove()

    def _is_due(self, trainer: Trainer, batch_idx: int) -> bool:
        done = trainer.fit_loop.epoch_loop.batch_progress.total.completed
        if batch_idx == 0 or (self.every_n_train_steps and done % self.every_n_train_steps == 0):
            return True
        if not self.every_minutes:
            return False
        return bool(self._agreed(trainer, int(time.monotonic() - self._written_at >= 60 * self.every_minutes)))

    def _agreed_signal(self, trainer: Trainer) -> signal.Signals | None:
        if trainer.world_size == 1:
            return self._signals.take()
        # Asking the others makes an accelerator wait, so it is not done for every batch.
        done = trainer.fit_loop.epoch_loop.batch_progress.total.completed
        if trainer.accumulate_grad_batches == 1 and done % _STEPS_BETWEEN_AGREEMENTS:
            return None
        number = self._agreed(trainer, int(self._signals.take() or 0))
        return signal.Signals(number) if number else None

    def _agreed(self, trainer: Trainer, value: int) -> int:
        """The largest value of all processes."""
        if trainer.world_size == 1:
            return value
        values = trainer.strategy.all_gather(torch.tensor(value, device=trainer.strategy.root_device))
        return int(values.max())

    def _write(self, trainer: Trainer) -> None:
        if getattr(trainer, "fast_dev_run", False):
            return
        path = self._path(trainer)
        try:
            trainer.save_checkpoint(path, weights_only=False)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            state = "the one before is untouched" if path.exists() else "there is none yet"
            raise UserError(
                f"{path}: the checkpoint cannot be written, the disk is full; {state}; free some space and go on with "
                "--ckpt_path last"
            ) from error
        self._written_at = time.monotonic()
        if self.copy_to and trainer.is_global_zero:
            self._copy(path, trainer)

    def _copy(self, path: Path, trainer: Trainer) -> None:
        """Copy the best checkpoint, then this one: with an older best one it would be given the wrong weights."""
        best = Path(trainer.default_root_dir) / Run.BEST
        try:
            for file in (best, path):
                state = file.stat().st_mtime_ns if file.is_file() else None
                if state != self._copied.get(file.name):
                    upload(file, f"{self.copy_to}/{file.name}")
                    self._copied[file.name] = state
        except UserError as error:
            rank_zero_warn(f"last.copy_to: {error}; training goes on, the next checkpoint is copied again")

    def _path(self, trainer: Trainer) -> Path:
        return Path(self.dirpath or Path(trainer.default_root_dir) / Run.CHECKPOINTS) / "last.ckpt"
