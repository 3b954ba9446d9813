from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules.options import ImageOptions, LoaderOptions
from tests.support.data import Noise, Recorder, Seen, run, small, trainer
from vitrail.types import Batch


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """What four epochs show, in the main process and without a stop."""
    return run(tmp_path_factory.mktemp("whole"), 4)


def test_epochs_differ_and_each_shows_every_sample(uninterrupted: Seen) -> None:
    orders = [[place for e, _, ids, _ in uninterrupted if e == epoch for place in ids] for epoch in range(4)]
    assert all(sorted(order) == list(range(30)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_lightning_shows_the_same_with_workers(tmp_path: Path, uninterrupted: Seen) -> None:
    assert run(tmp_path, 4, workers=2) == uninterrupted


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("on_train_epoch_end", [True, False])
def test_resuming_between_epochs_changes_nothing(
    tmp_path: Path, uninterrupted: Seen, workers: int, on_train_epoch_end: bool
) -> None:
    saver = ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=on_train_epoch_end)
    first, second = Recorder(), Recorder()
    trainer(tmp_path, 2, saver).fit(first, datamodule=small(num_workers=workers))
    trainer(tmp_path, 4).fit(
        second, datamodule=small(num_workers=workers), ckpt_path=saver.last_model_path, weights_only=True
    )
    assert first.seen + second.seen == uninterrupted


@pytest.mark.parametrize(("workers", "steps"), [(0, 3), (0, 8), (0, 11), (0, 16), (2, 3), (2, 8)])
def test_resuming_within_an_epoch_changes_nothing(
    tmp_path: Path, uninterrupted: Seen, workers: int, steps: int
) -> None:
    saver = ModelCheckpoint(tmp_path, filename="at-{step}", every_n_train_steps=steps, save_top_k=-1)
    trainer(tmp_path, 4, saver, max_steps=steps).fit(Recorder(), datamodule=small(num_workers=workers))
    resumed = Recorder()
    path = next(tmp_path.glob(f"at-step={steps}.ckpt"))
    trainer(tmp_path, 4).fit(resumed, datamodule=small(num_workers=workers), ckpt_path=path, weights_only=True)
    assert resumed.seen == uninterrupted[steps:]


def test_resuming_after_a_validation_within_an_epoch_changes_nothing(tmp_path: Path, uninterrupted: Seen) -> None:
    saver = ModelCheckpoint(tmp_path, filename="at-{step}", save_top_k=-1, save_on_train_epoch_end=False)
    trainer(tmp_path, 2, saver, val_check_interval=3).fit(Recorder(), datamodule=small())
    for steps in (3, 14):
        resumed = Recorder()
        path = next(tmp_path.glob(f"at-step={steps}.ckpt"))
        trainer(tmp_path, 4, val_check_interval=3).fit(resumed, datamodule=small(), ckpt_path=path, weights_only=True)
        assert resumed.seen == uninterrupted[steps:]


def test_distinct_batches_are_resumed_within_an_epoch(tmp_path: Path) -> None:
    def data() -> Noise:
        return small(sampling="distinct", batch_size=2)

    whole, resumed = Recorder(), Recorder()
    trainer(tmp_path, 2).fit(whole, datamodule=data())
    steps = len(whole.seen) // 2 + 3
    saver = ModelCheckpoint(tmp_path, filename="at-{step}", every_n_train_steps=steps, save_top_k=-1)
    trainer(tmp_path, 2, saver, max_steps=steps).fit(Recorder(), datamodule=data())
    path = next(tmp_path.glob(f"at-step={steps}.ckpt"))
    trainer(tmp_path, 2).fit(resumed, datamodule=data(), ckpt_path=path, weights_only=True)
    assert resumed.seen == whole.seen[steps:]
    labels = data().table.targets["class"]
    assert all(labels[first] != labels[second] for _, _, (first, second), _ in whole.seen)


def test_changed_data_are_told_on_resume(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, save_last=True)
    trainer(tmp_path, 1, saver).fit(Recorder(), datamodule=Noise(30, image=ImageOptions(size=4)))
    with pytest.warns(UserWarning, match="the data have changed since the checkpoint"):
        trainer(tmp_path, 2).fit(
            Recorder(),
            datamodule=Noise(31, image=ImageOptions(size=4)),
            ckpt_path=saver.last_model_path,
            weights_only=True,
        )


class Reporting(Recorder):
    """Writes what each process was given to a file."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def setup(self, stage: str) -> None:
        torch.set_num_threads(1)  # a forked process must not use its parent's thread pool

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.evaluated["val"] += batch["sample_id"][~batch["is_padding"]].tolist()

    def on_fit_end(self) -> None:
        report = {"seen": self.seen, "val": self.evaluated["val"]}
        (self.folder / f"{self.global_rank}.json").write_text(json.dumps(report))


@pytest.mark.parametrize("injects_samplers", [False, True])
def test_two_real_processes_see_every_sample_once(tmp_path: Path, injects_samplers: bool) -> None:
    runner = trainer(tmp_path, 2, devices=2, strategy="ddp_fork", use_distributed_sampler=injects_samplers)
    runner.fit(
        Reporting(tmp_path), datamodule=Noise(53, image=ImageOptions(size=4), loader=LoaderOptions(batch_size=8))
    )
    reports = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for epoch in range(2):
        shares = [[place for e, _, ids, _ in report["seen"] if e == epoch for place in ids] for report in reports]
        assert [len(share) for share in shares] == [27, 27]
        assert set(shares[0] + shares[1]) == set(range(53))
    assert sorted(reports[0]["val"] + reports[1]["val"]) == sorted([*range(53, 62)] * 2)


def test_test_and_predict_run_through_lightning(tmp_path: Path) -> None:
    model = Recorder()
    runner = trainer(tmp_path, 1)
    runner.fit(model, datamodule=small())
    assert model.evaluated["val"] == list(range(30, 39))
    runner.test(model, datamodule=small(), verbose=False)
    assert model.evaluated["test"] == list(range(39, 47))
    predicted = runner.predict(model, datamodule=small(num_workers=1))
    assert predicted == [[39, 40, 41, 42], [43, 44, 45, 46]]


def test_overfitting_on_few_batches_works(tmp_path: Path) -> None:
    model = Recorder()
    trainer(tmp_path, 2, overfit_batches=2).fit(model, datamodule=small())
    assert [ids for _, _, ids, _ in model.seen] == [[0, 1, 2, 3], [4, 5, 6, 7]] * 2
