"""What only two real processes can show. Each imports everything again, so these take a minute on two cores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch.multiprocessing.spawn import spawn
from torch.utils.data import DataLoader

from lightning_modules.metrics import SplitMetrics
from tests.lightning_modules.test_metrics import TASKS, WEIGHTS, by_scikit_learn, feed, joined, numbers, two_shares
from tests.support.models import TinyData, make_batch, tiny_multitask, tiny_trainer, warm_cosine
from vitrail.types import Batch

pytestmark = pytest.mark.slow


def on_one_of_two_processes(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    metrics = SplitMetrics(TASKS, WEIGHTS)
    feed(metrics, two_shares()[rank], [20, 9] if rank == 0 else [11])
    Path(folder, f"{rank}.json").write_text(json.dumps(numbers(metrics)))
    dist.destroy_process_group()


def test_two_processes_with_unequal_shares_agree_with_one(tmp_path: Path) -> None:
    spawn(on_one_of_two_processes, args=(str(tmp_path),), nprocs=2)  # type: ignore[no-untyped-call]
    expected = by_scikit_learn(joined(*two_shares()))
    for rank in range(2):
        assert json.loads(Path(tmp_path, f"{rank}.json").read_text()) == pytest.approx(expected, rel=1e-5)


class DataOfRank(TinyData):
    """Each process trains on other samples; the second has one row of padding more in validation."""

    def train_dataloader(self) -> DataLoader[Batch]:
        start = 50 * self.process()
        return self._loader([make_batch([start, start + 1]), make_batch([start + 2, start + 3])])

    def val_dataloader(self) -> DataLoader[Batch]:
        return self._loader(
            [make_batch([20, 21, 22])] if self.process() == 0 else [make_batch([23, 24, 20], padding=1)]
        )

    def process(self) -> int:
        return self.trainer.global_rank if self.trainer else 0


class UnfreezeLater(pl.Callback):
    """Freezes after DDP has wrapped the model, unfreezes in the second epoch, and notes the weights at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        pl_module.freeze_backbone()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            pl_module.unfreeze_backbone()

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        parameters = dict(pl_module.named_parameters())
        torch.save({"parameters": parameters, "metrics": metrics}, self.folder / f"{trainer.global_rank}.pt")


def test_two_processes_learn_the_same_weights_and_count_every_sample_once(tmp_path: Path) -> None:
    pl.seed_everything(3)
    task = tiny_multitask(optim_options=warm_cosine())
    begin = {name: value.detach().clone() for name, value in task.named_parameters()}
    strategy = DDPStrategy(start_method="spawn", find_unused_parameters=True)
    trainer = tiny_trainer(tmp_path, devices=2, strategy=strategy, max_epochs=2, callbacks=[UnfreezeLater(tmp_path)])
    trainer.fit(task, DataOfRank())
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name, value in first["parameters"].items():
        assert torch.equal(value, second["parameters"][name]), name
        assert not torch.equal(value, begin[name]), name
    assert first["metrics"]["val/loss"] == second["metrics"]["val/loss"]
    # Five samples, not six: a share of fifths.
    fifths = first["metrics"]["val/class/accuracy"] * 5
    assert fifths == pytest.approx(round(fifths))
