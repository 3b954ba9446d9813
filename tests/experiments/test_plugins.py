"""A task class and a data set of a user's own module, found in the working directory, in every command."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from vitrail.programs import PROGRAMS, main
from vitrail.runs import Run
from vitrail.testing import check_datamodule, check_task
from vitrail.trust import PLUGINS

PLUGIN = '''
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from datamodules.base import ImageDataModule
from datamodules.table import SampleTable
from lightning_modules.classification import ClassificationTask
from lightning_modules.options import LossOptions
from vitrail.types import LABEL_TASK, TaskFacts


class Stripes(ImageDataModule):
    """Images with stripes in one of two directions, made as they are asked for."""

    def __init__(self, n: int = 40, **shared: Any) -> None:
        super().__init__(**shared)
        self.n = n

    def load_table(self) -> SampleTable:
        rows = range(self.n)
        frame = pd.DataFrame(
            {
                "name": [f"stripes {row}" for row in rows],
                "source": [str(row) for row in rows],
                "split": [("train", "train", "val", "test")[row // 2 % 4] for row in rows],
                "group": [f"{row}" for row in rows],
                "kind": [("across", "down")[row % 2] for row in rows],
            }
        )
        return SampleTable.from_frame(frame, {LABEL_TASK: "kind"}, origin="stripes")

    def read_image(self, index: int) -> torch.Tensor:
        generator = np.random.default_rng(index)
        lines = generator.integers(0, 256, (1, 40, 1), dtype=np.uint8).repeat(40, axis=2)
        image = torch.from_numpy(lines.repeat(3, axis=0))
        return image if index % 2 else image.transpose(1, 2).contiguous()


class OneLayer(ClassificationTask):
    def __init__(
        self,
        class_names: list[str],
        image_size: int = 32,
        width: int = 8,
        task_facts: TaskFacts | None = None,
    ) -> None:
        super().__init__(lr=0.01, weight_decay=0.0, schedule="constant")
        self.save_hyperparameters()
        self.configure_encoder("test_resnet", image_size, pretrained=False)
        self.configure_tasks({LABEL_TASK: class_names}, task_facts, LossOptions())
        features = self.encoder.num_features
        self.layers = nn.Sequential(nn.Linear(features, width), nn.ReLU(), nn.Linear(width, len(class_names)))

    def classify(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        return {LABEL_TASK: self.outputs[0](self.layers(features))}
'''
EXPERIMENT = """
data: {class_path: chain_plugin.Stripes, init_args: {image: {size: 32}, loader: {batch_size: 8}}}
model: {class_path: chain_plugin.OneLayer, init_args: {width: 6}}
trainer:
  max_epochs: 1
  enable_progress_bar: false
  enable_model_summary: false
  num_sanity_val_steps: 0
  callbacks: [{class_path: callbacks.StartWeights}]
wandb: {mode: disabled}
test_best: true
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the module, an experiment and a photo."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(PLUGINS, "")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.delitem(sys.modules, "chain_plugin", raising=False)
    Path("chain_plugin.py").write_text(PLUGIN, encoding="utf-8")
    Path("stripes.yaml").write_text(EXPERIMENT, encoding="utf-8")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 1, 3), dtype=np.uint8).repeat(40, axis=1)
    Image.fromarray(pixels).save("photo.png")
    return tmp_path


def succeed(*arguments: str) -> None:
    assert main("vitrail", [*arguments, "--plugins", "chain_plugin"]) == 0, arguments


def trained(seed: int = 1) -> str:
    succeed("fit", "--config", "stripes.yaml", "--seed_everything", str(seed))
    return str(Run.latest("stripes").path)


def test_a_plugin_trains_predicts_and_is_refused_without_its_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained()
    succeed("predict", run, "photo.png")
    assert "chain_plugin.OneLayer" in str(Run(run).config["model"])
    monkeypatch.setenv(PLUGINS, "")
    capsys.readouterr()

    assert main("vitrail", ["predict", run, "photo.png"]) == 2

    assert "chain_plugin.OneLayer" in (error := capsys.readouterr().err)
    assert error.count("\n") == 1


def commands(runs: list[str]) -> list[list[str]]:
    """Command lines in an order in which each finds what it needs."""
    run, data = runs[0], ["--config", "stripes.yaml"]
    best = f"{run}/checkpoints/best.ckpt"
    return [
        ["audit", *data],
        ["pack", *data, "--to", "shards"],
        ["explore", *data, "--to", "explored", "--folds", "2"],
        ["linear-probe", *data, "--backbone", "test_resnet", "--pretrained", "false"],
        ["learning-curve", *data, "--to", "curve", "--seeds", "2", "--rounds", "2", "--start", "4", "--step", "4"],
        ["validate", "--ckpt_path", best],
        ["test", "--ckpt_path", best],
        ["evaluate", run, "--data", "chain_plugin.Stripes", "--name", "more", "--data.init_args.n", "16"],
        ["predict", run, "photo.png", "--to", "predicted.csv"],
        ["select", "--run", run, "--pool", "stripes.yaml", "--to", "next.csv", "--n", "3", "--labelled-too"],
        ["calibrate", run],
        ["summary", *runs],
        ["slices", run],
        ["compare", *runs],
        ["report", run],
        ["explain", run, "--image", "photo.png"],
        ["efficiency", run, "--repeats", "1", "--batch-sizes", "1"],
        ["index", "--run", run],
        ["info", "--gallery", f"{run}/gallery"],
        ["search", "--gallery", f"{run}/gallery", "--image", "photo.png"],
        ["export", run, "--format", "onnx", "safetensors", "--min-agreement", "0", "--repeats", "0"],
        ["predict", f"{run}/export/safetensors", "photo.png"],
        ["soup", *runs],
        ["wise-ft", run, "--alphas", "0", "1"],
        ["ensemble", *runs, "--name", "both"],
        ["sweep", "sweep.yaml", "--workers", "1"],
        ["fit", "--config", f"{run}/config.yaml", "--ckpt_path", "last", "--trainer.max_epochs", "2"],
    ]


ELSEWHERE = {
    "app": "built below, not served",
    "ablate": "the engine of sweep",
    "push-to-hub": "needs the hub; uploads an export",
    "base-to-novel": "for dual encoders",
    "retrieval": "for dual encoders",
    "build-index": "reads vectors alone",
    "upgrade": "reads vectors alone",
}
SWEEP = """
program: experiments/__main__.py
method: grid
metric: {name: val/loss, goal: minimize}
parameters: {model.init_args.width: {values: [4]}}
command: ["${env}", python, -m, experiments, fit, --config, stripes.yaml, "${args}"]
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_plugin_works_in_every_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("sweep.yaml").write_text(SWEEP, encoding="utf-8")
    runs = [trained(seed) for seed in (1, 2)]
    lines = commands(runs)
    every = {name for program in PROGRAMS.values() for name in program.commands}
    assert {line[0] for line in lines} == every - {*ELSEWHERE}, "a new command needs a line"
    printed = {}
    for line in lines:
        capsys.readouterr()
        succeed(*line)
        printed[line[0]] = capsys.readouterr().out

    run = Path(runs[0])
    assert pd.read_csv("predicted.csv")["class"].isin(["across", "down"]).all()
    assert len(pd.read_csv("next.csv")) == 3
    assert "40 added" in printed["index"]
    assert "photo.png" in printed["predict"]
    exported = {path.suffix for path in run.glob("export/*/model.*")}
    assert {".onnx", ".safetensors"} <= exported
    for file in ("report.html", "figures/explain/explain.html", "evaluations/more/predictions/test.parquet"):
        assert (run / file).is_file()
    assert list(Path("runs").glob("*_soup/*/checkpoints/best.ckpt"))
    assert list(Path("runs").glob("both/*/checkpoints/best.ckpt"))
    assert list(Path("runs/sweeps").glob("**/checkpoints/best.ckpt"))


@pytest.mark.slow
def test_a_plugin_keeps_the_contract_and_is_served(folder: Path) -> None:
    from app.server import build_blocks
    from app.state.startup import load

    run = trained()

    context = load([Path(run)], [])
    assert context.runs
    assert build_blocks(context) is not None
    assert "index" in check_datamodule(Run(run).load_datamodule())
    assert "export" in check_task(Run(run).load_model(), Run(run).load_datamodule())
