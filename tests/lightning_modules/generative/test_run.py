from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from experiments.train.cli import main
from lightning_modules.checkpoint import load_task
from lightning_modules.generative import GenerativeClassifier
from tests.experiments.conftest import only_run
from tests.experiments.several_processes import Made
from tests.support.models import write_qwen2_vl
from tests.support.plain_figures import plain_figures

EXPERIMENT = """
name: colours
seed_everything: 1
test_best: true
data:
  class_path: tests.experiments.several_processes.Made
  init_args: {test_size: 150}
model:
  class_path: lightning_modules.GenerativeClassifier
  init_args:
    pretrained: false
    answers: {questions: {colour: "Which colour?"}}
    lr: 3.0e-3
    schedule: onecycle
trainer:
  max_epochs: 8
  check_val_every_n_epoch: 8
  accelerator: cpu
  gradient_clip_val: 1.0
  enable_progress_bar: false
  enable_model_summary: false
  num_sanity_val_steps: 0
  log_every_n_steps: 1
wandb: {mode: disabled}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory of a model trained from scratch to name colours."""
    root = tmp_path_factory.mktemp("trainable")
    # Small networks need larger weights than the default to begin with.
    positions = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    language: dict[str, Any] = {"num_hidden_layers": 1, "hidden_size": 64, "initializer_range": 0.1}
    language["rope_parameters"] = positions
    write_qwen2_vl(root / "model", vision={"depth": 1, "initializer_range": 0.2}, **language)
    experiment = yaml.safe_load(EXPERIMENT)
    experiment["model"]["init_args"]["model"] = str(root / "model")
    (root / "colours.yaml").write_text(yaml.safe_dump(experiment))
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with plain_figures():
        assert main(["fit", "--config", str(root / "colours.yaml"), "--runs", str(root / "runs")]) == 0
    return only_run(root / "runs")


def test_accuracy_is_above_chance(trained: Path) -> None:
    predictions = pd.read_parquet(trained / "predictions" / "test.parquet")
    logits = np.stack(predictions["logits_colour"].tolist())
    targets = predictions["target_colour"].to_numpy()
    known = targets >= 0
    right = (logits.argmax(axis=1) == targets)[known]
    majority = np.bincount(targets[known]).max() / len(right)
    # Three standard errors above always predicting the commonest colour.
    assert len(right) > 100
    assert right.mean() > majority + 3 * np.sqrt(majority * (1 - majority) / len(right))
    assert (trained / "reports" / "test_colour.csv").exists()
    record = yaml.safe_load((trained / "run.json").read_text())
    assert record["stages"][-1]["metrics"]["test/colour/accuracy"] == pytest.approx(right.mean())


@torch.no_grad()
def test_a_checkpoint_alone_gives_the_same_predictions(trained: Path) -> None:
    task = load_task(trained / "checkpoints" / "best.ckpt")
    assert isinstance(task, GenerativeClassifier)
    arguments = yaml.safe_load((trained / "config.yaml").read_text())["data"]["init_args"]
    data = Made(**arguments)
    data.prepare_data()
    data.setup("test")
    batch = next(iter(data.test_dataloader()))
    rows = pd.read_parquet(trained / "predictions" / "test.parquet").set_index("sample_id")
    written = np.stack(rows.loc[batch["sample_id"].numpy(), "logits_colour"].tolist())
    np.testing.assert_allclose(task(batch["image"])["colour"].numpy(), written, atol=1e-5, rtol=1e-4)
