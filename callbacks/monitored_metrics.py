"""A metric that other callbacks watch must exist; without it no checkpoint would ever be chosen."""

from __future__ import annotations

from difflib import get_close_matches

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from vitrail.errors import UserError


class MonitoredMetrics(Callback):
    """Stops a training after its first validation where a callback monitors a ``val/…`` metric that nobody computes."""

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
