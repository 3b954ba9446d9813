from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from evaluation.__main__ import main
from evaluation.commands.efficiency import build_experiment
from evaluation.efficiency import BatchCost, Costs
from tests.evaluation.test_efficiency import EXPERIMENT


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(EXPERIMENT))
    return path


def test_counts_are_printed_and_written(experiment: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = experiment.with_name("other") / "tiny.yaml"
    other.parent.mkdir()
    other.write_text(experiment.read_text().replace("size: 32", "size: 64"))
    target = experiment.with_name("out.json")
    arguments = ["efficiency", str(experiment), str(other), "--counts-only", "--json", str(target), "--markdown"]
    assert main(arguments) == 0
    rows = capsys.readouterr().out.strip().splitlines()
    assert len(rows) == 4
    first, second = json.loads(target.read_text()).values()
    assert first["counts"]["parameters"] == second["counts"]["parameters"]
    assert first["counts"]["image_flops"] < second["counts"]["image_flops"]
    assert first["costs"] is None
    # Two files of one name are distinguished by their paths.
    assert str(other.resolve()) in rows[3]


def test_a_runs_numbers_are_next_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lightning.pytorch import Trainer

    task, _ = build_experiment(EXPERIMENT, "cpu")
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, barebones=False)
    trainer.strategy.connect(task)
    run = tmp_path / "tiny" / "20260101-000000"
    (run / "checkpoints").mkdir(parents=True)
    trainer.save_checkpoint(run / "checkpoints" / "best.ckpt", weights_only=True)

    def measured(builders: dict[str, object], *_: object, **__: object) -> dict[str, Costs]:
        return {name: Costs("cpu", 1, name, {1: BatchCost([0.25], [1.0], 9)}) for name in builders}

    monkeypatch.setattr("evaluation.efficiency.measure", measured)
    assert main(["efficiency", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "p50 [ms], batch 1" in printed
    assert "250.0" in printed
    (values,) = json.loads((run / "efficiency.json").read_text()).values()
    assert values["counts"]["parameters"] == sum(one.numel() for one in task.parameters())
    assert values["costs"]["batches"]["1"]["peak_bytes"] == 9


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_gpu_that_is_not_there_is_refused(experiment: Path, device: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["efficiency", str(experiment), "--device", device]) == 2
    assert f"--device {device}: cannot be used here" in capsys.readouterr().err


def test_a_model_that_is_no_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["efficiency", str(tmp_path / "nothing.yaml")]) == 2
    assert "nothing.yaml" in capsys.readouterr().err
