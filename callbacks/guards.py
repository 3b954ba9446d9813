"""Guards of a training: losses that are not finite, and monitored metrics that do not exist."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch.nn.modules.batchnorm import _BatchNorm
from torchmetrics import Metric

from vitrail.errors import UserError
from vitrail.files import write_text_atomically
from vitrail.types import Batch

NON_FINITE_FILE = "non_finite.json"

Action = Literal["stop", "skip"]


@dataclass
class _LossCheck:
    """What is known of a batch whose loss is being checked.

    Attributes:
        epoch: counted from 0.
        step: optimizer steps done before it.
        batch: its place in the epoch.
        sample_id: int64 ``(B,)``, where the batch was.
        loss: float scalar, where the model is.
        bad: how many processes have a loss that is not finite, float scalar; on its way from the GPU until ``ready``.
        ready: None where ``bad`` can be read at once.
    """

    epoch: int
    step: int
    batch: int
    sample_id: torch.Tensor
    loss: torch.Tensor
    bad: torch.Tensor
    ready: torch.cuda.Event | None = None

    def is_bad(self) -> bool:
        """Whether the loss was not finite on any process; waits until the GPU has come so far."""
        if self.ready is not None:
            self.ready.synchronize()
        return bool(self.bad.item())


class NonFiniteLoss(Callback):
    """Stops training at a loss that is infinite or not a number, or leaves the step out.

    The loss of every training batch is checked. All processes agree: a batch that is bad on one of them is bad for
    all, so none waits for another. The agreement is one more exchange of a single number each batch.

    ``stop`` costs a GPU no waiting: the result is copied while it computes, and read one batch later. Weights that
    were updated by the bad batch never reach a checkpoint, because the result is read before one is written. On CPUs
    it is read at once.

    ``skip`` must know before the weights change, so the CPU waits for the loss of each batch. It leaves out the whole
    step, with all batches that it accumulates: weights, optimizer, averaged weights (``WeightAveraging`` and its kind),
    BatchNorm's statistics and the averages of the epoch stay as they were before it. The step counts for the schedule
    and for ``global_step``. With ``precision: 16-mixed`` torch's scaler lowers its scale as for any overflow. Gradients
    that are not finite although the loss is are not checked.

    Args:
        action: ``stop`` ends the run with one line and exit code 2; ``skip`` goes on.
        max_skipped: steps that may be left out in the whole training, resumed parts included; one more stops it.

    Raises:
        UserError: if a value is out of range, and in training as described.
    """

    def __init__(self, action: Action = "stop", max_skipped: int = 10) -> None:
        if action not in get_args(Action):
            raise UserError(f"non_finite.action: {action!r} is unknown; choose one of {', '.join(get_args(Action))}")
        if max_skipped < 1:
            raise UserError(f"non_finite.max_skipped: must be at least 1, got {max_skipped}; to stop use action: stop")
        self.action = action
        self.max_skipped = max_skipped
        self._skipped = 0
        self._events: list[dict[str, Any]] = []
        self._batch: tuple[torch.Tensor, int] | None = None
        self._pending: _LossCheck | None = None
        self._before: _Statistics | None = None
        self._is_bad = False
        self._left_out = False

    def state_dict(self) -> dict[str, Any]:
        """How many steps were left out."""
        return {"skipped": self._skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._skipped = int(state_dict["skipped"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, or continue the file of the steps before; the count has come from the checkpoint."""
        self._pending, self._before, self._is_bad, self._left_out = None, None, False, False
        path = Path(trainer.default_root_dir) / NON_FINITE_FILE
        noted = json.loads(path.read_text(encoding="utf-8"))["batches"] if trainer.global_step and path.exists() else []
        self._events = [event for event in noted if event["step"] < trainer.global_step]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Note which samples come, and at the first batch of a step what may have to be restored."""
        self._batch = (batch["sample_id"], batch_idx)
        if self.action == "skip" and self._before is None:
            self._before = _Statistics(pl_module)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        """Check the loss, or that of the batch before.

        Raises:
            UserError: if it is not finite, unless the step can be left out.
        """
        before, self._pending = self._pending, self._check(trainer, loss.detach())
        if before is not None:
            self._handle(trainer, before)
        if self._pending.ready is None:
            self._resolve(trainer)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Undo what a bad batch did: a checkpoint may be written before the step is over."""
        if self._is_bad and self._before is not None:
            self._before.restore()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Leave a bad step out: an optimizer passes by what has no gradient, its decay included."""
        if self._is_bad:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
            if self._before is not None:
                self._before.restore()
        self._left_out, self._is_bad, self._before = self._is_bad, False, None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let averaged weights pass by a step that was left out: they would move towards weights that did not."""
        if not self._left_out:
            return
        self._left_out = False
        for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set at run time
            if isinstance(callback, WeightAveraging):
                callback._latest_update_step = trainer.global_step

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Read the result of the last batch, before its weights are evaluated or saved.

        Raises:
            UserError: if its loss was not finite.
        """
        self._resolve(trainer)

    on_save_checkpoint = on_train_end = on_validation_start

    def _check(self, trainer: Trainer, loss: torch.Tensor) -> _LossCheck:
        """Ask whether the loss is finite on all processes, without waiting for the result where possible."""
        bad = (~torch.isfinite(loss)).float()
        if trainer.world_size > 1:
            # Lightning's own reduction would put a barrier in front.
            dist.all_reduce(bad)
        sample_id, batch_idx = self._batch or (torch.empty(0, dtype=torch.int64), 0)
        check = _LossCheck(trainer.current_epoch, trainer.global_step, batch_idx, sample_id, loss, bad)
        if self.action == "stop" and loss.is_cuda:
            check.bad = torch.empty((), pin_memory=True).copy_(bad, non_blocking=True)
            check.ready = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's
            check.ready.record()
        return check

    def _resolve(self, trainer: Trainer) -> None:
        last, self._pending = self._pending, None
        if last is not None:
            self._handle(trainer, last)

    def _handle(self, trainer: Trainer, check: _LossCheck) -> None:
        if not check.is_bad():
            return
        self._pending = None
        steps = self._skipped + (not self._is_bad)
        skips = self.action == "skip" and steps <= self.max_skipped
        event = _event(trainer, check, skips)
        path = Path(trainer.default_root_dir) / NON_FINITE_FILE
        self._events.append(event)
        if trainer.is_global_zero:
            content = {"skipped_steps": steps if skips else self._skipped, "batches": self._events}
            write_text_atomically(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        where = f"epoch {event['epoch']}, batch {event['batch']}"
        if not skips:
            much = f" after {self._skipped} steps were left out" if self.action == "skip" else ""
            raise UserError(
                f"training loss is {event['processes'][0]['loss']} at {where}{much}; {path} names the samples: look at "
                "them, lower the learning rate, or leave some steps out (non_finite.action: skip, "
                "non_finite.max_skipped)"
            )
        if not self._is_bad:
            rank_zero_warn(f"non_finite: step {event['step']} ({where}) is left out, {steps} of {self.max_skipped}")
        self._skipped, self._is_bad = steps, True


def _event(trainer: Trainer, check: _LossCheck, skips: bool) -> dict[str, Any]:
    """What is known of a bad batch; every process calls this."""
    ids = check.sample_id.tolist()
    names: list[str] = getattr(getattr(trainer, "datamodule", None), "sample_names", list)()
    own = {
        "rank": trainer.global_rank,
        "loss": str(float(check.loss)),
        "sample_id": ids,
        "name": [names[index] for index in ids] if names else None,
    }
    processes: list[dict[str, Any]] = [own]
    if trainer.world_size > 1:
        gathered: list[Any] = [None] * trainer.world_size
        dist.all_gather_object(gathered, own)
        processes = [one for one in gathered if not math.isfinite(float(one["loss"]))]
    return {
        "epoch": check.epoch,
        "step": check.step,
        "batch": check.batch,
        "action": "skipped" if skips else "stopped",
        "processes": processes,
    }


class _Statistics:
    """What a forward pass moves without any optimizer: BatchNorm's statistics and the epoch's averages."""

    def __init__(self, model: LightningModule) -> None:
        norms = (module for module in model.modules() if isinstance(module, _BatchNorm) and module.training)
        self._buffers = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers(recurse=False)]
        metrics = [module for module in model.modules() if isinstance(module, Metric)]
        self._unused = [metric for metric in metrics if not metric.update_called]
        self._states = [
            (metric, {name: _copy(value) for name, value in metric.metric_state.items()})
            for metric in metrics
            if metric.update_called
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back."""
        for buffer, before in self._buffers:
            buffer.copy_(before)
        for metric in self._unused:
            metric.reset()
        for metric, states in self._states:
            for name, value in states.items():
                setattr(metric, name, _copy(value))


def _copy(state: Any) -> Any:
    return [value.clone() for value in state] if isinstance(state, list) else state.clone()


class MonitoredMetrics(Callback):
    """Stops a training after its first validation where a callback monitors a ``val/…`` metric that no one computes."""

    def __init__(self) -> None:
        self._checked = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare names with what was computed; Lightning calls this before checkpoints are chosen.

        Raises:
            UserError: with the names that resemble the missing one.
        """
        # Not every metric is computed in the sanity check.
        if self._checked or trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        self._checked = True
        known = sorted(name for name in trainer.callback_metrics if name.startswith("val/"))
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set at run time
        for callback in callbacks:
            monitor = getattr(callback, "monitor", None)
            if isinstance(monitor, str) and monitor.startswith("val/") and monitor not in known:
                near = get_close_matches(monitor, known, n=5, cutoff=0.0)
                raise UserError(
                    f"{type(callback).__name__}.monitor: there is no metric {monitor!r}; the nearest of {len(known)} "
                    f"are {', '.join(near)}"
                )
