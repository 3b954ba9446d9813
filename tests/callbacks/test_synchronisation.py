"""No training step waits for the device: every read of a value by the CPU within a step is a fault.

On a CPU nothing waits, so operations that would make a GPU's queue run empty are counted as they are dispatched, and
calls that copy to the CPU as they are made. Generative models are left out: those of transformers read sizes of images
and positions of tokens from tensors in every step.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from torch.utils._python_dispatch import TorchDispatchMode

from callbacks import ConfusionMatrixLogger, PredictionWriter, RetrievalMetrics
from callbacks.averaged_weights import AveragedWeights, EmaOptions
from callbacks.confusion import ClassReport
from callbacks.finetuning import BackboneUnfreezing, FrozenFeatures
from callbacks.guards import MonitoredMetrics, NonFiniteLoss
from callbacks.last_checkpoint import LastCheckpoint
from callbacks.trackers import EpochLines, ProgressBar
from datamodules import Wares
from datamodules.options import ImageOptions, LoaderOptions
from lightning_modules.classification import FewShotClassifier, MultiTaskClassifier
from lightning_modules.options import FewShotOptions, OptimOptions
from tests.support.models import (
    TinyData,
    TinyPairs,
    tiny_classifier,
    tiny_multitask,
    tiny_pair,
    tiny_trainer,
)

WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive", "bincount"}
"""Operations whose result, or its shape, the CPU must know."""

NOT_OURS = ("torch/optim/adam", "torch/optim/swa_utils", "torch/utils/data", "transformers/masking_utils")
"""They read counters and random states, which are on the CPU, and whether a batch of texts has padding."""

COPIES = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__")


class Waits(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Collects operations that wait while ``active``, with the line of ours that caused them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self.active = False
        self.steps = 0
        self.found: list[str] = []

    def note(self, name: str) -> None:
        if not self.active:
            return
        frames = traceback.extract_stack()
        if any(frame.name == "is_bad" for frame in frames):
            return  # on a GPU the guard reads a copy that has arrived by then, one batch later
        if any(part in frame.filename for frame in frames[-8:] for part in NOT_OURS):
            return
        self.found.append(f"{name}: " + " < ".join(f"{one.filename}:{one.lineno}" for one in frames[-3:-12:-1]))

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else []
        if name in WAITING or any(one is not None and one.dtype == torch.bool for one in indices):
            self.note(name)
        return function(*args, **(kwargs or {}))


class Window(pl.Callback):
    """Watches from the second batch of an epoch to the end of the last one; the first one is logged."""

    def __init__(self, waits: Waits) -> None:
        self.waits = waits

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.waits.active = batch_idx > 0
        self.waits.steps += batch_idx > 0

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.waits.active = False

    on_validation_start = on_train_epoch_end


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    mode = Waits()
    for name in COPIES:
        original = getattr(torch.Tensor, name)

        def noted(tensor: torch.Tensor, *args: Any, own: Any = original, called: str = name, **named: Any) -> Any:
            mode.note(called)
            return own(tensor, *args, **named)

        monkeypatch.setattr(torch.Tensor, name, noted)
    return mode


def watched_fit(waits: Waits, task: Any, data: Any, folder: Path, *more: pl.Callback, **options: Any) -> None:
    callbacks = [
        LastCheckpoint(),
        Window(waits),
        *more,
        NonFiniteLoss(),
        LearningRateMonitor("step"),
        MonitoredMetrics(),
        EpochLines(),
    ]
    own = [ProgressBar(), AveragedWeights(), EmaOptions(decay=0.9).callback()]
    if isinstance(data, Wares):
        own += [ConfusionMatrixLogger(), ClassReport(), PredictionWriter(["val"])]
    if isinstance(data, TinyPairs):
        own += [RetrievalMetrics()] if data.has_captions else []
    defaults = {"logger": True, "log_every_n_steps": 1000, "max_epochs": 2, "enable_progress_bar": True}
    with waits:
        tiny_trainer(folder, callbacks=[*callbacks, *own], **{**defaults, **options}).fit(task, data)
    assert waits.steps
    assert not waits.found, "\n".join(dict.fromkeys(waits.found))


def wares(**options: Any) -> Wares:
    loader = LoaderOptions(batch_size=8)
    return Wares(n_samples=48, views=1, image=ImageOptions(size=32), resolution=32, loader=loader, **options)


def every_kind(folder: Path) -> tuple[Any, Any]:
    data = wares(every_kind=True)
    data.setup("fit")
    task = MultiTaskClassifier(
        backbone="test_resnet", pretrained=False, image_size=32, tasks=data.tasks, task_facts=data.task_facts
    )
    return task, data


def multi_task() -> tuple[Any, Any]:
    data = wares()
    data.setup("fit")
    return MultiTaskClassifier(backbone="test_resnet", pretrained=False, image_size=32, tasks=data.tasks), data


def few_shot(folder: Path) -> tuple[Any, Any]:
    data = wares()
    few = FewShotOptions(method="linear_probe")
    return FewShotClassifier("test_resnet", data.class_names, image_size=32, pretrained=False, few_shot=few), data


CASES: dict[str, Callable[[Path], tuple[Any, Any]]] = {
    "classifier": lambda folder: (tiny_classifier(), TinyData()),
    "multi-task": lambda folder: (tiny_multitask(optim_options=OptimOptions(warmup_epochs=1.0)), TinyData()),
    "every kind of label": every_kind,
    "dual encoder, prompts": lambda folder: (tiny_pair(folder), TinyPairs()),
    "dual encoder, captions": lambda folder: (tiny_pair(folder, class_names=None), TinyPairs(captions=True)),
    "few-shot": few_shot,
}


@pytest.mark.parametrize("name", CASES)
def test_no_step_waits_for_the_device(name: str, waits: Waits, tmp_path: Path) -> None:
    watched_fit(waits, *CASES[name](tmp_path), tmp_path)


def test_phases_on_features_that_are_computed_once_do_not_wait(waits: Waits, tmp_path: Path) -> None:
    phases = BackboneUnfreezing(1, lr=1e-3, backbone_lr=1e-4, head_lr=1e-3)
    watched_fit(waits, *multi_task(), tmp_path, phases, FrozenFeatures("always", n_views=1))
    assert (tmp_path / "checkpoints" / "last.ckpt").is_file()


def test_accumulated_steps_do_not_wait_either(waits: Waits, tmp_path: Path) -> None:
    watched_fit(waits, tiny_classifier(), TinyData(), tmp_path, accumulate_grad_batches=2, gradient_clip_val=1.0)


def test_a_step_that_waits_is_noticed(waits: Waits, tmp_path: Path) -> None:
    class Waiting(pl.Callback):
        def on_after_backward(self, trainer: pl.Trainer, pl_module: Any) -> None:
            ones = torch.ones(3)
            assert float(ones.sum()) == 3
            ones[ones > 0].sum()

    with waits:
        tiny_trainer(tmp_path, callbacks=[Window(waits), Waiting()]).fit(tiny_classifier(), TinyData())
    assert {one.split(":")[0] for one in waits.found} >= {"__float__", "index"}
