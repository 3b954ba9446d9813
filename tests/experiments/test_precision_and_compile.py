"""``torch.compile`` and bfloat16 by YAML: the results are the same, within what each may change."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

from callbacks import CompileModel, PredictionWriter
from datamodules import Wares
from datamodules.options import ImageOptions, LoaderOptions
from experiments.train.cli import main
from lightning_modules import Ensemble, load_task
from lightning_modules.base import VisionTask
from tests.experiments.conftest import only_run
from tests.experiments.several_processes import TASKS, Made, build, write_models
from tests.support.models import write_clip
from tests.support.runs import TINY, MadePhotos, tiny_classifier, tiny_trainer
from vitrail.errors import UserError
from vitrail.predictions import read_predictions

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="inductor needs a C++ compiler"
)
OVERLAYS = Path(__file__).parents[2] / "experiments" / "overlays"

PAIRS = """
name: pairs
data:
  class_path: datamodules.Wares
  init_args: {n_samples: 60, resolution: 32, image: {size: 32}, loader: {batch_size: 8}}
model:
  class_path: lightning_modules.DualEncoder
  init_args: {lr: 0.001}
trainer:
  max_epochs: 2
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  log_every_n_steps: 1
wandb: {mode: disabled}
"""

KINDS: dict[str, list[str]] = {
    "plain": [],
    "compiled": ["--config", str(OVERLAYS / "compile.yaml")],
    "bf16": ["--config", str(OVERLAYS / "bf16.yaml")],
}


@pytest.fixture(scope="module", params=["classifies", pytest.param("embeds", marks=pytest.mark.slow)])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each kind, trained and tested when it is first asked for."""
    folder = tmp_path_factory.mktemp("runs")
    config = folder / "experiment.yaml"
    embeds = request.param == "embeds"
    config.write_text(PAIRS if embeds else TINY.replace("test_resnet", "test_vit"))
    more = ["--model.init_args.towers", f"{{model: {write_clip(folder / 'clip')}}}"] if embeds else []
    more += ["--trainer.num_sanity_val_steps", "0", "--test_best", "true", "--trainer.max_epochs", "1"]

    class Runs(dict[str, Path]):
        def __missing__(self, kind: str) -> Path:
            where = ["--config", str(config), "--runs", str(folder / kind)]
            assert main(["fit", *where, *KINDS[kind], *more]) == 0
            self[kind] = only_run(folder / kind)
            return self[kind]

    return Runs()


def losses(run: Path) -> list[float]:
    values: list[float] = pd.read_csv(run / "metrics.csv")["train/loss_step"].dropna().tolist()
    return values


@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [pytest.param("compiled", 1e-5, marks=[pytest.mark.slow, needs_compiler]), ("bf16", 2e-2)],
)
def test_losses_are_those_of_the_plain_run(runs: dict[str, Path], kind: str, tolerance: float) -> None:
    assert len(losses(runs["plain"])) > 3
    assert losses(runs[kind]) == pytest.approx(losses(runs["plain"]), rel=tolerance)


def close(found: Path, expected: Path, tolerance: float) -> None:
    """Compares predictions, by the largest logit."""
    one, other = (read_predictions(run / "predictions" / "test.parquet") for run in (found, expected))
    np.testing.assert_array_equal(one.sample_id, other.sample_id)
    for task, logits in other.logits.items():
        assert abs(one.logits[task] - logits).max() <= tolerance * max(1.0, abs(logits).max()), task


@needs_compiler
@pytest.mark.slow
def test_compiled_backbones_learn_to_give_the_same_logits(runs: dict[str, Path]) -> None:
    close(runs["compiled"], runs["plain"], 1e-5)


def test_the_same_weights_give_the_same_logits_in_bfloat16(runs: dict[str, Path], tmp_path: Path) -> None:
    task = load_task(runs["plain"] / "checkpoints" / "best.ckpt")
    data = Wares(n_samples=60, resolution=32, image=ImageOptions(size=32), loader=LoaderOptions(batch_size=8), seed=42)
    trainer = tiny_trainer(tmp_path, precision="bf16-mixed", callbacks=[PredictionWriter(["test"])])
    trainer.test(task, datamodule=data, verbose=False)
    close(tmp_path, runs["plain"], 2e-2)
    (plain, other) = (read_predictions(run / "predictions" / "test.parquet") for run in (runs["plain"], tmp_path))
    assert any((other.logits[task] != logits).any() for task, logits in plain.logits.items())


@pytest.mark.parametrize("kind", [pytest.param("compiled", marks=[pytest.mark.slow, needs_compiler]), "bf16"])
def test_checkpoints_have_the_same_names_and_types_and_load_without(runs: dict[str, Path], kind: str) -> None:
    plain, other = (torch.load(runs[name] / "checkpoints" / "last.ckpt", weights_only=True) for name in ("plain", kind))
    kinds = [{key: value.dtype for key, value in found["state_dict"].items()} for found in (plain, other)]
    assert kinds[0] == kinds[1]
    load_task(runs[kind] / "checkpoints" / "last.ckpt")


def test_metrics_are_computed_in_float32(tmp_path: Path) -> None:
    seen: dict[str, set[torch.dtype]] = {"features": set(), "logits": set(), "loss": set()}
    task: Any = tiny_classifier()
    task.encoder.register_forward_hook(lambda module, inputs, output: seen["features"].add(output.dtype))
    update, losses = task.val_metrics.update_scores, task.val_metrics.update_losses

    def update_scores(logits: dict[str, torch.Tensor], targets: dict[str, torch.Tensor]) -> None:
        seen["logits"] |= {values.dtype for values in logits.values()}
        update(logits, targets)

    def update_losses(means: Any) -> None:
        seen["loss"] |= {mean.value.dtype for mean in means.values()}
        losses(means)

    task.val_metrics.update_scores, task.val_metrics.update_losses = update_scores, update_losses
    tiny_trainer(tmp_path, precision="bf16-mixed").validate(task, MadePhotos(), verbose=False)
    assert seen == {"features": {torch.bfloat16}, "logits": {torch.float32}, "loss": {torch.float32}}


class Steps(Callback):
    """Keeps the loss of each step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the tasks are built of."""
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


def results_of(task: VisionTask, folder: Path, callbacks: list[Callback], *, captions: bool) -> list[float]:
    """Losses of three steps, or some logits of a task that is not trained."""
    steps = Steps()
    limits = {"max_epochs": 1, "limit_train_batches": 3, "limit_val_batches": 0}
    trainer = tiny_trainer(folder, callbacks=[steps, *callbacks], **limits)
    data = Made(8, 8, captions=captions)
    if not isinstance(task, Ensemble):
        trainer.fit(task, datamodule=data)
        return steps.losses
    predicted: Any = trainer.predict(task, datamodule=data)
    found: list[float] = predicted[0]["logits"]["class"].flatten().tolist()
    return found


@pytest.mark.slow  # each takes a minute to compile
@needs_compiler
@pytest.mark.parametrize("name", TASKS)
def test_every_task_computes_the_same_when_compiled_as_the_overlay_does(
    name: str, models: Path, tmp_path: Path
) -> None:
    shipped = yaml.safe_load((OVERLAYS / "compile.yaml").read_text())["trainer"]["callbacks+"]["init_args"]
    captions = name == "captioned"
    torch._dynamo.reset()
    plain = results_of(build(name, models), tmp_path, [], captions=captions)
    counters.clear()
    with inductor.patch(compile_threads=1):
        compiled = results_of(build(name, models), tmp_path, [CompileModel(**shipped)], captions=captions)
    assert counters["stats"]["unique_graphs"] > 0
    assert len(plain) >= 3
    assert compiled == pytest.approx(plain, rel=1e-5)


def test_backbones_are_compiled_once_for_all_stages(tmp_path: Path) -> None:
    task = tiny_classifier()
    trainer = tiny_trainer(tmp_path, callbacks=[CompileModel("eager")], limit_train_batches=2, limit_val_batches=1)
    trainer.fit(task, datamodule=MadePhotos())
    compiled = task.backbone._compiled_call_impl
    assert compiled is not None
    trainer.validate(task, datamodule=MadePhotos(), verbose=False)
    assert task.backbone._compiled_call_impl is compiled


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "tvm"}, "CompileModel.backend: 'tvm' is unknown"),
        ({"mode": "fast"}, "CompileModel.mode: 'fast' is unknown"),
        ({"backend": "eager", "mode": "max-autotune"}, "is for the backend inductor"),
    ],
)
def test_values_that_make_no_sense_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        CompileModel(**arguments)
