from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from lightning_modules.optim import checked_options, scaling_factor
from tests.callbacks.tiny import SPLIT_SIZES, TASKS, MadePhotos
from tests.lightning_modules.tiny import TinyData, tiny_classifier, tiny_trainer
from vitrail.errors import UserError

BATCH = 4


class Rates(pl.Callback):
    """Notes the learning rates that each step is done with."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.seen.append([group["lr"] for group in optimizer.param_groups])


def rates(folder: Path, options: dict[str, Any], **changes: Any) -> list[list[float]]:
    watch = Rates()
    task = tiny_classifier(class_names=TASKS["class"], lr=1e-3, optim_options={"backbone_lr": 1e-4, **options})
    tiny_trainer(folder, callbacks=[watch], limit_val_batches=0, **changes).fit(task, MadePhotos(BATCH))
    return watch.seen


@pytest.mark.parametrize(("rule", "power"), [("linear", 1.0), ("sqrt", 0.5)])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_every_rate_of_every_step_is_scaled(tmp_path: Path, rule: str, power: float, accumulate: int) -> None:
    plain = rates(tmp_path, {}, accumulate_grad_batches=accumulate)
    scaled = rates(tmp_path, {"lr_scaling": rule, "lr_base_batch": 32}, accumulate_grad_batches=accumulate)
    assert len(plain) == SPLIT_SIZES["train"] / BATCH / accumulate
    factor = (BATCH * accumulate / 32) ** power
    for before, after in zip(plain, scaled, strict=True):
        assert after == pytest.approx([lr * factor for lr in before])


def test_one_line_tells_the_rates(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        rates(tmp_path, {"lr_scaling": "linear", "lr_base_batch": 8})
        assert [line for line in caplog.messages if "lr_scaling" in line] == [
            "lr_scaling linear: 4 samples a step, written for 8; learning rates x 0.5, at most backbone 5e-05, head "
            "0.0005"
        ]
        caplog.clear()
        rates(tmp_path, {})
        assert not [line for line in caplog.messages if "lr_scaling" in line]


def test_processes_count() -> None:
    # 8 GPUs with 256 images each learn 8 times as fast as one (Goyal et al., 2017).
    assert scaling_factor({"lr_scaling": "linear"}, 8 * 256) == 8
    assert scaling_factor({"lr_scaling": "sqrt", "lr_base_batch": 512}, 8 * 256) == 2
    assert scaling_factor({"lr_scaling": "sqrt"}, 128) == pytest.approx(math.sqrt(0.5))
    assert scaling_factor({}, None) == 1


def test_data_without_batch_size_are_refused(tmp_path: Path) -> None:
    task = tiny_classifier(optim_options={"lr_scaling": "linear"})
    with pytest.raises(UserError, match=r"optim_options.lr_scaling: the data have no batch size"):
        tiny_trainer(tmp_path).fit(task, TinyData())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr_scaling": "cubic"}, "'cubic' is unknown; choose one of none, linear, sqrt"),
        ({"lr_scaling": "sqrt", "lr_base_batch": 0}, "lr_base_batch: must be at least 1"),
        ({"lr_base_batch": 64}, "does nothing without lr_scaling"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        checked_options(options)
