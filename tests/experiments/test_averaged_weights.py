"""Averaged weights: those that were validated are in ``best.ckpt``, and every command uses them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from scipy.special import softmax

from app.state.runs import ServedRun
from experiments.__main__ import main as experiments
from experiments.train.cli import main
from lightning_modules.checkpoint import load_task
from retrieval.gallery import Gallery
from tests.experiments.conftest import error_line
from tests.support.data import write_products
from vitrail.predictions import Predictions, read_predictions

EPOCHS = 2

EXPERIMENT = """
name: averaged
data:
  class_path: datamodules.Products
  init_args:
    root: {root}
    attributes: [colour]
    image: {{size: 32, crop_fraction: 1.0}}
    loader: {{batch_size: 8, predict: [test]}}
    checks: {{allow_leaks: [exact, near]}}
model:
  class_path: lightning_modules.MultiTaskClassifier
  init_args: {{backbone: test_efficientnet, pretrained: false, lr: 0.02, schedule: constant}}
trainer:
  max_epochs: {epochs}
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  num_sanity_val_steps: 2
wandb: {{mode: disabled}}
"""

CALLBACKS = """
trainer:
  callbacks:
    - class_path: callbacks.EmbeddingExport
      init_args: {splits: [test]}
"""

ITS_OWN = (
    CALLBACKS
    + """
    - class_path: lightning.pytorch.callbacks.EMAWeightAveraging
      init_args: {decay: 0.9}
"""
)
A_SETTING = (
    CALLBACKS
    + """
ema: {decay: 0.9}
"""
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("averaged")
    write_products(folder / "products", classes=2, instances=4, views=3, size=32)
    path = folder / "averaged.yaml"
    path.write_text(EXPERIMENT.format(root=folder / "products", epochs=EPOCHS))
    return path


@pytest.fixture(scope="module")
def command(base: Path) -> Callable[..., Path]:
    """Run a command on the experiment, and return its newest run directory."""

    def run(command: str, overlay: str, *arguments: str) -> Path:
        (base.parent / "overlay.yaml").write_text(overlay)
        runs = base.parent / "runs"
        configs = ["--config", str(base), "--config", str(base.parent / "overlay.yaml")]
        assert main([command, *configs, "--runs", str(runs), *arguments]) == 0
        return max(runs.glob("*/*"), key=lambda path: (path / "run.json").stat().st_mtime)

    return run


@pytest.fixture(scope="module")
def trained(command: Callable[..., Path]) -> Callable[[str], Path]:
    """Train with an overlay once; the run is not changed by a test."""
    return functools.cache(lambda overlay: command("fit", overlay))


def logits(run: Path, split: str = "test") -> dict[str, np.ndarray[Any, Any]]:
    found: Predictions = read_predictions(run / "predictions" / f"{split}.parquet")
    return dict(found.logits)


def states(run: Path, name: str = "best") -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weights of a checkpoint: those that every command uses, and those that were trained."""
    content = torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)
    return content["state_dict"], content["current_model_state"]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    "overlay",
    [
        pytest.param(A_SETTING, id="a setting"),
        pytest.param(ITS_OWN, id="a callback of its own"),
    ],
)
def test_every_command_uses_the_weights_that_were_validated(
    command: Callable[..., Path], overlay: str, base: Path
) -> None:
    run = command("fit", overlay, "--test_best=true")
    best = run / "checkpoints" / "best.ckpt"
    used, raw = states(run)
    assert not same(used, raw)
    scores = pd.read_csv(run / "metrics.csv")["val/loss"].dropna()
    expected = logits(run)
    # The gallery is filled by the test within `fit`.
    task = load_task(best)
    names = read_predictions(run / "predictions" / "test.parquet").names
    images = [Image.open(base.parent / "products" / "images" / Path(name).name) for name in names]
    batch = torch.stack([torch.from_numpy(np.asarray(image.convert("RGB"))).permute(2, 0, 1) for image in images])
    with torch.no_grad():
        direct = task(batch)
    for name, values in expected.items():
        np.testing.assert_allclose(direct[name].numpy(), values, rtol=1e-4, atol=1e-5)
    gallery = Gallery.open(str(run / "gallery"))
    stored = gallery.table(["confidence_class"])
    answered = ServedRun(run, device="cpu").predict(images)
    for name, values in expected.items():
        for row, answer in zip(values, answered, strict=True):
            np.testing.assert_allclose(answer.tasks[name].probabilities, softmax(row), rtol=1e-3, atol=1e-5)
    highest = softmax(expected["class"].astype(np.float64), axis=1).max(axis=1)
    np.testing.assert_allclose(sorted(stored.column("confidence_class").to_pylist()), sorted(highest), rtol=1e-3)
    for arguments in (["test", overlay], ["predict", overlay], ["validate", overlay]):
        (run / "predictions" / "test.parquet").unlink(missing_ok=True)
        assert command(*arguments, "--ckpt_path", str(best)) == run
        if arguments[0] != "validate":
            for name, values in logits(run, arguments[0]).items():
                np.testing.assert_array_equal(values, expected[name])
    validated = pd.read_csv(run / "validate" / "metrics.csv")["val/loss"].dropna()
    assert validated.iloc[-1] == pytest.approx(scores.min(), rel=1e-6)
    assert experiments(["export", str(run), "--format", "safetensors"]) == 0
    exported = load_file(run / "export" / "safetensors" / "model.safetensors")
    assert same({name: value for name, value in exported.items() if name in used}, used)


@pytest.mark.slow
def test_a_start_that_is_never_reached_validates_and_saves_what_is_trained(
    trained: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    run = trained("ema: {decay: 0.9, start_step: 1000}")
    assert "no average was taken" in caplog.text
    plain = trained("ema: null")
    scores = pd.read_csv(run / "metrics.csv")["val/loss"].dropna()
    assert scores.nunique() == EPOCHS
    assert scores.tolist() == pd.read_csv(plain / "metrics.csv")["val/loss"].dropna().tolist()
    for name in ("best", "last"):
        used, raw = states(run, name)
        assert same(used, raw)
        expected = torch.load(plain / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]
        assert same(used, expected)


@pytest.mark.slow
def test_a_checkpoint_of_weights_alone_holds_the_average_too(trained: Callable[[str], Path]) -> None:
    def best(overlay: str) -> dict[str, torch.Tensor]:
        content = torch.load(trained(overlay) / "checkpoints" / "best.ckpt", weights_only=True)
        state: dict[str, torch.Tensor] = content["state_dict"]
        return state

    assert same(best("{ema: {decay: 0.9}, checkpoint: {save_weights_only: true}}"), best("ema: {decay: 0.9}"))


def test_the_average_begins_with_the_weights_of_the_start_step(trained: Callable[[str], Path]) -> None:
    # Two steps an epoch: the first update is a copy, after the last step of all.
    averaged, raw = states(trained(f"ema: {{decay: 0.9, start_step: {2 * EPOCHS - 1}}}"), "last")
    assert same(averaged, raw)
    averaged, same_raw = states(trained(f"ema: {{decay: 0.9, start_step: {2 * EPOCHS - 2}}}"), "last")
    assert same(same_raw, raw)
    assert not same(averaged, raw)


@pytest.mark.slow
def test_a_training_with_averages_does_not_go_on_without(
    command: Callable[..., Path], trained: Callable[[str], Path], base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained("ema: {decay: 0.9}")
    last = ["--ckpt_path", str(run / "checkpoints" / "last.ckpt"), "--trainer.max_epochs", str(EPOCHS + 1)]
    assert main(["fit", "--config", str(base), "--runs", str(base.parent / "runs"), *last]) == 2
    assert "trained with averaged weights" in capsys.readouterr().err
    longer = command("fit", "ema: {decay: 0.9}", *last)
    used, raw = states(longer, "last")
    assert not same(used, raw)


@pytest.mark.parametrize(
    ("overlay", "key"),
    [
        ("ema: {decay: 1.0}", "ema.decay"),
        ("ema: {deacy: 0.9}", "ema"),
        (ITS_OWN + "ema: {decay: 0.9}", "all average weights"),
    ],
)
def test_mistakes_are_one_line(
    base: Path, overlay: str, key: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "overlay.yaml").write_text(overlay)
    arguments = ["fit", "--config", str(base), "--config", str(tmp_path / "overlay.yaml"), "--runs", str(tmp_path)]
    assert main(arguments) == 2
    assert key in error_line(capsys)
